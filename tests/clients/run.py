#!/usr/bin/env python3
"""End-to-end tests of a cvms binary with real clients, over loopback.

usage: run.py SERVER_BINARY TOOLS_DIR [FILTER]     (TOOLS_DIR was filled by install.sh; FILTER is a part of a name)

Prints `ok NAME`, `skip NAME: reason` or `FAIL NAME: reason` a test and `N passed, M failed` at the end. A client that is not
installed skips its tests, or fails them when CI is set. The golden vectors are those of ../vectors.
"""
import base64
import contextlib
import filecmp
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import harness  # noqa: E402
from harness import ACCEPTED, GOAWAY, HEADERS, PREFACE, Collector, Skip, drop, event, field, fields, frame, log, need, request, shorten  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
CHUNK = 1 << 20
LIMIT = 60  # seconds that any one step may take
HASH = "a7ffc6f8bf1ed76651c14756a061d662f580ff4de43b49fa82d80a4b80f8434a"
KEY = ["-public-key-path", "keys/rsa4096.pem", "-attested-tls-bool", "false"]
DIRECT = ["-algo-path", "inputs/algo.py", "-data-paths", "inputs/data.csv,inputs/empty.bin,inputs/x1000003.bin"] + KEY
ALGO = ["-algo-source-url", "https://example.com/algo.enc", "-algo-kbs-path", "default/key/algo", "-algo-type", "python",
        "-algo-hash", HASH, "-kbs-url", "http://localhost:8080", "-algo-kbs-url", "http://localhost:8080"]
DATA = ["-dataset-source-urls", "https://example.com/d1.enc,https://example.com/d2.enc", "-dataset-hash", HASH,
        "-dataset-kbs-paths", "default/key/d1,default/key/d2", "-kbs-url", "http://localhost:8080",
        "-dataset-kbs-urls", "http://localhost:8080,http://localhost:8080", "-dataset-decompress", "true,false"]
MODES = {
    "direct": DIRECT,
    "remote algorithm": ALGO + KEY,
    "remote algorithm and datasets": ALGO + DATA + KEY,
    "mixed: remote algorithm, local datasets": ALGO + ["-data-paths", "inputs/data.csv,inputs/algo.py"] + KEY,
    "mixed: local algorithm, remote datasets": ["-algo-path", "inputs/algo.py"] + DATA + KEY,
    "attested TLS": ["-algo-path", "inputs/algo.py", "-data-paths", "inputs/data.csv", "-client-ca-file", "/etc/cocos/ca.pem",
                     "-public-key-path", "keys/ed25519.pem", "-attested-tls-bool", "true"],
}


def readme_modes():
    """The README's own commands, one for each mode, as they stand; the test's folder is its tests/vectors."""
    names = ["direct", "remote algorithm", "remote algorithm and datasets", "mixed: local algorithm, remote datasets", "attested TLS"]
    with open(harness.README) as f:
        section = f.read().split("## The five modes")[1].split("\n## ")[0]
    commands = re.findall(r"^    \./cvms -(?:.*\\\n)*.*", section, re.M)
    assert len(commands) == len(names), "the README has %d commands for %d modes" % (len(commands), len(names))
    return {n: shlex.split(c.replace("tests/vectors/", "").replace("\\\n", ""))[1:] for n, c in zip(names, commands)}


MODES.update(readme_modes())


