#!/usr/bin/env python3
"""Direct runs: uploads, results, and what is told at the start.  usage: test_deliver.py CVMS FAST AGENT [-v] [NAME...]

FAST is the same program without sanitizers, whose memory is measured.  AGENT is the grpc-go AgentService of tests/clients/go/agent, which verifies signatures with Go's own crypto; the agent's
and the log-forwarder's streams are played message by message.  The last line is `N passed, M failed`.
"""
import base64
import json
import os
import pty
import re
import socket
import subprocess
import sys
import threading
import time
import zipfile

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import harness  # noqa: E402
from harness import (  # noqa: E402
    ACCEPTED, LIMIT, Collector, Server, Skip, W, call, check, event, field, fields, first, has, hasnot, named, need, read, run, same,
    sha3, shell, temp, write)

MIB = 1 << 20
FAST, GO = map(os.path.abspath, sys.argv[2:4])
DONE = ["Running/Completed", "ConsumingResults/Ready"]


def state(text):
    return field(5, field(1, "1") + field(2, text))


class Agent:
    """The grpc-go AgentService; .lines is what it says."""
    def __init__(self, listen="127.0.0.1:0"):
        if not os.path.exists(GO):
            raise Skip("no grpc-go AgentService; run tests/install.sh")
        self.p = subprocess.Popen([GO, "-listen", listen], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.out = Collector(self.p.stdout.fileno())
        need(self.out.until(r"^listening \S+$"), "no AgentService")
        self.address = re.search(r"^listening (\S+)$", self.out.text(), re.M).group(1)
        self.told = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.p.kill()
        self.out.thread.join(LIMIT)
        harness.drop(self.p)

    def tell(self, text):
        self.told += 1
        self.p.stdin.write(text.encode() + b"\n")
        self.p.stdin.flush()
        need(self.out.until(r"^done", times=self.told), f"{text} was not taken")

    def keys(self, manifest):
        """Takes the key of the manifest's algorithm."""
        self.tell("key " + base64.b64encode(first(first(manifest, 5), 2)).decode())

    def saw(self, pattern, times=1):
        return self.out.until("^" + pattern, times=times)


class Run:
    """A server that delivers to an agent host: .agent and .forwarder are its streams, .go its service."""
    def __init__(self, name, *args, go=None, base=None, until="complete", **kw):
        self.name, self.go = name, go
        where = ["-agent-address", go.address] if go else []
        until = ["-until", until, "-timeout", "60s"] if until else []
        self.server = Server(name, "-deliver", "upload", *where, *until, *args, base=basic() if base is None else base, **kw)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.close()

    def connect(self, job=None):
        self.agent, self.forwarder = self.server.both(job)
        self.manifest = self.agent.manifest()
        self.go.keys(self.manifest)
        return self

    def accept(self):
        self.agent.send(ACCEPTED)
        self.forwarder.events("ReceivingAlgorithm/InProgress")
        return self

    def results(self):
        self.forwarder.events("Running/Starting", "Running/InProgress", *DONE)
        return self

    def to_the_end(self, status, words):
        """The rest of a run without data; what ends with 0 has its results fetched."""
        self.connect().accept()
        need(self.go.saw("algo"), "no algorithm")
        self.results()
        if not status:
            self.said("results in")
            self.forwarder.events("Complete/Completed")
        self.server.ended(status, words)

    def said(self, pattern, times=1):
        return check(f"{self.name}: says {pattern}", self.server.err.until(pattern, times=times), self.server.err.text(), pattern)


def basic(*data, algo=None):
    return ["-algo-path", algo or W.algo, "-algo-type", "python"] + (["-data-paths", ",".join(data)] if data else [])


def counting(n):
    return bytes(i * 7 & 255 for i in range(n))


# ---- A whole run ----

def test_whole_run():
    out = os.path.join(temp(), "out.zip")
    with Agent() as go, Run("whole", "-results", out, "-algo-args", "--epochs,10,,x y", "-report", out + ".json",
                            go=go, base=basic(W.data)) as r:
        r.connect().accept()
        need(go.saw("algo"), "no algorithm")
        has("whole: the algorithm", go.out.text(), rf"algo {os.path.getsize(W.algo)} {sha3(read(W.algo))} ", 'type=\\["python"\\]',
            r'args=\["--epochs" "10" "" "x y"\]', r'runtime=\["python3"\]', "requirements=0 ")
        need(go.saw("data"), "no dataset")
        has("whole: the dataset", go.out.text(), rf"data {os.path.getsize(W.data)} {sha3(read(W.data))} ", 'name="data.csv"',
            r'decompress=\["false"\]')
        go.tell("results 1000 1048576")
        r.results()
        need(go.saw("result 1000"), "no results")
        r.said(r"results in \S+out.zip: 1000 bytes, .*\n.* delivery +SHA3-256 " + sha3(counting(1000)))
        r.forwarder.events("Complete/Completed")
        err = r.server.ended(0, "complete reached")
        for line in (rf"algorithm algo.py uploaded, {os.path.getsize(W.algo)} bytes", "dataset data.csv uploaded",
                     rf"results in {out}, 1000 bytes", f"SHA3-256 {sha3(counting(1000))}"):
            has("whole: the summary", err, rf"^cvms:      {line}")
        same("whole: the results", read(out), counting(1000))
        same("whole: nothing else is left", sorted(os.listdir(os.path.dirname(out))), ["out.zip", "out.zip.json"])
        report = json.loads(read(out + ".json"))["agents"][0]["deliveries"]
        same("whole: the report", [(d["what"], d["done"], d["bytes"]) for d in report],
             [("algorithm", True, os.path.getsize(W.algo)), ("dataset", True, os.path.getsize(W.data)), ("results", True, 1000)])
        same("whole: the results' hash", report[2]["sha3_256"], sha3(counting(1000)))


def test_many_arguments():
    args = [str(i) for i in range(300)]
    with Agent() as go, Run("many arguments", "-algo-args", ",".join(args), go=go, until=None) as r:
        r.connect().accept()
        need(go.saw("algo .*$"), f"no algorithm: {r.server.err.text()}")
        has("many arguments", go.out.text(), re.escape("args=[" + " ".join(f'"{a}"' for a in args) + "]"))


# ---- What is told at the start ----

def test_mistakes():
    folder = temp()
    out = os.path.join(folder, "out.zip")
    base = ["-algo-path", W.algo, "-algo-type", "python"]
    up = [*base, "-deliver", "upload"]
    rows = [
        ([*base, "-deliver", "ftp"], 2, r'-deliver: "ftp" is no way to deliver; use cli, upload, http, http-plain, oci or oci-plain'),
        ([*base, "-deliver", "upload,ftp"], 2, r'-deliver: "ftp" is no way'),
        ([*base, *W.required, "-agent-address", "h:7002"], 2, "-agent-address: nothing is delivered"),
        ([*base, *W.required, "-private-key-path", W.key], 2, "-private-key-path: nothing is delivered"),
        ([*base, *W.required, "-algo-requirements", W.data], 2, "-algo-requirements: the algorithm is not uploaded from here"),
        ([*base, "-deliver", "cli,upload", "-data-paths", W.data, "-python-runtime", "x"], 2, "-python-runtime: the algorithm is"),
        ([*up, "-public-key-path", W.rsa], 2, "-private-key-path is missing: .*a key pair is made for the run"),
        ([*up, "-attested-tls-bool", "true"], 2, "-attested-tls-bool true: .*attested TLS"),
        ([*up, "-agent-address", "here"], 2, '-agent-address: "here" lacks the port; write it like'),
        ([*up, "-agent-address", "::1"], 2, '-agent-address: "::1" is not an address'),
        ([*up, "-agent-address", "h:7002", "-agents", "2", "-until", "ready"], 2, "-agent-address is that of one agent"),
        ([*up, "-algo-requirements", folder], 1, f"-algo-requirements: {folder}: is a folder"),
        ([*up, "-algo-requirements", out], 1, f"-algo-requirements: {out}: No such file"),
        ([*up, "-results", out, "-until", "ready"], 2, "-results: with -until ready the run ends before they are there"),
        ([*up, "-results", folder], 2, "-results: .* is not a regular file"),
        ([*up, "-results", "/dev/null"], 2, "-results: .*/dev/null. is not a regular file"),
        ([*up, "-results", folder + "/no/out"], 1, "-results: .* can't be written: No such file"),
        ([*up, "-results", ""], 1, "-results: .* can't be written: No such file"),
        ([*up, "-algo-args", "\u00e9"], 2, "-algo-args: .* can't be uploaded"),
        ([*up, "-algo-args", " x"], 2, "-algo-args: .* can't be uploaded"),
        ([*up, "-algo-args", "x" * 20000], 2, "-algo-args: .*too long"),
        ([*base[:2], "-deliver", "upload"], 2, "-algo-type is missing"),
        ([*W.remote, "-deliver", "upload"], 2, "-private-key-path is missing"),
        ([*W.remote[4:], "-deliver", "upload"], 2, "-deliver upload: there is nothing to upload"),
        ([*up, "-manifest", write("m.json", "{}"), "-algo-path", ""], 2, "-deliver upload: there is no algorithm to upload"),
    ]
    for args, status, pattern in rows:
        r = run(f"mistake {pattern}", args)
        same(f"mistake {pattern}: status", r.status, status)
        has(f"mistake {pattern}", r.err, "^cvms: " + pattern)


# ---- Keys ----

def pair(kind):
    """(private, public, other): two PEM files of a kind, as openssl makes them, and the public half of another one."""
    folder = temp()
    made = {"rsa": "genrsa -traditional -out k {}", "rsa8": "genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:{} -out k",
            "ec": "ecparam -name {} -genkey -noout -out k", "ec8": "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:{} -out k",
            "ed": "genpkey -algorithm ed25519 -out k"}[kind.split()[0]].format(kind.split()[-1])
    shell(f"openssl {made}; openssl pkey -in k -pubout -out p; openssl ecparam -name prime256v1 -genkey -noout | "
          "openssl pkey -pubout -out o", folder)
    return [os.path.join(folder, n) for n in "kpo"]


KINDS = ["rsa 2048", "rsa8 3072", "rsa 4096", "ec prime256v1", "ec secp384r1", "ec secp521r1", "ec8 P-256", "ec8 P-521"]


def key_row(kind):
    """Go takes the signature, and so does openssl; the manifest has the public half as openssl writes it."""
    private, public, _ = pair(kind)
    der = shell(f"openssl pkey -pubin -in {public} -outform DER")
    with Agent() as go, Run(f"key {kind}", "-private-key-path", private, go=go, until=None) as r:
        r.connect().accept()
        need(go.saw("algo .*$"), f"no algorithm: {r.server.err.text()}")
        same(f"key {kind}: the public half", first(first(r.manifest, 5), 2), der)
        same(f"key {kind}: the consumer's", first(first(r.manifest, 6), 1), der)
        signature = base64.b64decode(re.search(r"signature=(\S+)", go.out.text()).group(1))
        path = write("signature", signature)
        shell(f"printf algorithm-provider | openssl dgst -sha256 -verify {public} -signature {path}")
        check(f"key {kind}: openssl verifies", True)


def test_keys():
    for kind in KINDS:
        key_row(kind)


def test_key_mistakes():
    base = [*basic(W.data), "-deliver", "upload"]
    private, public, other = pair("ec prime256v1")
    rows = [
        ([*base, "-private-key-path", private, "-public-key-path", other],
         "-private-key-path: .* is not the other half of the public key that the manifest has for the algorithm algo.py"),
        ([*base, "-private-key-path", private, "-public-key-path", other],
         "-private-key-path: .* is not the other half of the public key that the manifest has for the dataset data.csv"),
        ([*base, "-private-key-path", private, "-algo-public-key-path", other], "manifest has for the algorithm algo.py"),
        ([*base, "-private-key-path", private, "-dataset-public-key-paths", other], "manifest has for the dataset data.csv"),
        ([*base, "-private-key-path", private, "-result-consumer-keys", other, "-results", temp() + "/out"],
         "manifest has for the results"),
        ([*base, "-private-key-path", pair("ed")[0]], "is an Ed25519 key, .* a key pair is made for the run; openssl ecparam"),
        ([*base, "-private-key-path", public], "not a private key"),
        ([*base, "-private-key-path", "/no/such"], "-private-key-path.*No such file"),
        ([*base, "-private-key-path", pair("rsa 1024")[0]], "the RSA key has 1024 bits"),
    ]
    for args, pattern in rows:
        r = run(f"key mistake {pattern}", args)
        same(f"key mistake {pattern}: status", r.status, 1)
        has(f"key mistake {pattern}", r.err, "^cvms: .*" + pattern)
    with Server("keys: several consumers", *base, "-private-key-path", private, "-result-consumer-keys", f"{other},{public}",
                "-results", temp() + "/out", base=[]):
        pass


# ---- Uploads of every kind ----

def test_sizes():
    for n in (0, 1, MIB - 1, MIB, MIB + 1, 3 * MIB + 12345):
        data = os.urandom(n)
        with Agent() as go, Run(f"size {n}", go=go, base=basic(write("d.bin", data)), until="running") as r:
            r.connect().accept()
            need(go.saw("data"), f"no dataset of {n}")
            pieces = max(1, -(-n // MIB))
            has(f"size {n}", go.out.text(), rf"data {n} {sha3(data)} messages={pieces} longest={min(n, MIB)} ", 'name="d.bin"')
            r.forwarder.events("Running/Starting")
            r.server.ended(0, "running reached")


def test_empty_algorithm():
    with Agent() as go, Run("empty algorithm", go=go, base=basic(algo=write("a.py", b"")), until="running") as r:
        r.connect().accept()
        check("empty algorithm: uploaded", go.saw(f"algo 0 {sha3(b'')} messages=1"), go.out.text())


def test_large_in_little_memory():
    """100 MiB: the server grows by a few pieces, not by the file."""
    data = os.urandom(100 * MIB)
    with Agent() as go, Run("large", go=go, base=basic(write("large.bin", data)), until=None, program=FAST) as r:
        r.connect().accept()
        need(go.saw("data"), "no dataset")
        has("large: 100 MiB", go.out.text(), f"data {len(data)} {sha3(data)} messages=100 ")
        check("large: memory", r.server.memory("VmHWM") < 8 * MIB, r.server.memory("VmHWM"), "under 8 MiB")


def test_folder():
    """A folder goes as the zip whose hash is in the manifest."""
    folder = temp()
    for name, data in (("b/c.txt", b"c" * 100000), ("a.csv", b"1,2"), ("empty", b"")):
        write(os.path.join(folder, name), data)
    with Agent() as go, Run("folder", go=go, base=basic(folder), until=None) as r:
        r.connect().accept()
        need(go.saw("data .*$"), "no dataset")
        has("folder", go.out.text(), rf"data \d+ {first(first(r.manifest, 4), 1).hex()} ", f'name="{os.path.basename(folder)}"')


def test_own_address():
    """Without -agent-address: the address that the agent's stream comes from, port 7002."""
    real, own = harness.connect, "127.77.7.2"
    with Agent(own + ":7002") as go, Server("own address", "-deliver", "upload", base=basic()) as s:
        harness.connect = lambda a: socket.create_connection(a.rsplit(":", 1), LIMIT, source_address=(own, 0)) \
            if a == s.address else real(a)
        try:
            a = s.agent()
        finally:
            harness.connect = real
        go.keys(a.manifest())
        a.send(ACCEPTED)
        check("own address: uploaded", go.saw("algo"), s.err.text(), "an upload")
        check("own address: told", s.err.until(f"uploading the algorithm algo.py to {own}:7002"), s.err.text())


def test_requirements():
    extra = write("requirements.txt", b"numpy==2\n" * 200000)
    with Agent() as go, Run("requirements", "-algo-requirements", extra, "-python-runtime", "python3.12", go=go, until=None) as r:
        r.connect().accept()
        need(go.saw("algo"), "no algorithm")
        has("requirements", go.out.text(), rf"algo {os.path.getsize(W.algo)} {sha3(read(W.algo))} ", f"requirements={len(read(extra))} {sha3(read(extra))} ",
            r'runtime=\["python3.12"\]')


def test_decompress_and_two_datasets():
    first_, second = write("a.csv", b"a"), write("b.csv", b"b")
    with Agent() as go, Run("two datasets", "-dataset-decompress", "false,true", go=go, base=basic(first_, second), until=None) as r:
        r.connect().accept()
        need(go.saw("data", 2), "not both")
        has("two datasets: first", go.out.text(), 'name="a.csv" decompress=\\["false"\\]')
        has("two datasets: second", go.out.text(), 'name="b.csv" decompress=\\["true"\\]')


# ---- Refusals and agents that behave badly ----

def test_refused():
    for call, what in (("algo", "algorithm"), ("data", "dataset"), ("result", "results")):
        with Agent() as go, Run(f"refused {what}", "-results", os.path.join(temp(), "r.zip"), go=go, base=basic(W.data)) as r:
            go.tell(f"mode {call} refuse signature verification failed: 100% \u00e4")
            r.connect().accept()
            if call == "result":
                r.results()
            r.said(f"the agent refused the {what}: signature verification failed: 100% \u00e4")
            r.server.ended(3, f"the agent refused the {what}: signature verification failed")


def test_refused_without_words():
    with Agent() as go, Run("no words", go=go) as r:
        go.tell("mode algo refuse")
        r.connect().accept()
        r.server.ended(3, "the agent refused the algorithm: UNKNOWN")


def test_words_made_safe():
    """What an agent says by a status reaches a terminal escaped, in the log and in the summary."""
    with Agent() as go, Run("safe words", go=go) as r:
        go.tell("mode algo refuse a\x1b[31mb")
        r.connect().accept()
        err = r.server.ended(3, r"refused the algorithm: a\\x1b\[31mb")
        hasnot("safe words", err, "\x1b")


def test_wrong_key():
    """The service knows another key than that of the run: it is the signature that is refused."""
    other = shell("openssl ecparam -name prime256v1 -genkey -noout | openssl pkey -pubout -outform DER | base64 -w0").decode()
    with Agent() as go, Run("wrong key", go=go) as r:
        r.connect()
        go.tell("key " + other)
        r.accept()
        r.server.ended(3, "the agent refused the algorithm: signature verification failed")


def test_early():
    with Agent() as go, Run("early", go=go, base=basic(algo=write("a.py", os.urandom(3 * MIB)))) as r:
        go.tell("mode algo early")
        r.connect().accept()
        r.server.ended(3, "the agent ended the upload of the algorithm before it had all of it")


def test_not_yet():
    """An agent that is not there yet is asked where it stands, and gets its algorithm then."""
    with Agent() as go, Run("not yet", go=go, until="running") as r:
        go.tell("mode algo busy 2")
        r.connect().accept()
        for i in range(2):
            need(r.agent.asked(4, i + 1) is not None, "the agent is not asked")
            r.agent.send(state("ReceivingAlgorithm"))
        need(go.saw("algo"), "no algorithm")
        r.forwarder.events("Running/Starting")
        r.server.ended(0, "running reached")


def test_deaf():
    with Agent() as go, Run("deaf", "-timeout", "3s", go=go, base=basic(write("d.bin", os.urandom(MIB)))) as r:
        go.tell("mode data deaf")
        r.connect().accept()
        err = r.server.ended(4, f"the dataset d.bin stood at 1048576 bytes on its way to {go.address}")
        hasnot("deaf: its end is no failure of the agent's", err, "smoke test is over|failed:")


def test_progress():
    """A transfer of over a second is shown on a terminal, in one line that redraws itself and that lines of the log erase."""
    master, slave = pty.openpty()
    with Agent() as go:
        go.tell("mode data deaf")
        command = [W.cvms, *basic(write("d\x1b.bin", bytes(3 * MIB))), "-deliver", "upload", "-agent-address", go.address]
        p = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=slave, env=harness.environment())
        os.close(slave)
        shown = Collector(master)
        shown.until(r"listening at \S+ ")
        s = harness.Stream(re.search(r"listening at (\S+) ", shown.text()).group(1))
        s.send(harness.ATTESTATION)
        go.keys(s.manifest())
        s.send(ACCEPTED)
        line = r"cvms: 127\.0\.0\.1: dataset d\\x1b\.bin, 1 of 3 MB, \d\.\d{3} s, \d\.\d MB/s "
        check("progress: shown, and again", shown.until(rf"\r{line} *\r{line}"), shown.text())
        p.send_signal(15)
        same("progress: status", p.wait(LIMIT), 0)
        shown.thread.join(LIMIT)
        check("progress: erased before a line", re.search(rf"\r{line} *\r {{50,}}\r\d\S+ +cvms +server +signal 15", shown.text()), repr(shown.text()))
        s.close()
        os.close(master)


def forwarder(drop, to):
    """The address of a port that takes connections and ends them, so many; the others are joined to `to`, as one of a virtual machine."""
    def join(a, b):
        while data := a.recv(65536):
            b.sendall(data)
        b.shutdown(socket.SHUT_WR)

    def serve():
        for i in range(100):
            s, _ = listener.accept()
            if i < drop:
                s.close()
                continue
            other = harness.connect(to)
            for pair_ in ((s, other), (other, s)):
                threading.Thread(target=join, args=pair_, daemon=True).start()
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, daemon=True).start()
    return "127.0.0.1:%d" % listener.getsockname()[1]


def test_unreachable():
    for name, where, why in (("shut", "127.0.0.1:1", "Connection refused"), ("forwarded", forwarder(100, None), "(the server closed|Connection reset)[^;]*")):
        with Run(name, "-agent-address", where, "-timeout", "4s") as r:
            a, _ = r.server.both()
            a.send(ACCEPTED)
            r.said(f"its service at {where} can't be reached: {why}; .* -agent-address .*; trying on")
            r.server.ended(4, f"{where} can't be reached", "-agent-address HOST:PORT")


def test_forwarded_port_opens_late():
    """A forwarder takes connections before the agent does: they are tried again, without a word of the agent."""
    with Agent() as go, Run("forwarded late", "-agent-address", forwarder(2, go.address), until="running") as r:
        r.go = go
        r.connect().accept()
        need(go.saw("algo"), r.server.err.text())
        r.forwarder.events("Running/Starting")
        r.server.ended(0, "running reached")
        same("forwarded late: told once", len(re.findall("uploading the algorithm", r.server.err.text())), 1)
        hasnot("forwarded late: no upload broke off", r.server.err.text(), "broke off")


def test_delivered_for_nothing():
    """A time-out of an agent that has all, but does not go on: it is not said to lack it."""
    with Agent() as go, Run("for nothing", "-timeout", "2s", go=go) as r:
        r.connect().accept()
        r.server.ended(4, "; the delivery of the algorithm is complete, but no event or state Running has come")
    with Agent() as go, Run("for nothing, results", "-timeout", "2s", "-results", os.path.join(temp(), "out"), go=go) as r:
        r.connect().accept().results()
        r.server.ended(4, "; the delivery of the results is complete, but no event Complete/Completed has come")


def test_port_opens_late():
    with Agent() as probe:
        where = probe.address
    with Run("late", "-agent-address", where, until="running") as r:
        a, f = r.server.both()
        a.send(ACCEPTED)
        with Agent(where) as go:
            go.keys(a.manifest())
            need(go.saw("algo"), "no algorithm")
            f.events("Running/Starting")
            r.server.ended(0, "running reached")


# ---- Lost and back ----

def test_broken_upload():
    """The connection ends in the middle: the agent is asked, and the upload begins anew."""
    data = os.urandom(5 * MIB)
    with Agent() as go, Run("broken", go=go, base=basic(write("d.bin", data)), until="running") as r:
        go.tell(f"mode data drop {2 * MIB}")
        r.connect().accept()
        r.said(r"the upload of d.bin to \S+ broke off after")
        need(r.agent.asked(4) is not None, "the agent is not asked")
        r.agent.send(state("ReceivingData"))
        need(go.saw("data"), "no second upload")
        has("broken: whole in the end", go.out.text(), f"data {len(data)} {sha3(data)} ")
        same("broken: the algorithm is not sent again", len(re.findall("^algo", go.out.text(), re.M)), 1)
        r.forwarder.events("Running/Starting")
        r.server.ended(0, "running reached")


def test_agent_back():
    """Its own stream ends in the middle of an upload, too; back, it says where it stands, and all goes on from there."""
    data = os.urandom(3 * MIB)
    with Agent() as go, Run("back", go=go, base=basic(write("d.bin", data)), until="running") as r:
        go.tell(f"mode data drop {2 * MIB}")
        r.connect().accept()
        need(go.saw("dropped"), "the upload went through")
        r.agent.close()
        again = r.server.agent()
        need(again.asked(4) is not None, "it is not asked when it is back")
        again.send(state("ReceivingData"))
        need(go.saw("data"), "no second upload")
        has("back: whole in the end", go.out.text(), f"data {len(data)} {sha3(data)} ")
        r.forwarder.events("Running/Starting")
        r.server.ended(0, "running reached")


def test_call_lost_without_a_word():
    """An agent that is back in the middle of an upload, whose connection says nothing: it is asked there with a PING."""
    with socket.create_server(("127.0.0.1", 0)) as service, \
            Run("no word", "-agent-address", "127.0.0.1:%d" % service.getsockname()[1], until=None) as r:
        agent, _ = r.server.both()
        agent.send(ACCEPTED)
        s, _ = service.accept()
        s.settimeout(LIMIT)
        s.sendall(harness.frame(harness.SETTINGS, 0, 0))
        r.said("uploading the algorithm")
        data, again = b"", False
        while not any(kind == harness.PING for kind, *_ in harness.frames_of(data[24:])[0]):
            piece = s.recv(65536)
            need(piece, "the connection ended")
            data += piece
            if not again and any(kind == harness.DATA for kind, *_ in harness.frames_of(data[24:])[0]):
                agent.close()
                again = r.server.agent()
        check("no word: a PING comes", True)
        s.close()


def test_taken_meanwhile():
    """An upload whose answer was lost, but which the agent has: it is not sent again."""
    with Agent() as go, Run("taken", go=go, base=basic(write("d.bin", os.urandom(2 * MIB))), until="running") as r:
        go.tell(f"mode data drop {2 * MIB}")
        r.connect().accept()
        need(r.agent.asked(4) is not None, "it is not asked")
        r.agent.send(state("Running"))
        r.said("the agent has the dataset d.bin already")
        r.server.ended(0, "running reached")


def test_new_run():
    """Agent after agent without -until: the second run of a host gets all again, and its results a name of their own."""
    out = os.path.join(temp(), "out.zip")
    with Agent() as go, Run("again", "-results", out, go=go, until=None) as r:
        for i in (1, 2):
            go.tell(f"results {i * 100} 7")
            r.connect().accept()
            need(go.saw("algo", i), f"no algorithm {i}")
            r.results()
            r.said("results in", i)
            r.agent.close()
            r.forwarder.close()
        same("again: first", read(out), counting(100))
        same("again: second", read(out.replace(".zip", "-2.zip")), counting(200))


def test_changed():
    algo = write("a.py", b"one")
    with Agent() as go, Run("changed", go=go, base=basic(algo=algo)) as r:
        r.connect()
        write(algo, b"another")
        r.accept()
        r.server.ended(3, f"{algo} has changed since its hash was sent to the agent, so it is not uploaded")
        hasnot("changed: not uploaded", go.out.text(), "^algo")


def test_changed_for_one():
    """A second agent gets the new hash and the new bytes; the first one, which has the old hash, gets none."""
    algo = write("a.py", b"one")
    with Agent() as go, Run("changed for one", go=go, base=basic(algo=algo), until=None) as r:
        r.connect("old")
        write(algo, b"another")
        new = r.server.agent("new")
        new.manifest()
        r.agent.send(ACCEPTED)
        r.said("old a.py has changed|old .*a.py has changed since")
        new.send(ACCEPTED)
        need(go.saw("algo"), "no algorithm")
        has("changed for one: the new bytes", go.out.text(), f"algo 7 {sha3(b'another')} ")


# ---- Results ----

def test_results_in_bytes():
    out = os.path.join(temp(), "out")
    with Agent() as go, Run("bytes", "-results", out, go=go) as r:
        go.tell("results 5000 1")
        r.to_the_end(0, "complete reached")
        same("bytes: results", read(out), counting(5000))


def test_results_in_one_message():
    """-max-message holds for what an agent sends as well; what does not fit is no refusal of the agent's."""
    out = os.path.join(temp(), "out")
    for more, status, words in ((["-max-message", "5000010"], 0, "complete"), ([], 3, r"the results can't be taken: .* larger than max \(5000005 vs. 4194304\)")):
        with Agent() as go, Run("one message", "-results", out, *more, go=go) as r:
            go.tell("results 5000000 5000000")
            r.to_the_end(status, words)
    same("one message: its name is free", os.listdir(os.path.dirname(out)), ["out"])


def test_results_behind_a_link():
    """A link stays one; what is called FILE.part, and is no file, is left alone."""
    folder = temp()
    for name, target in (("out", write(folder + "/real")), ("bad.part", "elsewhere")):
        os.symlink(target, f"{folder}/{name}")
    for name, status, words in (("out", 0, "complete"), ("bad", 3, "-results: .*bad.part: File exists")):
        with Agent() as go, Run(f"link {name}", "-results", f"{folder}/{name}", go=go) as r:
            r.to_the_end(status, words)
    same("link: what is there", sorted((x, os.path.islink(f"{folder}/{x}")) for x in os.listdir(folder)), [("bad.part", True), ("out", True), ("real", False)])
    with open(folder + "/log", "wb") as log:
        r = run("results to stdout, a file", [*basic(), "-deliver", "upload", "-results", "/dev/stdout"], stdout=log)
    same("results to stdout, a file: status", r.status, 2)
    has("results to stdout, a file", r.err, "/dev/stdout. is not a regular file of its own")


def test_results_of_another_size():
    for more, words in ((-1, "the results end after 999 bytes of 1000"), (1, "the results go on after the 1000 bytes that they should have")):
        folder = temp()
        with Agent() as go, Run(f"size {more:+}", "-results", folder + "/out", go=go) as r:
            go.tell(f"mode result more {more}")
            r.to_the_end(3, words)
            same(f"size {more:+}: nothing is left", os.listdir(folder), [])


def test_never_accepted():
    """The agent says where it stands, but never that it has the manifest: a time-out, and in the report nothing is there."""
    report = os.path.join(temp(), "r.json")
    with Agent() as go, Run("never accepted", "-results", os.path.join(temp(), "out"), "-timeout", "2s", "-report", report, go=go) as r:
        r.connect()
        r.forwarder.events("ReceivingAlgorithm/InProgress")
        r.server.ended(4, "stood at connected")
        same("never accepted: the report", [(x["what"], x["done"]) for x in json.loads(read(report))["agents"][0]["deliveries"]],
             [("algorithm", False), ("results", False)])


def test_results_endless():
    folder = temp()
    limit = "import resource, signal, os, sys; signal.signal(signal.SIGXFSZ, signal.SIG_DFL); " \
            "resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, 5 << 20)); os.execv(sys.argv[1], sys.argv[1:])"
    with Agent() as go:
        command = [sys.executable, "-c", limit, W.cvms, *basic(), "-deliver", "upload", "-agent-address", go.address, "-results",
                   folder + "/out", "-until", "complete", "-timeout", "60s"]
        with Server("endless", command=command) as s:
            go.tell("results -1 100000")
            a, f = s.both()
            go.keys(a.manifest())
            a.send(ACCEPTED)
            need(go.saw("algo"), "no algorithm")
            f.events(*DONE)
            s.ended(3, "-results: .*out.part: File too large after 5200000 bytes")
            same("endless: nothing is left", os.listdir(folder), [])


def test_results_broken():
    """Results that break off are fetched again, from the agent that still has them."""
    out = os.path.join(temp(), "out")
    with Agent() as go, Run("broken results", "-results", out, go=go) as r:
        go.tell(f"results {4 * MIB} 1000000")
        go.tell("mode result drop 2000000")
        r.connect().accept()
        need(go.saw("algo"), "no algorithm")
        r.results()
        need(r.agent.asked(4) is not None, "it is not asked")
        r.agent.send(state("ConsumingResults"))
        r.said("results in")
        r.forwarder.events("Complete/Completed")
        r.server.ended(0, "complete reached")
        same("broken results", read(out), counting(4 * MIB))


def test_complete_too_early():
    """Complete/Completed comes on another connection than the results: the verdict waits for them."""
    out = os.path.join(temp(), "out")
    with Agent() as go, Run("complete early", "-results", out, go=go) as r:
        go.tell("mode result busy 1")
        r.connect().accept()
        need(go.saw("algo"), "no algorithm")
        r.results()
        need(r.agent.asked(4) is not None, "it is not asked")
        r.forwarder.events("Complete/Completed")
        check("complete early: goes on", r.agent.alive(), r.server.err.text(), "a server that goes on")
        r.agent.send(state("ConsumingResults"))
        r.server.ended(0, "complete reached")
        same("complete early: the results", read(out), counting(1000))


def test_back_without_events():
    """An agent that went while nothing was under way is asked when it is back, long before the next poll."""
    out = os.path.join(temp(), "out")
    with Agent() as go, Run("back, no events", "-results", out, "-poll", "1h", go=go) as r:
        r.connect().accept()
        r.said("algorithm algo.py is uploaded")
        r.agent.close()
        r.forwarder.close()
        again = r.server.agent()
        need(again.asked(4) is not None, "it is not asked when it is back")
        again.send(state("ConsumingResults"))
        r.said("results in")
        need(again.asked(4, 2) is not None, "it is not asked at the end")
        again.send(state("Complete"))
        r.server.ended(0, "complete reached")


def test_no_forwarder():
    """No events: the agent is asked, again and again."""
    out = os.path.join(temp(), "out")
    with Agent() as go, Run("no forwarder", "-results", out, "-poll", "100ms", go=go, base=basic(W.data)) as r:
        r.agent = r.server.agent()
        go.keys(r.agent.manifest())
        r.agent.send(ACCEPTED)
        need(go.saw("data"), "no dataset")
        for i, s in enumerate(["Running", "ConsumingResults"]):
            need(r.agent.asked(4, i + 1) is not None, "not asked")
            r.agent.send(state(s))
        r.said("results in")
        asked = len([m for m in r.agent.messages if fields(m)[0][0] == 4])
        need(r.agent.asked(4, asked + 1) is not None, "not asked at the end")
        r.agent.send(state("Complete"))
        r.server.ended(0, "complete reached")


# ---- Several agents ----

def test_four_agents():
    """Each gets its uploads, and its results a file of its own."""
    folder = temp()
    with Agent() as go, Run("four", "-results", folder + "/out.zip", go=go, until=None) as r:
        pairs = [r.server.both(job) for job in ("vm7", "vm/8", "vm:8", "\u202e" * 60)]
        go.keys(pairs[0][0].manifest())
        for a, _ in pairs:
            a.send(ACCEPTED)
        need(go.saw("algo", 4), "not all")
        for _, f in pairs:
            f.events(*DONE)
        r.said("results in", 4)
        same("four: names", sorted(os.listdir(folder)), [f"out-{(chr(92) + 'u202e') * 16 + chr(92)}u20.zip", "out-vm7.zip", "out-vm_8-2.zip", "out-vm_8.zip"])


def test_two_of_which_one_refuses():
    with Agent() as go, Run("one refuses", go=go, until=None) as r:
        go.tell("mode algo busy 0")
        a, _ = r.server.both("good")
        go.keys(a.manifest())
        b, _ = r.server.both("bad")
        a.send(ACCEPTED)
        need(go.saw("algo"), "no algorithm")
        go.tell("mode algo refuse no")
        b.send(ACCEPTED)
        r.said("bad +delivery +the agent refused the algorithm: no")
        hasnot("one refuses: the other's upload stands", r.server.err.text(), "good +delivery +the agent refused")


# ---- `cvms agent` as the agent ----

def stand_in(server, *args, **kw):
    """`cvms agent`, which takes uploads at a port that it finds; .err is what it says."""
    command = [kw.pop("program", W.cvms), "agent", "-agent-port", "0", *args, server.address]
    agent = Server(f"{server.name}: agent", wait=False, base=[], command=command, **kw)
    agent.verdict = True                    # its status says more than that it ended
    return agent


def played(server, agent, status, agent_status, *patterns, word=None):
    """Both end by themselves; the server's verdict."""
    err = server.ended(status, *patterns, word=word)
    check(f"{server.name}: the agent's status", agent.wait() == agent_status, agent.err.text(), agent_status)
    return err


def test_stand_in():
    """Kinds of keys, whose signatures it verifies; requirements, a folder, a dataset longer than a piece."""
    folder, big, extra = temp(), write("big.bin", os.urandom(2 * MIB + 1)), write("requirements.txt", b"numpy")
    write(os.path.join(folder, "a.csv"), b"1,2")
    for kind in (None, "rsa 2048", "ec secp384r1", "ec8 P-521"):
        name, out = f"stand-in, {kind}", os.path.join(temp(), "out.zip")
        key = ["-private-key-path", pair(kind)[0]] if kind else []
        with Run(name, "-results", out, "-algo-requirements", extra, *key, base=basic(W.data, folder, *[] if kind else [big])) as r, \
                stand_in(r.server, "-job-id", "vm") as a:
            played(r.server, a, 0, 0, "complete reached")
            with zipfile.ZipFile(out.replace(".zip", "-vm.zip")) as z:
                same(f"{name}: the results are a zip", (z.testzip(), z.namelist()), (None, ["results.txt"]))
            same(f"{name}: events", re.findall(r"EVENT +(\S+)", r.server.out.text()), [
                "ReceivingAlgorithm/InProgress", "ReceivingData/InProgress", "Running/Starting", "Running/InProgress",
                "AlgorithmRun/Warning", "Running/Completed", "ConsumingResults/Ready", "Complete/Completed"])
            hasnot(f"{name}: signatures are checked", a.err.text(), "not checked")


def test_stand_in_by_itself():
    """Without a flag it waits for a server that uploads, at port 7002; a port that is taken is told, before it connects if it can."""
    out = os.path.join(temp(), "out.zip")
    with Run("by itself", "-results", out, base=basic(W.data)) as r:
        same("by itself: agent", r.server.stand_in().status, 0)
        r.server.ended(0, "complete reached")
        has("by itself: where", r.server.err.text(), r"fetching the results from 127\.0\.0\.1:7002")
    with Run("by itself, no results", base=basic(W.data), until="ready") as r:
        same("by itself, no results: agent", r.server.stand_in().status, 0)
        r.server.ended(0, "ready reached")
    with socket.create_server(("127.0.0.1", 7002)), Run("taken", until=None) as r:
        told = r.server.stand_in()
        same("taken: status", told.status, 1)
        has("taken", told.err, "can't take uploads at port 7002: Address already in use; -agent-port 0 takes any free one")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        told = run("taken, explicit", ["agent", "-agent-port", str(taken.getsockname()[1]), "-wait", "0s", "127.0.0.1:1"])
        same("taken, explicit: status", told.status, 1)
        has("taken, explicit", told.err, "can't take uploads at port .*Address already in use")
        hasnot("taken, explicit: before it connects", told.err, "can't connect")
    for args, pattern in ((["-agent-port", "65536"], '"65536" is not a port'), (["-agent-port", "x"], '"x" is not a port'),
                          (["-agent-port", "0", "-once"], "-agent-port: with -once"), (["-fail", "x"], "algorithm-hash")):
        told = run(f"stand-in {args}", ["agent", *args])
        same(f"stand-in {args}: status", told.status, 2)
        has(f"stand-in {args}", told.err, pattern)


def test_stand_in_refuses():
    """-fail HOW: each refusal in a real agent's words, and what comes of it."""
    wrong, key = "malformed data, hash does not match manifest", "signature verification failed"
    for how, what, words in (("algorithm-hash", "algorithm", wrong), ("algorithm-signature", "algorithm", key),
                             ("dataset-hash", "dataset", wrong), ("dataset-signature", "dataset", key),
                             ("results", "results", "all results have been consumed by declared consumers")):
        with Run(how, "-results", os.path.join(temp(), "r"), base=basic(W.data)) as r, stand_in(r.server, "-fail", how) as a:
            err = played(r.server, a, 3, 0, words)      # by the call's status, or by the log that comes with it
            has(f"{how}: the call", r.server.err.text(), f"the agent refused the {what}: {words}")
            check(f"{how}: nothing else", "complete 0" not in err, err)
            has(f"{how}: the agent", a.err.text(), f"refuses the {what}, as told: {words}")
    for state in ("ReceivingAlgorithm", "ReceivingData", "Running"):
        with Run(state, base=basic(W.data)) as r, stand_in(r.server, "-fail", state) as a:
            played(r.server, a, 3, 0, "Failed")


def test_stand_in_holds_to_the_manifest():
    """What does not fit is refused without -fail, and the agent's status tells."""
    wrong = ["-set", "datasets[0].hash=" + base64.b64encode(bytes(32)).decode()]
    for name, args, base, words in (
            ("wrong algorithm", ["-fault", "wrong-hash"], basic(W.data), "hash does not match manifest"),
            ("wrong dataset", wrong, basic(W.data), "hash does not match manifest"),
            ("empty dataset", [], basic(write("e", b"")), "dataset is required"),
            ("empty algorithm", [], basic(algo=write("e.py", b"")), "algorithm binary is required")):
        with Run(name, *args, base=base) as r, stand_in(r.server) as a:
            err = r.server.err.text()
            if "empty" in name:
                has(f"{name}: a warning", err, "warning: .* is empty: agents refuse an upload without a byte")
            played(r.server, a, 3, 1, words)


def test_service():
    """A server that does not upload: the stand-in waits for other users, and takes what a real agent would take."""
    private, public, _ = pair("rsa 2048")
    sign = lambda word: shell(f"printf {word} | openssl dgst -sha256 -sign {private} | base64 -w0").decode()
    as_ = {"Algo": "algorithm-provider", "Data": "data-provider", "Result": "consumer"}
    good = {m: [("user-id", word), ("signature", sign(word)), ("algo_type", "python")] for m, word in as_.items()}
    one, two = write("one.csv", b"1"), write("two.csv", b"2")
    base = [*basic(one, two), "-public-key-path", public, "-attested-tls-bool", "false"]
    data = lambda name, what: field(1, what) + field(2, name)
    with Server("service", base=base) as s, stand_in(s) as a:
        need(a.err.until("uploads are taken at localhost:") and s.out.until("ReceivingAlgorithm/InProgress"), a.err.text())
        where = "127.0.0.1:" + re.search(r"taken at localhost:(\d+)", a.err.text()).group(1)
        rows = [
            ("Algo", [field(1, read(W.algo))], [("user-id", as_["Algo"])], "16", b"invalid metadata"),
            ("Algo", [field(1, read(W.algo))], [("signature", "????")], "16", b"signature verification failed"),
            ("Algo", [field(1, read(W.algo))], good["Data"], "16", b"signature verification failed"),
            ("Data", [data("one.csv", b"1")], good["Data"], "2", b"agent not expecting this operation in the current state"),
            ("Algo", [field(1, b"x")], good["Algo"], "2", b"malformed data, hash does not match manifest"),
            ("Algo", [field(2, b"x")], good["Algo"], "2", b"algorithm binary is required"),
            ("Result", [b""], good["Result"], "2", b"computation results are not yet ready"),
            ("Algo", [field(2, b"numpy"), field(1, read(W.algo)[:9]), field(1, read(W.algo)[9:])], good["Algo"], "0", b""),
            ("Algo", [field(1, read(W.algo))], good["Algo"], "2", b"agent not expecting"),
            ("Data", [data("three.csv", b"3")], good["Data"], "2", b"dataset not declared in computation manifest"),
            ("Data", [data("three.csv", b"1")], good["Data"], "2", b"malformed data, filename does not match manifest"),
            ("Data", [data("one.csv", b"2")], good["Data"], "2", b"malformed data, hash does not match manifest"),
            ("Data", [data("two.csv", b"2")], good["Data"], "0", b""),
            ("Data", [data("two.csv", b"2")], good["Data"], "2", b"malformed data|not declared"),
            ("Data", [data("one.csv", b"1")], good["Data"], "0", b""),
            ("Result", [b""], good["Algo"], "16", b"signature verification failed"),
            ("Result", [b""], good["Result"], "0", b"results.txt"),
        ]
        for method, messages, metadata, status, words in rows:
            got = call(where, "/agent.AgentService/" + method, *messages, metadata=metadata)
            name = f"service: {method}, {status} {words.decode()}"
            check(name, re.search(rb"grpc-status[\x01\x02]" + status.encode(), got) and re.search(words, got), got, words)
        check("service: it ends", a.wait() == 1, a.err.text(), "status 1: it has refused something")
        s.err.until("stream ended", times=2)
        events = re.findall(r"EVENT +(\S+)", s.out.text())
        same("service: it goes on to its end", events[-1], "Complete/Completed")
        has("service: a refusal in the log", s.out.text(), "WARN +Method Algo took .* with error: malformed data, hash does not match")


def test_stand_ins_of_which_one_refuses():
    """Two on one machine, each at a port of its own."""
    folder = temp()
    with Run("one of two", "-agents", "2", "-results", folder + "/out.zip", base=basic(W.data)) as r, \
            stand_in(r.server, "-job-id", "good") as good:
        r.said("results in")
        with stand_in(r.server, "-job-id", "bad", "-fail", "dataset-signature") as bad:
            err = played(r.server, bad, 3, 0, "bad", "the agent refused the dataset: signature verification failed")
            same("one of two: the other", good.wait(), 0)
            check("one of two: the other in the summary", re.search(
                r"^cvms:   good: .*complete .*\n(cvms:     .*\n)*cvms:      results in \S+out-good.zip", err, re.M), err)
            same("one of two: files", os.listdir(folder), ["out-good.zip"])


def test_stand_in_lost_and_back():
    """It is killed in the middle of an upload; another one with its job-id gets everything."""
    big = os.path.join(temp(), "big")
    with open(big, "wb") as f:
        f.truncate(200 * MIB)
    with Run("killed", base=basic(big), until="ready", program=FAST) as r:
        with stand_in(r.server, "-job-id", "vm", program=FAST) as a:
            r.said("uploading the dataset")
            while int(re.search(r"rchar: (\d+)", read(f"/proc/{a.p.pid}/io").decode()).group(1)) < 2 * MIB:
                time.sleep(0.001)     # what it has read so far is no event
            a.stop(9)
            r.said(r"the upload of big to \S+ broke off")
        with stand_in(r.server, "-job-id", "vm", program=FAST) as a:
            r.server.ended(0, "ready reached")
            same("killed: the second one", len(re.findall("big is uploaded", r.server.err.text())), 1)


def test_stand_in_fetches():
    """The ways http and http-plain, mixed with uploads, in the clear and over TLS: a token, a key, a blob; each thing that can be wrong."""
    folder, big, tls = temp(), write("big.bin", os.urandom(MIB + 5)), temp()
    write(os.path.join(folder, "a.csv"), b"1,2")
    harness.self_signed("localhost", tls)
    secure = {"SERVER_CERT": tls + "/localhost.pem", "SERVER_KEY": tls + "/localhost.key", "HOST": "localhost"}
    ways = (("http", 4), ("http-plain", 0), ("http,upload", 1), ("upload,http", 3), ("http-plain,http", 3), ("upload", 0))
    for way, env, sealed in [(way, env, n) for way, n in ways for env in ({}, secure)]:
        name = f"fetches, {way}{', TLS' if env else ''}"
        with Server(name, *basic(W.data, folder, big), "-deliver", way, "-results", temp() + "/r", "-until", "complete",
                    "-timeout", "60s", base=[], env=env) as s:
            with stand_in(s, *(["-ca", tls + "/localhost.pem"] if env else [])) as a:
                err = played(s, a, 0, 0, "complete reached")
                same(f"{name}: keys", len(re.findall("fetched, \\d+ bytes, and its key", err)), sealed)
                n = (way.split(",")[0] != "upload") + 3 * (way.split(",")[-1] != "upload")
                same(f"{name}: fetched", len(re.findall("is fetched: \\d+ bytes with the manifest's hash", a.err.text())), n)
                if way == "http":
                    order = [line.split(": 200")[0].split(" http ")[1].split()[1:3] for line in s.out.text().splitlines() if " http " in line]
                    same(f"{name}: in a real agent's order", order[:3], [["algorithm", "algo.py"], ["GetToken"], ["key", "of"]])
    with Server("images", *basic(W.data), "-deliver", "oci-plain", "-results", temp() + "/r", "-until", "complete", "-timeout", "20s",
                base=[]) as s, stand_in(s) as a:
        played(s, a, 0, 0, "complete reached")
    broken = "cipher: message authentication failed"
    for fault, way, words in (
            ("not-found", "http-plain", "failed to download resource: HTTP status 404"), ("unavailable", "http", "HTTP status 503"),
            ("cut=5", "http-plain", "failed to download resource: the server has reset the stream"), ("flip-blob=20", "http", broken),
            ("flip-blob=20", "http-plain", "hash mismatch: expected [0-9a-f]{64}, got"), ("wrong-key", "http", broken),
            ("refuse-token", "http", "failed to retrieve decryption key from KBS: HTTP status 401"),
            ("wrong-hash", "http-plain", "hash mismatch")):
        name = f"fetches, {fault}, {way}"
        with Server(name, *basic(W.data), "-deliver", way, "-fault", fault, "-until", "ready", "-timeout", "60s", base=[]) as s, \
                stand_in(s) as a:
            err = played(s, a, 3, 1, "Failed/Failed")
            has(name, err, "ERROR +failed to download and decrypt algorithm: .*" + words)
    with socket.create_server(("127.0.0.1", 0)) as silent, \
            Server("fetches, silence", *basic(), "-deliver", "http-plain", "-set", "algorithm.source.url=http://127.0.0.1:%d/x" % silent.getsockname()[1],
                   "-until", "ready", "-timeout", "20s", base=[]) as s, stand_in(s, "-timeout", "1s") as a:
        c, _ = silent.accept()
        c.sendall(harness.frame(harness.SETTINGS, 0, 0))
        err = played(s, a, 3, 1, "Failed/Failed")
        has("fetches, silence", err, "failed to download resource: no answer in time")
        c.close()
    with Server("fetches, no zip", *basic(W.data), "-deliver", "http", "-dataset-decompress", "true", "-until", "ready", "-timeout",
                "20s", base=[]) as s, stand_in(s) as a:
        has("fetches, no zip", played(s, a, 3, 1, "Failed/Failed"), "decrypt dataset dataset_0.csv: failed to unzip")


def huge_upload():
    """10 GiB, sparse: by request, as it takes a minute."""
    big = os.path.join(temp(), "big")
    with open(big, "wb") as f:
        f.truncate(10 << 30)
    with Run("huge", base=basic(big), until=None, program=FAST, wait=False) as r:
        need(r.server.err.until("listening at", 300), "no server")
        r.server.address = re.search(r"listening at (\S+)", r.server.err.text()).group(1)
        with stand_in(r.server, program=FAST) as a:
            need(r.server.err.until("big is uploaded: 10737418240 bytes", 600), r.server.err.text())
            for p in (r.server, a):
                check(f"{p.name}: memory", p.memory("VmHWM") < 8 * MIB, p.memory("VmHWM"), "under 8 MiB")


if __name__ == "__main__":
    W.make(sys.argv[1])
    huge = [("huge_upload", huge_upload)] if "--large" in sys.argv else []
    sys.exit(harness.main(huge or named(globals()), jobs=2, skipped=4))
