"""Compares proto_wire.h with Python protobuf: run by `python test_pb.py PATH_OF_TOOL PATH_OF_manifests.jsonl [ROUNDS]`."""
import difflib, json, os, random, subprocess, sys, tempfile
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message, message_factory, text_format, timestamp_pb2
from google.protobuf.descriptor import FieldDescriptor as F
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
import grpc_tools
from grpc_tools import protoc

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from harness import closing, same  # noqa: E402

CVMS = """syntax = "proto3"; package cvms; import "google/protobuf/timestamp.proto";
service Service { rpc Process(stream ClientStreamMessage) returns (stream ServerStreamMessage); }
message AgentStateReq { string id = 1; }
message AgentStateRes { string id = 1; string state = 2; }
message DisconnectReq { string id = 1; }
message StopComputation { string computation_id = 1; }
message StopComputationResponse { string computation_id = 1; string message = 2; }
message RunResponse { string computation_id = 1; string error = 2; }
message AttestationResponse { bytes file = 1; string certSerialNumber = 2; }
message azureAttestationToken { bytes file = 1; string certSerialNumber = 2; }
message AgentEvent { string event_type = 1; google.protobuf.Timestamp timestamp = 2; string computation_id = 3;
  bytes details = 4; string originator = 5; string status = 6; }
message AgentLog { string message = 1; string computation_id = 2; string level = 3;
  google.protobuf.Timestamp timestamp = 4; }
message ClientStreamMessage { oneof message { AgentLog agent_log = 1; AgentEvent agent_event = 2;
  RunResponse run_res = 3; StopComputationResponse stopComputationRes = 4; AgentStateRes agentStateRes = 5;
  AttestationResponse vTPMattestationReport = 6; azureAttestationToken azureAttestationToken = 7; } }
message ServerStreamMessage { oneof message { RunReqChunks runReqChunks = 1; ComputationRunReq runReq = 2;
  StopComputation stopComputation = 3; AgentStateReq agentStateReq = 4; DisconnectReq disconnectReq = 5; } }
message RunReqChunks { bytes data = 1; string id = 2; bool is_last = 3; }
message ComputationRunReq { string id = 1; string name = 2; string description = 3; repeated Dataset datasets = 4;
  Algorithm algorithm = 5; repeated ResultConsumer result_consumers = 6; AgentConfig agent_config = 7;
  KBSConfig kbs = 8; }
message ResultConsumer { bytes userKey = 1; }
message Dataset { bytes hash = 1; bytes userKey = 2; string filename = 3; Source source = 4; bool decompress = 5;
  KBSConfig kbs = 6; }
message Algorithm { bytes hash = 1; bytes userKey = 2; Source source = 3; string algo_type = 4;
  repeated string algo_args = 5; KBSConfig kbs = 6; }
message Source { string type = 1; string url = 2; string kbs_resource_path = 3; bool encrypted = 4; }
message KBSConfig { string url = 1; bool enabled = 2; }
message AgentConfig { string port = 1; string cert_file = 2; string key_file = 3; string client_ca_file = 4;
  string server_ca_file = 5; string log_level = 6; bool attested_tls = 7; }
"""

def difference(got, wanted):
    return "".join(difflib.unified_diff(wanted.splitlines(1), got.splitlines(1), "wanted", "got"))


class Tool:
    def __init__(self, path):
        self.p = subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, *words):
        self.p.stdin.write(" ".join(str(w) for w in words) + "\n")
        self.p.stdin.flush()
        return self.p.stdout.readline().rstrip("\n")

    def bytes(self, *words):
        answer = self.ask(*words)
        return answer if answer.startswith("error") else bytes.fromhex(answer)


