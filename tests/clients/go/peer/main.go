// peer does the Go CVMS server's job: it sends the manifest in the file -manifest to every agent and prints what
// comes back. HOST and PORT say where it listens; SERVER_CERT and SERVER_KEY turn TLS on, SERVER_CA_CERTS or
// CLIENT_CA_CERTS client certificates as well (each a path or the PEM itself).
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"clients/cvms"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"
)

type server struct {
	chunks [][]byte
	msg    protoreflect.MessageDescriptor // of ClientStreamMessage
	json   bool
	stop   chan struct{}
}

func (s *server) process(_ any, stream grpc.ServerStream) error {
	end := make(chan error, 1)
	go func() { end <- s.receive(stream) }()
	for i := range s.chunks {
		if err := stream.SendMsg(&s.chunks[i]); err != nil {
			return err
		}
	}
	select {
	case err := <-end:
		return err
	case <-s.stop:
		return status.Error(codes.Unavailable, "the server is stopping")
	}
}

// receive prints until the client half-closes (nil) or the stream fails.
func (s *server) receive(stream grpc.ServerStream) error {
	addr := ""
	if p, ok := grpcpeer.FromContext(stream.Context()); ok {
		addr = p.Addr.String()
	}
	for {
		var m cvms.Incoming
		if err := stream.RecvMsg(&m); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if err := s.print(addr, &m); err != nil {
			return status.Error(codes.Internal, err.Error())
		}
	}
}

func (s *server) print(addr string, m *cvms.Incoming) error {
	if !s.json {
		_, err := fmt.Println(time.Now().Format(time.RFC3339Nano), addr, m.Fields)
		return err
	}
	d := dynamicpb.NewMessage(s.msg)
	if err := proto.Unmarshal(m.Raw, d); err != nil {
		return err
	}
	b, err := protojson.Marshal(d)
	if err != nil {
		return err
	}
	_, err = fmt.Printf("{\"time\":%q,\"peer\":%q,\"stream\":\"agent\",\"message\":%s}\n",
		time.Now().Format(time.RFC3339Nano), addr, b)
	return err
}

// pem is the PEM in an environment variable that holds it or its path.
func pem(name string) ([]byte, error) {
	v := os.Getenv(name)
	if strings.Contains(v, "-----BEGIN") {
		return []byte(v), nil
	}
	return os.ReadFile(v)
}

func tlsOptions() ([]grpc.ServerOption, string, error) {
	if os.Getenv("SERVER_CERT") == "" {
		return nil, "without TLS", nil
	}
	cert, err := pem("SERVER_CERT")
	if err != nil {
		return nil, "", err
	}
	key, err := pem("SERVER_KEY")
	if err != nil {
		return nil, "", err
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, "", err
	}
	c := &tls.Config{Certificates: []tls.Certificate{pair}}
	for _, name := range []string{"SERVER_CA_CERTS", "CLIENT_CA_CERTS"} {
		if os.Getenv(name) == "" {
			continue
		}
		ca, err := pem(name)
		if err != nil {
			return nil, "", err
		}
		c.ClientAuth = tls.RequireAndVerifyClientCert
		if name == "CLIENT_CA_CERTS" {
			c.ClientCAs = x509.NewCertPool()
			c.ClientCAs.AppendCertsFromPEM(ca)
		}
	}
	return []grpc.ServerOption{grpc.Creds(credentials.NewTLS(c))}, "with TLS", nil
}

func listen() (net.Listener, error) {
	host, set := os.LookupEnv("HOST")
	if !set {
		host = "localhost"
	}
	port := os.Getenv("PORT")
	if port == "" {
		port = "7001"
	}
	return net.Listen("tcp", net.JoinHostPort(host, port))
}

func run() error {
	manifest := flag.String("manifest", "", "file with the bytes of a ComputationRunReq")
	ready := flag.String("ready-file", "", "gets HOST:PORT when the port is open")
	output := flag.String("output", "text", "text or json")
	flag.Parse()
	data, err := os.ReadFile(*manifest)
	if err != nil {
		return err
	}
	fd, err := cvms.Register()
	if err != nil {
		return err
	}
	s := &server{msg: fd.Messages().ByName("ClientStreamMessage"), json: *output == "json", stop: make(chan struct{})}
	for i := 0; i < len(data); i += cvms.Chunk {
		s.chunks = append(s.chunks, cvms.ChunkMessage(data[i:min(i+cvms.Chunk, len(data))], "1", false))
	}
	s.chunks = append(s.chunks, cvms.ChunkMessage(nil, "1", true))

	opts, how, err := tlsOptions()
	if err != nil {
		return err
	}
	g := grpc.NewServer(append(opts, grpc.ForceServerCodecV2(cvms.Codec{}))...)
	g.RegisterService(&grpc.ServiceDesc{ServiceName: "cvms.Service", HandlerType: (*any)(nil), Metadata: cvms.FileName,
		Streams: []grpc.StreamDesc{{StreamName: "Process", Handler: s.process, ServerStreams: true, ClientStreams: true}},
	}, s)
	h := health.NewServer()
	h.SetServingStatus("cvms_test_server", grpc_health_v1.HealthCheckResponse_SERVING)
	grpc_health_v1.RegisterHealthServer(g, h)
	reflection.Register(g)

	l, err := listen()
	if err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "cvms_test_server service gRPC server listening at %s %s\n", l.Addr(), how)
	if *ready != "" {
		if err := os.WriteFile(*ready, []byte(l.Addr().String()+"\n"), 0o644); err != nil {
			return err
		}
	}
	ctx, cancel := signal.NotifyContext(context.Background(),
		syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGABRT)
	go func() {
		<-ctx.Done()
		cancel() // a second signal ends the process
		close(s.stop)
		h.Shutdown()
		time.AfterFunc(3*time.Second, g.Stop)
		g.GracefulStop()
	}()
	return g.Serve(l)
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "peer:", err)
		os.Exit(1)
	}
}
