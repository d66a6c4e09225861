package main

import (
	"context"
	"fmt"
	"slices"

	"clients/cvms"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	v1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	v1alpha "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/types/descriptorpb"
)

func healthMode(ctx context.Context) error {
	cc, err := dial()
	if err != nil {
		return err
	}
	h := healthpb.NewHealthClient(cc)
	for _, name := range []string{"", "cvms_test_server"} {
		r, err := h.Check(ctx, &healthpb.HealthCheckRequest{Service: name})
		if err != nil || r.Status != healthpb.HealthCheckResponse_SERVING {
			return fmt.Errorf("Check %q: %v %v", name, r, err)
		}
	}
	_, err = h.Check(ctx, &healthpb.HealthCheckRequest{Service: "agent"})
	if err := want("Check agent", err, codes.NotFound); err != nil {
		return err
	}
	for name, status := range map[string]healthpb.HealthCheckResponse_ServingStatus{
		"": healthpb.HealthCheckResponse_SERVING, "cvms_test_server": healthpb.HealthCheckResponse_SERVING,
		"agent": healthpb.HealthCheckResponse_SERVICE_UNKNOWN} {
		one, cancel := context.WithCancel(ctx)
		defer cancel()
		w, err := h.Watch(one, &healthpb.HealthCheckRequest{Service: name})
		if err != nil {
			return err
		}
		r, err := w.Recv()
		if err != nil || r.Status != status {
			return fmt.Errorf("Watch %q: %v %v", name, r, err)
		}
	}
	return nil
}

// asker is one reflection stream; v1alpha's messages have the bytes of v1's.
type asker struct {
	stream grpc.ClientStream
}

func (a asker) ask(q *v1.ServerReflectionRequest) (*v1.ServerReflectionResponse, error) {
	if err := a.stream.SendMsg(q); err != nil {
		return nil, err
	}
	r := new(v1.ServerReflectionResponse)
	if err := a.stream.RecvMsg(r); err != nil {
		return nil, err
	}
	if !proto.Equal(r.OriginalRequest, q) {
		return nil, fmt.Errorf("original_request: want %v, got %v", q, r.OriginalRequest)
	}
	return r, nil
}

// files are the answers to a question for a file, by name.
func (a asker) files(q *v1.ServerReflectionRequest) (map[string]*descriptorpb.FileDescriptorProto, error) {
	r, err := a.ask(q)
	if err != nil {
		return nil, err
	}
	if r.GetFileDescriptorResponse() == nil {
		return nil, fmt.Errorf("%v: want files, got %v", q, r)
	}
	out := map[string]*descriptorpb.FileDescriptorProto{}
	for _, b := range r.GetFileDescriptorResponse().FileDescriptorProto {
		f := new(descriptorpb.FileDescriptorProto)
		if err := proto.Unmarshal(b, f); err != nil {
			return nil, fmt.Errorf("%v: %w", q, err)
		}
		out[f.GetName()] = f
	}
	return out, nil
}

func symbol(name string) *v1.ServerReflectionRequest {
	return &v1.ServerReflectionRequest{Host: "h",
		MessageRequest: &v1.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: name}}
}

func file(name string) *v1.ServerReflectionRequest {
	return &v1.ServerReflectionRequest{MessageRequest: &v1.ServerReflectionRequest_FileByFilename{FileByFilename: name}}
}

func reflectionMode(ctx context.Context) error {
	cc, err := dial()
	if err != nil {
		return err
	}
	for _, method := range []string{v1.ServerReflection_ServerReflectionInfo_FullMethodName,
		v1alpha.ServerReflection_ServerReflectionInfo_FullMethodName} {
		s, err := cc.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method)
		if err != nil {
			return err
		}
		if err := reflection(asker{s}); err != nil {
			return fmt.Errorf("%s: %w", method, err)
		}
		if err := finish(s); err != nil {
			return fmt.Errorf("%s: %w", method, err)
		}
	}
	return nil
}

func reflection(a asker) error {
	r, err := a.ask(&v1.ServerReflectionRequest{
		MessageRequest: &v1.ServerReflectionRequest_ListServices{ListServices: "*"}})
	if err != nil {
		return err
	}
	var names []string
	for _, s := range r.GetListServicesResponse().GetService() {
		names = append(names, s.Name)
	}
	for _, name := range []string{"cvms.Service", "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection",
		"grpc.reflection.v1alpha.ServerReflection"} {
		if !slices.Contains(names, name) {
			return fmt.Errorf("list: no %s in %v", name, names)
		}
		if _, err := a.files(symbol(name)); err != nil {
			return err
		}
	}
	if err := sameProto(a); err != nil {
		return err
	}
	for _, q := range []*v1.ServerReflectionRequest{symbol("cvms.Nope"), symbol("cvms"), symbol(""), file("nope.proto"),
		{MessageRequest: &v1.ServerReflectionRequest_AllExtensionNumbersOfType{AllExtensionNumbersOfType: "cvms.Nope"}}} {
		r, err := a.ask(q)
		if err != nil {
			return err
		}
		if c := codes.Code(r.GetErrorResponse().GetErrorCode()); c != codes.NotFound {
			return fmt.Errorf("%v: want NotFound, got %v", q, r)
		}
	}
	return nil
}

// sameProto asks for cvms.proto in every way there is and compares it with the reference's, after a linker made both whole.
func sameProto(a asker) error {
	all := map[string]*descriptorpb.FileDescriptorProto{}
	for _, q := range []*v1.ServerReflectionRequest{file("google/protobuf/timestamp.proto"), file(cvms.FileName),
		symbol("cvms.Service"), symbol("cvms.Service.Process"), symbol("cvms.ServerStreamMessage"), symbol("cvms.Source")} {
		got, err := a.files(q)
		if err != nil {
			return err
		}
		for name, f := range got {
			if all[name] != nil && !proto.Equal(all[name], f) {
				return fmt.Errorf("%v: another %s than before", q, name)
			}
			all[name] = f
		}
	}
	set := &descriptorpb.FileDescriptorSet{}
	for _, f := range all {
		set.File = append(set.File, f)
	}
	linked, err := protodesc.NewFiles(set)
	if err != nil {
		return fmt.Errorf("the descriptors do not link: %w", err)
	}
	fd, err := linked.FindFileByPath(cvms.FileName)
	if err != nil {
		return err
	}
	mine, err := cvms.Register()
	if err != nil {
		return err
	}
	got, ref := protodesc.ToFileDescriptorProto(fd), protodesc.ToFileDescriptorProto(mine)
	byName := func(x, y *descriptorpb.DescriptorProto) int {
		if x.GetName() < y.GetName() {
			return -1
		}
		return 1
	}
	slices.SortFunc(got.MessageType, byName)
	slices.SortFunc(ref.MessageType, byName)
	got.Options = nil // go_package and its like
	for _, m := range got.MessageType {
		for _, f := range m.Field { // protoc sets it, a server need not
			f.JsonName = nil
		}
	}
	if !proto.Equal(got, ref) {
		return fmt.Errorf("cvms.proto: want\n%v\ngot\n%v", ref, got)
	}
	return nil
}
