#!/usr/bin/env python3
"""The command line as a user meets it.  usage: test_cli.py CVMS [-v] [NAME...]

Each function named test_... is one subject; NAMEs pick those that contain one of them.  Python's standard library and
the openssl command only; loopback only; every port is the system's choice.  The last line is `N passed, M failed`.
"""
import base64
import contextlib
import fcntl
import hashlib
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import harness  # noqa: E402
from harness import (  # noqa: E402
    GOAWAY, HEADERS, LIMIT, RST, SETTINGS, WINDOW, Collector, Server, Stream, W, check, end, environment, field, fields, first, frame,
    frames_of, has, hasnot, literal, log, named, read, run, same, sanitizers, sha3, shorten, skip, temp, write)


def read_fifo(path, seconds=5):
    """What is written into it; nothing if that does not come about in time."""
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        return os.read(fd, 65536) if select.select([fd], [], [], seconds)[0] else b""
    finally:
        os.close(fd)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def but(args, flag, value):
    """The flags with one of them set to this instead."""
    args = list(args)
    while flag in args:
        del args[args.index(flag):args.index(flag) + 2]
    return [*args, flag, value]


def manifest(name, args, env=None, **kw):
    """The JSON that these flags give, and the result."""
    r = run(name, ["manifest", *args], env, **kw)
    try:
        return (json.loads(r.out) if r.status == 0 else None), r
    except ValueError:
        check(f"{name}: JSON", False, r.out, "JSON")
        return None, r


def dig(value, path):
    for step in path.split("."):
        if value is None:
            return None
        if step.isdigit():
            value = value[int(step)] if int(step) < len(value) else None
        else:
            value = value.get(step)
    return value


def der(path):
    """A key file's base64, which is a bytes field's form in JSON, too."""
    return "".join(read(path).decode().split("\n")[1:-2])


def b64(data):
    return base64.b64encode(data).decode()


def join(parts):
    return b"".join(field(n, v) for n, v in parts)


# ---- Flags ----

def test_flag_syntax():
    """What is written, and where it must stand in the manifest."""
    base, need = W.base, W.required
    rows = [
        ("one dash", [*base, "-algo-type", "wasm"], "algorithm.algoType", "wasm"),
        ("two dashes", [*base, "--algo-type", "wasm"], "algorithm.algoType", "wasm"),
        ("=", [*base, "-algo-type=wasm"], "algorithm.algoType", "wasm"),
        ("two dashes and =", [*base, "--algo-type=wasm"], "algorithm.algoType", "wasm"),
        ("= in the value", [*base, "-client-ca-file=/a=b"], "agentConfig.clientCaFile", "/a=b"),
        ("= and then nothing", [*base, "-algo-type="], "algorithm.algoType", None),
        ("a value that begins with a dash", [*base, "-algo-args", "-x,--y"], "algorithm.algoArgs", ["-x", "--y"]),
        ("a value that is two dashes", [*base, "-client-ca-file", "--"], "agentConfig.clientCaFile", "--"),
        ("an empty value", [*base, "-client-ca-file", ""], "agentConfig.clientCaFile", None),
        ("last of two wins", [*base, "-algo-type", "wasm", "--algo-type=bin"], "algorithm.algoType", "bin"),
        ("a list in several uses is not split", [*base, "-algo-args", "a,b", "--algo-args=", "-algo-args", "c"], "algorithm.algoArgs",
         ["a,b", "", "c"]),
        ("-- at the end", [*base, "-algo-type", "wasm", "--"], "algorithm.algoType", "wasm"),
        ("empty elements", [*base, "-algo-args", ",a,,"], "algorithm.algoArgs", ["", "a", "", ""]),
        ("one comma", [*base, "-algo-args", ","], "algorithm.algoArgs", ["", ""]),
        ("UTF-8", [*base, "-algo-args", "größe=漢,😀"], "algorithm.algoArgs", ["größe=漢", "😀"]),
    ]
    for word in "1 t T TRUE true True 0 f F FALSE false False".split():
        rows.append((f"boolean {word}", [*base, "-attested-tls-bool", word], "agentConfig.attestedTls",
                     True if word in "1 t T TRUE true True".split() else None))
        rows.append((f"boolean ={word}", [*base, f"--attested-tls-bool={word}"], "agentConfig.attestedTls",
                     True if word in "1 t T TRUE true True".split() else None))
    for name, args, path, wanted in rows:
        got, r = manifest(f"syntax: {name}", args)
        if check(f"syntax: {name}: status", got is not None, f"{r.status} {r.err}", "0"):
            same(f"syntax: {name}", dig(got, path), wanted)
            hasnot(f"syntax: {name}: no warning", r.err, "warning")
    for name, args in (("-once=maybe", ["agent", "-once=maybe"]), ("-b=2", ["checksum", "-b=2", W.algo])):
        r = run(name, args)
        same(f"syntax: {name}: status", r.status, 2)
        has(f"syntax: {name}", r.err, "-once|-b", "not a boolean")
    for word, wanted in (("-b=true", True), ("-b=false", False), ("--b=T", True), ("-b", True)):
        r = run(word, ["checksum", word, W.algo])
        digest = bytes.fromhex(sha3(read(W.algo)))
        same(f"syntax: {word}", r.out.split()[:1], [b64(digest) if wanted else digest.hex()])
    sh = 'exec "$0" manifest --algo-path="%s" --public-key-path="%s" --attested-tls-bool="true" --algo-args="a b,c"'
    r = run("quoted", [], command=["sh", "-c", sh % (W.algo, W.key), W.cvms])
    same('syntax: --flag="value"', r.status == 0 and dig(json.loads(r.out), "algorithm.algoArgs"), ["a b", "c"])
    got, r = manifest("first word ends the flags", [*need, "stray", "-algo-path", W.algo])
    same("syntax: first word that is no flag: status", r.status, 2)
    has("syntax: first word that is no flag", r.err, '"?stray')


def test_every_flag():
    """Every flag of both generations, and where its value stands."""
    urls = ["-dataset-source-urls", "s3://b/x,gs://b/y", "-dataset-kbs-paths", "r/k/x,"]
    rows = [
        ("-algo-type", W.base, "python", "algorithm.algoType", "python"),
        ("-algo-args", W.base, "--epochs,10", "algorithm.algoArgs", ["--epochs", "10"]),
        ("-client-ca-file", W.base, "/etc/ca.pem", "agentConfig.clientCaFile", "/etc/ca.pem"),
        ("-data-paths", W.base, W.data, "datasets.0.hash", b64(bytes.fromhex(sha3(read(W.data))))),
        ("-data-paths", W.base, W.data, "datasets.0.filename", "data.csv"),
        ("-algo-source-url", W.remote, "docker://r/x", "algorithm.source.url", "docker://r/x"),
        ("-algo-kbs-path", W.remote, "a/b/c", "algorithm.source.kbsResourcePath", "a/b/c"),
        ("-algo-kbs-path", W.remote, "a/b/c", "algorithm.source.encrypted", True),
        ("-algo-hash", W.remote, "0F" * 32, "algorithm.hash", b64(b"\x0f" * 32)),
        ("-algo-source-type", W.remote, "https", "algorithm.source.type", "https"),
        ("-kbs-url", W.remote, "http://k", "kbs", {"url": "http://k", "enabled": True}),
        ("-kbs-url", W.remote, "http://k", "algorithm.kbs", {"url": "http://k", "enabled": True}),
        ("-algo-kbs-url", W.remote, "http://q", "algorithm.kbs", {"url": "http://q", "enabled": True}),
        ("-algo-kbs-url", W.remote, "http://q", "kbs", {"url": "http://kbs:8080", "enabled": True}),
        ("-dataset-source-urls", W.remote + urls, "oci:a:b,http://z", "datasets.1.source.url", "http://z"),
        ("-dataset-kbs-paths", W.remote + urls, ",k", "datasets.1.source.kbsResourcePath", "k"),
        ("-dataset-kbs-paths", W.remote + urls, ",k", "datasets.0.source.encrypted", None),
        ("-dataset-kbs-urls", W.remote + urls, "http://1,http://2", "datasets.1.kbs.url", "http://2"),
        ("-dataset-source-type", W.remote + urls, "gs", "datasets.0.source.type", "gs"),
        ("-dataset-hash", W.remote + urls, "01" * 32, "datasets.1.hash", b64(b"\x01" * 32)),
        ("-dataset-decompress", W.remote + urls, "true", "datasets.0.decompress", True),
        ("-dataset-decompress", W.remote + urls, "true", "datasets.1.decompress", None),
        ("-dataset-decompress", W.remote + urls, "false,1", "datasets.1.decompress", True),
        ("-dataset-decompress", W.remote + urls, ",T", "datasets.1.decompress", True),
        ("-public-key-path", W.base, W.ecc, "resultConsumers.0.userKey", der(W.ecc)),
        ("-set", W.remote + urls, "datasets[0].source.type=gs", "datasets.0.source.type", "gs"),
        ("-dataset-encrypted", W.remote + urls, "false,true", "datasets.0.source.encrypted", None),
        ("-dataset-encrypted", W.remote + urls, "false,true", "datasets.1.source.encrypted", True),
        ("-dataset-encrypted", W.remote + urls[:2], "false,0", "datasets.1.source.url", "gs://b/y"),
        ("-dataset-hashes", W.remote + urls, f"{'01' * 32},{'02' * 32}", "datasets.1.hash", b64(b"\x02" * 32)),
        ("-dataset-hashes", [*W.remote, *urls, "-dataset-hash", "03" * 32], f"{'01' * 32},{'02' * 32}", "datasets.0.hash",
         b64(b"\x01" * 32)),
        ("-set", W.remote + urls, "datasets[1].filename=b,=.csv", "datasets.1.filename", "b,=.csv"),
        ("-set", [*W.base, "-data-paths", W.data], "datasets[0].filename=mine.csv", "datasets.0.filename", "mine.csv"),
        ("-set", [*W.base, "-data-paths", W.data], "datasets[1].decompress=true", "datasets.1.decompress", True),
        ("-set", [*W.base, "-algo-args", "a,b"], "algorithm.algo_args[2]=c", "algorithm.algoArgs.2", "c"),
        ("-dataset-public-key-paths", W.remote + urls, f"{W.rsa},", "datasets.0.userKey", der(W.rsa)),
        ("-dataset-public-key-paths", W.remote + urls, f"{W.rsa},", "datasets.1.userKey", der(W.key)),
        ("-algo-encrypted", W.remote, "false", "algorithm.source.encrypted", None),
        ("-algo-encrypted", [*W.required, "-algo-source-url", "s3://plain"], "false", "algorithm.source.url", "s3://plain"),
        ("-algo-encrypted", W.base, "true", "algorithm.source", None),
        ("-algo-public-key-path", W.base, W.rsa, "algorithm.userKey", der(W.rsa)),
        ("-algo-public-key-path", W.base, W.rsa, "resultConsumers.0.userKey", der(W.key)),
        ("-result-consumer-keys", W.base, f"{W.rsa},{W.ecc}", "resultConsumers",
         [{"userKey": der(W.rsa)}, {"userKey": der(W.ecc)}]),
        ("-set", W.base, "id=c-1", "id", "c-1"), ("-set", W.base, "description=", "description", None),
        ("-set", W.base, "agent_config.port=7", "agentConfig.port", "7"),
        ("-set", W.base, "agent_config.log_level=debug", "agentConfig.logLevel", "debug"),
        ("-set", W.base, "agent_config.attested_tls=true", "agentConfig.attestedTls", True),
        ("-set", W.base, "algorithm.kbs.url=http://k", "algorithm.kbs.url", "http://k"),
        ("-set", [*but(W.remote, "-kbs-url", ""), "-algo-kbs-url", "http://one"], "algorithm.kbs.url=http://two", "kbs.url", "http://one"),
        ("-compat", W.remote, "seed", "algorithm.kbs", None),
        ("-compat", W.remote, "head", "kbs", None),
        ("-compat", W.base + ["-data-paths", W.data], "head", "datasets.0.filename", None),
    ]
    for flag, base, value, path, wanted in rows:
        got, r = manifest(flag, but(base, flag, value))
        if check(f"flag {flag}: status", got is not None, f"{r.status} {r.err}", "0"):
            same(f"flag {flag} {value}: {path}", dig(got, path), wanted)
    got, r = manifest("defaults", W.remote + urls)
    for path, wanted in (("id", "1"), ("name", "sample computation"), ("description", "sample descrption"),
                         ("agentConfig", {"port": "7002"}), ("algorithm.source.type", "oci-image"),
                         ("datasets.0.filename", "dataset_0.csv"), ("datasets.1.filename", "dataset_1.csv"),
                         ("datasets.1.source.type", "oci-image"), ("datasets.0.hash", b64(bytes(32))),
                         ("datasets.0.decompress", None)):
        same(f"default: {path}", dig(got, path), wanted)


def test_precedence():
    """Local and remote in one command line, as the reference has it."""
    got, r = manifest("remote algorithm wins", [*W.remote, "-algo-path", W.algo])
    same("both algorithms given: the remote one", dig(got, "algorithm.source.url"), "https://h/a")
    has("both algorithms given: warning", r.err, "warning", "-algo-path", "not used")
    got, r = manifest("remote data wins", [*W.remote, *W.remote_data, "-data-paths", W.data])
    same("both kinds of datasets given: the remote ones", len(dig(got, "datasets") or []), 2)
    has("both kinds of datasets given: warning", r.err, "warning", "-data-paths", "not used")
    got, r = manifest("mixed", [*W.remote, "-data-paths", W.data])
    same("remote algorithm, local data", dig(got, "datasets.0.filename"), "data.csv")
    got, r = manifest("mixed", [*W.base, *W.remote_data, "-kbs-url", "http://k", "-dataset-hash", "00" * 32])
    same("local algorithm, remote data", dig(got, "datasets.1.filename"), "dataset_1.csv")


def test_positional():
    """The older form ALGO PUBKEY BOOL [DATA...]."""
    a = [W.algo, W.key, "true"]
    for name, args, path, wanted in (
            ("without data", a, "agentConfig.attestedTls", True),
            ("algorithm", a, "algorithm.hash", b64(bytes.fromhex(sha3(read(W.algo))))),
            ("with data", [*a, W.data, W.algo], "datasets.0.hash", b64(bytes.fromhex(sha3(read(W.data))))),
            ("with data", [*a, W.data, W.algo], "datasets.1.hash", b64(bytes.fromhex(sha3(read(W.algo))))),
            ("behind --", ["--", *a, W.data], "datasets.0.hash", b64(bytes.fromhex(sha3(read(W.data)))))):
        got, r = manifest(f"positional {name}", args)
        same(f"positional {name}: status", r.status, 0)
        same(f"positional {name}: {path}", dig(got, path), wanted)
        has(f"positional {name}: warning names the flags", r.err, "warning", "-algo-path", "-public-key-path")
    for name, args, words in (("too few", a[:2], ["-help"]), ("bad boolean", [*a[:2], "perhaps"], ["perhaps"]),
                              ("algorithm that is not there", ["nope", *a[1:]], ["-algo-path", "nope"]),
                              ("data that is not there", [*a, "nope.csv"], ["-data-paths", "nope.csv"])):
        r = run(f"positional {name}", args)
        check(f"positional {name}: status", r.status in (1, 2), r.status, "1 or 2")
        has(f"positional {name}", r.err, *words)
    with Server("positional server", base=[*a, W.data]) as s:
        same("positional server: agent", s.stand_in().status, 0)


def test_removed_flags():
    for flag in ("-ca-url", "-cvm-id", "-cmv-id", "-dataset-type"):
        for args in ([flag, "http://x"], [f"-{flag}=x"]):
            got, r = manifest(f"removed {flag}", [*args, *W.base, "-data-paths", W.data])
            same(f"removed {args}: goes on", dig(got, "datasets.0.filename"), "data.csv")
            has(f"removed {args}: warning", r.err, "warning", f"{flag}\\b")
            has(f"removed {args}: what to do", r.err, flag, "removed|deprecated", "leave it out|without effect|use ")


def test_unknown_flag():
    rows = [("-algo-pth", "-algo-path"), ("--data-path=x", "-data-paths"), ("-kbs-ur", "-kbs-url"),
            ("-dataset-kbs-url", "-dataset-kbs-urls"), ("-algo_hash", "-algo-hash"), ("-Algo-Type", "-algo-type"),
            ("-public-key", "-public-key-path"), ("-attested-tls", "-attested-tls-bool"), ("-readyfile", "-ready-file"),
            ("-compat-all", "-compat"), ("-pubilc-key-path", "-public-key-path"), ("-dataset-source-url",
             "-dataset-source-urls"), ("-hepl", "-help"), ("-outptu", "-output"), ("-nutil", "-until"), ("-tiemout", "-timeout")]
    for word, near in rows:
        r = run(f"unknown {word}", [*W.base, word, "x"] if "=" not in word else [*W.base, word])
        same(f"unknown {word}: status", r.status, 2)
        has(f"unknown {word}: suggests {near}", r.err, re.escape(word.lstrip("-").split("=")[0]), f"{near}\\b")
    for word in ("-xyzzy", "-x", "-=x", "-é", "-" + "a" * 5000):
        r = run(f"unknown {word}", [*W.base, word])
        same(f"unknown {word[:20]}: status", r.status, 2)
        has(f"unknown {word[:20]}", r.err, "flag", "-help")
    same("unknown ---algo-path: status", run("unknown ---algo-path", [*W.base, "---algo-path", W.algo]).status, 2)
    for word, args in (("-wait", ["manifest", *W.base, "-wait", "1s"]), ("-o", [*W.base, "-o", "x"]),
                       ("-output", ["manifest", *W.base, "-output", "json"]), ("-fail", ["health", "-fail", "x"]),
                       ("-algo-path", ["agent", "-algo-path", "x"])):
        r = run(f"{word} elsewhere", args)
        same(f"{word} of another command: status", r.status, 2)
        has(f"{word} of another command", r.err, f"{word}\\b", "flag")
    for flag in ("-algo-path", "-data-paths", "-public-key-path", "-compat", "-ready-file", "-max-message", "-ca-url"):
        r = run(f"{flag} without value", [*W.base, flag])
        same(f"{flag} without value: status", r.status, 2)
        has(f"{flag} without value", r.err, f"{flag}\\b", "value")


