#!/usr/bin/env python3
"""A build without TLS (make TLS=0): it serves plaintext, and refuses what asks for TLS.  usage: test_plain.py CVMS [-v]"""
import re
import sys

from test_cli import Server, W, harness, has, refused, run, same
from harness import call, field, read


def test_serves():
    with Server("plain: server", base=W.with_data) as s:
        has("plain: ready line", s.line, "without TLS")
        same("plain: agent", s.stand_in().status, 0)
        same("plain: health", run("plain: health", ["health", s.address]).status, 0)
        for flags in (["-ca", "x"], ["-insecure"], ["-cert", "x", "-key", "x"]):
            for command in ("agent", "health"):
                name = f"plain: {command} {flags[0]}"
                r = run(name, [command, *flags, s.address])
                same(f"{name}: status", r.status, 1)
                has(name, r.err, "without TLS", "make TLS=0")
        r = run("plain: SERVER_CA_CERTS of an agent", ["agent", s.address], {"AGENT_CVM_GRPC_SERVER_CA_CERTS": "x"})
        same("plain: an agent's own variable: status", r.status, 1)
        has("plain: an agent's own variable", r.err, "without TLS")


def test_uploads():
    """The stand-in takes them, and says that it can't check who sends them."""
    with Server("plain: waits", base=W.base) as s, Server("plain: agent", wait=False, command=[
            W.cvms, "agent", "-agent-port", "0", s.address]) as a:
        harness.need(s.out.until("ReceivingAlgorithm/InProgress"), a.err.text())
        where = "127.0.0.1:" + re.search(r"taken at localhost:(\d+)", a.err.text()).group(1)
        metadata = [("signature", "AAAA"), ("algo_type", "bin")]
        call(where, "/agent.AgentService/Algo", field(1, read(W.algo)), metadata=metadata)
        has("plain: uploaded", s.out.text() if s.out.until("ConsumingResults/Ready") else "", "Running/Completed")
        unchecked = r"signatures are not checked: .* without TLS \(make TLS=0\)"
        has("plain: unchecked", a.err.until(unchecked) or a.err.text(), unchecked)
        call(where, "/agent.AgentService/Result", b"", metadata=metadata)
        same("plain: status", a.wait(), 0)


def test_refuses():
    rows = [("flags", ["-server-cert", "c", "-server-key", "k"], {}), ("variables", [], {"SERVER_CERT": "c", "SERVER_KEY": "k"})]
    for name, flags, env in rows:
        refused(f"plain: certificates by {name}", [*W.base, *flags], 1, ["without TLS", "make TLS=0"], env)
    for command in ("encrypt", "decrypt"):
        r = run(f"plain: {command}", [command, "-key", "k", "a", "b"])
        same(f"plain: {command}: status", r.status, 1)
        has(f"plain: {command}", r.err, f"^cvms: {command}: ", "without TLS", "make TLS=0")


if len(sys.argv) < 2:
    sys.exit(__doc__)
W.make(sys.argv[1])
sys.exit(harness.main(harness.named(globals())))
