#!/usr/bin/env python3
"""Runs test layers and adds up what each reports.  usage: check.py [--quick] [LAYER | LAYER/FILE]...

By default all of them; --quick: the quick ones, with one compiler, no sanitizers, several at a time.  LAYER/FILE is one
file of a layer: unit/test_core.  All programs are compiled first, as many at a time as there are processors; then the
layers that measure nothing run beside each other, and what runs after them, runs alone, for some tests measure.  Each layer ends with a line `N passed, M failed[, K skipped]`; so does this,
and the exit status agrees.  What a layer needs is installed by tests/install.sh; without it a layer says what it skips,
in CI it fails.
"""
import concurrent.futures
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(HERE)
BUILD = os.path.join(TOP, "build")
BIN = BUILD
PYTHON = os.path.join(BUILD, "tools", "venv", "bin", "python")
CI = bool(os.environ.get("CI"))
STRICT = "-std=c11 -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror".split()
SANITIZE = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer".split()
PORTABLE = os.environ.get("PORTABLE") == "1"  # make PORTABLE=1 check
if PORTABLE:
    STRICT.append("-DCVMS_PORTABLE=1")
COMPILERS = [c for c in ("gcc", "clang") if shutil.which(c)]
COVERAGE = bool(os.environ.get("COVERAGE"))  # set by tests/coverage: every program counts what it runs
if COVERAGE:
    BIN = os.path.join(BUILD, "coverage")
    COMPILERS = ["clang"]
    SANITIZE = ["-O1", "-g", "-fcoverage-mapping", f"-fprofile-instr-generate={BIN}/%m%c.profraw",
                "-mllvm", "-runtime-counter-relocation", "-mllvm", "-instrprof-atomic-counter-update-all"]
QUICK = "--quick" in sys.argv
if QUICK:                             # one compiler, no sanitizers
    COMPILERS = COMPILERS[:1]
    SANITIZE = ["-O1", "-g"]
totals = [0, 0, 0]
wanted = None                         # the one file of a layer that is to run
planning = False                      # True: what a layer needs is compiled, and nothing runs
made_already = {}                     # programs that are made, or being made
compiling = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
running = concurrent.futures.ThreadPoolExecutor(3)
shown_later = []                      # of what runs beside each other
failures = []                         # said once more at the end, where a reader of a long log looks


def fail(text):
    totals[1] += 1
    failures.append(text[:500])
    print(f"FAIL {text}", flush=True)


def timed(command, **kw):
    began = time.monotonic()
    p = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", **kw)
    p.seconds = time.monotonic() - began
    return p


def count(name, output, status, seconds):
    """Adds a layer's closing line to the totals; a layer without one, or with another exit status, has failed."""
    found = re.findall(r"^(\d+) passed, (\d+) failed(?:, (\d+) skipped)?", output, re.M)
    if not found:
        fail(f"{name}: no closing line, exit status {status}")
        return
    passed, failed, skipped = (int(x or 0) for x in found[-1])
    if status != 0 and failed == 0:
        fail(f"{name}: exit status {status} although nothing failed")
    for i, n in enumerate((passed, failed, skipped)):
        totals[i] += n
    failures.extend(f"{name}: {line[5:500]}" for line in output.splitlines() if failed and line.startswith("FAIL "))
    print(f"     {name}: {passed} passed, {failed} failed, {skipped} skipped, {seconds:.1f} s")


def missing(name, why):
    """What can't be run: skipped by name, in CI a failure."""
    if planning:
        return
    if CI:
        fail(f"{name}: {why}")
    else:
        print(f"skip {name}: {why}")
        totals[2] += 1


def layer(name, command, wait=True, **kw):
    """Runs a command; shows its lines if it failed, else only what it skipped.  Without wait, the next show() does."""
    if planning or not wants(name):
        return
    p = running.submit(timed, command, **kw)
    shown_later.append((name, p))
    if wait and not QUICK:
        show()


