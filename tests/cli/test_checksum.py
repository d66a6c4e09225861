#!/usr/bin/env python3
"""Tests of `cvms checksum`: test_checksum.py BINARY VECTORS [--small]

Builds every tree of VECTORS/trees.jsonl and compares; then files, options, odd names, errors, many files at once, and
Zip64 folders against Go's archive/zip (gozip/main.go; skipped without go, or with --small).
"""
import base64
import hashlib
import json
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import tempfile

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from harness import closing, same, sha3, write  # noqa: E402

BINARY, VECTORS = (os.path.abspath(a) for a in sys.argv[1:3])
SMALL = "--small" in sys.argv
HERE = os.path.dirname(os.path.abspath(__file__))
TOO_LONG = (b"File name too long\n", b"Filename too long\n") # glibc's and musl's words
LOOP = ("Too many levels of symbolic links", "Symbolic link loop")


def zone(tz):
    """The environment with TZ; None: without it."""
    env = dict(os.environ, TZ=tz or "")
    if tz is None:
        del env["TZ"]
    return env


def run(*args, tz="UTC", timeout=60, **more):
    env = zone(tz)
    return subprocess.run([BINARY, "checksum", *args], capture_output=True, env=env, timeout=timeout, **more)


def content(entry):
    if "text" in entry:
        return entry["text"].encode()
    cycle = bytes((i * 131 + 7) % 251 for i in range(251))
    return (cycle * (entry["size"] // 251 + 1))[: entry["size"]]


def build(root, entries):
    os.mkdir(root)
    for entry in entries:
        name = bytes.fromhex(entry["path_hex"]) if "path_hex" in entry else os.fsencode(entry["path"])
        path = os.path.join(os.fsencode(root), name)
        os.makedirs(path if entry.get("dir") else os.path.dirname(path), exist_ok=True)
        if "link" in entry:
            os.symlink(entry["link"], path)
        elif not entry.get("dir"):
            with open(path, "wb") as f:
                f.write(content(entry))
            os.chmod(path, int(entry.get("mode", "0644"), 8))


def unprivileged():
    """Arguments for subprocess that give up root, which reads even files of mode 0."""
    return {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}


def test_trees(tmp):
    with open(os.path.join(VECTORS, "trees.jsonl")) as f:
        for i, line in enumerate(f):
            tree = json.loads(line)
            root = os.path.join(tmp, f"tree{i}")
            build(root, tree["entries"])
            if any(e.get("mode") == "0000" for e in tree["entries"]) and os.geteuid() != 0:
                print(f"skipped: {tree['name']}: needs root to read a file of mode 0")
                continue
            got = run(root, tz=tree["tz"])
            what = f"{tree['name']} in {tree['tz']}"
            if tree.get("error"):
                same(what, (got.returncode, got.stdout), (1, b""))
                same(what, got.stderr.startswith(b"cvms: checksum: " + root.encode()), True)
                continue
            same(what, (got.returncode, got.stdout.decode(), got.stderr), (0, f"{tree['sha3_256']}  {root}\n", b""))
            slash = run(root + "/", tz=tree["tz"]).stdout.split(b" ")[0].decode()
            same(what + " with a slash", slash, tree["sha3_256"])
            same(what + " as .", run(".", tz=tree["tz"], cwd=root).stdout.decode(), f"{tree['sha3_256']}  .\n")


def test_files(tmp):
    d = os.path.join(tmp, "files")
    os.mkdir(d)
    lengths = [0, 1, 135, 136, 137, 69631, 69632, 69633, 69632 + 135, 2 * 69632, 3 * 69632 + 1, 1000003]
    random.seed(1)
    paths, wanted = [], ""
    for i in range(60): # more than lanes, of all lengths: lanes end and are taken up again at different times
        n = lengths[i % len(lengths)] if i < 24 else random.randrange(400000)
        data = random.randbytes(n)
        paths.append(os.path.join(d, f"f{i}"))
        write(paths[-1], data)
        wanted += f"{sha3(data)}  {paths[-1]}\n"
    got = run(*paths)
    same("60 files", (got.returncode, got.stdout.decode(), got.stderr), (0, wanted, b""))
    for path, line in zip(paths[:12], wanted.splitlines(True)):
        same("one file", run(path).stdout.decode(), line)
    for n in range(1, 10):
        same(f"{n} files", run(*paths[:n]).stdout.decode(), "".join(wanted.splitlines(True)[:n]))
    b64 = base64.b64encode(hashlib.sha3_256(b"").digest()).decode()
    same("-b", run("-b", paths[0]).stdout.decode(), f"{b64}  {paths[0]}\n")

    missing, folder = os.path.join(d, "missing"), os.path.join(tmp, "mixed")
    build(folder, [{"path": "a", "text": "x"}])
    alone = run(folder).stdout.decode()
    got = run(paths[3], missing, folder, missing + "2", paths[5], paths[5])
    lines = wanted.splitlines(True)
    same("order of results", got.stdout.decode(), lines[3] + alone + lines[5] + lines[5])
    same("order of errors", got.stderr.decode(), f"cvms: checksum: {missing}: No such file or directory\n"
          f"cvms: checksum: {missing}2: No such file or directory\n")
    same("exit status", got.returncode, 1)
    with open("/dev/full", "wb") as full:
        got = subprocess.run([BINARY, "checksum", paths[0]], stdout=full, stderr=subprocess.PIPE, timeout=60)
    same("full disk", (got.returncode, got.stderr[:16]), (1, b"cvms: checksum: "))


def test_names(tmp):
    d = os.path.join(os.fsencode(tmp), b"names")
    os.mkdir(d)
    odd = {b"new\nline": b"new\\nline", b"back\\slash": b"back\\\\slash", b"a b": b"a b", b"\xff\xfe": b"\xff\xfe",
           b"-b": b"-b", b"tab\t": b"tab\t", b"cr\r": b"cr\\r", b"esc\x1b[31m": b"esc\x1b[31m"}
    for name, shown in odd.items():
        path = os.path.join(d, name)
        write(path, name)
        mark = b"\\" if shown != name else b""
        wanted = mark + sha3(name).encode() + b"  " + os.path.join(d, shown) + b"\n"
        same(f"name {name!r}", run(path).stdout, wanted)
    got = run(os.path.join(d, b"\x1b[31m\nno"))
    same("control characters on stderr", got.stderr, b"cvms: checksum: " + d + b"/\\x1b[31m\\nno: No such file or directory\n")
    got = run(os.path.join(tmp, "x" * 3000))
    same("long path", (got.returncode, got.stderr.endswith(TOO_LONG), len(got.stderr) < 620),
          (1, True, True))


def test_special(tmp):
    for i, (what, make, why) in enumerate([
            ("pipe", os.mkfifo, ("not a regular file or a folder",) * 2),
            ("socket", lambda p: socket.socket(socket.AF_UNIX).bind(p), ("not a regular file or a folder",) * 2),
            ("loop", lambda p: os.symlink(os.path.basename(p), p), LOOP),
            ("link to above", lambda p: os.symlink("..", p), ("is a link to a folder",) * 2),
            ("link to nothing", lambda p: os.symlink("nowhere", p), ("No such file or directory",) * 2),
            ("link to a device", lambda p: os.symlink("/dev/zero", p), ("not a regular file or a folder",) * 2)]):
        root = os.path.join(tmp, f"special{i}")
        os.makedirs(os.path.join(root, "sub"))
        write(os.path.join(root, "file"), b"x")
        make(os.path.join(root, "sub", "odd"))
        got = run(root)
        reason = got.stderr.decode().removeprefix(f"cvms: checksum: {root}/sub/odd: ").removesuffix("\n")
        same(what, (got.returncode, got.stdout), (1, b""))
        same(what, reason, why[1] if reason == why[1] else why[0])
    fifo = os.path.join(tmp, "fifo")
    os.mkfifo(fifo)
    same("pipe itself", (run(fifo).returncode, run("/dev/zero").returncode), (1, 1))

    root = os.path.join(tmp, "closed")
    build(root, [{"path": "sub/f", "text": "x"}])
    os.chmod(tmp, 0o755)
    for closed in ("sub/f", "sub"):
        path = os.path.join(root, closed)
        os.chmod(path, 0)
        got = run(root, **unprivileged())
        same(f"unreadable {closed}", (got.returncode, got.stderr.decode()),
              (1, f"cvms: checksum: {path}: Permission denied\n"))
        os.chmod(path, 0o755)
    link = os.path.join(tmp, "link-to-closed")
    os.symlink("closed", link)
    same("link to a folder, itself given", run(link).stdout[:64], run(root).stdout[:64])


def test_deep(tmp):
    """A path near the system's limit, with few descriptors; then one past it, which is an error, not a crash."""
    root = os.path.join(tmp, "deep")
    os.mkdir(root)
    home = os.open(".", os.O_RDONLY)
    os.chdir(root)
    level = "a" * 39
    levels = (4050 - len(root)) // 40
    for _ in range(levels):
        os.mkdir(level)
        os.chdir(level)
    write("./f", b"deep")
    os.fchdir(home)
    got = run(root, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16)))
    same("deep tree", (got.returncode, len(got.stdout)), (0, 64 + 2 + len(root) + 1))
    compare_with_go("deep tree, as Go", root)
    os.chdir(root)
    for i in range(levels + 3):
        if i >= levels:
            os.mkdir(level)
        os.chdir(level)
    os.fchdir(home)
    got = run(root)
    same("too deep", (got.returncode, got.stderr.endswith(TOO_LONG)), (1, True))
    shutil.rmtree(root)


