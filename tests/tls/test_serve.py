#!/usr/bin/env python3
"""usage: test_serve.py CVMS TOOLS_DIR.  The server with TLS and mutual TLS, with certificates made by exactly the openssl
commands of the README, against cvms agent and health, openssl s_client, curl, grpcurl, grpc-go and h2spec."""
import json
import os
import re
import select
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import harness  # noqa: E402
from harness import CI, GOAWAY, PING, PREFACE, README, TESTS, W, check, frame, read, self_signed, shell, skip  # noqa: E402

CVMS, TOOLS, WIPE = (os.path.abspath(p) for p in sys.argv[1:4])


def run(*words, env=None):
    return harness.run(str(words[0]), [], env, 60, words)[:3]


def tool(name):
    """A client's path; None, counted as skipped or in CI as failed, where it is not installed."""
    path = os.path.join(TOOLS, "bin", name)
    return path if os.path.exists(path) else skip(name, "not installed; run tests/install.sh", CI)


class Server(harness.Server):
    def __init__(self, *flags, env=None, output="text", program=None):
        super().__init__("server", "-output", output, *flags, base=INPUTS, program=program, env={"HOST": "localhost", **(env or {})})


def readme_commands():
    """The README's commands for certificates, and those that use them, as they stand."""
    with open(README) as f:
        made, used = re.findall(r"(?:^    .*\n)+", f.read().split("## TLS and mutual TLS")[1], re.M)[:2]
    check("README: openssl commands", made.count("openssl ") >= 5, made)
    p = subprocess.run(["sh", "-e", "-c", made], capture_output=True, text=True)
    check("README: they work", p.returncode == 0, p.stderr)
    serve, agent = used.replace("FLAGS", shlex.join([*INPUTS, "-until", "complete", "-timeout", "60s", "-ready-file", "ready"])).splitlines()
    p = subprocess.run(["bash", "-e", "-c", f"mkfifo ready; {serve} &\nread -r AGENT_CVM_GRPC_URL <ready; export AGENT_CVM_GRPC_URL\n"
                        f"{agent}\nwait $!"], capture_output=True, text=True, env=harness.environment({"HOST": "localhost"}))
    check("README: mutual TLS", p.returncode == 0 and " as CN=agent" in p.stderr, p.stderr)


