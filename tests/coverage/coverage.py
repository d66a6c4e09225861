#!/usr/bin/env python3
"""Runs the test layers with a program that counts what it runs, and tells what they reach.
usage: coverage.py [--lines PERCENT] [--branches PERCENT] [LAYER...]   all layers, or to the counters there are: these
       coverage.py --missing                                          of the last run: what was never reached

The measure is that of clang's source-based coverage, merged over every program of the tests: a line counts as reached if
code that begins on it ran in any of them; a branch is one outcome of one condition (each operand of && and || is a
condition of its own, each case of a switch is one), so a condition counts twice.  What the preprocessor leaves out
(other systems and processors) is not counted.
The counters are mapped files (%c), so a program that is killed or calls _exit has counted too; allocation failures and
threads need nothing else.  A last line `N passed, M failed` counts the thresholds of each file, and the layers.
"""
import argparse
import bisect
import collections
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(os.path.dirname(HERE))
BIN = os.path.join(TOP, "build", "coverage")
FILES = ("cvms.c", "proto_wire.h", "sha3.h")
EXPANSION = 1                         # of the kinds of region
TRUE, FALSE = 0, 1


def tool(name):
    """llvm-cov or llvm-profdata of the clang that built the programs; Debian adds the version to the name."""
    version = re.search(r"version (\d+)", subprocess.run(["clang", "--version"], capture_output=True, text=True).stdout)
    for found in (f"{name}-{version.group(1)}" if version else name, name):
        if shutil.which(found):
            return found
    sys.exit(f"{name} is not installed; run tests/install.sh")


def line_counts(segments):
    """Each line's count: the highest of the regions that start on it and of the one that it continues."""
    by_line = collections.defaultdict(list)
    for line, _, count, has_count, entry, gap in segments:
        by_line[line].append((count, has_count, entry, gap))
    wrapped, counts = None, {}
    for line in range(segments[0][0], segments[-1][0] + 1) if segments else ():
        here = by_line.get(line, [])
        starts = [s[0] for s in here if s[1] and s[2] and not s[3]]
        skipped = here and here[0][2] and not here[0][1]
        if not skipped and (starts or (wrapped and wrapped[1])):
            counts[line] = max(starts + ([wrapped[0]] if wrapped else []))
        wrapped = here[-1] if here else wrapped
    return counts


def sites(regions):
    """For each of a function's virtual files: where the macro that it is stands, () for the function's own text."""
    where = {}
    for line, column, _, _, _, file, expanded, kind in regions:
        if kind == EXPANSION:
            where[expanded] = (file, line, column)

    def chain(file):
        return chain(where[file][0]) + where[file][1:] if file in where else ()
    return chain


class Coverage:
    """What all programs together have reached of one file."""

    def __init__(self):
        self.lines = collections.Counter()
        self.branches = {}                # (position, macro site) -> how often true, how often false

    def add_function(self, function, path):
        chain = sites(function["regions"])
        for line, column, _, _, true, false, file, *_ in function["branches"]:
            at, site = (line, column), chain(file)
            if function["filenames"][file] != path:
                continue
            key = (site[:2] or at, at, site)
            counts = self.branches.setdefault(key, [0, 0])
            counts[TRUE] += true
            counts[FALSE] += false

    def outcomes(self):
        """Every outcome of every condition: its position, which, whether it was seen."""
        for key, counts in sorted(self.branches.items()):
            for which in (TRUE, FALSE):
                yield key[0], which, counts[which] > 0


