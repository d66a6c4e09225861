#!/usr/bin/env python3
"""usage: test_attack.py CVMS TOOLS_DIR CVMS_FAST [PART OF A NAME]

A thousand honest streams of grpc-go, and beside them hostile clients of every kind in turn, in plaintext and over TLS:
each message of the honest is shown once, each cap that is met is told, at most once a second.  Then, on CVMS_FAST, which
has no sanitizer, the memory of a thousand hostile connections against the README's limits.
"""
import collections
import contextlib
import hashlib
import multiprocessing
import os
import re
import resource
import socket
import ssl
import struct
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import harness  # noqa: E402
from harness import PREFACE, PROCESS, Collector, drop, frame, literal, need, request, self_signed, shorten  # noqa: E402

LIMIT = 60                            # seconds that any one step may take
CVMS, TOOLS, FAST = (os.path.abspath(p) for p in sys.argv[1:4])
HONEST, PER = 1000, 4                 # streams, and how many of them share a connection
STREAMS = 100                         # that a connection may have

# ---- frames ----
WATCH = "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"


PING, SETTINGS = frame(6, 0, 0, b"12345678"), frame(4, 0, 0)
BOMB = literal("x-bomb", 4000 * "b", 0x40)
ids = lambda n, first=1: range(first, first + 2 * n, 2)
noise = lambda seed, n: hashlib.shake_128(str(seed).encode()).digest(n)


def data(stream, body, flags=0):
    return b"".join(frame(0, flags, stream, body[i:i + 16384]) for i in range(0, len(body), 16384))


def hello():
    """A TLS ClientHello."""
    out = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), out, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return out.read()


# ---- The kinds of hostility: what each sends, and the cap that it meets; it ends when it is cut off ----
FLOODS = {name: (cap, payload if name == "HTTP/1.1" else PREFACE + payload) for name, (cap, payload) in {
    "rapid reset": ("stream errors and resets",
                    b"".join(request(i, WATCH) + frame(3, 0, i, struct.pack(">I", 8)) for i in ids(2000))),
    "made you reset": ("stream errors and resets",
                       b"".join(request(i, WATCH) + frame(8, 0, i, bytes(4)) for i in ids(2000))),
    "too many streams": ("streams of a connection", b"".join(request(i, PROCESS) for i in ids(1000))),
    "HPACK bombs": ("bytes of a header list", request(1, WATCH, 5, BOMB) +
                    b"".join(request(i, WATCH, 5, b"\xbe" * 1000) for i in ids(300, 3))),
    "many fields": ("fields of a field block", request(1, WATCH, 5, literal("a", "", 0x40)) + request(3, WATCH, 5, b"\x7e\0" * 8000)),
    "CONTINUATION": ("CONTINUATION frames", frame(1, 0, 1, b"\x83") + 5000 * frame(9, 0, 1)),
    "field block": ("bytes of a field block", frame(1, 0, 1, b"\x93" * 16384) + 3 * frame(9, 0, 1, b"\x93" * 16384)),
    "PING": ("frames that carry no data", 20000 * PING),
    "SETTINGS": ("frames that carry no data", 20000 * SETTINGS),
    "empty DATA": ("frames that carry no data", request(1, WATCH) + 20000 * frame(0, 0, 1)),
    "padding": ("frames that carry no data", request(1, WATCH) + 20000 * frame(0, 8, 1, b"\7" + bytes(7))),
    "WINDOW_UPDATE": ("frames that carry no data", 20000 * frame(8, 0, 0, b"\0\0\0\1")),
    "PRIORITY and unknown": ("frames that carry no data", 5000 * (frame(2, 0, 3, bytes(5)) + frame(99, 0, 0, b"?"))),
    "late RST_STREAM": ("frames that carry no data", request(1, "/x.Y/Z", 5) + 20000 * frame(3, 0, 1, bytes(4))),
    "unread answers": ("answers that wait", frame(4, 0, 0, b"\0\4" + bytes(4)) + request(1, REFLECTION) +
                       200 * data(1, b"\0\0\0\3\xe9\x1a\xe6\7" + 998 * b"x")),
    "long message": ("bytes of a message", b"".join(request(i, PROCESS) + data(i, b"\0\xff\xff\xff\xff") for i in ids(50))),
    "garbage after the preface": (None, noise(1, 100000)),
    "DATA beyond the window": (None, request(1, PROCESS) + data(1, b"\0\0\x3f\xff\xff" + bytes(300000))),
    "malformed messages": (None, b"".join(request(i, PROCESS) + data(i, b"\0\0\0\0\4" + noise(i, 4), 1) for i in ids(90))),
    "HTTP/1.1": (None, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(100000)),
}.items()}
STALLS = {                            # what keeps a connection open, until the attacker goes away
    "half a preface": PREFACE[:20],
    "half a frame": PREFACE + frame(1, 0, 1, b"\x83" * 10000)[:5000],
    "half a message": PREFACE + b"".join(request(i, PROCESS) + data(i, b"\0\0\0\xff\xff" + 600 * b"m") for i in ids(STREAMS)),
    "never reads": PREFACE + frame(4, 0, 0, b"\0\4\x7f\0\0\0") + frame(8, 0, 0, b"\x7f\0\0\0") +
                   b"".join(request(i, PROCESS) for i in ids(STREAMS)),
}
RAW = {                               # below TLS, or where there is none
    "ClientHello, then nothing": hello(),
    "half a ClientHello": hello()[:100],
    "damaged ClientHello": hello()[:60] + noise(2, 4000),
    "records of noise": b"\x16\x03\x01\x40\x00" + noise(3, 20000),
    "an alert": b"\x15\x03\x03\0\2\2\x28",
    "noise": noise(4, 20000),
    "nothing": b"",
}