def reference_files():
    """FileDescriptorProtos of the reference .proto files, under the names that ours have."""
    with tempfile.TemporaryDirectory() as d:
        os.makedirs(d + "/agent/cvms")
        with open(d + "/agent/cvms/cvms.proto", "w") as f:
            f.write(CVMS)
        include = os.path.join(os.path.dirname(grpc_tools.__file__), "_proto")
        if protoc.main(["protoc", "-I" + d, "-I" + include, "--descriptor_set_out=" + d + "/out",
                        "agent/cvms/cvms.proto"]) != 0:
            sys.exit("protoc failed")
        with open(d + "/out", "rb") as f:
            cvms = descriptor_pb2.FileDescriptorSet.FromString(f.read()).file[0]
    files = {"agent/cvms/cvms.proto": cvms}
    for module, name in ((timestamp_pb2, "google/protobuf/timestamp.proto"),
                         (health_pb2, "grpc/health/v1/health.proto"),
                         (reflection_pb2, "grpc/reflection/v1alpha/reflection.proto")):
        p = descriptor_pb2.FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(p)
        p.name = name
        files[name] = p
    health = files["grpc/health/v1/health.proto"]       # without List, its map, and extension numbers: README, "Left out"
    for kept in (health.message_type, health.service[0].method):
        for m in [m for m in kept if m.name.startswith(("HealthList", "List"))]:
            kept.remove(m)
    for m in files["grpc/reflection/v1alpha/reflection.proto"].message_type:
        if m.name == "ExtensionNumberResponse":
            del m.field[1]
    text = str(files["grpc/reflection/v1alpha/reflection.proto"]).replace("v1alpha", "v1")
    files["grpc/reflection/v1/reflection.proto"] = text_format.Parse(text, descriptor_pb2.FileDescriptorProto())
    return files


def plain(p):
    """Without what reflection clients do not need (language options, json names that not all generators keep) and
    with messages, fields and methods in one order."""
    q = descriptor_pb2.FileDescriptorProto.FromString(p.SerializeToString())
    q.ClearField("options")

    def walk(m):
        m.field.sort(key=lambda f: f.number)
        for f in m.field:
            f.ClearField("json_name")
        for n in m.nested_type:
            walk(n)
    for m in q.message_type:
        walk(m)
    q.message_type.sort(key=lambda m: m.name)
    return q


def test_descriptors(tool, files):
    pool = descriptor_pool.DescriptorPool()
    for name in ("google/protobuf/timestamp.proto", "agent/cvms/cvms.proto", "grpc/health/v1/health.proto",
                 "grpc/reflection/v1/reflection.proto", "grpc/reflection/v1alpha/reflection.proto"):
        raw = tool.bytes("file", name)
        ours = descriptor_pb2.FileDescriptorProto.FromString(raw)
        same(name + " bytes", raw, ours.SerializeToString(deterministic=True))
        same(name, difference(str(plain(ours)), str(plain(files[name]))), "")
        pool.AddSerializedFile(raw)
        loaded = pool.FindFileByName(name)
        for m in loaded.message_types_by_name.values():
            for f in m.fields:
                auto = "".join(w if i == 0 else w[:1].upper() + w[1:] for i, w in enumerate(f.name.split("_")))
                same("json_name of " + f.full_name, (f.json_name, f.has_presence),
                      (auto, (f.containing_oneof is not None or f.message_type is not None) and
                       not getattr(f, "is_repeated", False)))
    method = pool.FindServiceByName("cvms.Service").methods_by_name["Process"]
    same("Process", (method.client_streaming, method.server_streaming, method.input_type.full_name), (True, True,
          "cvms.ClientStreamMessage"))
    watch = pool.FindServiceByName("grpc.health.v1.Health").methods_by_name["Watch"]
    same("Watch", (watch.client_streaming, watch.server_streaming), (False, True))
    return pool


ODD = ["", "a", "plain text that is longer than sixteen bytes", "\"\\/\b\f\n\r\t\x00\x01\x1b[31m\x7f", "\x80\x9f\xa0é",
       "\u2028\u2029\u202a\u202e\u2066\u2069\u061c\u200e\u200f\ufeff", "\U0001f600\U0010ffff\U00010000", "\ud7ff\ue000\uffff",
       "{\"json\": [1]}", "日本語"]


def text(r):
    if r.random() < 0.5:
        return r.choice(ODD)
    s = "".join(chr(r.choice([r.randrange(128), r.randrange(0x20, 0x7f), r.randrange(0x110000)]))
                for _ in range(r.randrange(40)))
    return "".join(c for c in s if not 0xd800 <= ord(c) < 0xe000)