def show():
    for name, p in shown_later:
        p = p.result()
        lines = p.stdout.splitlines()
        for line in lines[-60:] if p.returncode else [line for line in lines if line.startswith(("skip", "SKIP"))]:
            print("     | " + line)
        count(name, p.stdout, p.returncode, p.seconds)
    shown_later.clear()


def wants(name):
    """Whether this test of a layer is to run: unit/test_core wants test_core-gcc, but not test_core_services-gcc."""
    return not wanted or bool(re.match(re.escape(wanted) + r"(-|$| )", name))


def compiled(cc, out, source, flags, strict=STRICT, after=()):
    """Begins to compile a file, in the background; the same program but once."""
    libraries = [] if "-DCVMS_TLS=0" in flags or "-c" in flags else ["-lbearssl"]
    command = [cc, *strict, *flags, "-o", os.path.join(BIN, out), source, *libraries, *after]
    if tuple(command) not in made_already:
        made_already[tuple(command)] = compiling.submit(subprocess.run, command, cwd=TOP, capture_output=True, text=True)
    return made_already[tuple(command)]


def build(cc, out, source, flags, strict=STRICT, after=()):
    """Compiles one file without a warning.  Returns the program's path, or None and a failure."""
    p = compiled(cc, out, source, flags, strict, after)
    if planning:
        return None
    p = p.result()
    if p.returncode:
        fail(f"build of {out} with {cc}:\n{p.stderr[:3000]}")
        return None
    totals[0] += 1
    return os.path.join(BIN, out)


def expect(name, good, got):
    if good:
        totals[0] += 1
    else:
        fail(f"{name}: got {str(got)[-2000:]}")


def unit_tests():
    return sorted(f[:-2] for f in os.listdir(os.path.join(HERE, "unit")) if re.match(r"test_.*\.c$", f))


def unit():
    """Layers 1 to 6: no socket, sanitizers on, every compiler there is."""
    for cc in COMPILERS:
        for name in unit_tests():
            made = wants(name) and build(cc, f"{name}-{cc}", f"tests/unit/{name}.c", SANITIZE + ["-D_GNU_SOURCE", "-DCVMS_TLS=0"])
            if made:
                layer(f"{name}-{cc}", [made], wait=False, cwd=os.path.join(HERE, "unit"))


def program(cc="gcc", name="cvms-san", flags=SANITIZE):
    return build(cc if cc in COMPILERS else COMPILERS[0], name, "cvms.c", flags)


def musl(cc, directory, name, *args, wait=True):
    """A test script against a build with the other C library, which does elsewhere what glibc forgives."""
    lib, bear = "/usr/lib/x86_64-linux-musl/", os.path.join(BIN, "musl")
    flags, after = ["-O1", "-g", "-static", "-idirafter", "/usr/include", "-L", bear], ["tests/tls/fortify.c"]
    if QUICK or COVERAGE or not wants(name):
        return
    if not shutil.which("musl-gcc") or not os.path.exists(lib + "crt1.o"):
        missing(f"{name} with musl", "not installed; run tests/install.sh")
        return
    if not os.path.exists(bear):      # of glibc's libraries, this one alone is to be found
        os.mkdir(bear)
        library = subprocess.run(["gcc", "-print-file-name=libbearssl.a"], capture_output=True, text=True).stdout.strip()
        os.symlink(library, os.path.join(bear, "libbearssl.a"))
    if cc == "clang":                 # it does not read GCC's specs
        gcc = subprocess.run(["gcc", "-print-libgcc-file-name"], capture_output=True, text=True).stdout.strip()
        flags += ["-nostdlibinc", "-isystem", "/usr/include/x86_64-linux-musl", "-nostdlib"]
        after += [lib + "crt1.o", lib + "crti.o", "-Wl,--start-group", lib + "libc.a", gcc, "-Wl,--end-group", lib + "crtn.o"]
    cvms = build("musl-gcc" if cc == "gcc" else cc, f"cvms-musl-{cc}", "cvms.c", flags, after=after)
    if cvms:
        layer(f"{name} with musl, {cc}", [sys.executable, os.path.join(HERE, directory, name + ".py"), cvms, *args], wait)


