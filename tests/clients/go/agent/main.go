// agent serves agent.AgentService as a real agent does: it checks who calls with Go's own crypto, keeps what is
// uploaded, and gives results.  Lines on stdin set it up: "key BASE64" (the users' SubjectPublicKeyInfo), "results N
// PIECE" (so many bytes in pieces of PIECE; N -1: endless), "mode CALL WORDS...": "refuse TEXT", "deaf" (never reads),
// "early" (an OK before all is read), "drop N" (closes the connection after N bytes, once), "busy N" (not yet, N times),
// "more N" (results that are N bytes longer than their file-size).
// What a call was goes to stdout, a line each.
package main

import (
	"bufio"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha3"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"

	"clients/cvms"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
)

type agent struct {
	sync.Mutex
	key            any
	results, piece int
	mode           map[string][]string
	conns          map[net.Conn]bool
}

// verify holds the caller's signature over its role to the users' key.
func (a *agent) verify(ctx context.Context, role string) error {
	md, _ := metadata.FromIncomingContext(ctx)
	one := func(name string) string { return strings.Join(md.Get(name), "\x00") }
	if one("user-id") != role {
		return fmt.Errorf("user-id is %q", one("user-id"))
	}
	sig, err := base64.StdEncoding.DecodeString(one("signature"))
	if err != nil {
		return err
	}
	sum := sha256.Sum256([]byte(role))
	good := false
	switch k := a.key.(type) {
	case *rsa.PublicKey:
		good = rsa.VerifyPKCS1v15(k, crypto.SHA256, sum[:], sig) == nil
	case *ecdsa.PublicKey:
		good = ecdsa.VerifyASN1(k, sum[:], sig)
	case ed25519.PublicKey:
		good = ed25519.Verify(k, []byte(role), sig)
	}
	if !good {
		return errors.New("signature verification failed")
	}
	return nil
}

// act plays the call's mode before anything is read; done tells that it was all.
func (a *agent) act(call string, stream grpc.ServerStream) (done bool, err error) {
	a.Lock()
	defer a.Unlock()
	m := a.mode[call]
	if len(m) == 0 {
		return false, nil
	}
	switch m[0] {
	case "refuse":
		return true, status.Error(codes.Unknown, strings.Join(m[1:], " "))
	case "early":
		return true, stream.SendMsg(&[]byte{})
	case "busy":
		n, _ := strconv.Atoi(m[1])
		if n > 0 {
			a.mode[call] = []string{"busy", strconv.Itoa(n - 1)}
			return true, status.Error(codes.Unknown, "agent not expecting this operation in the current state")
		}
	case "deaf":
		a.Unlock()
		fmt.Println("deaf", call)
		<-stream.Context().Done()
		a.Lock()
		return true, stream.Context().Err()
	}
	return false, nil
}

// drop closes every connection once so many bytes have come.
func (a *agent) drop(call string, n int) bool {
	a.Lock()
	defer a.Unlock()
	m := a.mode[call]
	if len(m) != 2 || m[0] != "drop" {
		return false
	}
	if limit, _ := strconv.Atoi(m[1]); n < limit {
		return false
	}
	delete(a.mode, call)
	for c := range a.conns {
		c.Close()
	}
	return true
}

// upload reads a call to its end: fields 1 and 2 of its messages, each joined.
func (a *agent) upload(call, role string, stream grpc.ServerStream) error {
	if done, err := a.act(call, stream); done {
		fmt.Println("acted", call)
		return err
	}
	if err := a.verify(stream.Context(), role); err != nil {
		return err
	}
	h, second := sha3.New256(), []byte{}
	n, messages, longest := 0, 0, 0
	for {
		var b []byte
		err := stream.RecvMsg(&b)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		messages++
		for len(b) > 0 {
			num, _, k := protowire.ConsumeTag(b)
			v, m := protowire.ConsumeBytes(b[max(k, 0):])
			if k < 0 || m < 0 {
				return status.Error(codes.Internal, "malformed")
			}
			b = b[k+m:]
			if num == 1 {
				h.Write(v)
				n += len(v)
				longest = max(longest, len(v))
			} else if call == "data" {
				second = append(second[:0], v...)
			} else {
				second = append(second, v...)
			}
		}
		if a.drop(call, n) {
			fmt.Println("dropped", call)
			return errors.New("dropped")
		}
	}
	md, _ := metadata.FromIncomingContext(stream.Context())
	if call == "algo" {
		fmt.Printf("algo %d %x messages=%d longest=%d requirements=%d %x type=%q args=%q runtime=%q signature=%s\n", n, h.Sum(nil), messages, longest,
			len(second), sha3.Sum256(second), md.Get("algo_type"), md.Get("algo_args"), md.Get("python_runtime"), strings.Join(md.Get("signature"), " "))
	} else {
		fmt.Printf("data %d %x messages=%d longest=%d name=%q decompress=%q\n", n, h.Sum(nil), messages, longest, second, md.Get("decompress"))
	}
	return stream.SendMsg(&[]byte{})
}

