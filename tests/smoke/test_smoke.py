#!/usr/bin/env python3
"""The smoke test's verdicts, steering, records and faults.  usage: test_smoke.py CVMS [-v] [NAME...]

Agents and log-forwarders are played by a small HTTP/2 client, message by message.  Each function named test_... is one
subject; NAMEs pick those that contain one of them.  Python's standard library only; loopback only; every port is the
system's choice; what is awaited is an event, or a PING's answer.  The last line is `N passed, M failed`.
"""
import base64
import datetime
import fcntl
import hashlib
import json
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import xml.etree.ElementTree as xml

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import harness  # noqa: E402
from harness import (  # noqa: E402
    ACCEPTED, LIMIT, RST, Server, Stream, W, check, environment, event, field, fields, first, frame, has, hasnot, log, named, need, read, run, same,
    sanitizers, temp, write)

MIB = 1 << 20                               # bytes of the manifest in a chunk
BIG = ["-set", "description=" + "d" * 100000]        # grows in big()


# The messages that are recorded, and how canonical JSON names their fields: number -> (name, kind).
SCHEMA = {
    "client": {1: ("agentLog", "log"), 2: ("agentEvent", "event"), 3: ("runRes", "run_res"),
               4: ("stopComputationRes", "stop_res"), 5: ("agentStateRes", "state"),
               6: ("vTPMattestationReport", "attestation"), 7: ("azureAttestationToken", "attestation")},
    "server": {1: ("runReqChunks", "chunks"), 2: ("runReq", "run_req"), 3: ("stopComputation", "stop"),
               4: ("agentStateReq", "state"), 5: ("disconnectReq", "id")},
    "log": {1: ("message", str), 2: ("computationId", str), 3: ("level", str), 4: ("timestamp", "time")},
    "event": {1: ("eventType", str), 2: ("timestamp", "time"), 3: ("computationId", str), 4: ("details", bytes),
              5: ("originator", str), 6: ("status", str)},
    "run_res": {1: ("computationId", str), 2: ("error", str)},
    "stop_res": {1: ("computationId", str), 2: ("message", str)},
    "state": {1: ("id", str), 2: ("state", str)},
    "attestation": {1: ("file", bytes), 2: ("certSerialNumber", str)},
    "chunks": {1: ("data", bytes), 2: ("id", str), 3: ("isLast", bool)},
    "stop": {1: ("computationId", str)},
    "id": {1: ("id", str)},
}


