#!/usr/bin/env python3
"""Measures cvms beside a grpc-go server that does the same job (peer/), and prints one table.

usage: bench.py [CC=cc] [CFLAGS=-O2] [BEARSSL=DIR] [ROW...]      (make bench)

Everything is built into build/bench/.  Each figure is the median of several runs that alternate between the two servers,
a fresh process each; the load is loadgen/'s, over loopback.  Processor times are the kernel's, to the nanosecond.  Every
message carries a sequence number which is looked for on the server's stdout: a row with a loss is an error, not a figure.
A second table shows how each cost grows with the number of streams, datasets and files.  Both stand in build/bench.md
as well.  ROW is the name of a function below, to measure that alone.  The exit status tells of errors only, since figures
depend on the machine: a row that does not hold says NO.
"""
import atexit
import json
import os
import resource
import select
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(os.path.dirname(HERE))
BUILD = os.path.join(TOP, "build", "bench")
INPUTS = os.path.join(TOP, "tests", "vectors", "inputs")
KEY = os.path.join(TOP, "tests", "vectors", "keys", "rsa4096.pem")
LOADGEN = os.path.join(BUILD, "loadgen")
OPENSSL = ["openssl", "dgst", "-sha3-256"]
ROUNDS = 3
MIB = 1 << 20

rows = []          # the table, as lists of cells
growth = []
errors = []
children = []
options = {"CC": "cc", "CFLAGS": "-O2", "BEARSSL": ""}
work = ""          # files of this run, in memory if there is room


# ---- Processes ----

def end_children():
    for p in children:
        if p.poll() is None:
            p.kill()
            p.wait()
    if work:
        shutil.rmtree(work, ignore_errors=True)


def start(command, **kw):
    p = subprocess.Popen(command, **kw)
    children.append(p)
    return p


def run(command, timeout=120, **kw):
    """A command's stdout; an exception with its last words if it fails."""
    p = start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)
    out, err = p.communicate(timeout=timeout)
    children.remove(p)
    if p.returncode:
        raise RuntimeError(f"{' '.join(command)[:200]}: status {p.returncode}: {(out + err).strip()[-600:]}")
    return out


def cpu_seconds(command, **kw):
    """Processor time of a whole process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(command, **kw)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class Server:
    """A server on a free loopback port, its stdout and stderr in files.  `with` ends it."""

    def __init__(self, program, flags=(), tls=False):
        self.command = [program, "-algo-path", os.path.join(INPUTS, "algo.py"), "-public-key-path", KEY, *flags]
        if os.path.basename(program) != "peer":
            self.command += ["-attested-tls-bool", "false"]
        self.env = dict(os.environ, HOST="127.0.0.1", PORT="0")
        if tls:
            self.env.update(SERVER_CERT=os.path.join(work, "server.pem"), SERVER_KEY=os.path.join(work, "server.key"))
        self.stdout = os.path.join(work, "stdout")

    def __enter__(self):
        fifo = os.path.join(work, "ready")
        if os.path.exists(fifo):
            os.unlink(fifo)
        os.mkfifo(fifo)
        ready = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        with open(self.stdout, "wb") as out, open(self.stdout + ".err", "wb") as err:
            self.process = start(self.command + ["-ready-file", fifo], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                 env=self.env, cwd=work)
        address = b""
        limit = time.monotonic() + 30
        while not address.endswith(b"\n"):
            select.select([ready], [], [], 0.01)
            try:
                address += os.read(ready, 100)
            except BlockingIOError:
                pass
            if self.process.poll() is not None or time.monotonic() > limit:
                with open(self.stdout + ".err", errors="replace") as f:
                    raise RuntimeError(f"{self.command[0]} does not start: {f.read()[-600:]}")
        os.close(ready)
        self.address = address.decode().strip()
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        children.remove(self.process)
        return False


def load(server, mode, *args, tls=False):
    command = [LOADGEN, "-mode", mode, "-addr", server.address, "-pid", str(server.process.pid), *args]
    return json.loads(run(command + (["-ca", os.path.join(work, "ca.pem")] if tls else [])))


# ---- Builds ----

def make(name, *args):
    """The Makefile's own build, in a folder of its own."""
    folder = os.path.join(BUILD, name)
    os.makedirs(folder, exist_ok=True)
    for f in ("Makefile", "cvms.c", "proto_wire.h", "sha3.h"):
        shutil.copy(os.path.join(TOP, f), folder)
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    run(["make", "-s", "-B", "-C", folder, f"CC={options['CC']}", f"CFLAGS={options['CFLAGS']}", *args], env=env)
    return os.path.join(folder, "cvms")


