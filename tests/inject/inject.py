#!/usr/bin/env python3
"""usage: inject.py CVMS PEER [--all] [-v] [NAME...].  Whole runs of the program, in each of which one call fails.

CVMS is the program linked with inject.c, PEER one without, for the other side of a connection.  Each scenario is run
once as it is; the calls of that run, told by what they are and by the path of callers they come from, are then failed
in turn, each with every error that it can have: the first call of each path, and of reading and writing the first few
as well.  --all: every call by its number, and from each on all that follow.  NAMEs pick scenarios; --fault=FAULT shows
what that one does, with INJECT_TRAP=1 in the environment where it comes about.

The rule for each run: it ends by itself; no signal, sanitizer report, leaked block or descriptor; status 0 only if all
that the undisturbed run wrote is there, whole, or if whoever lost something was told; else a documented status and a
line that says why; and never a line on stdout, in a record or in a report that the undisturbed run does not have.
With --valgrind each scenario runs once more, undisturbed, PEER under valgrind: no error, no block left.
The last line is `N passed, M failed`.
"""
import collections
import concurrent.futures
import errno
import http.client
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from harness import LIMIT, VERBOSE, check, closing, environment, finish, lock, shell  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
INPUTS = os.path.join(HERE, "../vectors/inputs")
KEYS = os.path.join(HERE, "../vectors/keys")
FIRST = 3                             # so many reads, writes and waits of each kind are failed by their number as well
TRIES = 8
JOBS = 6                              # runs at a time, for each processor: they mostly wait

EAI_SYSTEM, EAI_MEMORY, EAI_AGAIN = 11, 10, 3
SHORT = "short"
# What each call can fail with: those errors of its manual page that a user may meet, and for reads and writes too few
# bytes.
ERRORS = {
    "alloc": [errno.ENOMEM],
    "open": [errno.EACCES, errno.EMFILE],
    "access": [errno.EACCES],
    "close": [errno.EIO],
    "stat": [errno.EIO],
    "opendir": [errno.ENOMEM],
    "readdir": [errno.EIO],
    "fcntl": [errno.EBADF],
    "pipe": [errno.EMFILE],
    "read.file": [SHORT, errno.EINTR, errno.EIO],
    "read.socket": [SHORT, errno.EINTR, errno.EAGAIN, errno.ECONNRESET],
    "read.pipe": [errno.EINTR, errno.EAGAIN],
    "read.stdin": [SHORT, errno.EINTR, errno.EAGAIN, errno.EIO],
    "write.file": [SHORT, errno.EINTR, errno.ENOSPC, errno.EIO],
    "write.pipe": [SHORT, errno.EINTR, errno.EAGAIN, errno.EPIPE],
    "write.stdout": [SHORT, errno.EINTR, errno.EAGAIN, errno.ENOSPC, errno.EPIPE],
    "write.stderr": [SHORT, errno.EINTR, errno.EAGAIN, errno.EPIPE],
    "send": [SHORT, errno.EINTR, errno.EAGAIN, errno.ECONNRESET, errno.EPIPE],
    "accept": [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ECONNABORTED, errno.EINTR, errno.EPERM],
    "socket": [errno.EMFILE, errno.EAFNOSUPPORT],
    "bind": [errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL],
    "listen": [errno.EADDRINUSE],
    "connect": [errno.ECONNREFUSED, errno.ENETUNREACH],
    "shutdown": [errno.ENOTCONN],
    "getsockname": [errno.ENOBUFS],
    "getsockopt": [errno.ENOBUFS],
    "setsockopt": [errno.ENOPROTOOPT],
    "getaddrinfo": [-EAI_SYSTEM, -EAI_MEMORY, -EAI_AGAIN],
    "epoll_create": [errno.EMFILE],
    "epoll_add": [errno.ENOMEM, errno.ENOSPC],
    "epoll_mod": [errno.ENOMEM],
    "epoll_del": [errno.ENOMEM],
    "epoll_wait": [errno.EINTR],
    "poll": [errno.EINTR, errno.ENOMEM],
    "getrlimit": [errno.EPERM],
    "setrlimit": [errno.EPERM],
    "getentropy": [errno.EIO],
}
BY_NUMBER = re.compile(r"read|write|send|epoll_wait|poll|accept")
PASSING = {SHORT, errno.EINTR, errno.EAGAIN, errno.ECONNABORTED}     # these do not go on and on
LASTS = {"alloc", "open", "write", "epoll_add", "socket"}  # what may fail from some call on

