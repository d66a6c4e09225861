#!/usr/bin/env python3
"""Fuzzes the program in memory (see fuzz.c), one process at a time, and ends with `N passed, M failed`.
usage: fuzz.py [--seconds N] [--engine libfuzzer|afl] [TARGET...]    all targets, 60 s each, both engines
       fuzz.py --minimise [TARGET...]    the corpus anew, with what the runs so far have found
       fuzz.py --keep TARGET FILE COMMENT...    an input that failed joins the corpus for good

libFuzzer comes with clang (apt-get install clang libclang-rt-dev), AFL++ is its own package (apt-get install afl++);
without it its part is skipped.  New inputs stay in build/fuzz/ENGINE/TARGET and are begun from the next time; an input
that fails is put into build/fuzz/found, to be shown by FUZZ_VERBOSE=1 build/fuzz/replay TARGET FILE, and to go into the
corpus with the fix.  The first corpus is what `build/fuzz/replay seeds build/fuzz/libfuzzer` writes.  BEARSSL=DIR links
the BearSSL built there: built with -fsanitize=fuzzer-no-link,address it shows its own branches.
"""
import argparse
import base64
import glob
import hashlib
import os
import re
import resource
import shutil
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(os.path.dirname(HERE))
CORPUS = os.path.join(HERE, "corpus")
BUILD = os.path.join(TOP, "build", "fuzz")
FOUND = os.path.join(BUILD, "found")
TARGETS = ["server", "client", "tls-server", "tls-client", "hpack", "http1", "protobuf", "json", "reflection", "pem", "der",
           "cli", "manifest"]
SANITIZE = "-O1 -g -fno-sanitize-recover=all -fno-omit-frame-pointer".split()
MAX_LEN = 8192
passed = failed = skipped = 0


def build(name, cc, *flags):
    """Compiles a fuzzer; its path."""
    path, bear = os.path.join(BUILD, name), os.environ.get("BEARSSL")
    libraries = [f"-I{bear}/inc", f"{bear}/build/libbearssl.a"] if bear else ["-lbearssl"]
    subprocess.run([cc, "-std=c11", "-D_GNU_SOURCE", *SANITIZE, *flags, "-o", path, os.path.join(HERE, "fuzz.c"), *libraries],
                   check=True, env=dict(os.environ, AFL_QUIET="1"))
    return path


def folder(*parts):
    path = os.path.join(BUILD, *parts)
    os.makedirs(path, exist_ok=True)
    return path


def cpu(command, target, **kw):
    """Runs a command at the lowest priority; its exit status, and the processor's seconds."""
    env = dict(os.environ, FUZZ_TARGET=target, AFL_SKIP_CPUFREQ="1", AFL_NO_UI="1", AFL_NO_AFFINITY="1", AFL_AUTORESUME="1",
               AFL_I_DONT_CARE_ABOUT_MISSING_CRASHES="1")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    status = subprocess.run(["nice", "-n", "19", *command], env=env, stderr=subprocess.STDOUT, **kw).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return status, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def report(engine, target, seconds, runs, found):
    global passed, failed
    print(f"{engine} {target}: {runs} runs in {seconds}, {found} found", flush=True)
    passed, failed = passed + (not found), failed + bool(found)


def libfuzzer(program, target, seconds, dictionary):
    log = os.path.join(BUILD, f"libfuzzer-{target}.log")
    before = set(os.listdir(FOUND))
    with open(log, "w") as f:
        status, used = cpu([program, f"-max_total_time={seconds}", f"-max_len={MAX_LEN}", "-timeout=10", "-rss_limit_mb=2048",
                            "-print_final_stats=1", f"-dict={dictionary}", f"-artifact_prefix={FOUND}/{target}-",
                            folder("libfuzzer", target), unpack(target)], target, stdout=f)
    told = open(log, errors="replace").read()
    runs = re.findall(r"number_of_executed_units: (\d+)", told)
    found = len(set(os.listdir(FOUND)) - before)
    if status and not found:
        print(told[-2000:])
    report("libFuzzer", target, f"{used:.0f} s of processor time", runs[-1] if runs else "no", max(found, status != 0))


