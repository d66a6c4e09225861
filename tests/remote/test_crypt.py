#!/usr/bin/env python3
"""Blobs: cvms encrypt and decrypt, and sources that are sealed in any pieces.  usage: test_crypt.py CVMS DRIVER [-v] [NAME...]

Published vectors go through the program's own path; beyond them Python's cryptography is the judge."""
import errno
import hashlib
import os
import pty
import signal
import stat
import subprocess
import sys

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import harness  # noqa: E402
from harness import W, check, has, hasnot, named, need, read, run, same, shell, temp, write  # noqa: E402

from cryptography.exceptions import InvalidTag  # noqa: E402
from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: E402

KEY = bytes(range(32))
SIZES = [0, 1, 11, 12, 13, 15, 16, 17, 28, 31, 32, 33, 4095, 65507, 65508, 65509, 65535, 65536, 65537, 200000]
# McGrew and Viega, The Galois/Counter Mode of Operation, test cases 13 to 15: those with 256 bits and no associated data.
GCM = [("00" * 32, "00" * 12, "", "", "530f8afbc74536b9a963b4f1c4cb738b"),
       ("00" * 32, "00" * 12, "00" * 16, "cea7403d4d606b6e074ec5d3baf39d18", "d0d1c8a799996bf0265b98b5d48ab919"),
       ("feffe9928665731c6d6a8f9467308308" * 2, "cafebabefacedbaddecaf888",
        "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b391aafd255",
        "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662898015ad",
        "b094dac5d93471bdec1a502270e3cc6c")]


def key_file(key=KEY, mode=0o600):
    return write("key", key, mode)


def content(n):
    return hashlib.shake_128(str(n).encode()).digest(n)


def sealed(plain, key=KEY, nonce=b"n" * 12):
    return nonce + AESGCM(key).encrypt(nonce, plain, None)


def opened(blob, key=KEY):
    try:
        return AESGCM(key).decrypt(blob[:12], blob[12:], None)
    except InvalidTag:
        return "wrong tag"


def crypt(name, *args, **kw):
    return run(name, args, **kw)


def good(name, *args, **kw):
    r = crypt(name, *args, **kw)
    same(name, (r.status, r.err), (0, ""))
    return r


def bad(name, *args, status=1, words=(), out=None, **kw):
    """It fails with one line, and leaves no file."""
    r = crypt(name, *args, **kw)
    same(f"{name}: status", r.status, status)
    same(f"{name}: lines", r.err.count("\n"), 1)
    has(name, r.err, "^cvms: ", *words)
    if out:
        same(f"{name}: what is left", sorted(os.listdir(os.path.dirname(out))), [])
    return r


def driver(*args, data=b""):
    p = subprocess.run([DRIVER, *map(str, args)], input=data, capture_output=True)
    return p.returncode, p.stdout


def test_vectors():
    for i, (key, nonce, plain, cipher, tag) in enumerate(GCM):
        blob = bytes.fromhex(nonce + cipher + tag)
        path = write("plain", bytes.fromhex(plain))
        same(f"vector {i}: sealed", driver("seal", key, nonce, 7, path), (0, blob))
        out = os.path.join(temp(), "out")
        good(f"vector {i}: decrypt", "decrypt", "-key", key_file(bytes.fromhex(key)), write("blob", blob), out)
        same(f"vector {i}: content", read(out), bytes.fromhex(plain))