def server_tls():
    env = {"SERVER_CERT": "server.pem", "SERVER_KEY": "server.key"}
    with Server(env=env) as s:
        check("ready line", s.err.until(r"listening at localhost:\d+ with TLS"), s.err.text())
        check("agent -ca", run(CVMS, "agent", "-ca", "ca.pem", s.address)[0] == 0)
        check("health -ca", run(CVMS, "health", "-ca", "ca.pem", s.address)[0] == 0)
        status, _, err = run(CVMS, "health", "-insecure", s.address)
        check("health -insecure warns", status == 0 and "warning" in err, err)
        status, _, err = run(CVMS, "health", s.address)
        check("health: plaintext on the TLS port", status == 1 and "if it wants TLS, give -ca" in err, err)
        check("plaintext is named", s.err.until("plaintext HTTP where TLS is spoken"), s.err.text())
        status, _, err = run(CVMS, "health", "-ca", "other.pem", s.address)
        check("health: another CA", status == 1 and "not signed by a trusted authority; give its authority with -ca" in err, err)
        status, _, err = run(CVMS, "agent", "-ca", "other.pem", s.address)
        check("agent: another CA, told once", status == 1 and len(err.splitlines()) == 1 and "not signed by" in err, err)
        env = {"AGENT_CVM_GRPC_URL": s.address, "AGENT_CVM_GRPC_SERVER_CA_CERTS": "ca.pem"}
        check("an agent's own variables", run(CVMS, "agent", env=env)[0] == 0)
        for version in ("-tls1", "-tls1_1", "-tls1_3"):
            out = run("openssl", "s_client", "-connect", s.address, version, "-alpn", "h2")[1]
            check(f"s_client {version} is refused", "Cipher is (NONE)" in out or "Cipher    : 0000" in out, out)
        out = run("openssl", "s_client", "-connect", s.address, "-alpn", "h2", "-CAfile", "ca.pem", "-tls1_2")[1]
        check("s_client: ALPN, verified, AEAD", "ALPN protocol: h2" in out and "Verify return code: 0" in out and "GCM" in out, out)
        clients(s, [])
        if tool("h2spec"):
            for path in ("/", "/cvms.Service/Process"):
                out = run(tool("h2spec"), "-h", "localhost", "-p", str(s.port), "-t", "-k", "--strict", "-P", path)[1]
                check(f"h2spec over TLS at {path}", "\n146 tests, 146 passed, 0 skipped, 0 failed\n" in out, out[-400:])
        context = ssl.create_default_context(cafile="ca.pem")
        context.set_alpn_protocols(["h2"])
        with context.wrap_socket(socket.create_connection(("localhost", s.port), 10), server_hostname="localhost") as k:
            k.sendall(PREFACE)
            s.signal(signal.SIGHUP)
            check("SIGHUP", s.err.until("certificates loaded anew"), s.err.text())
            k.sendall(frame(PING, 0, 0, b"still on"))
            got = b""
            while b"still on" not in got and (piece := k.recv(4096)):
                got += piece
            check("SIGHUP: an open connection goes on", frame(PING, 1, 0, b"still on") in got, got)
        check("after SIGHUP", run(CVMS, "health", "-ca", "ca.pem", s.address)[0] == 0)
    with Server(env={"SERVER_CERT": "cn.pem", "SERVER_KEY": "cn.key"}) as s:
        text = r"warning: SERVER_CERT \(cn.pem\): the first certificate has no subjectAltName"
        check("a CN alone is warned of", s.err.until(text), s.err.text())
        status, _, err = run(CVMS, "health", "-ca", "cn.pem", s.address)
        check("and refused", status == 1 and "has no subjectAltName" in err, err)
        s.signal(signal.SIGHUP)
        check("SIGHUP: it is warned of again",
                  s.err.until(r"SIGHUP: SERVER_CERT \(cn.pem\): .* \(a warning\)"), s.err.text())
    shutil.copy("server.pem", "changing.pem")
    with Server(env={"SERVER_CERT": "changing.pem", "SERVER_KEY": "server.key"}) as s:
        shutil.copy("other.pem", "changing.pem")
        s.signal(signal.SIGHUP)
        check("SIGHUP, a certificate that does not fit", s.err.until("SIGHUP: SERVER_KEY.*the old certificates stay"), s.err.text())
        check("the old one is served", run(CVMS, "health", "-ca", "ca.pem", s.address)[0] == 0)
        os.unlink("changing.pem")
        os.mkfifo("changing.pem")
        s.signal(signal.SIGHUP)
        check("SIGHUP, a FIFO", s.err.until("SIGHUP: SERVER_CERT: changing.pem is no plain file"), s.err.text())
        check("beside a FIFO the old one is served", run(CVMS, "health", "-ca", "ca.pem", s.address)[0] == 0)
        with socket.create_connection(("localhost", s.port), 10):
            pass
        check("a handshake that ends is told", s.err.until("TLS: the peer went away during the handshake"), s.err.text())


def large_manifest():
    """20 MiB through TLS, to cvms agent, which checks the chunks and prints the manifest."""
    status, out, _ = run(CVMS, "manifest", "-algo-path", f"{W.vectors}/inputs/algo.py", "-public-key-path", f"{W.vectors}/keys/rsa4096.pem",
                         "-attested-tls-bool", "false")
    manifest = json.loads(out)
    manifest["description"] = "0123456789abcdef" * (20 << 16)
    with open("big.json", "w") as f:
        json.dump(manifest, f)
    with Server("-manifest", "big.json", env={"SERVER_CERT": "server.pem", "SERVER_KEY": "server.key"}) as s:
        status, out, err = run(CVMS, "agent", "-once", "-ca", "ca.pem", s.address)
        check("20 MiB: received", status == 0 and "in 22 chunks" in err, err)
        check("20 MiB: unchanged", json.loads(out)["description"] == manifest["description"], len(out))


def last_record():
    """A slow reader gets the last record, too, if it has shut its side without close_notify; close_notify, if it has said GOAWAY."""
    for goaway in (False, True):
        with Server("-manifest", "big.json", env={"SERVER_CERT": "server.pem", "SERVER_KEY": "server.key"}) as s, socket.socket() as k:
            take_slowly(s, k, goaway)


