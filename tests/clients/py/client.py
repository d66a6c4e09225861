#!/usr/bin/env python3
"""grpcio side of the end-to-end tests. No generated code: the messages come from the server's own reflection.

client.py ADDR manifest -o FILE                     the manifest's bytes, parsed and written again, to FILE
client.py ADDR kinds -o FILE                        sends one message of each kind and odd ones; FILE gets what was sent,
                                                    a line each: NAME, a blank, base64
client.py ADDR verify -i FILE < LINES               each line of `-output json`, in the order of FILE, holds that message
client.py ADDR health                               grpcio-health-checking's client
TLS: --ca FILE [--cert FILE --key FILE] [--server-name NAME]
"""
import argparse
import base64
import json
import queue
import sys

import grpc
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

CHUNK = 1 << 20
END = object()  # in the queue of a Call: half-close


def connect(a):
    options = [("grpc.max_receive_message_length", 8 << 20), ("grpc.enable_http_proxy", 0)]
    if not a.ca:
        return grpc.insecure_channel(a.addr, options)
    read = lambda name: open(name, "rb").read() if name else None
    if a.server_name:
        options.append(("grpc.ssl_target_name_override", a.server_name))
    return grpc.secure_channel(a.addr, grpc.ssl_channel_credentials(read(a.ca), read(a.key), read(a.cert)), options)


class Messages:
    """The classes of package cvms by name, made from what the server's reflection says."""

    def __init__(self, channel):
        pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        service = pool.FindServiceByName("cvms.Service")
        method = service.FindMethodByName("Process")
        assert method.client_streaming and method.server_streaming, "Process does not stream both ways"
        self.file = service.file
        assert self.file.name == "agent/cvms/cvms.proto", self.file.name

    def __getattr__(self, name):
        return message_factory.GetMessageClass(self.file.message_types_by_name[name])


class Call:
    """A Process stream; send() takes bytes."""

    def __init__(self, channel, metadata=()):
        self.out = queue.Queue()
        self.stream = channel.stream_stream("/cvms.Service/Process")(
            iter(self.out.get, END), metadata=metadata, timeout=60)

    def send(self, data):
        self.out.put(data)

    def manifest(self, messages):
        data, last, short = bytearray(), False, False
        while not last:
            m = messages.ServerStreamMessage.FromString(next(self.stream))
            assert m.WhichOneof("message") == "runReqChunks", m
            c = m.runReqChunks
            last = c.is_last
            assert c.id == "1", c.id
            assert not (last and c.data), "data in the last chunk"
            assert last or (0 < len(c.data) <= CHUNK and not short), "chunk of %d bytes" % len(c.data)
            short = len(c.data) < CHUNK
            data += c.data
        return bytes(data)

    def finish(self):
        self.out.put(END)
        rest = list(self.stream)  # raises unless the status is OK
        assert rest == [] and self.stream.code() == grpc.StatusCode.OK, (rest, self.stream.code())


def manifest(a, channel):
    messages = Messages(channel)
    call = Call(channel)
    data = call.manifest(messages)
    run = messages.ComputationRunReq.FromString(data)
    assert run.id == "1" and len(run.algorithm.hash) == 32, run.id
    assert all(len(d.hash) == 32 for d in run.datasets), "a dataset's hash is not 32 bytes"
    assert not unknown_fields(run), "the manifest has fields that the descriptor lacks"
    with open(a.o, "wb") as f:
        f.write(run.SerializeToString(deterministic=True))
    call.finish()


def unknown_fields(m):
    """True when m or a message in it has fields that its descriptor lacks: they are lost in a JSON round trip."""
    copy = type(m)()
    copy.CopyFrom(m)
    copy.DiscardUnknownFields()
    return copy != m


