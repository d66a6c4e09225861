#!/usr/bin/env python3
"""Public key files: what is accepted, each message, and that each suggested command really mends the file."""
import base64, glob, os, re, subprocess, sys
sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from harness import VECTORS, W, check, closing, need, shell  # noqa: E402
TOOL = os.path.abspath(sys.argv[1])
W.make(TOOL); os.chdir(W.dir)
def load(path, inp=None):
    r = subprocess.run([TOOL, path], capture_output=True, input=inp, timeout=30)
    need(r.returncode in (0, 1), (path, r.stderr.decode()))
    return r.returncode == 0, r.stdout.decode("latin1").strip()
def write(name, data):
    open(name, "wb").write(data if isinstance(data, bytes) else data.encode()); return name
def first_der(text):
    b = re.search(r"-----BEGIN PUBLIC KEY-----(.*?)-----END", text, re.S).group(1)
    return base64.b64decode("".join(b.split())).hex()
for k in glob.glob(os.path.join(VECTORS, "keys/*.pem")):
    good, out = load(k); check(k, good and out == first_der(open(k).read()), out)
shell("openssl genrsa -out rsa.key 2048; openssl rsa -in rsa.key -pubout -out rsa.pub; openssl ecparam -name prime256v1 -genkey -out ec.key;"
     "openssl pkey -in ec.key -pubout -out ec.pub; openssl genpkey -algorithm ed25519 -out ed.key; openssl pkey -in ed.key -pubout -out ed.pub;"
     "openssl dsaparam -out dsa.par 1024; openssl gendsa -out dsa.key dsa.par; openssl dsa -in dsa.key -pubout -out dsa.pub; openssl genpkey -algorithm x448 | openssl pkey -pubout -out x448.pub")
for k in ("rsa", "ec", "ed", "dsa", "x448"):
    good, out = load(k + ".pub"); check(k, good and out == first_der(open(k + ".pub").read()), out)
rsa = open("rsa.pub").read(); want = first_der(rsa); lines = rsa.split("\n")
body = "".join(lines[1:-2])
for name, text in {"crlf": rsa.replace("\n", "\r\n"), "cr": rsa.replace("\n", "\r"), "blanks": rsa.replace("\n", " \t \n"), "indent": "\n".join("  " + l for l in lines),
                   "pre": "hello: x\n-----BEGIN nothing\n" + rsa, "noeol": rsa.rstrip("\n"), "oneline": "-----BEGIN PUBLIC KEY-----\n" + body + "\n-----END PUBLIC KEY-----",
                   "empty lines": rsa.replace("\n", "\n\n"), "header": rsa.replace("KEY-----\n", "KEY-----\nComment: me\n\n", 1), "two": rsa + open("ec.pub").read(),
                   "trail": rsa + "garbage \x00\xff"}.items():
    good, out = load(write("v", text)); check(name, good and out == want, out)
r = subprocess.run([TOOL, "/dev/stdin"], input=rsa.encode(), capture_output=True); check("stdin pipe", r.returncode == 0 and r.stdout.decode().strip() == want)
# each mistake: a fragment of the message; the command in it must give a good key
shell("openssl rsa -in rsa.key -RSAPublicKey_out -out p1.pem; openssl req -x509 -new -key ec.key -subj /CN=x -days 9 -out cert.pem; openssl req -new -key ec.key -subj /CN=x -out csr.pem;"
     "openssl pkey -in rsa.key -out p8.pem; openssl rsa -in rsa.key -traditional -out p1.key; openssl ec -in ec.key -out sec1.key; openssl pkey -in ec.key -pubout -outform DER -out spki.der;"
     "openssl rsa -in rsa.key -RSAPublicKey_out -outform DER -out p1.der; openssl pkcs8 -topk8 -in ec.key -passout pass:x -out enc.key; openssl rsa -in rsa.key -traditional -aes128 -passout pass:x -out enc1.key;"
     "ssh-keygen -q -t rsa -N '' -f ssh_rsa; ssh-keygen -q -t ecdsa -N '' -f ssh_ec; ssh-keygen -q -t ed25519 -N '' -f ssh_ed; ssh-keygen -q -t rsa -m PEM -N '' -f ssh_old")