func (a *agent) algo(_ any, s grpc.ServerStream) error {
	return a.upload("algo", "algorithm-provider", s)
}
func (a *agent) data(_ any, s grpc.ServerStream) error { return a.upload("data", "data-provider", s) }

// result gives bytes that count up, so many and in pieces as long as it was told.
func (a *agent) result(_ any, stream grpc.ServerStream) error {
	var b []byte
	if err := stream.RecvMsg(&b); err != nil {
		return err
	}
	if done, err := a.act("result", stream); done {
		return err
	}
	if err := a.verify(stream.Context(), "consumer"); err != nil {
		return err
	}
	a.Lock()
	size, piece := a.results, a.piece
	more := 0
	if m := a.mode["result"]; len(m) == 2 && m[0] == "more" {
		more, _ = strconv.Atoi(m[1])
	}
	a.Unlock()
	if size >= 0 {
		if err := stream.SetHeader(metadata.Pairs("file-size", strconv.Itoa(size))); err != nil {
			return err
		}
	}
	size += more
	h := sha3.New256()
	for at := 0; at != size; {
		n := piece
		if size >= 0 {
			n = min(piece, size-at)
		}
		v := make([]byte, n)
		for i := range v {
			v[i] = byte((at + i) * 7)
		}
		h.Write(v)
		m := protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), v)
		if err := stream.SendMsg(&m); err != nil {
			fmt.Println("result broken", at)
			return err
		}
		at += n
		if a.drop("result", at) {
			return errors.New("dropped")
		}
	}
	fmt.Printf("result %d %x\n", size, h.Sum(nil))
	return nil
}

func (a *agent) commands() {
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		words := strings.Fields(in.Text())
		a.Lock()
		switch words[0] {
		case "key":
			der, err := base64.StdEncoding.DecodeString(words[1])
			if err == nil {
				a.key, err = x509.ParsePKIXPublicKey(der)
			}
			if err != nil {
				fmt.Println("bad key", err)
			}
		case "results":
			a.results, _ = strconv.Atoi(words[1])
			a.piece, _ = strconv.Atoi(words[2])
		case "mode":
			a.mode[words[1]] = words[2:]
		}
		a.Unlock()
		fmt.Println("done", words[0])
	}
	os.Exit(0)
}

// listener remembers the connections, so that they can be cut.
type listener struct {
	net.Listener
	a *agent
}

func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.a.Lock()
		l.a.conns[c] = true
		l.a.Unlock()
	}
	return c, err
}

func main() {
	addr := flag.String("listen", "127.0.0.1:0", "HOST:PORT")
	flag.Parse()
	a := &agent{results: 1000, piece: 1 << 20, mode: map[string][]string{}, conns: map[net.Conn]bool{}}
	l, err := net.Listen("tcp", *addr)
	if err != nil {
		fmt.Fprintln(os.Stderr, "agent:", err)
		os.Exit(1)
	}
	g := grpc.NewServer(grpc.ForceServerCodecV2(cvms.Codec{}), grpc.MaxRecvMsgSize(2<<20))
	g.RegisterService(&grpc.ServiceDesc{ServiceName: "agent.AgentService", HandlerType: (*any)(nil), Metadata: "agent/agent.proto",
		Streams: []grpc.StreamDesc{
			{StreamName: "Algo", Handler: a.algo, ClientStreams: true},
			{StreamName: "Data", Handler: a.data, ClientStreams: true},
			{StreamName: "Result", Handler: a.result, ServerStreams: true},
		}}, a)
	go a.commands()
	fmt.Println("listening", l.Addr())
	if err := g.Serve(listener{l, a}); err != nil {
		os.Exit(1)
	}
}