def bearssl_for_musl():
    """The folder for BEARSSL=: the user's, or Debian's library and the three functions of glibc that musl lacks."""
    if options["BEARSSL"] or not shutil.which("musl-gcc"):
        return options["BEARSSL"]
    inc = next((d for d in ("/usr/include", "/usr/local/include") if os.path.exists(d + "/bearssl.h")), None)
    lib = run([options["CC"], "-print-file-name=libbearssl.a"]).strip()
    if not inc or not os.path.isabs(lib):
        return ""
    folder = os.path.join(BUILD, "bearssl")
    shutil.rmtree(folder, ignore_errors=True)
    for d in ("inc", "build"):
        os.makedirs(os.path.join(folder, d))
    shutil.copy(inc + "/bearssl.h", os.path.join(folder, "inc"))
    if os.path.isdir(inc + "/bearssl"):
        shutil.copytree(inc + "/bearssl", os.path.join(folder, "inc", "bearssl"))
    else:
        for f in os.listdir(inc):
            if f.startswith("bearssl_"):
                shutil.copy(os.path.join(inc, f), os.path.join(folder, "inc"))
    shim, library = os.path.join(folder, "chk.c"), os.path.join(folder, "build", "libbearssl.a")
    with open(shim, "w") as f:
        f.write("#include <string.h>\n"
                "void *__memcpy_chk(void *to, const void *p, size_t n, size_t max) { return n > max ? NULL : memcpy(to, p, n); }\n"
                "void *__memmove_chk(void *to, const void *p, size_t n, size_t max) { return n > max ? NULL : memmove(to, p, n); }\n"
                "void *__memset_chk(void *to, int c, size_t n, size_t max) { return n > max ? NULL : memset(to, c, n); }\n")
    shutil.copy(lib, library)
    run(["musl-gcc", "-Os", "-c", "-o", shim[:-1] + "o", shim])
    run(["ar", "r", library, shim[:-1] + "o"])
    return folder


def variant(name, allowed):
    """cvms that takes only some of what the processor has."""
    out = os.path.join(BUILD, name)
    run([options["CC"], "-std=c11", *options["CFLAGS"].split(), "-DCVMS_TLS=0", f"-DSHA3_ALLOWED={allowed}",
         "-o", out, os.path.join(TOP, "cvms.c")])
    return out


def build_go():
    """The load generator and the peer; the peer's generated types stand in for a file that the tree does not have."""
    types, overlay = os.path.join(BUILD, "cvms.pb.go"), os.path.join(BUILD, "overlay.json")
    env = dict(os.environ, CGO_ENABLED="0")
    run(["go", "run", "./gen", types], cwd=HERE, env=env, timeout=600)
    with open(overlay, "w") as f:
        json.dump({"Replace": {os.path.join(HERE, "peer", "cvmspb", "cvms.pb.go"): types}}, f)
    run(["go", "build", "-overlay", overlay, "-trimpath", "-ldflags", "-s -w", "-o", BUILD + os.sep, "./peer", "./loadgen"],
        cwd=HERE, env=env, timeout=600)


class Programs:
    pass


programs = Programs()


def build():
    os.makedirs(BUILD, exist_ok=True)
    build_go()
    programs.peer = os.path.join(BUILD, "peer")
    programs.ours = make("glibc", "cvms")
    programs.plain = make("static-plain", "TLS=0", "static")
    bearssl = bearssl_for_musl()
    programs.static = make("static-tls", f"BEARSSL={bearssl}", "static")
    programs.floor = os.path.join(BUILD, "floor")
    run([options["CC"], *options["CFLAGS"].split(), "-o", programs.floor, os.path.join(HERE, "floor.c")])
    programs.baseline = variant("cvms-baseline", "0")
    programs.avx2 = variant("cvms-avx2", "(SHA3_BMI2 | SHA3_AVX2)")