def take_slowly(s, k, goaway):
    name = "GOAWAY" if goaway else "half-closed"
    context = ssl.create_default_context(cafile="ca.pem")
    context.set_alpn_protocols(["h2"])
    k.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    k.settimeout(20)
    k.connect(("127.0.0.1", s.port))
    k = context.wrap_socket(k, server_hostname="localhost", suppress_ragged_eofs=not goaway)
    k.sendall(PREFACE + frame(4, 0, 0, b"\0\4\x7f\xff\xff\xff") + frame(8, 0, 0, b"\x70\0\0\0") + harness.request(1, flags=5) +
              frame(GOAWAY, 0, 0, b"\0" * 8) * goaway)
    if not goaway:
        with socket.socket(fileno=os.dup(k.fileno())) as raw:
            raw.shutdown(socket.SHUT_WR)
    got, fault = bytearray(), None
    try:
        while piece := k.recv(1 << 14):
            got += piece
    except OSError as e:
        fault = e
    k.close()
    frames = harness.frames_of(memoryview(got))[0]
    size = sum(len(f[3]) for f in frames if f[0] == 0)
    check(f"{name}: the manifest", size > 20 << 20, size)
    check(f"{name}: the status", any(f[0] == 1 and f[1] & 1 for f in frames[-2:]), [f[:3] for f in frames[-3:]])
    check(f"{name}: the end", not fault, fault)


def clients(s, certificate):
    """Each client of the issue's list against a server; certificate: [] or -cert FILE -key FILE."""
    files = dict(zip(["ca", *(f[1:] for f in certificate[::2])], ["ca.pem", *certificate[1::2]]))
    flags = ["-cacert", "ca.pem", *certificate]
    if tool("grpcurl"):
        status, out, err = run(tool("grpcurl"), *flags, s.address, "list")
        check("grpcurl over TLS", status == 0 and "cvms.Service" in out, err)
    if tool("client"):
        go = [f.replace("-cacert", "-ca") for f in flags]
        status, out, err = run(tool("client"), "-addr", s.address, "-tls", *go, "-mode", "logs", "-n", "10000",
                               "-tag", "tls")
        check("grpc-go: 10,000 logs", status == 0, out + err)
        check("grpc-go: none is lost", s.out.until("tls", times=10000), s.out.text().count("tls"))
    if tool("../venv/bin/python"):
        words = [tool("../venv/bin/python"), f"{TESTS}/clients/py/client.py", s.address]
        grpcio_and_js(s, "grpcio", words, [w for k, f in files.items() for w in (f"--{k}", f)], ["-o", "received"], {})
    if tool("../js/node_modules"):
        words = [shutil.which("node") or "node", f"{TESTS}/clients/js/client.js", s.address]
        grpcio_and_js(s, "grpc-js", words, [], ["received"],
                      {"NODE_PATH": os.path.join(TOOLS, "js/node_modules"), **{k.upper(): f for k, f in files.items()}})
    out = run("curl", "-s", "--http2", "--cacert", *flags[1:2], *("-" + f if f.startswith("-") else f for f in certificate),
              f"https://{s.address}/")[1]
    check("curl --http2", "speaks gRPC" in out, out)
    for name, more in (("without the CA", ["-insecure", *certificate]), ("without TLS", ["-plaintext"])):
        if tool("grpcurl"):
            status, out, err = run(tool("grpcurl"), *more, "-max-time", "5", s.address, "list")
            check(f"grpcurl {name}", (status == 0) == ("-insecure" in more), err)


def grpcio_and_js(s, name, words, flags, into, env):
    """Health, and the manifest, which is that of `cvms manifest`."""
    status, out, err = run(*words, "health", *flags, env=env)
    check(f"{name}: health", status == 0, out + err)
    status, out, err = run(*words, "manifest", *into, *flags, env=env)
    wanted = harness.run("cvms manifest", ["manifest", *INPUTS, "-o", "wanted"])
    check(f"{name}: the manifest", status == 0 and wanted.status == 0 and read("received") == read("wanted"), out + err + wanted.err)


