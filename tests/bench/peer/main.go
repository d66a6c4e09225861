// peer does the Go CVMS server's job in the Go server's way, to be measured beside cvms: for each Process stream it reads
// and hashes the files anew, makes the manifest, sends it in 1 MiB chunks, and prints each message with fmt, all of them
// in one goroutine behind an unbuffered channel.  The types are protobuf-go's generated ones (made by ../gen).
//
// HOST and PORT say where it listens; SERVER_CERT and SERVER_KEY (paths) turn TLS on.
package main

import (
	"context"
	"crypto/sha3"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"bench/peer/cvmspb"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/reflection"
	"google.golang.org/protobuf/proto"
)

const chunkSize = 1 << 20

var (
	algoPath  = flag.String("algo-path", "", "the algorithm's file")
	dataPaths = flag.String("data-paths", "", "the datasets' files, with commas between")
	keyPath   = flag.String("public-key-path", "", "PEM file of the users' public key")
	manifest  = flag.String("manifest", "", "file with a ComputationRunReq's bytes: sent instead of one about the files")
	readyFile = flag.String("ready-file", "", "gets HOST:PORT when the port is open")
)

type server struct {
	log      *slog.Logger
	incoming chan *cvmspb.ClientStreamMessage
	fixed    *cvmspb.ComputationRunReq // from -manifest
}

func checksum(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	h := sha3.Sum256(b)
	return h[:], nil
}

// request reads and hashes everything that the flags name.
func (s *server) request() (*cvmspb.ComputationRunReq, error) {
	if s.fixed != nil {
		return s.fixed, nil
	}
	text, err := os.ReadFile(*keyPath)
	if err != nil {
		return nil, err
	}
	key, _ := pem.Decode(text)
	if key == nil {
		return nil, errors.New(*keyPath + ": not PEM")
	}
	r := &cvmspb.ComputationRunReq{Id: "1", Name: "sample computation", Description: "sample descrption",
		ResultConsumers: []*cvmspb.ResultConsumer{{UserKey: key.Bytes}},
		AgentConfig:     &cvmspb.AgentConfig{Port: "7002"}}
	for _, path := range strings.FieldsFunc(*dataPaths, func(c rune) bool { return c == ',' }) {
		h, err := checksum(path)
		if err != nil {
			return nil, err
		}
		s.log.Info("local dataset checksum", "path", path, "hash", fmt.Sprintf("%x", h))
		r.Datasets = append(r.Datasets, &cvmspb.Dataset{Hash: h, UserKey: key.Bytes, Filename: filepath.Base(path)})
	}
	h, err := checksum(*algoPath)
	if err != nil {
		return nil, err
	}
	s.log.Info("local algorithm checksum", "path", *algoPath, "hash", fmt.Sprintf("%x", h))
	r.Algorithm = &cvmspb.Algorithm{Hash: h, UserKey: key.Bytes}
	return r, nil
}

// send cuts the request into chunks; an empty one, marked, is the last.  As in the Go server, the pieces go through a
// buffer of 1 MiB that each stream gets anew: a good part of what a stream costs there, in time and in memory.
func send(stream grpc.ServerStream, r *cvmspb.ComputationRunReq) error {
	data, err := proto.Marshal(r)
	if err != nil {
		return err
	}
	piece := make([]byte, chunkSize)
	for last := false; !last; {
		n := copy(piece, data)
		data, last = data[n:], n == 0
		c := &cvmspb.RunReqChunks{Id: r.Id, Data: piece[:n], IsLast: last}
		if err := stream.SendMsg(&cvmspb.ServerStreamMessage{
			Message: &cvmspb.ServerStreamMessage_RunReqChunks{RunReqChunks: c}}); err != nil {
			return err
		}
	}
	return nil
}

func (s *server) process(_ any, stream grpc.ServerStream) error {
	from, ok := grpcpeer.FromContext(stream.Context())
	if !ok {
		return errors.New("no peer")
	}
	g, ctx := errgroup.WithContext(stream.Context())
	g.Go(func() error {
		for {
			m := new(cvmspb.ClientStreamMessage)
			if err := stream.RecvMsg(m); err != nil {
				return err
			}
			select {
			case s.incoming <- m:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	})
	g.Go(func() error {
		s.log.Debug("connected", "address", from.Addr.String())
		r, err := s.request()
		if err == nil {
			err = send(stream, r)
		}
		if err != nil {
			s.log.Error("failed to send run request", "error", err)
			return nil
		}
		s.log.Info("computation run request sent successfully")
		return nil
	})
	return g.Wait()
}

func (s *server) print() {
	for m := range s.incoming {
		fmt.Println(m.Message)
	}
}

func options() ([]grpc.ServerOption, error) {
	if os.Getenv("SERVER_CERT") == "" {
		return nil, nil
	}
	c, err := credentials.NewServerTLSFromFile(os.Getenv("SERVER_CERT"), os.Getenv("SERVER_KEY"))
	return []grpc.ServerOption{grpc.Creds(c)}, err
}

func run() error {
	flag.Parse()
	s := &server{log: slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})),
		incoming: make(chan *cvmspb.ClientStreamMessage)}
	if *manifest != "" {
		b, err := os.ReadFile(*manifest)
		if err != nil {
			return err
		}
		s.fixed = new(cvmspb.ComputationRunReq)
		if err := proto.Unmarshal(b, s.fixed); err != nil {
			return err
		}
	}
	go s.print()
	opts, err := options()
	if err != nil {
		return err
	}
	g := grpc.NewServer(opts...)
	g.RegisterService(&grpc.ServiceDesc{ServiceName: "cvms.Service", HandlerType: (*any)(nil),
		Metadata: cvmspb.File_agent_cvms_cvms_proto.Path(),
		Streams:  []grpc.StreamDesc{{StreamName: "Process", Handler: s.process, ServerStreams: true, ClientStreams: true}},
	}, s)
	h := health.NewServer()
	h.SetServingStatus("cvms_test_server", grpc_health_v1.HealthCheckResponse_SERVING)
	grpc_health_v1.RegisterHealthServer(g, h)
	reflection.Register(g)
	l, err := new(net.ListenConfig).Listen(context.Background(), "tcp",
		net.JoinHostPort(os.Getenv("HOST"), os.Getenv("PORT")))
	if err != nil {
		return err
	}
	if *readyFile != "" {
		if err := os.WriteFile(*readyFile, []byte(l.Addr().String()+"\n"), 0o644); err != nil {
			return err
		}
	}
	if *serve != "" {
		return http.Serve(l, files())
	}
	return g.Serve(l)
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "peer:", err)
		os.Exit(1)
	}
}