def certificates():
    """A CA and an EC P-256 certificate for localhost."""
    ca, pem, key, csr, ext = (os.path.join(work, f) for f in ("ca.pem", "server.pem", "server.key", "csr", "ext"))
    ec = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    with open(ext, "w") as f:
        f.write("subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth\n")
    run(["openssl", "req", "-x509", *ec, "-days", "2", "-subj", "/CN=bench CA", "-keyout", ca + ".key", "-out", ca])
    run(["openssl", "req", *ec, "-subj", "/CN=localhost", "-keyout", key, "-out", csr])
    run(["openssl", "x509", "-req", "-in", csr, "-CA", ca, "-CAkey", ca + ".key", "-CAcreateserial", "-days", "2",
         "-extfile", ext, "-out", pem])


# ---- The table ----

def number(v):
    return f"{v:,.0f}" if v >= 1000 else f"{v:.3g}"


def human(v, unit):
    if unit == "KiB" and v >= 10 * 1024:
        return f"{number(v / 1024)} MiB"
    if unit == "us" and v >= 1e4:
        return f"{number(v / 1e3)} ms"
    if unit.endswith("/s") and v >= 1e6:
        return f"{number(v / 1e6)} M{unit}"
    if unit.endswith("/s") and v >= 1e4:
        return f"{number(v / 1e3)} k{unit}"
    return number(v) + (f" {unit}" if unit else "")


def row(figure, ours, peer, unit, less=None, more=None, most=None):
    """One row.  It holds if ours is at most `less` of the peer's, at least `more` times the peer's, at most `most`."""
    ratio = ours / peer if peer else None
    limit = most is None or ours <= most
    share = (less is None or ratio <= less) and (more is None or ratio >= more)
    holds = "yes" if limit and share else "NO" if most is None or not limit else "the limit, not the ratio"
    wanted = [f"≤ {human(most, unit)}" if most is not None else "",
              (f"≤ 1/{1 / less:.3g}" if less < 1 else f"≤ {less:.3g}") if less is not None else "",
              f"≥ {more:.3g} times" if more is not None else ""]
    if ratio is None:
        shown = "–"
    else:
        shown = f"1/{number(1 / ratio)}" if 0 < ratio < 1 and more is None else f"{number(ratio)} times"
    add([figure, human(ours, unit), human(peer, unit) if peer is not None else "–", shown,
         " ".join(w for w in wanted if w), holds if any(wanted) else "–"])


def add(cells):
    rows.append(cells)
    print("  " + " | ".join(cells), flush=True)


def not_measured(figure, why):
    add([figure, "n/a", "n/a", "–", why, "–"])


def alternate(measure, who, rounds=ROUNDS):
    """measure(program) for each program in turn, several times: the medians, key by key."""
    got = {name: [] for name in who}
    for _ in range(rounds):
        for name in who:
            got[name].append(measure(getattr(programs, name)))
    medians = []
    for name in who:
        keys = [k for k, v in got[name][0].items() if isinstance(v, (int, float))]
        medians.append({k: statistics.median(d[k] for d in got[name]) for k in keys})
    return medians


BOTH = ("ours", "peer")


def served(mode, *args, flags=(), tls=False):
    """A measurement: a fresh server, and the load generator's JSON about it."""
    def measure(program):
        with Server(program, flags, tls) as s:
            more = ("-stdout", s.stdout) if mode == "ingest" else ()
            return load(s, mode, *args, *more, tls=tls)
    return measure


# ---- Rows ----

def size():
    """Static stripped binaries."""
    peer = os.path.getsize(programs.peer) / 1024
    row("static stripped binary, TLS in", os.path.getsize(programs.static) / 1024, peer, "KiB", most=256)
    row("static stripped binary, TLS=0", os.path.getsize(programs.plain) / 1024, peer, "KiB", most=128)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def startup():
    """From fork on; the client looks without a pause."""
    port = free_port()

    def measure(program):
        s = Server(program)
        env = dict(s.env, PORT=str(port))
        return json.loads(run([LOADGEN, "-mode", "startup", "-n", "7", "-addr", f"127.0.0.1:{port}", "--", *s.command], env=env))
    static, glibc, peer = alternate(measure, ("static", "ours", "peer"))
    row("exec to first accept, static", static["accept_ms_p50"], peer["accept_ms_p50"], "ms", less=1 / 20)
    row("exec to first accept, glibc", glibc["accept_ms_p50"], peer["accept_ms_p50"], "ms")
    row("exec to health SERVING, static", static["serving_ms_p50"], peer["serving_ms_p50"], "ms", less=1 / 5)
    row("exec to health SERVING, glibc", glibc["serving_ms_p50"], peer["serving_ms_p50"], "ms", less=1 / 5)
    row("resident when idle, static", static["rss_kib_p50"], peer["rss_kib_p50"], "KiB", less=1 / 40, most=400)
    row("resident when idle, glibc", glibc["rss_kib_p50"], peer["rss_kib_p50"], "KiB", less=1 / 8)