class Test:
    """One test's surroundings: a work folder with a copy of the vectors, and the processes to end."""

    def __init__(self, binary, tools):
        self.binary, self.tools, self.servers, self.cleanup = binary, tools, [], contextlib.ExitStack()
        self.dir = tempfile.mkdtemp(prefix="cvms-e2e-")
        self.cleanup.callback(shutil.rmtree, self.dir, True)
        for name in ("inputs", "keys"):
            os.mkdir(self.path(name))
            for f in os.listdir(os.path.join(HERE, "../vectors", name)):
                shutil.copyfile(os.path.join(HERE, "../vectors", name, f), self.path(name, f))
                os.chmod(self.path(name, f), 0o644)
        with open(binary, "rb") as f:
            self.sanitized = b"__asan_init" in f.read()

    def path(self, *names):
        return os.path.join(self.dir, *names)

    def tool(self, name):
        found = os.path.join(self.tools, name) if "/" in name else shutil.which(name)
        if not found or not os.path.exists(found):
            raise Skip("%s is not installed" % name)
        return found

    def serve(self, *args, **how):
        s = Server(self, args, **how)
        self.servers.append(s)
        return s

    def run(self, *command, input=None, ok=True, env=None):
        p = subprocess.run(command, cwd=self.dir, input=input, capture_output=True, timeout=LIMIT + 30,
                           env=dict(os.environ, **(env or {})))
        if ok:
            need(p.returncode == 0, "%s: status %d: %s" % (os.path.basename(command[0]), p.returncode, shorten(p.stderr or p.stdout)))
        return p

    def go(self, server, mode, *args, ok=True):
        return self.run(self.tool("bin/client"), "-addr", server.addr, "-mode", mode, *args, ok=ok)

    def py(self, server, *args, input=None):
        return self.run(self.tool("venv/bin/python"), os.path.join(HERE, "py/client.py"), server.addr, *args, input=input)

    def js(self, server, *args):
        self.tool("js/node_modules")
        return self.run(self.tool("node"), os.path.join(HERE, "js/client.js"), server.addr, *args,
                        env={"NODE_PATH": os.path.join(self.tools, "js/node_modules")})

    def grpcurl(self, server, *args, input=None, ok=True):
        p = self.run(self.tool("bin/grpcurl"), "-plaintext", "-max-time", "30", *args[:-1], server.addr, *args[-1].split(),
                     input=input, ok=ok)
        return p.stdout.decode()

    def start(self, server, mode, *args):
        """A Go client that goes on by itself: (process, its stdout as Lines)."""
        p = subprocess.Popen([self.tool("bin/client"), "-addr", server.addr, "-mode", mode, *args], cwd=self.dir,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.cleanup.callback(drop, p)
        return p, Collector(p.stdout.fileno())

    def finish(self, client):
        """Tells a held client to go on and wants it to end well."""
        p, lines = client
        with contextlib.suppress(BrokenPipeError):
            p.stdin.write(b"\n")
            p.stdin.flush()
        status = p.wait(LIMIT)
        need(status == 0, "client: %s" % shorten(p.stderr.read()))
        lines.thread.join(LIMIT)
        return bytes(lines.data).decode()

    def manifest(self, *args, name="wanted"):
        """What `cvms manifest` writes for these flags: the file's path."""
        self.run(self.binary, "manifest", *args, "-o", self.path(name))
        return self.path(name)

    def close(self):
        try:
            for s in self.servers:
                s.close()
        finally:
            self.cleanup.close()


class Server(harness.Server):
    """One without TLS, whose -ready-file and ready line agree; unless .capped, no client goes over a cap."""
    def __init__(self, test, args, reading=True, env=None):
        ready = test.path("ready-%d" % len(test.servers))
        os.mkfifo(ready)
        fd = os.open(ready, os.O_RDWR)          # so that a server that fails does not hold up the test
        self.capped = False
        try:
            super().__init__("server", "-ready-file", ready, *args, base=[], program=test.binary, env=env, reading=reading, cwd=test.dir)
            self.addr = self.address
            need(self.line.endswith(" %s without TLS" % self.addr), "ready line: %r" % self.line)
            got = os.read(fd, 100).decode().strip()
            need(got == self.addr, "ready file holds %r, the ready line says %s" % (got, self.addr))
        finally:
            os.close(fd)

    def connect(self):
        s = harness.connect(self.address)
        s.settimeout(LIMIT)
        return s

    def exit(self, limit=5.0):
        """Waits for the end and returns the exit status."""
        status = self.wait(limit)
        need(status is not None, "the server still runs after %g s" % limit)
        return status

    def close(self):
        super().close()
        text = self.err.text()
        for sign in ("panic:", *([] if self.capped else ["over the cap"])):
            need(sign not in text, shorten(text[text.find(sign) - 100:] if sign in text else ""))


# ---- the manifest ----

def same(wanted, got, who):
    need(filecmp.cmp(wanted, got, shallow=False), "%s got %d bytes that differ from the %d of `cvms manifest`" %
          (who, os.path.getsize(got), os.path.getsize(wanted)))


def golden(vector):
    def test(t):
        args = list(vector["args"])
        for flag, (values, n) in vector.get("repeat", {}).items():
            args += [flag, ",".join(values * n)]
        s = t.serve("-compat", vector["generation"], *args, env={"TZ": vector["tz"]} if "tz" in vector else {})
        t.go(s, "manifest", "-messages", t.path("messages"))
        with open(t.path("messages")) as f:
            got = json.load(f)
        need(len(got) == len(vector["messages"]), "%d messages, want %d" % (len(got), len(vector["messages"])))
        for n, (g, w) in enumerate(zip(got, vector["messages"])):
            need(g == w, "message %d: got %s, want %s" % (n, shorten(str(g)), shorten(str(w))))
    return test


def mode(args):
    def test(t):
        wanted = t.manifest(*args)
        s = t.serve(*args)
        missing = []
        for who, fetch in (("grpc-go", lambda f: t.go(s, "manifest", "-o", f)),
                           ("grpcio", lambda f: t.py(s, "manifest", "-o", f)),
                           ("grpc-js", lambda f: t.js(s, "manifest", f))):
            try:
                fetch(t.path(who))
            except Skip as e:
                missing.append(e)
                continue
            same(wanted, t.path(who), who)
        if missing:
            raise missing[0]
    return test


def huge_key(t):
    """A SubjectPublicKeyInfo whose RSA modulus has 64 KiB, as PEM: made up, no key that could be used."""
    def der(tag, body):
        n = len(body)
        size = bytes([n]) if n < 128 else (lambda b: bytes([128 + len(b)]) + b)(n.to_bytes((n.bit_length() + 7) // 8, "big"))
        return bytes([tag]) + size + body
    modulus = b"\0" + hashlib.shake_128(b"modulus").digest(1 << 16).replace(b"\0", b"\1")[:-1].rjust(1 << 16, b"\xc1")[:-1] + b"\1"
    rsa = der(0x30, der(2, modulus) + der(2, b"\1\0\1"))
    spki = der(0x30, der(0x30, bytes.fromhex("06092a864886f70d010101") + der(5, b"")) + der(3, b"\0" + rsa))
    text = base64.encodebytes(spki).decode().replace("\n", "")
    with open(t.path("huge.pem"), "w") as f:
        f.write("-----BEGIN PUBLIC KEY-----\n")
        f.writelines(text[i:i + 64] + "\n" for i in range(0, len(text), 64))
        f.write("-----END PUBLIC KEY-----\n")
    return spki


def manifest_of_100_mib(t):
    spki = huge_key(t)
    count = (100 << 20) // len(spki) + 1
    shutil.copyfile(t.path("inputs/data.csv"), t.path("d"))
    args = ["-algo-path", "inputs/algo.py", "-data-paths", ",".join(["d"] * count), "-public-key-path", "huge.pem",
            "-attested-tls-bool", "false"]
    wanted = t.manifest(*args)
    size = os.path.getsize(wanted)
    need(size > 100 << 20, "the manifest has only %d bytes" % size)
    with open(wanted, "rb") as f:
        datasets = [dict(fields(v)) for n, v in fields(f.read()) if n == 4]
    need(len(datasets) == count and all(d[2] == spki for d in datasets), "%d datasets, or another key" % len(datasets))
    s = t.serve(*args)
    before = s.memory()
    with open("/proc/%d/clear_refs" % s.p.pid, "w") as f:
        f.write("5")                  # the peak of the start is not the streams'
    blocked = [t.start(s, "never-read", "-n", "100", "-tag", "b%d" % i) for i in range(3)]
    for _, lines in blocked:
        lines.need("sent")
    t.go(s, "manifest", "-o", t.path("got"))
    same(wanted, t.path("got"), "grpc-go")
    grown = s.memory("VmHWM") - before
    need(t.sanitized or grown < 32 << 20, "seven streams cost %d bytes over the %d of the idle server" % (grown, before))
    need(t.sanitized or before < 3 * size, "%d bytes for a manifest of %d" % (before, size))
    for c in blocked:
        t.finish(c)


def changed_file(t):
    s = t.serve("-algo-path", "inputs/algo.py", "-data-paths", "inputs/data.csv", *KEY)

    def digest():
        t.go(s, "manifest", "-o", t.path("got"))
        with open(t.path("got"), "rb") as f:
            return [dict(fields(v))[1] for n, v in fields(f.read()) if n == 4]

    def real():
        with open(t.path("inputs/data.csv"), "rb") as f:
            return [hashlib.sha3_256(f.read()).digest()]
    need(digest() == real(), "the first manifest's hash is not the file's")
    first = len(s.err.data)
    with open(t.path("inputs/data.csv"), "a") as f:
        f.write("7,8,9\n")
    need(digest() == real(), "the next agent did not get the changed file's hash")
    second = len(s.err.data)
    need(digest() == real(), "the third manifest differs")
    said = [bytes(s.err.data[first:second]).count(b"data.csv"), bytes(s.err.data[second:]).count(b"data.csv")]
    need(said[0] > said[1], "no note names the changed file, or again though nothing changed: %r" % bytes(s.err.data[first:]))


# ---- what agents send ----

def kinds_json(t):
    s = t.serve("-output", "json", *DIRECT)
    t.py(s, "kinds", "-o", t.path("sent"))
    with open(t.path("sent")) as f:
        n = len(f.readlines())
    t.py(s, "verify", "-i", t.path("sent"), input=b"\n".join(s.out.lines(n)) + b"\n")
    t.go(s, "send", "-send", t.path("sent"))
    t.py(s, "verify", "-i", t.path("sent"), input=b"\n".join(s.out.lines(2 * n)[n:]) + b"\n")
    t.js(s, "send", t.path("sent"))
    t.py(s, "verify", "-i", t.path("sent"), input=b"\n".join(s.out.lines(3 * n)[2 * n:]) + b"\n")
    need(len(s.out.data.split(b"\n")) == 3 * n + 1, "more lines than messages")
    raw = {c for c in s.out.data if c < 32 or c == 127} - {10}
    need(not raw, "control characters %s in the JSON output" % raw)


def kinds_text(t):
    s = t.serve(*DIRECT)
    t.py(s, "kinds", "-o", t.path("sent"))
    with open(t.path("sent")) as f:
        n = len(f.readlines())
    t.go(s, "logs", "-n", "1", "-tag", "the-end")
    s.out.need("the-end-0;")
    text = bytes(s.out.data)
    raw = {c for line in text.split(b"\n") for c in line.lstrip() if (c < 32 and c != 9) or c == 127}
    need(not raw, "control characters %s reach the terminal" % raw)
    text = text.decode("utf-8")  # raises when it is none
    bad = [hex(ord(c)) for c in text if ord(c) in (*range(0x80, 0xa0), *range(0x2028, 0x202f), *range(0x2066, 0x206a))]
    need(not bad, "line separators or bidirectional overrides reach the terminal: %s" % bad)
    at = 0
    for want in ("a log", "Running", "Starting", "no such key", "stopped it", "ReceivingManifest", "serial-01:ab", "serial-02",
                 "first line", "second line", "third", "right to left", "漢", "abc", "99", "the-end-0;"):
        found = text.find(want, at)
        need(found >= 0, "no %r after %r" % (want, shorten(text[max(0, at - 200):at])))
        at = found
    entries = [line for line in text.rstrip("\n").split("\n") if not line.startswith((" ", "\t"))]
    need(len(entries) == n + 1, "%d entries for %d messages (a continuation line must be indented)" % (len(entries), n + 1))
    need("cvm-17" in text, "the job-id is not shown")
    need("connected from 127.0.0.1:" in s.err.text(), "the peer is not shown")


def metadata(t):
    s = t.serve(*DIRECT)
    t.go(s, "metadata", "-n", "1", "-tag", "meta", "-metadata", "job-id=cvm-42,connection-type=log-forwarder,key-bin=00ff")
    s.out.need("meta-0;")
    text = s.out.text() + s.err.text()
    need("cvm-42" in text, "the job-id is not shown: " + shorten(text))
    need("forwarder" in text, "the kind of the stream is not shown: " + shorten(text))


def logs_in(data, tag):
    """The numbers of the logs TAG-n; in the order of the output."""
    mark, out, at = (tag + "-").encode(), [], 0
    while True:
        at = data.find(mark, at)
        if at < 0:
            return out
        at += len(mark)
        stop = data.find(b";", at, at + 12)
        if stop > 0 and data[at:stop].isdigit():
            out.append(int(data[at:stop]))


def all_logs(lines, tag, n):
    """Waits for log n - 1, then wants all of 0 to n - 1 in order."""
    lines.need("%s-%d;" % (tag, n - 1))
    got = logs_in(bytes(lines.data), tag)
    need(got == list(range(n)), "%d of %d logs, or out of order" % (len(got), n))


def never_reading(t):
    args = ["-algo-path", "inputs/algo.py", "-data-paths", ",".join(["inputs/data.csv"] * 2500)] + KEY  # more than a window
    s = t.serve(*args)
    c = t.start(s, "never-read", "-n", "20000", "-tag", "nr")
    c[1].need("sent")
    all_logs(s.out, "nr", 20000)
    t.finish(c)
    s.out.need("nr-agent;")


def slow_stdout(t):
    n, size = 120000, 300
    s = t.serve(*DIRECT, reading=False)
    before = s.memory()
    flood = [t.start(s, "flood", "-n", str(n), "-size", str(size), "-tag", tag) for tag in ("sa", "sb")]
    seen = (-1, -1)
    while True:  # until neither sender got on for a second
        now = tuple(len(lines.data) for _, lines in flood)
        if now == seen and all(now):
            break
        need(all(p.poll() is None for p, _ in flood), "a sender ended though nobody reads stdout")
        seen = now
        with flood[0][1].cond:
            flood[0][1].cond.wait(1)
        time.sleep(1)  # the time without progress is what is measured
    grown = s.memory() - before
    need(t.sanitized or grown < 16 << 20, "memory grew by %d bytes while stdout was not read" % grown)
    need(t.go(s, "health").returncode == 0, "no health answer while stdout is full")
    s.out.gate.set()
    for c in flood:
        t.finish(c)
    for tag in ("sa", "sb"):
        all_logs(s.out, tag, n)


def closed_stdout(t):
    s = t.serve(*DIRECT, reading=False)
    s.p.stdout.close()
    waiting = t.start(s, "wait")
    waiting[1].need("waiting")
    t.go(s, "logs", "-n", "2000", ok=False)
    status = s.exit()
    need(status > 0, "exit status %d, want one that says it failed" % status)
    need("stdout" in s.err.text() or "standard output" in s.err.text(),
          "stderr does not say why: %r" % shorten(bytes(s.err.data)))
    need("Unavailable" in t.finish(waiting), "the waiting client did not get UNAVAILABLE")


def started_without_stdout(t):
    """`cvms … >&-`: descriptor 1 must not become a socket that logs are written to."""
    ready = t.path("ready")
    p = subprocess.Popen(["sh", "-c", 'exec "$@" >&-', "sh", t.binary, "-ready-file", ready, *DIRECT], cwd=t.dir,
                         env=dict(os.environ, HOST="127.0.0.1", PORT="0"), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    t.cleanup.callback(drop, p)
    err = Collector(p.stderr.fileno())
    until = time.monotonic() + 10
    while p.poll() is None and not (os.path.exists(ready) and os.path.getsize(ready)) and time.monotonic() < until:
        time.sleep(0.005)
    if p.poll() is not None:
        err.thread.join(LIMIT)
        need(p.returncode in (1, 2) and err.data, "exit status %d, stderr %r" % (p.returncode, bytes(err.data)))
        return
    with open(ready) as f:
        s = type("S", (), {"addr": f.read().strip()})
    t.go(s, "logs", "-n", "10", ok=False)
    need(os.path.exists("/proc/%d" % p.pid), "no such process")
    r = t.go(s, "manifest", ok=False)
    if r.returncode != 0:  # it may end, but then clearly
        need(p.wait(5) > 0, "exit status %d" % p.returncode)


# ---- signals ----

def stops(number):
    def test(t):
        s = t.serve(*DIRECT)
        clients = [t.start(s, "wait") for _ in range(3)]
        for _, lines in clients:
            lines.need("waiting")
        s.signal(number)
        for c in clients:
            said = t.finish(c)
            need("Unavailable" in said, "a client got %r" % said)
            need("error reading from server" not in said and "reset" not in said, "the stream broke off: %r" % said)
        status = s.exit()
        need(status in (0, 128 + number, -number), "exit status %d" % status)
    return test


# ---- verdicts, through grpc-go ----

ATTESTATION = field(6, b"")
RUN = [event(e) for e in ("ReceivingAlgorithm/InProgress", "Running/Starting", "Running/InProgress", "AlgorithmRun/Warning")]
DONE = [event("Running/Completed"), event("ConsumingResults/Ready")]


def verdict(want, says, agent, forwarder, *flags):
    """The two streams of an agent host, one after the other within the grace, and the exit status and summary wanted."""
    def test(t):
        s = t.serve(*DIRECT, "-until", "ready", "-timeout", "60s", *flags)
        for name, messages in (("agent", agent), ("forwarder", forwarder)):
            with open(t.path(name), "w") as f:
                f.writelines("%s %s\n" % (name, base64.b64encode(m).decode()) for m in messages)
            if messages:
                t.go(s, "send", "-send", t.path(name), ok=False)
        status = s.exit(25)
        text = s.err.text()
        need(status == want, "exit status %d, wanted %d: %s" % (status, want, shorten(text)))
        need(says in text, "%r is not in %s" % (says, shorten(text)))
    return test


REQUEST = request(1)


class Frames:
    """The frames that a raw socket gets."""

    def __init__(self, sock):
        self.sock, self.data = sock, b""

    def take(self, n, wanted):
        while len(self.data) < n:
            b = self.sock.recv(1 << 16)
            need(b, "the connection ended without a frame of type %d" % wanted)
            self.data += b
        taken, self.data = self.data[:n], self.data[n:]
        return taken

    def until(self, wanted):
        kind = None
        while kind != wanted:
            head = self.take(9, wanted)
            kind = head[3]
            self.take(int.from_bytes(head[:3], "big"), wanted)


def stubborn_peer(t):
    """A peer that acknowledges nothing and never closes: the server is out 5 s after the first signal all the same."""
    s = t.serve(*DIRECT)
    with s.connect() as sock:
        sock.sendall(PREFACE + REQUEST)
        frames = Frames(sock)
        frames.until(HEADERS)
        s.signal(signal.SIGTERM)
        frames.until(GOAWAY)
        s.exit(5.5)


def second_signal(t):
    """Two signals: the second ends a server that is held up by a peer that does not read its manifest."""
    args = ["-algo-path", "inputs/algo.py", "-data-paths", ",".join(["inputs/data.csv"] * 2500)] + KEY
    s = t.serve(*args)
    with s.connect() as sock:
        sock.sendall(PREFACE + REQUEST)
        frames = Frames(sock)
        frames.until(HEADERS)
        s.signal(signal.SIGTERM)
        frames.until(GOAWAY)
        if s.p.poll() is None:
            s.signal(signal.SIGINT)
        s.exit(1)


def broken_pipes(t):
    """SIGPIPE itself, and clients that go away in the middle of a large manifest."""
    args = ["-algo-path", "inputs/algo.py", "-data-paths", ",".join(["inputs/data.csv"] * 2500)] + KEY
    s = t.serve(*args)
    held = t.start(s, "logs", "-n", "10", "-tag", "pipe", "-hold")
    held[1].need("sent")
    for _ in range(20):
        with s.connect() as sock:
            sock.sendall(PREFACE + REQUEST)
            sock.recv(1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close() resets
    s.signal(signal.SIGPIPE)
    t.go(s, "manifest")
    t.finish(held)
    all_logs(s.out, "pipe", 10)


# ---- other clients, other requests ----

def go_mode(name, *args):
    return lambda t: t.go(t.serve(*DIRECT), name, *args)


def many_streams(t):
    s = t.serve(*DIRECT)
    t.go(s, "streams", "-n", "40", "-tag", "st")
    need(s.out.wait(lambda d: len(logs_in(bytes(d), "st")) >= 40, LIMIT), "no 40 logs")
    need(sorted(logs_in(bytes(s.out.data), "st")) == list(range(40)), "not every stream's log is there once")


def oversize(t):
    s = t.serve(*DIRECT)
    s.capped = True
    t.go(s, "oversize")
    need(s.out.wait(lambda d: d.count(b"y") >= 4 << 20 >> 1, LIMIT), "no the message of 4 MiB")


def healths(t):
    s = t.serve(*DIRECT)
    t.go(s, "health")
    t.py(s, "health")
    t.js(s, "health")


def health_command(t):
    s = t.serve(*DIRECT)
    p = t.run(t.binary, "health", s.addr, ok=False)
    need(p.returncode == 0, "cvms health: status %d %s" % (p.returncode, shorten(p.stderr)))
    p = t.run(t.binary, "health", s.addr, "-service", "agent", ok=False)
    need(p.returncode > 0, "cvms health -service agent: status %d" % p.returncode)


def grpcurl(t):
    s = t.serve(*DIRECT)
    names = t.grpcurl(s, "list").split()
    need({"cvms.Service", "grpc.health.v1.Health"} <= set(names), "list: %s" % names)
    need(t.grpcurl(s, "list cvms.Service").split() == ["cvms.Service.Process"], "list cvms.Service")
    text = t.grpcurl(s, "describe cvms.Service")
    need("rpc Process ( stream .cvms.ClientStreamMessage ) returns ( stream .cvms.ServerStreamMessage );" in text, text)
    for name, want in (("cvms.ServerStreamMessage", ".cvms.RunReqChunks runReqChunks = 1;"),
                       ("cvms.ComputationRunReq", "repeated .cvms.ResultConsumer result_consumers = 6;"),
                       ("cvms.ClientStreamMessage", ".cvms.azureAttestationToken azureAttestationToken = 7;"),
                       ("cvms.AgentLog", ".google.protobuf.Timestamp timestamp = 4;")):
        text = t.grpcurl(s, "describe " + name)
        need(want in text, "describe %s: %s" % (name, text))
    text = t.grpcurl(s, "-d", '{"service": "cvms_test_server"}', "grpc.health.v1.Health/Check")
    need('"SERVING"' in text, text)


def grpcurl_call(t):
    """A half-closed call by name: what grpcurl sends is printed, and it gets the whole manifest and OK."""
    s = t.serve("-output", "json", *DIRECT)
    wanted = t.manifest(*DIRECT)
    text = t.grpcurl(s, "-d", '{"agent_log": {"message": "from grpcurl", "level": "INFO"}}', "cvms.Service/Process")
    data, at, last = b"", 0, False
    while at < len(text.rstrip()):
        o, at = json.JSONDecoder().raw_decode(text, at)
        while at < len(text) and text[at].isspace():
            at += 1
        chunk = o["runReqChunks"]
        need(not last and chunk["id"] == "1", "chunk %s" % shorten(str(chunk)))
        data, last = data + base64.b64decode(chunk.get("data", "")), chunk.get("isLast", chunk.get("is_last", False))
    need(last, "no last chunk")
    with open(wanted, "rb") as f:
        need(f.read() == data, "another manifest than that of `cvms manifest`")
    s.out.need("from grpcurl")
    need(t.grpcurl(s, "-d", "", "cvms.Service/Process").count("runReqChunks") == 2, "an empty call got no manifest")


def h2load(t):
    s = t.serve(*DIRECT)
    with open(t.path("check"), "wb") as f:
        f.write(bytes(5))
    p = t.run(t.tool("h2load"), "-n", "20000", "-c", "8", "-m", "20", "-d", t.path("check"), "-H", "content-type: application/grpc",
              "-H", "te: trailers", "http://%s/grpc.health.v1.Health/Check" % s.addr)
    text = p.stdout.decode()
    need("20000 succeeded, 0 failed, 0 errored, 0 timeout" in text and "status codes: 20000 2xx" in text, shorten(text, 2000))


def curl(t):
    s = t.serve(*DIRECT)
    with open(t.path("check"), "wb") as f:
        f.write(bytes(5))
    p = t.run(t.tool("curl"), "-sS", "--http2-prior-knowledge", "--max-time", "20", "-D", t.path("headers"),
              "-H", "content-type: application/grpc", "-H", "te: trailers", "--data-binary", "@" + t.path("check"),
              "http://%s/grpc.health.v1.Health/Check" % s.addr)
    need(p.stdout == b"\0\0\0\0\2\x08\1", "curl got %r" % p.stdout)
    with open(t.path("headers")) as f:
        text = f.read().lower()
    need("http/2 200" in text and "grpc-status: 0" in text, text)


def not_grpc(t):
    """Requests that are not gRPC, by HTTP/2 and HTTP/1.1: the status that the protocol names, and a line that says what this port is."""
    s = t.serve(*DIRECT)
    s.capped = True
    grpc, body = ["-H", "content-type: application/grpc", "-d", "x"], t.path("body")
    with open(body, "wb") as f:
        f.write(bytes(5_000_000))
    for flags, status in ((["--http2-prior-knowledge"], 404), (["--http2-prior-knowledge", "-X", "PUT", *grpc], 405),
                          (["--http2-prior-knowledge", "-d", "x"], 415),
                          (["--http2-prior-knowledge", "--data-binary", "@" + body], 415), (["--http2-prior-knowledge", "-T", body], 405),
                          (["--http2-prior-knowledge", "-H", "content-type: application/grpcx", "-d", "x"], 415),
                          (["--http2-prior-knowledge", *["-H", "x: " + 1000 * "y"] * 17], 431),
                          (["--http1.1"], 404), (["--http1.0", "-I"], 404), (["--http1.1", "-d", "x"], 415),
                          (["--http1.1", *grpc], 505), (["--http1.1", *["-H", "x: " + 1000 * "y"] * 9], 431)):
        p = t.run(t.tool("curl"), "-sS", "--max-time", "20", "-w", "%{stderr}%{http_code}", *flags, "http://%s/x.Y/Z" % s.addr, ok=False)
        said, got = p.stdout.decode(), p.stderr.decode()
        need(got == str(status), "%s: status %s, wanted %d" % (flags[:3], got, status))
        need("-I" in flags or (said.startswith("This port speaks gRPC") and said.count("\n") == 1), "%s: the body is %r" % (flags[:3], said))
    p = t.run(t.tool("curl"), "-sS", "--max-time", "20", "--http2-prior-knowledge", "-D", "-", "-X", "POST", *grpc[:2], "http://%s/x.Y/Z" % s.addr)
    need(b"HTTP/2 200" in p.stdout and b"grpc-status: 12" in p.stdout and b"unknown service /x.Y/Z" in p.stdout, "unknown method: %r" % p.stdout)


H2SPEC = 146  # cases of h2spec 2.2.1, one of them strict; 7541-2.3.3-literal-index-too-high.txt is what later ones add


def h2spec(path):
    def test(t):
        s = t.serve(*DIRECT)
        s.capped = True
        p = t.run(t.tool("bin/h2spec"), "--strict", "-p", str(s.port), "-P", path, ok=False)
        text = p.stdout.decode("utf-8", "replace")
        count = text.rstrip().rsplit("\n", 1)[-1]
        at = text.find("Failures:")
        need(count == "%d tests, %d passed, 0 skipped, 0 failed" % (H2SPEC, H2SPEC) and p.returncode == 0, "%s %s" % (count, shorten(text[at:], 3000) if at >= 0 else ""))
    return test


def strangers(t):
    """What is no HTTP/2 on the port ends in time and does not disturb a stream that goes on beside it."""
    s = t.serve(*DIRECT)
    held = t.start(s, "logs", "-n", "10", "-tag", "beside", "-hold")
    held[1].need("sent")
    hello = ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), hello, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    for name, data in (
            ("garbage", hashlib.shake_128(b"garbage").digest(4096)),
            ("HTTP/1.1 GET", b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"),
            ("HTTP/1.1 upgrade", b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\n"
                                 b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"),
            ("TLS ClientHello", hello.read()),
            ("damaged preface", PREFACE[:20] + b"XX\r\n" + PREFACE[24:]),
            ("garbage after the preface", PREFACE + b"\xff" * 64),
            ("HPACK damage", PREFACE + frame(1, 4, 1, b"\xff" * 20)),
            ("CONTINUATION alone", PREFACE + frame(9, 4, 1, b"\x83"))):
        with s.connect() as sock:
            with contextlib.suppress(ConnectionError):
                sock.sendall(data)
                while sock.recv(1 << 16):
                    pass
            t.go(s, "logs", "-n", "1", "-tag", name.replace(" ", "_"))
    t.finish(held)
    all_logs(s.out, "beside", 10)


def vectors():
    with open(os.path.join(HERE, "../vectors/manifests.jsonl")) as f:
        return [json.loads(line) for line in f]


TESTS = [
    *(("golden manifest %s" % v["name"], golden(v)) for v in vectors()),
    *(("mode %s" % name, mode(args)) for name, args in MODES.items()),
    ("manifest of 100 MiB", manifest_of_100_mib),
    ("file changed after the start", changed_file),
    ("every kind of message, json", kinds_json),
    ("every kind of message, text", kinds_text),
    ("verdict: success", verdict(0, "PASSED: ready reached", [ATTESTATION, ACCEPTED], RUN + DONE)),
    ("verdict: the algorithm fails", verdict(3, "event Running/Failed", [ATTESTATION, ACCEPTED], RUN + [event("Running/Failed")])),
    ("verdict: run_res with an error", verdict(3, "run_res: bad key", [ATTESTATION, field(3, field(2, "bad key"))], [])),
    ("verdict: a failure that only a log line tells", verdict(3, "hash does not match manifest", [ATTESTATION, ACCEPTED],
                                                              RUN + [log("dataset: hash does not match manifest", "ERROR")])),
    ("verdict: only the log-forwarder", verdict(4, "only its log-forwarder", [], [log("x", "INFO")], "-timeout", "3s")),
    ("verdict: the agent is lost", verdict(5, "LOST", [ATTESTATION, ACCEPTED], [], "-grace", "100ms")),
    ("metadata", metadata),
    ("log-forwarder that never reads", never_reading),
    ("slow stdout", slow_stdout),
    ("closed stdout", closed_stdout),
    ("started without stdout", started_without_stdout),
    *(("stop by %s" % number.name, stops(number)) for number in
      (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGABRT)),
    ("stop with a stubborn peer", stubborn_peer),
    ("stop by a second signal", second_signal),
    ("broken pipes", broken_pipes),
    ("health", healths),
    ("cvms health", health_command),
    ("reflection", go_mode("reflection")),
    ("grpcurl list and describe", grpcurl),
    ("grpcurl call, half-closed", grpcurl_call),
    ("h2load", h2load),
    ("curl", curl),
    ("requests that are not gRPC", not_grpc),
    ("many streams on a connection", many_streams),
    ("cancelled streams", go_mode("cancel", "-n", "150")),
    ("unknown methods", go_mode("unknown")),
    ("message over the limit", oversize),
    ("malformed messages", go_mode("malformed")),
    ("gzip", go_mode("gzip")),
    ("deadlines", go_mode("deadline")),
    ("requests that no gRPC library makes", go_mode("http")),
    ("pings", go_mode("pings", "-n", "50")),
    ("keepalive", go_mode("logs", "-keepalive", "10s", "-pause", "12s")),
    ("strangers on the port", strangers),
    ("h2spec at /", h2spec("/")),
    ("h2spec at Process", h2spec("/cvms.Service/Process")),
]


def one(test):
    t = Test(os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2]))
    try:
        test(t)
    finally:
        t.close()


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(harness.main([(name, lambda test=test: one(test)) for name, test in TESTS], skipped=3, count=True))
