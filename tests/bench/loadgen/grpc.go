package main

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
)

// rawCodec passes *[]byte through.  Its empty name makes grpc-go send "content-type: application/grpc", as a real agent.
type rawCodec struct{}

func (rawCodec) Name() string { return "" }

func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(*(v.(*[]byte)))}, nil
}

func (rawCodec) Unmarshal(d mem.BufferSlice, v any) error {
	*(v.(*[]byte)) = d.Materialize()
	return nil
}

func dialGRPC() (*grpc.ClientConn, error) {
	creds := insecure.NewCredentials()
	if tlsCfg != nil {
		creds = credentials.NewTLS(tlsCfg)
	}
	return grpc.NewClient("passthrough:///"+*fAddr, grpc.WithTransportCredentials(creds), grpc.WithNoProxy(),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(rawCodec{}), grpc.MaxCallRecvMsgSize(64<<20), grpc.WaitForReady(true)))
}

type grpcStream struct {
	cc     *grpc.ClientConn
	st     grpc.ClientStream
	cancel context.CancelFunc
}

func openGRPC(ctx context.Context) (*grpcStream, error) {
	cc, err := dialGRPC()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	st, err := cc.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/cvms.Service/Process")
	if err != nil {
		cancel()
		cc.Close()
		return nil, err
	}
	return &grpcStream{cc, st, cancel}, nil
}

func (g *grpcStream) recvManifest() (m manifest, err error) {
	for !m.done && err == nil {
		var b []byte
		if err = g.st.RecvMsg(&b); err == nil {
			err = m.add(b)
		}
	}
	return m, err
}

func (g *grpcStream) close() {
	g.cancel()
	g.cc.Close()
}