ALL = "--all" in sys.argv
FAULT = next((a[8:] for a in sys.argv if a.startswith("--fault=")), None)
NAMES = [a for a in sys.argv[3:] if not a.startswith("-")]
CVMS, PEER = (os.path.abspath(p) for p in sys.argv[1:3])
runs = collections.Counter()
W = tempfile.mkdtemp(prefix="cvms-inject-")
DIRECT = ["-algo-path", f"{INPUTS}/algo.py", "-public-key-path", f"{KEYS}/rsa4096.pem", "-attested-tls-bool", "false"]


# ---- One run ----

class Run:
    """The program in a folder of its own, with at most one fault.  After end(): status, out, err, files, fired, log."""

    def __init__(self, fault=None):
        self.dir = tempfile.mkdtemp(dir=W)
        self.fault, self.status, self.peers, self.files, self.p = fault, None, [], {}, None
        self.fired, self.program = False, [CVMS]

    def path(self, name):
        return os.path.join(self.dir, name)

    def start(self, *args, stdin=subprocess.DEVNULL, **env):
        env = environment({"HOST": "localhost", **env, "INJECT_LOG": self.path("log")})
        if self.fault:
            env["INJECT"] = self.fault
        self.streams = [open(self.path(name), "w+b") for name in ("out", "err")]
        pipes = [subprocess.PIPE, subprocess.PIPE]
        self.p = subprocess.Popen([*self.program, *args], cwd=self.dir, env=env, stdin=stdin, stdout=pipes[0], stderr=pipes[1])
        self.copied = [threading.Thread(target=shutil.copyfileobj, args=pair, daemon=True)
                       for pair in zip((self.p.stdout, self.p.stderr), self.streams)]
        for thread in self.copied:
            thread.start()

    def serve(self, *args, **kw):
        """Starts a server; its address once the port is open, None if it ends before that."""
        ready = self.path("ready")
        os.mkfifo(ready)
        reading = os.open(ready, os.O_RDONLY | os.O_NONBLOCK)
        self.start(*args, "-ready-file", ready, **kw)
        ended = os.pidfd_open(self.p.pid)
        try:
            select.select([reading, ended], [], [], LIMIT)
            got = os.read(reading, 100).decode()
        except OSError:
            got = ""
        os.close(reading)
        os.close(ended)
        self.ending = not got.strip()       # it says so at the FIFO before it ends
        return got.strip() or None

    def peer(self, *args):
        """The other side, undisturbed.  It fails only with a line that says so."""
        p = subprocess.Popen([PEER, *args], cwd=self.dir, env=environment({"HOST": "localhost"}), stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.peers.append(finish(p)[:3])

    def end(self, *signals):
        for number in signals if not getattr(self, "ending", False) else ():
            self.p.send_signal(number)
        try:
            self.status = self.p.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.p.kill()
            self.p.wait()
        for thread in self.copied:
            thread.join(LIMIT)
        for f in self.streams:
            f.close()
        if self.p.stdin:
            try:
                self.p.stdin.close()
            except OSError:
                pass
        self.p.stdout.close()
        self.p.stderr.close()
        self.out, self.err = self.read("out"), self.read("err")
        self.log = [line.split() for line in self.read("log").splitlines()]
        self.fired = any(len(line) > 2 for line in self.log)
        return self

    def read(self, name):
        try:
            with open(self.path(name), encoding="utf-8", errors="backslashreplace") as f:
                return f.read()
        except FileNotFoundError:
            return ""

    def keep(self, *names):
        for name in names:
            self.files[name] = self.read(name)


# ---- The scenarios: what is run, and with it what must be the same afterwards ----

def folder():
    root = os.path.join(W, "folder")
    if not os.path.isdir(root):
        os.makedirs(os.path.join(root, "sub"))
        for name, text in ("a.csv", "a,b\n1,2\n"), ("sub/b.bin", "\0" * 70000), ("empty", ""):
            with open(os.path.join(root, name), "w") as f:
                f.write(text)
    return root


def certificates():
    """A CA, a server's and a client's certificate, made once."""
    made = os.path.join(W, "tls")
    if os.path.isdir(made):
        return made
    os.mkdir(made)
    ec = "openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
    sign = "openssl x509 -req -CA ca.pem -CAkey ca.key -CAcreateserial -days 9"
    script = f"""{ec} -x509 -days 9 -subj /CN=CA -keyout ca.key -out ca.pem
        {ec} -subj /CN=localhost -keyout server.key -out server.csr
        printf 'subjectAltName=DNS:localhost\\nextendedKeyUsage=serverAuth\\n' > server.ext
        {sign} -in server.csr -extfile server.ext -out server.pem
        {ec} -subj /CN=agent -keyout client.key -out client.csr
        printf 'subjectAltName=DNS:agent\\nextendedKeyUsage=clientAuth\\n' > client.ext
        {sign} -in client.csr -extfile client.ext -out client.pem"""
    shell(script, made)
    return made


def server_tls():
    t = certificates()
    return {"SERVER_CERT": f"{t}/server.pem", "SERVER_KEY": f"{t}/server.key", "CLIENT_CA_CERTS": f"{t}/ca.pem"}


def client_tls():
    t = certificates()
    return ["-ca", f"{t}/ca.pem", "-cert", f"{t}/client.pem", "-key", f"{t}/client.key"]


def serve(run):
    """A server in plaintext: text on stdout, a record; an agent host and a health check; SIGHUP, SIGTERM."""
    address = run.serve(*DIRECT, "-data-paths", f"{INPUTS}/data.csv,{folder()}", "-record", "record")
    if address:
        run.peer("agent", "-wait", "1s", "-job-id", "cvm-7", address)
        run.peer("health", address)
    run.end(signal.SIGTERM)
    run.keep("record")


def get(address, path):
    """What is there; nothing where the server can't give it."""
    connection = http.client.HTTPConnection(address, timeout=LIMIT)
    try:
        connection.request("GET", path)
        return connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return b""
    finally:
        connection.close()


def images(run):
    """A server with an encrypted image: all that skopeo asks for."""
    address = run.serve(*DIRECT, "-data-paths", f"{folder()}", "-algo-type", "python", "-deliver", "cli,oci")
    if address:
        run.peer("agent", "-once", "-wait", "1s", address)
        for name in re.findall(r"docker://[^/]+/([^:]+):latest", run.peers[-1][1]):
            manifest = get(address, f"/v2/{name}/manifests/latest")
            for digest in re.findall(r"sha256:[0-9a-f]{64}", manifest.decode(errors="replace")):
                get(address, f"/v2/{name}/blobs/{digest}")
    run.end(signal.SIGTERM)


def serve_tls(run):
    """The same over mutual TLS, JSON on stdout, certificates loaded anew."""
    address = run.serve(*DIRECT, "-output", "json", **server_tls())
    if address:
        run.p.send_signal(signal.SIGHUP)
        run.peer("agent", "-wait", "1s", *client_tls(), address)
        run.peer("health", *client_tls(), address)
    run.end(signal.SIGTERM)


def verdict(run):
    """A smoke test with commands on stdin; ends by itself, with a report."""
    address = run.serve(*DIRECT, "-until", "complete", "-timeout", "5s", "-expect", "Running/Starting",
                        "-reject", "panic|oom", "-report", "report.xml", "-control", stdin=subprocess.PIPE)
    if address:
        try:
            run.p.stdin.write(b"agents\nhelp\n")
            run.p.stdin.flush()
        except OSError:
            pass
        run.peer("agent", "-wait", "1s", address)
    run.end()
    run.keep("report.xml")


DELIVER = ["-algo-path", f"{INPUTS}/algo.py", "-algo-type", "python", "-deliver", "upload", "-results", "results.zip", "-until",
           "complete", "-timeout", "5s", "-private-key-path", f"{W}/users.key"]


def deliver(run):
    """A whole direct run: a file and a folder are uploaded, the results fetched."""
    address = run.serve(*DELIVER, "-data-paths", f"{INPUTS}/data.csv,{folder()}")
    if address:
        run.peer("agent", "-wait", "1s", "-agent-port", "0", address)
    run.end()
    run.keep("results.zip")


def fetch(run):
    """What agents fetch, and its key: a file and a folder, by HTTP/1.1."""
    tree = folder()
    hashes = subprocess.run([PEER, "checksum", f"{INPUTS}/algo.py", tree], capture_output=True, text=True, check=True).stdout.split()
    paths = f"blobs/algorithm-{hashes[0][:16]}", f"blobs/dataset-0-{hashes[2][:16]}", "kbs/v0/resource/cvms/key/algorithm"
    address = run.serve("-algo-path", f"{INPUTS}/algo.py", "-algo-type", "python", "-data-paths", tree, "-deliver", "http", HOST="127.0.0.1")
    for path in paths if address else ():
        try:
            with urllib.request.urlopen(f"http://{address}/{path}", timeout=LIMIT) as r:
                run.peers.append((0, len(r.read()), ""))
        except (OSError, http.client.HTTPException) as e:
            run.peers.append((1, 0, repr(e)))
    run.end(signal.SIGTERM)


class Clean:
    """An undisturbed server for a client with a fault; what it has shown is the run's .told."""

    def __init__(self, run, *flags, base=None, **env):
        self.run = run
        ready = run.path("ready")
        os.mkfifo(ready)
        self.p = subprocess.Popen([PEER, *(base or DIRECT), "-ready-file", ready, *flags], cwd=run.dir, env=environment({"HOST": "localhost", **env}),
                                  stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        with open(ready) as f:
            self.address = f.read().strip()

    def __enter__(self):
        return self.address

    def __exit__(self, *_):
        self.p.send_signal(signal.SIGTERM)
        status, out, err, _ = finish(self.p)
        self.run.server = (status, err)
        self.run.files["what the server has shown"] = out


def agent(run):
    with Clean(run) as address:
        run.start("agent", "-wait", "1s", "-job-id", "cvm-7", "-repeat", "2", address)
        run.end()


def agent_uploads(run):
    with Clean(run, "-data-paths", f"{INPUTS}/data.csv", base=DELIVER, HOST="127.0.0.1") as address:
        run.start("agent", "-wait", "1s", "-agent-port", "0", address)
        run.end()


def agent_fetches(run):
    with Clean(run, "-data-paths", f"{INPUTS}/data.csv", "-deliver", "http", base=DELIVER, HOST="127.0.0.1") as address:
        run.start("agent", "-wait", "1s", "-agent-port", "0", address)
        run.end()


def agent_tls(run):
    with Clean(run, **server_tls()) as address:
        run.start("agent", "-wait", "1s", *client_tls(), address)
        run.end()


def replay(run):
    with Clean(run) as address:
        run.start("agent", "-wait", "1s", "-replay", f"{W}/replay.jsonl", "-fast", address)
        run.end()


def health(run):
    with Clean(run) as address:
        run.start("health", address)
        run.end()


def health_tls(run):
    with Clean(run, **server_tls()) as address:
        run.start("health", *client_tls(), address)
        run.end()


def simple(*args):
    def scenario(run):
        run.start(*args)
        run.end()
        run.keep("wire")
    return scenario


def crypt(*args):
    def scenario(run):
        simple(*args)(run)
        run.files["files"] = "\n".join(sorted(set(os.listdir(run.dir)) - {"log", "out", "err"}))
    return scenario


MANIFEST = ["manifest", *DIRECT, "-data-paths", f"{INPUTS}/data.csv,{INPUTS}/empty.bin", "-algo-args", "a,b"]
SCENARIOS = {
    "serve": serve, "serve over TLS": serve_tls, "verdict": verdict, "deliver": deliver, "fetch": fetch,
    "agent": agent,
    "agent with uploads": agent_uploads, "agent that fetches": agent_fetches, "agent over TLS": agent_tls,
    "replay": replay, "images": images, "health": health, "health over TLS": health_tls,
    "manifest": simple(*MANIFEST), "manifest -o": simple(*MANIFEST, "-o", "wire"),
    "manifest -manifest": simple("manifest", "-manifest", f"{W}/manifest.json"),
    "positional": simple("manifest", *DIRECT[1::2], f"{INPUTS}/data.csv", f"{INPUTS}/empty.bin"),
    "checksum": simple("checksum", f"{INPUTS}/x1000003.bin", f"{W}/folder", f"{INPUTS}/algo.py"),
    "checksum -b": simple("checksum", "-b", f"{INPUTS}/algo.py"),
    "encrypt": crypt("encrypt", "-new-key", "key", f"{W}/folder", "blob"),
    "decrypt": crypt("decrypt", "-key", f"{W}/key", f"{W}/blob", "wire"),
    "mistakes": simple("manifest", "-algo-path", "nowhere", "-algo-typo", "x", "-algo-args", "a", "-algo-args", "b"),
    "help": simple("-help"), "version": simple("-version"),
}


def prepare():
    folder()
    shell("openssl ecparam -name prime256v1 -genkey -noout -out users.key", W)
    with open(f"{W}/manifest.json", "w") as f:
        subprocess.run([PEER, *MANIFEST], stdout=f, stderr=subprocess.DEVNULL, env=environment({"HOST": "localhost"}), check=True)
    subprocess.run([PEER, "encrypt", "-new-key", f"{W}/key", f"{INPUTS}/algo.py", f"{W}/blob"], check=True)
    run = Run()
    with Clean(run, "-record", f"{W}/replay.jsonl") as address:
        run.peer("agent", "-wait", "1s", "-job-id", "cvm-7", address)


# ---- The judgement ----

def plain(text):
    """Lines without what differs from run to run."""
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME", text).replace("  (timestamp=TIME)", "").replace("(timestamp=TIME ", "(")     # shown where it is late, as on a busy machine
    text = re.sub(r"^SHA3: .*", "SHA3: as the processor has it", text, flags=re.M)   # valgrind's has no AVX-512
    text = re.sub(r"(127\.0\.0\.1|\[::1\]|localhost):\d+", "ADDRESS", text)
    text = re.sub(r"(127\.0\.0\.1|\[::1\]) *", "HOST ", text)
    text = re.sub(r'"(stream|seconds|nanos)": ?"?\d+"?', r'"\1": N', text)
    text = re.sub(r'(time(stamp)?)="[^"]*"', r"\1=T", text)
    text = re.sub(r'"stream":"[^"]*"(,"job_id":"[^"]*")?,"sent":{"runReqChunks"', 'MANIFEST', text)   # to whom comes first
    text = re.sub(r"\b\d+(\.\d+)? ?(ms|s)\b|\b\d+\.\d{3}(?=,)", "N s", text)
    text = re.sub(r"saying goodbye to \d+ connections?", "saying goodbye", text)
    text = re.sub(r"\b\d+ messages?, \d+ bytes", "N messages", text)
    return text


def more(got, base, either_way=None):
    """Lines of got that base does not have, or has less often, but for those that may come or not."""
    lines = [collections.Counter(line for line in plain(text).splitlines()
                                 if not (either_way and re.search(either_way, line))) for text in (got, base)]
    return list((lines[0] - lines[1]).elements())


def judge(base, run):
    """What is wrong with the run, one line each."""
    kind = (run.fault or "").split(":")[0]
    if "Sanitizer" in run.err or "runtime error" in run.err or "INJECT:" in run.err:
        at = re.findall(r"(?:ERROR: |SUMMARY: |INJECT: |runtime error: ).*|#\d+ \S+ in (?!__|inject)\S+ \S+", run.err)
        yield "report: " + "; ".join(at[:8])
        return
    if run.status is None:
        yield f"does not end: {run.err[-300:]!r}"
        return
    if run.status < 0:
        yield f"signal {-run.status}"
        return
    usual = {0, 1, base.status, *((3, 4, 5) if base.verdict else ())}
    if run.status not in usual and not (kind == "write.stdout" and run.status == 128 + signal.SIGTERM):
        yield f"exit status {run.status}"
    broken_stdout, broken_stderr = kind == "write.stdout", kind == "write.stderr"
    peers = [status for status, _, _ in run.peers]
    for status, _, err in run.peers:
        if status is None:
            yield f"its peer does not end: {err[-200:]!r}"
        elif status and not err:
            yield f"its peer is not told why it ends with {status}"
    if run.out and not run.out.endswith("\n") and not (broken_stdout and run.status):
        yield f"half a line on stdout: {run.out[-100:]!r}"
    extra = more(run.out, base.out, base.either_way)
    if extra and not (broken_stdout and run.status and len(extra) == 1):
        yield f"on stdout: {extra[0]!r}"
    for name in run.files:
        cut = kind in ("write.file", "write.pipe", "close") and (run.status or ":short" in run.fault)
        extra = more(run.files[name], base.files[name], base.either_way)
        if extra and not (cut and len(extra) == 1) and not (base.verdict and run.status):
            yield f"{name}: {extra[0]!r}"
    if not broken_stderr:
        for line in run.err.splitlines():
            if not re.match(r"cvms: |\d{4}-\d\d-\d\dT[\d:.]+Z |    ", line):
                yield f"on stderr: {line!r}"
        if run.err and not run.err.endswith("\n"):
            yield f"half a line on stderr: {run.err[-100:]!r}"
    hurt = run.status != base.status or (any(peers) and kind not in ("send", "read.socket"))
    if hurt and not broken_stderr and not more(run.err, base.err):
        yield f"status {run.status}, peers {peers}, and no line says why"
    if run.status == 0 and not any(peers) and not (base.verdict and getattr(run, "server", [0])[0]):
        for name, got, wanted in [("stdout", run.out, base.out),
                                  *((name, run.files[name], base.files[name]) for name in run.files)]:
            lost = more(wanted, got, base.either_way)
            if lost:
                yield f"status 0, and lost from {name}: {lost[0]!r}"


# ---- Which calls fail ----

def faults(log):
    """KIND:ERROR:WHICH of each run that the calls of the undisturbed one call for."""
    calls = collections.Counter(kind for kind, *_ in log)
    for kind in calls:
        if kind not in ERRORS and kind.split(".")[0] not in ERRORS:
            sys.exit(f"no errors are named for {kind}")
    if ALL:
        for kind, n in calls.items():
            for error in errors(kind):
                for i in range(1, n + 1):
                    yield f"{kind}:{error}:n{i}"
                    if kind.split(".")[0] in LASTS and error not in PASSING:
                        yield f"{kind}:{error}:n{i}+"
        return
    first, seen = {}, collections.Counter()
    for kind, path, *_ in log:
        seen[kind] += 1
        if (kind, path) not in first:
            first[kind, path] = seen[kind]
    done = set()
    for (kind, path), n in first.items():
        for error in errors(kind):
            done.add((kind, error, n))
            yield f"{kind}:{error}:p{path}"
    for kind, n in calls.items():
        for error in errors(kind):
            for i in sorted({*range(1, FIRST + 1), n}):
                if BY_NUMBER.match(kind) and i <= n and (kind, error, i) not in done:
                    yield f"{kind}:{error}:n{i}"
            if kind.split(".")[0] in LASTS and error not in PASSING:
                for i in sorted({1, 1 + n // 2, n}):
                    yield f"{kind}:{error}:n{i}+"


def errors(kind):
    return ERRORS.get(kind) or ERRORS[kind.split(".")[0]]


def disturbed(name, scenario, base, fault):
    """A run with the fault; again where timing took another path, so that the call was not reached."""
    for _ in range(TRIES):
        run = Run(fault)
        try:
            scenario(run)
            wrong = list(judge(base, run))
        except Exception as e:        # noqa: BLE001  a scenario that can't go on is a failure, not the end of all
            wrong = [f"{type(e).__name__}: {e}"]
            break
        finally:
            if not VERBOSE:
                shutil.rmtree(run.dir, ignore_errors=True)
        if wrong or run.fired:
            break
    with lock:
        runs["fired"] += run.fired
        runs["runs"] += 1
    said = more(run.err, base.err) if hasattr(run, "err") else []
    why = "; ".join(wrong) or f"status {run.status}, peers {[p[0] for p in run.peers]}: {said}"
    check(f"{name}, {fault}", not wrong, why)
    if FAULT:
        print(run.err, end="")


VALGRIND = ["valgrind", "-q", "--error-exitcode=99", "--leak-check=full", "--show-leak-kinds=all",
            "--errors-for-leak-kinds=all"]


def valgrind(name, scenario, base):
    run = Run()
    run.program = [*VALGRIND, PEER]
    scenario(run)
    wrong = re.findall(r"^==.*", run.err, re.M)[:12] or list(judge(base, run))
    check(f"{name}, under valgrind", run.status == base.status and not wrong, f"status {run.status}: {wrong}")


def main():
    prepare()
    with concurrent.futures.ThreadPoolExecutor(JOBS * (os.cpu_count() or 1)) as pool:
        waiting, done = [], set()
        for name, scenario in SCENARIOS.items():
            if NAMES and name not in NAMES:
                continue
            base = Run()
            base.verdict = scenario in (verdict, deliver, agent_uploads, agent_fetches)
            # what comes in another order, or is asked for; what an agent sends again on a stream that it opens anew
            base.either_way = "RUN_RES|STATE|ATTESTATION" if base.verdict else "ATTESTATION|vTPMattestationReport"
            if scenario in (images, fetch):
                base.either_way = " http  | ATTESTATION "      # requests have each their status
            scenario(base)
            wanted = {"mistakes": 2}.get(name, 0)
            wrong = [] if base.status == wanted else [f"status {base.status}: {base.err}"]
            wrong += [f"peer: {p}" for p in base.peers if p[0] != 0]
            check(f"{name}, undisturbed", not wrong, "; ".join(wrong))
            planned = [f for f in dict.fromkeys(faults(base.log)) if ":p" not in f or f not in done]
            planned = [FAULT] if FAULT else planned
            done.update(planned)      # what two scenarios have in common is failed in the first
            if VERBOSE:
                print(f"     {name}: {len(base.log)} calls, {len(planned)} runs", flush=True)
            if "--valgrind" in sys.argv:
                waiting.append(pool.submit(valgrind, name, scenario, base))
            waiting += [pool.submit(disturbed, name, scenario, base, fault) for fault in planned]
        for future in concurrent.futures.as_completed(waiting):
            future.result()
    check("the failures came about", runs["fired"] > 0.9 * runs["runs"], f"{runs['fired']} of {runs['runs']}")
    if not VERBOSE:
        shutil.rmtree(W, ignore_errors=True)
    print(f"     {runs['runs']} runs, in {runs['fired']} of them the call failed")
    return closing()


sys.exit(main())