def attack(port, secure, name, pipe):
    """A process of its own: a dozen hostile clients of one kind.  It says when it has done its worst, and holds on for a word."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    kept = []
    for turn in range(12):
        s = socket.create_connection(("127.0.0.1", port), LIMIT)
        with contextlib.suppress(OSError):     # cut off in the middle: what it wanted
            if secure and name not in RAW:
                s = context.wrap_socket(s, server_hostname="localhost")
            if name not in FLOODS:
                kept.append(s)
                s.settimeout(0.5)              # one that is not read for ever
                s.sendall(STALLS.get(name, RAW.get(name)))
                continue
            s.sendall(FLOODS[name][1])
            if turn % 3 == 0:                  # a reset
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif turn % 3 == 1:                # an end in good order
                s.shutdown(socket.SHUT_WR)
                while s.recv(1 << 16):
                    pass
        if name in FLOODS:
            s.close()
    pipe.send("done")
    pipe.recv()
    os._exit(0)


class Hostile:
    def __init__(self, port, secure, name):
        self.pipe, theirs = multiprocessing.Pipe()
        self.p = multiprocessing.Process(target=attack, args=(port, secure, name, theirs), daemon=True)
        self.p.start()
        theirs.close()

    def done(self, wait):
        return self.pipe.poll(wait)

    def close(self):
        with contextlib.suppress(OSError):
            self.pipe.send("go")
        self.p.join(5)
        if self.p.is_alive():
            self.p.kill()
            self.p.join()


class Server(harness.Server):
    def __init__(self, program, *flags, secure=False):
        self.dir, self.secure = harness.temp("server"), secure
        if secure:
            self_signed("localhost", self.dir)
        cert, key = (os.path.join(self.dir, "localhost." + x) for x in ("pem", "key"))
        super().__init__("server", *flags, program=program, env={"SERVER_CERT": cert, "SERVER_KEY": key} if secure else {})
        self.addr = self.address


class Honest:
    """The thousand streams; each message is known by its number."""

    def __init__(self, s, secure):
        self.s, self.rounds, self.seen = s, 0, 0
        more = ["-tls", "-ca", os.path.join(s.dir, "localhost.pem")] if secure else []
        self.p = subprocess.Popen([os.path.join(TOOLS, "bin/client"), "-addr", s.addr, "-mode", "crowd", "-n", str(HONEST), "-per", str(PER),
                                   "-tag", "honest", "-timeout", "10m", *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE)
        self.lines = Collector(self.p.stdout.fileno())
        self.lines.need("0\n")

    def round(self):
        """Each stream sends one message, and each is shown."""
        self.p.stdin.write(b"\n")
        self.p.stdin.flush()
        self.rounds += 1
        with contextlib.suppress(AssertionError):
            self.lines.need(f"\n{self.rounds}\n")
            if self.s.out.wait(lambda d: d.count(b"honest-") >= self.rounds * HONEST, LIMIT):
                return
        need(False, f"{bytes(self.s.out.data).count(b'honest-')} of {self.rounds * HONEST} messages are shown; the client said "
                     f"{shorten(bytes(self.lines.data)[-200:])}{shorten(self.p.stderr.read()) if self.p.poll() is not None else ''}")

    def finish(self):
        self.p.stdin.close()
        status = self.p.wait(LIMIT)
        need(status == 0, f"the honest client ends with {status}: {shorten(self.p.stderr.read())}")
        numbers = collections.Counter(int(n) for n in re.findall(rb"honest-(\d+);", bytes(self.s.out.data)))
        need(len(numbers) == self.rounds * HONEST and set(numbers.values()) == {1}, "not every message is shown once")

    def close(self):
        drop(self.p)


def caps_told(text):
    """The lines on caps, by cap; two within a second are a failure."""
    last = {}
    for stamp, cap in re.findall(r"^\S+T(\S+)Z .*over the cap on ([^:(]*)", text, re.M):
        h, m, s = stamp.split(":")
        at = int(h) * 3600 + int(m) * 60 + float(s)
        need(cap not in last or (at - last[cap]) % 86400 > 0.9, f"two lines on {cap} within a second")
        last[cap] = at
    return " ".join(last)


def beside(secure):
    """Every kind in turn; the honest go on all the while."""
    s = Server(CVMS, secure=secure)
    try:
        honest = Honest(s, secure)
        try:
            honest.round()
            need("over the cap" not in s.err.text(), f"honest clients met a cap: {s.err.text()[-300:]}")
            for name in [*FLOODS, *STALLS, *RAW]:
                hostile = Hostile(s.port, secure, name)
                try:
                    honest.round()
                    while not hostile.done(0):
                        honest.round()
                    honest.round()
                except AssertionError as e:
                    raise AssertionError(f"beside {name}: {e}") from None
                finally:
                    hostile.close()
            honest.finish()
            told = caps_told(s.err.text())
            for name, (cap, _) in FLOODS.items():
                need(cap is None or cap in told, f"{name}: no line on {cap} in {told}")
        finally:
            honest.close()
    finally:
        s.close()
    return f"{honest.rounds} rounds"


# ---- Memory ----
def limits():
    """Numbers of the README's limits, in bytes."""
    with open(harness.README) as f:
        text = f.read()
    found = {name: re.search(r"\n\| " + row, text) for name, row in {
        "block": r"field block.*?\| ([\d,]+) bytes", "table": r"HPACK dynamic table, frame \| ([\d,]+) bytes",
        "frame": r"HPACK dynamic table, frame \| [\d,]+ bytes, ([\d,]+) bytes", "answers": r"answers.* ([\d,]+) bytes on a connection",
        "output": r"output that waits on a connection \| ([\d,]+) bytes", "idle": r"memory of an idle connection \| (\d+) KiB",
        "idle TLS": r"memory of an idle connection.* over TLS (\d+) KiB", "handshake": r"memory of a TLS handshake \| (\d+) KiB"}.items()}
    need(all(found.values()), f"the README's limits lack {[n for n, m in found.items() if not m]}")
    return {n: int(m[1].replace(",", "")) << (10 if "KiB" in m[0] else 0) for n, m in found.items()}


