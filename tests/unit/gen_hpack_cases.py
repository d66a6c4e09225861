#!/usr/bin/env python3
"""Writes hpack_cases.txt: field blocks made by another HPACK implementation (the `hpack` package from PyPI), for
test_hpack.c to decode.  The file is kept, so the test needs neither Python nor the package.

    python3 gen_hpack_cases.py > hpack_cases.txt

N                     a new connection
B hex                 a field block
F name TAB value      a field of it, in order; octets outside 0x21..0x7e, and %, as %XX
T count size          the encoder's dynamic table afterwards
"""
import random
from hpack import Decoder, Encoder, HeaderTuple, NeverIndexedHeaderTuple

NAMES = [":authority", ":method", ":path", ":scheme", ":status", "content-type", "user-agent", "te", "grpc-timeout",
         "grpc-accept-encoding", "grpc-status", "grpc-message", "authorization", "cookie", "job-id", "connection-type",
         "x-trace-bin", "x", ""]
VALUES = ["", "GET", "POST", "/", "http", "https", "200", "404", "application/grpc", "trailers", "localhost:7001",
          "/cvms.Service/Process", "grpc-go/1.70.0", "0", "log-forwarder", "20000000u", "gzip, deflate"]
LENGTHS = [1, 7, 30, 31, 126, 127, 128, 254, 255, 300]


def text(octets):
    return "".join(chr(c) if 0x21 <= c <= 0x7e and c != 0x25 else "%%%02X" % c for c in octets)


def value(r):
    kind = r.random()
    if kind < 0.6:
        return r.choice(VALUES).encode()
    n = r.choice(LENGTHS) if kind > 0.93 else r.randrange(1, 24)
    if kind < 0.9:
        return bytes(r.choice(b"abcdefghijklmnopqrstuvwxyz0123456789-./:%") for _ in range(n))
    return bytes(r.randrange(256) for _ in range(n))


def field(r, seen):
    if seen and r.random() < 0.4:
        return r.choice(seen)
    name = r.choice(NAMES) if r.random() < 0.85 else "x-%d" % r.randrange(40)
    f = (name.encode(), value(r))
    seen.append(f)
    return f


def connection(r, blocks, sizes):
    encoder, seen = Encoder(), []
    print("N")
    for i in range(blocks):
        if sizes and r.random() < 0.3:
            encoder.header_table_size = r.choice(sizes)
        fields = [field(r, seen) for _ in range(r.randrange(1, 8))]
        never = [r.random() < 0.08 for _ in fields]
        block = encoder.encode([(NeverIndexedHeaderTuple if no else HeaderTuple)(*f) for f, no in zip(fields, never)],
                               huffman=r.random() < 0.6)
        print("B", block.hex())
        for name, val in fields:
            print("F %s\t%s" % (text(name), text(val)))
        entries = encoder.header_table.dynamic_entries
        print("T", len(entries), sum(len(n) + len(v) + 32 for n, v in entries))


def static_table():
    print("N")
    for i in range(1, 62):
        block = bytes([0x80 | i])
        (name, val), = Decoder().decode(block, raw=True)
        print("B %s\nF %s\t%s\nT 0 0" % (block.hex(), text(name), text(val)))


def main():
    static_table()
    r = random.Random(7541)
    for sizes in [], [0, 64, 4096], [100, 200, 256], [33, 80, 300, 1000], [512, 4096], []:
        for _ in range(3):
            connection(r, 11, sizes)
    connection(r, 60, [])


main()