def script(directory, name, *args, python=sys.executable, wait=True):
    """A test script of tests/DIRECTORY against the program with sanitizers."""
    cvms = wants(name) and program()
    if cvms:
        layer(name, [python, os.path.join(HERE, directory, name + ".py"), cvms, *args], wait)


def cli():
    script("cli", "test_checksum", os.path.join(HERE, "vectors"), "--small")
    script("cli", "test_cli")
    musl("gcc", "cli", "test_cli")
    plain = wants("test_plain") and program(name="cvms-san-plain", flags=SANITIZE + ["-DCVMS_TLS=0"])
    if plain:
        layer("test_plain", [sys.executable, os.path.join(HERE, "cli", "test_plain.py"), plain])


def smoke():
    script("smoke", "test_smoke")
    poll = not QUICK and wants("test_smoke portable") and program(name="cvms-san-portable", flags=SANITIZE + ["-DCVMS_PORTABLE=1"])
    if poll:                          # the loop of other systems
        layer("test_smoke portable", [sys.executable, os.path.join(HERE, "smoke", "test_smoke.py"), poll])
    musl(COMPILERS[-1], "smoke", "test_smoke")


def deliver():
    """Uploads and results, against a grpc-go AgentService."""
    fast = wants("test_deliver") and program(name="cvms-fast", flags=["-O2"])
    script("deliver", "test_deliver", fast or "", os.path.join(BUILD, "tools", "bin", "agent"))


def remote():
    """What agents fetch; Python's cryptography is in the clients' venv."""
    if not os.path.exists(PYTHON):
        missing("remote", "no Python cryptography; run tests/install.sh")
        return
    driver = (wants("test_crypt") or wants("test_image")) and build(COMPILERS[0], "seal_driver", "tests/remote/seal_driver.c", SANITIZE, ["-std=c11", "-D_GNU_SOURCE"])
    script("remote", "test_crypt", driver or "", python=PYTHON)
    script("remote", "test_image", driver or "", python=PYTHON)
    script("remote", "test_oci", python=PYTHON)
    fast = wants("test_remote") and program(name="cvms-fast", flags=["-O2"])
    script("remote", "test_remote", fast or "", os.path.join(BUILD, "tools", "bin", "grpcurl"), python=PYTHON)


def tls():
    """PEM files, the TLS section through an echo driver, then the whole server."""
    driver = ["-std=c11", "-D_GNU_SOURCE"]
    pem = wants("test_pem") and build(COMPILERS[0], "pem_driver", "tests/tls/pem_driver.c", SANITIZE + ["-DCVMS_TLS=0"], driver)
    if pem:
        layer("test_pem", [sys.executable, os.path.join(HERE, "tls", "test_pem.py"), pem], wait=False)
    echo = wants("test_tls") and build(COMPILERS[0], "tls_driver", "tests/tls/tls_driver.c", SANITIZE, driver)
    fast = wants("test_tls") and build(COMPILERS[0], "tls_driver-fast", "tests/tls/tls_driver.c", ["-O2"], driver)
    outside = wants("test_tls") and build(COMPILERS[0], "tls_driver-outside", "tests/tls/tls_driver.c",
                                          SANITIZE + ["-DCVMS_TLS_POOL=0"], driver)
    if echo and fast and outside:
        layer("test_tls", [sys.executable, os.path.join(HERE, "tls", "test_tls.py"), echo, fast, outside], wait=False)
    # Symbols are bound at the start, as in the Makefile's build: binding one later spills registers to the stack.
    wipe = wants("test_serve") and build(COMPILERS[0], "wipe", "tests/tls/wipe.c", ["-O2", "-Wl,-z,now"], driver)
    script("tls", "test_serve", os.path.join(BUILD, "tools"), wipe or "", wait=False)
    musl("gcc", "tls", "test_serve", os.path.join(BUILD, "tools"), wipe or "", wait=False)