def fill(r, m, level=0):
    if m.DESCRIPTOR.full_name == "google.protobuf.Timestamp":
        m.seconds = r.choice([0, -62135596800, 253402300799, r.randrange(-62135596800, 253402300800)])
        m.nanos = r.choice([0, 999999999, r.randrange(1000) * 1000000, r.randrange(1000000) * 1000, r.randrange(10**9)])
        return m
    for f in m.DESCRIPTOR.fields:
        if r.random() < 0.3 or (f.containing_oneof and r.random() < 0.6):
            continue
        one = {F.TYPE_STRING: text, F.TYPE_BYTES: lambda r: r.randbytes(r.choice([0, 1, 2, 3, 32, r.randrange(300)])),
               F.TYPE_BOOL: lambda r: r.random() < 0.5, F.TYPE_ENUM: lambda r: r.choice([0, 1, 2, 3, 7, -1, 2**31 - 1]),
               F.TYPE_INT32: lambda r: r.choice([0, 1, -1, 2**31 - 1, -2**31, r.randrange(-2**31, 2**31)])}.get(f.type)
        if getattr(f, "is_repeated", False):
            n = r.choice([0, 1, 2, 5, 20])
            if f.message_type:
                for _ in range(n):
                    fill(r, getattr(m, f.name).add(), level + 1)
            else:
                getattr(m, f.name).extend(one(r) for _ in range(n))
        elif f.message_type:
            getattr(m, f.name).SetInParent()
            fill(r, getattr(m, f.name), level + 1)
        else:
            setattr(m, f.name, one(r))
    return m


