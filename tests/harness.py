"""What the test scripts share: results, the program and its servers, an HTTP/2 stream of an agent host, protobuf.

A script calls W.make(CVMS) and then main().  Python's standard library only; loopback only; every port is the system's
choice; what is awaited is an event or a PING's answer.
"""
import concurrent.futures
import contextlib
import hashlib
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback

TESTS = os.path.dirname(os.path.abspath(__file__))
VECTORS = os.path.join(TESTS, "vectors")
README = os.path.join(TESTS, "..", "README.md")
CI = bool(os.environ.get("CI"))
VERBOSE = "-v" in sys.argv
LIMIT = 60                            # seconds that anything awaited may take; all should take far less
SANITIZER = re.compile(r"(ERROR: \w+Sanitizer.*|.*runtime error:.*|SUMMARY: \w+Sanitizer.*)")
LOCAL = {"HOST": "127.0.0.1", "PORT": "0"}
OWN = re.compile(r"(HOST|PORT|NO_COLOR|INJECT|(SERVER|CLIENT)_(CERT|KEY|CA_CERTS)|AGENT_CVM.*)$")
totals = {"passed": 0, "failed": 0, "skipped": 0}
lock = threading.Lock()
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):   # nohup's or a shell's & ignore some
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)


# ---- Telling results ----

class Skip(Exception):
    """Something that a test needs is not installed; in CI that is a failure."""


def check(name, good, got="", wanted="something else"):
    with lock:
        totals["passed" if good else "failed"] += 1
        if not good:
            print(f"FAIL {name}: got {shorten(got)}, wanted {shorten(wanted)}", flush=True)
        elif VERBOSE:
            print(f"ok {name}", flush=True)
    return good


def same(name, got, wanted):
    return check(name, got == wanted, repr(got), repr(wanted))


def has(name, text, *patterns):
    """One line of the text matches all the patterns."""
    good = any(all(re.search(p, line) for p in patterns) for line in text.splitlines())
    return check(name, good, repr(text), "a line with " + " and ".join(patterns))


def hasnot(name, text, pattern):
    return check(name, not re.search(pattern, text, re.M), repr(text), f"nothing like {pattern}")


def need(good, why):
    """What the rest of a test can't do without: it ends here."""
    if not good:
        raise AssertionError(why)


def skip(name, why, failed=False):
    with lock:
        totals["failed" if failed else "skipped"] += 1
        print(f"{'FAIL' if failed else 'skip'} {name}: {why}", flush=True)


def shorten(text, limit=900):
    text = text.decode(errors="replace") if isinstance(text, (bytes, bytearray)) else str(text)
    return text if len(text) <= limit else text[:limit // 2] + " ... " + text[-limit // 2:]


def sanitizers(name, err):
    found = SANITIZER.findall(err)
    frames = re.findall(r"in (\w+) \S*\.[ch]:\d+", err) if found else []
    check(f"{name}: sanitizer", not found, f"{found[:1]} ({' < '.join(frames[:6])})", "no report")


def one(name, function, count=False):
    """Runs one test.  One that breaks is a failure, and the others go on; count: one that does not is a success."""
    began = time.monotonic()
    try:
        function()
        if count:
            check(name, True)
    except Skip as e:
        skip(name, e, CI)
    except Exception as e:                     # noqa: BLE001
        frames, script = traceback.extract_tb(e.__traceback__), os.path.abspath(sys.argv[0])
        line = [f.lineno for f in frames if os.path.abspath(f.filename) == script or f is frames[0]][-1]
        check(f"{name}, line {line}", False, e if isinstance(e, AssertionError) else repr(e), "no exception")
    if VERBOSE:
        with lock:
            print(f"     {name}: {time.monotonic() - began:.1f} s", flush=True)


def named(variables, first=()):
    """A script's tests: its functions called test_..., those in `first` before the others."""
    found = [(n, f) for n, f in variables.items() if n.startswith("test_")]
    return sorted(found, key=lambda t: t[0] not in first)


def main(tests, jobs=1, skipped=2, count=False):
    """Runs the tests, (name, function) each; with NAMEs behind the first so many words, those that contain one of them."""
    words = [a for a in sys.argv if not a.startswith("-")][skipped:]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda t: one(*t, count), [t for t in tests if not words or any(w in t[0] for w in words)]))
    return closing()