def as_json(kind, b):
    """What canonical protobuf JSON has for these bytes."""
    if kind == "time":
        t = dict(fields(b))
        text = datetime.datetime.fromtimestamp(t.get(1, 0), datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
        nanos = t.get(2, 0)
        return text + (f".{nanos:09d}".rstrip("0") if nanos else "") + "Z"
    out = {}
    for number, value in fields(b):
        name, sub = SCHEMA[kind][number]
        out[name] = (value.decode() if sub is str else base64.b64encode(value).decode() if sub is bytes
                     else bool(value) if sub is bool else as_json(sub, value))
    return out


def plain_times(value):
    """JSON with timestamps' trailing zeros dropped: canonical JSON allows 0, 3, 6 or 9 digits."""
    if isinstance(value, dict):
        return {k: re.sub(r"(\.\d*?)0+Z$", r"\1Z", v).replace(".Z", "Z") if k == "timestamp" else plain_times(v)
                for k, v in value.items()}
    return value


# ---- What an agent host says ----

def refused(text):
    return field(3, field(1, "1") + field(2, text))


def state(text):
    return field(5, field(1, "1") + field(2, text))


START = ["ReceivingAlgorithm/InProgress"]
RUNNING = ["Running/Starting", "Running/InProgress"]
DONE = ["Running/Completed", "ConsumingResults/Ready"]
RUN = [*START, *RUNNING, *DONE, "Complete/Completed"]


# ---- Status 0: every stage ----

def answers(a, states):
    """Answers each agentStateReq with the next of the states, the last for good; returns how many were answered."""
    n = 0
    while (q := a.asked(4, n + 1)) is not None:
        a.send(field(5, field(1, first(q, 1)) + field(2, states[min(n, len(states) - 1)])))
        n += 1
    return n


STAGES = ["connected", "accepted", "running", "ready", "complete"]


def stage_row(stage, job, data, forwarder_first):
    name = f"{stage}, {'job-id' if job else 'no job-id'}, {'data' if data else 'no data'}, {'forwarder' if forwarder_first else 'agent'} first"
    script = [("accepted", "a", ACCEPTED), (None, "f", event(START[0]))]
    script += [(None, "f", event("ReceivingData/InProgress"))] if data else []
    script += [("running", "f", event(RUNNING[0])), (None, "f", event(RUNNING[1])), ("ready", "f", event(DONE[0])),
               (None, "f", event(DONE[1])), ("complete", "f", event(RUN[-1]))]
    with Server(name, "-until", stage, "-timeout", "60s", base=W.with_data if data else W.base) as s:
        if stage == "connected":
            if forwarder_first:
                f = s.forwarder(job)
                check(f"{name}: the log-forwarder alone is no agent", f.alive(), s.err.text(), "a server that goes on")
            s.agent(job)
        else:
            a, f = s.both(job, forwarder_first)
            for reached, by, message in script:
                if reached == stage:
                    check(f"{name}: not too early", a.alive() and f.alive(), s.err.text(), "a server that goes on")
                (a if by == "a" else f).send(message)
                (a if by == "a" else f).sync()
                if reached == stage:
                    break
        err = s.ended(0, stage)
        has(f"{name}: the host and its stages", err, r"^cvms:   \S+: connected \d+\.\d+.* s$", job or r"127\.0\.0\.1",
            *(rf"{x} \d" for x in STAGES[:STAGES.index(stage) + 1]))
        has(f"{name}: its messages", err, r"^cvms:      \d+ messages?, \d+ bytes$")


def test_stages_by_events():
    for stage in STAGES:
        for job, data in ((None, False), ("job-1", True)):
            for forwarder_first in (False, True):
                stage_row(stage, job, data, forwarder_first)
    stage_row("complete", "job-1", False, False)
    stage_row("complete", None, True, True)


def test_stages_by_poll():
    for stage, states in (("running", ["ReceivingAlgorithm", "Running"]), ("ready", ["Running", "ConsumingResults"]),
                          ("complete", ["Running", "ConsumingResults", "Complete"]), ("ready", ["Complete"]),
                          ("complete", ["ReceivingManifest", "ReceivingAlgorithm", "ReceivingData", "Complete"])):
        for job in (None, "job-1"):
            name = f"poll, {stage} by {states[-1]}, {job}"
            with Server(name, "-until", stage, "-timeout", "60s", "-poll", "50ms") as s:
                a = s.agent(job)
                a.send(ACCEPTED)
                n = answers(a, states)
                check(f"{name}: asked", n >= len(states), n, len(states))
                s.ended(0, stage)
    with Server("poll, asks for the id", "-until", "ready", "-timeout", "60s", "-poll", "50ms", "-set", "id=c-7") as s:
        a = s.agent()
        q = a.asked(4)
        same("poll: the question's id", q and first(q, 1), b"c-7")
        f = s.forwarder("other")
        a.asked(4, 3)
        check("poll: a log-forwarder is never asked", f.sync() and not [m for m in f.messages if fields(m)[0][0] == 4], f.messages, "no question")
    with Server("poll: its interval", "-until", "ready", "-timeout", "30s", "-poll", "500ms") as s:
        a = s.agent()
        a.asked(4, 6)
        at = [t for m, t in zip(a.messages, a.times) if fields(m)[0][0] == 4]
        steps = sorted(y - x for x, y in zip(at, at[1:]))
        check("poll: its interval", 0.4 < steps[len(steps) // 2] < 0.9, steps, "0.5 s")


def test_end_of_input():
    """A client that has said all, and closes its side at once, gets the whole manifest and its status all the same."""
    with Server("end of input", base=big(W.base)) as s:
        c = harness.connect(s.address)
        c.sendall(harness.PREFACE + harness.frame(4, 0, 0, b"\0\4\1\0\0\0") + harness.frame(8, 0, 0, b"\1\0\0\0") + harness.request(1, flags=5))
        c.shutdown(socket.SHUT_WR)
        got = b""
        while piece := c.recv(1 << 16):
            got += piece
        frames = harness.frames_of(got)[0]
        size = sum(len(f[3]) for f in frames if f[0] == 0)
        check("end of input: the manifest", size > 2.5 * MIB, size, "2.5 MiB")
        check("end of input: the status", [f for f in frames if f[0] == 1 and f[1] & 1], [f[:3] for f in frames[-3:]], "trailers")


def test_stages_ways():
    with Server("deaf forwarder", "-until", "complete", "-timeout", "60s") as s:    # as the oldest log-forwarder
        s.agent().send(ACCEPTED)
        s.forwarder(deaf=True).events(*RUN)
        s.ended(0, "complete")
    with Server("one write", "-until", "complete", "-timeout", "60s") as s:
        s.agent().send(ACCEPTED)
        s.forwarder(first=event(START[0])).events(*RUN[1:])
        s.ended(0, "complete")
    with Server("empty report", "-until", "connected", "-timeout", "60s") as s:
        s.open(first=field(6, b""))
        s.ended(0, "connected")
    with Server("connected by job-id alone", "-until", "connected", "-timeout", "60s") as s:
        s.open([("job-id", "j")])
        s.ended(0, "connected")
    with Server("no verdict") as s:
        a, f = s.both("j")
        a.send(refused("bad"))
        f.events(*RUN, "Failed/Failed")
        check("no verdict wanted: it goes on", a.alive() and f.alive(), s.err.text(), "a server that goes on")
        same("no verdict wanted: status of SIGTERM", s.stop(), 0)
        hasnot("no verdict wanted: no summary", s.err.text(), "^cvms: (PASSED|FAILED|TIMED OUT|LOST|INTERRUPTED)")


def test_agent_command():
    for args, status, words in (([], 0, ("complete",)), (["-job-id", "vm-1"], 0, ("complete",)),
                                (["-fail", "ReceivingManifest"], 3, ("run_res",)), (["-fail", "ReceivingAlgorithm"], 3, ("Failed",)),
                                (["-fail", "ReceivingData"], 3, ("Failed",)), (["-fail", "Running"], 3, ("Failed",)),
                                (["-once"], 5, ("lost",))):
        name = "cvms agent " + " ".join(args)
        with Server(name, "-until", "complete", "-timeout", "60s", "-grace", "300ms", base=W.with_data) as s:
            run(name, ["agent", *args, s.address])
            s.ended(status, *words)


# ---- Status 3: what an agent reports ----

SILENT = ("hash does not match manifest", "not declared in computation manifest", "failed to start ingress proxy")


def test_failures():
    rows = [("event " + e, "f", event(e, b'{"why":1}'), e) for e in
            ("Running/Failed", "Failed/Failed", "ReceivingAlgorithm/Failed", "ReceivingData/Failed", "New/Failed")]
    rows += [("state Failed", "a", state("Failed"), "Failed"), ("run_res", "a", refused("no such key"), "no such key")]
    rows += [(f"{level} {text}", "f", log(f"oops: {text}: x", level), text) for text in SILENT for level in ("WARN", "ERROR")]
    for i, (what, by, message, told) in enumerate(rows):
        job = "job-9" if i % 2 else None
        with Server(f"fails: {what}", "-until", "complete", "-timeout", "60s") as s:
            a, f = s.both(job, i % 3 == 0)
            f.send(log("the line before", "INFO"))
            f.sync()
            (a if by == "a" else f).send(message)
            (a if by == "a" else f).sync()
            f.send(log("the line after", "ERROR"))
            err = s.ended(3, re.escape(told), job or r"127\.0\.0\.1")
            has(f"fails: {what}: the line before it", err, "^cvms: +\\| .*the line before")
            has(f"fails: {what}: the line after it", err, "^cvms: +\\| .*the line after")
    with Server("fails after reaching less", "-until", "complete", "-timeout", "60s") as s:
        a, f = s.both()
        a.send(ACCEPTED)
        f.events(*RUN[:-1], "Failed/Failed")
        s.ended(3, "Failed/Failed")
    with Server("fails and reaches at once", "-until", "ready", "-timeout", "60s") as s:
        a, f = s.both()
        f.send(event("Running/Failed"), event("Running/Completed"))
        s.ended(3, "Running/Failed")
    with Server("fails, then lost", "-until", "ready", "-timeout", "60s", "-grace", "1ms") as s:
        a, f = s.both()
        f.events("Failed/Failed").sync()
        a.close()
        s.ended(3, "Failed/Failed")
    with Server("fails by poll", "-until", "ready", "-timeout", "60s", "-poll", "50ms") as s:
        answers(s.agent(), ["ReceivingAlgorithm", "Failed"])
        s.ended(3, "Failed")


def test_summary_is_safe():
    """What a hostile agent sends cannot fool a terminal through the summary, nor break a report."""
    report = os.path.join(temp(), "r.xml")
    with Server("hostile text", "-until", "ready", "-timeout", "60s", "-report", report) as s:
        a, f = s.both("j\tob<&>\"'")
        f.send(log("\x1b[2J<b>&\"']]>\x07 \u202e \ufffe\uffff \x7f\x9b", "ERROR"))
        f.send(log("level", "\x1b[31m\x01<"))
        f.send(log("é" * 400, "WARN"), log("€" * 400, "INFO"), log("\U0001f600" * 300, "ERROR"), event("A\x1b\n/B\x02"))
        f.send(event("Running\x1b]0;x\x07/Failed"))
        f.send(log("%s%n%d hash does not match manifest", "ERROR"))
        err = s.ended(3)
        raw = s.err.bytes()
        check("hostile text: stderr is plain", not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]", raw), repr(err), "no control characters")
        try:
            raw.decode()
            check("hostile text: stderr is UTF-8", True)
        except UnicodeDecodeError as e:
            check("hostile text: stderr is UTF-8", False, repr(e), "UTF-8")
    junit("hostile text", report, 3)


def test_last_lines():
    """The log's last lines end without the newlines that they came with."""
    with Server("last lines", "-until", "ready", "-timeout", "60s", screen=terminal(80), env={"TERM": "xterm"}) as s:
        a, f = s.both("vm")
        f.send(log("one\n", "WARN"), log("two\nthree\r\n\n", "ERROR"), event("Running/Failed"))
        same("last lines: status", s.wait(), 3)
        text = s.err.text().replace("\r\n", "\n")
        lines = re.search(r"last lines of vm:\n(.*)", text, re.S).group(1).splitlines()
        same("last lines", lines[-3:], ["cvms:     | WARN one", r"cvms:     | ERROR two\nthree", "cvms:     | event Running/Failed"])
        has("last lines: the verdict is red", text, "^cvms: \x1b\\[31mFAILED\x1b\\[0m: ")


def test_healthy():
    """What is normal in a healthy run never fails it."""
    for level in ("INFO", "DEBUG", "", "warn-ish"):
        with Server(f"healthy: silent texts at {level}", "-until", "complete", "-timeout", "60s") as s:
            a, f = s.both()
            a.send(ACCEPTED)
            f.send(*(log(t, level) for t in SILENT))
            f.events(*RUN)
            s.ended(0, "complete")
    with Server("healthy: noise", "-until", "complete", "-timeout", "60s", "-expect", ",".join(RUN)) as s:
        a, f = s.both("j", True)
        a.send(ACCEPTED, field(7, field(1, b"token")), field(4, field(1, "1") + field(2, "failed to stop")), state("Idle"))
        f.send(event("AlgorithmRun/Warning", b'{"error":"Failed"}', "computation-runner"),
               log("Traceback: Failed", "ERROR"), log("failed to create Skopeo client", "WARN"),
               log("No Confidential Computing platform detected", "WARN"), log("Failed", "ERROR"),
               log("hash matches manifest", "ERROR"), log("", ""), log("x" * 500, "ERROR"),
               event("Stopped/Stopped"), event("/"), event("Failed/"), field(2, b""), field(1, b""), b"", field(99, b"new"))
        f.events(*RUN[:3]).send(log("stderr of the algorithm", "ERROR"))
        f.events("AlgorithmRun/Warning", *RUN[3:])
        s.ended(0, "complete")


# ---- Status 4: timed out ----

def test_timeouts():
    with Server("no agent", "-until", "ready", "-timeout", "300ms") as s:
        s.ended(4, "no agent connected")
    with Server("only the log-forwarder", "-until", "connected", "-timeout", "2s") as s:
        s.forwarder("j").send(log("hello"))
        s.ended(4, "only its log-forwarder connected: is the agent running.*AGENT_CVM_GRPC_URL")
    with Server("only a log-forwarder of the old kind", "-until", "connected", "-timeout", "2s") as s:
        s.forwarder()
        s.ended(4, "only (its|the) log-forwarder")
    with Server("no log-forwarder", "-until", "running", "-timeout", "2s", "-poll", "0") as s:
        a = s.agent()
        a.send(ACCEPTED)
        s.ended(4, "accepted", "no events", "no log-forwarder")
        check("no log-forwarder: -poll 0 asks nothing", not [m for m in a.messages if fields(m)[0][0] == 4], a.messages, "no question")
    with Server("no log-forwarder, polled", "-until", "running", "-timeout", "2s", "-poll", "100ms") as s:
        s.agent().send(ACCEPTED)
        err = s.ended(4, "accepted", "no log-forwarder")
        hasnot("no log-forwarder, polled: not the flag's fault", err, "-poll is off")
    with Server("a long time-out", "-until", "connected", "-timeout", "2h") as s:
        s.agent()
        s.ended(0)
    with Server("no log-forwarder, and not accepted", "-until", "running", "-timeout", "2s", "-poll", "0") as s:
        s.agent("j")
        s.ended(4, "connected")
    for upto, last in ((0, "connected"), (1, "accepted"), (3, "running"), (5, "ready")):
        with Server(f"times out at {last}", "-until", "complete", "-timeout", "2s") as s:
            a, f = s.both("j")
            a.send(*[ACCEPTED][:upto])
            a.sync()
            f.events(*RUN[:upto])
            s.ended(4, rf"\bj\b.*\b{last}\b")
    for stage, sends, sign in (("accepted", [], "no run_res"), ("running", [ACCEPTED], "no event or state Running"),
                               ("complete", [ACCEPTED, state("Running")], "no event ConsumingResults"),
                               ("running", [ACCEPTED, state("ReceivingAlgorithm")], "no algorithm was uploaded: -deliver upload, or cocos-cli algo"),
                               ("running", [ACCEPTED, state("ReceivingData")], "a dataset was not uploaded: -deliver upload, or cocos-cli data"),
                               ("complete", [ACCEPTED, state("ConsumingResults")], "results were not fetched: -results FILE, or cocos-cli result")):
        with Server(f"what is missing for {stage}", "-until", stage, "-timeout", "2s", "-poll", "0") as s:
            a, f = s.both("j")
            f.send(log("a line of its log"))
            a.send(*sends)
            s.ended(4, f"{stage} not reached after 2.000 s: j stood at .*; .*{sign}")
    with Server("an expected event is missing", "-until", "ready", "-timeout", "2s", "-expect", "Running/Starting,My/Event,Running/Completed") as s:
        a, f = s.both()
        a.send(ACCEPTED)
        f.events(*RUN)
        s.ended(4, "not all expected events seen after 2.000 s: 127.0.0.1 stood at .*; event My/Event was not seen")
    with Server("the time counts from the start", "-until", "ready", "-timeout", "1s") as s:
        a, f = s.both()
        began = time.monotonic()
        s.ended(4, "1.000 s")
        check("time-out: not much later", time.monotonic() - began < 10, time.monotonic() - began, "1 s")


# ---- Status 5: lost ----

def test_lost():
    for stage, n in (("connected", 0), ("running", 3)):
        for how in ("close", "end", "reset"):
            name = f"lost at {stage} by {how}"
            with Server(name, "-until", "ready", "-timeout", "60s", "-grace", "200ms") as s:
                a, f = s.both("vm-3")
                f.events(*RUN[:n]).sync()
                if how == "close":
                    a.close()
                elif how == "end":
                    a.send(end=True)
                else:
                    a.put(frame(RST, 0, 1, struct.pack(">I", 8)))
                s.ended(5, "vm-3", stage)
    with Server("forwarder goes, agent stays", "-until", "ready", "-timeout", "2s", "-grace", "100ms") as s:
        a, f = s.both("vm")
        f.close()
        s.ended(4, "vm")
    with Server("lost after what was wanted", "-until", "complete", "-timeout", "60s", "-grace", "100ms", "-agents", "2") as s:
        a, f = s.both("one")
        f.events(*RUN).sync()
        a.close()
        f.close()
        s.err.until("stream ended", times=2)
        a, f = s.both("two")
        f.events(*RUN)
        s.ended(0, "complete")


def test_back_within_grace():
    for job in (None, "vm"):
        with Server(f"back in time, {job}", "-until", "complete", "-timeout", "60s", "-grace", "4s") as s:
            a, f = s.both(job)
            a.send(ACCEPTED)
            f.events(*RUN[:3]).sync()
            for k in (1, 2):
                a.close()
                s.err.until("agent.*stream ended", times=k)
                a = s.agent(job)
            check(f"back in time, {job}: goes on", f.alive(), s.err.text(), "a server that goes on")
            f.close()
            s.err.until("log-forwarder.*stream ended")
            f = s.forwarder(job)
            f.events(*RUN[3:])
            s.ended(0, "complete")
    with Server("new before old is gone", "-until", "ready", "-timeout", "60s", "-grace", "50ms") as s:
        a, f = s.both("vm")
        b = s.agent("vm")
        a.close()
        s.err.until("agent.*stream ended")
        began = time.monotonic()
        while time.monotonic() - began < 0.2:          # past the grace, and the server awake all the time
            b.ping()
            time.sleep(0.01)                            # a flood of PINGs would be cut off
        f.events(*RUN)
        s.ended(0, "ready")
    with Server("a disconnect is no loss", "-until", "ready", "-timeout", "60s", "-grace", "4s", "-control", stdin=subprocess.PIPE) as s:
        a, f = s.both("vm")
        s.command("disconnect vm\n")
        same("disconnect: arrives", a.asked(5) is not None, True)
        a.close()
        s.err.until("agent.*stream ended")
        s.agent("vm")
        f.events(*RUN)
        s.ended(0, "ready")


# ---- -expect, -reject, -agents ----

def test_expect():
    order = "ReceivingAlgorithm/InProgress,Running/InProgress,Complete/Completed"
    with Server("expect, others between", "-expect", order, "-timeout", "60s") as s:
        a, f = s.both()
        f.events(*RUN[:-1]).sync()
        check("expect: waits for the last", f.alive(), s.err.text(), "a server that goes on")
        f.events(RUN[-1])
        s.ended(0)
    with Server("expect, wrong order", "-expect", "B/2,A/1", "-timeout", "2s") as s:
        s.both()[1].events("A/1", "B/2", "C/3")
        s.ended(4, "A/1")
    with Server("expect, the same twice", "-expect", "A/1", "-expect", "A/1", "-timeout", "2s") as s:
        s.both()[1].events("A/1", "A/2", "B/1")
        s.ended(4, "A/1")
    with Server("expect and until", "-expect", "A/1", "-until", "running", "-timeout", "60s") as s:
        a, f = s.both()
        f.events("A/1").sync()
        check("expect and until: needs the stage too", f.alive(), s.err.text(), "a server that goes on")
        f.events("Running/Starting")
        s.ended(0)
    with Server("expect, over a reconnect", "-expect", "A/1,B/2", "-timeout", "60s") as s:
        f = s.both("vm")[1]
        f.events("A/1").sync()
        f.close()
        s.err.until("log-forwarder.*stream ended")
        s.forwarder("vm").events("B/2")
        s.ended(0)
    with Server("expect, a long type", "-expect", "E" * 100 + "/B", "-timeout", "60s") as s:
        s.both()[1].events("E" * 100 + "/B")
        s.ended(0)
    for bad in ("Running", "A/1,,", "A/1,B"):
        status, _, err, _ = run("expect", [*W.base, "-expect", bad, "-timeout", "1ms"])
        same(f"-expect {bad}: usage", status, 2)
        has(f"-expect {bad}: told", err, "-expect", "TYPE/STATUS")


def test_reject():
    long = "E" * 100
    args = ["-until", "complete", "-timeout", "60s", "-reject", "panic: *index", "-reject", "Weird/Worse", "-reject", "*ouu*ch*",
            "-reject", "E/Bad", "-reject", "x" + "ab" * 300 + "*c"]
    for what, message, told in (("log", log("goroutine 1: panic: bad index 7", "INFO"), "panic: bad index 7"),
                                ("event", event("Weird/Worse"), "Weird/Worse"),
                                ("event with a long type", event(long + "/Bad"), f"{long}/Bad"),
                                ("details", event("A/B", b'{"m":"ouuchh"}'), "ouuchh"),
                                ("log, after a newline", log("line one\npanic: no index", "DEBUG"), "panic: no index"),
                                ("log, after a NUL", log("one\0panic: the index", "INFO"), "index")):
        with Server(f"reject, {what}", *args) as s:
            a, f = s.both()
            f.send(message)
            s.ended(3, told)
    with Server("reject alone", "-reject", "panic") as s:
        a, f = s.both()
        f.send(log("a panic"))
        s.ended(3, "a panic")
    with Server("reject, none matches", *args) as s:
        a, f = s.both()
        f.send(log("panic of an idx\nindex", "ERROR"), log("index: panic: "), event("Weird/Badly"), event("Weird/Good", b"ouch"))
        f.send(log("xab" * 300000), log("panic: " * 300000))
        f.events(*RUN)
        s.ended(0)
    with Server("reject, a line among many", "-reject", " panic:", "-until", "complete", "-timeout", "60s") as s:
        a, f = s.both()
        f.send(log("a panic\npanic: here"), log("before\nnow panic:\nafter"))
        err = s.ended(3, "-reject  panic:: now panic:( |;|$)")
        hasnot("reject, a line among many: not the others", err, "-reject .*: (before|a panic)")
    for bad in ("", "*", "***"):
        status, _, err, _ = run("reject", [*W.base, "-until", "ready", "-reject", "fine", "-reject", bad, "-timeout", "1ms"])
        same(f"-reject {bad}: usage", status, 2)
        has(f"-reject {bad}: told", err, "-reject", re.escape(bad))


def test_agents():
    with Server("two agents", "-until", "ready", "-timeout", "60s", "-agents", "2") as s:
        a, f = s.both("one")
        b, g = s.both("two", True)
        f.events(*RUN).sync()
        check("two agents: one is not enough", a.alive() and g.alive(), s.err.text(), "a server that goes on")
        g.events(*RUN)
        err = s.ended(0, "ready")
        has("two agents: the first in the summary", err, "^cvms: +one: .*ready")
        has("two agents: the second in the summary", err, "^cvms: +two: .*ready")
    with Server("one of two fails", "-until", "ready", "-timeout", "60s", "-agents", "2") as s:
        f, g = s.both("one")[1], s.both("two")[1]
        f.events(*RUN).sync()
        g.events("Running/Failed")
        s.ended(3, "two", "Running/Failed")
    with Server("one of two comes", "-until", "ready", "-timeout", "2s", "-agents", "2") as s:
        s.both("one")[1].events(*RUN)
        s.ended(4, "1 of 2")
    with Server("one of two is lost", "-until", "ready", "-timeout", "60s", "-agents", "2", "-grace", "100ms") as s:
        a, f = s.both("one")
        f.events(*RUN).sync()
        a.close()
        s.both("two")[0].close()
        s.ended(5, "two")
    with Server("same job-id is one agent", "-until", "connected", "-timeout", "2s", "-agents", "2") as s:
        s.agent("one")
        s.agent("one")
        s.ended(4, "1 of 2")
    for bad in ("0", "-1", "x"):
        same(f"-agents {bad}: usage", run("agents", [*W.base, "-until", "ready", "-agents", bad, "-timeout", "1ms"])[0], 2)


# ---- Reports, signals, start-up ----

def junit(name, path, status):
    try:
        tree = xml.parse(path).getroot()
    except (xml.ParseError, OSError) as e:
        check(f"{name}: JUnit XML", False, repr(e) + repr(read(path)[-600:] if os.path.exists(path) else ""), "XML")
        return None
    suites = [tree] if tree.tag == "testsuite" else tree.findall("testsuite")
    cases, bad = tree.findall(".//testcase"), tree.findall(".//failure") + tree.findall(".//error")
    same(f"{name}: tests", sum(int(s.get("tests")) for s in suites), len(cases))
    same(f"{name}: failures", sum(int(s.get("failures")) + int(s.get("errors")) for s in suites), len(bad))
    check(f"{name}: verdict", bool(bad) == bool(status) and cases, (len(cases), len(bad)), f"status {status}")
    check(f"{name}: names and times", all(c.get("name") and c.get("classname") and float(c.get("time")) >= 0 for c in cases), read(path), "both")
    return tree


def test_reports():
    for ext in ("xml", "json", "XML"):
        for want in (0, 3, 4, 5, 143):
            name, path = f"report .{ext}, status {want}", os.path.join(temp(), "r." + ext)
            with Server(name, "-until", "ready", "-timeout", "2s" if want == 4 else "60s", "-grace", "50ms", "-report", path) as s:
                a, f = s.both("vm <1>")
                f.send(log("one < two & \"three\" 'é' ]]> \x01\x1b", "ERROR"))
                if want == 0:
                    f.events(*RUN)
                elif want == 3:
                    a.send(refused("<no> & \"never\" ]]> \x02 \ufffe"))
                elif want == 5:
                    a.close()
                elif want == 143:
                    s.p.send_signal(signal.SIGTERM)
                err = s.ended(want)
            line = next((x for x in err.splitlines() if x.startswith("cvms: ")), "cvms: ")
            if ext != "json":
                tree = junit(name, path, want)
                if tree is not None and want:
                    text = (tree.find(".//failure").get("message") or "") + (tree.find(".//failure").text or "")
                    check(f"{name}: says why", line.split(": ", 2)[2].rsplit(" (exit", 1)[0] in text, text, line)
                continue
            try:
                report = json.loads(read(path))
            except (ValueError, OSError) as e:
                check(f"{name}: JSON", False, repr(e), "JSON")
                continue
            same(f"{name}: status", report.get("status"), want)
            check(f"{name}: verdict", line.startswith(f"cvms: {report.get('verdict')}: "), report, line)
            check(f"{name}: why", report.get("why") and report["why"] in line, report, line)
            agent = (report.get("agents") or [{}])[0]
            same(f"{name}: agent", agent.get("name"), "vm <1>")
            check(f"{name}: messages", agent.get("messages", 0) >= 3 and agent.get("bytes", 0) > 0, agent, "counts")
            same(f"{name}: stage", agent.get("stage"), "ready" if want == 0 else "connected")
            check(f"{name}: failure", (want == 3) == bool(agent.get("failure")), agent, "only with status 3")
            check(f"{name}: log lines", any(x.startswith("ERROR one < two") for x in agent["lines"]) == (want == 3), agent, "only with status 3")
    with Server("report of no agent", "-until", "ready", "-timeout", "200ms", "-report", os.path.join(W.dir, "none.xml")) as s:
        s.ended(4)
    junit("report of no agent", os.path.join(W.dir, "none.xml"), 4)
    path = os.path.join(W.dir, "two.json")
    with Server("report of two agents", "-until", "ready", "-timeout", "60s", "-agents", "2", "-report", path) as s:
        s.both("one")[1].events(*RUN).sync()
        s.both("two")[1].events(*RUN)
        s.ended(0)
    same("report of two agents", sorted(a["name"] for a in json.loads(read(path))["agents"]), ["one", "two"])
    with Server("report of -expect", "-expect", "Running/Starting", "-timeout", "60s", "-report", "r") as s:
        s.both("vm")[1].events("Running/Starting")
        s.ended(0)
    tree = junit("report of -expect", os.path.join(W.dir, "r"), 0)
    check("report of -expect: its case", tree is not None and any("expect" in c.get("name") for c in tree.iter("testcase")),
          read(os.path.join(W.dir, "r")), "a case named expect")
    with Server("report of a success that can't be written", "-until", "connected", "-timeout", "60s", "-report", "/dev/full") as s:
        s.agent()
        same("report of a success that can't be written: status", s.wait(), 1)
        has("report of a success that can't be written", s.err.text(), "-report", "/dev/full", "No space")
        has("report of a success that can't be written: the summary", s.err.text(), r"cvms: FAILED: connected .*the report could not be written \(exit status 1\)")
    path = os.path.join(W.dir, "full.json")
    with Server("record of a success that can't be written", "-until", "connected", "-timeout", "60s", "-record", "/dev/full",
                "-report", path) as s:
        s.agent()
        same("record of a success that can't be written: status", s.wait(), 1)
        has("record of a success that can't be written", s.err.text(), r"cvms: FAILED: connected .*all output could not be written \(exit status 1\)")
    report = json.loads(read(path))
    same("record of a success that can't be written: report", (report["verdict"], report["status"]), ("FAILED", 1))
    path = os.path.join(W.dir, "control.xml")
    with Server("a control character in -expect", "-expect", "A\x01/B", "-timeout", "1500ms", "-report", path) as s:
        s.both("vm")
        s.ended(4, r"A\\x01/B")
    junit("a control character in -expect", path, 4)
    status, _, err, _ = run("report", [*W.base, "-report", "x.xml"])
    same("-report without a verdict: usage", status, 2)
    has("-report without a verdict: told", err, "-report")
    status, _, err, _ = run("report", [*W.base, "-report", "/nonexistent/x.xml", "-until", "ready"])
    same("-report that can't be written: at start-up", status, 1)
    has("-report that can't be written: told", err, "-report", "/nonexistent/x.xml")
    for flag, value in (("-report", "r.xml"), ("-grace", "15s"), ("-poll", "0")):
        status, _, err, _ = run("no verdict", [*W.base, flag, value])
        same(f"{flag} without a verdict: usage", status, 2)
        has(f"{flag} without a verdict: told", err, flag, "no verdict", "-until")
    status, _, err, _ = run("too many agents", [*W.base, "-until", "ready", "-agents", "1001"])
    same("-agents 1001: usage", status, 2)
    has("-agents 1001: told", err, "-agents", "at most 1000")
    status, _, err, seconds = run("half a millisecond", [*W.base, "-until", "ready", "-timeout", "500us"])
    same("-timeout 500us: it ends", status, 4)
    for args in (["-timeout", "1m"], ["-agents", "2"], ["-reject", "x", "-timeout", "1m"]):
        status, _, err, _ = run("nothing to wait for", [*W.base, *args])
        same(f"{args} with nothing to wait for: usage", status, 2)
        has(f"{args} with nothing to wait for: told", err, args[-2], "-until", "-expect")


def test_max_connections():
    """One more than -max-connections is told so, and turned away; a place that becomes free is given again."""
    with Server("max-connections", "-max-connections", "2") as s:
        a, b = s.agent("one"), s.agent("two")
        host, port = s.address.rsplit(":", 1)
        with socket.create_connection((host, int(port)), LIMIT) as c:
            c.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")       # what is not read any more takes nothing back
            got = b""
            while piece := c.recv(1000):
                got += piece
        goaway = b"\x07\0\0\0\0\0" + struct.pack(">II", 0, 11) + b"too many connections"
        check("max-connections: SETTINGS, GOAWAY with ENHANCE_YOUR_CALM, the end", got[3:9] == b"\4" + bytes(5) and got.endswith(goaway),
              got, goaway)
        check("max-connections: told", s.err.until("-max-connections"), s.err.text(), "a line")
        check("max-connections: the others go on", a.alive() and b.alive(), s.err.text(), "two open streams")
        a.close()
        s.err.until("stream ended")
        end = time.monotonic() + LIMIT          # the server sees the closed socket when it sees it
        while time.monotonic() < end and (status := run("max-connections", ["health", s.address])[0]):
            pass
        same("max-connections: the free place is given again", status, 0)


def test_signals():
    for number in (signal.SIGTERM, signal.SIGINT):
        with Server(f"{number.name}, verdict wanted", "-until", "ready", "-timeout", "60s") as s:
            s.both("vm")[1].events(*RUN[:3]).sync()
            s.p.send_signal(number)
            err = s.ended(128 + number, word="INTERRUPTED")
            has(f"{number.name}: the stages so far", err, "^cvms: +vm: .*running")


def test_startup():
    rows = [(["-until", "later"], 2, "-until"), (["-until", ""], 2, "-until"), (["-timeout", "5"], 2, "-timeout"),
            (["-timeout", "-1s"], 2, "-timeout"), (["-grace", "x"], 2, "-grace"), (["-poll", "1"], 2, "-poll"),
            (["-timeout", "1.5"], 2, "-timeout"), (["-timeout", "1.5.5s"], 2, "-timeout"), (["-timeout", "87661h"], 2, "-timeout"),
            (["-until"], 2, "-until"), (["-record", "/nonexistent/f"], 1, "-record"), (["-record", "/"], 1, "-record"),
            (["-manifest-for", "x"], 2, "-manifest-for"), (["-manifest-for", "=x"], 2, "-manifest-for"),
            (["-manifest-for", "j="], 2, "-manifest-for"), (["-manifest-for", "j=/nonexistent"], 1, "-manifest-for"),
            (["-ready-file", "/nonexistent/f"], 1, "-ready-file"), (["-nonsense"], 2, "nonsense")]
    for args, want, told in rows:
        status, _, err, seconds = run("startup", [*W.base, *args, "-until", "connected", "-timeout", "3s"]
                                      if "-until" not in args else [*W.base, "-timeout", "3s", *args])
        same(f"start-up {args}: status", status, want)
        has(f"start-up {args}: told", err, told)
    with Server("has the port") as s:
        status, _, err, _ = run("port", [*W.base, "-until", "ready", "-timeout", "3s"], env={"PORT": s.address.rsplit(":", 1)[1]})
        same("a port that is taken: status", status, 1)
        has("a port that is taken: told", err, "(?i)address.*in use|in use")


# ---- -record ----

def records(path):
    return [json.loads(line) for line in read(path).splitlines()]


def test_record():
    path = os.path.join(temp(), "record.jsonl")
    with Server("record", "-record", path, "-control", base=big(W.with_data), stdin=subprocess.PIPE) as s:
        a, f = s.both("vm \x01")
        b = s.agent()
        a.send(ACCEPTED, refused("é\x01\n"), state("Running"), field(4, field(1, "1") + field(2, "bye")), field(7, field(1, b"\xff\0")))
        f.send(log("two\nlines \x1b \u2028", "WARN"), event("A/B", b"\x00\xff"), log("x" * 70000), field(1, b""), field(6, b""))
        f.events(*RUN)
        a.manifest(), f.manifest(), b.manifest()
        s.command("state\nstop\ndisconnect\n")
        for x in (a, b):
            x.asked(5)
        f.sync()
        same("record: status", s.stop(), 0)
    rows = records(path)
    for who, x in (("agent", a), ("log-forwarder", f), ("unnamed agent", b)):
        mine = [r for r in rows if r["peer"] == x.peer]
        lines = lambda key: [plain_times(r[key]) for r in mine if key in r]
        wanted = lambda kind, messages: [plain_times(as_json(kind, m)) for m in messages]
        check(f"record, {who}: all that came", lines("message") == wanted("client", x.sent), lines("message"), wanted("client", x.sent))
        asked = [m for m in wanted("server", x.messages) if "runReqChunks" not in m]
        same(f"record, {who}: all that was asked", [m for m in lines("sent") if "runReqChunks" not in m], asked)
        check(f"record, {who}: one of both in each line", all(("message" in r) != ("sent" in r) for r in mine), mine[:2], "one")
        check(f"record, {who}: time", all(re.match(r"\d{4}-\d\d-\d\dT[\d:.]+Z$", r["time"]) for r in mine), mine[:1], "in UTC")
        kinds = {r["stream"] for r in mine if "message" in r}
        same(f"record, {who}: kind", kinds, {"log-forwarder"} if who == "log-forwarder" else {"agent"})
        check(f"record, {who}: job-id", all(("job_id" in r) == (x is not b) for r in mine), mine[:1], "only if sent")
    chunks = [m for m in map(lambda m: as_json("server", m), a.messages) if "runReqChunks" in m]
    check("record: the manifest once", [r["sent"] for r in rows if "runReqChunks" in r.get("sent", {})] == chunks, len(rows), len(chunks))
    path = os.path.join(temp(), "r.jsonl")
    with Server("record to the verdict", "-record", path, "-until", "complete", "-timeout", "60s") as s:
        a, f = s.both()
        f.events(*RUN)
        s.ended(0)
    check("record: the deciding message is in it", records(path)[-1]["message"]["agentEvent"]["eventType"] == "Complete", records(path)[-1], "Complete")


# ---- -control ----

def test_control():
    with Server("control", "-control", "-output", "json", stdin=subprocess.PIPE) as s:
        for command in ("state", "stop", "disconnect", "run"):
            s.command(command + "\n")
        check("control: nobody there", s.err.until("no agent is connected", times=4), s.err.text(), "4 times told")
        a, f = s.both("vm-1")
        b = s.agent("vm-2")
        for word, number, key in (("state", 4, 1), ("stop", 3, 1), ("disconnect", 5, 1)):
            s.command(f"{word}\n")
            same(f"control {word}: to the first", first(a.asked(number) or b"", key), b"1")
            same(f"control {word}: to the second", first(b.asked(number) or b"", key), b"1")
            s.command(f"{word} vm-2\n")
            same(f"control {word} vm-2: to it", first(b.asked(number, 2) or b"", key), b"1")
            a.sync()
            same(f"control {word} vm-2: not to the other", len([m for m in a.messages if fields(m)[0][0] == number]), 1)
        s.command(f"  state\t {a.peer} \r\n")
        check("control: by address and port", a.asked(4, 2) is not None, a.messages, "a question")
        s.command("state 127.0.0.1\n")
        check("control: by address", a.asked(4, 3) is not None and b.asked(4, 3) is not None, "", "a question to both")
        check("control: never to the log-forwarder", f.sync() and all(fields(m)[0][0] == 1 for m in f.messages), f.messages, "chunks only")
        a.send(state("Running"), field(4, field(1, "1") + field(2, "stopped it")))
        check("control: the state is shown", s.out.until('"state": ?"Running"'), s.out.text(), "the state")
        check("control: the stop answer is shown", s.out.until("stopped it"), s.out.text(), "the answer")
        n = len(a.chunks())
        s.command("run vm-1\n")
        a.until(lambda: len(a.chunks()) == 2 * n)
        same("control run: the manifest again", [c for c in a.chunks()[n:]], a.chunks()[:n])
        same("control run vm-1: not to the other", b.sync() and len(b.chunks()), n)
        s.command("agents\n")
        for word in ("agent.* vm-1", "agent.* vm-2", "log-forwarder.* vm-1"):
            check(f"control agents: {word}", s.err.until(word + ".*message"), s.err.text(), word)
        s.command("help\n")
        for word in ("state", "stop", "disconnect", "run", "agents", "quit", "help"):
            check(f"control help: {word}", s.err.until(rf" {word} "), s.err.text(), word)
        s.command("frobnicate\x1b[31m\n\n \nstate v\x1b[31m m\n")
        check("control: what is shown of a command is safe", s.err.until(r"the agent v\\x1b\[31m m is not") and
              "\x1b" not in s.err.text(), s.err.text(), "escapes")
        check("control: unknown command", s.err.until("(no|unknown) command.*frobnicate"), s.err.text(), "told")
        s.command("state vm-9\n")
        check("control: not there", s.err.until("vm-9.*not connected"), s.err.text(), "told")
        b.close()
        s.err.until(r"vm-2.*stream ended")
        s.command("state vm-2\n")
        check("control: has gone", s.err.until("vm-2.* gone", seconds=3), s.err.text(), "the agent vm-2 has gone")
        s.command(f"stop {b.peer}\n")
        check("control: has gone, by address", s.err.until(re.escape(b.peer) + ".*(gone|not connected)", seconds=3), s.err.text(), "told")
        for piece in ("sta", "te v", "m-1", "\nstate vm-1\nsta"):
            s.command(piece)
        check("control: lines in pieces", a.asked(4, 5) is not None, a.messages, "two more questions")
        s.command("te " + "x" * 5000 + "\nstate " + "vm-1 " * 3000 + "\n")
        s.command("state vm-1\n")
        check("control: after lines that are too long", a.asked(4, 6) is not None, s.err.text(), "a question")
        a.sync()
        same("control: a line too long is not obeyed", len([m for m in a.messages if fields(m)[0][0] == 4]), 6)
        s.command("state vm-1")
        s.p.stdin.close()
        check("control: a last line without its end", a.asked(4, 7) is not None, s.err.text(), "a question")
        check("control: the end of stdin is not the server's", a.alive(), s.err.text(), "a server that goes on")
        same("control: status at the end", s.stop(), 0)


def test_control_waits():
    """Questions to an agent that reads nothing for a while wait for it; a poll is not queued behind an unsent one."""
    with Server("many questions", "-control", "-until", "complete", "-timeout", "30s", "-poll", "20ms", base=big(W.with_data),
                stdin=subprocess.PIPE) as s:
        a = Stream(s.address, deaf=True)
        a.deaf, a.thread = False, threading.Thread(target=a.read, daemon=True)
        a.s.settimeout(None)
        a.thread.start()                                # with windows of 65,535 bytes: the manifest is longer
        a.send(ACCEPTED)
        s.command("state\n" * 70 + "agents\n")
        need(s.err.until(r"from \S+, \d+ message"), s.err.text())
        check("many questions: the stream goes on", a.alive(), s.err.text(), "a stream that is open")
        wide = struct.pack(">I", 1 << 24)
        a.put(frame(8, 0, 0, wide) + frame(8, 0, 1, wide))
        check("many questions: all come", a.asked(4, 70) is not None, len(a.messages), "70 questions")
        hasnot("many questions: no cap", s.err.text(), "over the cap")
        s.p.send_signal(signal.SIGTERM)


def test_control_ends():
    with Server("control, gone with a verdict", "-control", "-until", "ready", "-timeout", "60s", stdin=subprocess.PIPE) as s:
        s.agent("vm").close()
        s.err.until("stream ended")
        s.command("state vm\n")
        check("control, with a verdict: has gone", s.err.until("vm.*gone"), s.err.text(), "told")
        s.command("quit\n")
        status = s.wait()
        check("control quit, verdict wanted: status not 0", status not in (0, None), status, "not 0")
        has("control quit, verdict wanted: summary", s.err.text(), "^cvms: .*quit")
    with Server("control quit", "-control", stdin=subprocess.PIPE) as s:
        a = s.agent("vm")
        s.command("quit\nstate\n")
        same("control quit: status", s.wait(), 0)
        check("control quit: the stream ends properly", a.until(lambda: a.trailers), a.goaway, "trailers")
    with Server("stdin is no terminal", stdin=subprocess.PIPE) as s:
        a = s.agent("vm")
        s.command("quit\n")
        check("without -control a pipe is not read", a.alive(), s.err.text(), "a server that goes on")
    with open(write("commands", "help\nnonsense"), "rb") as f:
        with Server("control from a file", "-control", stdin=f) as s:
            check("control from a file: done", s.err.until("(no|unknown) command.*nonsense"), s.err.text(), "told")
            check("control from a file: goes on", s.agent().alive(), s.err.text(), "a server that goes on")
    with Server("control, /dev/null", "-control") as s:
        check("control, no stdin: goes on", s.agent().alive(), s.err.text(), "a server that goes on")


# ---- -fault ----

def big(base):
    """Flags that make a manifest of 2.5 chunks."""
    manifest = json.loads(run("manifest", ["manifest", *base])[1])
    manifest["description"] = "0123456789abcdef" * (5 * MIB // 32)
    return ["-manifest", write("big.json", json.dumps(manifest))]


def manifest_bytes(flags):
    path = os.path.join(temp(), "m")
    run("manifest", ["manifest", *flags, "-o", path])
    return read(path)


def test_faults_chunks():
    flags = big(W.base)
    whole = manifest_bytes(flags)
    p = [whole[i:i + MIB] for i in range(0, len(whole), MIB)]
    same("faults: chunks of the big manifest", len(p), 3)
    all_of = [(x, "1", False) for x in p] + [(b"", "1", True)]
    rows = [([], all_of)] + [([f"missing-chunk={i}"], all_of[:i] + all_of[i + 1:]) for i in range(4)]
    rows += [(["no-last"], all_of[:3]), (["twice"], all_of * 2), (["twice", "no-last"], all_of[:3] * 2),
             (["flip=0"], None), (["flip=1500000"], None)] + [([f"freeze={n}"], all_of[:n]) for n in range(4)]
    for faults, wanted in rows:
        name = f"fault {','.join(faults)}"
        with Server(name, *(x for f in faults for x in ("-fault", f)), base=flags) as s:
            a = s.agent("vm")
            if wanted is None:
                at, got = int(faults[0][5:]), a.manifest() or b""
                off = [(i, x ^ y) for i, (x, y) in enumerate(zip(got, whole)) if x != y] if got != whole else []
                check(name, len(got) == len(whole) and len(off) == 1 and off[0][0] == at and off[0][1].bit_count() == 1, off[:5], f"a bit in byte {at}")
            else:
                a.until(lambda: len(a.messages) >= len(wanted))
                a.sync()
                got = a.chunks()
                check(name, got == wanted, [(len(c[0]), *c[1:]) for c in got], [(len(c[0]), *c[1:]) for c in wanted])
            check(f"{name}: the stream stays open", a.alive(), (a.goaway, a.reset), "an open stream")


def test_faults_manifest():
    """What is wrong within the manifest, and in how it is sent."""
    whole = manifest_bytes(W.base)
    algorithm, digest = first(whole, 5), hashlib.sha3_256(read(W.algo)).digest()
    for fault in ("short-hash", "wrong-hash"):
        with Server(f"fault {fault}", "-fault", fault) as s:
            got = s.agent().manifest() or b""
            mine = first(got, 5)
            if fault == "short-hash":
                same("fault short-hash", first(mine, 1), digest[:31])
            else:
                check("fault wrong-hash", len(first(mine, 1)) == 32 and first(mine, 1) != digest, first(mine, 1), "another hash")
            same(f"fault {fault}: else unchanged", [x for x in fields(mine) if x[0] != 1], [x for x in fields(algorithm) if x[0] != 1])
            same(f"fault {fault}: the rest unchanged", [x for x in fields(got) if x[0] != 5], [x for x in fields(whole) if x[0] != 5])
            same(f"fault {fault}: again", s.agent().manifest(), got)
    for faults, n in ((["plain"], 1), (["plain", "twice"], 2)):
        with Server(f"fault {faults}", *(x for f in faults for x in ("-fault", f))) as s:
            a = s.agent()
            a.until(lambda: len(a.messages) >= n)
            a.sync()
            same(f"fault {faults}", a.messages, [field(2, whole)] * n)
    with Server("fault delay", "-fault", "delay=500ms") as s:
        a, f = s.agent(), s.forwarder()
        same("fault delay: nothing yet", (a.messages, f.messages), ([], []))
        hasnot("fault delay: not said to be out yet", s.err.text(), "manifest sent")
        same("fault delay: then all of it", (a.manifest(), f.manifest()), (whole, whole))
        check("fault delay: as long as that", a.times and 0.45 < a.times[0] < 5, a.times, "0.5 s")
        check("fault delay: said then", s.err.until("manifest sent", times=2), s.err.text(), "twice")
    with Server("fault delay, half-closed", "-fault", "delay=300ms") as s:
        a = s.agent()
        a.send(end=True)
        same("fault delay, half-closed: the manifest", a.manifest(), whole)
        check("fault delay, half-closed: then the end", a.until(lambda: a.trailers), a.trailers, "trailers")


def test_faults_connection():
    whole = manifest_bytes(W.base)
    for extra in ([], ["-fault", "delay=200ms"]):
        name = "fault rst" + (", delay" if extra else "")
        with Server(name, "-fault", "rst", *extra) as s:
            a = s.agent()
            a.until(lambda: a.reset is not None)
            same(f"{name}: the manifest first", a.manifest() if a.chunks() else None, whole)
            check(f"{name}: RST_STREAM", a.reset, a.reset, "an error code that is not 0")
            check(f"{name}: the connection lives", a.sync() and a.goaway is None, a.goaway, "a PING's answer")
            b = s.open()
            check(f"{name}: the next as well", b.until(lambda: b.reset is not None), b.reset, "RST_STREAM")
        name = "fault goaway" + (", delay" if extra else "")
        with Server(name, "-fault", "goaway", *extra) as s:
            a = s.open()
            a.until(lambda: a.goaway is not None and a.trailers)
            same(f"{name}: the manifest first", a.manifest() if a.chunks() else None, whole)
            check(f"{name}: GOAWAY, and the stream's end", a.goaway is not None and a.trailers, (a.goaway, a.trailers), "both")
            b = s.open()
            check(f"{name}: the server goes on", b.until(lambda: b.goaway is not None), b.goaway, "GOAWAY")
    with Server("fault refuse", "-fault", "refuse=2") as s:
        for i in range(2):
            host, port = s.address.rsplit(":", 1)
            with socket.create_connection((host, int(port)), LIMIT) as c:
                try:
                    got = c.recv(100)
                except ConnectionError:
                    got = b""
                same(f"fault refuse: connection {i + 1}", got, b"")
        same("fault refuse: the third", s.agent().manifest(), whole)
    with Server("fault refuse, agent", "-fault", "refuse=1", "-until", "complete", "-timeout", "60s", "-grace", "9s") as s:
        run("fault refuse", ["agent", "-wait", "5s", s.address])
        s.p.send_signal(signal.SIGTERM) if s.p.poll() is None and not s.err.until("PASSED", seconds=2) else None
        check("fault refuse: no verdict on it", s.wait() in (0, 143), s.err.text(), "0 or 143")


def test_fault_too_large():
    """A fault that could not show, because the manifest is too small for it."""
    n = len(manifest_bytes(W.base))
    for bad, size in ((f"flip={n}", f"{n} bytes"), ("missing-chunk=2", "2 chunks"), ("freeze=2", "2 chunks")):
        status, _, err, _ = run(bad, [*W.base, "-fault", bad])
        same(f"-fault {bad}: usage", status, 2)
        has(f"-fault {bad}: told", err, re.escape(bad), size)
    with Server("the last byte", "-fault", f"flip={n - 1}", "-fault", "missing-chunk=1"):
        pass


def test_fault_mistakes():
    for bad in ("bogus", "", "=", "delay", "delay=", "delay=5", "delay=-1s", "missing-chunk", "missing-chunk=-1", "missing-chunk=x",
                "missing-chunk=", "no-last=1", "no-last=", "flip", "flip=x", "flip=99999999999999999999", "freeze", "freeze=1s",
                "refuse", "rst=1", "goaway=", "plain=yes", "twice=2", "short-hash=31", "wrong-hash=x", "RST", "rst ", "twic", "twice,rst "):
        status, _, err, _ = run("fault", [*W.base, "-fault", bad, "-until", "ready", "-timeout", "1ms"])
        same(f"-fault {bad!r}: status", status, 2)
        has(f"-fault {bad!r}: told", err, "-fault")


# ---- Who gets which manifest ----

def test_skip_forwarder():
    with Server("skip forwarder", "-skip-forwarder", "-until", "running", "-timeout", "60s") as s:
        f = s.forwarder("vm")
        old = s.forwarder()
        same("skip-forwarder: nothing for it", f.alive() and f.messages, [])
        hasnot("skip-forwarder: not said to be out", "\n".join(x for x in s.err.text().splitlines() if "log-forwarder" in x and " vm " in x), "manifest sent")
        same("skip-forwarder: one that does not say so gets it", old.manifest() is not None, True)
        same("skip-forwarder: the agent gets it", s.agent("vm").manifest(), manifest_bytes(W.base))
        f.events("Running/Starting")
        s.ended(0)
    with Server("without skip-forwarder") as s:
        same("without -skip-forwarder it gets one", s.forwarder("vm").manifest(), manifest_bytes(W.base))


def test_manifest_for():
    def other(name, algo):
        text = run("manifest", ["manifest", *W.base, "-set", "name=" + name, "-set", "id=c-" + name])[1]
        return write(f"{name}.json", text), manifest_bytes([*W.base, "-set", "name=" + name, "-set", "id=c-" + name])
    (file1, bytes1), (file2, bytes2) = other("one", "a"), other("two", "b")
    with Server("manifest-for", "-manifest-for", "vm-1=" + file1, "-manifest-for", "vm=2=x=" + file2, "-manifest-for", "vm-2=" + file2,
                "-control", stdin=subprocess.PIPE) if False else Server(
                "manifest-for", "-manifest-for", "vm-1=" + file1, "-manifest-for", "vm-2=" + file2, "-control", stdin=subprocess.PIPE) as s:
        default = manifest_bytes(W.base)
        a = s.agent("vm-1")
        for who, x, want in (("vm-1", a, bytes1), ("vm-2", s.agent("vm-2"), bytes2), ("vm-3", s.agent("vm-3"), default),
                             ("no job-id", s.agent(), default), ("vm-1's forwarder", s.forwarder("vm-1"), bytes1),
                             ("vm-1 and more", s.agent("vm-1x"), default), ("part of it", s.agent("vm"), default)):
            same(f"manifest-for: {who}", x.manifest(), want)
        same("manifest-for: its id in the chunks", {c[1] for c in a.chunks()}, {"c-one"})
        s.command("state vm-1\n")
        same("manifest-for: its id in a question", first(a.asked(4) or b"", 1), b"c-one")
        n = len(a.chunks())
        s.command("run vm-1\n")
        a.until(lambda: len(a.chunks()) >= 2 * n)
        same("manifest-for: run sends it again", a.chunks()[n:], a.chunks()[:n])
    with Server("manifest-for and a fault", "-manifest-for", "vm-1=" + file1, "-fault", "short-hash") as s:
        same("manifest-for: faults reach it", len(first(first(s.agent("vm-1").manifest() or b"", 5), 1)), 31)
    status, _, err, _ = run("manifest-for", [*W.base, "-manifest-for", "j=" + write("bad.json", "{"), "-until", "ready", "-timeout", "1ms"])
    same("manifest-for: bad JSON", status, 1)
    has("manifest-for: bad JSON told", err, "-manifest-for", "bad.json")


# ---- cvms agent -replay ----

def played(path):
    """What each stream has sent, in order: {(kind, job-id): [message]}, streams of one name one after the other."""
    out = {}
    for r in records(path):
        if "message" in r:
            out.setdefault((r["stream"], r.get("job_id")), []).append((r["message"], r.get("unknown")))
    return out


def replay(name, path, *args):
    again = os.path.join(temp(), "again.jsonl")
    with Server(name, "-record", again) as s:       # no verdict: it would end one stream before the other is played
        status, out, err, seconds = run(name, ["agent", "-replay", path, *args, s.address])
        same(f"{name}: the agent's status", status, 0)
        same(f"{name}: the server's status", s.stop(), 0)
    return again, seconds


def test_stand_in():
    """The server's verdict may come before `cvms agent` has half-closed: that is no failure of the stand-in's."""
    for stage in ("accepted", "ready", "complete"):
        with Server(f"stand-in, {stage}", "-until", stage, "-timeout", "60s") as s:
            status, out, err, _ = run(f"stand-in, {stage}", ["agent", s.address])
            same(f"stand-in, {stage}: the agent's status", status, 0)
            s.ended(0, stage)


def test_stand_in_asked():
    """`cvms agent`, whose manifest never becomes whole, answers what it is asked; a signal ends it."""
    with Server("stand-in asked", "-control", "-fault", "freeze=0", "-output", "json", stdin=subprocess.PIPE) as s:
        p = subprocess.Popen([W.cvms, "agent", s.address], env=environment(), cwd=W.dir, stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        s.err.until(r"stream +connected", times=2)
        s.out.until("vTPMattestationReport")
        s.command("agents\n")
        check("stand-in asked: agents without a job-id", s.err.until(r"agent +from 127.0.0.1:\d+, 1 message$"), s.err.text(), "one message")
        s.command("state\n")
        check("stand-in asked: its state", s.out.until('"state": ?"ReceivingManifest"'), s.out.text(), "ReceivingManifest")
        s.command("stop\n")
        check("stand-in asked: it stops", s.out.until("stopComputationRes"), s.out.text(), "an answer")
        check("stand-in asked: as an event, too", s.out.until('"eventType": ?"Stopped"'), s.out.text(), "an event")
        s.command("state\n")
        check("stand-in asked: its new state", s.out.until('"state": ?"Stopped"'), s.out.text(), "Stopped")
        p.send_signal(signal.SIGTERM)
        err = p.communicate(timeout=LIMIT)[1].decode(errors="replace")
        same("stand-in asked: status of SIGTERM", p.returncode, 143)
        sanitizers("stand-in asked", err)
        s.err.until("stream ended", times=2)
        s.command("agents\n")
        check("control agents: nobody there", s.err.until("no agent is connected"), s.err.text(), "a line")


def test_stand_in_refuses():
    """What a real agent would not survive, `cvms agent` fails of, and tells."""
    large = big(W.base)
    rows = [(["plain"], W.base, "plain runReq"), (["short-hash"], W.base, "algorithm 0: its hash has 31 bytes, not 32"),
            (["flip=2"], W.base, "name different computations"), (["missing-chunk=1"], large, "does not parse"),
            (["no-last"], large, "the agent's stream ended: DEADLINE_EXCEEDED: .*-timeout"),
            (["rst"], large, "the (agent|log-forwarder)'s stream ended: INTERNAL: the server has reset the stream")]
    for faults, flags, told in rows:
        name = f"stand-in, {' '.join(faults)}"
        with Server(name, *(x for f in faults for x in ("-fault", f)), base=flags) as s:
            status, _, err, _ = run(name, ["agent", "-timeout", "1s", s.address])
            same(f"{name}: status", status, 1)
            has(name, err, "FAILED: ", told)
    with Server("stand-in, twice", "-fault", "twice", base=large) as s:
        same("stand-in, twice: the second is not looked at", run("stand-in, twice", ["agent", s.address])[0], 0)
    manifest = json.loads(run("manifest", ["manifest", *W.with_data])[1])
    rows = [("no algorithm", {"algorithm": None}, None, "the manifest has no algorithm"),
            ("an algorithm's hash", {"algorithm": {**manifest["algorithm"], "hash": "AAAA"}}, "algorithm has a hash of 3 bytes",
             "algorithm 0: its hash has 3 bytes"),
            ("a dataset's hash", {"datasets": [{**manifest["datasets"][0], "hash": ""}]}, "dataset 0 has a hash of 0 bytes",
             "dataset 0: its hash has 0 bytes"),
            ("a dataset's key", {"datasets": [{**manifest["datasets"][0], "userKey": "AAAA"}]}, None, "dataset 0: its userKey is not"),
            ("a consumer's key", {"resultConsumers": [{"userKey": "MAA="}]}, None, "result consumer 0: its userKey is not")]
    given = [x for i, row in enumerate(rows) for x in ("-manifest-for", f"vm-{i}=" + write("m.json", json.dumps({**manifest, **row[1]})))]
    with Server("stand-in, odd manifests", *given, "-fault", "delay=1ms") as s:
        for i, (name, _, warned, told) in enumerate(rows):
            if warned:
                has(f"stand-in, {name}: the server warns", s.err.text(), "-manifest-for", warned, "panics")
            status, _, err, _ = run(name, ["agent", "-job-id", f"vm-{i}", s.address])
            same(f"stand-in, {name}: status", status, 1)
            has(f"stand-in, {name}", err, "FAILED: ", told)


def test_replay():
    for job, forwarder_first in ((None, False), ("vm-1", False), ("vm-1", True)):
        path = os.path.join(temp(), "record.jsonl")
        with Server("replay, the original", "-until", "complete", "-timeout", "60s", "-poll", "100ms", "-record", path) as s:
            a, f = s.both(job, forwarder_first)
            a.send(ACCEPTED)
            a.asked(4)
            a.send(state("ReceivingAlgorithm"))
            f.send(log("fields that are not known") + field(99, b"\xff\0") + field(98, 1 << 63) + field(1, field(15, 7) + b"\x8d\1\1\2\3\4"))
            f.send(log("two\nlines é \x1b", "WARN"), event("AlgorithmRun/Warning", b"\x00\xff"), log("x" * 40000))
            a.sync(), f.sync()
            f.events(*RUN)
            s.ended(0)
        for args in ([], ["-fast"]):
            name = f"replay {' '.join(args)}, {job}, {'forwarder' if forwarder_first else 'agent'} first"
            again, _ = replay(name, path, *args)
            want, got = played(path), played(again)
            same(f"{name}: the streams", sorted(map(str, got)), sorted(map(str, want)))
            for key in want:
                check(f"{name}: {key[0]}'s messages", got.get(key) == want[key], len(got.get(key, [])), f"{len(want[key])}, the same")
    path = os.path.join(temp(), "failed.jsonl")
    with Server("replay of a failure, the original", "-until", "ready", "-timeout", "60s", "-record", path) as s:
        a, f = s.both("vm")
        f.events("Running/Failed", "Failed/Failed")
        s.ended(3)
    replay("replay of a failure", path, "-fast")


def test_replay_pace():
    path = os.path.join(temp(), "record.jsonl")
    with Server("pace, the original", "-until", "complete", "-timeout", "60s", "-record", path) as s:
        a, f = s.both("vm")
        f.events(*RUN)
        s.ended(0)
    rows = records(path)
    start = datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc)
    for i, r in enumerate(rows):                # all at once, but the last message 1.5 s later
        late = 1.5 if i == len(rows) - 1 else 0
        r["time"] = (start + datetime.timedelta(seconds=late)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    slow = write("slow.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    _, seconds = replay("replay at its own pace", slow)
    check("replay: its own pace", 1.4 < seconds < 20, seconds, "1.5 s")
    _, quick = replay("replay -fast", slow, "-fast")
    check("replay -fast: no pauses", quick < 1.4, quick, "less than 1.4 s")


def test_replay_mistakes():
    line = '{"time":"2024-01-01T00:00:00Z","peer":"a:1","stream":"agent","message":{"runRes":{}}}\n'
    odd = lambda row: write("r", line.replace("}}}", '}},"unknown":[' + row + "]}"))
    with Server("replay mistakes") as s:
        for what, path, status in (("no such file", "/nonexistent/r", (1, 2)), ("not JSON", write("r", "hello\n"), (1, 2)),
                                   ("all of it cut", write("r", line[:40]), (1, 2)), ("a folder", W.dir, (1, 2)),
                                   ("cut in the middle", write("r", line + line[:40] + "\n" + line), (1, 2)), ("nothing in it", write("r", ""), (0, 1, 2)),
                                   ("no base64", odd('{"field":"9","wire_type":2,"value":"!!"}'), (1, 2)),
                                   ("no number", odd('{"field":"run_res.x","wire_type":0,"value":"1"}'), (1, 2))):
            got, _, err, _ = run(what, ["agent", "-replay", path, "-fast", "-wait", "1s", s.address])
            check(f"replay, {what}: status", got in status, got, status)
            if got:
                has(f"replay, {what}: told", err, re.escape(path) if what != "nothing in it" else ".")
        got, _, err, _ = run("replay, the last line cut", ["agent", "-replay", write("r", line + line[:40]), "-fast", s.address])
        same("replay, the last line cut: status", got, 0)
        has("replay, the last line cut: told", err, "warning: -replay: .*the last line is cut")
        path = write("many", "".join(line.replace("a:1", f"a:{i}") for i in range(1001)))
        got, _, err, _ = run("replay, 1001 streams", ["agent", "-replay", path, "-fast", s.address])
        same("replay, 1001 streams: status", got, 1)
        has("replay, 1001 streams", err, re.escape(path), "1000 streams")
        got, _, err, _ = run("fast alone", ["agent", "-fast", "-wait", "1s", s.address])
        check("-fast without -replay: usage", got == 2, got, 2)
    with socket.create_server(("127.0.0.1", 0)) as closed:                 # its window never opens
        kept = []
        threading.Thread(target=lambda: kept.append(closed.accept()[0]) or kept[0].sendall(harness.frame(4, 0, 0, b"\0\4" + bytes(4))), daemon=True).start()
        got, _, err, _ = run("replay, no window", ["agent", "-replay", write("r", line.replace('{}}}', '{"error":"%s"}}}' % ("x" * 9000)) * 50), "-fast", "-timeout", "300ms", "127.0.0.1:%d" % closed.getsockname()[1]])
        same("replay to a server that takes nothing: status", got, 1)
        has("replay to a server that takes nothing", err, "FAILED: DEADLINE_EXCEEDED")
        kept[0].close()
    path = write("r", line + line.replace("00:00:00Z", "00:00:30Z"))      # the stream is open when the reset comes
    with Server("replay, rst", "-fault", "rst") as s:
        got, _, err, _ = run("replay, rst", ["agent", "-replay", path, s.address])
        same("replay to a server that resets the stream: status", got, 1)
        has("replay to a server that resets the stream", err, "FAILED: ")
        address = s.address
    got, _, err, _ = run("replay, no server", ["agent", "-replay", path, "-wait", "100ms", address])
    same("replay to no server: status", got, 1)
    has("replay to no server", err, "FAILED: can't connect")


# ---- What a whole run looks like ----

# <D>, <G> and <Y> begin what is dim, green and yellow, <> ends it; T is a time.
SCREEN = """\
cvms: dataset data.csv, 22 bytes, 3b73f3eb6ce2393c0d8a03f093c02464ccbcdd68641911321f316a3d5f1ecc63
cvms: algorithm algo.py, 75 bytes, e5fbec7f2dca600ade92d0c5564e5e2b06aae1970804627a3c82a494a75376e1
T cvms      server        cvms_test_server service gRPC server listening at 127.0.0.1:PORT without TLS
T demo-cvm  agent         <D>connected from 127.0.0.1:PORT<>
T demo-cvm  agent         <D>manifest sent: 272 bytes<>
T demo-cvm  agent         ATTESTATION 6 bytes report
T demo-cvm  log-forwarder <D>connected from 127.0.0.1:PORT<>
T demo-cvm  log-forwarder <D>manifest sent: 272 bytes<>
T demo-cvm  log-forwarder DEBUG       two lines:
    | \tthe second
T demo-cvm  agent         RUN_RES     accepted
T demo-cvm  log-forwarder EVENT       Running/Starting
T demo-cvm  log-forwarder <Y>WARN        <>odd
T demo-cvm  log-forwarder <Y>EVENT       AlgorithmRun/Warning<><D>  (originator=computation-runner)<>
T demo-cvm  log-forwarder <G>EVENT       ConsumingResults/Ready<>
T demo-cvm  log-forwarder <G>EVENT       Complete/Completed<>
T demo-cvm  log-forwarder <D>stream ended after 6 messages, 217 bytes<>
T demo-cvm  agent         <D>stream ended after 2 messages, 15 bytes<>
cvms: <G>PASSED<>: complete reached after N s (exit status 0)
cvms:   demo-cvm: connected N, accepted N, running N, ready N, complete N s
cvms:      8 messages, 232 bytes
"""
JSON_LINES = [("agent", '{"vTPMattestationReport":{"file":"cmVwb3J0"}}'),
              ("log-forwarder", r'{"agentLog":{"message":"two lines:\n\tthe second","computationId":"1","level":"DEBUG"}}'),
              ("agent", '{"runRes":{"computationId":"1"}}'),
              *(("log-forwarder", x) for x in (
                  '{"agentEvent":{"eventType":"Running","computationId":"1","details":"e30=","originator":"agent","status":"Starting"}}',
                  '{"agentLog":{"message":"odd","computationId":"1","level":"WARN"}}',
                  '{"agentEvent":{"eventType":"AlgorithmRun","computationId":"1","details":"e30=","originator":"computation-runner",'
                  '"status":"Warning"}}',
                  '{"agentEvent":{"eventType":"ConsumingResults","computationId":"1","details":"e30=","originator":"agent",'
                  '"status":"Ready"}}',
                  '{"agentEvent":{"eventType":"Complete","computationId":"1","details":"e30=","originator":"agent","status":"Completed"}}'))]
RFC3339, CLOCK = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", r"\d\d:\d\d:\d\d\.\d{3}"


def a_run(name, time, *args, screen=None, **kw):
    """What the server shows of one run, agent and log-forwarder taking turns, with times and ports masked: stdout, stderr."""
    with Server(name, *args, "-until", "complete", "-timeout", "60s", base=["-algo-path", "algo.py", "-data-paths", "data.csv",
                *W.required], cwd=os.path.dirname(W.algo), screen=screen, **kw) as s:
        a = s.open([("job-id", "demo-cvm")])
        a.send(harness.ATTESTATION)
        a.sync()
        f = s.open([("job-id", "demo-cvm"), ("connection-type", "log-forwarder")])
        plain = {"details": b"{}", "time": b""}
        for by, messages in ((f, [log("two lines:\n\tthe second", "DEBUG", time=b"")]), (a, [ACCEPTED]), (f, [event("Running/Starting", **plain), log("odd", "WARN", time=b"")]),
                             (f, [event("AlgorithmRun/Warning", originator="computation-runner", **plain)]),
                             (f, [event("ConsumingResults/Ready", **plain)]), (f, [event("Complete/Completed", **plain)])):
            by.send(*messages)
            by.sync()
        same(f"{name}: status", s.wait(), 0)
        text = [x.text() if x else "" for x in (s.out, s.err)]
    ends = (r"(.* agent .*stream ended.*\n)(.* log-forwarder .*stream ended.*\n)", r"\2\1")      # in either order
    for a, b in ((time, "T"), (r"127\.0\.0\.1:\d+", "127.0.0.1:PORT"), (r"\b\d+\.\d{3}\b", "N"), ("\r\n", "\n"), ends):
        text = [re.sub(a, b, x) for x in text]
    return text


def terminal(columns):
    """A pty of so many columns: the ends to read and to write."""
    ends = pty.openpty()
    fcntl.ioctl(ends[1], termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    return ends


def test_screens():
    plain = re.sub("<.?>", "", SCREEN)
    colored = SCREEN
    for letter, code in (("D", 2), ("G", 32), ("Y", 33), ("", 0)):
        colored = colored.replace(f"<{letter}>", f"\x1b[{code}m")
    for columns in (80, 160):
        shown = a_run(f"screen of {columns}", CLOCK, screen=terminal(columns), env={"TERM": "xterm"})[1]
        same(f"screen of {columns}", shown.splitlines(), colored.splitlines())
    same("screen without colour", a_run("screen without colour", CLOCK, screen=terminal(80), env={"TERM": "dumb"})[1], plain)
    same("screen in a pipe", a_run("screen in a pipe", RFC3339, screen=os.pipe())[1], plain)
    lines = re.findall(r".*\n(?: +\| .*\n)*", plain)
    messages = [x for x in lines if re.match(r"T .* (ATTESTATION|RUN_RES|EVENT|DEBUG|WARN) ", x)]
    out, err = a_run("screen in two pipes", RFC3339)
    same("screen in two pipes: stdout", out, "".join(messages))
    same("screen in two pipes: stderr", err, "".join(x for x in lines if x not in messages))
    record = os.path.join(temp(), "record")
    out, err = a_run("screen, json", RFC3339, "-output", "json", "-record", record)
    wanted = "".join('{"time":"T","peer":"127.0.0.1:PORT","stream":"%s","job_id":"demo-cvm","message":%s}\n' % x for x in JSON_LINES)
    same("screen, json: stdout", out, wanted)
    same("screen, json: stderr", err, "".join(x for x in lines if x not in messages))
    received = [x for x in read(record).decode().splitlines() if '"message":' in x]
    same("screen, json: -record is the same", [re.sub(RFC3339, "T", re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", x)) for x in received], wanted.splitlines())
    widest = max(map(len, re.sub("^T", "00:00:00.000", plain, flags=re.M).replace("PORT", "65535").splitlines()))
    check("screen: no line wraps at 120 columns", widest <= 120, widest, "at most 120")


def test_names():
    """Who shares a name is told apart by a number; a name too long for a terminal loses its middle."""
    uuid = "6f1c2b7e-0f3a-4f5e-9d1b-2a7e4c1e9f3b"
    for name, screen, long in (("names in a pipe", os.pipe(), uuid), ("names on a terminal", terminal(80), "6f1c2b7~c1e9f3b")):
        with Server(name, screen=screen) as s:
            first, second = s.agent("vm"), s.agent("vm")
            s.both()
            s.both(uuid)
            s.forwarder("vm")
            second.close()
            s.err.until("stream ended")
            s.agent("vm")
            text = s.err.until(r"vm/2 +agent +(\x1b\[2m)?connected", times=2) or s.err.text()
            whose = [tuple(x) for x in re.findall(r"^\S+ (\S+) +(\S+) +(?:\x1b\[2m)?connected", text, re.M)]
            same(name, whose, [("vm", "agent"), ("vm/2", "agent"), ("127.0.0.1", "stream"), ("127.0.0.1", "stream"), (long, "agent"),
                               (long, "log-forwarder"), ("vm", "log-forwarder"), ("vm/2", "agent")])
            has(f"{name}: where the whole name is said", text, "connected from .*" + uuid) if long != uuid else None
            first.close()


# ---- The README's commands; those of the modes run in clients, those of TLS in tls ----

def readme():
    with open(harness.README, encoding="utf-8") as f:
        return f.read()


def test_readme_jobs():
    """Both jobs' shell lines, as they stand: they end with the verdict and leave a report."""
    scripts = re.findall(r"^( *)- (?:run: )?\|\n((?:\1   *.*\n)+)", readme(), re.M)
    same("README: CI jobs", len(scripts), 2)
    for n, (_, script) in enumerate(scripts):
        folder = os.path.join(temp(f"job{n}"), "repository")
        os.makedirs(f"{folder}/cvms")
        for link, to in (("cvms/cvms", os.path.abspath(W.cvms)), ("algo.py", W.algo), ("data.csv", W.data), ("pub.pem", W.key)):
            os.symlink(to, f"{folder}/{link}")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        p = subprocess.run(["bash", "-e", "-c", script], cwd=folder, timeout=60, capture_output=True, text=True, errors="replace",
                           env=harness.environment({"HOST": "127.0.0.1", "PORT": str(port), "AGENT_CVM_GRPC_URL": f"127.0.0.1:{port}"}))
        same(f"README, job {n}: status", p.returncode, 0)
        has(f"README, job {n}: verdict", p.stderr, "^cvms: PASSED: ready reached")
        junit(f"README, job {n}", f"{folder}/cvms.xml", 0)


def test_readme_runs():
    """The direct and the remote run, each in one command as it stands; the stand-in takes another port than 7002."""
    commands = re.findall(r"^    \./cvms (-algo-path .*\\\n +-deliver (upload|http) .*)", readme(), re.M)
    same("README, runs", [way for _, way in commands], ["upload", "http"])
    if "BearSSL" not in run("-version", ["-version"]).out:
        return                              # without TLS there are no keys to sign and encrypt with
    for command, way in commands:
        d = temp(way)
        for path in (W.algo, W.data):
            os.symlink(path, os.path.join(d, os.path.basename(path)))
        with Server(f"README, {way}", base=shlex.split(command.replace("\\\n", "")), cwd=d) as s:
            same(f"README, {way}: agent", s.stand_in("-agent-port", "0", cwd=d).status, 0)
            s.ended(0, "complete reached")
            check(f"README, {way}: results", read(f"{d}/out.zip").startswith(b"PK"), read(f"{d}/out.zip")[:20], "a zip")
            widest = max(len(x) - len("2026-01-01T") - 1 for x in (s.out.text() + s.err.text()).splitlines() if x[:1].isdigit())
            check(f"README, {way}: no line wraps at 120 columns", widest <= 120, widest, "at most 120")


def test_readme_container():
    """What the image, docker run, Deployment, Job and setpriv are told: the flags serve, the probes' commands are well."""
    text = readme()
    docker = re.search(r"^    docker run (?:.*\\\n)*.* cvms ((?:.*\\\n)*.*)", text, re.M).group(1).replace("\\\n", "")
    args = [x.replace('"', "") for x in re.findall(r"args: \[([^]]*)\]", text)]
    flags, deployment, job = (re.split(r",?\s+", x.strip()) for x in (docker, *args))
    same("README: docker, Deployment and Job run the same", (flags, job[:-4]), (deployment, deployment))
    probes = [re.search(p, text).group(1).replace('"', "").split(", ") for p in (r"HEALTHCHECK CMD \[(.*)\]", r"command: \[(.*?)\]")]
    same("README: the probes", probes, [["/cvms", "health"]] * 2)
    d = temp("in")
    for path, name in ((W.algo, "algo.py"), (W.data, "data.csv"), (W.key, "pub.pem")):
        os.symlink(path, os.path.join(d, name))
    with Server("README, container", base=[x.replace("/in/", f"{d}/") for x in job], env={"HOST": ""}) as s:
        here = {"AGENT_CVM_GRPC_URL": f"localhost:{s.port}"}
        same("README, container: health", run("README, container: health", probes[0][1:], here).status, 0)
        run("README, container: agent", ["agent"], here)
        s.ended(0, "ready")
    limits = re.search(r"^    setpriv (.*) \./cvms FLAGS$", text, re.M).group(1).split()
    if os.geteuid() == 0 and shutil.which("setpriv"):
        with Server("README, setpriv", command=["setpriv", *limits, W.cvms, *W.base]) as s:
            same("README, setpriv: an agent", s.stand_in().status, 0)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    W.make(sys.argv[1])
    sys.exit(harness.main(named(globals()), 6))