GOZIP = None


def build_go(tmp):
    global GOZIP
    if not shutil.which("go"):
        print("skipped: comparisons with archive/zip: no go here")
        return
    GOZIP = os.path.join(tmp, "gozip")
    env = dict(os.environ, GO111MODULE="off", CGO_ENABLED="0")
    subprocess.run(["go", "build", "-o", GOZIP, os.path.join(HERE, "gozip", "main.go")], check=True, env=env)


def go_hashes(*roots, tz="UTC"):
    """The hash of each folder's zip as archive/zip makes it."""
    hashes, h = [], hashlib.sha3_256()
    with subprocess.Popen([GOZIP, *roots], stdout=subprocess.PIPE, env=zone(tz)) as go:
        while head := go.stdout.read(4):
            piece = go.stdout.read(int.from_bytes(head, "big"))
            h.update(piece)
            if not piece:
                hashes.append(h.hexdigest().encode())
                h = hashlib.sha3_256()
    same("gozip", go.returncode, 0)
    return hashes


def compare_with_go(what, root, tz="UTC"):
    if GOZIP:
        same(what, [run(root, tz=tz, timeout=600).stdout[:64]], go_hashes(root, tz=tz))


def test_zones(tmp):
    """TZ as Go reads it: the name of a file, with or without a colon, and never a rule."""
    root = os.path.join(tmp, "zones")
    build(root, [{"path": "a", "text": "x"}])
    utc, tokyo = (run(root, tz=tz).stdout for tz in ("UTC", "Asia/Tokyo"))
    same("Asia/Tokyo is not UTC", utc != tokyo, True)
    for tz in ("", ":", ":UTC", "JST-9", "UTC-3", "CET-1CEST,M3.5.0,M10.5.0/3", "Europe", "no/such", "/etc/passwd",
               "/"):
        same(f"TZ={tz!r}", run(root, tz=tz).stdout, utc)
    for tz in (":Asia/Tokyo", "/usr/share/zoneinfo/Asia/Tokyo", "../zoneinfo/Asia/Tokyo",
               ":/usr/share/zoneinfo/Asia/Tokyo"):
        same(f"TZ={tz!r}", run(root, tz=tz).stdout, tokyo)
    for tz in (None, ":UTC", "JST-9", "EST5EDT", "Etc/GMT-14", "Asia/Tokyo", "Antarctica/Troll", "Africa/Monrovia",
               "Europe/London", "Asia/Kathmandu", "Australia/Sydney", "right/Asia/Tokyo", "posix/America/New_York"):
        compare_with_go(f"TZ={tz!r}", root, tz)
    with open("/usr/share/zoneinfo/Asia/Tokyo", "rb") as f:
        tzif = f.read()
    path = os.path.join(tmp, "zone")
    second = tzif.index(b"TZif", 4)
    cut = [tzif[:n] for n in range(0, len(tzif), 7)]
    spoilt = [tzif[:i] + bytes([tzif[i] ^ 1]) + tzif[i + 1:]
              for i in (*range(5), *range(20, 44), *range(second + 20, second + 44))]
    for data in cut + spoilt:
        write(path, data)
        compare_with_go(f"zone file {data.hex()}", root, path)