def streams_possible():
    """10,000, or what the limit of descriptors leaves."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 10000 if hard == resource.RLIM_INFINITY else min(10000, hard - 200)


def idle():
    """Many streams that do nothing; memory does not vary, so one run of each is enough."""
    n = streams_possible()
    for tls, less, most, hold in ((False, 1 / 170, 1, 10), (True, 1 / 30, 6, 2)):
        args = ("-conns", str(n), "-n", "0", "-hold")
        ours = served("idle", *args, f"{hold}s", tls=tls)(programs.ours)
        peer = served("idle", *args, "1s", tls=tls)(programs.peer)
        row(f"resident per idle stream, {n} of them, {'TLS' if tls else 'plaintext'}", ours["rss_kib_per_conn"],
            peer["rss_kib_per_conn"], "KiB", less=less, most=most)
        if not tls:
            row(f"{n} idle streams: processor time over 10 s", ours["idle_cpu_s"] * 1e3, None, "ms", most=0)
            row(f"{n} idle streams: wake-ups in 10 s", ours["idle_wakeups"], None, "", most=0)


def ingest():
    """Messages in, 8 connections."""
    for bytes_, tls, more in ((100, False, 15), (1000, False, 8), (100, True, 10)):
        msgs = 50000 if bytes_ == 100 else 25000
        ours, peer = alternate(served("ingest", "-conns", "8", "-msgs", str(msgs), "-size", str(bytes_), tls=tls), BOTH)
        row(f"messages in per server CPU second, {bytes_} B{', TLS' if tls else ''}", ours["msgs_per_server_cpu_s"],
            peer["msgs_per_server_cpu_s"], "msg/s", more=more)


def answer():
    """The bytes that a client gets, for floor.c."""
    def frame(kind, flags, stream, payload):
        return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload
    fields = b"\x83\x86\x04\x15/cvms.Service/Process\x01\x01x\x0f\x10\x10application/grpc"
    with Server(programs.ours) as s, socket.create_connection(s.address.rsplit(":", 1), timeout=10) as c:
        c.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 4, 1, fields))
        got, at, kind = b"", 0, None
        while kind != 0:              # DATA: the manifest is one
            while len(got) < at + 9 or len(got) < at + 9 + int.from_bytes(got[at:at + 3], "big"):
                got += c.recv(65536) or sys.exit("bench: no manifest came")
            kind = got[at + 3]
            at += 9 + int.from_bytes(got[at:at + 3], "big")
    with open(os.path.join(work, "answer"), "wb") as f:
        f.write(got)


def connections():
    """Connect, take the manifest, close: processor time and latency."""
    answer()
    for client, tls, less_cpu, less_time in (("raw", False, 1 / 20, 1 / 8), ("grpc", False, None, 1 / 2.5),
                                             ("raw", True, 1 / 1.3, 1)):
        name = "TLS EC" if tls else client
        who = (*BOTH, "floor") if name == "raw" else BOTH
        ours, peer, *floor = alternate(served("latency", "-client", client, "-n", "400", tls=tls), who)
        for figure, key, less in ((f"connect, manifest, close: server CPU, {'TLS EC' if tls else 'plaintext'}",
                                   "server_cpu_us_per_conn", less_cpu),
                                  (f"latency, dial to whole manifest, median, {name}", "us_p50", less_time)):
            if less:
                row(figure, ours[key], peer[key], "us", less=less)
            if floor:
                row("the same, by a bare loop (`floor.c`)", floor[0][key], peer[key], "us")


def big_dataset():
    path = random_file("64MiB", 64)
    ours, peer = alternate(served("latency", "-n", "15", flags=("-data-paths", path)), BOTH)
    row("latency with a 64 MiB dataset, raw", ours["us_p50"], peer["us_p50"], "us", less=1 / 100)
    os.unlink(path)


def big_manifest():
    """100 MiB, to 8 clients at once; the bytes that they get are compared."""
    text, bytes_ = os.path.join(work, "manifest.json"), os.path.join(work, "manifest")
    manifest = json.loads(run([programs.ours, "manifest", *Server(programs.ours).command[1:]]))
    with open(text, "w") as f:
        json.dump(dict(manifest, description="0123456789abcdef" * (100 * MIB // 16)), f)
    flags = ["manifest", "-manifest", text, "-o", bytes_]
    run([programs.ours, *flags])

    def measure(program):
        s = Server(program)
        if program == programs.ours:
            s.command = [program, "-manifest", text]
        else:
            s.command += ["-manifest", bytes_]
        with s:
            return load(s, "fetch", "-conns", "8", "-expect", bytes_)
    ours, peer = alternate(measure, BOTH)
    row("a 100 MiB manifest to 8 clients, per server CPU second", ours["bytes_per_server_cpu_s"],
        peer["bytes_per_server_cpu_s"], "B/s", more=3)
    os.unlink(text)
    os.unlink(bytes_)


def uploading():
    """A large dataset to an agent's service, which counts it; the peer is a grpc-go client that does the same."""
    path = random_file("512MiB", 512)

    def measure(program):
        if program == programs.peer:
            return json.loads(run([LOADGEN, "-mode", "upload", "-client", "grpc", "-file", path]))
        s = Server(program)
        s.command = [*s.command[:3], "-algo-type", "python", "-data-paths", path, "-deliver", "upload"]
        with s:
            return load(s, "upload", "-file", path)
    ours, peer = alternate(measure, BOTH)
    row("an upload of 512 MiB, per CPU second", ours["bytes_per_server_cpu_s"], peer["bytes_per_server_cpu_s"], "B/s", more=1.5)
    row("resident at most, uploading", ours["rss_kib"], peer["rss_kib"], "KiB", less=1 / 3, most=8192)
    os.unlink(path)