SERVER_FLAGS = """public-key-path attested-tls-bool algo-path data-paths algo-source-url algo-kbs-path dataset-source-urls
    dataset-kbs-paths kbs-url algo-kbs-url dataset-kbs-urls algo-source-type dataset-source-type algo-type algo-args
    algo-hash dataset-hash dataset-decompress client-ca-file dataset-type compat output ready-file max-message max-connections help
    ca-url cvm-id cmv-id""".split()
OTHER_FLAGS = "wait repeat once fail job-id service b o key new-key".split()


def test_help():
    for args in (["-help"], ["--help"], ["-h"], ["help"], ["-help", "-nonsense"], ["agent", "-help"], ["manifest", "-help"],
                 ["checksum", "-help"], ["health", "--help"], [*W.base, "-help"]):
        r = run(f"help {args[0]}", args)
        same(f"help {args}: status", r.status, 0)
        check(f"help {args}: on stdout", "-" in r.out, r.out, "the flags")
        if "-nonsense" not in args:
            same(f"help {args}: nothing on stderr", r.err, "")
    short, r = run("help", ["-h"]).out, run("help", ["-help"])
    same("help: a word for it", run("help", ["help"]).out, r.out)
    same("help: a word for it, and a command", run("help", ["help", "agent"]).out, run("help", ["agent", "-help"]).out)
    same("-h of a command: its help", run("help", ["agent", "-h"]).out, run("help", ["agent", "-help"]).out)
    check("-h: a screen", len(short.splitlines()) <= 40, len(short.splitlines()), "at most 40 lines")
    has("-h: the rest", short, "cvms -help", "COMMAND -h")
    groups = re.findall(r"^([A-Z][A-Za-z ]+):$", r.out, re.M)
    same("help: groups", groups, ["Commands", "Inputs", "Delivery", "Manifest", "Output", "TLS", "Smoke test", "Advanced", "Environment"])
    flat = re.sub(r"\n {20,}", " ", r.out)    # entries without their folds
    for flag in SERVER_FLAGS + OTHER_FLAGS:
        has(f"help lists -{flag}", flat, rf"^\s+-{flag}( |$)", r"\S{3,} \S+")
    for flag, default in (("algo-source-type", "oci-image"), ("dataset-source-type", "oci-image"), ("compat", "all"),
                          ("output", "text"), ("max-message", "4194304|4 MiB"), ("wait", "10s"), ("repeat", "1"),
                          ("HOST", "localhost"), ("PORT", "7001"), ("algo-hash", "32 zero bytes"),
                          ("dataset-decompress", "false"), ("ADDR", "localhost:7001")):
        has(f"help: default of {flag}", flat, rf"^\s*-?{flag}\b", rf"default.*({default})")
    for command, own, others in (("agent", "fail", "service"), ("manifest", "o", "until"), ("checksum", "b", "wait"),
                                 ("health", "service", "fail"), ("manifest", "algo-path", "fault"), ("encrypt", "new-key", "once"),
                                 ("decrypt", "key", "new-key")):
        has(f"help lists cvms {command}", r.out, f"cvms {command} ")
        help_of = run(f"help {command}", [command, "-help"]).out
        has(f"help of {command}: its own flags", help_of, rf"^  -{own}( |$)")
        hasnot(f"help of {command}: nothing else's", help_of, rf"^  -{others}( |$)")
    commands = "".join(run(f"help {c}", [c, "-h"]).out for c in ("agent", "manifest", "checksum", "health", "encrypt", "decrypt"))
    widest = max(map(len, (r.out + short + commands).splitlines()))
    check("help: under 100 columns", widest < 100, widest, 99)
    hasnot("help: no bracket twice", flat, r"\) \(")
    examples = re.findall(r"^  (?:HOST= PORT=7001 \S+ \S+ )?cvms (.+)", short.split("Examples:")[1], re.M)
    same("help: examples", len(examples), 3)
    manifest = write(os.path.join(temp(), "manifest.json"), run("help: a manifest", ["manifest", *W.base]).out.encode())
    files = {"algo.py": W.algo, "data.csv": W.data, "pub.pem": W.key, "manifest.json": manifest}
    for example in examples:
        args = [files.get(a, a) for a in example.replace("out.zip", os.path.join(temp(), "out.zip")).split()]
        smoke = "-until" in args
        same(f"help: {example}", run(f"help: {example}", [*args, "-timeout", "1ms"], env={"PORT": "0"}, limit=15).status,
             4 if smoke else 2)
        if not smoke:
            same(f"help: {example}", run(f"help: {example}", ["manifest", *args]).status, 0)
    r = run("version", ["-version"])
    same("-version: status", r.status, 0)
    has("-version", r.out, r"cvms \d+\.\d+")
    for line in ("compiler: (gcc|clang) \\d", "C library: ", "TLS: (BearSSL|none)", "SHA3: (portable|BMI2|AVX)"):
        has("-version", r.out, "^" + line)
    for word, flag in (("-v", "-version"), ("-V", "-version"), ("-?", "-h")):
        r = run(f"help: {word}", [word])
        same(f"help: {word}", (r.status, r.out, r.err), (0, run(f"help: {flag}", [flag]).out, ""))
    with open("/dev/full", "wb") as full:
        same("help into a full device: status", run("help", ["-help"], stdout=full).status, 1)


# ---- Start-up mistakes ----