def test_go_names(tmp):
    """Names at the edges of UTF-8 and of what Go calls compatible, and every mode bit."""
    root = os.path.join(os.fsencode(tmp), b"gonames")
    os.mkdir(root)
    names = [bytes([c]) for c in range(1, 256) if c not in b"./"]
    names += [b"\xc1\xbf", b"\xc2\x80", b"\xdf\xbf", b"\xe0\x9f\xbf", b"\xe0\xa0\x80", b"\xed\x9f\xbf", b"\xed\xa0\x80",
              b"\xee\x80\x80", b"\xef\xbf\xbd", b"\xef\xbf\xbf", b"\xf0\x8f\xbf\xbf", b"\xf0\x90\x80\x80",
              b"\xf4\x8f\xbf\xbf", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xe2\x82", b"\xe2\x82a", b"\xc3", b"\xc3a",
              b"ok\xc3\xa4bad\xff", b"bad\xffok\xc3\xa4", b"\xf0\x9f\x99", b"...", b"..a"]
    for i, name in enumerate(names): # one folder each, so that each name's flag counts by itself
        one = os.path.join(root, b"%d" % i)
        os.mkdir(one)
        write(os.path.join(one, name), name)
        os.chmod(os.path.join(one, name), 0o400 | (i * 37 % 4096))
    if GOZIP:
        folders = [os.path.join(root, b"%d" % i) for i in range(len(names))]
        go = go_hashes(*folders)
        ours = run(*folders)
        got = [line[:64] for line in ours.stdout.splitlines()]
        for name, a, b in zip(names, got, go):
            same(f"name {name!r}", a, b)
        same("all names", (ours.returncode, len(got), len(go)), (0, len(names), len(names)))
    for tz in ("UTC", "America/New_York", "Pacific/Apia", "Asia/Kathmandu", "Africa/Monrovia"):
        compare_with_go(f"names in {tz}", os.fsdecode(root), tz)


