// Package cvms describes the messages of agent/cvms/cvms.proto as a table, and
// reads and writes them without generated code.
package cvms

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // registers the codec that Codec falls back to
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	_ "google.golang.org/protobuf/types/known/timestamppb" // the import of cvms.proto
)

const (
	FileName = "agent/cvms/cvms.proto"
	Process  = "/cvms.Service/Process"
	Chunk    = 1 << 20
)

// One message a line: its name, "oneof" where all fields are one, then number:name:type of each field; "*" is repeated.
const table = `
ClientStreamMessage oneof 1:agent_log:AgentLog 2:agent_event:AgentEvent 3:run_res:RunResponse 4:stopComputationRes:StopComputationResponse 5:agentStateRes:AgentStateRes 6:vTPMattestationReport:AttestationResponse 7:azureAttestationToken:azureAttestationToken
ServerStreamMessage oneof 1:runReqChunks:RunReqChunks 2:runReq:ComputationRunReq 3:stopComputation:StopComputation 4:agentStateReq:AgentStateReq 5:disconnectReq:DisconnectReq
AgentLog 1:message:string 2:computation_id:string 3:level:string 4:timestamp:Timestamp
AgentEvent 1:event_type:string 2:timestamp:Timestamp 3:computation_id:string 4:details:bytes 5:originator:string 6:status:string
RunResponse 1:computation_id:string 2:error:string
StopComputationResponse 1:computation_id:string 2:message:string
AgentStateRes 1:id:string 2:state:string
AgentStateReq 1:id:string
AttestationResponse 1:file:bytes 2:certSerialNumber:string
azureAttestationToken 1:file:bytes 2:certSerialNumber:string
StopComputation 1:computation_id:string
DisconnectReq 1:id:string
RunReqChunks 1:data:bytes 2:id:string 3:is_last:bool
ComputationRunReq 1:id:string 2:name:string 3:description:string 4:datasets:*Dataset 5:algorithm:Algorithm 6:result_consumers:*ResultConsumer 7:agent_config:AgentConfig 8:kbs:KBSConfig
ResultConsumer 1:userKey:bytes
Dataset 1:hash:bytes 2:userKey:bytes 3:filename:string 4:source:Source 5:decompress:bool 6:kbs:KBSConfig
Algorithm 1:hash:bytes 2:userKey:bytes 3:source:Source 4:algo_type:string 5:algo_args:*string 6:kbs:KBSConfig
Source 1:type:string 2:url:string 3:kbs_resource_path:string 4:encrypted:bool
KBSConfig 1:url:string 2:enabled:bool
AgentConfig 1:port:string 2:cert_file:string 3:key_file:string 4:client_ca_file:string 5:server_ca_file:string 6:log_level:string 7:attested_tls:bool
`

type field struct {
	name, typ string
	repeated  bool
}

// fields of every message by number; Timestamp's two are int64, told apart from strings by their wire type.
var (
	fields = map[string]map[protowire.Number]field{
		"Timestamp": {1: {name: "seconds", typ: "int64"}, 2: {name: "nanos", typ: "int64"}},
	}
	order []string
	oneof = map[string]bool{}
)

func init() {
	for _, line := range strings.Split(strings.TrimSpace(table), "\n") {
		words := strings.Fields(line)
		name := words[0]
		order = append(order, name)
		fields[name] = map[protowire.Number]field{}
		for _, w := range words[1:] {
			if w == "oneof" {
				oneof[name] = true
				continue
			}
			p := strings.Split(w, ":")
			var n protowire.Number
			fmt.Sscan(p[0], &n)
			typ := strings.TrimPrefix(p[2], "*")
			fields[name][n] = field{p[1], typ, typ != p[2]}
		}
	}
}

// Proto is the descriptor that protoc would make of cvms.proto.
func Proto() *descriptorpb.FileDescriptorProto {
	scalar := map[string]descriptorpb.FieldDescriptorProto_Type{
		"string": descriptorpb.FieldDescriptorProto_TYPE_STRING,
		"bytes":  descriptorpb.FieldDescriptorProto_TYPE_BYTES,
		"bool":   descriptorpb.FieldDescriptorProto_TYPE_BOOL,
	}
	f := &descriptorpb.FileDescriptorProto{
		Name: proto.String(FileName), Package: proto.String("cvms"), Syntax: proto.String("proto3"),
		Dependency: []string{"google/protobuf/timestamp.proto"},
		Service: []*descriptorpb.ServiceDescriptorProto{{Name: proto.String("Service"),
			Method: []*descriptorpb.MethodDescriptorProto{{
				Name:            proto.String("Process"),
				InputType:       proto.String(".cvms.ClientStreamMessage"),
				OutputType:      proto.String(".cvms.ServerStreamMessage"),
				ClientStreaming: proto.Bool(true), ServerStreaming: proto.Bool(true)}}}},
	}
	for _, name := range order {
		m := &descriptorpb.DescriptorProto{Name: proto.String(name)}
		if oneof[name] {
			m.OneofDecl = []*descriptorpb.OneofDescriptorProto{{Name: proto.String("message")}}
		}
		for n := protowire.Number(1); int(n) <= len(fields[name]); n++ {
			t := fields[name][n]
			d := &descriptorpb.FieldDescriptorProto{Name: proto.String(t.name), Number: proto.Int32(int32(n)),
				Label: descriptorpb.FieldDescriptorProto_LABEL_OPTIONAL.Enum()}
			if t.repeated {
				d.Label = descriptorpb.FieldDescriptorProto_LABEL_REPEATED.Enum()
			}
			if s, ok := scalar[t.typ]; ok {
				d.Type = s.Enum()
			} else {
				d.Type = descriptorpb.FieldDescriptorProto_TYPE_MESSAGE.Enum()
				d.TypeName = proto.String(".cvms." + t.typ)
				if t.typ == "Timestamp" {
					d.TypeName = proto.String(".google.protobuf.Timestamp")
				}
			}
			if oneof[name] {
				d.OneofIndex = proto.Int32(0)
			}
			m.Field = append(m.Field, d)
		}
		f.MessageType = append(f.MessageType, m)
	}
	return f
}