def afl(program, target, seconds, dictionary):
    out = folder("afl", target)
    with open(os.path.join(BUILD, f"afl-{target}.log"), "w") as f:
        status, _ = cpu(["afl-fuzz", "-V", str(seconds), "-i", unpack(target), "-o", out, "-t", "2000",
                            "-m", "none", "-G", str(MAX_LEN), "-x", dictionary, "--", program], target, stdout=f)
    found = [p for kind in ("crashes", "hangs") for p in glob.glob(os.path.join(out, "default", kind, "id:*"))]
    for path in found:
        name = hashlib.sha1(open(path, "rb").read()).hexdigest()
        shutil.copy(path, os.path.join(FOUND, f"{target}-afl-{name}"))
        os.remove(path)
    stats = os.path.join(out, "default", "fuzzer_stats")
    told = open(stats).read() if os.path.exists(stats) else ""
    runs, took = (re.findall(name + r" +: (\d+)", told) for name in ("execs_done", "run_time"))
    report("AFL++", target, f"{took[0] if took else 0} s", runs[0] if runs else "no", len(found) or int(not runs or status != 0))


def corpus(target):
    """The inputs of corpus/TARGET.txt, and those with a comment in front: (comment, input)."""
    path, inputs, kept, comment = os.path.join(CORPUS, target + ".txt"), [], [], None
    for line in open(path) if os.path.exists(path) else ():
        if line.startswith("#"):
            comment = line
            continue
        data = base64.b64decode(line)
        if comment:
            kept.append((comment, data))
        else:
            inputs.append(data)
        comment = None
    return inputs, kept


def write_corpus(target, inputs, kept):
    with open(os.path.join(CORPUS, target + ".txt"), "w") as f:
        for comment, data in kept:
            f.write(comment + base64.b64encode(data).decode() + "\n")
        for data in sorted(inputs, key=lambda data: (len(data), data)):
            f.write(base64.b64encode(data).decode() + "\n")


def unpack(target):
    """The corpus as a folder of files, which the engines want."""
    path = folder("corpus", target)
    inputs, kept = corpus(target)
    for data in inputs + [data for _, data in kept]:
        with open(os.path.join(path, hashlib.sha1(data).hexdigest()), "wb") as f:
            f.write(data)
    return path


def minimise(program, target):
    """As few inputs as together reach every branch that the old and the new ones do; those with a comment stay."""
    fresh = folder("minimised", target)
    shutil.rmtree(fresh)
    os.makedirs(fresh)
    sources = [unpack(target), folder("libfuzzer", target), os.path.join(BUILD, "afl", target, "default", "queue")]
    cpu([program, "-set_cover_merge=1", "-use_counters=0", f"-max_len={MAX_LEN}",
         f"-artifact_prefix={FOUND}/{target}-", fresh, *filter(os.path.isdir, sources)],
        target, stdout=subprocess.DEVNULL)
    inputs = [open(os.path.join(fresh, name), "rb").read() for name in os.listdir(fresh)]
    write_corpus(target, inputs, corpus(target)[1])
    print(f"{target}: {len(inputs)} inputs, {sum(map(len, inputs))} bytes", flush=True)


def main():
    global skipped
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--engine", choices=("libfuzzer", "afl"))
    parser.add_argument("--minimise", action="store_true")
    parser.add_argument("--keep", nargs="+")
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []])
    args = parser.parse_args()
    targets = args.targets or TARGETS
    if args.keep:
        target, path, *comment = args.keep
        inputs, kept = corpus(target)
        write_corpus(target, inputs, kept + [("# " + " ".join(comment) + "\n", open(path, "rb").read())])
        return 0
    os.makedirs(FOUND, exist_ok=True)
    engines = []
    if args.engine != "afl":
        program = build("libfuzzer.bin", "clang", "-DFUZZ_MUTATOR", "-fsanitize=fuzzer,address,undefined")
        engines.append((libfuzzer, program))
    if args.minimise:
        for target in targets:
            minimise(program, target)
        return 0
    replay = build("replay", "clang", "-DFUZZ_REPLAY", "-fsanitize=address,undefined")
    if args.engine != "libfuzzer" and shutil.which("afl-clang-fast"):
        engines.append((afl, build("afl.bin", "afl-clang-fast", "-fsanitize=fuzzer")))
    elif args.engine != "libfuzzer":
        print("skip AFL++: it is not installed (apt-get install afl++)")
        skipped += len(targets)
    for target in targets:
        dictionary = os.path.join(BUILD, target + ".dict")
        with open(dictionary, "w") as f:
            subprocess.run([replay, "dict", target], check=True, stdout=f)
        for engine, binary in engines:
            engine(binary, target, args.seconds, dictionary)
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return 1 if failed else 0


sys.exit(main())