def refused(name, args, status, rows, env=None, **kw):
    """The server form of a command line that must not start.  rows: patterns that one line of stderr must match."""
    ready = os.path.join(temp("refused"), "ready")
    r = run(name, [*args, "-ready-file", ready] if "-ready-file" not in args else args, env, **kw)
    same(f"{name}: status", r.status, status)
    for patterns in rows if rows and isinstance(rows[0], tuple) else [tuple(rows)]:
        has(name, r.err, *patterns)
    same(f"{name}: nothing on stdout", r.out, "")
    check(f"{name}: no ready file", not os.path.exists(ready), "one", "none")
    hasnot(f"{name}: not listening", r.err, "listening at")
    hasnot(f"{name}: no raw control characters", r.err, r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")
    return r


def test_mistakes_usage():
    base, remote, data = W.base, W.remote, W.remote_data
    h64 = "ab" * 32
    rows = [
        ("no key", ["-algo-path", W.algo, "-attested-tls-bool", "0"], [("-public-key-path", "missing|required", "PEM")]),
        ("empty key path", [*base, "-public-key-path="], [("-public-key-path", "missing|required|empty")]),
        ("no boolean", ["-algo-path", W.algo, "-public-key-path", W.key], [("-attested-tls-bool", "true", "false")]),
        ("no algorithm", W.required, [("-algo-path", "-algo-source-url")]),
        ("empty algorithm", [*base, "-algo-path="], [("-algo-path", "-algo-source-url")]),
        ("data only", [*W.required, "-data-paths", W.data], [("no algorithm|missing", "-algo-path")]),
        ("URL without KBS path", [*W.required, "-algo-source-url", "s3://x"], [("-algo-source-url", "-algo-kbs-path")]),
        ("KBS path without URL", [*W.required, "-algo-kbs-path", "x"], [("-algo-source-url", "-algo-kbs-path")]),
        ("URL without KBS path beside a file", [*base, "-algo-source-url", "s3://x"], [("-algo-source-url", "-algo-kbs-path")]),
        ("dataset URL without KBS path", [*base, "-dataset-source-urls", "s3://x"],
         [("-dataset-source-urls", "-dataset-kbs-paths")]),
        ("dataset KBS path without URL", [*base, "-dataset-kbs-paths", "x"], [("-dataset-source-urls", "-dataset-kbs-paths")]),
        ("fewer KBS paths", but(remote + data, "-dataset-kbs-paths", "a"), [("-dataset-kbs-paths", r"\b1\b", r"\b2\b")]),
        ("more KBS paths", but(remote + data, "-dataset-kbs-paths", "a,b,c"), [("-dataset-kbs-paths", r"\b3\b", r"\b2\b")]),
        ("fewer KBS URLs", [*remote, *data, "-dataset-kbs-urls", "http://a"], [("-dataset-kbs-urls", r"\b1\b", r"\b2\b")]),
        ("more KBS URLs", [*remote, *data, "-dataset-kbs-urls", "a,b,c"], [("-dataset-kbs-urls", r"\b3\b", r"\b2\b")]),
        ("empty dataset", [*base, "-data-paths", f"{W.data},"], [("-data-paths", "empty", "comma|2")]),
        ("empty URL of a dataset", but(remote + data, "-dataset-source-urls", "s3://a,"), [("-dataset-source-urls", "2 is empty")]),
        ("unknown -compat", [*base, "-compat", "newest"], [("-compat", "newest", "all", "seed", "head")]),
        ("empty -compat", [*base, "-compat", ""], [("-compat", "all", "seed", "head")]),
        ("unknown -output", [*base, "-output", "yaml"], [("-output", "yaml", "text", "json")]),
        ("-max-message 0", [*base, "-max-message", "0"], [("-max-message", '"0"')]),
        ("-max-message -5", [*base, "-max-message", "-5"], [("-max-message", "-5")]),
        ("-max-message 4MiB", [*base, "-max-message", "4MiB"], [("-max-message", "4MiB", "number")]),
        ("-max-connections 0", [*base, "-max-connections", "0"], [("-max-connections", '"0"')]),
        ("-max-connections over the limit of descriptors", [*base, "-max-connections", "4294967295"],
         [("-max-connections", "4294967295", "limit of descriptors", "ulimit")]),
        ("-max-message of 2^64", [*base, "-max-message", "18446744073709551617"], [("-max-message", "number")]),
        ("-max-connections of 2^32", [*base, "-max-connections", "4294967296"], [("-max-connections", "4294967296", "number")]),
        ("-timeout 1.5", [*base, "-timeout", "1.5"], [("-timeout", '"1.5"', "no unit", "90s")]),
        ("-timeout of over ten years", [*base, "-timeout", "87661h"], [("-timeout", "87661h", "longer than ten years")]),
        ("-timeout negative", [*base, "-timeout", "-5s"], [("-timeout", "-5s", "negative")]),
        ("-algo-encrypted maybe", [*remote, "-algo-encrypted", "maybe"], [("-algo-encrypted", '"maybe"', "true", "false")]),
        ("-algo-encrypted true and no KBS path", [*W.required, "-algo-source-url", "s3://x", "-algo-encrypted", "true"],
         [("-algo-source-url", "-algo-kbs-path")]),
        ("one dataset said to be plain, no KBS paths", [*remote, *data[:2], "-dataset-encrypted", "false,true"],
         [("-dataset-source-urls", "-dataset-kbs-paths")]),
        ("two dataset hashes for one", [*base, "-data-paths", W.data, "-dataset-hashes", f"{h64},{h64}"],
         [("-dataset-hashes", r"\b2 elements for 1 dataset\b")]),
        ("an id of 1,025 bytes", [*base, "-set", "id=" + "x" * 1025], [("id", "1025 bytes", "at most 1024")]),
        ("-set without a value", [*base, "-set", "id"], [("-set", '"id"', "PATH=VALUE")]),
        ("-set without a path", [*base, "-set", "=x"], [("-set", '"=x"', "PATH=VALUE")]),
        ("-set of an unknown field", [*base, "-set", "agent_config.prot=1"], [("-set agent_config.prot=1", "unknown field", "AgentConfig has port")]),
        ("-set behind the end", [*base, "-set", "datasets[2].filename=x"], [("-set datasets", "2")]),
        ("-set of a bool", [*base, "-set", "agent_config.attested_tls=maybe"], [("-set agent_config.attested_tls=maybe", "true")]),
        ("-dataset-hashes not hex", [*remote, *data, "-dataset-hashes", f"{'ab' * 32},x"], [("-dataset-hashes", '"x"', "hex")]),
        ("a lone dash", [*base, "-"], [('"-"|stray| -( |$)',)]),
        ("a stray word", [*base, "stray"], [("stray",)]),
        ("unknown command", ["frobnicate", "-ready-file"], [("frobnicate", "-help")]),
    ]
    for port in ("0", "65536", "-1", "x", " 7002"):
        rows.append((f"port {port!r}", [*base, "-set", f"agent_config.port={port}"], [("-set agent_config.port", re.escape(f'"{port}"'), "65535")]))
    for bad in ("maybe", "", "yes", " true", "TrUe", "2", "on"):
        rows.append((f"boolean {bad!r}", [*base, "-attested-tls-bool", bad],
                     [("-attested-tls-bool", re.escape(f'"{bad}"'), "true", "false")]))
    for flag in ("-algo-hash", "-dataset-hash"):
        for why, bad in (("63 digits", h64[1:]), ("65 digits", h64 + "0"), ("not hex", "zz" * 32), ("0x", "0x" + h64),
                         ("a blank", h64[:-1] + " "), ("base64", b64(bytes(32))), ("very long", "ab" * 5000)):
            rows.append((f"{flag} {why}", [*remote, *data, flag, bad], [(flag, "64", "hex")]))
    for name, args, patterns in rows:
        refused(f"usage: {name}", args, 2, patterns)
    for flag in ("-client-san", "-client-ca-certs"):
        refused(f"usage: {flag} without a certificate", [*base, flag, "x"], 1, [flag, "needs TLS", "-server-cert"])
    refused("usage: -allow-no-alpn without a certificate", [*base, "-allow-no-alpn"], 1, ["-allow-no-alpn", "needs TLS"])
    r = refused("usage: half a remote algorithm", [*W.required, "-algo-source-url", "s3://x"], 2, ["-algo-kbs-path"])
    hasnot("usage: half a remote algorithm: told once", r.err, "no algorithm")
    for words, patterns in ((["agnet"], ("did you mean agent",)), (["agnet", "localhost:7001"], ("did you mean agent",)),
                            (["cheksum", "x"], ("did you mean checksum",)), (["server"], ("needs no word", "-help"))):
        r = run(f"no command {words}", words)
        same(f"no command {words}: status", r.status, 2)
        has(f"no command {words}", r.err, re.escape(f'"{words[0]}"'), *patterns)
    for flag, patterns in (("-port", ("PORT",)), ("-host", ("HOST",)), ("-timeut", ("-timeout",)), ("-tsl", ("cvms -help",))):
        refused(f"usage: {flag}", [*base, flag, "1"], 2, [f"flag {flag}", *patterns])
    r = run("health", ["health", "127.0.0.1:1", "-insecur"])
    has("a flag behind the address", r.err, "-insecure")
    r = run("checksum", ["checksum", W.algo, "-b"])
    has("a flag behind a path", r.out, "^[A-Za-z0-9+/]{43}=  ")
    r = run("looks like a flag", ["manifest", *base, "-algo-type", "-data-paths"])
    has("a value that looks like a flag: it counts", r.out, '"algoType": "-data-paths"')
    has("a value that looks like a flag", r.err, "-algo-type", '"-data-paths"', "looks like a flag")
    for words in (["frobnicate"], [W.algo, W.key]):
        r = run(f"no command {words}", words)
        same(f"no command {words}: status", r.status, 2)
        same(f"no command {words}: one line", len(r.err.splitlines()), 1)
        has(f"no command {words}", r.err, re.escape(f'"{words[0]}"'), "agent, manifest, checksum, health, encrypt, decrypt", "-help")
    for port in ("abc", "-1", "65536", "7001x", "0x10", " 80", "1e3", "99999999999999999999"):
        refused(f"usage: PORT {port!r}", base, 2, ["PORT", re.escape(port), "65535"], {"PORT": port})


def test_newcomer():
    """The likeliest first mistakes: all that is said of each, a line or two."""
    d = temp("newcomer")
    harness.shell(f"cp {W.algo} {W.data} {d}; openssl genrsa -out private.pem 2048; openssl rsa -in private.pem -pubout -out pub.pem; "
          "echo 'ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAABgQC7 me@host' >id.pub", cwd=d)
    key, no = ["-public-key-path", "pub.pem", "-attested-tls-bool", "false"], "-attested-tls-bool is missing: give true if agents are " \
        "to serve attested TLS, else false"
    base = ["-algo-path", "algo.py", *key]
    named = "is neither a command (agent, manifest, checksum, health, encrypt, decrypt) nor a flag; see cvms -help"
    pem = 'not a public key in PEM ("BEGIN PUBLIC KEY"); make one with:'
    rows = [
        ("nothing", 2, [], ["no flags: cvms -h shows which are needed, with examples"]),
        ("a word for the server", 2, ["server"], ['"server" is no command: the server needs no word, only its flags; see cvms -help']),
        ("a word for the server, and flags", 2, ["server", *base], ['"server" is no command: the server needs no word, only its flags; see cvms -help']),
        ("a word of another program", 2, ["up"], [f'"up" {named}']),
        ("a command misspelt", 2, ["agnet"], ['"agnet" is no command: did you mean agent?']),
        ("a way misspelt", 2, ["-algo-path", "algo.py", "-algo-type", "bin", "-deliver", "uplaod"],
         ['-deliver: "uplaod" is no way to deliver; use cli, upload, http, http-plain, oci or oci-plain']),
        ("a file without its flag", 2, ["algo.py", *key], [f'"algo.py" {named}']),
        ("a flag misspelt", 2, [*base, "-utnil", "ready"], ["unknown flag -utnil: did you mean -until?"]),
        ("the port as a flag", 2, [*base, "-port", "7001"], ["there is no flag -port: set PORT, as in PORT=7001 cvms FLAGS"]),
        ("a file that is not there", 1, ["-algo-path", "algo.pi", *key], ["-algo-path: algo.pi: No such file or directory"]),
        ("a private key for the public one", 1, ["-algo-path", "algo.py", "-public-key-path", "private.pem", *key[2:]],
         [f"-public-key-path: private.pem: is a private key, to be kept to yourself, {pem} openssl pkey -in private.pem -pubout"]),
        ("a key of ssh", 1, ["-algo-path", "algo.py", "-public-key-path", "id.pub", *key[2:]],
         [f"-public-key-path: id.pub: is an OpenSSH public key, {pem} ssh-keygen -e -m PKCS8 -f id.pub"]),
        ("no key at all", 2, ["-algo-path", "algo.py"],
         ["-public-key-path is missing: give the PEM file with the public key of the users, or -deliver upload, which makes a key", no]),
        ("a value forgotten", 2, ["-algo-path", "algo.py", *key[:2], "-attested-tls-bool"],
         ["-attested-tls-bool needs a value: -attested-tls-bool BOOL"]),
        ("a flag for a value", 2, [*base, "-until", "-timeout", "5m"],
         ['warning: -until: its value "-timeout" looks like a flag; if it is one, give -until its value STAGE',
          '"5m" is not a flag (flags end at the first word without a dash); see cvms -help',
          '-until: "-timeout" is not known; use connected, accepted, running, ready or complete']),
        ("a list with blanks", 2, [*base, "-data-paths", "data.csv", "data.csv"],
         ['"data.csv" is not a flag (flags end at the first word without a dash); see cvms -help']),
        ("a blank behind a comma", 1, [*base, "-data-paths", "data.csv, data.csv"],
         ["-data-paths:  data.csv: No such file or directory (it begins with a blank)"]),
        ("a number of seconds", 2, [*base, "-until", "ready", "-timeout", "60"],
         ['-timeout: "60" has no unit; write it like 90s or 2m30s']),
        ("a stage that is none", 2, [*base, "-until", "done"],
         ['-until: "done" is not known; use connected, accepted, running, ready or complete']),
        ("no stage for a report", 2, [*base, "-report", "r.xml"], ["-report: there is no verdict; add -until STAGE"]),
        ("a host with a port", 2, {"HOST": "localhost:7001"},
         ['HOST: "localhost:7001" has a port, which goes into PORT: set HOST=localhost PORT=7001']),
        ("a URL for an agent", 2, ["agent", "http://localhost:7001"],
         ['"http://localhost:7001" is not an address; it is no URL here: leave out what comes before the host, and write it like '
          "localhost:7001 or [::1]:7001"]),
    ]
    for name, status, args, lines in rows:
        r = run(f"newcomer: {name}", base if isinstance(args, dict) else args, args if isinstance(args, dict) else None, cwd=d)
        same(f"newcomer: {name}: status", r.status, status)
        same(f"newcomer: {name}", r.err.splitlines(), [f"cvms: {x}" for x in lines])
        same(f"newcomer: {name}: nothing on stdout", r.out, "")
    with Server("newcomer: a port that is taken", base=["-algo-path", W.algo, *W.required]) as s:
        r = run("newcomer: a port that is taken", base, {"PORT": str(s.port)}, cwd=d)
        same("newcomer: a port that is taken", r.err.replace("Address in use", "Address already in use"),  # musl's words, glibc's
             f"cvms: HOST, PORT: can't listen at 127.0.0.1 port {s.port}: Address already in use; "
             "another program has it: set PORT to a free one, or to 0 for any\n")
    r = run("newcomer: no agent", [*base, "-until", "ready", "-timeout", "100ms"], cwd=d)
    same("newcomer: no agent: status", r.status, 4)
    same("newcomer: no agent", r.err.splitlines()[-1], "cvms: TIMED OUT: ready not reached after 0.100 s: no agent connected: is one "
         "running, with this server in its AGENT_CVM_GRPC_URL? (exit status 4)")


def test_mistakes_files():
    d = temp("files")
    write(f"{d}/tree/a")
    os.symlink("nowhere", write(f"{d}/dangling/a") + "-link")
    os.symlink(f"{d}/tree", write(f"{d}/todir/a") + "-link")
    os.mkfifo(f"{d}/fifo")
    os.mkdir(f"{d}/fifotree")
    os.mkfifo(f"{d}/fifotree/fifo")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(f"{d}/sock")
    missing, base = f"{d}/none.csv", W.base
    rows = [
        ("algorithm not there", [*base, "-algo-path", missing], ["-algo-path", "none.csv", "No such file"]),
        ("dataset not there", [*base, "-data-paths", f"{W.data},{missing}"], ["-data-paths", "none.csv", "No such file"]),
        ("folder not there", [*base, "-data-paths", f"{d}/no/x"], ["-data-paths", "no/x", "No such file"]),
        ("a file as a folder", [*base, "-data-paths", f"{W.data}/x"], ["-data-paths", "data.csv/x", "Not a dir"]),
        ("link to nothing in a folder", [*base, "-data-paths", f"{d}/dangling"], ["-data-paths", "a-link"]),
        ("link to a folder in a folder", [*base, "-data-paths", f"{d}/todir"], ["-data-paths", "a-link"]),
        ("a FIFO", [*base, "-data-paths", f"{d}/fifo"], ["-data-paths", "fifo"]),
        ("a FIFO in a folder", [*base, "-data-paths", f"{d}/fifotree"], ["-data-paths", "fifo"]),
        ("a socket", [*base, "-data-paths", f"{d}/sock"], ["-data-paths", "sock"]),
        ("a device", [*base, "-algo-path", "/dev/zero"], ["-algo-path", "/dev/zero"]),
        ("a name that is too long", [*base, "-algo-path", "x" * 300], ["-algo-path", "too long"]),
        ("a path that is too long", [*base, "-algo-path", "/x" * 4000], ["-algo-path", "too long"]),
        ("key not there", [*base, "-public-key-path", missing], ["-public-key-path", "none.csv", "No such file"]),
        ("key is a folder", [*base, "-public-key-path", d], ["-public-key-path", re.escape(d), "director"]),
        ("key is a device", [*base, "-public-key-path", "/dev/zero"], ["-public-key-path", "/dev/zero"]),
        ("key is no device", [*base, "-public-key-path", "/dev/null"], ["-public-key-path", "/dev/null", "empty"]),
        ("odd name", [*base, "-data-paths", "a\nb\x1b[31m\u202e"], ["-data-paths", r"\ba\S+b\S+\[31m", "No such file"]),
        ("ready file nowhere", [*base, "-ready-file", f"{d}/no/ready"], ["-ready-file", "no/ready", "No such file"]),
        ("ready file is a folder", [*base, "-ready-file", d], ["-ready-file", re.escape(d), "directory"]),
    ]
    for name, args, patterns in rows:
        refused(f"files: {name}", args, 1, patterns)
    # Another option's mistake must not be laid at the algorithm's door.
    r = refused("files: dataset not there, no algorithm", [*W.required, "-data-paths", missing], 2,
                [("no algorithm",), ("-data-paths", "none.csv")])
    hasnot("files: dataset not there, no algorithm: blame", r.err, "-algo-path: .*none.csv")


def unreadable(name, args, patterns):
    """As a user who may not read: nobody, when the tests run as root."""
    who = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    ready = os.path.join(temp("unreadable"), "ready")
    r = run(name, [*([] if "-ready-file" in args else ["-ready-file", ready]), *args], **who)
    check(f"{name}: no ready file", not os.path.exists(ready), "one", "none")
    same(f"{name}: status", r.status, 1)
    has(name, r.err, *patterns)


def test_mistakes_unreadable():
    d = temp("unreadable")
    os.chmod(d, 0o755)
    secret = write(f"{d}/secret.csv", mode=0)
    write(f"{d}/tree/inner", mode=0)
    write(f"{d}/locked/inner")
    os.chmod(f"{d}/tree", 0o755)
    os.chmod(f"{d}/locked", 0)
    unreadable("unreadable dataset", [*W.base, "-data-paths", secret], ["-data-paths", "secret.csv", "denied"])
    unreadable("unreadable algorithm", [*W.base, "-algo-path", secret], ["-algo-path", "secret.csv", "denied"])
    unreadable("unreadable key", [*W.base, "-public-key-path", secret], ["-public-key-path", "secret.csv", "denied"])
    unreadable("unreadable file in a folder", [*W.base, "-data-paths", f"{d}/tree", "-ready-file", "/dev/null"],
               ["-data-paths", "inner", "denied"])
    unreadable("unreadable folder", [*W.base, "-data-paths", f"{d}/locked"], ["-data-paths", "locked", "denied"])
    unreadable("ready file that may not be written", [*W.base, "-ready-file", f"{d}/ready"], ["-ready-file", "denied"])
    os.chmod(f"{d}/locked", 0o755)


def test_mistakes_output():
    """Files that are written later: checked before anything is hashed or opened, all of them together, none of them made."""
    d = temp("outputs")
    flags = ["-until", "ready", "-report", f"{d}/none/r.xml", "-record", f"{W.algo}/x", "-ready-file", f"{d}/new/"]
    refused("outputs", [*W.base, *flags], 1, [("-report", re.escape(f'"{d}/none/r.xml"'), "No such file"),
            ("-record", "Not a directory"), ("-ready-file", re.escape(f'"{d}/new/"'))])
    refused("outputs, empty names", [*W.base, "-until", "ready", "-report=", "-record=", "-ready-file", ""], 1,
            [("-report", '""'), ("-record", '""'), ("-ready-file", '""')])
    refused("outputs, folders", [*W.base, "-until", "ready", "-report", d, "-record", d, "-ready-file", d], 1,
            [("-report", "directory"), ("-record", "directory"), ("-ready-file", "directory")])
    algo, other = write("an.py", b"x"), f"{d}/link"
    os.symlink(algo, other)
    for out, path, of in (("-report", algo, "-algo-path"), ("-record", other, "-algo-path"), ("-ready-file", f"{d}/new", "-report"),
                          ("-report", W.data, "-data-paths")):
        flags = ["-until", "ready", *([of, path] if of == "-report" else [])]
        refused(f"outputs: {out} is {of}", [*but(W.with_data, "-algo-path", algo), *flags, out, path], 2,
                [re.escape(f"{path} is the file of -"), "overwritten"])
    same("outputs: an input is left alone", read(algo), b"x")
    os.unlink(other)
    refused("outputs beside another mistake", ["-algo-path", "nope", *W.required, "-until", "ready", "-report", f"{d}/none/r"], 1,
            [("-report", "none/r"), ("-algo-path", "nope")])
    same("outputs: none is made", os.listdir(d), [])


def test_tls_mistakes_together():
    """Certificate, key and authorities: what is wrong with each, in one go; what has no effect is told."""
    rows = [(flag, f"no-such{flag}") for flag in ("-server-cert", "-server-key", "-client-ca-certs")]
    refused("TLS: three files that are not there", [*W.base, *(word for row in rows for word in row)], 1,
            [tuple(re.escape(word) for word in row) for row in rows])
    refused("TLS: three variables", W.base, 1, [("SERVER_CERT: no1",), ("SERVER_KEY: no2",), ("CLIENT_CA_CERTS: no3",)],
            {"SERVER_CERT": "no1", "SERVER_KEY": "no2", "CLIENT_CA_CERTS": "no3"})
    for flag in ("-client-san", "-client-ca-certs"):
        refused(f"TLS: {flag} of an unset variable", [*W.base, flag, ""], 2, [f"{flag} is empty"])
    same("client: -ca of an unset variable", run("-ca empty", ["health", "-ca", "", "127.0.0.1:1"]).status, 2)
    refused("TLS: no key", [*W.base, "-server-cert", "x"], 1, ["-server-cert", "-server-key", "SERVER_KEY", "both"])
    refused("TLS: no certificate", W.base, 1, ["SERVER_KEY", "-server-cert", "SERVER_CERT", "both"], {"SERVER_KEY": "x"})
    r = run("client: three files", ["agent", "-ca", "no1", "-cert", "no2", "-key", "no3", "-wait", "0", "127.0.0.1:1"])
    same("client TLS: status", r.status, 1)
    for row in (("-ca", "no1"), ("-cert", "no2"), ("-key", "no3")):
        has("client TLS: three files that are not there", r.err, *row)
    r = run("-server-name alone", ["agent", "-server-name", "x", "-wait", "0", "127.0.0.1:1"])
    same("-server-name without TLS: status", r.status, 2)
    has("-server-name without TLS", r.err, "-server-name", "-ca")
    for name in ("CLIENT_CA_CERTS", "SERVER_CA_CERTS"):
        with Server(f"{name} alone", env={name: "x"}) as s:
            has(f"{name} without TLS: a warning", s.err.text(), "warning", name, "SERVER_CERT", "no TLS")


def test_mistakes_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = str(s.getsockname()[1])
        refused("port taken", W.base, 1, ["PORT", port, "in use", "free"], {"PORT": port})
        refused("port taken, by HOST", W.base, 1, ["PORT", port], {"PORT": port, "HOST": "localhost"})
    refused("HOST that does not resolve", W.base, 1, ["HOST", r"no-such-host\.invalid"], {"HOST": "no-such-host.invalid"})
    refused("HOST that is no address", W.base, 1, ["HOST", r"256\.0\.0\.1"], {"HOST": "256.0.0.1"})
    refused("HOST of another machine", W.base, 1, ["HOST", r"192\.0\.2\.1"], {"HOST": "192.0.2.1"})
    refused("HOST with odd characters", W.base, 1, ["HOST"], {"HOST": "a\x1b[31m\nb"})
    refused("HOST that is too long", W.base, 2, ["HOST"], {"HOST": "a" * 5000})
    refused("HOST with a port", W.base, 2, ["HOST=localhost PORT=7001"], {"HOST": "localhost:7001"})
    refused("HOST with brackets and a port", W.base, 2, ["HOST=::1 PORT=0"], {"HOST": "[::1]:0"})
    refused("HOST that is a URL", W.base, 2, ["HOST", "URL", "leave out"], {"HOST": "http://localhost:7001"})


def test_mistakes_together():
    d = temp("together")
    refused("all together", [
        "-public-key-path", f"{d}/nokey", "-attested-tls-bool", "maybe", "-algo-path", f"{d}/noalgo",
        "-data-paths", f"{d}/nodata1,{W.data},{d}/nodata2", "-algo-hash", "12", "-dataset-hash", "zz", "-compat", "x",
        "-output", "y", "-max-message", "z", "-dataset-source-urls", "s3://x", "-algo-hsah", "q", "-ca-url", "u",
        "-algo-type", "binary"], 2, [
        ("-public-key-path", "nokey"), ("-attested-tls-bool", "maybe"), ("-algo-path", "noalgo"), ("-data-paths", "nodata1"),
        ("-data-paths", "nodata2"), ("-algo-hash: ", '"12"'), ("-dataset-hash: ", '"zz"'), ("-compat", '"x"'),
        ("-output", '"y"'), ("-max-message", '"z"'), ("-dataset-source-urls", "-dataset-kbs-paths"),
        ("-algo-hsah", "-algo-hash"), ("warning", "-ca-url"), ("warning", "binary"), ("PORT", "65536")], {"PORT": "65536"})
    refused("no flags at all", [], 2, [("-public-key-path",), ("-attested-tls-bool",), ("-algo-path",)])
    refused("two that are not there", [*W.base, "-algo-path", f"{d}/a", "-public-key-path", f"{d}/b"], 1,
            [("-algo-path", "/a"), ("-public-key-path", "/b")])


# ---- Keys ----

def openssl(*args, stdin=None):
    r = subprocess.run(["openssl", *args], input=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=W.dir)
    if r.returncode:
        raise RuntimeError(f"openssl {args}: {r.stderr.decode()}")
    return r.stdout


def key_mistakes():
    """name, file name, content, what the message must say, whether its command makes a good key of it."""
    rsa = openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048")
    ed = openssl("genpkey", "-algorithm", "ed25519")
    ec = openssl("ecparam", "-name", "prime256v1", "-genkey")
    pub = read(W.rsa)
    pkcs1 = openssl("rsa", "-pubin", "-RSAPublicKey_out", stdin=pub)
    key = write(f"{temp('keys')}/rsa.pem", rsa, 0o600)
    cert = openssl("req", "-x509", "-new", "-key", key, "-subj", "/CN=x", "-days", "2")
    body = pub.split(b"\n")
    return [
        ("PKCS#1", "pkcs1.pem", pkcs1, "PKCS#1", True),
        ("PKCS#1 with CRLF", "crlf.pem", pkcs1.replace(b"\n", b"\r\n"), "PKCS#1", True),
        ("PKCS#1, name with blanks and a quote", "it's my key.pem", pkcs1, "PKCS#1", True),
        ("PKCS#1, name with $ and `", "a$HOME`id`\".pem", pkcs1, "PKCS#1", True),
        ("PKCS#1, name with UTF-8", "schlüssel 鍵.pem", pkcs1, "PKCS#1", True),
        ("PKCS#1, name with a dash", "-key.pem", pkcs1, "PKCS#1", True),
        ("PKCS#1, long name", "k" * 240 + "'.pem", pkcs1, "PKCS#1", True),
        ("PKCS#1 labelled as SPKI", "label.pem", pkcs1.replace(b"RSA PUBLIC", b"PUBLIC"), "PKCS#1", True),
        ("PKCS#1 labelled as SPKI, name with a dash", "-label.pem", pkcs1.replace(b"RSA PUBLIC", b"PUBLIC"), "PKCS#1", True),
        ("PKCS#1 in DER", "pkcs1.der", openssl("rsa", "-pubin", "-RSAPublicKey_out", "-outform", "DER", stdin=pub), "DER", True),
        ("SPKI in DER", "spki.der", openssl("pkey", "-pubin", "-outform", "DER", stdin=pub), "DER", True),
        ("Ed25519 SPKI in DER", "ed.der", openssl("pkey", "-pubout", "-outform", "DER", stdin=ed), "DER", True),
        ("certificate", "cert.pem", cert, "certificate", True),
        ("certificate with its text before it", "text.pem", openssl("x509", "-text", stdin=cert), "certificate", True),
        ("trusted certificate", "trust.pem", openssl("x509", "-trustout", stdin=cert), "certificate", True),
        ("certificate request", "req.pem", openssl("req", "-new", "-key", key, "-subj", "/CN=x"), "request", True),
        ("RSA private key, PKCS#8", "rsa8.pem", rsa, "private key", True),
        ("RSA private key, PKCS#1", "rsa1.pem", openssl("rsa", "-traditional", stdin=rsa), "private key", True),
        ("Ed25519 private key", "ed.pem", ed, "private key", True),
        ("EC private key", "ec.pem", openssl("ec", stdin=ec), "private key", True),
        ("EC private key behind its parameters", "ecp.pem", ec, "(?i)private key", True),
        ("encrypted private key", "enc8.pem", openssl("pkey", "-aes256", "-passout", "pass:secret", stdin=rsa),
         "private key", "tty"),
        ("encrypted RSA private key, PKCS#1", "enc1.pem",
         openssl("rsa", "-traditional", "-aes128", "-passout", "pass:secret", stdin=rsa), "private key", "tty"),
        ("byte order mark", "bom.pem", b"\xef\xbb\xbf" + pub, "byte order mark", True),
        ("byte order mark, name with a dash", "-bom.pem", b"\xef\xbb\xbf" + pub, "byte order mark", True),
        ("UTF-16", "utf16.pem", pub.decode().encode("utf-16"), "UTF-16", True),
        ("certificate in DER", "cert.der", openssl("x509", "-outform", "DER", stdin=cert), "openssl", False),
        ("private key in DER", "key.der", openssl("pkey", "-outform", "DER", stdin=ed), "openssl", False),
        ("empty", "empty.pem", b"", "empty", False),
        ("blank", "blank.pem", b"\n\n  \n", "PEM", False),
        ("no PEM", "text.txt", b"hello, I am no key\n", "PEM", False),
        ("random bytes", "noise.bin", bytes(range(256)) * 8, "PEM", False),
        ("zero bytes", "zero.bin", bytes(4096), "PEM", False),
        ("cut off in the middle", "cut.pem", pub[:len(pub) // 2], "damaged|cut", False),
        ("without its end", "noend.pem", b"\n".join(body[:-2]), "damaged|cut", False),
        ("a line taken out", "line.pem", b"\n".join(body[:3] + body[4:]), "damaged|cut", False),
        ("a letter that is not base64", "bad.pem", b"\n".join([body[0], b"*" + body[1][1:], *body[2:]]), "damaged|cut", False),
        ("another END", "end.pem", pub.replace(b"END PUBLIC", b"END PRIVATE"), "damaged|cut", False),
        ("nothing between the lines", "hollow.pem", b"-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----\n", "damaged|cut", False),
        ("rubbish between the lines", "trash.pem", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "damaged|cut|key", False),
        ("another kind of block", "dh.pem", b"-----BEGIN DH PARAMETERS-----\nMAYCAQcCAQU=\n-----END DH PARAMETERS-----\n",
         "DH PARAMETERS", False),
        ("PGP", "pgp.asc", b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nmQ==\n-----END PGP PUBLIC KEY BLOCK-----\n", "PGP|PEM", False),
        ("over 1 MiB", "big.pem", b"x" * (2 << 20), "larger|MiB", False),
    ]


def fix(name, command, d, tty):
    """Runs the command that a message prints, as printed, in a shell.  Returns what it writes to stdout."""
    if not tty:
        r = subprocess.run(["sh", "-c", command], cwd=d, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, timeout=LIMIT)
        return r.stdout, r.stderr
    master, slave = pty.openpty()           # it asks its user for the pass phrase, on the terminal
    p = subprocess.Popen(["setsid", "-c", "sh", "-c", command], cwd=d, stdin=slave, stdout=subprocess.PIPE, stderr=slave)
    os.close(slave)
    asked = Collector(master)
    if asked.until("(?i)pass ?phrase|password", 10):
        os.write(master, b"secret\n")
    try:
        out = p.communicate(timeout=LIMIT)[0]
    except subprocess.TimeoutExpired:
        p.kill()
        out = p.communicate()[0]
    asked.thread.join(LIMIT)
    os.close(master)
    return out, asked.bytes()


def test_keys():
    d = temp("keyfiles")
    for name, file, content, says, command in key_mistakes():
        write(f"{d}/{file}", content, 0o600)
        shown = re.escape(file[:100])
        r = run(f"key: {name}", [*W.base, "-public-key-path", file], cwd=d)
        same(f"key: {name}: status", r.status, 1)
        has(f"key: {name}", r.err, "-public-key-path", shown, says)
        if not command:
            continue
        told = re.search(r"with: (.+)$", r.err, re.M)
        if not check(f"key: {name}: names a command", told, r.err, "with: COMMAND"):
            continue
        made, err = fix(name, told.group(1), d, command == "tty")
        write(f"{d}/new.pem", made)
        again = run(f"key: {name}: mended", ["manifest", *W.base, "-public-key-path", "new.pem"], cwd=d)
        check(f"key: {name}: its command makes a good key", again.status == 0,
              f"{told.group(1)}: {made[:80]} {err[-200:]} then {again.err}", "a key that is accepted")


def test_keys_openssh():
    if not shutil.which("ssh-keygen"):
        skip("OpenSSH keys", "no ssh-keygen")
        return
    d = temp("ssh")
    for kind in ("rsa", "ecdsa", "ed25519"):
        subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", f"{d}/{kind}"], check=True, stdin=subprocess.DEVNULL,
                       stdout=subprocess.DEVNULL)
        for file in (kind, kind + ".pub"):
            name = f"key: OpenSSH {file}"
            r = run(name, [*W.base, "-public-key-path", file], cwd=d)
            same(f"{name}: status", r.status, 1)
            has(name, r.err, "-public-key-path", re.escape(file), "OpenSSH")
            told = re.search(r"with: (.+)$", r.err, re.M)
            if not check(f"{name}: names a command", told, r.err, "with: COMMAND"):
                continue
            made, err = fix(name, told.group(1), d, False)
            write(f"{d}/new.pem", made)
            again = run(f"{name}: mended", ["manifest", *W.base, "-public-key-path", "new.pem"], cwd=d)
            check(f"{name}: its command makes a good key", again.status == 0,
                  f"{told.group(1)}: {made[:80]} {err[-200:]} then {again.err}", "a key that is accepted")


def test_keys_good():
    """What PEM leaves open, and a pipe as -public-key-path."""
    pem = read(W.ecc)
    d = temp("good")
    der = base64.b64decode("".join(pem.decode().split("\n")[1:-2]))
    rows = [("text before", b"Subject: me\n\n" + pem), ("CRLF", pem.replace(b"\n", b"\r\n")), ("no newline at the end", pem[:-1]),
            ("blanks at line ends", pem.replace(b"\n", b"  \t\n")), ("two blocks", pem + read(W.rsa)),
            ("text behind", pem + b"and so on\n"), ("base64 on one line", b"-----BEGIN PUBLIC KEY-----\n" + base64.b64encode(der)
             + b"\n-----END PUBLIC KEY-----\n")]
    for name, content in rows:
        path = write(f"{d}/key", content)
        got, r = manifest(f"good key: {name}", [*W.base, "-public-key-path", path])
        same(f"good key: {name}", dig(got, "resultConsumers.0.userKey"), b64(der))
    r = run("good key: pipe", [], command=["sh", "-c", 'cat "$1" | exec "$0" manifest -algo-path "$2" -attested-tls-bool 0 '
                                           '-public-key-path /dev/stdin', W.cvms, W.ecc, W.algo])
    same("good key: from a pipe", r.status == 0 and dig(json.loads(r.out), "resultConsumers.0.userKey"), b64(der))


# ---- Warnings ----

def test_warnings():
    remote, data = W.remote, W.remote_data
    full = [*remote, *data, "-dataset-hash", "11" * 32]
    nokbs = [*W.required, "-algo-source-url", "https://h/a", "-algo-kbs-path", "k", "-algo-hash", "ab" * 32]
    whole = json.loads(run("warnings: a manifest", ["manifest", *W.with_data]).out)
    rows = [
        ("-algo-type binary", [*W.base, "-algo-type", "binary"], ["-algo-type", "binary", r"\bbin\b", "python"]),
        ("-algo-type Python", [*W.base, "-algo-type", "Python"], ["-algo-type", "Python", "python"]),
        ("remote algorithm without KBS", nokbs, ["algorithm", "-kbs-url"]),
        ("remote datasets without KBS", [*W.base, *data, "-dataset-hash", "11" * 32], ["dataset", "-kbs-url"]),
        ("one hash for two datasets", full, ["-dataset-hash", r"\b2\b|two"]),
        ("no -algo-hash", [*remote, "-algo-hash="], ["-algo-hash", "missing|zero"]),
        ("no -dataset-hash", [*remote, *data], ["-dataset-hash", "missing|zero"]),
        ("-algo-hash of zeros", [*remote, "-algo-hash", "0" * 64], ["algorithm has 32 zero bytes", "-algo-hash"]),
        ("-dataset-hash of zeros", [*remote, *data, "-dataset-hash", "0" * 64], ["dataset 0 has 32 zero bytes", "-dataset-hash"]),
        ("-dataset-hashes with one of zeros", [*remote, *data, "-dataset-hashes", "11" * 32 + "," + "0" * 64],
         ["dataset 1 has 32 zero bytes"]),
        ("-manifest with a hash of zeros", ["-manifest", write("zero.json", json.dumps(dict(whole, algorithm={
            **whole["algorithm"], "hash": b64(bytes(32))})))], ["algorithm has 32 zero bytes"]),
        ("two datasets of one name", [*W.base, "-data-paths", f"{W.data},{write('data.csv', b'1')}"], ["datasets 0 and 1 are both called data.csv"]),
        ("an unset variable", [*W.base, "-data-paths", ""], ["-data-paths is empty", "variable"]),
        ("-kbs-url without a scheme", [*remote, "-kbs-url", "kbs:8080"], ["key broker of the computation", "kbs:8080", "https://"]),
        ("-algo-kbs-url without a scheme", [*remote, "-algo-kbs-url", "kbs:8080"], ["key broker of the algorithm", "kbs:8080"]),
        ("-algo-kbs-url with another scheme", [*remote, "-algo-kbs-url", "httpx://kbs"], ["key broker of the algorithm", "httpx"]),
        ("-dataset-kbs-urls without a scheme", [*remote, *data, "-dataset-hash", "11" * 32, "-dataset-kbs-urls", "http://x,x"],
         ["key broker of dataset 1", '"x"']),
        ("unknown scheme of the algorithm", [*remote, "-algo-source-url", "ftp://h/a"], ["-algo-source-url", "ftp://h/a", "s3://"]),
        ("no scheme", [*remote, "-algo-source-url", "registry.example/a:1"], ["-algo-source-url", "registry.example"]),
        ("scheme in capitals", [*remote, "-algo-source-url", "S4://x"], ["-algo-source-url", "S4://x"]),
        ("unknown scheme of a dataset", but(remote + data, "-dataset-source-urls", "s3://a,file:///x"),
         ["-dataset-source-urls", "file:///x"]),
        ("-algo-path unused", [*remote, "-algo-path", W.algo], ["-algo-path", "not used"]),
        ("-data-paths unused", [*full, "-data-paths", W.data], ["-data-paths", "not used"]),
        ("-dataset-decompress not a boolean", [*full, "-dataset-decompress", "yes,1"], ["-dataset-decompress", "yes", "false"]),
        ("-dataset-decompress too long", [*full, "-dataset-decompress", "1,1,1"], ["-dataset-decompress"]),
        ("-kbs-url with -compat head", [*remote, "-compat", "head", "-algo-kbs-url", "http://x"], ["-compat head", "-kbs-url"]),
        ("-algo-kbs-url with -compat seed", [*remote, "-compat", "seed", "-algo-kbs-url", "http://x"],
         ["-compat seed", "-algo-kbs-url"]),
        ("-dataset-kbs-urls with -compat seed", [*remote, *data, "-compat", "seed", "-dataset-kbs-urls", "http://x,http://y"],
         ["-compat seed", "-dataset-kbs-urls"]),
        ("no KBS for -compat head", [*remote, "-compat", "head"], ["algorithm.* has no", "-algo-kbs-url"]),
        ("no KBS for -compat seed", [*nokbs, "-compat", "seed", "-algo-kbs-url", "http://x"], ["algorithm.* has no", " -kbs-url"]),
    ]
    for name, args, patterns in rows:
        out = os.path.join(temp("warn"), "m")
        r = run(f"warning: {name}", ["manifest", *args, "-o", out])
        same(f"warning: {name}: status", r.status, 0)
        has(f"warning: {name}", r.err, "warning", *patterns)
        check(f"warning: {name}: manifest", os.path.exists(out) and first(read(out), 1) == b"1", "none", "a manifest")
    with Server("warning: server", base=[*nokbs, "-algo-type", "binary"]) as s:
        has("warning: server warns", s.err.text(), "warning", "binary")
        same("warning: server serves", s.stand_in().status, 0)
    for flags in (["-manifest", write("hex.json", json.dumps(dict(whole, algorithm={**whole["algorithm"], "hash": "ab" * 32})))],
                  [*remote, "-set", "algorithm.hash=" + "AB" * 32]):
        r = run("a hash in hex", ["manifest", *flags])
        same("a hash in hex: status", r.status, 1)
        has("a hash in hex", r.err, "algorithm has its hash in hex", "base64", re.escape(b64(b"\xab" * 32)))
    for n, status in ((1024, 0), (1025, 2)):
        same(f"an id of {n} bytes", run("id", ["manifest", *W.base, "-set", "id=" + "x" * n]).status, status)
    for name, args in (("direct", [*W.base, "-data-paths", W.data, "-algo-type", "python"]), ("remote", remote),
                       ("one dataset", [*remote, "-dataset-source-urls", "s3://a", "-dataset-kbs-paths", "k", "-dataset-hash",
                        "11" * 32]), ("head", [*nokbs, "-algo-kbs-url", "http://x", "-compat", "head"]),
                       *((f"type {t}", [*W.base, "-algo-type", t]) for t in ("bin", "python", "wasm", "docker")),
                       *((u, [*remote, "-algo-source-url", u]) for u in ("docker://x", "oci:d:t", "s3://x", "gs://x", "https://x",
                                                                          "http://x"))):
        r = run(f"no warning: {name}", ["manifest", *args])
        same(f"no warning: {name}: status", r.status, 0)
        hasnot(f"no warning: {name}", r.err, "warning")


# ---- The manifest ----

def golden():
    with open(f"{W.vectors}/manifests.jsonl") as f:
        for line in f:
            case = json.loads(line)
            args = list(case["args"])
            for flag, (values, times) in case.get("repeat", {}).items():
                args += [flag, ",".join(values * times)]
            yield case, args, {"TZ": case.get("tz") or "UTC"}


def chunks(data, name=b"1"):
    """A manifest as the messages of the stream."""
    for at in range(0, len(data), 1 << 20):
        yield field(1, field(1, data[at:at + (1 << 20)]) + field(2, name))
    yield field(1, field(2, name) + field(3, 1))


def matches(message, wanted):
    if isinstance(wanted, str):
        return message.hex() == wanted
    return len(message) == wanted["len"] and hashlib.sha256(message).hexdigest() == wanted["sha256"]


def make(name, args, env=None):
    """The manifest's bytes, by -o; empty, and a failure, if there are none."""
    out = os.path.join(temp("manifest"), "m")
    r = run(name, ["manifest", *args, "-o", out], env, cwd=W.vectors)
    same(f"{name}: status", r.status, 0)
    same(f"{name}: nothing on stdout", r.out, "")
    return read(out) if os.path.exists(out) else b""


def test_golden():
    count = 0
    for case, args, env in golden():
        count += 1
        name = f"golden {case['name']}"
        data = make(name, [*args, "-compat", case["generation"]], env)
        got = list(chunks(data))
        same(f"{name}: messages", len(got), len(case["messages"]))
        for i, (message, wanted) in enumerate(zip(got, case["messages"])):
            check(f"{name}: message {i}", matches(message, wanted), message.hex(), wanted)
    same("golden manifests", count, 15)


def without_additions(data, generation, flags):
    """`all` with what it adds to a generation taken out; what it adds must have these values."""
    algo_remote, data_remote = "-algo-source-url" in flags, "-dataset-source-urls" in flags
    names = [os.path.basename(p) for p in flags.get("-data-paths", "").split(",")]
    common, seed = flags.get("-kbs-url"), generation == "seed"
    own_algo, own_data = flags.get("-algo-kbs-url"), [u for u in flags.get("-dataset-kbs-urls", "").split(",") if u]
    kbs = lambda url: field(1, url) + field(2, 1)
    out, problems, index = [], [], 0

    def drop(parts, number, wanted, what):
        got = dict(parts).get(number)
        if got != wanted:
            problems.append(f"{what} is {got!r}, not {wanted!r}")
        return [(n, v) for n, v in parts if n != number]

    for number, value in fields(data):
        parts = fields(value) if number in (4, 5) else []
        if number == 5:
            url = own_algo or common
            parts = drop(parts, 6, kbs(url), "Algorithm.kbs") if algo_remote and url and (seed or not own_algo) else parts
        if number == 4 and not data_remote:
            parts = drop(parts, 3, names[index].encode(), "Dataset.filename")
        if number == 4 and data_remote:
            url = own_data[index] if own_data else common
            parts = drop(parts, 6, kbs(url), "Dataset.kbs") if url and (seed or not own_data) else parts
        index += number == 4
        out.append((number, join(parts) if number in (4, 5) else value))
    url = common or (algo_remote and own_algo) or (data_remote and own_data and own_data[0]) or None
    if not seed:
        out = drop(out, 8, kbs(url) if url else None, "ComputationRunReq.kbs")
    elif dict(out).get(8) != (kbs(common) if common else None):
        problems.append("ComputationRunReq.kbs")
    return join(out), problems


def test_compat_all():
    """-compat all is either generation and exactly the additions of the other."""
    for case, args, env in golden():
        name = f"all: {case['name']}"
        words = [w for a in args for w in (a.lstrip("-").split("=", 1) if a.startswith("--") and "=" in a else [a])]
        flags = {"-" + k.lstrip("-"): v for k, v in zip(words[::2], words[1::2])}
        data = make(name, args, env)
        same(f"{name}: -compat all is the default", make(name, [*args, "-compat", "all"], env) == data, True)
        plain, problems = without_additions(data, case["generation"], flags)
        same(f"{name}: additions", problems, [])
        got = list(chunks(plain))
        good = len(got) == len(case["messages"]) and all(map(matches, got, case["messages"]))
        check(f"{name}: without the additions", good, plain.hex(), "the golden bytes")
    for path, wanted in ((W.data, "data.csv"), (f"{W.vectors}/inputs/", "inputs"), (f"{W.vectors}/inputs/./data.csv", "data.csv"),
                         ("vectors/inputs/../inputs/data.csv", "data.csv")):
        got, r = manifest(f"base name {path}", [*W.base, "-data-paths", path])
        same(f"base name of {path}", dig(got, "datasets.0.filename"), wanted)
    got, r = manifest("the only key broker", [*W.base, *W.remote_data, "-dataset-hash", "11" * 32, "-dataset-kbs-urls", ",http://2"])
    same("the only key broker is the second dataset's", dig(got, "kbs.url"), "http://2")


def test_manifest_json():
    """The JSON has the same values as the bytes."""
    args = ["-public-key-path", W.rsa, "-attested-tls-bool", "true", "-algo-source-url", "docker://r/a", "-algo-kbs-path",
            "k/a", "-algo-hash", "ab" * 32, "-dataset-source-urls", "s3://x,gs://y", "-dataset-kbs-paths", "k/x,", "-kbs-url",
            "http://k", "-dataset-kbs-urls", "http://1,http://2", "-algo-args", "a,\"\\\u2028<", "-client-ca-file", "/ca",
            "-dataset-decompress", "1", "-dataset-hash", "cd" * 32]
    got, r = manifest("json", args)
    der = base64.b64decode("".join(read(W.rsa).decode().split("\n")[1:-2]))
    source = lambda url, key: {"type": "oci-image", "url": url, **({"kbsResourcePath": key, "encrypted": True} if key else {})}
    dataset = lambda i, url, key, kbs: {
        "hash": b64(b"\xcd" * 32), "userKey": b64(der), "filename": f"dataset_{i}.csv", "source": source(url, key),
        "kbs": {"url": kbs, "enabled": True}, **({"decompress": True} if i == 0 else {})}
    same("manifest as JSON", got, {
        "id": "1", "name": "sample computation", "description": "sample descrption",
        "datasets": [dataset(0, "s3://x", "k/x", "http://1"), dataset(1, "gs://y", "", "http://2")],
        "algorithm": {"hash": b64(b"\xab" * 32), "userKey": b64(der), "source": source("docker://r/a", "k/a"),
                      "algoArgs": ["a", "\"\\\u2028<"], "kbs": {"url": "http://k", "enabled": True}},
        "resultConsumers": [{"userKey": b64(der)}],
        "agentConfig": {"port": "7002", "clientCaFile": "/ca", "attestedTls": True},
        "kbs": {"url": "http://k", "enabled": True}})
    same("manifest: no command of a CI runner", re.findall(r"description.*", manifest("a command", [*W.base, "-set", "description=##[error]"])[1].out),
         [r'description": "##\u005berror]",'])
    d = temp("out")
    for name, out, words in (("nowhere", f"{d}/no/m", "No such file"), ("a folder", d, "directory"),
                             ("a full device", "/dev/full", "No space")):
        r = run(f"manifest -o {name}", ["manifest", *W.base, "-o", out])
        same(f"manifest -o {name}: status", r.status, 1)
        has(f"manifest -o {name}", r.err, "-o", re.escape(out), words)
    with open("/dev/full", "wb") as full:
        r = run("manifest into a full device", ["manifest", *W.base], stdout=full)
        same("manifest into a full device: status", r.status, 1)
        has("manifest into a full device", r.err, "stdout", "No space")
    r = run("manifest, stdout closed", [], command=["sh", "-c", 'exec "$@" >&-', "sh", W.cvms, "manifest", *W.base])
    same("manifest, stdout closed: status", r.status, 1)
    has("manifest, stdout closed", r.err, "stdout")
    r = run("manifest, PORT", ["manifest", *W.base], {"PORT": "abc"})
    same("manifest opens no port and so needs no PORT", r.status, 0)


def test_odd_names():
    """Any byte but NUL and, in a list, the comma may stand in a file's name."""
    d = temp("odd")
    for name in ("with blank.csv", "-dash.csv", "--data-paths", "new\nline.csv", "größe 漢字.csv", "quote'\".csv", "\x1b[31mred.csv",
                 "a=b.csv", "%s%n.csv", "\\n.csv", "\u202egpj.csv", "x" * 250):
        write(f"{d}/{name}", name.encode())
        shown = ascii(name)[:40]
        got, r = manifest(f"name {shown}", [*W.base, "-data-paths", name], cwd=d)
        same(f"name {shown}: hash", dig(got, "datasets.0.hash"), b64(bytes.fromhex(sha3(name.encode()))))
        same(f"name {shown}: filename", dig(got, "datasets.0.filename"), name)
        has(f"name {shown}: a line with path and hash", r.err, "^cvms: dataset ", f"{len(name.encode())} bytes, {sha3(name.encode())}$")
        hasnot(f"name {shown}: no raw control characters", r.err, r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f\u202a-\u202e\u2066-\u2069]")
        got, r = manifest(f"name {shown}: algorithm", [*W.required, f"-algo-path={name}"], cwd=d)
        same(f"name {shown}: algorithm", dig(got, "algorithm.hash"), b64(bytes.fromhex(sha3(name.encode()))))
    for name in ("a", "b.csv"):
        write(f"{d}/{name}", name.encode())
    got, r = manifest("comma", [*W.base, "-data-paths", "a,b.csv"], cwd=d)
    same("a comma separates", [x["filename"] for x in dig(got, "datasets") or []], ["a", "b.csv"])
    # A proto3 string is UTF-8, or a real agent takes nothing of the manifest: refuse it or leave the name out.
    bad = os.fsencode(d) + b"/bad\xff.csv"
    write(bad, b"x")
    out = f"{d}/m"
    for what, args in (("file name", [*W.base, "-data-paths", bad]), ("-algo-args", [*W.base, "-algo-args", b"a\xff"]),
                       ("-algo-type", [*W.base, "-algo-type", b"\xc3"]), ("-client-ca-file", [*W.base, "-client-ca-file", b"\xed\xa0\x80"]),
                       ("-algo-source-url", [*W.remote, "-algo-source-url", b"s3://\xff"])):
        if os.path.exists(out):
            os.unlink(out)
        r = run(f"not UTF-8: {what}", ["manifest", *args, "-o", out])
        if r.status == 0:
            check(f"not UTF-8: {what}: no agent gets it", not any(x in read(out) for x in (b"bad\xff", b"a\xff", b"\xc3\x2a",
                  b"\xed\xa0\x80", b"s3://\xff", b"\x01\xc3")), "a string that is not UTF-8 in the manifest",
                  "a mistake that names the option, or a warning and the string left out")
            has(f"not UTF-8: {what}: warning", r.err, "UTF-8")
        else:
            has(f"not UTF-8: {what}: told", r.err, "UTF-8", "-data-paths" if what == "file name" else what)


def test_checksum():
    r = run("checksum", ["checksum", W.algo, W.data])
    same("checksum: status", r.status, 0)
    same("checksum", r.out, f"{sha3(read(W.algo))}  {W.algo}\n{sha3(read(W.data))}  {W.data}\n")
    r = run("checksum -b", ["checksum", "-b", W.algo])
    same("checksum -b", r.out, f"{b64(bytes.fromhex(sha3(read(W.algo))))}  {W.algo}\n")
    r = run("checksum of nothing", ["checksum"])
    same("checksum of nothing: status", r.status, 2)
    has("checksum of nothing", r.err, "checksum", "file")
    r = run("checksum of what is not there", ["checksum", "nope", W.data])
    same("checksum of what is not there: status", r.status, 1)
    has("checksum of what is not there", r.err, "nope", "No such file")
    same("checksum of what is not there: the others", r.out, f"{sha3(read(W.data))}  {W.data}\n")
    with open("/dev/full", "wb") as full:
        same("checksum into a full device: status", run("checksum into a full device", ["checksum", W.algo], stdout=full).status, 1)


# ---- The server's process ----

def test_listening():
    v6 = False
    try:
        with socket.socket(socket.AF_INET6) as s:
            s.bind(("::1", 0))
            v6 = True
    except OSError:
        skip("HOST with IPv6", "no ::1")
    fixed = free_port()
    rows = [("unset", None, "0", r"localhost:\d+", ["127.0.0.1"]), ("empty", "", "0", r"\S*:\d+", ["127.0.0.1"]),
            ("name", "localhost", "0", r"localhost:\d+", ["localhost"]), ("IPv4", "127.0.0.1", "0", r"127\.0\.0\.1:\d+", ["127.0.0.1"]),
            ("another loopback", "127.0.0.2", "0", r"127\.0\.0\.2:\d+", ["127.0.0.2"]),
            ("a name of RFC 6761", "cvms.localhost", "0", r"cvms\.localhost:\d+", ["127.0.0.1", "LOCALHOST.", "a.localhost"]),
            ("0.0.0.0", "0.0.0.0", "0", r"0\.0\.0\.0:\d+", ["127.0.0.1"]),
            ("fixed port", "127.0.0.1", str(fixed), rf"127\.0\.0\.1:{fixed}", ["127.0.0.1"])]
    if v6:
        rows += [("localhost, both families", "localhost", "0", r"localhost:\d+", ["127.0.0.1", "[::1]"]), ("IPv6", "::1", "0", r"\[::1\]:\d+", ["[::1]"]), ("IPv6 in brackets", "[::1]", "0", r"\[::1\]:\d+", ["[::1]"]),
                 ("empty, by IPv6", "", "0", r"\S*:\d+", ["[::1]", "127.0.0.1"]), ("::", "::", "0", r"\[::\]:\d+", ["[::1]"]),
                 ("IPv4 as IPv6", "::ffff:127.0.0.1", "0", r"\[::ffff:127\.0\.0\.1\]:\d+", ["127.0.0.1"])]
    for name, host, port, where, reach in rows:
        ready = os.path.join(temp("ready"), "ready")
        env = {"PORT": port, **({} if host is None else {"HOST": host})}
        command = ["env", *(["-u", "HOST"] if host is None else []), W.cvms, *W.base, "-ready-file", ready]
        with Server(f"HOST {name}", env=env, command=command) as s:
            if not s.address:
                continue
            check(f"HOST {name}: ready line", re.search(
                rf"\bcvms_test_server service gRPC server listening at {where} without TLS$", s.line), s.line, where)
            same(f"HOST {name}: ready file", read(ready).decode(), s.address + "\n")
            real = s.address.rsplit(":", 1)[1]
            check(f"HOST {name}: a real port", real != "0", real, "the port")
            for there in reach:
                same(f"HOST {name}: reached at {there}", run(f"HOST {name}", ["health", f"{there}:{real}"]).status, 0)
            same(f"HOST {name}: reached as the ready file says", run(f"HOST {name}", ["health", s.address]).status, 0)
    ready = os.path.join(temp("ready"), "ready")
    with Server("PORT unset", command=["env", "-u", "PORT", W.cvms, *W.base, "-ready-file", ready], wait=False) as s:
        text = s.err.until(r"listening at|PORT")     # 7001 may be someone else's
        has("PORT unset: 7001", text or s.err.text(), r"\b7001\b")
    ready = os.path.join(temp("ready"), "ready")
    os.mkfifo(ready)
    with Server("ready file as a FIFO", "-ready-file", ready, wait=False) as s:
        where = read_fifo(ready).decode().strip()
        same("ready file as a FIFO: open when it is written", run("FIFO", ["health", where]).status, 0)


def test_ready_file_of_old():
    """An earlier server's ready file is gone as soon as a new one begins, even if that one does not get far."""
    ready = os.path.join(temp("old"), "ready")
    write(ready, b"127.0.0.1:1\n")
    refused("old ready file", ["-algo-path", "nope", *W.required, "-ready-file", ready], 1, ["nope"])
    check("old ready file: gone", not os.path.exists(ready), "there", "gone")
    write(ready, b"127.0.0.1:1\n" * 100)
    with Server("old ready file", "-ready-file", ready) as s:
        same("old ready file: the new one's", read(ready).decode(), s.address + "\n")


def test_outputs_not_plain():
    """What a path leads to beside a regular file of its own is neither emptied nor removed, and nobody is left waiting."""
    d = temp("plain")
    log, link, target = f"{d}/out.log", f"{d}/link", f"{d}/target"
    write(log, "before\n")
    with open(log, "ab") as out:
        r = run("report to stdout", [*W.base, "-until", "ready", "-timeout", "1ms", "-report", "/dev/stdout", "-record", "/dev/stderr"],
                stdout=out)
    same("report to stdout: status", r.status, 4)
    text = read(log).decode()
    check("report to stdout: behind what was there", text.startswith("before\n") and "<testsuite" in text, text, "both")
    has("record to stderr: the rest is whole", r.err, "^cvms: TIMED OUT")
    write(target, "keep\n")
    os.symlink(target, link)
    refused("ready file is a link", [*W.required, "-algo-path", "nope", "-ready-file", link], 1, ["nope"])
    check("ready file is a link: it stays", os.path.islink(link) and read(target) == b"keep\n", os.listdir(d), "both")
    write(f"{d}/report.xml", "old")
    refused("a report of an earlier run", [*W.required, "-algo-path", "nope", "-until", "ready", "-report", f"{d}/report.xml"], 1, ["nope"])
    check("a report of an earlier run: gone", not os.path.exists(f"{d}/report.xml"), "there", "gone")
    write(f"{d}/report.xml", "old")
    refused("a mistake in the words", [*W.base, "-until", "nope", "-report", f"{d}/report.xml"], 2, ["nope"])
    same("a mistake in the words: nothing is touched", read(f"{d}/report.xml"), b"old")
    os.mkfifo(f"{d}/fifo")
    with Server("FIFO of a server that can't start", "-algo-path", "nope", "-ready-file", f"{d}/fifo", wait=False) as s:
        with ThreadPoolExecutor(1) as pool:
            got = pool.submit(lambda: open(f"{d}/fifo", "rb").read())
            same("FIFO of a server that can't start: its end", got.result(10), b"")
        same("FIFO of a server that can't start: status", s.wait(), 1)


def descriptors(pid):
    """What a process has open; any of it may go meanwhile."""
    found = set()
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found


def hashing(p, path):
    """Waits until the process has the file open."""
    for _ in range(2000):
        if path in descriptors(p.pid):
            return True
        time.sleep(0.005)
    return False


def test_signals_while_hashing():
    """Before the port is open, and in checksum, a signal ends the program; a taken port is told before anything is hashed."""
    path = f"{temp('large')}/sparse"
    with open(path, "wb") as f:
        f.truncate(64 << 30)
    path = os.path.realpath(path)
    block = lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    for name, args in (("serve", [*W.required, "-algo-path", path]), ("checksum", ["checksum", path])):
        for number in (signal.SIGTERM, signal.SIGINT):
            p = subprocess.Popen([W.cvms, *args], env=environment({"PORT": "0"}), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                 preexec_fn=block)
            check(f"{name}, {number.name} while hashing: it hashes", hashing(p, path), "nothing", "the file open")
            p.send_signal(number)
            same(f"{name}, {number.name} while hashing, blocked by the parent: status", p.wait(10), 128 + number)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        refused("a taken port before 64 GiB", [*W.required, "-algo-path", path], 1, ["PORT", "in use|another program"],
                env={"PORT": str(s.getsockname()[1])})
    refused("a typo before 64 GiB", [*W.required, "-algo-path", path, "-timeuot", "5s"], 2, ["-timeout"])


def test_output_nobody_reads():
    """A terminal, socket or record that takes no more: other connections are served, the time-out comes, a signal ends it."""
    fifo = os.path.join(temp("unread"), "fifo")
    os.mkfifo(fifo)
    pairs = {"terminal": pty.openpty(), "socket": [x.detach() for x in socket.socketpair()],
             "record": (os.open(fifo, os.O_RDWR), os.open(os.devnull, os.O_WRONLY))}
    for what, (ours, theirs) in pairs.items():
        flags = fcntl.fcntl(theirs, fcntl.F_GETFL)
        more = ["-record", fifo] if what == "record" else []
        with Server(f"full {what}", "-until", "complete", "-timeout", "3s", *more, stdout=theirs) as s:
            stream = Stream(s.address, deaf=True)
            stream.s.settimeout(0.2)
            try:
                for _ in range(200):
                    stream.send(log("x" * 10000))
            except OSError:
                pass
            same(f"full {what}: health", run("health", ["health", s.address]).status, 0)
            same(f"full {what}: the time-out comes", s.wait(12), 4)
        same(f"full {what}: the open file is as it was", fcntl.fcntl(theirs, fcntl.F_GETFL), flags)
        os.close(ours)
        os.close(theirs)


def test_control_without_lines():
    """Commands from what never ends a line: the server serves, and stops reading it."""
    with open("/dev/zero", "rb") as zero, Server("control from /dev/zero", "-control", stdin=zero) as s:
        same("control from /dev/zero: health", run("health", ["health", s.address]).status, 0)
        check("control from /dev/zero: told", s.err.until("stdin holds no lines"), s.err.text(), "that it gives no commands")
        same("control from /dev/zero: status", s.stop(), 0)


def test_ready_fifo_unread():
    """A signal ends a server that waits for someone to read its ready file."""
    ready = os.path.join(temp("ready"), "ready")
    os.mkfifo(ready)
    for number in (signal.SIGTERM, signal.SIGINT):
        with Server(f"ready file unread, signal {number}", "-ready-file", ready, wait=False) as s:
            s.err.until("cvms: algorithm ")
            began, caught = time.monotonic(), 0
            while not caught >> (number - 1) & 1 and time.monotonic() - began < 2 and s.p.poll() is None:
                with open(f"/proc/{s.p.pid}/status") as f:                 # its handler is there: the open() is next
                    caught = int(re.search(r"SigCgt:\s*(\w+)", f.read()).group(1), 16)
            for _ in range(12):                                             # it may not be at its open() yet
                s.signal(number)
                try:
                    s.p.wait(0.25)
                    break
                except subprocess.TimeoutExpired:
                    pass
            ended = s.p.poll() is not None
            check(f"ready file unread, signal {number}: ends", ended, "still there after 3 s", "the end")
            if not ended:
                s.p.kill()
                s.p.wait()


def test_descriptor_limit():
    """The soft limit is no limit: it is raised to the hard one."""
    command = ["sh", "-c", 'ulimit -Sn 40 && exec "$@"', "sh", W.cvms, *W.base]
    with Server("descriptor limit", command=command) as s:
        streams = [Stream(s.address, deaf=True) for _ in range(100)]
        text = s.err.until(r"(?s)(?>.*?manifest sent){100}")
        check("descriptor limit: 100 streams at once", text is not None, s.err.text()[-300:], "100 manifests")
        for stream in streams:
            stream.close()


def test_signals():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGABRT):
        name = f"{signal.Signals(number).name}"
        with Server(name) as s:
            stream = Stream(s.address, deaf=True)
            s.err.until("manifest sent")
            began = time.monotonic()
            s.signal(number)
            got = stream.frames()
            stream.close()
            same(f"{name}: status", s.wait(), 0)
            check(f"{name}: within 5 s", time.monotonic() - began < 15, time.monotonic() - began, "5 s")
            check(f"{name}: GOAWAY", any(f[0] == 7 for f in got), [f[:3] for f in got], "GOAWAY")
            ends = [f for f in got if f[0] == 1 and f[1] & 1 and f[2] == 1]
            check(f"{name}: the stream has an end", len(ends) == 1, [f[:3] for f in got], "trailers")
            check(f"{name}: UNAVAILABLE", ends and b"14" in ends[0][3] or ends and b"grpc-status" not in ends[0][3],
                  ends, "grpc-status 14")
            has(f"{name}: told", s.err.text(), "(?i)signal|stopping|shut|goodbye")
    with Server("SIGHUP without TLS") as s:
        for n in (1, 2):
            s.signal(signal.SIGHUP)
            check("SIGHUP without TLS: told", s.err.until("SIGHUP: there is no TLS", times=n), s.err.text(), "a line")
        same("SIGHUP without TLS: goes on", s.stand_in().status, 0)
    with Server("idle") as s:
        began = time.monotonic()
        s.signal(signal.SIGTERM)
        same("SIGTERM without connections: status", s.wait(), 0)
        check("SIGTERM without connections: at once", time.monotonic() - began < 4, time.monotonic() - began, "at once")


def big_server(name):
    """A server whose manifest does not fit into any socket buffer, and a client that reads nothing of it."""
    big = {**manifest(f"{name}: manifest", W.base)[0], "description": "d" * (24 << 20)}
    server = Server(name, base=["-manifest", write("big.json", json.dumps(big))])
    stream = Stream(server.address, deaf=True)
    stream.s.sendall(frame(4, 0, 0, struct.pack(">HI", 4, 0x7fffffff)) +        # windows of 2 GiB
                     frame(8, 0, 0, struct.pack(">I", 0x7fff0000)))
    stream.send(log("here I am"))
    server.out.until("here I am")
    return server, stream


def stuck_server(name):
    """A server whose stdout nobody reads, and which has more to write there than a pipe holds; the pipe's reading end."""
    r, w = os.pipe()
    server = Server(name, stdout=w)
    os.close(w)
    stream = Stream(server.address, deaf=True)
    stream.send(log("\x01" * 60000))           # four characters each, once it is shown
    select.select([r], [], [], LIMIT)
    return server, stream, r


def test_signal_stuck():
    """Neither a client that reads nothing nor a stdout that takes nothing holds the server for more than 5 s."""
    server, stream = big_server("SIGTERM, stuck client")
    with server as s:
        began = time.monotonic()
        s.signal(signal.SIGTERM)
        same("SIGTERM, stuck client: status", s.wait(), 0)
        check("SIGTERM, stuck client: within 5 s", time.monotonic() - began < 15, time.monotonic() - began, "5 s")
    stream.close()
    server, stream, r = stuck_server("SIGTERM, stuck stdout")
    with server as s:
        began = time.monotonic()
        s.signal(signal.SIGTERM)
        status = s.wait()
        check("SIGTERM, stuck stdout: status", status in (0, 1), status, "0, or 1 for what is lost")
        check("SIGTERM, stuck stdout: within 5 s", time.monotonic() - began < 15, time.monotonic() - began, "5 s")
        has("SIGTERM, stuck stdout: told", s.err.text(), "stdout", r"\d+ bytes")
    stream.close()
    os.close(r)


def test_signal_twice():
    server, stream, r = stuck_server("second signal")
    with server as s:
        s.signal(signal.SIGTERM)
        check("second signal: the first is told", s.err.until("(?i)signal|goodbye"), s.err.text(), "a line")
        check("second signal: still there before it", s.p.poll() is None, s.p.poll(), "a server that says goodbye")
        began = time.monotonic()
        s.signal(signal.SIGINT)
        status = s.wait()
        check("second signal: ends at once", time.monotonic() - began < 4, time.monotonic() - began, "at once")
        check("second signal: status", status in (130, 143, -2, -15), status, "that of a signal")
    stream.close()
    os.close(r)


def test_stdout_lost():
    """Without stdout the server serves until a message must be shown, then ends with status 1 and says why."""
    def until_it_ends(s):
        """Messages until the server ends.  One may get by: a child of another test's that is just being started has the
        pipe's reading end until its exec."""
        for _ in range(5):
            s.stand_in("-once", "-wait", "0s")
            try:
                s.p.wait(2)
                return
            except subprocess.TimeoutExpired:
                pass

    def goes(name, server, why):
        with server as s:
            same(f"{name}: serves until then", run(name, ["health", s.address]).status, 0)
            check(f"{name}: still there", s.p.poll() is None, s.p.poll(), "a server")
            until_it_ends(s)
            same(f"{name}: status", s.wait(), 1)
            has(f"{name}: told", s.err.text(), "stdout", why)
    shell = ["sh", "-c", 'exec "$@" >&-', "sh", W.cvms, *W.base]
    goes("stdout closed", Server("stdout closed", command=shell), "Bad file descriptor|closed")
    with open("/dev/full", "wb") as full:
        goes("stdout full", Server("stdout full", stdout=full), "No space")
    r, w = os.pipe()
    server = Server("stdout's reader gone", stdout=w)
    os.close(w)
    os.close(r)
    goes("stdout's reader gone", server, "Broken pipe|closed|gone")
    r, w = os.pipe()
    with Server("stdout lost on the way", stdout=w) as s:
        os.close(w)
        first_agent = s.stand_in("-once")
        same("stdout lost on the way: before", first_agent.status, 0)
        check("stdout lost on the way: shown", select.select([r], [], [], LIMIT)[0] and b"ATTESTATION" in os.read(r, 65536), "",
              "a message")
        os.close(r)
        until_it_ends(s)
        same("stdout lost on the way: status", s.wait(), 1)
        has("stdout lost on the way: told", s.err.text(), "stdout")
    with Server("readonly stdout", command=["sh", "-c", 'exec "$@" 1</dev/null', "sh", W.cvms, *W.base]) as s:
        until_it_ends(s)
        same("stdout open for reading only: status", s.wait(), 1)


def fifo_server(name, redirect):
    """A server by way of the shell, with descriptors as in `redirect`; ready when it fills its FIFO."""
    d = temp("fifo")
    os.mkfifo(f"{d}/ready")
    out = open(f"{d}/out", "wb")
    p = subprocess.Popen(["sh", "-c", f'exec "$@" {redirect}', "sh", W.cvms, *W.base, "-ready-file", f"{d}/ready"], cwd=d,
                         env=environment(), stdout=out)
    out.close()
    return p, read_fifo(f"{d}/ready").decode().strip(), f"{d}/out"


def test_stderr_lost():
    for name, redirect in (("closed", "2>&-"), ("full", "2>/dev/full"), ("closed, stdin as well", "<&- 2>&-"),
                           ("open for reading only", "2</dev/null")):
        name = f"stderr {name}"
        p, where, out = fifo_server(name, redirect)
        same(f"{name}: agent", run(name, ["agent", where]).status, 0)
        same(f"{name}: health", run(name, ["health", where]).status, 0)
        p.send_signal(signal.SIGTERM)
        same(f"{name}: status", end(p), 0)
        check(f"{name}: messages", b"Complete" in read(out), read(out), "the run's messages")
    p, where, out = fifo_server("all closed", "<&- >&- 2>&-")
    same("no descriptors at all: serves", run("no descriptors", ["health", where]).status, 0)
    same("no descriptors at all: goes on serving", run("no descriptors", ["health", where]).status, 0)
    p.send_signal(signal.SIGTERM)
    same("no descriptors at all: status", end(p), 0)
    p, where, out = fifo_server("no stdout and no stderr", ">&- 2>&-")
    same("no stdout and no stderr: serves", run("no stdout", ["health", where]).status, 0)
    run("no stdout and no stderr", ["agent", "-wait", "0s", where])
    same("no stdout and no stderr: status", end(p), 1)
    r, w = os.pipe()
    p = subprocess.Popen([W.cvms, *W.base, "-ready-file", os.path.join(temp("e"), "r")], env=environment(),
                         stdout=subprocess.PIPE, stderr=w, stdin=subprocess.DEVNULL)
    os.close(w)
    text = b""
    while (b"listening at" not in text or not text.endswith(b"\n")) and select.select([r], [], [], LIMIT)[0]:
        piece = os.read(r, 65536)
        text += piece or b"listening at nothing\n"
    os.close(r)
    where = re.search(rb"listening at (\S+)", text).group(1).decode()
    same("stderr's reader gone: agent", run("stderr's reader gone", ["agent", where]).status, 0)
    p.send_signal(signal.SIGTERM)
    same("stderr's reader gone: status", end(p), 0)
    check("stderr's reader gone: messages", b"Complete" in p.stdout.read(), "", "the run's messages")
    p.stdout.close()


def agent_manifest(r):
    """The manifest that `cvms agent` printed."""
    return json.loads(r.out) if r.status == 0 else None


def test_files_change():
    d = temp("change")
    algo, data, tree = write(f"{d}/algo.py", b"one"), write(f"{d}/data.csv", b"alpha"), f"{d}/tree"
    write(f"{tree}/a", b"1")
    hash_of = lambda path: run("checksum", ["checksum", path]).out.split()[0]
    b64_of = lambda digest: b64(bytes.fromhex(digest))
    with Server("change", base=["-algo-path", algo, "-data-paths", f"{data},{tree}", *W.required]) as s:
        before = hash_of(tree)
        for path, digest in ((algo, sha3(b"one")), (data, sha3(b"alpha")), (tree, before)):
            has(f"change: {os.path.basename(path)}: line at the start", s.err.text(), re.escape(path), digest)
        got = agent_manifest(s.stand_in("-once"))
        same("change: as it began", [dig(got, f"datasets.{i}.hash") for i in (0, 1)], [b64_of(sha3(b"alpha")), b64_of(before)])
        hasnot("change: no note without a change", s.err.text(), "again")
        write(algo, b"two")
        got = agent_manifest(s.stand_in("-once"))
        same("change: algorithm", dig(got, "algorithm.hash"), b64_of(sha3(b"two")))
        has("change: algorithm: note", s.err.text(), "algo.py", sha3(b"two"))
        write(f"{d}/new", b"omega")
        os.rename(f"{d}/new", data)
        write(f"{tree}/b", b"2")
        after = hash_of(tree)
        got = agent_manifest(s.stand_in("-once"))
        same("change: dataset renamed into place", dig(got, "datasets.0.hash"), b64_of(sha3(b"omega")))
        same("change: a file more in a folder", dig(got, "datasets.1.hash"), b64_of(after))
        has("change: folder: note", s.err.text(), "tree", after)
        notes = len(s.err.text().splitlines())
        s.stand_in("-once")
        fresh = "\n".join(s.err.text().splitlines()[notes:])
        hasnot("change: told once", fresh, "hashed again|has changed")
        write(f"{tree}/b", b"3")
        third = hash_of(tree)
        got = agent_manifest(s.stand_in("-once"))
        same("change: in a folder's file, same size", dig(got, "datasets.1.hash"), b64_of(third))
        os.unlink(data)
        shutil.rmtree(tree)
        got = agent_manifest(s.stand_in("-once"))
        same("change: deleted: old hash", [dig(got, f"datasets.{i}.hash") for i in (0, 1)], [b64_of(sha3(b"omega")), b64_of(third)])
        has("change: deleted: note", s.err.text(), "data.csv", "old hash|keeps")
        has("change: deleted folder: note", s.err.text(), "tree", "old hash|keeps")
        write(data, b"back")
        got = agent_manifest(s.stand_in("-once"))
        same("change: back again", dig(got, "datasets.0.hash"), b64_of(sha3(b"back")))
        has("change: back again: note", s.err.text(), "data.csv", sha3(b"back"))
    os.makedirs(f"{d}/{'l' * 200}/{'m' * 200}/{'n' * 200}/{'o' * 200}/{'p' * 200}")
    deep = write(f"{d}/{'l' * 200}/{'m' * 200}/{'n' * 200}/{'o' * 200}/{'p' * 200}/deep.csv", b"1")
    with Server("change, long path", "-data-paths", deep) as s:
        write(deep, b"2")
        s.stand_in("-once")
        has("change: long path: note", s.err.text(), "again", sha3(b"2"))


# ---- The stand-in agent ----

def test_hashing_in_slices():
    """A large input that has changed is hashed beside all else: streams that open meanwhile wait, health does not, a signal ends it."""
    path = os.path.realpath(write(f"{temp('slices')}/data.csv", b"small"))
    agent = lambda s: subprocess.Popen([W.cvms, "agent", "-once", s.address], env=environment(), stdout=subprocess.PIPE,
                                       stderr=subprocess.DEVNULL)
    with Server("slices", "-data-paths", path) as s:
        os.truncate(path, 64 << 30)
        early = agent(s)
        check("slices: it hashes", hashing(s.p, path), "nothing", "the file open")
        late = agent(s)
        s.err.until(r"stream +connected.*\n", times=2)
        same("slices: health meanwhile", run("slices: health", ["health", s.address]).status, 0)
        same("slices: agents wait", (early.poll(), late.poll()), (None, None))
        hasnot("slices: no manifest yet", s.err.text(), "manifest sent")
        write(path, b"shorter")
        got = json.loads(late.communicate(timeout=LIMIT)[0])
        same("slices: who came while it was hashed gets what it was then", dig(got, "datasets.0.hash"), b64(bytes.fromhex(sha3(b"shorter"))))
        same("slices: status of both", (early.wait(LIMIT), late.returncode), (0, 0))
        early.stdout.close()
        os.truncate(path, 64 << 30)
        last = agent(s)
        check("slices: it hashes again", hashing(s.p, path), "nothing", "the file open")
        same("slices: a signal ends it", s.stop(), 0)
        check("slices: an agent without a manifest fails", last.wait(LIMIT) > 0, last.returncode, "a failure")
        last.stdout.close()
    os.truncate(path, 0)


def test_gone_is_told_once():
    """Each kind of change that leaves an input unreadable makes one note, however many streams open."""
    d = temp("gone")
    data, tree = write(f"{d}/data.csv", b"1"), f"{d}/tree"
    write(f"{tree}/a", b"1")
    with Server("gone", "-data-paths", f"{data},{tree}") as s:
        os.unlink(data)
        os.symlink("nowhere", f"{tree}/b")
        for _ in range(3):
            s.stand_in("-once")
        same("gone: told once", [s.err.text().count(f"{p} has changed and can't be read") for p in (data, tree)], [1, 1])
        os.unlink(f"{tree}/b")
        s.stand_in("-once")
        same("gone: back", s.err.text().count(f"{tree} has changed: hashed again"), 1)
    with Server("same size and time", "-data-paths", write(data, b"one")) as s:
        before = os.stat(data)
        write(data, b"two")
        os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
        got = agent_manifest(s.stand_in("-once"))
        same("same size and time: noticed", dig(got, "datasets.0.hash"), b64(bytes.fromhex(sha3(b"two"))))


def test_progress():
    """Hashing that takes over a second is shown on a terminal, in one line that redraws itself."""
    path = f"{temp('progress')}/sparse"
    with open(path, "wb") as f:
        f.truncate(64 << 30)
    master, slave = pty.openpty()
    p = subprocess.Popen([W.cvms, "checksum", path, path], stdout=subprocess.DEVNULL, stderr=slave, env=environment())
    os.close(slave)
    shown = Collector(master)
    shown.until("hashing: \\d+ MB, [12] of 2 inputs begun.*\rcvms: hashing")
    p.send_signal(signal.SIGINT)
    same("progress: a signal ends it", p.wait(LIMIT), 130)
    shown.thread.join(LIMIT)
    os.close(master)
    hasnot("progress: one line", shown.text(), "\n")
    has("progress: shown", shown.text(), "hashing: \\d+ MB, [12] of 2")


def heads(out):
    """Whose each entry is, of what kind, and its words."""
    return re.findall(r"^\S+Z (\S+) +(agent|log-forwarder|stream) +(\S.*)", out, re.M)


EVENTS = ["ReceivingAlgorithm/InProgress", "ReceivingData/InProgress", "Running/Starting", "Running/InProgress",
          "AlgorithmRun/Warning", "Running/Completed", "ConsumingResults/Ready", "Complete/Completed"]


def test_agent():
    args = [*W.base, "-data-paths", W.data, "-algo-type", "python"]
    wanted, _ = manifest("agent's manifest", args)
    spki = base64.b64decode(der(W.key))
    key = f"userKey: {len(spki)} bytes ...{spki[-16:].hex()}"
    with Server("agent: server", base=args) as s:
        same("agent -once: the manifest as JSON", agent_manifest(s.stand_in("-once")), wanted)
    with Server("agent: server", base=args) as s:
        r = s.stand_in()
        same("agent: status", r.status, 0)
        same("agent: hashes in hex, keys short", r.out.splitlines(), [
            "id: 1", "name: sample computation", "description: sample descrption", "datasets", f"  hash: {sha3(read(W.data))}",
            f"  {key}", "  filename: data.csv", "algorithm", f"  hash: {sha3(read(W.algo))}", f"  {key}", "  algo_type: python",
            "result_consumers", f"  {key}", "agent_config", "  port: 7002"])
        s.err.until("stream ended", times=2)
        out = s.out.text()
        same("agent: events in order", re.findall(r"EVENT +(\S+)", out), EVENTS)
        has("agent: attestation report", out, "agent", "ATTESTATION")
        has("agent: run_res", out, "agent", "RUN_RES", "accepted")
        has("agent: a log", out, "log-forwarder", "INFO")
        has("agent: continuation lines begin with a mark", out, r"^    \| .*epoch 1")
        hasnot("agent: no failure", out, "Failed|error:")
        for words in (["manifest sent: [1-9]"], ["connected"],
                      ["agent", "2 messages"]):
            has(f"agent: server's line {words}", s.err.text(), *words)
    with Server("agent without data: server") as s:
        same("agent without data: status", s.stand_in().status, 0)
        s.err.until("stream ended", times=2)
        same("agent without data: events", re.findall(r"EVENT +(\S+)", s.out.text()), [e for e in EVENTS if "Data" not in e])
    with Server("agent -once: server") as s:
        r = s.stand_in("-once")
        same("agent -once: status", r.status, 0)
        check("agent -once: manifest", agent_manifest(r) is not None, r.out, "the manifest")
        s.err.until("stream ended")
        same("agent -once: only the report", [h[2] for h in heads(s.out.text())], ["ATTESTATION empty: no TEE"])
    with Server("agent -repeat: server") as s:
        r = s.stand_in("-repeat", "3")
        same("agent -repeat 3: status", r.status, 0)
        s.err.until("stream ended", times=6)
        same("agent -repeat 3: runs", s.out.text().count("Complete/Completed"), 3)
        same("agent -repeat 3: reports", s.out.text().count("ATTESTATION"), 3)
        same("agent -repeat 3: manifests", r.out.count("sample computation"), 3)
        has("agent -repeat 3: told", r.err, "3 of 3")
    with Server("agent -repeat -once: server") as s:
        same("agent -repeat 4 -once: status", s.stand_in("-repeat", "4", "-once").status, 0)
        s.err.until("stream ended", times=4)
        same("agent -repeat 4 -once: reports", s.out.text().count("ATTESTATION"), 4)


def test_agent_big():
    """A manifest of several chunks."""
    d = temp("big")
    write(f"{d}/d")
    with Server("agent, big manifest: server", "-data-paths", ",".join("d" * 20000), "-public-key-path", W.rsa, cwd=d) as s:
        r = s.stand_in()
        same("agent, big manifest: status", r.status, 0)
        same("agent, big manifest: datasets", r.out.count("datasets\n"), 20000)
        has("agent, big manifest: told", r.err, r"(1\d) chunks", "20000 datasets")


def test_agent_fails():
    rows = [("ReceivingManifest", "RUN_RES +error: .*fail", []),
            ("ReceivingAlgorithm", "Failed/Failed", ["ReceivingAlgorithm/InProgress", "Failed/Failed"]),
            ("ReceivingData", "Failed/Failed", ["ReceivingAlgorithm/InProgress", "ReceivingData/InProgress", "Failed/Failed"]),
            ("Running", "Running/Failed", ["ReceivingAlgorithm/InProgress", "ReceivingData/InProgress", "Running/Starting",
                                           "Running/InProgress", "Running/Failed", "Failed/Failed"])]
    for state, shown, events in rows:
        with Server(f"agent -fail {state}: server", "-data-paths", W.data) as s:
            same(f"agent -fail {state}: status", s.stand_in("-fail", state).status, 0)
            s.err.until("stream ended", times=2)
            has(f"agent -fail {state}: shown", s.out.text(), shown)
            same(f"agent -fail {state}: events", re.findall(r"EVENT +(\S+)", s.out.text()), events)
    with Server("agent -fail ReceivingData without data: server") as s:
        same("agent -fail ReceivingData without data: status", s.stand_in("-fail", "ReceivingData").status, 0)
        s.err.until("stream ended", times=2)
        has("agent -fail ReceivingData without data: fails all the same", s.out.text(), "Failed/Failed")
        hasnot("agent -fail ReceivingData without data: is no success", s.out.text(), "Running/Completed|Complete/Completed")


def test_agent_usage():
    for name, args, patterns in (
            ("-fail state", ["-fail", "Nowhere"], ["-fail", "Nowhere", "ReceivingManifest", "Running"]),
            ("-repeat 0", ["-repeat", "0"], ["-repeat", '"0"']), ("-repeat x", ["-repeat", "x"], ["-repeat", '"x"']),
            ("-wait forever", ["-wait", "forever"], ["-wait", "forever", "90s"]), ("-wait 5", ["-wait", "5"], ["-wait", '"5"']),
            ("-wait -5s", ["-wait", "-5s"], ["-wait", "-5s"]), ("-wait empty", ["-wait="], ["-wait"]),
            ("two addresses", ["a:1", "b:2"], ["b:2"]), ("port 0", ["localhost:0"], ["localhost:0"]),
            ("a host too long", ["h" * 256 + ":1"], ["hhh:1"]),
            ("a URL", ["http://localhost:7001"], ["URL", "leave out", "localhost:7001"]),
            ("brackets that stay open", ["[::1"], ["::1"]), ("behind brackets", ["[::1]7001"], [r"\[::1\]:7001"]),
            ("IPv6 without brackets", ["::1:7001"], [r"\[::1\]:7001"]), ("port empty", ["localhost:"], ["localhost:"]),
            ("port abc", ["localhost:abc"], ["localhost:abc"]), ("port 65536", ["localhost:65536"], ["localhost:65536"]),
            ("an empty address", [""], ['""', "localhost:7001"]),
            ("-replay and another play", ["-replay", "x", "-once"], ["-replay", "-once"]),
            ("a word behind the flags behind the address", ["localhost:1", "-once", "x:1"], ["x:1"])):
        r = run(f"agent {name}", ["agent", *args])
        same(f"agent, {name}: status", r.status, 2)
        has(f"agent, {name}", r.err, *patterns)
    for name, args, patterns in (("two addresses", ["a:1", "b:2"], ["b:2"]), ("port", ["localhost:abc"], ["localhost:abc"]),
                                 ("-wait", ["-wait", "x"], ["-wait"])):
        r = run(f"health {name}", ["health", *args])
        same(f"health, {name}: status", r.status, 2)
        has(f"health, {name}", r.err, *patterns)
    r = run("agent, all at once", ["agent", "-fail", "Nowhere", "-repeat", "0", "-fast", "a:1", "b:2"])
    for words in (["-fail", "Nowhere"], ["-repeat", '"0"'], ["-fast", "-replay"], ['"b:2"']):
        has("agent, all mistakes at once", r.err, *words)
    r = run("agent, address in the environment", ["agent"], {"AGENT_CVM_GRPC_URL": "x:y"})
    same("agent, address in the environment: status", r.status, 2)
    has("agent, address in the environment", r.err, "AGENT_CVM_GRPC_URL", '"x:y"')
    r = run("agent, a URL in the environment", ["agent"], {"AGENT_CVM_GRPC_URL": "http://localhost:7001"})
    has("agent, a URL in the environment", r.err, "AGENT_CVM_GRPC_URL", "leave out")
    for command in ("agent", "health"):
        for wait, least in (("0s", 0), ("1200ms", 1.2)):
            r = run(f"{command} resolve", [command, "-wait", wait, "no-such-host.invalid:1"])
            same(f"{command}: name that does not resolve: status", r.status, 1)
            has(f"{command}: name that does not resolve", r.err, r'can\'t resolve "no-such-host\.invalid": ')
            same(f"{command}: name that does not resolve, -wait {wait}: told", len(r.err.splitlines()), 1 + (least > 1))
            check(f"{command}: name that does not resolve, -wait {wait}", r.seconds >= least, r.seconds, f"{least} s")


def test_no_server():
    for command, args, least, most in (("agent", ["-wait", "300ms"], 0.25, 8), ("agent", ["-wait", "0s"], 0, 8),
                                       ("health", [], 0, 8), ("health", ["-wait", "300ms"], 0.25, 8)):
        where = f"127.0.0.1:{free_port()}"
        name = f"no server: {command} {' '.join(args)}"
        r = run(name, [command, *args, where])
        same(f"{name}: status", r.status, 1)
        has(name, r.err, re.escape(where), "refused")
        check(f"{name}: {least} to {most} s", least <= r.seconds <= most, r.seconds, f"{least} to {most}")
        same(f"{name}: one line", len(r.err.splitlines()), 1)
        same(f"{name}: nothing on stdout", r.out, "")
    with socket.socket() as listener:          # something that is not a CVMS server: it hangs up
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        where = f"127.0.0.1:{listener.getsockname()[1]}"
        stop = threading.Event()

        def hang_up():
            while not stop.is_set():
                try:
                    c = listener.accept()[0]
                except OSError:
                    return
                c.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
                c.close()
        threading.Thread(target=hang_up, daemon=True).start()
        for command in ("agent", "health"):
            r = run(f"not a CVMS server: {command}", [command, where], limit=15)
            same(f"not a CVMS server: {command}: status", r.status, 1)
            check(f"not a CVMS server: {command}: told", r.err.strip(), r.err, "a line")
        stop.set()
        listener.shutdown(socket.SHUT_RDWR)


def test_waiting_is_told():
    """A client that waits for its server says so once."""
    for command in ("agent", "health"):
        where = f"127.0.0.1:{free_port()}"
        r = run(f"waiting: {command}", [command, "-wait", "1200ms", where])
        same(f"waiting: {command}: told once", len(re.findall(f"no server at {where} yet .*refused.* for 1 s", r.err)), 1)
        same(f"waiting: {command}: status", r.status, 1)


HEAD = frame(HEADERS, 4, 1, literal(":status", "200") + literal("content-type", "application/grpc"))


def trailers(status, message="", head=b""):
    return frame(HEADERS, 5, 1, head + literal("grpc-status", str(status)) + literal("grpc-message", message))


def data(*messages, flags=0):
    whole = b"".join(b"\0" + struct.pack(">I", len(m)) + m for m in messages)
    return b"".join(frame(0, flags, 1, whole[i:i + 16384]) for i in range(0, len(whole), 16384))


class Fake:
    """A server that answers each connection's first END_HEADERS with the next of these answers, the last one again and
    again; `behind` goes out behind the client's END_STREAM.  None as an answer: it hangs up at once."""
    def __init__(self, *answers, behind=b""):
        self.answers, self.behind, self.got, self.seen = answers, behind, [], threading.Condition()
        self.s = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.s.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                c = self.s.accept()[0]
                self.got.append(b"")
                threading.Thread(target=self.serve, args=(c, len(self.got) - 1), daemon=True).start()

    def serve(self, c, n):
        answer = self.answers[min(n, len(self.answers) - 1)]
        done = ended = False
        with c, contextlib.suppress(OSError):
            while answer is not None and (piece := c.recv(65536)):
                with self.seen:
                    self.got[n] += piece
                    self.seen.notify_all()
                frames = frames_of(self.got[n][24:])[0]
                if not done and any(f[0] == HEADERS for f in frames):
                    c.sendall(answer if answer[:4] == b"HTTP" else frame(SETTINGS, 0, 0) + frame(WINDOW, 0, 0, struct.pack(">I", 1 << 24)) + answer)
                    done = True
                if done and not ended and any(f[0] in (0, HEADERS) and f[1] & 1 for f in frames):
                    c.sendall(self.behind)
                    ended = True

    def frames(self, n):
        return frames_of(self.got[n][24:])[0]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.s.close()


SERVING = HEAD + data(field(1, 1)) + trailers(0)


def test_health_answers():
    """`cvms health` judges by the status, not by the message, and tells what else has come."""
    rows = [("OK", SERVING, 0, "SERVING"), ("1xx first", frame(HEADERS, 4, 1, literal(":status", "103")) + SERVING, 0, "SERVING"),
            ("a status behind the message", HEAD + data(field(1, 1)) + trailers(13, "late%0A%25"), 1, r"INTERNAL: late\\n%"),
            ("no message", HEAD + trailers(0), 1, "no status"), ("NOT_SERVING", HEAD + data(field(1, 2)) + trailers(0), 1, "NOT_SERVING"),
            ("DATA first", data(field(1, 1)), 1, "INTERNAL: the server's answer breaks HTTP/2: PROTOCOL_ERROR"),
            ("RST_STREAM", HEAD + frame(RST, 0, 1, struct.pack(">I", 11)), 1, "RESOURCE_EXHAUSTED: the server has reset.*ENHANCE_YOUR_CALM"),
            ("GOAWAY", frame(GOAWAY, 0, 0, struct.pack(">II", 0, 11) + b"full\x1b"), 1, r"UNAVAILABLE: .*GOAWAY, ENHANCE_YOUR_CALM: full\\x1b"),
            ("HTTP/1.1", b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", 1, "answers in HTTP/1.1"),
            ("HTTP status", frame(HEADERS, 5, 1, literal(":status", "404") + literal("content-type", "text/html")), 1,
             'UNIMPLEMENTED: HTTP status 404 with content-type "text/html"')]
    for name, answer, status, told in rows:
        with Fake(answer) as fake:
            r = run(f"health answer: {name}", ["health", fake.address])
            same(f"health answer: {name}: status", r.status, status)
            has(f"health answer: {name}", r.err, told)
            same(f"health answer: {name}: one line", len(r.err.splitlines()), 1)


def test_strangers():
    """Connections that come to nothing have a line each, but not without a limit: the others are counted."""
    with Server("strangers") as s:
        for _ in range(60):
            with socket.create_connection(s.address.rsplit(":", 1)) as c:
                c.sendall(b"garbage, not HTTP/2, and long enough\r\n\r\n")
                while c.recv(4096):
                    pass
        same("strangers: health", run("health", ["health", s.address]).status, 0)
        s.stop()
        lines = len(re.findall("no connection preface", s.err.text()))
        check("strangers: lines", 20 <= lines <= 30, lines, "20 and a few")
        same("strangers: all counted", lines + sum(map(int, re.findall(r"(\d+) more lines? about", s.err.text()))), 60)


def test_wait_until_ready():
    """-wait goes on while the server is not ready: it hangs up, refuses, is UNAVAILABLE.  -timeout ends a try."""
    refusals = [None, frame(RST, 0, 1, struct.pack(">I", 7)), frame(GOAWAY, 0, 0, struct.pack(">II", 0, 0)),
                trailers(14, "starting", literal(":status", "200") + literal("content-type", "application/grpc")),
                frame(HEADERS, 5, 1, literal(":status", "503"))]
    path = os.path.join(temp(), "m")
    same("-wait: the manifest", run("manifest", ["manifest", *W.base, "-o", path]).status, 0)
    manifest = HEAD + data(field(1, field(1, read(path)) + field(2, "1"))) + data(field(1, field(2, "1") + field(3, 1)))
    for command, args, answer in (("health", [], SERVING), ("agent", ["-once"], manifest)):
        with Fake(*refusals, answer, behind=b"" if command == "health" else trailers(0)) as fake:
            r = run(f"-wait: {command}", [command, "-wait", "20s", *args, fake.address])
            same(f"-wait: {command}: status", r.status, 0)
            same(f"-wait: {command}: tries", len(fake.got), len(refusals) + 1)
            same(f"-wait: {command}: told once", len(re.findall("trying again", r.err)), 1)
        with Fake(b"") as fake:                # SETTINGS, and nothing more
            r = run(f"-timeout: {command}", [command, "-wait", "0", "-timeout", "300ms", *args, fake.address])
            same(f"-timeout: {command}: status", r.status, 1)
            has(f"-timeout: {command}", r.err, "DEADLINE_EXCEEDED", "-timeout")
            check(f"-timeout: {command}: in time", 0.25 < r.seconds < 8, r.seconds, "0.3 s")
        with Fake(b"", answer, behind=b"" if command == "health" else trailers(0)) as fake:
            r = run(f"-timeout, -wait: {command}", [command, "-wait", "20s", "-timeout", "300ms", *args, fake.address])
            same(f"-timeout, -wait: {command}: status", r.status, 0)
        with Fake(data(b"x")) as fake:         # what does not get better is told at once
            r = run(f"no -wait: {command}", [command, "-wait", "20s", *args, fake.address])
            same(f"no -wait: {command}: status", r.status, 1)
            check(f"no -wait: {command}: at once", r.seconds < 8, r.seconds, "under 8 s")
    with Fake(manifest) as fake:               # it takes all, and never says so
        r = run("-timeout: the end", ["agent", "-once", "-timeout", "300ms", fake.address])
        has("-timeout: the end", r.err, "the agent's stream ended: DEADLINE_EXCEEDED")


def test_agent_and_odd_servers():
    """`cvms agent` against what no CVMS server does."""
    path = os.path.join(temp(), "m")
    run("manifest", ["manifest", *W.base, "-set", "description=" + "x" * 40000, "-o", path])
    whole = read(path)
    pieces = [whole[:5], whole[5:30000], b"", whole[30000:]]
    chunks = HEAD + data(*(field(1, field(1, p) + field(2, "1")) for p in pieces)) + data(field(1, field(2, "1") + field(3, 1)))
    with Fake(chunks, behind=trailers(0)) as fake:
        r = run("odd chunks", ["agent", "-once", fake.address])
        same("odd chunks: status", r.status, 0)
        has("odd chunks", r.err, f"{len(whole)} bytes in 5 chunks")
        r = run("-max-message", ["agent", "-once", "-max-message", "20000", fake.address])
        same("-max-message: status", r.status, 1)
        has("-max-message", r.err, "RESOURCE_EXHAUSTED: .*larger than max .* 20000")
    odd = HEAD + data(field(1, field(1, b"x") + field(2, "1")), field(1, field(1, b"y") + field(2, "2")))
    with Fake(odd) as fake:
        has("another computation's chunk", run("another's chunk", ["agent", fake.address]).err, "FAILED: chunk 2 belongs to another computation")
    for i in range(10):                        # OK, and nothing taken
        with Fake(chunks + trailers(0)) as fake:
            r = run("OK too early", ["agent", fake.address])
            same("OK too early: status", r.status, 1)
            has("OK too early", r.err, "FAILED.*before the server had taken everything")
    asked = [field(4, field(1, str(i))) for i in range(1000)]
    with Fake(HEAD + data(*asked)) as fake:
        p = subprocess.Popen([W.cvms, "agent", fake.address], env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
        answer = lambda i: field(5, field(1, str(i)) + field(2, "ReceivingManifest"))
        with fake.seen:
            fake.seen.wait_for(lambda: fake.got and answer(999) in fake.got[0], LIMIT)
            same("questions at once: answered", sum(answer(i) in fake.got[0] for i in range(1000)), 1000)
            same("questions at once: HEADERS of its own", sum(f[0] == HEADERS for f in fake.frames(0)), 1)
        p.send_signal(signal.SIGTERM)
        err = p.communicate(timeout=LIMIT)[1].decode(errors="replace")
        check("questions at once: status", p.returncode == 143, f"{p.returncode}: {err}", "143")
        sanitizers("questions at once", err)


def test_one_file():
    """stdout and stderr in one file, as on a terminal: the lines stand in their order."""
    r, w = os.pipe()
    p = subprocess.Popen([W.cvms, *W.base], cwd=W.dir, env=environment(), stdin=subprocess.DEVNULL, stdout=w, stderr=w)
    os.close(w)
    both = Collector(r)
    address = re.search(r"listening at (\S+)", both.until(r"listening at .*\n") or "").group(1)
    same("one file: agent", run("one file: agent", ["agent", address]).status, 0)
    text = both.until(r"log-forwarder +stream ended") or ""
    p.send_signal(signal.SIGTERM)
    same("one file: status", end(p), 0)
    at = [text.find(s) for s in ("stream        connected", "ATTESTATION", "manifest sent", "RUN_RES", "agent         stream ended")]
    check("one file: the agent's lines", -1 not in at and at == sorted(at), text, "in their order")
    at = [text.find(s) for s in ("Running/Starting", "Complete/Completed", "log-forwarder stream ended")]
    check("one file: the log-forwarder's lines", -1 not in at and at == sorted(at), text, "in their order")


def test_stopped_while_connecting():
    """A server whose queue of connections is full answers nothing at all: a client can be stopped, and gives up in time."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        where = f"127.0.0.1:{listener.getsockname()[1]}"
        for s in (first, second):
            s.setblocking(False)
            s.connect_ex(listener.getsockname())
        r = run("connecting: -wait is over", ["health", "-wait", "500ms", where])
        same("connecting: -wait is over: status", r.status, 1)
        has("connecting: -wait is over", r.err, re.escape(where), "timed out")
        check("connecting: as long as -wait says", 0.45 <= r.seconds < 8, r.seconds, "0.5 s")
        nohup = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for numbers, before, status in (([signal.SIGTERM], None, 143), ([signal.SIGHUP], None, 129), ([signal.SIGHUP, signal.SIGTERM], nohup, 143)):
            p = subprocess.Popen([W.cvms, "agent", "-wait", "20s", where], env=environment(), stdin=subprocess.DEVNULL,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=before)
            wait_for_connect(p.pid)
            for number in numbers:
                p.send_signal(number)
            err = p.communicate(timeout=LIMIT)[1].decode(errors="replace")
            same(f"stopped by {numbers} while it connects: status", p.returncode, status)
            same(f"stopped by {numbers} while it connects: told", len(re.findall("signal ", err)), 1)
            sanitizers("stopped while it connects", err)


def wait_for_connect(pid):
    """Returns once a socket of the process is in the state SYN_SENT; /proc can't be waited for."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        sockets = descriptors(pid)
        with open("/proc/net/tcp") as f:
            if any(row.split()[3] == "02" and f"socket:[{row.split()[9]}]" in sockets for row in f.readlines()[1:]):
                return
        time.sleep(0.02)
    check("stopped while it connects: it connects", False, "no socket", "one in SYN_SENT")


def test_late_server():
    """The client is there before the server."""
    for command, args in (("agent", []), ("agent", ["-wait", "20s"]), ("health", ["-wait", "20s"])):
        port = free_port()
        name = f"late server: {command} {' '.join(args)}"
        p = subprocess.Popen([W.cvms, command, *args, f"127.0.0.1:{port}"], env=environment(), stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        with Server(name, env={"PORT": str(port)}):
            try:
                out, err = p.communicate(timeout=LIMIT)
            except subprocess.TimeoutExpired:
                p.kill()
                out, err = p.communicate()
            same(f"{name}: status", p.returncode, 0)
            check(f"{name}: output", command == "health" or b"sample computation" in out, out, "the manifest")
            sanitizers(name, err.decode(errors="replace"))


def test_job_id():
    with Server("job-id: server") as s:
        same("job-id: status", s.stand_in("-job-id", "cvm-42").status, 0)
        s.err.until("stream ended", times=2)
        both = {("cvm-42", "agent"), ("cvm-42", "log-forwarder")}
        same("job-id: on every entry", {h[:2] for h in heads(s.out.text())}, both)
        same("job-id: on the server's lines", {h[:2] for h in heads(s.err.text())}, both)
    with Server("job-id, json: server", "-output", "json") as s:
        s.stand_in("-job-id", "cvm-42")
        s.err.until("stream ended", times=2)
        lines = [json.loads(x) for x in s.out.text().splitlines()]
        same("job-id, json", {x.get("job_id") for x in lines}, {"cvm-42"})
        same("job-id, json: streams", {x["stream"] for x in lines}, {"agent", "log-forwarder"})
    with Server("agents at once: server") as s:
        agents = [subprocess.Popen([W.cvms, "agent", "-job-id", f"job{i}", s.address], env=environment(), stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for i in range(6)]
        same("agents at once: status", [end(p, LIMIT) for p in agents], [0] * 6)
        s.err.until("stream ended", times=12)
        for i in range(6):
            same(f"agents at once: events of job{i}", re.findall(rf"job{i} +log-forwarder EVENT +(\S+)", s.out.text()),
                 [e for e in EVENTS if "Data" not in e])


def test_agent_lost():
    """The server ends under the agent; the agent's own stdout is lost."""
    with Server("agent's stdout closed: server") as s:
        r = run("agent's stdout closed", [], command=["sh", "-c", 'exec "$@" >&-', "sh", W.cvms, "agent", s.address])
        same("agent's stdout closed: status", r.status, 1)
        has("agent's stdout closed: told", r.err, "stdout")
        with open("/dev/full", "wb") as full:
            r = run("agent's stdout full", ["agent", s.address], stdout=full)
        same("agent's stdout full: status", r.status, 1)
        has("agent's stdout full: told", r.err, "stdout", "No space")
    listener = socket.socket()
    listener.settimeout(LIMIT)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    p = subprocess.Popen([W.cvms, "agent", f"127.0.0.1:{listener.getsockname()[1]}"], env=environment(), stdin=subprocess.DEVNULL,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    held = listener.accept()[0]                # taken, and never answered
    held.recv(24)
    p.send_signal(signal.SIGINT)
    status = end(p)
    check("agent, SIGINT: status", status in (130, -2), status, "130")
    p.stdout.close()
    p.stderr.close()
    held.close()
    listener.close()


def test_health():
    with Server("health: server") as s:
        for name, args, status, text in (("default", [], 0, "SERVING"), ("by name", ["-service", "cvms_test_server"], 0, "SERVING"),
                                         ("empty name", ["-service", ""], 0, "SERVING"), ("other", ["-service", "other"], 1, "NOT_FOUND"),
                                         ("agent", ["-service=agent"], 1, "NOT_FOUND"), ("-wait", ["-wait", "5s"], 0, "SERVING")):
            for i in range(3):                 # the answer and its trailers may come apart
                r = run(f"health {name}", ["health", *args, s.address])
                same(f"health {name}: status", r.status, status)
                has(f"health {name}", r.out + r.err, re.escape(s.address), text)
                same(f"health {name}: one line", len((r.out + r.err).splitlines()), 1)
                check(f"health {name}: at once", r.seconds < 8, r.seconds, "under 8 s")
        hasnot("health: the server says nothing of it", s.err.text(), "PROTOCOL_ERROR|error|ERROR")


# ---- What the user sees ----

CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f\x80-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
NASTY = ["\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "bell\x07 back\x08 del\x7f nul\x00", "c1 \u009b31m", "bidi \u202egpj.exe\u2066",
         "line one\nline two\n\nline four", "carriage\rreturn", "tab\there", "crlf\r\nline", "forged\n2026-01-01T00:00:00.000Z 1.2.3.4:5 agent EVENT x",
         "größe 漢字 😀", "", "\n", "quote\" back\\slash </script>", "\u2028sep\u2029", "x" * 40000]


def test_nasty_text():
    """Control characters, escapes and forged lines in a log are shown, never raw."""
    nasty_fields = field(1, field(1, "text\x1b") + field(2, "id\x1b[2J\n") + field(3, "LEV\x1b\nEL"))
    event = field(2, field(1, "type\x1b\n") + field(4, b"\x1b{\n}\x00\xff") + field(5, "orig\x07") + field(6, "stat\r\n"))
    for form in ("text", "json"):
        with Server(f"nasty, {form}", "-output", form) as s:
            stream = Stream(s.address, deaf=True)
            stream.send(*(log(t) for t in NASTY), nasty_fields, event, log("the last one"))
            s.out.until("the last one")
            stream.close()
            s.err.until("stream ended|closed|reset")
            data = s.out.bytes()
            out = data.decode(errors="replace")
            check(f"nasty, {form}: valid UTF-8", b"\xff" not in data and "\ufffd" not in out.replace("\\ufffd", ""), repr(out[-300:]), "UTF-8")
            found = CONTROL.search(out.replace("\t", ""))   # a tab is a tab
            check(f"nasty, {form}: nothing raw", not found, found and repr(out[max(0, found.start() - 60):found.end() + 20]), "escapes")
            if form == "text":
                for wanted in (r"\x1b[31mred\x1b[0m", r"\x07", r"\u202egpj.exe", "größe 漢字 😀", r"carriage\rreturn"):
                    check(f"nasty, text: {wanted}", wanted in out, shorten(out, 1500), wanted)
                entries = [line for line in out.splitlines() if re.match(r"\d{4}-\d\d-\d\dT", line)]
                same("nasty, text: entries", len(entries), len(NASTY) + 3)
                hasnot("nasty, text: no forged entry", out, r"^2026-01-01T00:00:00.000Z")
                has("nasty, text: continuation", out, r"^    \| line two")
                has("nasty, text: continuation after an empty line", out, r"^    \| line four")
                check("nasty, text: a long one is whole", "x" * 40000 in out, len(out), "40000 letters")
            else:
                lines = [json.loads(x) for x in out.splitlines()]
                same("nasty, json: lines", len(lines), len(NASTY) + 3)
                same("nasty, json: texts", [x["message"]["agentLog"].get("message", "") for x in lines[:len(NASTY)]], NASTY)
                check("nasty, json: the rest", lines[-1]["message"]["agentLog"]["message"] == "the last one", lines[-1], "the last one")
                same("nasty, json: bytes", lines[-2]["message"]["agentEvent"]["details"], b64(b"\x1b{\n}\x00\xff"))


def test_bad_utf8():
    """A proto3 string that is not UTF-8: shown escaped, or its stream refused with a line that says why; never raw."""
    for bad in (b"bad \xff\xfe utf-8", b"\xed\xa0\x80", b"cut \xe2\x82", b"\xc0\x80"):
        for form in ("text", "json"):
            with Server(f"bad UTF-8, {form}", "-output", form) as s:
                stream = Stream(s.address, deaf=True)
                stream.send(log("before"), log(bad), end=True)
                s.err.until("stream ended")
                stream.close()
                check(f"bad UTF-8 {bad}, {form}: nothing raw", bad not in s.out.bytes() + s.err.bytes(), s.out.bytes() + s.err.bytes(), "escapes")
                has(f"bad UTF-8 {bad}, {form}: before it", s.out.text(), "before")
                check(f"bad UTF-8 {bad}, {form}: told", len(s.out.text().splitlines()) == 2 or "UTF-8" in s.err.text(),
                      s.out.text() + s.err.text(), "the message, or a line that says why not")


def test_unknown_fields():
    """Every field is shown, unknown ones by number; so are messages that are hardly any."""
    messages = [field(15, "future"), field(1, field(1, "known") + field(77, "extra")), b"", field(16, 12345),
                field(1, field(1, "many")) + 100000 * field(15, 1), log("the last one")]
    for form in ("text", "json"):
        with Server(f"unknown fields, {form}", "-output", form) as s:
            stream = Stream(s.address, deaf=True)
            stream.send(*messages)
            s.out.until("the last one")
            stream.close()
            out = s.out.text().splitlines()
            same(f"unknown fields, {form}: entries", len(out), len(messages))
            for line, number in ((0, "15"), (1, "77"), (3, "16")):
                has(f"unknown fields, {form}: {number}", out[line] if line < len(out) else "", rf"\b{number}\b")
            check(f"unknown fields, {form}: of many a hundred", len(out[4]) < 8000, len(out[4]), "a bounded line")
            if form == "text":
                has("unknown fields, text: the rest is counted", out[4], r"many.*\(unknown fields left out: 99900\)$")
            if form == "json":
                many = json.loads(out[4])
                same("unknown fields, json: the rest is counted", (len(many["unknown"]), many["unknown_left_out"]), (100, 99900))
                same("unknown fields, json: message stays the known part", json.loads(out[1])["message"], {"agentLog": {"message": "known"}})
    with Server("every field", "-output", "text") as s:
        stream = Stream(s.address, [("job-id", "jobX"), ("user-agent", "test")], deaf=True)
        stream.send(field(6, field(1, b"\x01\x02") + field(2, "serial9")), field(3, field(1, "comp7") + field(2, "went wrong")),
                    field(4, field(1, "comp8") + field(2, "stopped it")), field(5, field(1, "id9") + field(2, "Running")),
                    field(7, field(1, b"tok") + field(2, "serial10")),
                    field(1, field(1, "hello") + field(2, "comp11") + field(3, "WARN") + field(4, field(1, 1700000000) + field(2, 5000000))),
                    field(2, field(1, "Type") + field(2, field(1, 1700000001)) + field(3, "comp12") + field(4, b"{}") + field(5, "orig") +
                          field(6, "Stat")))
        s.out.until("Type.*\n")
        stream.close()
        out = s.out.text()
        for words in (["ATTESTATION", "serial9", "0102"], ["went wrong", "comp7"], ["stopped it", "comp8"], ["Running", "id9"],
                      ["tok", "serial10"], ["WARN", "hello", "comp11", r"2023-11-14T22:13:20\.005Z"],
                      ["Type/Stat", "comp12", "orig", "2023-11-14T22:13:21"]):
            has(f"every field: {words}", out, r"jobX +agent ", *words)


def test_output_forms():
    """The same run in both forms."""
    args = [*W.base, "-data-paths", W.data]
    with Server("form text", base=args) as s:
        s.stand_in()
        s.err.until("stream ended", times=2)
        text = s.out.text()
    with Server("form json", "-output", "json", base=args) as s:
        s.stand_in()
        s.err.until("stream ended", times=2)
        lines = [json.loads(x) for x in s.out.text().splitlines()]
        hasnot("json: nothing raw", s.out.text(), "[\x00-\x09\x0b-\x1f\x7f]")
    for x in lines:
        good = set(x) >= {"time", "peer", "stream", "message"} and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", x["time"]) and \
            re.fullmatch(r"127\.0\.0\.1:\d+", x["peer"]) and x["stream"] in ("agent", "log-forwarder") and len(x["message"]) == 1
        check("json: a line's members", good, x, "time, peer, stream, message")
    events = [x["message"]["agentEvent"] for x in lines if "agentEvent" in x["message"]]
    logs = [x["message"]["agentLog"] for x in lines if "agentLog" in x["message"]]
    same("json: events", [f"{e['eventType']}/{e['status']}" for e in events], EVENTS)
    same("json: originators", [e["originator"] for e in events if e["originator"] != "agent"], ["computation-runner"])
    same("json: details", {base64.b64decode(e["details"]) for e in events}, {b"{}"})
    same("json: levels", {x["level"] for x in logs}, {"INFO", "WARN", "DEBUG", "ERROR"})
    same("json: computation", {x["computationId"] for x in events + logs}, {"1"})
    check("json: timestamps", all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}(\.\d+)?Z", x["timestamp"]) for x in events + logs), events, "RFC 3339")
    same("json: the agent's messages", [x["message"] for x in lines if x["stream"] == "agent"],
         [{"vTPMattestationReport": {}}, {"runRes": {"computationId": "1"}}])
    same("text and json: as many entries", len(heads(text)), len(lines))
    for x in logs:
        first_line = x["message"].splitlines()[0]
        has(f"text has the log {first_line!r}", text, x["level"], re.escape(first_line))
    hasnot("text: no colour in a pipe", text, "\x1b")


def on_terminal(name, env):
    master, slave = pty.openpty()
    with Server(name, stdout=slave, env=env) as s:
        os.close(slave)
        shown = Collector(master)
        s.stand_in("-fail", "Running")
        shown.until("Failed/Failed.*\n")
        s.err.until("stream ended", times=2)
    shown.thread.join(LIMIT)
    os.close(master)
    return shown.text()


def test_colour():
    text = on_terminal("terminal", {"TERM": "xterm"})
    check("terminal: colour", "\x1b[" in text, repr(text[:300]), "colour")
    check("terminal: every colour ends", text.count("\x1b[0m") >= len(re.findall("\x1b\\[[1-9]", text)) > 0, repr(text), "a reset for each")
    hasnot("terminal: nothing but colours", re.sub("\x1b\\[[0-9;]*m", "", text).replace("\r\n", "\n"), "[\x00-\x09\x0b-\x1f\x7f]")
    hasnot("terminal, NO_COLOR: none", on_terminal("NO_COLOR", {"TERM": "xterm", "NO_COLOR": "1"}), "\x1b")
    hasnot("terminal, TERM=dumb: none", on_terminal("TERM=dumb", {"TERM": "dumb"}), "\x1b")
    with Server("pipe, with TERM", env={"TERM": "xterm-256color"}) as s:
        s.stand_in()
        s.err.until("stream ended", times=2)
        hasnot("pipe: no colour", s.out.text(), "\x1b")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    W.make(sys.argv[1])
    tests = named(globals(), ["test_signal_stuck"])
    sys.exit(harness.main(tests, 4))      # the one that waits 5 s begins first