def proto():
    """The codec and the message tables against the reference implementation."""
    tool = build(COMPILERS[0], "pb_tool", "tests/proto/pb_tool.c", SANITIZE + ["-D_GNU_SOURCE", "-DCVMS_TLS=0"])
    if not os.path.exists(PYTHON):
        missing("proto", "no Python protobuf; run tests/install.sh")
    elif tool:
        layer("test_pb", [PYTHON, os.path.join(HERE, "proto", "test_pb.py"), tool,
                          os.path.join(HERE, "vectors", "manifests.jsonl"), "20"], wait=False)


def fuzz():
    """The corpus of every fuzz target, through the program in memory."""
    replay = build(COMPILERS[0], "fuzz-replay", "tests/fuzz/fuzz.c",
                   SANITIZE + ["-D_GNU_SOURCE", "-DFUZZ_REPLAY", "-UCVMS_PORTABLE"])  # its stand-ins are for Linux's calls
    if replay:
        layer("fuzz", [replay, os.path.join(HERE, "fuzz", "corpus")], wait=False)


def inject(*args):
    """Whole runs in which one call fails: in the program's object file, libc's names become those of inject.c."""
    source, cc = os.path.join(HERE, "inject", "inject.c"), COMPILERS[0]
    with open(source, encoding="utf-8") as f:
        names = re.findall(r"^\S.*\binject_(\w+)\(.*;$", f.read(), re.M)
    rename = [f"--redefine-sym={n}=inject_{n}" for name in names for n in (name, name + "64")]
    same = [f"-Wl,--defsym=inject_{name}64=inject_{name}" for name in names]
    flags = SANITIZE + ["-std=c11", "-fno-omit-frame-pointer", "-fno-optimize-sibling-calls"]
    object_file, peer = build(cc, "cvms-inject.o", "cvms.c", [*flags, "-c"]), build(cc, "cvms-peer", "cvms.c", ["-O2", "-g"])
    if not object_file:
        return
    renamed = os.path.join(BIN, "cvms-renamed.o")
    p = subprocess.run(["objcopy", "--redefine-sym=main=cvms_main", *rename, object_file, renamed], capture_output=True, text=True)
    expect("inject: objcopy", p.returncode == 0, p.stderr)
    cvms = build(cc, "cvms-inject", source, [*flags, renamed, *same], STRICT[1:])
    if not COVERAGE and shutil.which("valgrind"):
        args += ("--valgrind",)
    elif not COVERAGE:
        missing("inject, valgrind", "not installed; run tests/install.sh")
    if cvms and peer:
        layer("inject", [sys.executable, os.path.join(HERE, "inject", "inject.py"), cvms, peer, *args])


def clients():
    script("clients", "run", os.path.join(BUILD, "tools"))


def attack():
    """Honest streams beside hostile clients, and what these can make the server hold."""
    san, fast = program(), program(name="cvms-fast", flags=["-O2"])
    tools = os.path.join(BUILD, "tools")
    if not os.path.exists(os.path.join(tools, "bin", "client")):
        missing("attack", "no grpc-go client; run tests/install.sh")
    elif san and fast:
        layer("test_attack", [sys.executable, os.path.join(HERE, "attack", "test_attack.py"), san, tools, fast])
    musl("gcc", "attack", "test_attack", tools, os.path.join(BIN, "cvms-musl-gcc"))


# Debian's name of a machine: its compiler's, and qemu's.
MACHINES = {"i386": ("i686-linux-gnu", "i386"), "s390x": ("s390x-linux-gnu", "s390x"), "arm64": ("aarch64-linux-gnu", "aarch64"),
            "armhf": ("arm-linux-gnueabihf", "arm"), "riscv64": ("riscv64-linux-gnu", "riscv64")}


