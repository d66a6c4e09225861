#!/usr/bin/env python3
"""What agents fetch from the port, in plaintext and TLS: blobs, keys, tokens.  usage: test_remote.py CVMS FAST GRPCURL [-v] [NAME...]

FAST is the same program without sanitizers, whose memory is measured; GRPCURL may be missing, and the Go client beside it.  Python's cryptography
opens what is encrypted.  The last line is `N passed, M failed`.
"""
import contextlib
import hashlib
import http.client
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import time

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import harness  # noqa: E402
from harness import (  # noqa: E402
    ACCEPTED, LIMIT, Server, Skip, W, call, check, connect, fields, first, has, hasnot, named, need, read, run, same, self_signed, sha3,
    shell, temp, write)

FAST, GRPCURL = map(os.path.abspath, sys.argv[2:4])
CLIENT = os.path.join(os.path.dirname(GRPCURL), "client")
MIB = 1 << 20
TOKEN = "/attestation_agent.AttestationAgentService/GetToken"
ANSWER = re.compile(rb"HTTP/1\.1 (\d+) [^\r]*\r\n((?:[^\r]+\r\n)*)\r\n", re.S)


def folder():
    f = temp()
    write(os.path.join(f, "a"), b"a" * 100000)
    write(os.path.join(f, "b", "c"), b"c")
    return f


def tls(name="tls"):
    """Variables for a server with a certificate, and what trusts it."""
    where = temp()
    self_signed(name, where)
    pem = os.path.join(where, name)
    context = ssl.create_default_context(cafile=pem + ".pem")
    context.set_alpn_protocols(["http/1.1"])
    return {"SERVER_CERT": pem + ".pem", "SERVER_KEY": pem + ".key", "HOST": "localhost"}, context


class Remote(Server):
    """A server that agents fetch from; .algo, .data are what the manifest says: (url, key URL or None, hash, ...)."""
    def __init__(self, name, *args, deliver="http", data=None, algo=None, env=None, context=None, **kw):
        self.context, self.ca = context, (env or {}).get("SERVER_CERT")
        data = [W.data] if data is None else data
        base = ["-algo-path", algo or W.algo, "-algo-type", "python", *(["-data-paths", ",".join(data)] if data else [])]
        super().__init__(name, *(["-deliver", deliver] if deliver else []), *args, base=base, env=env, **kw)

    def manifest(self):
        """[(URL, key's URL, hash, message)] of the algorithm and the datasets, as an agent gets them."""
        wide = harness.frame(harness.SETTINGS, 0, 0, b"\0\4\1\0\0\0")
        with self.connect("h2") as s:
            s.sendall(harness.PREFACE + wide + harness.request(1) + harness.frame(0, 0, 1, b"\0\0\0\0\0"))
            data, whole, last = b"", b"", False
            while not last:
                data += s.recv(65536)
                body = b"".join(p for kind, _, _, p in harness.frames_of(data)[0] if kind == harness.DATA)
                whole = b""
                while len(body) >= 5 + int.from_bytes(body[1:5], "big") and len(body) >= 5:
                    n = 5 + int.from_bytes(body[1:5], "big")
                    chunk = first(body[5:n], 1)
                    whole, last, body = whole + first(chunk, 1), first(chunk, 3, 0), body[n:]
        return [self.source(first(whole, 5), 3, 1), *(self.source(d, 4, 1) for n, d in fields(whole) if n == 4)]

    @staticmethod
    def source(message, number, hashed):
        source, kbs = first(message, number), first(message, 6)
        path = first(source, 3).decode()
        return (first(source, 2).decode(), first(kbs, 1).decode() + "/kbs/v0/resource/" + path if path else None,
                first(message, hashed).hex(), message)

    def connect(self, alpn="http/1.1"):
        s = connect(self.address)
        if not self.context:
            return s
        context = ssl.create_default_context(cafile=self.ca)
        context.set_alpn_protocols([alpn])
        return context.wrap_socket(s, server_hostname="localhost")

    def http(self):
        host = self.address.rsplit(":", 1)[0]
        if self.context:
            return http.client.HTTPSConnection(host, self.port, timeout=LIMIT, context=self.context)
        return http.client.HTTPConnection(host, self.port, timeout=LIMIT)

    def get(self, url, method="GET", **headers):
        """(status, body, headers) by Python's client, on a connection of its own."""
        c = self.http()
        c.request(method, re.sub("^https?://[^/]+", "", url), headers={k.replace("_", "-"): v for k, v in headers.items()})
        r = c.getresponse()
        got = r.status, r.read(), r.headers
        c.close()
        return got

    def token(self):
        return first(grpc_message(call(self.address, TOKEN, b"\x0a\x03kbs")), 1).decode()

    def raw(self, data, end=True):
        """All that comes back for these bytes, to the connection's end."""
        with self.connect() as s:
            s.sendall(data)
            if end and not self.context:
                s.shutdown(socket.SHUT_WR)
            out = b""
            with contextlib.suppress(ConnectionError):
                while piece := s.recv(65536):
                    out += piece
            return out

    def said(self, pattern, times=1):
        return check(f"{self.name}: says {pattern}", self.out.until(pattern, times=times), self.out.text(), pattern)


