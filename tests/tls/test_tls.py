#!/usr/bin/env python3
"""usage: test_tls.py DRIVER FAST_DRIVER OUTSIDE_DRIVER (its CVMS_TLS_POOL is 0).  TLS, through the echo driver: start-up refusals, what can be negotiated, ALPN, client certificates, cuts, bulk."""
import base64, os, re, signal, socket, ssl, subprocess, sys, time, threading
sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from harness import W, check, closing, need, sanitizers, shell  # noqa: E402
DRV = os.path.abspath(sys.argv[1])
FAST, OUTSIDE = map(os.path.abspath, sys.argv[2:4])
W.make(DRV); os.chdir(W.dir)
def run(*a, tool=DRV, timeout=120):
    r = subprocess.run([tool] + [str(x) for x in a], capture_output=True, text=True, timeout=timeout)
    sanitizers(str(a), r.stderr); return r.returncode, r.stdout.strip()
class Server:
    def __init__(self, *a, tool=None):
        self.p = subprocess.Popen([tool or DRV, "server", "x"] + [str(x) for x in a], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        l = self.p.stdout.readline()
        need(l.startswith("ready"), (l, self.p.stderr.read() if self.p.poll() is not None else ""))
        self.port = int(l.split()[1])
    def line(self, want="end"):
        t = threading.Timer(12, self.p.kill); t.start(); seen = []
        while True:
            l = self.p.stdout.readline()
            if not l: return "EOF " + self.p.stderr.read() + str(seen)
            seen.append(l.strip())
            if l.startswith(want): t.cancel()
            if l.startswith(want): return l.strip()
    def stop(self):
        self.p.send_signal(signal.SIGTERM); out, err = self.p.communicate(timeout=20)
        check("server exit", "Sanitizer" not in err and "runtime error" not in err and self.p.returncode == 0, err[-2000:]); return out
    def __enter__(self): return self
    def __exit__(self, *a): self.stop()
def s_client(port, *a, inp=b"hello\n", alpn="h2"):
    c = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}"] + (["-alpn", alpn] if alpn else []) + [str(x) for x in a]
    p = subprocess.Popen(c, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    t = threading.Timer(20, p.kill); t.start()
    out = b""
    try: p.stdin.write(inp); p.stdin.flush()
    except OSError: pass
    while b"\nhello\n" not in out:          # the echo, or the end
        x = os.read(p.stdout.fileno(), 65536)
        if not x: break
        out += x
    try: p.stdin.close()
    except OSError: pass
    out += p.stdout.read(); p.wait(); t.cancel()
    return out.decode("latin1")

# ---- the PKI, made here ----
shell(r'''
for c in 256:prime256v1 384:secp384r1 521:secp521r1; do openssl ecparam -name ${c#*:} -genkey -noout -out ec${c%:*}.sec1; done
for b in 2048 3072 4096; do openssl genrsa -traditional -out rsa$b.pkcs1 $b; done
for f in ec256 ec384 ec521; do openssl pkcs8 -topk8 -nocrypt -in $f.sec1 -out $f.pkcs8; done
for f in rsa2048 rsa3072 rsa4096; do openssl pkcs8 -topk8 -nocrypt -in $f.pkcs1 -out $f.pkcs8; done
(openssl ecparam -name prime256v1; cat ec256.sec1) > ec256.params
mkca() { openssl req -x509 -new -newkey $2 -nodes -keyout $1.key -out $1.crt -days 30 -subj "/O=Test/CN=$1" -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign 2>/dev/null; }
mkca ca "ec -pkeyopt ec_paramgen_curve:P-256"; mkca rca rsa:2048; mkca other "ec -pkeyopt ec_paramgen_curve:P-256"; mkca edca ed25519
sign() { # key subject ca out ext...
  openssl req -new -key $1 -subj "$2" -utf8 -out t.csr; printf "$5" > t.ext
  openssl x509 -req -in t.csr -CA $3.crt -CAkey $3.key -CAcreateserial -days ${6:-20} -extfile t.ext -out $4 2>/dev/null; }
SAN='subjectAltName=DNS:server.example,DNS:localhost,IP:127.0.0.1\n'
for f in ec256 ec384 ec521; do sign $f.sec1 /CN=server.example ca $f.crt "$SAN"; done
for f in rsa2048 rsa3072 rsa4096; do sign $f.pkcs1 /CN=server.example ca $f.crt "$SAN"; done
# intermediates
openssl req -new -newkey rsa:2048 -nodes -keyout int.key -subj /O=Test/CN=int -out t.csr 2>/dev/null; printf 'basicConstraints=critical,CA:TRUE,pathlen:0\n' > t.ext
openssl x509 -req -in t.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 20 -extfile t.ext -out int.crt 2>/dev/null
sign ec256.sec1 /CN=server.example int leaf.crt "$SAN"; cat leaf.crt int.crt > chain.crt
cat ec256.crt ec256.sec1 > both.pem; cat other.crt rca.crt edca.crt ca.crt > roots.crt; sed 's/$/\r/' ec256.crt > crlf.crt
# clients
openssl ecparam -name secp384r1 -genkey -noout -out c.key; openssl genrsa -out crsa.key 2048; openssl genrsa -out cweak.key 1024; openssl genpkey -algorithm ed25519 -out ced.key
EKU='extendedKeyUsage=clientAuth\nsubjectAltName=DNS:agent.example,email:a@b.example,URI:spiffe://x/y,IP:10.1.2.3'
sign c.key '/C=GB/O=Acme, Inc./CN=agent 1' ca c.crt "$EKU"; sign crsa.key /CN=crsa rca crsa.crt "$EKU"; sign cweak.key /CN=weak ca cweak.crt "$EKU"; sign ced.key /CN=ed ca ced.crt "$EKU"
sign c.key /CN=noeku ca noeku.crt 'basicConstraints=CA:FALSE\n'; sign c.key /CN=srvonly ca srvonly.crt 'extendedKeyUsage=serverAuth\n'; sign c.key /CN=anyeku ca anyeku.crt 'extendedKeyUsage=anyExtendedKeyUsage\n'
sign c.key /CN=wrongca other wrongca.crt "$EKU"; sign c.key /CN=viaint int viaint.leaf "$EKU"; cat viaint.leaf int.crt > viaint.crt
sign c.key /CN=kuonly ca kuonly.crt 'keyUsage=critical,keyAgreement\n'; sign c.key /CN=criteku ca criteku.crt 'extendedKeyUsage=critical,clientAuth\n'
sign c.key /CN=fromleaf ca nonca.crt 'basicConstraints=CA:FALSE\n'; cp c.key nonca.key; sign ec256.sec1 /CN=fromleaf nonca fromleaf.leaf "$EKU"; cat fromleaf.leaf nonca.crt > fromleaf.crt
sign c.key "$(printf '/O=Zo\303\253/CN=evil\033[31m\nline\\+x;y')" ca evil.crt "$EKU"
openssl pkcs8 -topk8 -in ec256.sec1 -passout pass:x -out enc.pem; openssl rsa -in rsa2048.pkcs1 -traditional -aes128 -passout pass:x -out enc1.pem 2>/dev/null
openssl pkey -in ec256.sec1 -pubout -out pub.pem; ssh-keygen -q -t ed25519 -N '' -f ssh; openssl genrsa -out rsa1024.pem 1024; openssl ecparam -name secp256k1 -genkey -noout -out k1.pem
sign ced.key /CN=x ca edsrv.crt "$SAN"; head -c 300 ec256.crt > cut.crt; head -c 100 ec256.sec1 > cut.key; echo hello > text; mkdir dir; : > empty
sign c.key /CN=huge ca huge.crt "$EKU,$(seq -f 'DNS:host-number-%05.0f.with-a-long-domain.example' -s, 600)\n"
rm -f long.chain; p=ca; for i in 1 2 3 4 5 6 7 8 9 10 11; do openssl req -new -key c.key -subj /O=Test/CN=i$i -out t.csr; printf 'basicConstraints=critical,CA:TRUE\n' > t.ext; cp c.key i$i.key
  openssl x509 -req -in t.csr -CA $p.crt -CAkey $p.key -CAcreateserial -days 20 -extfile t.ext -out i$i.crt 2>/dev/null; p=i$i; cat i$i.crt $( [ -f long.chain ] && echo long.chain ) > l; mv l long.chain; cp long.chain chain$i; done
sign c.key /CN=far i11 far.crt "$EKU"; for i in 8 9 10; do sign c.key /CN=near$i i$i near$i.crt "$EKU"; done
for x in ip0:30028700 dns0:30028200 mail:300781056167656e74 uri:300786056167656e74 dns:300782056167656e74 DNS:300782054167456e74 longer:300882066167656e7478 shorter:300682046167656e ip4:300687046167656e; do sign c.key /CN=agent ca san-${x%:*}.crt "subjectAltName=DER:${x#*:}\n"; done
sign c.key /CN=agent ca san-mixed.crt 'subjectAltName=email:Agent@B.Example,URI:spiffe://x/Y\n'
sign c.key /CN=ekunone ca ekunone.crt '2.5.29.37=DER:3000\n'; sign c.key /CN=ekudamaged ca ekudamaged.crt '2.5.29.37=DER:0500\n'
sign ec256.sec1 /CN=localhost ca cnonly.crt 'basicConstraints=CA:FALSE\n'; sign ec256.sec1 /CN=server.example int longleaf.crt "$SAN" 3000; cat longleaf.crt int.crt > longchain.crt; cat longleaf.crt edca.crt > edchain.crt
sign ec256.sec1 "/CN=server.example" ca srvclient.crt 'extendedKeyUsage=clientAuth\nsubjectAltName=DNS:server.example\n'
''')
C, K = "ec256.crt", "ec256.sec1"
# private keys with numbers that BearSSL's decoder has no room for
def tlv(t, v):
    n = len(v); m = b"" if n < 128 else n.to_bytes((n.bit_length() + 7) // 8, "big"); return bytes([t]) + (bytes([128 + len(m)]) + m if m else bytes([n])) + v
def key_pem(name, label, der): open(name, "w").write("".join(f"-----{x} {label}-----\n" + (base64.encodebytes(der).decode() if x == "BEGIN" else "") for x in ("BEGIN", "END")))
V0 = tlv(2, b"\0")
def rsa_der(*sizes): return tlv(0x30, V0 + b"".join(tlv(2, b"\0" + b"\xc5" * n) for n in sizes))
RSA_ID, EC_ID = tlv(0x30, tlv(6, bytes.fromhex("2a864886f70d010101")) + b"\5\0"), tlv(0x30, tlv(6, bytes.fromhex("2a8648ce3d0201")) + tlv(6, bytes.fromhex("2a8648ce3d030107")))
def ec_der(n): return tlv(0x30, tlv(2, b"\1") + tlv(4, b"\x22" * n) + tlv(0xa0, tlv(6, bytes.fromhex("2a8648ce3d030107"))))
def p8_der(alg, inner): return tlv(0x30, V0 + alg + tlv(4, inner))
huge = {"n8192": (rsa_der(1024, 3, 1024, *[512] * 5), "has 8192 bits"), "n32000": (rsa_der(4000, 3, 9, *[9] * 5), "has 32000 bits"), "n4104": (rsa_der(513, 3, 513, *[257] * 5), "has 4104 bits"), "d4000": (rsa_der(256, 3, 4000, *[128] * 5), "kind of private key is not supported"),
        "p400": (rsa_der(256, 3, 256, *[400] * 5), "kind of private key is not supported"), "q1536": (rsa_der(256, 3, 256, 128, 1536, 128, 128, 128), "kind of private key is not supported"), "ec67": (ec_der(67), "kind of private key is not supported"), "ec6000": (ec_der(6000), "kind of private key is not supported"),
        "rsa7": (rsa_der(256, 3, 256, 128, 128, 128, 128), "private key is damaged"), "rsa9": (rsa_der(256, 3, 256, *[128] * 6), "private key is damaged"),
        "nested": (p8_der(RSA_ID, p8_der(RSA_ID, rsa_der(256, 3, 256, *[128] * 5))), "private key is damaged"), "lax": (b"\x30\x84\x00" + len(ec_der(32)[2:]).to_bytes(3, "big") + ec_der(32)[2:], "private key is damaged")}
for n, (der, _) in huge.items(): key_pem(n, "EC PRIVATE KEY" if n.startswith("ec") else "PRIVATE KEY" if n == "nested" else "RSA PRIVATE KEY", der); key_pem(n + ".p8", "PRIVATE KEY", p8_der(EC_ID if n.startswith("ec") else RSA_ID, der))
day = 86400; now = int(time.time())

# ---- start-up: what is accepted ----
good = [(f"{n}.crt", f"{n}.{e}") for n in ("ec256", "ec384", "ec521") for e in ("sec1", "pkcs8")] + [(f"{n}.crt", f"{n}.{e}") for n in ("rsa2048", "rsa3072", "rsa4096") for e in ("pkcs1", "pkcs8")]
good += [(C, "ec256.params"), ("chain.crt", K), ("both.pem", "both.pem"), ("crlf.crt", K), (open(C).read(), open(K).read())]
for c, k in good:
    check(f"check {c[:20]} {k[:20]}", run("check", "x", "-cert", c, "-key", k) == (0, "ok"), run("check", "x", "-cert", c, "-key", k))
for a in (["-cca", "ca.crt"], ["-sca", "ca.crt"], ["-cca", "roots.crt", "-sca", "ca.crt"], ["-cca", "ca.crt", "-san", "x"], ["-cca", open("ca.crt").read()]):
    check("check " + str(a)[:40], run("check", "x", "-cert", C, "-key", K, *a) == (0, "ok"))

# ---- start-up: what is warned of ----
for c, w, frag in ((C, now, None), ("cnonly.crt", now, "SERVER_CERT (cnonly.crt): the first certificate has no subjectAltName"), ("srvclient.crt", now, "SERVER_CERT (srvclient.crt): the first certificate has an extended key usage without serverAuth"), ("longchain.crt", now + 100 * day, 'SERVER_CERT (longchain.crt): certificate 2, "CN=int,O=Test", expired on 20')):
    rc, msg = run("check", "x", "-cert", c, "-key", K, "-wall", w); check("warning " + c, rc == 0 and msg.startswith("ok, warning: " + frag if frag else "ok") and (frag or msg == "ok"), msg)

for c, want in (("c.crt", "ok"), ("noeku.crt", "ok"), ("anyeku.crt", "ok"), ("srvonly.crt", "ok, warning: -cert (srvonly.crt): the first certificate has an extended key usage without clientAuth, and servers refuse it")):
    rc, msg = run("ccheck", "x", "-name", "x", "-ca", "ca.crt", "-ccert", c, "-ckey", "c.key"); check("a client's warning " + c, (rc, msg) == (0, want), msg)

# ---- start-up: every refusal ----
bad = [((C, K, "-wall", now + 100 * day), 'SERVER_CERT (ec256.crt): certificate 1, "CN=server.example", expired on 20'),
       ((C, K, "-wall", now - 100 * day), "is not yet valid; it starts on 20"),
       (("chain.crt", K, "-wall", now + 100 * day), "certificate 1"), (("edchain.crt", K), "certificate 2"),
       ((C, "ec384.sec1"), "SERVER_KEY (ec384.sec1): is not the private key of the first certificate in SERVER_CERT"),
       ((C, "c.key"), "is not the private key"), ((C, "rsa2048.pkcs8"), "is not the private key"), (("rsa2048.crt", K), "is not the private key"), (("rsa2048.crt", "crsa.key"), "is not the private key"),
       ((K, C), "SERVER_CERT (ec256.sec1): holds a private key, not a certificate; are two settings swapped?"), ((C, C), 'SERVER_KEY (ec256.crt): holds a "CERTIFICATE", not a private key'),
       ((C, "pub.pem"), 'holds a "PUBLIC KEY", not a private key'), ((C, "enc.pem"), "private key is encrypted; decrypt it with"), (("rsa2048.crt", "enc1.pem"), "private key is encrypted"),
       ((C, "ssh"), "OpenSSH private key"), ((C, "rsa1024.pem"), "has 1024 bits"), ((C, "k1.pem"), "not supported"), ((C, "ced.key"), "is an Ed25519 key"), (("edsrv.crt", "ced.key"), "is an Ed25519 key"),
       (("edsrv.crt", K), "certificate 1"), (("cut.crt", K), 'the PEM block "CERTIFICATE" is damaged or cut off'), ((C, "cut.key"), 'the PEM block "EC PRIVATE KEY" is damaged'),
       (("text", K), "holds no certificate in PEM"), ((C, "text"), "holds no private key in PEM"), (("empty", K), "holds no certificate"), ((C, "empty"), "holds no private key"),
       (("none", K), "No such file"), ((C, "none"), "No such file"), (("dir", K), "is a directory"), ((C, K, "-cca", "text"), "CLIENT_CA_CERTS (text): holds no certificate"),
       ((C, K, "-cca", K), "holds a private key"), ((C, K, "-cca", "edca.crt"), "CLIENT_CA_CERTS (edca.crt): certificate 1"), ((C, K, "-sca", "none"), "SERVER_CA_CERTS: none: "),
       ((C, K, "-cca", "ca.crt", "-sca", "text"), "SERVER_CA_CERTS (text)"), ((C, K, "-san", "x"), "-client-san needs CLIENT_CA_CERTS")]
bad += [((C, n + p8), frag) for n, (_, frag) in huge.items() for p8 in ("", ".p8")]
for (c, k, *a), frag in bad:
    rc, msg = run("check", "x", "-cert", c, "-key", k, *a); check(f"refuse {c} {k} {a}", rc == 1 and frag in msg and msg.count("\n") == ((c, k) == (K, C)), msg)
rc, msg = run("check", "x", "-cert", C); check("no key", rc == 1 and "SERVER_CERT is given without SERVER_KEY: TLS needs both" in msg, msg)
rc, msg = run("check", "x", "-key", K); check("no cert", rc == 1 and "SERVER_KEY is given without SERVER_CERT: TLS needs both" in msg, msg)
inl = open(C).read().replace("\n", "", 1)
rc, msg = run("check", "x", "-cert", open(K).read(), "-key", open(C).read()); check("inline never shown", rc == 1 and msg.startswith("SERVER_CERT: holds a private key") and "BEGIN EC" not in msg, msg)
rc, msg = run("check", "x", "-cert", C, "-key", K, "-cca", "ca.crt", "-wall", now + 25 * day); check("expired", rc == 1 and "expired" in msg, msg)
for a, frag in [([], "no server name"), (["-name", "x", "-ca", "text"], "-ca (text): holds no cert"), (["-name", "a" * 300, "-ca", "ca.crt"], "longer than 255"), (["-name", "x", "-ca", "ca.crt", "-ccert", "c.crt"], "-cert is given without -key: TLS needs both")]:
    rc, msg = run("ccheck", "x", *a); check("client refuse %s" % a, rc == 1 and frag in msg, msg)
check("system bundle", run("ccheck", "x", "-name", "x") == (0, "ok"), run("ccheck", "x", "-name", "x"))

# ---- each key kind really serves ----
for c, k in good[:12] + [("chain.crt", K)]:
    with Server("-cert", c, "-key", k) as s:
        out = s_client(s.port, "-CAfile", "ca.crt", "-verify_hostname", "server.example", "-verify_return_error")
        check(f"serve {c} {k}", "Verify return code: 0 (ok)" in out and "ALPN protocol: h2" in out and "hello" in out and "TLSv1.2" in out, out[-800:])

# ---- what can be negotiated ----
for c, k, kind in ((C, K, "ECDSA"), ("rsa2048.crt", "rsa2048.pkcs1", "RSA")):
    with Server("-cert", c, "-key", k) as s:
        p = s.port
        for v in ("-tls1", "-tls1_1", "-tls1_3"):
            out = s_client(p, v, "-cipher", "ALL:@SECLEVEL=0"); check(kind + v, "Cipher is (NONE)" in out and ("alert" in out or "wrong version" in out), out[-400:])
        names = subprocess.run(["openssl", "ciphers", "-tls1_2", "-s", "ALL:COMPLEMENTOFALL:@SECLEVEL=0"], capture_output=True, text=True).stdout.strip().split(":")
        allowed = {f"ECDHE-{kind}-{x}" for x in ("AES128-GCM-SHA256", "AES256-GCM-SHA384", "CHACHA20-POLY1305")}
        got = set()
        for n in names:
            out = s_client(p, "-tls1_2", "-cipher", n + ":@SECLEVEL=0")
            if f"Cipher is {n}" in out: got.add(n)
        check(f"{kind} suites of {len(names)}", got == allowed, got)
        out = s_client(p, "-tls1_2", "-cipher", "ECDHE-%s-CHACHA20-POLY1305:ECDHE-%s-AES256-GCM-SHA384:ECDHE-%s-AES128-GCM-SHA256" % (kind, kind, kind))
        check("server preference", "Cipher is ECDHE-%s-AES128-GCM-SHA256" % kind in out or "CHACHA20" in out, out[-300:])
        for g in ("X25519", "P-256", "P-384", "P-521"): out = s_client(p, "-tls1_2", "-groups", g if g == "P-256" else g + ":P-256"); check("curve " + g, "Cipher is ECDHE" in out and g.replace("P-256", "prime256v1").replace("P-384", "secp384r1").replace("P-521", "secp521r1") in out or "Server Temp Key" in out, out[-300:])
        out = s_client(p, "-tls1_2"); check("no compression, no tickets", "Compression: NONE" in out and "Secure Renegotiation IS supported" in out and "TLS session ticket:" not in out, out[-900:])
        c1 = subprocess.Popen(["openssl", "s_client", "-connect", f"127.0.0.1:{p}", "-tls1_2", "-alpn", "h2"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        out, _ = c1.communicate(b"R\n", timeout=20); check("renegotiation", b"no renegotiation" in out or b"RENEGOTIATING" in out and b"alert" in out.lower(), out[-400:])

# ---- ALPN ----
def why(s, st=3): return s.line("end %d" % st)
with Server("-cert", C, "-key", K) as s:
    out = s_client(s.port, alpn="http/1.1"); w = why(s); check("alpn http/1.1", "alert number 120" in out and "offers ALPN, but not h2" in w, (w, out[-300:]))
    out = s_client(s.port, alpn=None); w = why(s); check("no alpn", "alert number 120" in out and "did not agree on ALPN h2" in w, (w, out[-300:]))
    out = s_client(s.port, alpn="http/1.1,h2"); check("alpn both", "ALPN protocol: h2" in out)
    out = subprocess.run(["curl", "-sk", "--http2-prior-knowledge", "--max-time", "2", f"https://127.0.0.1:{s.port}/"], capture_output=True, text=True)
with Server("-cert", C, "-key", K, "-noalpn") as s:
    out = s_client(s.port, alpn=None); check("allow no alpn", "hello" in out, out[-300:])
    out = s_client(s.port, alpn="http/1.1"); check("still refused", "alert number 120" in out)

# ---- plaintext, garbage, half-open ----
def raw(s, data, shut=False):
    k = socket.create_connection(("127.0.0.1", s.port)); k.sendall(data)
    if shut: k.shutdown(socket.SHUT_WR)
    k.settimeout(10); got = b""
    try:
        while True:
            b = k.recv(4096)
            if not b: break
            got += b
    except OSError: pass
    k.close(); return got
with Server("-cert", C, "-key", K) as s:
    g = raw(s, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"); w = why(s); check("h2c", g == b"" and "speaks plaintext HTTP" in w, (g, w))
    g = raw(s, b"GET / HTTP/1.1\r\n\r\n"); w = why(s); check("http", g == b"" and "plaintext" in w, (g, w))
    g = raw(s, b"\x80\x2e\x01\x00\x02" + b"x" * 40); w = why(s); check("sslv2", g[:3] == b"\x15\x03\x03" and g[5:7] == b"\x02\x46", (g, w))
    g = raw(s, b"\x16\x03\x01\x00\x04\x0b\x00\x00\x00"); w = why(s); check("certificate first", g[5:7] == b"\x02\x0a", (g, w))
    g = raw(s, b"\x16\x03\x01\x50\x00"); w = why(s); check("record too long", g[5:7] == b"\x02\x16", (g, w))
    g = raw(s, b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00"); w = why(s); check("truncated hello", g[:1] == b"\x15", (g, w))
    g = raw(s, b"\x15\x03\x01\x00\x02\x02\x30"); w = why(s); check("alert first", g == b"" and "sent alert unknown_ca (48)" in w, (g, w))
    g = raw(s, b"\x16\x03\x01", True); w = why(s, 0); check("half-open", w.startswith("end 0"), w)
    half = [socket.create_connection(("127.0.0.1", s.port)) for _ in range(5)]
    out = s_client(s.port); check("others go on", "hello" in out)
    # a valid handshake, then a damaged record: the end, without an alert that could not be encrypted
    ctx = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT); ctx.check_hostname = False; ctx.verify_mode = ssl.CERT_NONE; ctx.set_alpn_protocols(["h2"])
    a, b = ssl.MemoryBIO(), ssl.MemoryBIO(); o = ctx.wrap_bio(a, b); k = socket.create_connection(("127.0.0.1", s.port))
    while True:
        try: o.do_handshake(); break
        except ssl.SSLWantReadError: k.sendall(b.read()); a.write(k.recv(65536))
    k.sendall(b.read()); o.write(b"x" * 100); rec = bytearray(b.read()); rec[40] ^= 1; k.sendall(rec)
    try:
        while True:
            x = k.recv(65536)
            if not x: got = "eof"; break
            a.write(x)
            try: o.read()
            except ssl.SSLWantReadError: continue
    except ssl.SSLError as e: got = str(e)
    w = why(s); check("bad mac", got == "eof" and "does not decrypt" in w, (got, w)); k.close()
    for h in half: h.close()

# ---- client certificates ----
CHAINS = {"viaint.crt": "int.crt", "fromleaf.crt": "nonca.crt", "far.crt": "chain11", **{f"near{i}.crt": f"chain{i}" for i in (8, 9, 10)}}
def mtls(s, crt, key, *extra):
    a = (["-cert", crt, "-key", key] if crt else []) + (["-cert_chain", CHAINS[crt]] if crt in CHAINS else [])
    out = s_client(s.port, "-tls1_2", "-cipher", "ALL:@SECLEVEL=0", *a, *extra); return out
for cas in (["-cca", "roots.crt"], ["-sca", "roots.crt"], ["-cca", "roots.crt", "-sca", "other.crt"]):
    with Server("-cert", C, "-key", K, *cas) as s:
        out = mtls(s, "c.crt", "c.key"); l = s.line("open"); check("mtls " + str(cas), "hello" in out and l == r"open CN=agent 1,O=Acme\, Inc.,C=GB", (l, out[-300:]))
with Server("-cert", C, "-key", K, "-cca", "roots.crt") as s:
    for crt, key, subj in (("crsa.crt", "crsa.key", "CN=crsa"), ("noeku.crt", "c.key", "CN=noeku"), ("anyeku.crt", "c.key", "CN=anyeku"), ("viaint.crt", "c.key", "CN=viaint"),
                           ("evil.crt", "c.key", r"CN=evil\1B[31m\0Aline\+x\;y,O=Zo\C3\AB")):
        out = mtls(s, crt, key); l = s.line("open"); check("accept " + crt, "hello" in out and l == "open " + subj, (l, out[-300:]))
with Server("-cert", C, "-key", K, "-cca", "ca.crt") as s:
    cases = [(None, None, "the client sent no certificate", 40), ("wrongca.crt", "c.key", '"CN=wrongca" is refused: it is not signed by a trusted authority', 48),
             ("crsa.crt", "crsa.key", "not signed by a trusted", 48), ("srvonly.crt", "c.key", '"CN=srvonly" is refused: it has an extended key usage', 43),
             ("ekunone.crt", "c.key", '"CN=ekunone" is refused: it has an extended key usage', 43), ("ekudamaged.crt", "c.key", '"CN=ekudamaged" is refused: it has an extended key usage', 43),
             ("cweak.crt", "cweak.key", '"CN=weak" is refused: it has an RSA key of less than 2048 bits', 42), ("criteku.crt", "c.key", '"CN=criteku" is refused: it has a critical extension', 43),
             ("kuonly.crt", "c.key", "key usage", 43), ("huge.crt", "c.key", '"(unreadable)" is refused: it or its chain is too long', 43), ("far.crt", "c.key", '"CN=far" is refused: it or its chain is too long', 43), ("fromleaf.crt", "ec256.sec1", '"CN=fromleaf" is refused: it is signed by a certificate that is no authority', 42)]
    for crt, key, frag, alert in cases:
        out = mtls(s, crt, key); w = why(s); check("refuse %s" % crt, frag in w and f"alert number {alert}" in out, (w, re.findall("alert number.*", out)))
    for n, good in ((8, True), (9, True), (10, False)):   # with its own certificate one under the cap, at it, one over
        out = mtls(s, f"near{n}.crt", "c.key")
        if good: check(f"a chain of {n + 1}", "hello" in out and s.line("open") == f"open CN=near{n}", out[-300:])
        else: w = why(s); check(f"a chain of {n + 1}", "its chain is too long" in w and "alert number 43" in out, (w, out[-300:]))
    out = mtls(s, "c.crt", "c.key"); check("good one after bad ones", "hello" in out, out[-200:])
    # a hundred refusals cost nothing lasting
    for i in range(20): mtls(s, "wrongca.crt", "c.key")
shell(r'''openssl req -x509 -key ec256.sec1 -subj /CN=server.example -days 3000 -out long.crt; openssl req -x509 -new -key ca.key -subj /O=Test/CN=ca -days 3000 -addext basicConstraints=critical,CA:TRUE -out longca.crt''')
for wall, frag, alert in ((now + 100 * day, '"CN=agent 1,O=Acme\\, Inc.,C=GB" is refused: it expired on 20', 45),):
    with Server("-cert", "long.crt", "-key", K, "-cca", "longca.crt", "-wall", wall) as s:
        out = mtls(s, "c.crt", "c.key"); w = why(s); check("expired client", frag in w and f"alert number {alert}" in out, (w, out[-300:]))
shell(r'''for n in long longca; do k=$([ $n = long ] && echo ec256.sec1 || echo ca.key); s=$([ $n = long ] && echo /CN=x || echo /O=Test/CN=ca); 
  openssl req -new -key $k -subj $s -out t.csr; mkdir -p demo; : > demo/index; echo 01 > demo/serial
  printf '[ca]\ndefault_ca=d\n[d]\ndatabase=demo/index\nserial=demo/serial\nnew_certs_dir=demo\ndefault_md=sha256\npolicy=p\nx509_extensions=x\nunique_subject=no\nrand_serial=yes\n[p]\ncommonName=supplied\norganizationName=optional\n[x]\nbasicConstraints=CA:TRUE\n' > demo/c
  openssl ca -batch -config demo/c -selfsign -keyfile $k -in t.csr -startdate 20200101000000Z -enddate 20400101000000Z -out old$n.crt -notext; done''')
with Server("-cert", "oldlong.crt", "-key", K, "-cca", "oldlongca.crt", "-wall", now - 100 * day) as s:
    out = mtls(s, "c.crt", "c.key"); w = why(s); check("early client", "is refused: it is not yet valid; it starts on 20" in w and "alert number 45" in out, (w, out[-300:]))
with Server("-cert", C, "-key", K, "-cca", "ca.crt") as s:   # Ed25519: not offered, so none is sent
    out = mtls(s, "ced.crt", "ced.key"); w = why(s); check("ed25519 client", "sent no certificate" in w, w)
for san, good_ in (("agent.example", 1), ("AGENT.example", 1), ("a@b.example", 1), ("spiffe://x/y", 1), ("10.1.2.3", 1), ("10.1.2.4", 0), ("example", 0), ("agent 1", 0)):
    with Server("-cert", C, "-key", K, "-cca", "ca.crt", "-san", san) as s:
        out = mtls(s, "c.crt", "c.key")
        if good_: check("san " + san, "hello" in out, out[-200:])
        else: w = why(s); check("san " + san, "-client-san" in w and "CN=agent 1" in w and "alert number 49" in out, (w, out[-200:]))

for san, good_ in (("agent", {"dns", "DNS"}), ("agent.", {"dns", "DNS"}), ("97.103.101.110", {"ip4"}), ("agent@b.example", set()), ("Agent@b.EXAMPLE", {"mixed"}), ("spiffe://x/Y", {"mixed"}), ("spiffe://x/y", set())):
    with Server("-cert", C, "-key", K, "-cca", "ca.crt", "-san", san) as s:
        for kind in ("ip0", "dns0", "mail", "uri", "dns", "DNS", "longer", "shorter", "ip4", "mixed"):
            out = mtls(s, f"san-{kind}.crt", "c.key"); check(f"-client-san {san}, {kind}", ("hello" in out) == (kind in good_) and ("alert number 49" in out) != (kind in good_), out[-200:])

# ---- our client ----
with Server("-cert", "cnonly.crt", "-key", K) as s:
    for name in ("localhost", "127.0.0.1"):
        rc, out = run("client", s.port, "-ca", "ca.crt", "-name", name); check("a CN alone, " + name, rc == 1 and ("it has no subjectAltName" in out or name[0] == "1" and "not for this server" in out), out)
        w = why(s); check("its alert", "sent alert bad_certificate (42)" in w, w)
with Server("-cert", C, "-key", K) as s:
    for a, frag, rc_ in ((["-ca", "ca.crt", "-name", "localhost."], "got 100", 0), (["-ca", "ca.crt", "-name", "localhost.."], "is not for this server name", 1), (["-ca", "ca.crt", "-name", "server.example"], "peer CN=server.example why", 0), (["-ca", "ca.crt", "-name", "127.0.0.1"], "got 100", 0), (["-insecure"], "got 100", 0),
                         (["-ca", "other.crt", "-name", "server.example"], 'server certificate "CN=server.example" is refused: it is not signed', 1), (["-ca", "ca.crt", "-name", "no.example"], "is not for this server name", 1),
                         (["-ca", "ca.crt", "-name", "127.0.0.2"], "is not for this server address", 1), (["-name", "server.example"], "not signed by a trusted", 1)):
        rc, out = run("client", s.port, *a); check("client %s" % a, rc == rc_ and frag in out, out)
with Server("-cert", "srvclient.crt", "-key", K) as s:
    rc, out = run("client", s.port, "-ca", "ca.crt", "-name", "server.example"); check("server with clientAuth only", rc == 1 and "extended key usage" in out, out)
    w = why(s); check("its alert", "sent alert unsupported_certificate (43)" in w, w)
with Server("-cert", C, "-key", K, "-cca", "roots.crt") as s:
    for cc, ck in (("c.crt", "c.key"), ("crsa.crt", "crsa.key"), ("viaint.crt", "c.key")):
        rc, out = run("client", s.port, "-ca", "ca.crt", "-name", "localhost", "-ccert", cc, "-ckey", ck); check("client cert " + cc, rc == 0 and "got 100" in out, out)
    rc, out = run("client", s.port, "-ca", "ca.crt", "-name", "localhost"); check("client without", rc == 1 and "alert handshake_failure (40)" in out, out)
srv = subprocess.Popen(["openssl", "s_server", "-accept", "0", "-cert", C, "-key", K, "-tls1_2", "-rev", "-naccept", "1"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.PIPE)
while True:
    l = srv.stdout.readline()
    if l.startswith(b"ACCEPT"): port = int(l.strip().split(b":")[-1]); break
rc, out = run("client", port, "-insecure", "-total", 1); check("server without ALPN", rc == 1 and "did not agree on ALPN h2" in out, out); srv.wait(10)

# ---- cuts at every byte, both directions; RSA and mutual ----
for a in (["-cert", C, "-key", K], ["-cert", "rsa2048.crt", "-key", "rsa2048.pkcs1", "-cca", "roots.crt", "-ccert", "c.crt", "-ckey", "c.key"]):
    rc, out = run("split", "x", *a, "-ca", "ca.crt", "-name", "server.example", tool=FAST, timeout=400); check("split", rc == 0 and out.startswith("ok"), out); print("split", out, flush=True)

# ---- 20 MB both ways, odd chunks; reload while a connection lives ----
# ---- without the pool a connection keeps its buffers, and all else is the same ----
rc, out = run("split", "x", "-cert", C, "-key", K, "-insecure", tool=OUTSIDE, timeout=400); check("split, from outside", rc == 0 and out.startswith("ok"), out)
for tool in (OUTSIDE, DRV):
    s = Server("-cert", C, "-key", K, "-cca", "ca.crt", "-san", "agent.example", tool=tool)
    rc, out = run("client", s.port, "-ca", "ca.crt", "-name", "localhost", "-ccert", "c.crt", "-ckey", "c.key", "-total", 200000, "-chunk", 1000, tool=tool); check("client", rc == 0, out); s.line()
    out = s_client(s.port, alpn=None); w = s.line("end 3"); check("no ALPN", "alert number 120" in out and "did not agree on ALPN h2" in w, (w, out[-300:]))
    out = s_client(s.port); w = s.line("end 3"); check("no certificate", "alert number 40" in out, (w, out[-300:]))
    ctx.load_cert_chain("noeku.crt", "c.key")
    try: ctx.wrap_socket(socket.create_connection(("127.0.0.1", s.port))).recv(1); got = ""
    except OSError as e: got = str(e)
    check("another name", "access denied" in got.lower() and "does not carry the name" in s.line("end 3"), got)
    ctx.load_cert_chain("c.crt", "c.key"); k = ctx.wrap_socket(socket.create_connection(("127.0.0.1", s.port))); k.sendall(b"x"); check("echo", k.recv(9) == b"x")
    check("an idle connection's buffers", "held %d" % (tool == OUTSIDE) in s.stop()); k.close()
with Server("-cert", C, "-key", K, tool=FAST) as s:
    for ch in (65536, 1000, 16389):
        rc, out = run("client", s.port, "-insecure", "-total", 20 << 20, "-chunk", ch, tool=FAST, timeout=300); check("20 MB chunk %d" % ch, rc == 0, out)
with Server("-cert", C, "-key", K, "-chunk", 7) as s:
    rc, out = run("client", s.port, "-insecure", "-total", 100000, "-chunk", 3); check("small chunks", rc == 0, out)
shell("cp ec256.crt live.crt; cp ec256.sec1 live.key")
s = Server("-cert", "live.crt", "-key", "live.key", "-cca", "ca.crt")
ctx.load_cert_chain("c.crt", "c.key")
k = ctx.wrap_socket(socket.create_connection(("127.0.0.1", s.port)))
def echo(x): k.sendall(x); return k.recv(100)
check("echo before", echo(b"one") == b"one")
shell("cp rsa2048.crt live.crt; cp rsa2048.pkcs1 live.key"); s.p.send_signal(signal.SIGHUP); check("reload", s.line("relo") == "reloaded")
check("live connection goes on", echo(b"two") == b"two")
check("new one has the new key", "Cipher is ECDHE-RSA" in mtls(s, "c.crt", "c.key"))
shell("echo x > live.key"); s.p.send_signal(signal.SIGHUP); l = s.line("relo"); check("bad reload", "holds no private key" in l, l)
check("old stays", echo(b"three") == b"three" and "Cipher is ECDHE-RSA" in mtls(s, "c.crt", "c.key"))
out = s.stop(); k.close()
held = re.findall(r"held (\d)", out); m = re.search(r"idle connection (\d+)", out)
check("idle connection's buffers", held == ["0"], out); check("size", m and int(m.group(1)) < 4600, out)
# ---- certificates, cut and damaged at every byte ----
for c in ("c.crt", "evil.crt", "ec256.crt"):
    rc, out = run("walk", c); check("walk " + c, rc == 0, out)
sys.exit(closing())
