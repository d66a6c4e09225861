package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protowire"
)

// service is an agent.AgentService that counts the bytes of each dataset, and looks at nothing.
func service() (port string, sizes chan int64, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	sizes = make(chan int64, 1)
	take := func(done func(int64)) grpc.StreamHandler {
		return func(_ any, s grpc.ServerStream) error {
			for n := int64(0); ; {
				var b []byte
				if err := s.RecvMsg(&b); errors.Is(err, io.EOF) {
					done(n)
					return s.SendMsg(&[]byte{})
				} else if err != nil {
					return err
				}
				_, _, k := protowire.ConsumeTag(b)
				data, _ := protowire.ConsumeBytes(b[max(k, 0):])
				n += int64(len(data))
			}
		}
	}
	g := grpc.NewServer(grpc.ForceServerCodecV2(rawCodec{}), grpc.MaxRecvMsgSize(4<<20))
	g.RegisterService(&grpc.ServiceDesc{ServiceName: "agent.AgentService", HandlerType: (*any)(nil), Streams: []grpc.StreamDesc{
		{StreamName: "Algo", Handler: take(func(int64) {}), ClientStreams: true},
		{StreamName: "Data", Handler: take(func(n int64) { sizes <- n }), ClientStreams: true},
	}}, nil)
	go g.Serve(l)
	_, port, err = net.SplitHostPort(l.Addr().String())
	return port, sizes, err
}

// upload has -file sent to a service here: by the server at -addr, to which it plays the agent, or with -client grpc by a
// process that runs send.  Processor time and memory are the sender's.
func upload() (out, error) {
	port, sizes, err := service()
	if err != nil {
		return nil, err
	}
	o := out{}
	if *fClient == "grpc" {
		cmd := exec.Command(os.Args[0], "-mode", "send", "-addr", "127.0.0.1:"+port, "-file", *fFile)
		if text, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("send: %s", text)
		}
		o["server_cpu_s"] = (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds()
		o["rss_kib"] = maxRSS(cmd.ProcessState)
	} else {
		ctx, cancel := context.WithTimeout(context.Background(), *fTimeout)
		defer cancel()
		g, err := openGRPC(metadata.AppendToOutgoingContext(ctx, "agent-port", port))
		if err != nil {
			return nil, err
		}
		defer g.close()
		if _, err = g.recvManifest(); err != nil {
			return nil, err
		}
		m := startMeter()
		if err = g.st.SendMsg(&[]byte{3<<3 | 2, 3, 1<<3 | 2, 1, '1'}); err != nil { // run_res: the manifest is taken
			return nil, err
		}
		select {
		case n := <-sizes:
			sizes <- n
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		m.stop(o)
		o["rss_kib"] = status(fmt.Sprintf("/proc/%d/status", *fPID), "VmHWM")
	}
	st, err := os.Stat(*fFile)
	if err != nil {
		return nil, err
	}
	if n := <-sizes; n != st.Size() {
		return nil, fmt.Errorf("%d bytes came, not %d", n, st.Size())
	}
	o["bytes_per_server_cpu_s"] = round(float64(st.Size()) / o["server_cpu_s"].(float64))
	return o, nil
}

// send does with grpc-go what the server does: -file in messages of 1 MiB.
func send() (out, error) {
	f, err := os.Open(*fFile)
	if err != nil {
		return nil, err
	}
	cc, err := dialGRPC()
	if err != nil {
		return nil, err
	}
	ctx := metadata.AppendToOutgoingContext(context.Background(), "user-id", "data-provider", "signature", "")
	s, err := cc.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true}, "/agent.AgentService/Data")
	if err != nil {
		return nil, err
	}
	piece := make([]byte, 1<<20)
	for {
		n, err := io.ReadFull(f, piece)
		if n == 0 {
			break
		}
		b := protowire.AppendTag(make([]byte, 0, n+64), 1, protowire.BytesType)
		b = protowire.AppendBytes(b, piece[:n])
		b = protowire.AppendString(protowire.AppendTag(b, 2, protowire.BytesType), f.Name())
		if serr := s.SendMsg(&b); serr != nil {
			return nil, serr
		}
		if err != nil {
			break
		}
	}
	var answer []byte
	if err := errors.Join(s.CloseSend(), s.RecvMsg(&answer)); err != nil {
		return nil, err
	}
	return out{}, nil
}