def samples(messages):
    """One message of each kind, then odd ones. (name, bytes)"""
    M = messages.ClientStreamMessage
    time = {"seconds": 1700000000, "nanos": 120000000}
    hard = 'tab\there "quoted" back\\slash\u2028 \u202eright to left\u202c \x1b[31mred\x1b[0m \x00 nul \x7f del é 漢 😀'
    yield "agent_log", M(agent_log=dict(message="a log", computation_id="1", level="INFO", timestamp=time))
    yield "agent_event", M(agent_event=dict(event_type="Running", timestamp=time, computation_id="1",
                                            details=b'{"a":1}', originator="agent", status="Starting"))
    yield "run_res", M(run_res=dict(computation_id="1", error="no such key"))
    yield "stopComputationRes", M(stopComputationRes=dict(computation_id="1", message="stopped it"))
    yield "agentStateRes", M(agentStateRes=dict(id="1", state="ReceivingManifest"))
    yield "vTPMattestationReport", M(vTPMattestationReport=dict(file=bytes(range(256)), certSerialNumber="serial-01:ab"))
    yield "azureAttestationToken", M(azureAttestationToken=dict(file=b"eyJ.token", certSerialNumber="serial-02"))
    yield "empty report", M(vTPMattestationReport={})
    yield "multi-line log", M(agent_log=dict(message="first line\nsecond line\r\nthird\n", level="ERROR", timestamp=time))
    yield "hard text", M(agent_log=dict(message=hard, computation_id=hard, level="WARN"))
    yield "empty log", M(agent_log={})
    yield "no message", M()
    yield "time 1", M(agent_log=dict(message="t", timestamp={"seconds": -62135596800}))
    yield "time 2", M(agent_log=dict(message="t", timestamp={"seconds": 253402300799, "nanos": 999999999}))
    yield "time 3", M(agent_log=dict(message="t", timestamp={"seconds": -1, "nanos": 1000}))
    yield "time 4", M(agent_log=dict(message="t", timestamp={}))
    log, event = (M(agent_log=dict(message="m", level="INFO")), M(agent_event=dict(event_type="E")))
    level = M(agent_log=dict(level="merged"))
    yield "same kind twice: merged", log.SerializeToString() + level.SerializeToString()
    yield "two kinds: the last", log.SerializeToString() + event.SerializeToString()
    yield "kind, other, kind: the last alone", log.SerializeToString() + event.SerializeToString() + level.SerializeToString()
    yield "field twice: the last", b"\x0a\x06\x0a\x01a\x0a\x01b"
    yield "overlong varints", b"\x8a\x00\x86\x80\x00\x0a\x83\x00abc"
    yield "unknown fields", log.SerializeToString() + b"\x98\x06\x07" + b"\x0a\x06\x9a\x06\x03unk" + b"\xa3\x06\x08\x01\xa4\x06"


def kinds(a, channel):
    messages = Messages(channel)
    call = Call(channel, metadata=(("job-id", "cvm-17"), ("trace-bin", b"\0\xff")))
    call.manifest(messages)
    with open(a.o, "w") as f:
        for name, m in samples(messages):
            data = m if isinstance(m, bytes) else m.SerializeToString()
            messages.ClientStreamMessage.FromString(data)
            f.write("%s %s\n" % (name.replace(" ", "_"), base64.b64encode(data).decode()))
            call.send(data)
    call.finish()


def verify(a, channel):
    messages = Messages(channel)
    sent = [line.rstrip("\n").split(" ") for line in open(a.i)]
    lines = sys.stdin.buffer.read().decode().rstrip("\n").split("\n")  # splitlines() knows other line ends
    assert len(lines) == len(sent), "want %d lines, got %d" % (len(sent), len(lines))
    bad = 0
    for (name, data), line in zip(sent, lines):
        try:
            o = json.loads(line)
            for key in ("time", "peer", "stream", "message"):
                assert key in o, "no %s" % key
            want = messages.ClientStreamMessage.FromString(base64.b64decode(data))
            got = json_format.Parse(json.dumps(o["message"]), messages.ClientStreamMessage(),
                                    ignore_unknown_fields=name == "unknown_fields")
            if name == "unknown_fields":
                want.DiscardUnknownFields()
                assert "99" in line and ("unk" in line or base64.b64encode(b"unk").decode() in line or b"unk".hex() in line), \
                    "unknown field 99 is not shown"
            assert got == want, "want %s, got %s" % (json_format.MessageToJson(want, indent=None), line)
        except (AssertionError, ValueError, json_format.ParseError) as e:
            bad += 1
            print("%s: %s" % (name, e), file=sys.stderr)
    assert not bad, "%d of %d lines are wrong" % (bad, len(sent))


def health(a, channel):
    stub = health_pb2_grpc.HealthStub(channel)
    for name in ("", "cvms_test_server"):
        r = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
        assert r.status == health_pb2.HealthCheckResponse.SERVING, r
    try:
        stub.Check(health_pb2.HealthCheckRequest(service="agent"), timeout=10)
        raise AssertionError("agent is known")
    except grpc.RpcError as e:
        assert e.code() == grpc.StatusCode.NOT_FOUND, e


def main():
    p = argparse.ArgumentParser()
    p.add_argument("addr")
    p.add_argument("mode", choices=["manifest", "kinds", "verify", "health"])
    for name in ("-o", "-i", "--ca", "--cert", "--key", "--server-name"):
        p.add_argument(name)
    a = p.parse_args()
    try:
        with connect(a) as channel:
            globals()[a.mode](a, channel)
    except (AssertionError, grpc.RpcError) as e:
        sys.exit("client.py: %s" % (str(e) or repr(e)))


if __name__ == "__main__":
    main()