def closing():
    """Prints the line that check.py counts; the exit status."""
    if W.dir:
        os.chdir("/")
        shutil.rmtree(W.dir, ignore_errors=True)
    passed, failed, skipped = totals.values()
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return 1 if failed or not passed + skipped else 0


# ---- Files ----

class World:
    """What every test may use: a folder, keys, inputs, the program, the flags that are always needed."""
    dir = None

    def make(self, cvms):
        self.dir = tempfile.mkdtemp(prefix="cvms-test-")
        os.chmod(self.dir, 0o755)           # another user is let in, see unreadable()
        self.cvms = shutil.copy(cvms, os.path.join(self.dir, "cvms"))
        os.chmod(self.cvms, 0o755)
        self.vectors = shutil.copytree(VECTORS, os.path.join(self.dir, "vectors"))
        for folder, _, files in os.walk(self.vectors):
            os.chmod(folder, 0o755)
            for f in files:
                os.chmod(os.path.join(folder, f), 0o644)
        self.algo = os.path.join(self.vectors, "inputs", "algo.py")
        self.data = os.path.join(self.vectors, "inputs", "data.csv")
        self.key = os.path.join(self.vectors, "keys", "ed25519.pem")
        self.rsa = os.path.join(self.vectors, "keys", "rsa4096.pem")
        self.ecc = os.path.join(self.vectors, "keys", "p256.pem")
        self.required = ["-public-key-path", self.key, "-attested-tls-bool", "false"]
        self.base = ["-algo-path", self.algo, *self.required]
        self.with_data = [*self.base, "-data-paths", self.data]
        self.remote = [*self.required, "-algo-source-url", "https://h/a", "-algo-kbs-path", "r/k/a",
                       "-algo-hash", "ab" * 32, "-kbs-url", "http://kbs:8080"]
        self.remote_data = ["-dataset-source-urls", "s3://b/x,oci:d:t", "-dataset-kbs-paths", "r/k/x,r/k/y"]


W = World()


def temp(prefix="t"):
    return tempfile.mkdtemp(prefix=prefix + "-", dir=W.dir)