def grpc_message(data):
    body = b"".join(p for kind, _, _, p in harness.frames_of(data)[0] if kind == harness.DATA)
    return body[5:]


def statuses(data):
    """The statuses of the answers in a row, each with a body of its Content-Length."""
    out = []
    while m := ANSWER.match(data):
        n = int(re.search(rb"content-length: (\d+)", m[2])[1])
        out.append(int(m[1]))
        data = data[m.end() + n:]
    return out + ([data] if data else [])


def opened(blob, key):
    return AESGCM(key).decrypt(blob[:12], blob[12:], None)


def ways():
    """(name, flags) of servers in plaintext and over TLS."""
    env, context = tls()
    return [("plaintext", {}), ("TLS", {"env": env, "context": context})]


# ---- A whole remote run ----

def test_whole_run():
    for how, kw in ways():
        f = folder()
        with Remote(f"whole, {how}", data=[W.data, f], **kw) as s:
            algo, data, tree = s.manifest()
            same(f"{how}: scheme", {u.split(":")[0] for u, *_ in (algo, data, tree)}, {"https" if how == "TLS" else "http"})
            same(f"{how}: encrypted", [first(first(m, n), 4, 0) for (*_, m), n in ((algo, 3), (data, 4))], [1, 1])
            same(f"{how}: decompress", [first(m, 5, 0) for *_, m in (data, tree)], [0, 1])
            same(f"{how}: filenames", [first(m, 3) for *_, m in (data, tree)], [b"dataset_0.csv", b"dataset_1.csv"])
            for (url, key_url, digest, _), path in ((algo, W.algo), (data, W.data), (tree, f)):
                hasnot(f"{how}: no path on disk in the URL", url, re.escape(os.path.basename(path)))
                status, blob, headers = s.get(url)
                _, key, _ = s.get(key_url)
                same(f"{how}: {url}", (status, len(key)), (200, 32))
                same(f"{how}: hash of the plaintext", sha3(opened(blob, key)), digest)
                same(f"{how}: the same bytes again", s.get(url)[1], blob)
                same(f"{how}: HEAD", (s.get(url, "HEAD")[0], s.get(url, "HEAD")[2]["Content-Length"]), (200, str(len(blob))))
            keys = {s.get(k)[1] for _, k, _, _ in (algo, data, tree)}
            same(f"{how}: one key for the run", len(keys), 1)
            same(f"{how}: a nonce for each", len({s.get(u)[1][:12] for u, *_ in (algo, data, tree)}), 3)


def test_plain():
    for how, kw in ways():
        f = folder()
        with Remote(f"plain, {how}", deliver="http-plain", data=[W.data, f], **kw) as s:
            for (url, key_url, digest, m), path in zip(s.manifest(), (W.algo, W.data, f)):
                status, body, _ = s.get(url)
                same(f"{how}: {path}", (status, sha3(body), key_url), (200, digest, None))
                same(f"{how}: a broker is enabled all the same", fields(first(m, 6))[1:], [(2, 1)])
            same(f"{how}: no broker answers", s.get("/kbs/v0/resource/cvms/key/algorithm")[0], 404)
            if not kw:
                has("no attestation agent", call(s.address, TOKEN, b"").decode("latin-1"), "unknown service")


def test_mixed():
    with Remote("upload and http", deliver="upload,http") as s:
        algo, data = s.manifest()
        same("the algorithm is uploaded, the dataset fetched", (algo[0], bool(data[0])), ("", True))
    with Remote("http and cli", deliver="http,cli") as s:
        algo, data = s.manifest()
        same("the algorithm is fetched, the dataset not", (bool(algo[0]), data[0]), (True, ""))


# ---- Keys and tokens ----