def test_size_from_stat(tmp):
    """A file whose stat says 0 bytes, but which has some: what is read counts."""
    with open("/proc/version", "rb") as f:
        data = f.read()
    same("/proc file", run("/proc/version").stdout[:64].decode(), sha3(data))
    root = os.path.join(tmp, "proc")
    os.mkdir(root)
    os.symlink("/proc/version", os.path.join(root, "version"))
    compare_with_go("/proc file in a folder", root)


def test_times(tmp):
    """A file's time is in no hash, and none is too late or too early, on 32 bits too."""
    root = os.path.join(tmp, "times")
    build(root, [{"path": "a", "text": "x"}])
    today = run(root, os.path.join(root, "a")).stdout
    for seconds in (-1, 2**31 - 1, 2**31, 2208988800, 2**32):
        os.utime(os.path.join(root, "a"), (seconds, seconds))
        os.utime(root, (seconds, seconds))
        same(f"a file of time {seconds}", run(root, os.path.join(root, "a")).stdout, today)
        compare_with_go(f"a folder of time {seconds}", root)


def test_zip64(tmp):
    if not GOZIP or SMALL:
        print("skipped: Zip64 folders" + ("" if GOZIP else ": no go here"))
        return
    for n in (65534, 65535, 65600):
        root = os.path.join(tmp, "many")
        os.mkdir(root)
        for i in range(n):
            os.close(os.open(os.path.join(root, f"{i * 7919 % n}"), os.O_CREAT | os.O_WRONLY, 0o644))
        compare_with_go(f"{n} files", root)
        shutil.rmtree(root)
    # one size and one offset at each side of what 32 bits hold; the last puts the second offset at 2**32 - 1
    for sizes in ([2**32 - 2], [2**32 - 1, 5], [2**32 - 1 - 56, 1]):
        root = os.path.join(tmp, "large")
        os.mkdir(root)
        for i, size in enumerate(sizes):
            with open(os.path.join(root, f"{i}"), "wb") as f:
                f.truncate(size)
        compare_with_go(f"sizes {sizes}", root)
        shutil.rmtree(root)


def main():
    os.umask(0)
    with tempfile.TemporaryDirectory() as tmp:
        build_go(tmp)
        for test in (test_trees, test_files, test_names, test_special, test_deep, test_zones, test_go_names,
                     test_size_from_stat, test_times, test_zip64):
            test(tmp)
    return closing()


sys.exit(main())