def write(path, data=b"data\n", mode=0o644):
    """Writes a file, in a new folder if the path is but a name; its path."""
    path = path if os.path.dirname(path) else os.path.join(temp(), path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        f.write(data.encode() if isinstance(data, str) else data)
    os.chmod(path, mode)
    return path


def read(path):
    with open(path, "rb") as f:
        return f.read()


def sha3(data):
    return hashlib.sha3_256(data).hexdigest()


def shell(script, cwd=None):
    """What a script prints, which must succeed."""
    p = subprocess.run(["bash", "-e", "-c", script], cwd=cwd, capture_output=True, stdin=subprocess.DEVNULL)
    need(p.returncode == 0, f"{script[:80]}: {p.stderr.decode(errors='replace')[-600:]}")
    return p.stdout


def self_signed(name, cwd=None):
    """NAME.pem and NAME.key: a certificate for localhost."""
    shell(f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN={name} "
          f"-addext subjectAltName=DNS:localhost -keyout {name}.key -out {name}.pem", cwd)


# ---- Running commands ----

def environment(more=None):
    env = {k: v for k, v in os.environ.items() if not OWN.match(k)}
    return {**env, "TZ": "UTC", "LC_ALL": "C.UTF-8", **LOCAL, **(more or {})}


class Result(tuple):
    """(status, stdout, stderr, seconds) of a command; status None: it had to be killed."""
    def __new__(cls, status, out, err, seconds):
        self = super().__new__(cls, (status, out.decode(errors="replace"), err.decode(errors="replace"), seconds))
        self.status, self.out, self.err, self.seconds = self
        self.raw_out = out
        return self


def run(name, args, env=None, limit=LIMIT, command=None, **kw):
    """Runs `cvms ARGS` to its end."""
    began = time.monotonic()
    kw = {"stdout": subprocess.PIPE, "stdin": subprocess.DEVNULL, "cwd": W.dir, **kw}
    p = subprocess.Popen(command or [W.cvms, *args], env=environment(env), stderr=subprocess.PIPE, **kw)
    result = finish(p, limit, began)
    sanitizers(name, result.err)
    return result


def finish(p, limit=LIMIT, began=0):
    try:
        out, err = p.communicate(timeout=limit)
        status = p.returncode
    except subprocess.TimeoutExpired:
        p.kill()
        out, err = p.communicate()
        status = None
    return Result(status, out or b"", err or b"", time.monotonic() - began)


def end(p, seconds=8):
    """The exit status of a process that should end by itself; None if it had to be killed."""
    try:
        return p.wait(seconds)
    except subprocess.TimeoutExpired:
        p.kill()
        p.wait()
        return None


def drop(p):
    """Ends a process that is no longer of use, and closes its pipes."""
    p.kill()
    p.wait()
    for pipe in (p.stdin, p.stdout, p.stderr):
        if pipe:
            with contextlib.suppress(OSError):
                pipe.close()


class Collector:
    """Reads a pipe to its end in a thread, once the gate is open; until() and wait() wait for what is awaited to appear."""
    def __init__(self, fd, reading=True):
        self.fd, self.data, self.ended = fd, bytearray(), False
        self.cond, self.gate = threading.Condition(), threading.Event()
        if reading:
            self.gate.set()
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self):
        self.gate.wait()
        while not self.ended:
            select.select([self.fd], [], [])
            with self.cond:
                self.take()

    def take(self):
        """With the lock held: all that waits in the pipe."""
        for _ in range(16):
            if self.ended or not self.gate.is_set() or not select.select([self.fd], [], [], 0)[0]:
                return
            try:
                piece = os.read(self.fd, 65536)
            except OSError:                 # a pty whose other end has closed
                piece = b""
            self.data += piece
            self.ended = not piece
            self.cond.notify_all()

    def bytes(self):
        """All that has been written so far."""
        with self.cond:
            self.take()
            return bytes(self.data)

    def text(self):
        return self.bytes().decode(errors="replace")

    def wait(self, good, seconds=LIMIT):
        """What good(data) returns once it is true; None if that does not come about."""
        until = time.monotonic() + seconds
        with self.cond:
            while True:
                got = good(self.data)
                if got:
                    return got
                if self.ended or not self.cond.wait(max(0, until - time.monotonic())) and time.monotonic() >= until:
                    return None

    def until(self, pattern, seconds=LIMIT, times=1):
        """The text once the pattern is there so many times; None if that does not come about."""
        def good(data):
            text = data.decode(errors="replace")
            return text if len(re.findall(pattern, text, re.M)) >= times else None
        return self.wait(good, seconds)

    def need(self, text, seconds=3 * LIMIT):
        """Waits for this text, without which the test ends."""
        need(self.wait(lambda d: text.encode() in d, seconds), f"no {text} in {shorten(self.bytes())!r}")

    def lines(self, n, seconds=3 * LIMIT):
        """All lines, as bytes, once there are n."""
        need(self.wait(lambda d: d.count(b"\n") >= n, seconds), f"no {n} lines in {shorten(self.bytes())!r}")
        return self.bytes().split(b"\n")[:-1]