def fetching():
    """A file to 8 readers over HTTP/1.1; the peer is a server of Go's net/http."""
    path = random_file("256MiB", 256)
    for way, theirs, name in (("http-plain", "/plain", "as it is"), ("http", "/sealed", "AES-256-GCM")):
        def measure(program, way=way, theirs=theirs):
            s = Server(program, ["-serve", path])
            if program != programs.peer:
                s.command = [*s.command[:3], "-algo-type", "python", "-data-paths", path, "-deliver", way]
            with s:
                if program != programs.peer:
                    manifest = json.loads(run([program, "agent", "-once", s.address]))
                    theirs = manifest["datasets"][0]["source"]["url"].split(s.address)[1]
                return load(s, "get", "-conns", "8", "-file", theirs)
        ours, peer = alternate(measure, BOTH)
        row(f"256 MiB to 8 readers, {name}, per server CPU second", ours["bytes_per_server_cpu_s"], peer["bytes_per_server_cpu_s"], "B/s")
        row(f"resident at most, the same, {name}", ours["rss_kib"], peer["rss_kib"], "KiB", less=1 / 3, most=8192)
    os.unlink(path)


def random_file(name, mib):
    path = os.path.join(work, name)
    with open("/dev/urandom", "rb") as r, open(path, "wb") as f:
        for _ in range(mib):
            f.write(r.read(MIB))
    return path


def has(feature):
    with open("/proc/cpuinfo") as f:
        return any(feature in line.split() for line in f if line.startswith("flags"))


def digests(text):
    """The hex digests in openssl's or cvms's output, in order."""
    words = text.replace("=", " ").split()
    return [w for w in words if len(w) == 64 and all(c in "0123456789abcdef" for c in w)]


def hashing(files, who):
    """Bytes per second of processor time of whole processes, openssl's last."""
    commands = [[getattr(programs, p), "checksum", *files] for p in who] + [OPENSSL + files]
    want = digests(run(commands[-1]))
    for c in commands[:-1]:
        got = digests(run(c))
        if got != want or len(want) != len(files):
            raise RuntimeError(f"{c[0]} checksum: got {got}, want {want}")
    total = sum(os.path.getsize(f) for f in files)
    times = [[cpu_seconds(c) for c in commands] for _ in range(ROUNDS)]
    return [total / statistics.median(t) for t in zip(*times)]


