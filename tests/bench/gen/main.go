// gen writes the Go types of agent/cvms/cvms.proto, as protoc and protoc-gen-go would, to the file $1.  The descriptor
// is the one that the tests of real clients use, so neither protoc nor generated code is needed in the tree.
package main

import (
	"fmt"
	"os"

	"clients/cvms"

	"google.golang.org/protobuf/cmd/protoc-gen-go/internal_gengo"
	"google.golang.org/protobuf/compiler/protogen"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/pluginpb"
)

func run(out string) error {
	gen, err := protogen.Options{}.New(&pluginpb.CodeGeneratorRequest{
		FileToGenerate: []string{cvms.FileName},
		Parameter:      proto.String("M" + cvms.FileName + "=bench/peer/cvmspb"),
		ProtoFile: []*descriptorpb.FileDescriptorProto{
			protodesc.ToFileDescriptorProto(timestamppb.File_google_protobuf_timestamp_proto), cvms.Proto()},
	})
	if err != nil {
		return err
	}
	internal_gengo.GenerateFile(gen, gen.FilesByPath[cvms.FileName])
	r := gen.Response()
	if r.Error != nil || len(r.File) != 1 {
		return fmt.Errorf("%d files, %s", len(r.File), r.GetError())
	}
	return os.WriteFile(out, []byte(r.File[0].GetContent()), 0o644)
}

func main() {
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "gen:", err)
		os.Exit(1)
	}
}