def settled(s):
    """Memory when it no longer grows: all that was sent has been read."""
    last, now = -1, s.memory()
    for _ in range(200):
        if now == last:
            break
        p = subprocess.run([FAST, "health", "-wait", "10s", *(["-insecure"] if s.secure else []), s.addr], capture_output=True)
        need(p.returncode == 0, f"cvms health: {p.stderr}")
        last, now = now, s.memory()
    return now


def memory_of(s, kinds, each, connect):
    """So many connections of each kind, (payload, bytes that one may hold), at once: what the process holds more."""
    before, open_ = settled(s), []
    try:
        for payload, _ in kinds.values():
            for _ in range(each):
                k = connect()
                open_.append(k)
                k.settimeout(0.05)             # for one that is not read
                with contextlib.suppress(TimeoutError):
                    k.sendall(payload)
        grown, bound = settled(s) - before, sum(bound for _, bound in kinds.values()) * each
        need(grown <= bound, f"{len(open_)} connections hold {grown >> 10} KiB, by the limits at most {bound >> 10}")
        need(grown >= bound // 5, f"{len(open_)} connections hold but {grown >> 10} KiB of {bound >> 10}: the test is not hostile")
        return f"{len(open_)} connections hold {grown >> 10} KiB, by the limits at most {bound >> 10}"
    finally:
        for k in open_:
            k.close()


def connect_to(s):
    k = socket.socket()
    k.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)    # so that what is not read waits at the server
    k.settimeout(LIMIT)
    k.connect(("127.0.0.1", s.port))
    return k