def sha3():
    """SHA3-256 of files in the page cache, against openssl."""
    path = random_file("1GiB", 1024)
    best, baseline, openssl = hashing([path], ("ours", "baseline"))
    os.unlink(path)
    row("SHA3-256 of 1 GiB, best path (peer: openssl)", best, openssl, "B/s", more=1.1)
    row("SHA3-256 of 1 GiB, baseline build (peer: openssl)", baseline, openssl, "B/s", more=.85)
    files = [random_file(f"16MiB-{i}", 16) for i in range(16)]
    for name, who, feature, more in (("AVX2", "avx2", "avx2", 3.5), ("AVX-512", "ours", "avx512vl", 5)):
        figure = f"SHA3-256 of 16 files of 16 MiB, {name} (peer: openssl)"
        if has(feature):
            ours, openssl = hashing(files, (who,))
            row(figure, ours, openssl, "B/s", more=more)
        else:
            not_measured(figure, "this processor has no " + name)
    for f in files:
        os.unlink(f)


# ---- Growth ----

COUNTS = (1, 10, 100, 1000, 10000)


def grow(what, unit, costs, factor=1.5):
    """One row of the growth table: per-item costs (None: too few to tell), and by how much one is over any at a smaller count."""
    known = [c for c in costs if c is not None]
    worst = max(b / a if a > 0 else 1 for i, a in enumerate(known) for b in known[i + 1:])
    cells = (human(c, unit) if c is not None else "–" for c in costs)
    growth.append([what, *cells, f"{worst:.2f}", "yes" if worst <= factor else "NO"])
    print("  " + " | ".join(growth[-1]), flush=True)


def median_of(f, *args):
    return statistics.median(f(*args) for _ in range(ROUNDS))


def growth_streams():
    counts = [min(n, streams_possible()) for n in COUNTS]
    connect, memory, message = [], [], []
    for n in counts:
        def one(n=n):
            return served("idle", "-conns", str(n), "-n", "200")(programs.ours)
        runs = [one() for _ in range(ROUNDS if n < 1000 else 1)]
        connect.append(statistics.median(r["server_cpu_us_per_conn"] for r in runs))
        memory.append(statistics.median(r["rss_kib_per_conn"] for r in runs) if n >= 100 else None)   # pages of 4 KiB
        each = max(10, 200000 // n)
        message.append(median_of(lambda: served("ingest", "-conns", str(n), "-msgs", str(each))(programs.ours)
                                 ["server_cpu_us_per_msg"]))
    grow("a new connection beside N idle streams, CPU", "us", connect)
    grow("resident per idle stream", "KiB", memory)
    grow("a message on one of N streams, CPU", "us", message)


def growth_files():
    """N datasets of a manifest; N files, and a folder of N files, to hash."""
    checksum, folder, manifest, fetch = [], [], [], []
    for n in COUNTS:
        top = os.path.join(work, f"d{n}")
        os.mkdir(top)
        for i in range(n):
            with open(os.path.join(top, str(i)), "wb") as f:
                f.write(b"%06d" % i * 700)
        names = [f"d{n}/{i}" for i in range(n)]
        flags = ["-data-paths", ",".join(names)]
        command = [programs.ours, "manifest", *Server(programs.ours).command[1:], *flags, "-o", "/dev/null"]

        def per(command, n=n):
            return cpu_seconds(command, cwd=work) / n * 1e6
        checksum.append(median_of(per, [programs.ours, "checksum", *names]))
        folder.append(median_of(per, [programs.ours, "checksum", top]))
        manifest.append(median_of(per, command))
        fetched = served("latency", "-n", str(max(5, min(200, 20000 // n))), flags=flags)
        fetch.append(median_of(lambda: fetched(programs.ours)["server_cpu_us_per_conn"]) / n)
        shutil.rmtree(top)
    grow("checksum of N files of 4,200 B, CPU a file", "us", checksum)
    grow("checksum of a folder of N files, CPU a file", "us", folder)
    grow("a manifest of N datasets is made, CPU a dataset", "us", manifest)
    grow("a manifest of N datasets is sent, CPU a dataset", "us", fetch)


# ---- The whole run ----

def verifier_sees_loss():
    """Before any figure is believed: a lost, a doubled and a damaged message are found."""
    command = [LOADGEN, "-mode", "verify", "-conns", "1", "-msgs", "50", "-run", "7", "-stdout"]
    with Server(programs.ours) as s:
        load(s, "ingest", "-msgs", "50", "-run", "7", "-stdout", s.stdout)
        with open(s.stdout, "rb") as f:
            lines = f.read().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if b"LG7c0s20;" in line)
    damaged = lines[at].replace(b"xxx", b"xx ", 1)
    cases = {"whole": lines, "lost": lines[:at] + lines[at + 1:], "doubled": lines[:at] + lines[at:at + 1] + lines[at:],
             "damaged": lines[:at] + [damaged] + lines[at + 1:]}
    for name, text in cases.items():
        path = os.path.join(work, "altered")
        with open(path, "wb") as f:
            f.writelines(text)
        good = subprocess.run(command + [path], stdout=subprocess.DEVNULL, timeout=60).returncode == 0
        if good != (name == "whole"):
            raise RuntimeError(f"the verifier is wrong about output that is {name}")


def machine():
    with open("/proc/cpuinfo") as f:
        model = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), "unknown processor")
    words = [" ".join(w for w, f in (("AVX2", "avx2"), ("AVX-512", "avx512vl")) if has(f)) or "no AVX2",
             f"{len(os.sched_getaffinity(0))} cores", f"Linux {os.uname().release}",
             run([options["CC"], "--version"]).splitlines()[0], " ".join(run(["go", "version"]).split()[2:]),
             " ".join(run(["openssl", "version"]).split()[:2])]
    return f"{model}, " + ", ".join(words)


def markdown(head, table):
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *table]]
    return "\n".join(lines) + "\n"