def mutual_tls():
    env = {"SERVER_CERT": "server.pem", "SERVER_KEY": "server.key", "CLIENT_CA_CERTS": "ca.pem"}
    mine = ["-cert", "client.pem", "-key", "client.key"]
    with Server(env=env, output="json") as s:
        check("agent with a certificate", run(CVMS, "agent", "-ca", "ca.pem", *mine, s.address)[0] == 0)
        check("its subject is logged", s.err.until(r"connected from \S+ as CN=agent"), s.err.text())
        line = json.loads(s.out.text().splitlines()[0])
        check("its subject is in the JSON", line.get("subject", "").startswith("CN=agent"), line)
        status, _, err = run(CVMS, "agent", "-ca", "ca.pem", s.address)
        check("agent without one", status == 1 and "may want a client certificate; give -cert and -key" in err, err)
        check("which is told", s.err.until("the client sent no certificate"), s.err.text())
        check("a server's certificate", run(CVMS, "health", "-ca", "ca.pem", "-cert", "server.pem", "-key", "server.key", s.address)[0] == 1)
        check("which is told, too", s.err.until("extended key usage"), s.err.text())
        clients(s, mine)
    rsa = {"SERVER_CERT": "rsa.pem", "SERVER_KEY": "rsa.key"}
    for more, certificate in (({}, []), ({"CLIENT_CA_CERTS": "ca.pem"}, ["-cert", "rsaclient.pem", "-key", "rsaclient.key"])):
        with Server(env={**rsa, **more}) as s:
            check("RSA: agent", run(CVMS, "agent", "-ca", "ca.pem", *certificate, s.address)[0] == 0)
            clients(s, certificate)
    with Server("-client-san", "someone.else", env=env) as s:
        check("-client-san: another name", run(CVMS, "health", "-ca", "ca.pem", *mine, s.address)[0] == 1)
    for part in ("agen", "gent", "agent2"):
        with Server("-client-san", part, env=env) as s:
            check(f"-client-san: {part}, not the whole name", run(CVMS, "health", "-ca", "ca.pem", *mine, s.address)[0] == 1)
    with Server("-client-san", "agent", env=env) as s:
        check("-client-san: this name", run(CVMS, "health", "-ca", "ca.pem", *mine, s.address)[0] == 0)


def goaway_then_ping():
    """A client that says GOAWAY and goes on to send is read to its end: it gets close_notify and EOF, never a reset."""
    goaway, ping = frame(GOAWAY, 0, 0, b"\0" * 7 + b"\xff"), frame(PING, 0, 0, b"12345678")
    context = ssl.create_default_context(cafile="ca.pem")
    context.set_alpn_protocols(["h2"])
    for secure in (True, False):
        faults = []
        with Server(env={"SERVER_CERT": "server.pem", "SERVER_KEY": "server.key"} if secure else {}) as s:
            for turn in range(50):
                try:
                    k = socket.create_connection(("localhost", s.port), timeout=10)
                    k.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    if secure:
                        k = context.wrap_socket(k, server_hostname="localhost", suppress_ragged_eofs=False)
                    k.sendall(PREFACE)
                    k.recv(9)         # the server's SETTINGS: it is there
                    k.sendall(goaway)
                    if turn % 2:      # late: no time, up to 12 ms, or when all that the server says has come
                        time.sleep(turn % 4 / 1000 * (turn % 5))
                        k.sendall(ping)
                    while k.recv(4096):
                        pass
                    for _ in range(2):
                        os.write(k.fileno(), ping)
                        select.select([], [], [], 0.002)
                    if k.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                        faults.append((turn, "an error waits"))
                    k.close()
                except OSError as e:
                    faults.append((turn, repr(e)))
        check(f"GOAWAY, then PING, {'TLS' if secure else 'plaintext'}: no reset", not faults, faults)


def tls_to_plaintext():
    """A client with TLS at a port without: it learns it at once, not when the server has given it up."""
    with Server() as s:
        began = time.monotonic()
        status, _, err = run(CVMS, "health", "-ca", "ca.pem", s.address)
        check("TLS to a plaintext port", status == 1 and "does that port speak TLS?" in err, err)
        check("TLS to a plaintext port: at once", time.monotonic() - began < 8, time.monotonic() - began)
        check("which the server tells", s.err.until("the client sent a TLS ClientHello: set SERVER_CERT"), s.err.text())