def test_tokens():
    with Remote("tokens") as s:
        url = s.manifest()[0][1]
        token = s.token()
        check("a token is not JSON", re.fullmatch(r"cvms-[0-9a-f]{32}", token), token)
        same("the same token again", s.token(), token)
        for given, status in ((f"Bearer {token}", 200), (f"bearer {token}", 200), (f"Bearer {token}x", 401), (f"Basic {token}", 401),
                              ("Bearer", 401), ("Bearer " + token[:-1], 401)):
            got, body, headers = s.get(url, Authorization=given)
            same(f"{given}", (got, headers.get("WWW-Authenticate")), (status, "Bearer" if status == 401 else None))
            same(f"{given}: one line", (len(body) == 32) if status == 200 else body.count(b"\n"), 1)
        for how in ("--http1.1", "--http2-prior-knowledge"):
            two = 2 * ["-H", f"Authorization: Bearer {token}"]
            p = subprocess.run(["curl", "-s", how, *two, "-o", "/dev/null", "-w", "%{http_code}", url], capture_output=True)
            same(f"{how}: two tokens", p.stdout, b"400")
        s.said(r"key of the algorithm algo.py: 401, \d+ bytes, .* with a wrong token$")
        same("no token is needed", s.get(url)[0], 200)
        s.said(r"key of the algorithm algo.py: 200, 32 bytes, 0\.\d+ s, without a token$")
        if os.path.exists(GRPCURL):
            listed = subprocess.run([GRPCURL, "-plaintext", s.address, "list"], capture_output=True, text=True).stdout
            has("reflection lists the attestation agent", listed, "^attestation_agent.AttestationAgentService$")
            answer = subprocess.run([GRPCURL, "-plaintext", s.address, "attestation_agent.AttestationAgentService/GetTeeType"],
                                    capture_output=True, text=True).stdout
            same("GetTeeType", json.loads(answer), {"tee": "sample"})
        has("other methods", call(s.address, TOKEN.replace("Token", "Evidence"), b"").decode("latin-1"), "unknown method")


def test_key_file():
    key = bytes(range(32))
    path = write("key", key, 0o600)
    for _ in range(2):
        with Remote("key file", "-deliver-key", path) as s:
            algo = s.manifest()[0]
            same("the file's key", s.get(algo[1])[1], key)
            same("it encrypts", opened(s.get(algo[0])[1], key), read(W.algo))
    hasnot("the key is not shown", s.out.text() + s.err.text(), key.hex())


# ---- What is changed, what is not there ----

def test_changed():
    path = write("data.csv", b"old\n")
    with Remote("changed", data=[path]) as s:
        algo, old = s.manifest()
        blob, key = s.get(old[0])[1], s.get(old[1])[1]
        write(path, b"new\n")
        same("a changed file", s.get(old[0])[0], 410)
        check("it is told", s.err.until(r"data.csv has changed since its hash was sent"), s.err.text())
        new = s.manifest()[1]
        need(new[2] == sha3(b"new\n"), new)
        check("another name", new[0] != old[0], new[0])
        same("the new one", opened(s.get(new[0])[1], key), b"new\n")
        check("another nonce", s.get(new[0])[1][:12] != blob[:12], "the same")
        same("the old name", s.get(old[0])[0], 410)
        os.unlink(path)
        same("a file that is gone", s.get(new[0])[0], 410)
        s.manifest()
        same("it is still gone after the next agent", s.get(new[0])[0], 410)