def test_pieces():
    folder = temp()
    for n in (0, 1, 70000):
        write(os.path.join(folder, f"f{n}"), content(n))
    zipped = shell(f"{W.cvms} encrypt -key {key_file()} {folder} -")
    same("a folder's zip", hashlib.sha3_256(opened(zipped)).hexdigest(), run("checksum", ["checksum", folder]).out.split()[0])
    for path, plain in [(folder, opened(zipped)), *((write("f", content(n)), content(n)) for n in SIZES)]:
        blob = sealed(plain)
        for piece in (1, 2, 15, 16, 17, 28, 4096, 65536):
            name = f"{len(plain)} bytes by {piece}"
            same(f"{name}: sealed", driver("seal", KEY.hex(), (b"n" * 12).hex(), piece, path), (0, blob))
            same(f"{name}: unsealed", driver("unseal", KEY.hex(), piece, data=blob), (0, plain))
            broken = bytearray(blob)
            broken[len(blob) * piece // 65537] ^= 0x80
            same(f"{name}: broken", driver("unseal", KEY.hex(), piece, data=bytes(broken))[0], 1)
    for n in range(29):
        same(f"a blob cut to {n}", driver("unseal", KEY.hex(), 5, data=sealed(b"x")[:n])[0], 1)


def test_round():
    key, nonces = key_file(), set()
    for n in SIZES:
        folder = temp()
        blob, out = os.path.join(folder, "blob"), os.path.join(folder, "out")
        good(f"encrypt {n}", "encrypt", "-key", key, write("in", content(n)), blob)
        same(f"encrypt {n}: content", opened(read(blob)), content(n))
        nonces.add(read(blob)[:12])
        good(f"decrypt {n}", "decrypt", blob, out, "-key", key)
        same(f"decrypt {n}: content", read(out), content(n))
        same(f"{n}: files", sorted(os.listdir(folder)), ["blob", "out"])
    same("each has its nonce", len(nonces), len(SIZES))


def test_new_key():
    folder = temp()
    key, blob, out = (os.path.join(folder, n) for n in ("key", "blob", "out"))
    good("new key", "encrypt", "-new-key", key, W.algo, blob)
    same("new key: mode", stat.S_IMODE(os.stat(key).st_mode), 0o600)
    same("new key: content", opened(read(blob), read(key)), read(W.algo))
    good("new key: decrypt", "decrypt", "-key", key, blob, out)
    before = read(key)
    bad("an old key is kept", "encrypt", "-new-key", key, W.algo, blob, words=["-new-key", "key: is there already", "-key"])
    same("an old key is kept: its bytes", read(key), before)
    other = os.path.join(temp(), "key2")
    bad("no use, no key", "encrypt", "-new-key", other, W.algo, os.path.join(folder, "none", "blob"), words=["can't be written"],
        out=other)


def test_keys():
    out = os.path.join(temp(), "out")
    rows = [("by others", KEY, 0o640, ["others may read", "chmod 600"]), ("short", KEY[:31], 0o600, ["31 bytes", "32 raw"]),
            ("hex", KEY.hex() + "\n", 0o600, ["65 bytes", "not hex", "xxd"]), ("base64", b"A" * 44, 0o600, ["not base64"]),
            ("with a newline", KEY + b"\n", 0o600, ["33 bytes"]), ("empty", b"", 0o600, ["0 bytes"])]
    for name, key, mode, words in rows:
        for command in ("encrypt", "decrypt"):
            bad(f"key {name}, {command}", command, "-key", key_file(key, mode), write("blob", sealed(b"")), out,
                words=["-key: ", *words], out=out)
    bad("no such key", "encrypt", "-key", "/none", W.algo, out, words=["-key: /none", "No such file"], out=out)
    good("a key from a pipe", "encrypt", "-key", "/dev/stdin", W.algo, out, stdin=pipe_of(KEY))
    same("a key from a pipe: content", opened(read(out)), read(W.algo))


def pipe_of(data):
    r, w = os.pipe()
    os.write(w, data)
    os.close(w)
    return r


def test_usage():
    key = key_file()
    for words, told in [([], "-key FILE"), (["-key", key], "two files, IN and OUT, not 0"), (["-key", key, "a"], ", not 1"),
                        (["-key", key, "a", "b", "c"], ", not 3"), (["-key", key, "-new-key", "k", "a", "b"], "either -key")]:
        r = crypt(f"usage {words}", "encrypt", *words)
        same(f"usage {words}: status", r.status, 2)
        has(f"usage {words}", r.err, told)
    r = crypt("decrypt makes no key", "decrypt", "-new-key", "k", "a", "b")
    has("decrypt makes no key", r.err, "-new-key is not a flag of this command")
    for command in ("encrypt", "decrypt"):
        has(f"{command} -help", run(command, [command, "-help"]).out, "-key FILE", "32 raw bytes")


def test_damaged():
    key = key_file()
    blob = sealed(content(100000))
    rows = [("flipped", blob[:50000] + bytes([blob[50000] ^ 1]) + blob[50001:]), ("nonce", b"N" + blob[1:]),
            ("tag", blob[:-1] + bytes([blob[-1] ^ 1])), ("cut", blob[:-1]), ("longer", blob + b"x"), ("only a tag", blob[:28])]
    for name, data in rows:
        out = os.path.join(temp(), "out")
        bad(f"damaged: {name}", "decrypt", "-key", key, write("blob", data), out, words=["tag is wrong", "nothing is written"], out=out)
        bad(f"damaged: {name}, of a pipe", "decrypt", "-key", key, "-", out, stdin=open(write("blob", data), "rb"),
            words=["stdin: ", "tag is wrong"], out=out)
    out = os.path.join(temp(), "out")
    bad("another key", "decrypt", "-key", key_file(KEY[::-1]), write("blob", blob), out, words=["tag is wrong"], out=out)
    bad("too short", "decrypt", "-key", key, write("blob", blob[:27]), out, words=["no blob", "28 bytes"], out=out)
    bad("a folder", "decrypt", "-key", key, temp(), out, words=["is a folder"], out=out)
    old = write("old", "old\n")
    bad("the old file stays", "decrypt", "-key", key, write("blob", blob[:-1]), old)
    same("the old file stays: content", read(old), b"old\n")


def test_limit():
    """Told before the first byte; sparse files hold nothing."""
    key, out = key_file(), os.path.join(temp(), "out")
    most = (1 << 36) - 32
    for command, size in (("encrypt", most + 1), ("decrypt", most + 29)):
        big = write("big", b"")
        try:
            os.truncate(big, size)
        except OSError as e:
            need(e.errno in (errno.EFBIG, errno.EINVAL), e)
            raise harness.Skip("the file system has no files of 64 GiB")
        bad(f"{command}: over 64 GiB", command, "-key", key, big, out, words=["over 64 GiB"], out=out)


def test_outputs():
    key, blob = key_file(), write("blob", sealed(b"plain"))
    for name, out in [("stdout", "-"), ("/dev/stdout", "/dev/stdout"), ("/dev/null", "/dev/null")]:
        same(f"decrypt to {name}: no byte", bad(f"decrypt to {name}", "decrypt", "-key", key, blob, out, words=["only a file"]).out, "")
    for out in ("-", "/dev/stdout"):
        same(f"encrypt to {out}", opened(good(f"encrypt to {out}", "encrypt", "-key", key, W.algo, out).raw_out), read(W.algo))
    r = good("encrypt from stdin", "encrypt", "-key", key, "-", "-", stdin=pipe_of(content(3000)))
    same("encrypt from stdin: content", opened(r.raw_out), content(3000))
    fifo = os.path.join(temp(), "fifo")
    os.mkfifo(fifo)
    out = os.path.join(temp(), "out")
    bad("a FIFO for IN", "encrypt", "-key", key, fifo, out, words=["not a regular file or a folder"], out=out)
    shell(f"cat {fifo} >{fifo}.got & {W.cvms} encrypt -key {key} {W.algo} {fifo}; wait")
    same("encrypt to a FIFO", opened(read(fifo + ".got")), read(W.algo))
    out = os.path.join(temp(), "out")
    shell(f"{{ echo a; {W.cvms} encrypt -key {key} {W.algo} /dev/stdout; echo b; }} >{out}")
    whole = read(out)
    same("stdout is a file, which goes on", (whole[:2], opened(whole[2:-2]), whole[-2:]), (b"a\n", read(W.algo), b"b\n"))
    shell(f"ln -s none {out}.part")
    bad("OUT.part is not ours", "encrypt", "-key", key, W.algo, out, words=["out.part: can't be written: File exists"])
    shell(f"head -c 1000000 /dev/zero | {W.cvms} encrypt -new-key {out}.key - - | true")
    same("who reads stdout is gone: no key", os.path.exists(out + ".key"), False)
    r = crypt("stdout is full", "encrypt", "-key", key, W.algo, "/dev/full")
    same("stdout is full: status", r.status, 1)
    has("stdout is full", r.err, "No space left")
    master, slave = pty.openpty()
    bad("encrypt to a terminal", "encrypt", "-key", key, W.algo, "-", stdout=slave, words=["is a terminal"])
    os.close(master), os.close(slave)


def test_files():
    key, folder = key_file(), temp()
    blob = write("blob", sealed(b"plain"))
    for name in ["a b", "-x", "new\nline", "\x1b[31m", "ä\udcff", "x" * 250]:
        path = os.path.join(folder, name)
        good(f"the name {name!r}", "encrypt", "-key", key, W.algo, path)
        same(f"the name {name!r}: content", opened(read(path)), read(W.algo))
    bad("a name too long for a while", "encrypt", "-key", key, W.algo, os.path.join(folder, "x" * 253), words=["File ?name too long"])
    good("-- ends the flags", "encrypt", "-key", key, "--", W.algo, "-y", cwd=folder)
    r = crypt("odd names in errors", "encrypt", "-key", key, "/none\x1b[31m", "x")
    hasnot("odd names in errors", r.err, "\x1b")
    link, real = os.path.join(folder, "link"), write("real", b"old", 0o640)
    os.symlink(real, link)
    good("through a link", "decrypt", "-key", key, blob, link)
    same("through a link", (read(real), os.path.islink(link), stat.S_IMODE(os.stat(real).st_mode)), (b"plain", True, 0o640))
    tree = temp()
    write(os.path.join(tree, "in", "a"))
    os.symlink(os.path.join(tree, "in"), os.path.join(tree, "link"))
    write(os.path.join(tree, "in", "deep", "b"))
    for at in ("in/out", "in/a", "link/out", "link/deep/b", "in/deep/../../in/deep/c"):
        bad(f"OUT in the folder: {at}", "encrypt", "-key", key, os.path.join(tree, "in"), os.path.join(tree, at), words=["is in the folder that is packed"])
    same("OUT in the folder: nothing is left", sorted(os.listdir(os.path.join(tree, "in"))), ["a", "deep"])
    good("OUT beside the folder", "encrypt", "-key", key, os.path.join(tree, "in"), os.path.join(tree, "in.enc"))
    for out, words in [(blob, "is the input as well"), (key, "is the key as well"), (folder, "is a folder"),
                       ("/proc/none", "can't be written")]:
        bad(f"OUT {words}", "decrypt", "-key", key, blob, out, words=[words])
    same("nothing is lost", (read(key), opened(read(blob))), (KEY, b"plain"))
    bad("no IN", "encrypt", "-key", key, "/none", os.path.join(folder, "z"), words=["/none: No such file"])


def test_signals():
    key_new, folder = os.path.join(temp(), "key"), temp()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        p = subprocess.Popen([W.cvms, "encrypt", "-new-key", key_new, "-", os.path.join(folder, "out")], stdin=subprocess.PIPE)
        p.stdin.write(content(1 << 20))
        p.stdin.flush()                # more than a pipe holds: the program is at it
        check(f"{number}: there is a part", os.path.exists(os.path.join(folder, "out.part")))
        p.send_signal(number)
        same(f"{number}: status", harness.end(p), 128 + number)
        p.stdin = None
        same(f"{number}: what is left", (os.listdir(folder), os.path.exists(key_new)), ([], False))


def test_changes():
    """A file that grows or shrinks while it is read is no good; one that fails to be written leaves nothing."""
    out = os.path.join(temp(), "out")
    bad("made up as it is read", "encrypt", "-key", key_file(), "/proc/self/status", out, words=["has changed while"], out=out)
    r = run("a full disk", None, command=["bash", "-c", f"trap - XFSZ; ulimit -f 8; {W.cvms} encrypt -key {key_file()} {write('in', content(100000))} {out}"])
    same("a full disk: status", r.status, 1)
    has("a full disk", r.err, "out.part: can't be written: File too large")
    same("a full disk: what is left", os.listdir(os.path.dirname(out)), [])


if __name__ == "__main__":
    W.make(sys.argv[1])
    DRIVER = os.path.abspath(sys.argv[2])
    sys.exit(harness.main(named(globals()), skipped=3))
