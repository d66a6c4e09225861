#!/usr/bin/env python3
"""A build without TLS (make TLS=0): it serves plaintext, and refuses what asks for TLS.  usage: test_plain.py CVMS [-v]"""
import os
import shutil
import sys

import test_cli as t


def serves():
    with t.Server("plain: server", [*t.W.base, "-data-paths", t.W.data]) as s:
        t.has("plain: ready line", s.line, "without TLS")
        t.same("plain: agent", s.agent().status, 0)
        t.same("plain: health", t.run("plain: health", ["health", s.address]).status, 0)
        for flags in (["-ca", "x"], ["-insecure"], ["-cert", "x", "-key", "x"]):
            for command in ("agent", "health"):
                name = f"plain: {command} {flags[0]}"
                r = t.run(name, [command, *flags, s.address])
                t.same(f"{name}: status", r.status, 1)
                t.has(name, r.err, "without TLS", "make TLS=0")
        r = t.run("plain: SERVER_CA_CERTS of an agent", ["agent", s.address], {"AGENT_CVM_GRPC_SERVER_CA_CERTS": "x"})
        t.same("plain: an agent's own variable: status", r.status, 1)
        t.has("plain: an agent's own variable", r.err, "without TLS")


def refuses():
    rows = [("flags", ["-server-cert", "c", "-server-key", "k"], {}), ("variables", [], {"SERVER_CERT": "c", "SERVER_KEY": "k"})]
    for name, flags, env in rows:
        t.refused(f"plain: certificates by {name}", [*t.W.base, *flags], 1, ["without TLS", "make TLS=0"], env)


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    t.W = t.World(os.path.abspath(sys.argv[1]))
    try:
        for test in (serves, refuses):
            t.one(test)
    finally:
        shutil.rmtree(t.W.dir, ignore_errors=True)
    print(f"{t.totals['passed']} passed, {t.totals['failed']} failed")
    return 1 if t.totals["failed"] or not t.totals["passed"] else 0


sys.exit(main())