class Server:
    """`cvms FLAGS` in the background; .address is where it listens, once it says so.  At the end it gets SIGTERM.
    screen: the ends, to read and to write, of a terminal or pipe for stdout and stderr together."""
    def __init__(self, name, *args, base=None, env=None, program=None, command=None, wait=True, reading=True, screen=None, **kw):
        self.name, self.streams = name, []
        kw = {"cwd": W.dir, "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, **kw}
        command = command or [program or W.cvms, *(W.base if base is None else base), *args]
        self.verdict = "-until" in command  # its status says more than that it ended
        both = {"stdout": screen[1], "stderr": screen[1]} if screen else {"stderr": subprocess.PIPE}
        self.p = subprocess.Popen(command, env=environment(env), **{**kw, **both})
        self.out = Collector(self.p.stdout.fileno(), reading) if self.p.stdout else None
        if screen:
            os.close(screen[1])
        self.err = Collector(screen[0] if screen else self.p.stderr.fileno())
        self.address = self.line = self.port = None
        if wait:
            text = self.err.until(r"listening at \S+ with(out TLS| TLS).*\n")
            if not check(f"{name}: ready line", text is not None, self.err.text(), "the ready line"):
                self.p.kill()
                raise RuntimeError("no server")
            self.line = re.search(r"^.*listening at.*$", text, re.M).group(0)
            self.address = re.search(r"listening at (\S+)", self.line).group(1)
            self.port = int(self.address.rsplit(":", 1)[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def wait(self, seconds=LIMIT):
        """The exit status; None, and the end of it, if it does not end by itself."""
        status = end(self.p, seconds)
        for pipe in (self.err, self.out):
            if pipe and pipe.gate.is_set():
                pipe.thread.join(LIMIT)
        return status

    def stop(self, number=signal.SIGTERM):
        self.signal(number)
        return self.wait()

    def signal(self, number):
        if self.p.poll() is None:
            self.p.send_signal(number)

    def close(self):
        for s in self.streams:
            s.close()
        ended = self.p.poll() is not None
        if self.out and not ended:
            self.out.gate.set()
        status = self.stop()
        if not ended and not self.verdict:
            same(f"{self.name}: status at the end", status, 0)
        drop(self.p)
        sanitizers(self.name, self.err.text())

    def memory(self, what="VmRSS"):
        """Bytes of resident memory, now (VmRSS) or at most (VmHWM)."""
        with open(f"/proc/{self.p.pid}/status") as f:
            return next(int(line.split()[1]) << 10 for line in f if line.startswith(what + ":"))

    def stand_in(self, *args, name=None, **kw):
        """Runs `cvms agent` against it."""
        return run(name or f"{self.name}: agent", ["agent", *args, self.address], **kw)

    # The streams of agent hosts
    def open(self, metadata=(), first=b"", **kw):
        """A new stream, with its first message sent and taken by the server."""
        s = Stream(self.address, metadata, **kw)
        self.streams.append(s)
        if first:
            s.send(first)
        s.sync()
        return s

    def agent(self, job=None, **kw):
        return self.open([("job-id", job)] if job else (), ATTESTATION, **kw)

    def forwarder(self, job=None, first=None, **kw):
        meta = [("job-id", job), ("connection-type", "log-forwarder")] if job else ()
        return self.open(meta, log("started") if first is None else first, **kw)

    def both(self, job=None, forwarder_first=False):
        """(agent, log-forwarder), opened in this order or the other."""
        if forwarder_first:
            f = self.forwarder(job)
            return self.agent(job), f
        a = self.agent(job)
        return a, self.forwarder(job)

    def command(self, text):
        self.p.stdin.write(text.encode())
        self.p.stdin.flush()

    def ended(self, status, *patterns, word=None):
        """It ends by itself with this status, and one line of the summary matches all the patterns."""
        same(f"{self.name}: exit status", self.wait(), status)
        err = self.summary()
        word = word or {0: "PASSED", 3: "FAILED", 4: "TIMED OUT", 5: "LOST"}.get(status, "INTERRUPTED")
        has(f"{self.name}: verdict line", err, f"^cvms: {word}: ", *patterns)
        return err

    def summary(self):
        text = self.err.text()
        return text[text.find("\ncvms: ") + 1:] if "\ncvms: " in text else text


# ---- Protobuf, by hand ----

def varint(n):
    out = b""
    while n > 127:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def take_varint(b, at):
    shift = n = 0
    while True:
        n |= (b[at] & 127) << shift
        shift += 7
        at += 1
        if b[at - 1] < 128:
            return n, at


def fields(b):
    """[(number, value)] of one message; varints as int, the rest as bytes."""
    at, out = 0, []
    while at < len(b):
        tag, at = take_varint(b, at)
        if tag & 7 not in (0, 2):
            raise ValueError(f"wire type {tag & 7}")
        value, at = take_varint(b, at)
        if tag & 7 == 2:
            n = value
            value, at = b[at:at + n], at + n
            if len(value) != n:
                raise ValueError("cut off")
        out.append((tag >> 3, value))
    return out


def first(b, number, default=b""):
    return dict(reversed(fields(b or b""))).get(number, default)


# ---- The messages of an agent host ----

TIME = field(1, 1700000000) + field(2, 500000000)
ATTESTATION = field(6, field(1, b"report"))
ACCEPTED = field(3, field(1, "1"))


def log(text, level="INFO", computation="1", time=TIME):
    return field(1, field(1, text) + field(2, computation) + field(3, level) + (field(4, time) if time else b""))


def event(name, details=b"", originator="agent", time=TIME):
    kind, status = name.split("/")
    return field(2, field(1, kind) + (field(2, time) if time else b"") + field(3, "1") + (field(4, details) if details else b"") +
                 field(5, originator) + field(6, status))


# ---- HTTP/2, as much as a Process stream takes ----

DATA, HEADERS, RST, SETTINGS, PING, GOAWAY, WINDOW = 0, 1, 3, 4, 6, 7, 8
PROCESS = "/cvms.Service/Process"


def frame(kind, flags, stream, body=b""):
    return struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0)


def frames_of(data):
    """[(type, flags, stream, payload)] of the whole frames at the front, and what is left."""
    out = []
    while len(data) >= 9 and len(data) >= 9 + int.from_bytes(data[:3], "big"):
        n = int.from_bytes(data[:3], "big")
        out.append((data[3], data[4], int.from_bytes(data[5:9], "big"), bytes(data[9:9 + n])))
        data = data[9 + n:]
    return out, data


def literal(name, value, into=0):
    """A field that is not Huffman-coded; into=0x40: it enters the table."""
    text = lambda b: (bytes([len(b)]) if len(b) < 127 else b"\x7f" + varint(len(b) - 127)) + b
    return bytes([into]) + text(name.encode()) + text(value.encode())


def request(stream, path=PROCESS, flags=4, more=b"", method="POST"):
    """The HEADERS of a gRPC call."""
    head = [(":method", method), (":scheme", "http"), (":path", path), (":authority", "localhost"),
            ("content-type", "application/grpc"), ("te", "trailers")]
    return frame(HEADERS, flags, stream, b"".join(literal(*f) for f in head) + more)


def connect(address):
    host, port = address.rsplit(":", 1)
    return socket.create_connection((host.strip("[]") or "127.0.0.1", int(port)), LIMIT)


def call(address, path, *messages, metadata=()):
    """A call from its beginning to its end; all that comes back."""
    with connect(address) as s:
        body = b"".join(b"\0" + struct.pack(">I", len(m)) + m for m in messages)
        s.sendall(PREFACE + request(1, path, more=b"".join(literal(*m) for m in metadata)) + frame(DATA, 1, 1, body))
        data = b""
        while not any(kind == HEADERS and flags & 1 for kind, flags, _, _ in frames_of(data)[0]):
            piece = s.recv(65536)
            need(piece, f"{path}: the connection ended")
            data += piece
        return data


class Stream:
    """A Process call on a connection of its own.  A thread reads what the server sends, unless deaf.

    .messages are the server's messages; .goaway, .reset (their error codes) and .trailers tell how it ended."""
    def __init__(self, address, metadata=(), deaf=False):
        self.cond = threading.Condition()
        self.messages, self.times, self.pings, self.partial, self.sent = [], [], 0, b"", []
        self.goaway = self.reset = None
        self.trailers = self.eof = False
        self.deaf = deaf
        self.began = time.monotonic()
        self.s = connect(address)
        self.peer = "%s:%d" % self.s.getsockname()[:2]
        wide = frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 1 << 24)) + frame(WINDOW, 0, 0, struct.pack(">I", 1 << 24))
        self.put(PREFACE + (b"" if deaf else wide) + request(1, more=b"".join(literal(*m) for m in metadata)))
        if not deaf:
            self.s.settimeout(None)
            self.thread = threading.Thread(target=self.read, daemon=True)
            self.thread.start()

    def put(self, data):
        with contextlib.suppress(OSError):             # what has become of the connection, the reader sees
            self.s.sendall(data)

    def send(self, *messages, end=False):
        """All in one piece, so that the server meets them together."""
        self.sent += messages
        data = b"".join(b"\0" + struct.pack(">I", len(m)) + m for m in messages)
        pieces = [data[i:i + 16384] for i in range(0, len(data), 16384)]
        self.put(b"".join(frame(DATA, 0, 1, p) for p in pieces) + (frame(DATA, 1, 1) if end else b""))

    def events(self, *names):
        self.send(*map(event, names))
        return self

    def read(self):
        data = b""
        while True:
            try:
                piece = self.s.recv(1 << 18)
            except OSError:
                piece = b""
            taken, data = frames_of(data + piece)
            with self.cond:
                for kind, flags, _, payload in taken:
                    self.take(kind, flags, payload)
                self.eof = not piece
                self.cond.notify_all()
            if not piece:
                self.s.close()
                return
            if self.trailers and self.goaway is not None:      # as gRPC clients do: nothing more can come
                with contextlib.suppress(OSError):
                    self.s.shutdown(socket.SHUT_RDWR)

    def take(self, kind, flags, payload):
        if kind == SETTINGS and not flags & 1:
            self.put(frame(SETTINGS, 1, 0))
        elif kind == PING and flags & 1:
            self.pings += 1
        elif kind == PING:
            self.put(frame(PING, 1, 0, payload))
        elif kind == GOAWAY:
            self.goaway = int.from_bytes(payload[4:8], "big")
        elif kind == RST:
            self.reset = int.from_bytes(payload, "big")
        elif kind == DATA:
            self.partial += payload
            while len(self.partial) >= 5 and len(self.partial) >= 5 + int.from_bytes(self.partial[1:5], "big"):
                n = int.from_bytes(self.partial[1:5], "big")
                self.messages.append(self.partial[5:5 + n])
                self.times.append(time.monotonic() - self.began)
                self.partial = self.partial[5 + n:]
        if kind in (DATA, HEADERS) and flags & 1:
            self.trailers = True

    def frames(self):
        """Of a deaf stream: all that the server sends, to the end."""
        data = b""
        with contextlib.suppress(OSError):
            while piece := self.s.recv(65536):
                data += piece
        return frames_of(data)[0]

    def until(self, good, seconds=LIMIT):
        """Waits until good() holds or the connection is over; whether it holds."""
        end = time.monotonic() + seconds
        with self.cond:
            while not good() and not self.eof and self.cond.wait(max(0, end - time.monotonic())):
                pass
            return bool(good())

    def ping(self):
        with self.cond:
            wanted = self.pings + 1
        self.put(frame(PING, 0, 0, b"smoke..."))
        return self.until(lambda: self.pings >= wanted)

    def sync(self):
        """The server has taken all that was sent, and acted on it: the second PING comes in a later turn of its loop."""
        return self.deaf or self.ping() and self.ping()

    def alive(self):
        return self.sync() and self.goaway is None and self.reset is None and not self.trailers

    def asked(self, number, times=1, seconds=LIMIT):
        """Waits for so many messages of this kind; the last one of them, or None."""
        of = lambda: [m for m in self.messages if fields(m) and fields(m)[0][0] == number]
        return first(of()[times - 1], number) if self.until(lambda: len(of()) >= times, seconds) else None

    def chunks(self):
        """[(data, id, is_last)] so far."""
        with self.cond:
            all_of = [first(m, 1) for m in self.messages if fields(m)[0][0] == 1]
        return [(first(c, 1), first(c, 2).decode(), bool(first(c, 3, 0))) for c in all_of]

    def manifest(self):
        """The whole manifest, once it is there; None if it does not come."""
        if not self.until(lambda: any(first(first(m, 1), 3, 0) for m in self.messages if fields(m)[0][0] == 1)):
            return None
        return b"".join(c[0] for c in self.chunks())

    def close(self):
        with contextlib.suppress(OSError):
            self.s.shutdown(socket.SHUT_RDWR)
        if self.deaf:
            self.s.close()
        elif self.thread is not threading.current_thread():
            self.thread.join(LIMIT)