write("mislabel.pem", open("p1.pem").read().replace("RSA PUBLIC KEY", "PUBLIC KEY"))
write("sp ace'd.pem", open("p1.pem").read())
write("utf16.pem", rsa.encode("utf-16")); write("bom.pem", b"\xef\xbb\xbf" + rsa.encode())
cases = [("p1.pem", "PKCS#1"), ("sp ace'd.pem", "PKCS#1"), ("cert.pem", "a certificate,"), ("csr.pem", "certificate request"), ("p8.pem", "private key"), ("p1.key", "private key"),
         ("sec1.key", "private key"), ("ec.key", "curve that comes before"), ("spki.der", "binary DER"), ("p1.der", "PKCS#1 RSA public key in binary DER"),
         ("enc.key", "private key"), ("enc1.key", "private key"), ("ssh_rsa", "OpenSSH private key"), ("ssh_rsa.pub", "OpenSSH public key"),
         ("ssh_ec.pub", "OpenSSH public key"), ("ssh_ed.pub", "Ed25519"), ("ssh_old", "private key"), ("mislabel.pem", "labelled PUBLIC KEY"), ("utf16.pem", "UTF-16"), ("bom.pem", "byte order mark")]
for f, frag in cases:
    good, msg = load(f)
    check(f, not good and frag in msg and msg.startswith(f + ": ") and "\n" not in msg, msg)
    m = re.search(r"with: (.*)$", msg)
    check("command for " + f, m, msg)
    if not m: continue
    cmd = m.group(1) + (" -passin pass:x" if f.startswith("enc") else "")
    r = subprocess.run(["bash", "-c", cmd], capture_output=True)
    good, out = load(write("mended.pem", r.stdout)); check("mended " + f, good, (cmd, r.stderr, out))
for f, data, frag in [("empty", b"", "is empty"), ("text", b"hello\n", "no PEM block"), ("cutoff", rsa[:300].encode(), "damaged or cut off"), ("noend", "\n".join(lines[:-2]).encode(), "damaged or cut off"),
                      ("badb64", rsa.replace("A", "!", 1).encode(), "damaged"), ("pad", rsa.replace("-----END", "=\n-----END").encode(), "damaged"), ("other", rsa.replace("PUBLIC KEY", "PGP THING").encode(), '"PGP THING"'),
                      ("shortder", b"-----BEGIN PUBLIC KEY-----\n" + base64.b64encode(bytes.fromhex(want)[:-3]) + b"\n-----END PUBLIC KEY-----\n", "damaged"),
                      ("longder", b"-----BEGIN PUBLIC KEY-----\n" + base64.b64encode(bytes.fromhex(want) + b"\0\0") + b"\n-----END PUBLIC KEY-----\n", "damaged"),
                      ("nothing", b"-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----\n", "damaged"), ("endlabel", rsa.replace("END PUBLIC", "END RSA PUBLIC").encode(), "damaged"),
                      ("big", b"x" * (1 << 20 | 1), "larger than 1024 KiB"), ("longlabel", ("-----BEGIN " + "A" * 64 + "-----\n").encode(), "no PEM block")]:
    good, msg = load(write(f, data)); check(f, not good and frag in msg and "\n" not in msg, msg)
def spki(der): return b"-----BEGIN PUBLIC KEY-----\n" + base64.b64encode(der) + b"\n-----END PUBLIC KEY-----\n"
for key in ("rsa", "ed"): # lengths longer than they need be (X.690 10.1)
    der = bytes.fromhex(first_der(open(key + ".pub").read())); head = 4 if key == "rsa" else 2; n = len(der) - head
    for more in (1, 2, 3):
        good, msg = load(write("zeros", spki(b"\x30" + bytes([128 + more]) + n.to_bytes(max(more, 2), "big")[-more:] + der[head:])))
        check(f"{key}: a length in {more} bytes", good == (key == "rsa" and more == 2) and (good or "damaged" in msg), msg)
good, msg = load("/nonexistent/x"); check("missing", not good and "No such file" in msg, msg)
good, msg = load(W.dir); check("dir", not good and "is a directory" in msg, msg)
good, msg = load("/dev/zero"); check("/dev/zero", not good and "larger than" in msg, msg)
# blocks: encrypted label, several blocks
r = subprocess.run([TOOL, "blocks", "enc1.key"], capture_output=True, text=True); check("Proc-Type", r.stdout.startswith("1 ENCRYPTED RSA PRIVATE KEY 30") or r.stdout.startswith("1 ENCRYPTED RSA PRIVATE KEY "), r.stdout[:60])
write("many", rsa + "junk\n" + open("ec.key").read()); r = subprocess.run([TOOL, "blocks", "many"], capture_output=True, text=True)
check("three blocks", [l.split(" ")[0] for l in r.stdout.split("\n") if l] == ["1", "1", "1"], r.stdout[:90])
# every truncation and damage of one small file: never crashes, never succeeds when cut
ed = open("ed.pub", "rb").read()
for i in range(len(ed) - 2):
    good, msg = load(write("t", ed[:i])); 
    if good: check("truncated at %d" % i, False)
for i in range(len(ed)):
    load(write("t", ed[:i] + bytes([ed[i] ^ 0x11]) + ed[i + 1:]))
check("damage", True)
sys.exit(closing())