def cross(*machines):
    """32 bits and big-endian: what needs no socket, the golden vectors, and two whole runs, one with TLS where there is BearSSL."""
    for machine in machines:
        triple, cpu = MACHINES[machine]
        qemu, root = shutil.which(f"qemu-{cpu}"), os.path.join(BUILD, "tools", "cross", machine)
        if not shutil.which(f"{triple}-gcc") or not qemu:
            missing(machine, f"no {triple}-gcc or qemu-{cpu}; run tests/install.sh cross")
            continue
        bear = plain = ["-D_GNU_SOURCE", "-DCVMS_TLS=0"]
        if os.path.exists(f"{root}/usr"):
            bear = ["-isystem", f"{root}/usr/include", "-L", f"{root}/usr/lib/{triple.replace('i6', 'i3')}"]
        elif not planning:
            print(f"skip TLS and the fuzz corpus on {machine}: no BearSSL")
            totals[2] += 1
        sources = [("cvms", "cvms.c", bear), ("pb_tool", "tests/proto/pb_tool.c", plain),
                   *((name, f"tests/unit/{name}.c", plain) for name in unit_tests())]
        if bear is not plain:
            sources.append(("fuzz-replay", "tests/fuzz/fuzz.c", ["-D_GNU_SOURCE", "-DFUZZ_REPLAY", "-UCVMS_PORTABLE", *bear]))
        made = {name: build(f"{triple}-gcc", f"{name}-{machine}", source, ["-O1", "-g", "-static", *flags]) for name, source, flags in sources}
        if planning or not all(made.values()):
            continue
        for name, path in made.items():   # what the scripts run is a script
            os.replace(path, f"{path}.elf")
            with open(path, "w", encoding="utf-8") as f:
                f.write(f'#!/bin/sh\nexec nice {qemu} {path}.elf "$@"\n')
            os.chmod(path, 0o755)
        for name in unit_tests():
            layer(f"{name} {machine}", [made[name]], wait=False, cwd=os.path.join(HERE, "unit"))
        if bear is not plain:
            layer(f"fuzz {machine}", [made["fuzz-replay"], os.path.join(HERE, "fuzz", "corpus")], wait=False)
        layer(f"test_checksum {machine}", [sys.executable, os.path.join(HERE, "cli", "test_checksum.py"), made["cvms"],
                                           os.path.join(HERE, "vectors"), "--small"], wait=False)
        layer(f"test_pb {machine}", [PYTHON, os.path.join(HERE, "proto", "test_pb.py"), made["pb_tool"],
                                     os.path.join(HERE, "vectors", "manifests.jsonl"), "2"], wait=False)
        subprocess.run("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 9000 -subj /CN=cross -addext "
                       "subjectAltName=IP:127.0.0.1 -keyout cross.key -out cross.pem".split(), cwd=BIN, capture_output=True)
        pem = {name: os.path.join(BIN, "cross" + end) for name, end in (
            ("SERVER_CERT", ".pem"), ("SERVER_KEY", ".key"), ("AGENT_CVM_GRPC_SERVER_CA_CERTS", ".pem"))}
        demo = ["sh", os.path.join(HERE, "demo.sh"), made["cvms"]]
        p = subprocess.run(demo, capture_output=True, text=True)
        expect(f"make run, {machine}", p.returncode == 0, p.stderr)
        if not shutil.which("faketime"):
            missing(f"{machine} in 2045", "no faketime; run tests/install.sh")
            continue
        p = subprocess.run(["faketime", "2045-01-02 UTC", *demo], capture_output=True, text=True,  # past 31 bits of seconds
                           env={**os.environ, **(pem if bear is not plain else {})})
        expect(f"make run in 2045, {machine}", p.returncode == 0 and "\n2045-01-02T" in p.stdout and "\n2045-01-02T" in p.stderr,
               p.stdout + p.stderr)


HARDENED = {"PIE": r"Type: +DYN", "RELRO": r"GNU_RELRO", "all bound at the start": r"BIND_NOW|FLAGS_1.* NOW",
            "no executable stack": r"GNU_STACK .* RW "}