ROWS = [size, startup, ingest, connections, big_dataset, big_manifest, uploading, fetching, sha3, idle, growth_streams, growth_files]


def report(seconds):
    text = f"Measured with `make bench` on {machine()}, {time.strftime('%Y-%m-%d')}.\n\n"
    if rows:
        text += markdown(["figure", "ours", "peer", "ratio", "wanted", "holds?"], rows)
    if growth:
        text += "\n" + markdown(["cost of one, of N", *(f"{n:,}" for n in COUNTS), "growth", "≤ 1.5?"], growth)
    with open(os.path.join(TOP, "build", "bench.md"), "w") as f:
        f.write(text)
    print("\n" + text)
    for e in errors:
        print("ERROR " + e)
    held = sum(cells[-1] == "yes" for cells in rows + growth)
    failing = sum(cells[-1] not in ("yes", "–") for cells in rows + growth)
    print(f"{held} rows hold, {failing} do not, {len(errors)} errors; {seconds:.0f} s")


def main():
    global work
    names = []
    for word in sys.argv[1:]:
        key, equals, value = word.partition("=")
        if equals and key in options:
            options[key] = value
        else:
            names.append(word)
    missing = [t for t in ("go", "openssl", "make", "ar", options["CC"].split()[0]) if not shutil.which(t)]
    if missing:
        print(f"bench: {', '.join(missing)} not found; tests/install.sh installs what is needed", file=sys.stderr)
        return 1
    for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(s, lambda number, _: sys.exit(128 + number))
    atexit.register(end_children)
    began = time.monotonic()
    build()
    room = os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 3 << 30
    work = tempfile.mkdtemp(prefix="bench-", dir="/dev/shm" if room else BUILD)
    certificates()
    verifier_sees_loss()
    print(f"built in {time.monotonic() - began:.0f} s", flush=True)
    for f in ROWS:
        if not names or f.__name__ in names:
            t = time.monotonic()
            try:
                f()
            except (RuntimeError, OSError, ValueError, KeyError, subprocess.SubprocessError) as e:
                errors.append(f"{f.__name__}: {e}")
                print("  ERROR " + errors[-1], flush=True)
            print(f"{f.__name__}: {time.monotonic() - t:.0f} s", flush=True)
    report(time.monotonic() - began)
    return 1 if errors else 0


sys.exit(main())