def other_spellings(r, value, name=""):
    """The same JSON with original names, nulls, numbers as strings, url-safe base64."""
    if isinstance(value, dict):
        return {k: other_spellings(r, v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [other_spellings(r, v, name) for v in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return r.choice([value, str(value)])
    if isinstance(value, str) and name in ("hash", "userKey", "user_key", "data", "file", "details",
                                           "file_descriptor_proto", "fileDescriptorProto"):
        return r.choice([value, value.rstrip("="), value.replace("+", "-").replace("/", "_")])
    return value


def test_messages(tool, pool, rounds):
    r = random.Random(20250101)
    names = [m.full_name for f in ("agent/cvms/cvms.proto", "grpc/health/v1/health.proto",
                                   "grpc/reflection/v1/reflection.proto", "grpc/reflection/v1alpha/reflection.proto",
                                   "google/protobuf/timestamp.proto")
             for m in pool.FindFileByName(f).message_types_by_name.values()]
    for name in names:
        cls = message_factory.GetMessageClass(pool.FindMessageTypeByName(name))
        for _ in range(rounds):
            m = fill(r, cls())
            wire = m.SerializeToString(deterministic=True)
            for indent in (0, 2):
                ours = tool.bytes("json", name, indent, wire.hex())
                if isinstance(ours, str):
                    same(name, ours, "json")
                    continue
                out = ours.decode()
                same(name + " safe", [c for c in out if (ord(c) < 32 and (c != "\n" or not indent)) or 127 <= ord(c) < 160 or
                                       c in "\u2028\u2029\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"], [])
                same(name + " our JSON", json_format.Parse(out, cls()), m)
                same(name + " canonical", json.loads(out), json.loads(json_format.MessageToJson(m)))
                theirs = json_format.MessageToJson(m, indent=indent or None, ensure_ascii=r.random() < 0.5,
                                                   preserving_proto_field_name=r.random() < 0.5)
                if indent and "\\" not in out:
                    same(name + " layout", [l.split(":")[0] for l in out.split("\n")],
                          [l.split(":")[0] for l in json_format.MessageToJson(m, ensure_ascii=False).split("\n")])
                again = json.dumps(other_spellings(r, json.loads(theirs)), ensure_ascii=r.random() < 0.5)
                for source in (out, theirs, again) * (name != "grpc.health.v1.HealthCheckResponse"):    # no enum by name
                    same(name + " JSON to wire", tool.bytes("wire", name, source.encode().hex()), wire)
            same(name + " again", tool.bytes("again", name, wire.hex()), wire)


def test_python_agrees(tool, pool):
    """What both parsers say about odd JSON: accepted or not."""
    cases = {"grpc.reflection.v1.ErrorResponse": ['{"errorCode":%s}' % v for v in (
                "1", '"7"', "-1", "-0", "1.5", "2147483648", "-2147483648", "-2147483649", "null", '"x"', "[]", "{}",
                "01", '"2147483648"', '""')],
             "cvms.Source": ['{"encrypted":true}', '{"encrypted":"true"}', '{"encrypted":1}', '{"nope":1}', '{"url":"a","url":"b"}',
                             '{"url":null}', '{"url":1}', '{"kbsResourcePath":"x"}', '{"kbs_resource_path":"x"}', "7", "{", "{}{}",
                             '{"url":"\\ud83d\\ude00"}', '{"url":"\\u00e9"}', '{"url":"\\q"}', " \t\r\n{ } "],
             "cvms.ServerStreamMessage": ['{"runReq":null}', '{"runReq":{},"disconnectReq":{}}', '{"runReq":{},"runReqChunks":null}',
                                          '{"runReq":{"datasets":null}}', '{"runReq":{"datasets":[null]}}', '{"runReq":{"datasets":{}}}'],
             "grpc.health.v1.HealthCheckResponse": ['{"status":2}', '{"status":"NO"}', '{"status":null}', '{"status":77}'],
             "cvms.AgentLog": ['{"timestamp":"%s"}' % t for t in (
                "2024-02-29T12:00:00Z", "2024-02-29T12:00:00.5Z", "2023-02-29T00:00:00Z", "2024-04-31T00:00:00Z", "x", "",
                "0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999999Z", "2024-01-01T00:00:00")]}
    for name, texts in cases.items():
        cls = message_factory.GetMessageClass(pool.FindMessageTypeByName(name))
        for t in texts:
            try:
                theirs = json_format.Parse(t, cls()).SerializeToString(deterministic=True)
            except json_format.ParseError:
                theirs = "error"
            ours = tool.bytes("wire", name, t.encode().hex())
            same("%s %s" % (name, t), "error" if isinstance(ours, str) else ours, theirs)


def test_mutated(tool, pool, rounds):
    """Damaged wire input: accepted by both or by neither, and then the same message."""
    r = random.Random(7)
    names = ("cvms.ClientStreamMessage", "cvms.ServerStreamMessage", "cvms.ComputationRunReq",
             "grpc.reflection.v1.ServerReflectionResponse")
    good = 0
    for i in range(rounds * 20):
        name = r.choice(names)
        cls = message_factory.GetMessageClass(pool.FindMessageTypeByName(name))
        wire = bytearray(fill(r, cls()).SerializeToString())
        for _ in range(r.randrange(1, 4)):
            if wire:
                at = r.randrange(len(wire))
                wire[at:at + r.randrange(2)] = r.randbytes(r.randrange(3))
        try:
            m = cls.FromString(bytes(wire))
            m.DiscardUnknownFields()
            theirs = m.SerializeToString(deterministic=True)
            good += 1
        except message.DecodeError:
            theirs = "error"
        ours = tool.bytes("again", name, wire.hex())
        same("%s %s" % (name, wire.hex()[:200]), "error" if isinstance(ours, str) else ours, theirs)
    print("mutated messages: %d of %d were still good" % (good, rounds * 20))


def test_manifests(tool, pool, path):
    count = 0
    cls = message_factory.GetMessageClass(pool.FindMessageTypeByName("cvms.ServerStreamMessage"))
    req = message_factory.GetMessageClass(pool.FindMessageTypeByName("cvms.ComputationRunReq"))
    for line in open(path):
        v = json.loads(line)
        if not all(isinstance(m, str) for m in v["messages"]):
            continue                                # too long to be kept in the file: only a digest
        data = b""
        for h in v["messages"]:
            same(v["name"] + " chunk", tool.bytes("again", "cvms.ServerStreamMessage", h), bytes.fromhex(h))
            data += cls.FromString(bytes.fromhex(h)).runReqChunks.data
        same(v["name"], tool.bytes("again", "cvms.ComputationRunReq", data.hex()), data)
        out = tool.bytes("json", "cvms.ComputationRunReq", 2, data.hex())
        same(v["name"] + " JSON", json_format.Parse(out.decode(), req()), req.FromString(data))
        same(v["name"] + " back", tool.bytes("wire", "cvms.ComputationRunReq", out.hex()), data)
        count += 1
    print("%d manifests" % count)
    same("manifests seen", count > 5, True)


def main():
    tool = Tool(sys.argv[1])
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 40
    pool = test_descriptors(tool, reference_files())
    test_messages(tool, pool, rounds)
    test_python_agrees(tool, pool)
    test_mutated(tool, pool, rounds)
    test_manifests(tool, pool, sys.argv[2])
    tool.p.stdin.close()
    same("tool's exit status", tool.p.wait(), 0)
    return closing()


sys.exit(main())