def made(*command, cwd=TOP):
    """A make command of the README: it succeeds without a word from the compiler."""
    p = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    expect(" ".join(command), p.returncode == 0 and not p.stderr, p.stderr)


def compilers(every):
    """Other compilers, dialects and degrees of optimization, without a warning.  What tcc makes does the main job."""
    kinds = [("gcc", "-std=gnu17", "-O3"), ("gcc", "-O0"), ("clang", "-Os"), ("cc",)]
    if every:
        kinds = [(cc, std, *how) for cc in (*COMPILERS, "musl-gcc") for std in ("-std=c11", "-std=gnu17")
                 for how in (["-O0"], ["-O1"], ["-O2"], ["-O3"], ["-Os"], ["-O2", "-flto=auto" if cc == "gcc" else "-flto"])
                 if (std == "-std=c11" or how == ["-O2"]) and
                 (cc, how[-1]) not in (("musl-gcc", "-flto"), ("clang", "-flto") if not shutil.which("ld.lld") else ())]
    for cc, *flags in kinds:
        if shutil.which(cc):
            build(cc, f"cvms-{cc}{''.join(flags)}", "cvms.c", [*flags, "-DCVMS_TLS=0"])
    if not shutil.which("tcc"):
        missing("tcc", "not installed; run tests/install.sh")
        return
    tcc = build("tcc", "cvms-tcc", "cvms.c", ["-Wall"], ["-Werror"])
    if planning:
        return
    p = tcc and subprocess.run(["sh", os.path.join(HERE, "demo.sh"), tcc], capture_output=True, text=True)
    expect("tcc: make run", p and p.returncode == 0, p and p.stderr)


def trees():
    """Two folders, one with a blank in its name, neither with git: the same bits, nothing else written, installed, packed."""
    with tempfile.TemporaryDirectory() as top:
        made("make", f"O={top}/build", "dist")
        source, out, root = (os.path.join(top, name) for name in ("a b", "out", "a root"))
        os.mkdir(source)
        made("tar", "-xf", *glob.glob(f"{top}/build/build/cvms-*.tar"), "--strip-components=1", cwd=source)
        for name in os.listdir(source):
            os.utime(os.path.join(source, name), (0, 0))
        os.utime(source, (0, 0))
        before = sorted(os.walk(source)), os.stat(source).st_mtime
        for o in (out, f"{top}/again"):
            made("make", "-j4", f"O={o}", "TLS=0", "CFLAGS=-O0", "install", f"DESTDIR={root}", "PREFIX=/usr", cwd=source)
        expect("make O=DIR: the source is left alone", before == (sorted(os.walk(source)), os.stat(source).st_mtime), before)
        made("make", "-j4", "TLS=0", "CFLAGS=-O0", cwd=source)
        made("cmp", f"{source}/cvms", f"{out}/cvms")
        made("cmp", f"{root}/usr/bin/cvms", f"{top}/again/cvms")
        told = subprocess.run([f"{root}/usr/bin/cvms", "-help"], capture_output=True, text=True).stdout
        with open(f"{root}/usr/share/man/man1/cvms.1", encoding="utf-8") as f:
            page = f.read().replace("\\&", "").replace("\\-", "-")
        for flag in re.findall(r"^  (-\S.{0,25}\S)", told, re.M):
            expect(f"cvms.1: {flag}", f".TP\n.B {flag}" in page, page[:500])
        if shutil.which("groff"):
            made("groff", "-man", "-ww", "-z", "-Tutf8", f"{root}/usr/share/man/man1/cvms.1")