def memory_plain():
    n, message = limits(), 4096
    job = literal("job-id", 200 * "j")
    wide = frame(4, 0, 0, b"\0\4\x7f\0\0\0") + frame(8, 0, 0, b"\x7f\0\0\0")
    kinds = {name: (PREFACE + payload if payload[:3] != b"PRI" else payload, n["idle"] + bound) for name, (payload, bound) in {
        "half a preface": (PREFACE[:20], 0),
        "quiet stream": (request(1, PROCESS), 0),
        "half a SETTINGS frame": (frame(4, 0, 0, bytes(16380))[:-1], n["frame"]),
        "open field block": (frame(1, 0, 1, b"\x93" * 16384) + 2 * frame(9, 0, 1, b"\x93" * 16384)[:-1], n["block"] + n["frame"]),
        "dynamic table": (request(1, PROCESS, 4, BOMB), n["table"]),
        "half messages": (b"".join(request(i, PROCESS, 4, job) + data(i, struct.pack(">BI", 0, message) + bytes(message - 1))
                                   for i in ids(STREAMS)), STREAMS * (message + n["idle"])),
        "unread answers": (frame(4, 0, 0, b"\0\4" + bytes(4)) + b"".join(
            request(i, REFLECTION) + 60 * data(i, b"\0\0\0\3\xe9\x0a\xe6\7" + 998 * b"x") for i in (1, 3)), n["answers"]),
        "unread output": (wide + b"".join(request(i, PROCESS) for i in ids(STREAMS)), 2 * n["output"] + STREAMS * n["idle"]),
    }.items()}
    s = Server(FAST, "-max-message", str(message), "-set", "description=" + 120000 * "d")
    try:
        return memory_of(s, kinds, HONEST // len(kinds), lambda: connect_to(s))
    finally:
        s.close()


def memory_tls():
    n = limits()
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    told = []
    for kinds, connect in (
            ({"half a record": (b"\x16\x03\x01\x40\x00\1" + noise(5, 16382), n["handshake"])}, lambda s: connect_to(s)),
            ({"quiet stream": (PREFACE + request(1, PROCESS), n["idle TLS"])}, lambda s: context.wrap_socket(connect_to(s)))):
        s = Server(FAST, secure=True)
        try:
            told.append(f"{list(kinds)[0]}: " + memory_of(s, kinds, HONEST, lambda: connect(s)))
        finally:
            s.close()
    return "; ".join(told)


TESTS = [
    ("1,000 honest streams beside every kind of hostile client, plaintext", lambda: beside(False)),
    ("1,000 honest streams beside every kind of hostile client, TLS", lambda: beside(True)),
    ("memory of 1,000 hostile connections, plaintext", memory_plain),
    ("memory of 1,000 connections over TLS", memory_tls),
]

def told(name, test):
    print(f"ok {name}: {test()}", flush=True)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    harness.W.make(CVMS)
    harness.W.base = ["-algo-path", harness.W.algo, "-public-key-path", harness.W.rsa, "-attested-tls-bool", "false"]
    sys.exit(harness.main([(name, lambda n=name, t=test: told(n, t)) for name, test in TESTS], skipped=4, count=True))