def test_paths():
    with Remote("paths") as s:
        url = re.sub("^http://[^/]+", "", s.manifest()[0][0])
        same("with a query", s.get(url + "?x=/../y")[0], 200)
        same("an absolute target", statuses(s.raw(b"GET http://any.example%s HTTP/1.1\r\nHost: y\r\n\r\n" % url.encode()))[0], 200)
        for path in ("/", "*", url + "/", url + "x", url[:-1], url.upper(), "/" + url, "/." + url, url.replace("blobs", "%62lobs"),
                     "/blobs/", "/blobs/../blobs/x", "/etc/passwd", "/../../etc/passwd", "//etc/passwd", "/%2e%2e/%2e%2e/etc/passwd",
                     "/kbs/v0/resource/", "/kbs/v0/resource/cvms/key/", "/kbs/v0/resource/cvms/key/algorithm/x", "/" + "a" * 7000,
                     W.algo, "/\xff"):
            got = s.raw(b"GET " + path.encode("latin-1") + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            wanted = 400 if path == "/\xff" else 404
            same(f"GET {path[:60]}", statuses(got), [wanted])
        for method, status in (("PUT", 405), ("DELETE", 405), ("OPTIONS", 405), ("POST", 415), ("TRACE", 405), ("GETX", 405)):
            got = s.raw(f"{method} {url} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            same(method, statuses(got), [status])
        s.said(r" http +GET +/etc/passwd: 404, \d+ bytes")


# ---- HTTP/1 ----

def test_pipelining():
    for how, kw in ways():
        with Remote(f"pipelining, {how}", deliver="http-plain", **kw) as s:
            path = re.sub("^https?://[^/]+", "", s.manifest()[1][0]).encode()
            one = b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n"
            last = b"HEAD / HTTP/1.0\r\n\r\n"
            with contextlib.suppress(AttributeError):
                got = s.raw(300 * one + last, end=False)
            answer = read(W.data)
            same(f"{how}: 300 requests in one go", (got.count(b"HTTP/1.1 200"), got.count(answer)), (300, 300))
            check(f"{how}: then the last", got.rstrip().endswith(b"connection: close"), got[-200:])


def test_pipeliners_that_do_not_read():
    """What they ask for waits in the kernel, not here."""
    for how, kw in ways():
        with Remote(f"deaf, {how}", deliver="http-plain", program=FAST, **kw) as s:
            url = s.manifest()[1][0]
            path = re.sub("^https?://[^/]+", "", url).encode()
            before, deaf = s.memory(), []
            for _ in range(100):
                c = s.connect()
                c.settimeout(0.05)
                with contextlib.suppress(TimeoutError):
                    while True:
                        c.send(100 * (b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n"))
                deaf.append(c)
            same(f"{how}: others are served", s.get(url)[0], 200)
            each = (s.memory() - before) / len(deaf) / 1024
            check(f"{how}: memory of each", each < (80 if kw else 24), f"{each:.0f} KiB")
            for c in deaf:
                c.close()


def test_http10():
    with Remote("1.0", deliver="http-plain") as s:
        path = re.sub("^http://[^/]+", "", s.manifest()[1][0]).encode()
        same("1.0 ends", statuses(s.raw(b"GET " + path + b" HTTP/1.0\r\n\r\n", end=False)), [200])
        got = s.raw(b"GET " + path + b" HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET " + path + b" HTTP/1.0\r\n\r\n", end=False)
        same("1.0 with keep-alive", statuses(got), [200, 200])


def test_smuggling():
    with Remote("smuggling", deliver="http-plain") as s:
        path = re.sub("^http://[^/]+", "", s.manifest()[1][0]).encode()
        inner = b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n"
        head = b"POST / HTTP/1.1\r\nHost: x\r\n"
        for name, lines in (("chunked", b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"), ("TE and CL", b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"),
                            ("TE, hidden", b"Transfer-Encoding : chunked\r\n\r\n"), ("TE, folded", b"Transfer-Encoding:\r\n chunked\r\n\r\n"),
                            ("TE, cow", b"Transfer-Encoding: cow\r\n\r\n"), ("two CL", b"Content-Length: 0\r\nContent-Length: %d\r\n\r\n" % len(inner)),
                            ("CL list", b"Content-Length: 0, 0\r\n\r\n"), ("CL sign", b"Content-Length: +0\r\n\r\n"), ("CL hex", b"Content-Length: 0x0\r\n\r\n"),
                            ("CL huge", b"Content-Length: 18446744073709551616\r\n\r\n"), ("bare LF", b"a: b\n\r\n"), ("bare CR", b"a: b\rc: d\r\n\r\n"),
                            ("NUL", b"a: \0\r\n\r\n"), ("no name", b": b\r\n\r\n"), ("LF LF", b"\n\n")):
            same(f"{name}: refused, and nothing behind it read", statuses(s.raw(head + lines + inner)), [400])
        same("a body is no request", statuses(s.raw(head + b"Content-Length: %d\r\n\r\n" % len(inner) + inner)), [415])


def test_slow_heads():
    with Remote("slow heads", deliver="http-plain") as s:
        before = s.memory()
        half = [connect(s.address) for _ in range(1000)]
        for i, c in enumerate(half):
            c.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * (i % 50))
        same("others are served beside 1,000 half-open requests", s.get(s.manifest()[1][0])[0], 200)
        check("they cost little", s.memory() - before < 64 * MIB, s.memory() - before)    # with a sanitizer's red zones
        drip = half.pop()
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - began < LIMIT:
                drip.sendall(b"z")
                drip.settimeout(0.5)
                with contextlib.suppress(TimeoutError):
                    if statuses(drip.recv(65536)) == [408]:
                        break
        took = time.monotonic() - began
        check("a dripping head ends in 10 s", took < 30, f"{took:.1f} s")
        got = half[0].recv(65536)
        same("half a head gets 408", statuses(got), [408])
        for c in half:
            c.close()


def test_hello_on_the_plain_port():
    with Remote("ClientHello", deliver="http-plain") as s, connect(s.address) as c:
        began = time.monotonic()
        with contextlib.suppress(ssl.SSLError, OSError):
            ssl.create_default_context().wrap_socket(c, server_hostname="localhost")
        check("it is closed at once", time.monotonic() - began < 8, "not closed")
        same("and served in the clear after it", s.get(s.manifest()[1][0])[0], 200)


# ---- Clients ----

def test_curl():
    for how, kw in ways():
        with Remote(f"curl, {how}", deliver="http", **kw) as s:
            url, key_url, digest, _ = s.manifest()[1]
            key = s.get(key_url)[1]
            ca = ["--cacert", kw["env"]["SERVER_CERT"]] if kw else []
            for flags in (["--http1.0"], ["--http1.1"], ["--http2"], ["--http2-prior-knowledge"], ["--http1.1", "-H", "Expect: 100-continue"]):
                p = subprocess.run(["curl", "-sS", "--max-time", "20", *ca, *flags, "-w", "%{stderr}%{http_code} %{http_version}", url],
                                   capture_output=True)
                version = {"--http1.0": b"1.0", "--http1.1": b"1.1", "--http2": b"2" if kw else b"1.1"}.get(flags[0], b"2")
                got = p.stderr.split()
                need(len(p.stdout) > 28, f"{how}: curl {flags}: {p}")
                same(f"{how}: curl {flags[0]}", (sha3(opened(p.stdout, key)), got[0]), (digest, b"200"))
                check(f"{how}: curl {flags[0]}: version", got[1] in (version, b"1.1" if version == b"1.0" else version), got)
            p = subprocess.run(["curl", "-sS", "--max-time", "20", *ca, "-o", "/dev/null", url, "-o", "/dev/null", key_url, "-w", "%{num_connects} "],
                               capture_output=True)
            same(f"{how}: one connection for two requests", p.stdout, b"1 0 ")


def test_http2_slow_reader():
    """A stream whose window is shut holds nobody up, and its connection not the others of its own."""
    big = write("big", os.urandom(3 * MIB))
    with Remote("slow reader", deliver="http-plain", data=[big]) as s:
        url, _, digest, _ = s.manifest()[1]
        path = re.sub("^http://[^/]+", "", url)
        head = b"".join(harness.literal(*f) for f in ((":method", "GET"), (":scheme", "http"), (":path", path)))
        with connect(s.address) as c:
            c.sendall(harness.PREFACE + b"".join(harness.frame(1, 5, i, head) for i in range(1, 200, 2)))
            data = b""
            while sum(len(p) for k, _, _, p in harness.frames_of(data)[0] if k == 0) < 65535:
                data += c.recv(65536)
            same("others are served", sha3(s.get(url)[1]), digest)
            same("no more than the window", sum(len(p) for k, _, _, p in harness.frames_of(data)[0] if k == 0), 65535)
            answers = [(i, f) for k, f, i, _ in harness.frames_of(data)[0] if k == 1]
            same("100 streams have their head", len(answers), 100)


def go_client(s, *args):
    if not os.path.exists(CLIENT):
        raise Skip("no Go client; run tests/install.sh")
    secure = ["-tls", "-ca", s.ca] if s.context else []
    return subprocess.Popen([CLIENT, "-addr", s.address, *secure, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_go():
    """net/http as it comes: in plaintext, over TLS without ALPN and with HTTP/2."""
    for how, kw in ways():
        with Remote(f"Go, {how}", **kw) as s:
            algo, data = s.manifest()
            paths = [re.sub("^https?://[^/]+", "", u) for u in (algo[0], data[0], data[1])]
            bodies = [hashlib.sha256(s.get(p)[1]).hexdigest() for p in paths]
            for tag, version in [("http1", "HTTP/1.1")] + ([("h2", "HTTP/2.0")] if kw else []):
                out, err = go_client(s, "-mode", "get", "-tag", tag, "-n", "10", "-per", "4", *paths).communicate()
                same(f"{how}: {tag}", (sorted(out.splitlines()), err), (sorted(f"{version} 200 {b} 10" for b in bodies), ""))


def test_load():
    """Many connections that fetch, while the messages of a gRPC stream come: nothing is lost."""
    for how, kw in ways():
        with Remote(f"load, {how}", deliver="http-plain", data=[write("data", os.urandom(100000))], program=FAST, **kw) as s:
            url, _, digest, _ = s.manifest()[1]
            logs = go_client(s, "-mode", "logs", "-n", "20000", "-tag", "load")
            gets = go_client(s, "-mode", "get", "-n", "2000", "-per", "200", re.sub("^https?://[^/]+", "", url))
            body = hashlib.sha256(s.get(url)[1]).hexdigest()
            same(f"{how}: fetches", (*gets.communicate(), gets.returncode), (f"HTTP/1.1 200 {body} 2000\n", "", 0))
            same(f"{how}: the stream", (*logs.communicate(), logs.returncode), ("", "", 0))
            s.stop()
            seen = re.findall(r" load-(\d+);", s.out.text())
            same(f"{how}: messages", seen, [str(i) for i in range(20000)])
            same(f"{how}: lines of fetches", len(re.findall("GET +dataset data: 200, 100000 bytes", s.out.text())), 2001)


def test_large(gib=1, part=256 * MIB):
    """8 readers of a sparse file, in constant memory."""
    path = os.path.join(temp(), "sparse")
    with open(path, "wb") as f:
        f.truncate(gib << 30)
    with Remote("large", deliver="http", data=[path], program=FAST, wait=False) as s:
        need(s.err.until("listening at", 600), "it does not start")
        s.address = re.search(r"listening at (\S+)", s.err.text()).group(1)
        s.port = int(s.address.rsplit(":", 1)[1])
        url, *_ = s.manifest()[1]
        readers = [subprocess.Popen(f"curl -sS {how} {url} 2>/dev/null | head -c {part} | sha256sum", shell=True, stdout=subprocess.PIPE)
                   for how in 4 * ("--http1.1", "--http2-prior-knowledge")]
        sums = {r.communicate()[0] for r in readers}
        same("all get the same", len(sums), 1)
        check("under 16 MiB", s.memory("VmHWM") < 16 * MIB, s.memory("VmHWM"))


def test_larger_than_memory():
    """A stand-in hashes what is plain as it comes; what is encrypted it keeps, and says so when it can't."""
    path = write("huge", b"")
    os.truncate(path, 96 * MIB)
    for deliver, status, told in (("http-plain", 0, "the dataset is fetched: 100663296 bytes with the manifest's hash"),
                                  ("http", 1, "failed to download resource: out of memory")):
        with Remote(f"huge, {deliver}", deliver=deliver, data=[path], program=FAST) as s:
            p = subprocess.run(["sh", "-c", f"ulimit -v 65536; exec {FAST} agent {s.address}"], capture_output=True, timeout=LIMIT)
            same(f"{deliver}: status", p.returncode, status)
            has(f"{deliver}: told", p.stderr.decode(), told)


# ---- Faults on purpose ----

def test_faults():
    def serve(fault):
        return Remote(fault, "-fault", fault)
    for fault, status in (("not-found", 404), ("unavailable", 503)):
        with serve(fault) as s:
            algo = s.manifest()[0]
            same(fault, (s.get(algo[0])[0], s.get(algo[1])[0]), (status, 200))
    with serve("refuse-token") as s:
        algo = s.manifest()[0]
        same("refuse-token", (s.get(algo[0])[0], s.get(algo[1], Authorization=f"Bearer {s.token()}")[0]), (200, 401))
    for fault in ("wrong-key", "flip-blob=20"):
        with serve(fault) as s:
            algo = s.manifest()[0]
            blob, key = s.get(algo[0])[1], s.get(algo[1])[1]
            try:
                opened(blob, key)
                check(fault, False, "a genuine blob")
            except InvalidTag:
                check(fault, True)
    with serve("cut=50") as s:
        url = s.manifest()[0][0]
        try:
            s.get(url)
            check("cut", False, "a whole body")
        except http.client.IncompleteRead as e:
            same("cut", len(e.partial), 50)
        p = subprocess.run(["curl", "-s", "--http2-prior-knowledge", url], capture_output=True)
        check("cut in HTTP/2", p.returncode != 0 and len(p.stdout) <= 50, p)
        s.said(r"algorithm algo.py: 200, 50 bytes, .*, broken off$", times=2)


# ---- The verdict ----

def test_summary():
    report = write("report.json", "")
    with Remote("summary", "-until", "running", "-timeout", "60s", "-report", report) as s:
        agent, forwarder = s.both()
        for url, key_url, *_ in [Remote.source(first(agent.manifest(), 5), 3, 1)] * 2:
            s.get(url)
            s.get(key_url)
        s.get(Remote.source([d for n, d in fields(agent.manifest()) if n == 4][0], 4, 1)[0])
        agent.send(ACCEPTED)
        forwarder.events("Running/Starting")
        err = s.ended(0, "running reached")
        has("the algorithm", err, rf"^cvms:      algorithm algo.py fetched, {os.path.getsize(W.algo) + 28} bytes, and its key, 2 times$")
        has("the dataset", err, r"^cvms:      dataset data.csv fetched, \d+ bytes, but not its key$")
        got = json.loads(read(report))["agents"][0]["deliveries"]
        same("the report", [(d["what"], d["fetched"], d["keys"], d["done"]) for d in got], [("algorithm", 2, 2, True), ("dataset", 1, 0, False)])


def test_missing():
    def timed_out(name, why, *fetches):
        with Remote(name, "-until", "running", "-timeout", "1s", "-poll", "0") as s:
            agent, _ = s.both("vm1")
            agent.send(ACCEPTED)
            algo = Remote.source(first(agent.manifest(), 5), 3, 1)
            for i in fetches:
                s.get(algo[i])
            s.ended(4, why)
    timed_out("never asked", "vm1 stood at accepted; the agent never asked for the algorithm \\(exit")
    timed_out("no key", "vm1 stood at accepted; the agent fetched the algorithm, but never asked for its key \\(exit", 0)
    timed_out("algorithm only", "vm1 stood at accepted; the agent never asked for the dataset \\(exit", 0, 1)


def test_text_lines():
    """What is asked for stands in place of its path, which would wrap on a terminal; only json has both."""
    with Remote("text") as s:
        url, key_url, *_ = s.manifest()[0]
        s.token()
        s.get(url)
        s.get(key_url)
        lines = (r"POST +GetToken: 200, 44 bytes", r"GET +algorithm algo\.py: 200, \d+ bytes", r"GET +key of the algorithm algo\.py: 200, 32 bytes")
        for line in lines:
            s.said(rf" http +{line}, 0\.\d+ s")


def test_json_lines():
    record = os.path.join(temp(), "record")
    with Remote("json", "-output", "json", "-record", record) as s:
        algo = s.manifest()[0]
        s.get(algo[0])
        s.get("/x?%22")
        need(s.out.until("/x"), s.out.text())
        lines = [json.loads(t) for t in s.out.text().splitlines()]
        got = [t["request"] for t in lines if "request" in t]
        same("requests", [(g["method"], g["status"], g.get("what")) for g in got],
             [("GET", 200, "algorithm algo.py"), ("GET", 404, None)])
        same("bytes", got[0]["bytes"], str(os.path.getsize(W.algo) + 28))
        same("where from", {t["stream"] for t in lines if "request" in t}, {"http"})
        path = write("lines", s.out.text())
    with Server("replayed") as s:
        same("a replay passes over them", s.stand_in("-replay", path, "-fast").status, 0)


# ---- Mistakes ----

def test_mistakes():
    key, fifo = write("key", bytes(32), 0o600), os.path.join(temp(), "fifo")
    os.mkfifo(fifo, 0o600)
    base = ["-algo-path", W.algo, "-data-paths", W.data, "-algo-type", "python"]
    for name, args, env, patterns in (
            ("no such way", ["-deliver", "ftp"], {}, ["use cli, upload, http, http-plain, oci or oci-plain"]),
            ("all interfaces", ["-deliver", "http"], {"HOST": ""}, ["-deliver-host HOST"]),
            ("all of IPv4", ["-deliver", "http-plain"], {"HOST": "0.0.0.0"}, ["-deliver-host HOST"]),
            ("a URL for a host", ["-deliver", "http", "-deliver-host", "http://x"], {}, ["-deliver-host: \"http://x\""]),
            ("a port of 0", ["-deliver", "http", "-deliver-host", "x:0"], {}, ["-deliver-host"]),
            *((f"no host to fetch from: {host!r}", ["-deliver", "http", "-deliver-host", host], {}, ["-deliver-host: \""])
              for host in ("0.0.0.0", "[::]:7001", "a\nb", "a\x1bb", "a\"b", "a%b", "[x]", "fe80::1%eth0", "\u00fc.example")),
            ("a host for nothing", ["-deliver-host", "x", *W.required], {}, ["-deliver-host: nothing is delivered so; add -deliver http"]),
            ("a key for what is plain", ["-deliver", "http-plain", "-deliver-key", key], {}, ["-deliver-key: nothing is delivered so"]),
            ("a key that others read", ["-deliver", "http", "-deliver-key", write("key", bytes(32))], {}, ["-deliver-key: .*chmod 600"]),
            ("a short key", ["-deliver", "http", "-deliver-key", write("key", bytes(31), 0o600)], {}, ["has 31 bytes"]),
            ("a FIFO for a key", ["-deliver", "http", "-deliver-key", fifo], {}, ["-deliver-key: .*is not a regular file"]),
            ("no key", ["-deliver", "http", "-deliver-key", "nowhere"], {}, ["-deliver-key: .*No such file"]),
            ("seed", ["-deliver", "http", "-compat", "seed"], {}, ["-compat seed: agents of that time fetch images only"]),
            ("a fault for nothing", ["-deliver", "upload", "-fault", "wrong-key"], {}, ["-fault wrong-key does nothing: .*-deliver http"])):
        got = run(name, [*base, *args], env=env)
        check(f"{name}: status", got.status in (1, 2), got.status)
        has(name, got.err, *patterns)
    got = run("nothing to serve", ["-deliver", "http", "-algo-source-url", "https://h/a", "-algo-kbs-path", "r/k/a"])
    has("nothing to serve", got.err, "there is nothing to serve")


def test_warnings():
    """Of uploads only where there are any."""
    with Remote("warnings", deliver="http-plain", data=[write("empty", b""), write("\udcff.csv")]) as s:
        has("warnings", s.err.text(), r"warning: -data-paths: \S+/empty is empty$")
        hasnot("warnings", s.err.text(), "upload|UTF-8")


def test_hosts():
    with Remote("deliver-host", "-deliver-host", "cvms.example") as s:
        same("HOST and the real port", s.manifest()[0][0].split("/blobs")[0], f"http://cvms.example:{s.port}")
    with Remote("deliver-host with a port", "-deliver-host", "[::1]:99", env={"HOST": ""}) as s:
        same("HOST:PORT", s.manifest()[0][0].split("/blobs")[0], "http://[::1]:99")
        has("keys in the clear are warned of", s.err.text(), "warning: .*keys in the clear")
    with Remote("loopback") as s:
        hasnot("not on loopback", s.err.text(), "in the clear")
    with Remote("-set", "-set", "algorithm.source.url=http://elsewhere/x") as s:
        same("-set is over it", s.manifest()[0][0], "http://elsewhere/x")


def test_no_alpn():
    """Over TLS a client that offers no ALPN speaks HTTP/1 while resources are served, and HTTP/2 only if it is allowed to."""
    env, _ = tls()
    context = ssl.create_default_context(cafile=env["SERVER_CERT"])
    for more, said in (([], "did not agree on ALPN h2"), (["-allow-no-alpn"], "")):
        with Remote("no ALPN", *more, deliver="http-plain", env=env, context=context) as s:
            with context.wrap_socket(connect(s.address), server_hostname="localhost") as c:
                c.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                got = b"".join(iter(lambda: c.recv(65536), b""))
                same(f"{more}: HTTP/1.1", statuses(got), [404])
            with context.wrap_socket(connect(s.address), server_hostname="localhost") as c:
                c.sendall(harness.PREFACE + harness.frame(harness.SETTINGS, 0, 0) + harness.frame(6, 0, 0, b"12345678"))
                got, kinds = b"", []
                while 6 not in kinds and 7 not in kinds and (piece := c.recv(65536)):
                    got += piece
                    kinds = [kind for kind, *_ in harness.frames_of(got)[0]]
                same(f"{more}: HTTP/2", kinds[-1], 6 if more else 7)
            check(f"{more}: it is told", said in (s.err.until(said) or ""), s.err.text())


def test_no_alpn_without_resources():
    env, context = tls()
    context.set_alpn_protocols(["http/1.1"])
    with Server("no resources", env=env) as s, connect(s.address) as c:
        try:
            context.wrap_socket(c, server_hostname="localhost")
            check("http/1.1 is offered only with resources", False, "a handshake")
        except (ssl.SSLError, OSError):
            check("http/1.1 is offered only with resources", True)


if __name__ == "__main__":
    W.make(sys.argv[1])
    sys.exit(harness.main(named(globals()), jobs=2, skipped=4))