def builds():
    """Every way to build it that the README names, warning-free; and of make analyze what takes seconds."""
    for cc in COMPILERS:
        build(cc, f"cvms-{cc}", "cvms.c", ["-O2"])
        build(cc, f"cvms-{cc}-plain", "cvms.c", ["-O2", "-DCVMS_TLS=0"])
    if shutil.which("musl-gcc"):
        build("musl-gcc", "cvms-musl", "cvms.c", ["-O2", "-static", "-DCVMS_TLS=0"])
    compilers(False)
    if planning:
        return
    if not shutil.which("cppcheck"):
        missing("cppcheck", "not installed; run tests/install.sh")
    else:
        made("make", "cppcheck")
    trees()
    made("make", "-B", "cvms")
    if shutil.which("readelf"):
        told = subprocess.run(["readelf", "-hldW", "cvms"], cwd=TOP, capture_output=True, text=True).stdout
        for name, pattern in HARDENED.items():
            expect(f"make: {name}", re.search(pattern, told), told)
    made("make", "TLS=0")             # what was built with TLS is not up to date
    told = subprocess.run(["./cvms", "health", "-insecure", "127.0.0.1:1"], cwd=TOP, capture_output=True, text=True)
    expect("make TLS=0 behind make: without TLS", "built without TLS" in told.stderr, told)
    p = subprocess.run(["make", "O=a b"], cwd=TOP, capture_output=True, text=True)
    expect("make O=DIR with a blank: one line", p.returncode != 0 and re.fullmatch(".*O=a b: .*blank.*\n", p.stderr), p.stderr)
    p = subprocess.run(["make", "CC=cc -nostdinc"], cwd=TOP, capture_output=True, text=True)
    expect("make without bearssl.h: what to do", p.returncode != 0 and "libbearssl-dev" in p.stderr, p.stderr)
    made("make", "-B", "TLS=0", "static")
    told = subprocess.run(["./cvms", "-version"], cwd=TOP, capture_output=True, text=True)
    expect("make static: it runs", told.stdout.startswith("cvms ") and told.returncode == 0, told)
    made("make", "-B", "cvms")


LAYERS = {"unit": unit, "proto": proto, "fuzz": fuzz, "tls": tls, "cross": lambda: cross("i386", "s390x"), "builds": builds,
          "cli": cli, "smoke": smoke, "deliver": deliver, "remote": remote, "inject": inject, "clients": clients, "attack": attack,
          "inject-all": lambda: inject("--all"), "cross-all": lambda: (compilers(True), cross(*MACHINES))}
ON_REQUEST = {"inject-all", "cross-all"}  # only by name: minutes
QUICK_LAYERS = ["unit", "proto", "cli", "smoke"]
BESIDE = {"unit", "proto", "fuzz", "tls", "cross", "cross-all", "builds"}  # they measure nothing
NOT_COVERAGE = {"builds", "attack", "cross"}  # one hardly runs what it made, the others reach nothing that the rest does not


def main():
    global planning, wanted
    os.makedirs(BIN, exist_ok=True)
    if CI and len(COMPILERS) < 2 and not QUICK:
        fail("both gcc and clang are wanted in CI")
    every = QUICK_LAYERS if QUICK else [n for n in LAYERS if n not in ON_REQUEST and not (COVERAGE and n in NOT_COVERAGE)]
    names = [a for a in sys.argv[1:] if not a.startswith("-")] or every
    unknown = [n for n in names if n.partition("/")[0] not in LAYERS]
    if unknown:
        sys.exit(f"no layer {', '.join(unknown)}; there are {', '.join(LAYERS)}")
    for planning in (True, False):
        for name in names:
            layer_name, _, wanted = name.partition("/")
            wanted = re.sub(r"\.(c|py)$", "", wanted)
            if layer_name not in BESIDE and not QUICK:
                show()
            if not planning and not QUICK:
                print(f"==== {name}", flush=True)
            LAYERS[layer_name]()
        concurrent.futures.wait(made_already.values())
    show()
    passed, failed, skipped = totals
    if not passed + failed + skipped:
        print(f"there is no {' '.join(names)}")
    for text in failures[:40]:
        print(f"FAIL {text}")
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return 1 if failed or not passed else 0


sys.exit(main())