def start_up():
    for name, env, pattern in (
            ("key of another certificate", {"SERVER_CERT": "server.pem", "SERVER_KEY": "client.key"}, "SERVER_KEY"),
            ("no key", {"SERVER_CERT": "server.pem", "SERVER_KEY": ""}, "SERVER_KEY"),
            ("no such file", {"SERVER_CERT": "nowhere.pem", "SERVER_KEY": "server.key"}, "nowhere.pem"),
            ("certificates that are good, a file that is not", {"SERVER_CERT": "server.pem", "SERVER_KEY": "server.key"}, "nowhere.py"),
            ("key as certificate", {"SERVER_CERT": "server.key", "SERVER_KEY": "server.key"}, "SERVER_CERT")):
        algo = "nowhere.py" if pattern == "nowhere.py" else f"{W.vectors}/inputs/algo.py"
        status, _, err = run(CVMS, "-algo-path", algo, "-public-key-path", f"{W.vectors}/keys/rsa4096.pem", "-attested-tls-bool", "false",
                             env={"PORT": "0", **env})
        check(f"start-up: {name}", status == 1 and re.search(pattern, err), (status, err))


def secrets_of(key):
    """For wipe.c: pieces of 16 bytes of the private numbers, as DER has them, and of the second half of the PEM text."""
    told = run("openssl", "pkey", "-in", key, "-text", "-noout")[1]
    pieces = {}
    for name, digits in re.findall(r"(?m)^(priv|privateExponent|prime\d|exponent\d|coefficient):\n((?:    [0-9a-f:]+\n)+)", told):
        number = bytes.fromhex(re.sub(r"[^0-9a-f]", "", digits))
        pieces.update({f"{name}-{at}": number[at:at + 16] for at in range(len(number) % 16, len(number), 16)})
    with open(key) as f:
        text = f.read().encode()
    pieces.update({f"pem-{at}": text[at:at + 16] for at in range(len(text) // 2, len(text) - 48, 40)})
    with open("secrets", "w") as f:
        f.write("".join(f"{name} {piece.hex()}\n" for name, piece in pieces.items()))
    return len(pieces)


def keys_are_wiped():
    """From a file, twice because of SIGHUP, and inline; of a server and of a client."""
    for name in ("server", "rsa"):
        count = secrets_of(f"{name}.key")
        check(f"wipe {name}: secrets", count >= 4, count)
        with open(f"{name}.key") as f:
            inline = f.read()
        for what, env, flags in (("a file", {"SERVER_KEY": f"{name}.key"}, []), ("the environment", {"SERVER_KEY": inline}, []),
                                 ("a flag", {}, ["-server-key", inline])):
            with Server(*flags, env={"SERVER_CERT": f"{name}.pem", "WIPE_SECRETS": "secrets", **env}, program=WIPE) as s:
                check("wipe: health", run(CVMS, "health", "-ca", "ca.pem", s.address)[0] == 0)
                s.signal(signal.SIGHUP)
                check("wipe: read again", s.err.until("certificates loaded anew"), s.err.text())
                check("wipe: agent", run(CVMS, "agent", "-ca", "ca.pem", "-once", s.address)[0] == 0)
            told = s.err.text()
            check(f"{name}, key from {what}: looked for", re.search(f"looked for {count} secrets in [1-9]", told), told)
            check(f"{name}, key from {what}: nothing is left of it", "still in memory" not in told, told)
    count = secrets_of("client.key")
    with Server(env={"SERVER_CERT": "server.pem", "SERVER_KEY": "server.key", "CLIENT_CA_CERTS": "ca.pem"}) as s:
        status, _, told = run(WIPE, "agent", "-ca", "ca.pem", "-cert", "client.pem", "-key", "client.key", "-once", s.address,
                              env={"WIPE_SECRETS": "secrets"})
        check("agent: looked for", status == 0 and f"looked for {count} secrets" in told, told)
        check("agent: nothing is left of its key", "still in memory" not in told, told)


def tests():
    readme_commands()
    self_signed("other")
    shell("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost -keyout cn.key -out cn.pem")
    for name, extensions in (("rsa", "server.ext"), ("rsaclient", "client.ext")):
        shell(f"openssl req -newkey rsa:2048 -nodes -subj /CN={name} -keyout {name}.key -out {name}.csr && openssl x509 -req "
              f"-in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile {extensions} -out {name}.pem")
    return [(test.__name__, test) for test in (start_up, tls_to_plaintext, goaway_then_ping, server_tls, mutual_tls, large_manifest,
                                               last_record, keys_are_wiped)]


W.make(CVMS)
os.chdir(W.dir)
CVMS = W.cvms
INPUTS = ["-algo-path", W.algo, "-data-paths", W.data, "-public-key-path", W.rsa, "-attested-tls-bool", "false"]
sys.exit(harness.main(tests(), skipped=4))