// Register makes the file known to server reflection; a second call returns what the first one registered.
func Register() (protoreflect.FileDescriptor, error) {
	if fd, err := protoregistry.GlobalFiles.FindFileByPath(FileName); err == nil {
		return fd, nil
	}
	fd, err := protodesc.NewFile(Proto(), protoregistry.GlobalFiles)
	if err != nil {
		return nil, err
	}
	return fd, protoregistry.GlobalFiles.RegisterFile(fd)
}

// Value is one decoded field, made to be printed with %v.
type Value struct {
	Name string
	Val  any
}

// Decode reads a message by the table; what is malformed or not UTF-8 is an error, what is unknown is left out.
func Decode(name string, b []byte) ([]Value, error) {
	var out []Value
	for len(b) > 0 {
		num, wt, n := protowire.ConsumeTag(b)
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		b = b[n:]
		t, known := fields[name][num]
		switch {
		case known && wt == protowire.BytesType && t.typ != "bool" && t.typ != "int64":
			s, n := protowire.ConsumeBytes(b)
			if n < 0 {
				return nil, protowire.ParseError(n)
			}
			b = b[n:]
			switch t.typ {
			case "bytes":
				out = append(out, Value{t.name, s})
			case "string":
				if !utf8.Valid(s) {
					return nil, errors.New("string field contains invalid UTF-8")
				}
				out = append(out, Value{t.name, string(s)})
			default:
				sub, err := Decode(t.typ, s)
				if err != nil {
					return nil, err
				}
				out = append(out, Value{t.name, sub})
			}
		case known && wt == protowire.VarintType && (t.typ == "bool" || t.typ == "int64"):
			v, n := protowire.ConsumeVarint(b)
			if n < 0 {
				return nil, protowire.ParseError(n)
			}
			b = b[n:]
			out = append(out, Value{t.name, int64(v)})
		default:
			n := protowire.ConsumeFieldValue(num, wt, b)
			if n < 0 {
				return nil, protowire.ParseError(n)
			}
			b = b[n:]
		}
	}
	return out, nil
}

// ChunkMessage encodes ServerStreamMessage{runReqChunks: {data, id, is_last}}.
func ChunkMessage(data []byte, id string, last bool) []byte {
	var in []byte
	if len(data) > 0 {
		in = protowire.AppendTag(in, 1, protowire.BytesType)
		in = protowire.AppendBytes(in, data)
	}
	in = protowire.AppendTag(in, 2, protowire.BytesType)
	in = protowire.AppendString(in, id)
	if last {
		in = protowire.AppendTag(in, 3, protowire.VarintType)
		in = protowire.AppendVarint(in, 1)
	}
	return protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), in)
}

// ReadChunk is the reverse; any other message, and any unknown or repeated field, is an error.
func ReadChunk(b []byte) (data []byte, id string, last bool, err error) {
	v, err := Decode("ServerStreamMessage", b)
	if err != nil {
		return nil, "", false, err
	}
	if len(v) != 1 || v[0].Name != "runReqChunks" {
		return nil, "", false, fmt.Errorf("want one runReqChunks, got %.200v", v)
	}
	seen := map[string]bool{}
	for _, f := range v[0].Val.([]Value) {
		if seen[f.Name] {
			return nil, "", false, errors.New("repeated field " + f.Name)
		}
		seen[f.Name] = true
		switch f.Name {
		case "data":
			data = f.Val.([]byte)
		case "id":
			id = f.Val.(string)
		case "is_last":
			last = f.Val.(int64) == 1
		}
	}
	return data, id, last, nil
}

// LogMessage encodes ClientStreamMessage{agent_log: {text, "1", "INFO", seconds}}.
func LogMessage(text string, seconds int64) []byte {
	var in []byte
	for n, s := range []string{text, "1", "INFO"} {
		in = protowire.AppendTag(in, protowire.Number(n+1), protowire.BytesType)
		in = protowire.AppendString(in, s)
	}
	ts := protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), uint64(seconds))
	in = protowire.AppendBytes(protowire.AppendTag(in, 4, protowire.BytesType), ts)
	return protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), in)
}

// Incoming is a ClientStreamMessage: its bytes, and the same decoded.
type Incoming struct {
	Raw    []byte
	Fields []Value
}

// Codec passes *[]byte through, decodes *Incoming, and leaves everything else to protobuf's own codec.
// The empty name makes grpc-go say "content-type: application/grpc".
type Codec struct{}

func (Codec) Name() string { return "" }

func (Codec) Marshal(v any) (mem.BufferSlice, error) {
	if b, ok := v.(*[]byte); ok {
		return mem.BufferSlice{mem.SliceBuffer(*b)}, nil
	}
	return encoding.GetCodecV2("proto").Marshal(v)
}

func (Codec) Unmarshal(data mem.BufferSlice, v any) (err error) {
	switch m := v.(type) {
	case *[]byte:
		*m = data.Materialize()
	case *Incoming:
		m.Raw = data.Materialize()
		m.Fields, err = Decode("ClientStreamMessage", m.Raw)
	default:
		err = encoding.GetCodecV2("proto").Unmarshal(data, v)
	}
	return err
}