def collect():
    """Merges the counters of every program."""
    merged = os.path.join(BIN, "all.profdata")
    raw = glob.glob(os.path.join(BIN, "*.profraw"))
    if not raw:
        sys.exit("no counters: make coverage has not been run")
    subprocess.run([tool("llvm-profdata"), "merge", "-sparse", "-o", merged, *raw], check=True)
    result = {name: Coverage() for name in FILES}
    paths = {os.path.join(TOP, name): name for name in FILES}
    for program in sorted(os.listdir(BIN)):
        if "." in program:
            continue
        told = subprocess.run([tool("llvm-cov"), "export", f"-instr-profile={merged}", os.path.join(BIN, program)],
                              capture_output=True, text=True)
        if told.returncode:               # built without counters
            continue
        data = json.loads(told.stdout)["data"][0]
        for file in data["files"]:
            path = os.path.normpath(file["filename"])
            if path in paths:
                for line, count in line_counts(file["segments"]).items():
                    result[paths[path]].lines[line] += count
        for function in data["functions"]:
            function["filenames"] = [os.path.normpath(f) for f in function["filenames"]]
            for path in set(function["filenames"]) & set(paths):
                result[paths[path]].add_function(function, path)
    return result


def functions(text):
    """Line numbers where functions begin, and their names; for a reader of the list."""
    starts = [(0, "")]
    for i, line in enumerate(text, 1):
        name = re.match(r"[A-Za-z_].*?(\w+)\(.*[^;]$", line)
        if name and text[i:i + 1] != [] and "{" in "".join(text[i:i + 3]):
            starts.append((i, name.group(1)))
    return starts


def show_missing(result):
    """One line for each line that never ran, and each condition that never came out one way; both by function."""
    for name, coverage in result.items():
        text = open(os.path.join(TOP, name), encoding="utf-8").read().splitlines()
        starts = functions(text)
        notes = collections.defaultdict(list)
        for line, count in coverage.lines.items():
            if not count:
                notes[line].append("never run")
        for (line, column), which, seen in coverage.outcomes():
            if not seen and coverage.lines[line]:
                notes[line].append(f"{column} never {'false' if which else 'true'}")
        last = None
        for line in sorted(notes):
            at = starts[bisect.bisect(starts, (line, "~")) - 1]
            if at != last:
                print(f"---- {name}:{at[0]} {at[1]}")
            last = at
            print(f"{line:5} {text[line - 1]}    <<{'; '.join(notes[line])}")


def report(result, lines_wanted, branches_wanted):
    """The table; how many files are at or above the thresholds, and how many not."""
    good = bad = 0
    for name, coverage in result.items():
        lines = len(coverage.lines)
        ran_lines = sum(1 for n in coverage.lines.values() if n)
        seen = [s for _, _, s in coverage.outcomes()]
        percent = 100 * ran_lines / max(lines, 1), 100 * sum(seen) / max(len(seen), 1)
        print(f"{name:13} lines {percent[0]:6.2f} % ({ran_lines} of {lines})   "
              f"branches {percent[1]:6.2f} % ({sum(seen)} of {len(seen)})")
        for what, got, wanted in ("lines", percent[0], lines_wanted), ("branches", percent[1], branches_wanted):
            good, bad = (good + 1, bad) if got >= wanted else (good, bad + 1)
            if got < wanted:
                print(f"FAIL {name}: {what}: got {got:.2f} %, wanted {wanted} %")
    return good, bad


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lines", type=float, default=95)
    parser.add_argument("--branches", type=float, default=90)
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("layers", nargs="*")
    args = parser.parse_args()
    if args.missing:
        show_missing(collect())
        return 0
    began, failed_layers = time.monotonic(), 0
    newest = max(os.path.getmtime(os.path.join(TOP, name)) for name in FILES)
    if not args.layers or any(os.path.getmtime(path) < newest for path in glob.glob(os.path.join(BIN, "*"))):
        shutil.rmtree(BIN, ignore_errors=True)
    os.makedirs(BIN, exist_ok=True)
    check = subprocess.run([sys.executable, os.path.join(TOP, "tests", "check.py"), *args.layers],
                           env={**os.environ, "COVERAGE": "1"})
    if check.returncode:
        print("FAIL tests: some have failed, see above")
        failed_layers = 1
    good, bad = report(collect(), args.lines, args.branches)
    print(f"measured in {time.monotonic() - began:.0f} s")
    print(f"{good + 1 - failed_layers} passed, {bad + failed_layers} failed")
    return 1 if bad or failed_layers else 0


sys.exit(main())
