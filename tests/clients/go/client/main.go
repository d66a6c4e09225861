// client is the grpc-go side of the end-to-end tests: each mode plays one kind of client against a server, checks what
// it can see, and ends with status 0 or with "client: REASON" on stderr and status 1.
//
// Modes that hold on (-hold, never-read, wait, flood, crowd) say where they are on stdout and go on when stdin has a line.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"sort"
	"strings"
	"sync"
	"time"

	"clients/cvms"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	_ "google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

var (
	fMode    = flag.String("mode", "manifest", "one of the modes; an unknown one lists them")
	fAddr    = flag.String("addr", "127.0.0.1:7001", "server address")
	fOut     = flag.String("o", "", "manifest: file for the joined bytes")
	fMsgs    = flag.String("messages", "", "manifest: file for a JSON list of the messages (hex, or {len, sha256} over 64 KiB)")
	fSend    = flag.String("send", "", "send: file with a message a line: NAME, a blank, base64")
	fN       = flag.Int("n", 1, "how many logs, streams or pings")
	fPer     = flag.Int("per", 1, "crowd: streams on a connection")
	fSize    = flag.Int("size", 0, "bytes of a log's text, padded")
	fTag     = flag.String("tag", "log", "start of a log's text; number n is TAG-n;")
	fMeta    = flag.String("metadata", "", "NAME=VALUE,…: metadata of every stream (a -bin value is given in hex)")
	fHold    = flag.Bool("hold", false, "logs: say \"sent\" and wait for a line on stdin before half-closing")
	fPause   = flag.Duration("pause", 0, "logs: silence between the manifest and the first log")
	fTimeout = flag.Duration("timeout", 60*time.Second, "limit for everything")
	fPing    = flag.Duration("keepalive", 0, "grpc-go's keepalive time (it uses at least 10 s)")
	fTLS     = flag.Bool("tls", false, "use TLS")
	fCA      = flag.String("ca", "", "PEM file of the CA for -tls")
	fCert    = flag.String("cert", "", "client certificate")
	fKey     = flag.String("key", "", "client key")
	fName    = flag.String("server-name", "localhost", "name in the server's certificate")
)

var modes = map[string]func(context.Context) error{
	"manifest":   manifestMode,
	"send":       sendMode,
	"logs":       logsMode,
	"never-read": neverReadMode,
	"wait":       waitMode,
	"flood":      floodMode,
	"streams":    streamsMode,
	"crowd":      crowdMode,
	"unknown":    unknownMode,
	"oversize":   oversizeMode,
	"malformed":  malformedMode,
	"gzip":       gzipMode,
	"deadline":   deadlineMode,
	"metadata":   metadataMode,
	"cancel":     cancelMode,
	"health":     healthMode,
	"reflection": reflectionMode,
	"http":       httpMode,
	"get":        getMode,
	"pings":      pingsMode,
}

var stdin = bufio.NewReader(os.Stdin)

// proceed waits for the test to say go on.
func proceed() { _, _ = stdin.ReadString('\n') }

func tlsConfig() (*tls.Config, error) {
	c := &tls.Config{ServerName: *fName, NextProtos: []string{"h2"}}
	if *fCA != "" {
		b, err := os.ReadFile(*fCA)
		if err != nil {
			return nil, err
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(b) {
			return nil, errors.New("no certificate in " + *fCA)
		}
	}
	if *fCert != "" {
		pair, err := tls.LoadX509KeyPair(*fCert, *fKey)
		if err != nil {
			return nil, err
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c, nil
}

func dial(opts ...grpc.DialOption) (*grpc.ClientConn, error) {
	creds := insecure.NewCredentials()
	if *fTLS {
		c, err := tlsConfig()
		if err != nil {
			return nil, err
		}
		creds = credentials.NewTLS(c)
	}
	opts = append(opts, grpc.WithTransportCredentials(creds), grpc.WithNoProxy())
	if *fPing > 0 {
		opts = append(opts, grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: *fPing, Timeout: time.Second}))
	}
	return grpc.NewClient("passthrough:///"+*fAddr, opts...)
}

// pairs is -metadata as grpc-go takes it.
func pairs() []string {
	var kv []string
	for _, p := range strings.Split(*fMeta, ",") {
		if name, value, ok := strings.Cut(p, "="); ok {
			if strings.HasSuffix(name, "-bin") {
				b, _ := hex.DecodeString(value)
				value = string(b)
			}
			kv = append(kv, name, value)
		}
	}
	return kv
}

func openOn(ctx context.Context, cc *grpc.ClientConn, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	ctx = metadata.AppendToOutgoingContext(ctx, pairs()...)
	opts = append(opts, grpc.ForceCodecV2(cvms.Codec{}), grpc.MaxCallRecvMsgSize(8<<20))
	return cc.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, cvms.Process, opts...)
}

// open starts a Process stream on a connection of its own, which lives as long as the program.
func open(ctx context.Context, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	cc, err := dial()
	if err != nil {
		return nil, err
	}
	return openOn(ctx, cc, opts...)
}

// receive reads one manifest and checks it: full chunks, one id, then an empty last one.
func receive(s grpc.ClientStream, each func(msg, data []byte)) error {
	firstID, short := "", false
	for n := 0; ; n++ {
		var m []byte
		if err := s.RecvMsg(&m); err != nil {
			return fmt.Errorf("message %d: %w", n, err)
		}
		data, id, last, err := cvms.ReadChunk(m)
		if err != nil {
			return fmt.Errorf("message %d: %w", n, err)
		}
		if n == 0 {
			firstID = id
		}
		switch {
		case id == "" || id != firstID:
			return fmt.Errorf("chunk %d has id %q, the first %q", n, id, firstID)
		case last && len(data) > 0:
			return fmt.Errorf("the last chunk holds %d bytes", len(data))
		case last && n == 0:
			return errors.New("no chunk before the last one")
		case !last && (len(data) == 0 || len(data) > cvms.Chunk || short):
			return fmt.Errorf("chunk %d holds %d bytes (after a short one: %v)", n, len(data), short)
		}
		short = len(data) < cvms.Chunk
		if each != nil {
			each(m, data)
		}
		if last {
			return nil
		}
	}
}

func openAndReceive(ctx context.Context, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	s, err := open(ctx, opts...)
	if err != nil {
		return nil, err
	}
	return s, receive(s, nil)
}

// finish half-closes and wants the end of the stream with OK.
func finish(s grpc.ClientStream) error {
	if err := s.CloseSend(); err != nil {
		return err
	}
	var m []byte
	if err := s.RecvMsg(&m); !errors.Is(err, io.EOF) {
		return fmt.Errorf("after the half-close: want status OK, got %v and %d bytes", err, len(m))
	}
	return nil
}

// want checks the status that a stream or call ended with.
func want(what string, err error, code codes.Code) error {
	if got := status.Code(err); got != code {
		return fmt.Errorf("%s: want %v, got %v (%v)", what, code, got, err)
	}
	return nil
}

// ended receives until the stream's end and returns its status; io.EOF stands for OK.
func ended(s grpc.ClientStream) error {
	for {
		var m []byte
		if err := s.RecvMsg(&m); err != nil {
			return err
		}
	}
}

func logText(n int) string {
	t := fmt.Sprintf("%s-%d;", *fTag, n)
	return t + strings.Repeat("x", max(0, *fSize-len(t)))
}

func sendLogs(s grpc.ClientStream, from, n int) error {
	for i := from; i < from+n; i++ {
		m := cvms.LogMessage(logText(i), 1700000000+int64(i))
		if err := s.SendMsg(&m); err != nil {
			return fmt.Errorf("log %d: %w (%v)", i, err, ended(s))
		}
	}
	return nil
}

func manifestMode(ctx context.Context) error {
	s, err := open(ctx)
	if err != nil {
		return err
	}
	var joined bytes.Buffer
	var list []any
	err = receive(s, func(msg, data []byte) {
		joined.Write(data)
		if len(msg) > 64<<10 {
			sum := sha256.Sum256(msg)
			list = append(list, map[string]any{"len": len(msg), "sha256": hex.EncodeToString(sum[:])})
		} else {
			list = append(list, hex.EncodeToString(msg))
		}
	})
	if err != nil {
		return err
	}
	if *fOut != "" {
		if err := os.WriteFile(*fOut, joined.Bytes(), 0o644); err != nil {
			return err
		}
	}
	if *fMsgs != "" {
		b, _ := json.Marshal(list)
		if err := os.WriteFile(*fMsgs, b, 0o644); err != nil {
			return err
		}
	}
	return finish(s)
}

func sendMode(ctx context.Context) error {
	b, err := os.ReadFile(*fSend)
	if err != nil {
		return err
	}
	s, err := openAndReceive(ctx)
	if err != nil {
		return err
	}
	for _, line := range strings.Split(strings.TrimSuffix(string(b), "\n"), "\n") {
		_, text, _ := strings.Cut(line, " ")
		m, err := base64.StdEncoding.DecodeString(text)
		if err != nil {
			return err
		}
		if err := s.SendMsg(&m); err != nil {
			return err
		}
	}
	return finish(s)
}

func logsMode(ctx context.Context) error {
	s, err := openAndReceive(ctx)
	if err != nil {
		return err
	}
	select { // a broken connection ends the pause
	case <-s.Context().Done():
	case <-time.After(*fPause):
	}
	if err := sendLogs(s, 0, *fN); err != nil {
		return err
	}
	if *fHold {
		fmt.Println("sent")
		proceed()
	}
	return finish(s)
}

// never-read is one agent host with the seed's log-forwarder: an agent that reads its stream, and a forwarder on another
// connection that never does and sends -n logs. Then a line on stdin, and the agent's stream must still be alive.
func neverReadMode(ctx context.Context) error {
	agent, err := openAndReceive(ctx)
	if err != nil {
		return err
	}
	forwarder, err := open(ctx)
	if err != nil {
		return err
	}
	if err := sendLogs(forwarder, 0, *fN); err != nil {
		return err
	}
	fmt.Println("sent")
	proceed()
	m := cvms.LogMessage(*fTag+"-agent;", 1)
	if err := agent.SendMsg(&m); err != nil {
		return err
	}
	return finish(agent)
}

// wait sits on a stream until the server ends it and prints the status: the code's name, a blank, the message.
func waitMode(ctx context.Context) error {
	s, err := openAndReceive(ctx)
	if err != nil {
		return err
	}
	fmt.Println("waiting")
	err = ended(s)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	fmt.Println(status.Code(err), status.Convert(err).Message())
	return nil
}

// flood sends -n logs and prints 0 when it starts and a count after each 500, so that a test can see it being slowed down.
func floodMode(ctx context.Context) error {
	s, err := openAndReceive(ctx)
	if err != nil {
		return err
	}
	fmt.Println(0)
	for i := 0; i < *fN; i += 500 {
		if err := sendLogs(s, i, min(500, *fN-i)); err != nil {
			return err
		}
		fmt.Println(min(i+500, *fN))
	}
	return finish(s)
}

// streams runs -n Process streams at once on one connection; each gets a manifest of its own and sends one log.
func streamsMode(ctx context.Context) error {
	cc, err := dial()
	if err != nil {
		return err
	}
	errs := make(chan error, *fN)
	var all sync.WaitGroup // every stream is open before the first one ends
	all.Add(*fN)
	for i := range *fN {
		go func() {
			s, err := openOn(ctx, cc)
			if err == nil {
				err = receive(s, nil)
			}
			if err == nil {
				err = sendLogs(s, i, 1)
			}
			all.Done()
			all.Wait()
			if err == nil {
				err = finish(s)
			}
			errs <- err
		}()
	}
	for range *fN {
		err = errors.Join(err, <-errs)
	}
	return err
}

// crowd holds -n Process streams open, -per on a connection. After each line on stdin each of them sends one log, and a
// line on stdout says so; when stdin ends all of them end well.
func crowdMode(ctx context.Context) error {
	streams := make([]grpc.ClientStream, *fN)
	each := func(do func(i int) error) error {
		errs := make(chan error, *fN)
		for i := range *fN {
			go func() { errs <- do(i) }()
		}
		var err error
		for range *fN {
			err = errors.Join(err, <-errs)
		}
		return err
	}
	var cc *grpc.ClientConn
	conns := make([]*grpc.ClientConn, *fN)
	for i := range conns {
		if i%*fPer == 0 {
			var err error
			if cc, err = dial(); err != nil {
				return err
			}
		}
		conns[i] = cc
	}
	err := each(func(i int) (err error) {
		if streams[i], err = openOn(ctx, conns[i]); err == nil {
			err = receive(streams[i], nil)
		}
		return err
	})
	for round := 0; err == nil; round++ {
		fmt.Println(round)
		if _, end := stdin.ReadString('\n'); end != nil {
			return each(func(i int) error { return finish(streams[i]) })
		}
		err = each(func(i int) error { return sendLogs(streams[i], round**fN+i, 1) })
	}
	return err
}

func unknownMode(ctx context.Context) error {
	cc, err := dial(grpc.WithDefaultCallOptions(grpc.ForceCodecV2(cvms.Codec{})))
	if err != nil {
		return err
	}
	for _, path := range []string{"/cvms.Service/Nope", "/nope.Service/Process", "/cvms.Service/Process/x", "/"} {
		req, resp := []byte{}, []byte{}
		if err := want(path, cc.Invoke(ctx, path, &req, &resp), codes.Unimplemented); err != nil {
			return err
		}
	}
	return nil
}

// oversize sends a message of 4 MiB exactly (it arrives) and one of a byte more (refused).
func oversizeMode(ctx context.Context) error {
	const limit = 4 << 20
	for _, extra := range []int{0, 1} {
		s, err := openAndReceive(ctx)
		if err != nil {
			return err
		}
		m := cvms.LogMessage(strings.Repeat("y", limit+extra-30), 1700000000)
		m = cvms.LogMessage(strings.Repeat("y", limit+extra-30+limit+extra-len(m)), 1700000000)
		if len(m) != limit+extra {
			return fmt.Errorf("made %d bytes", len(m))
		}
		if err := s.SendMsg(&m); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if extra == 0 {
			if err := finish(s); err != nil {
				return fmt.Errorf("message of the limit: %w", err)
			}
			continue
		}
		if err := want("message over the limit", ended(s), codes.ResourceExhausted); err != nil {
			return err
		}
	}
	return nil
}

// malformed sends what is no ClientStreamMessage, each on a stream of its own; another stream of the same connection
// must not notice.
func malformedMode(ctx context.Context) error {
	bad := map[string]string{
		"invalid UTF-8":                 "\x0a\x05\x0a\x03a\xffb",
		"overlong UTF-8":                "\x0a\x04\x0a\x02\xc0\x80",
		"UTF-8 surrogate":               "\x0a\x05\x0a\x03\xed\xa0\x80",
		"truncated field":               "\x0a\x05\x0a",
		"truncated varint":              "\x0a\x02\x0a\x80",
		"varint of eleven bytes":        "\x48\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
		"field number 0":                "\x02\x01x",
		"wire type 7":                   "\x0f",
		"group that does not end":       "\x4b\x08\x01",
		"end of a group that never was": "\x4c",
	}
	cc, err := dial()
	if err != nil {
		return err
	}
	other, err := openOn(ctx, cc)
	if err != nil {
		return err
	}
	if err := receive(other, nil); err != nil {
		return err
	}
	var names []string
	for name := range bad {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		s, err := openOn(ctx, cc)
		if err != nil {
			return err
		}
		if err := receive(s, nil); err != nil {
			return err
		}
		m := []byte(bad[name])
		if err := s.SendMsg(&m); err != nil {
			return err
		}
		if err := want(name, ended(s), codes.Internal); err != nil {
			return err
		}
	}
	if err := sendLogs(other, 0, 1); err != nil {
		return err
	}
	return finish(other)
}

func gzipMode(ctx context.Context) error {
	s, err := open(ctx, grpc.UseCompressor("gzip"))
	if err != nil {
		return err
	}
	if err := sendLogs(s, 0, 1); err != nil && status.Code(err) != codes.Unknown {
		return err
	}
	if err := want("gzip", ended(s), codes.Unimplemented); err != nil {
		return err
	}
	head, _ := s.Header()
	got := append(head.Get("grpc-accept-encoding"), s.Trailer().Get("grpc-accept-encoding")...)
	if len(got) != 1 || got[0] != "identity" {
		return fmt.Errorf("grpc-accept-encoding: want identity, got %q", got)
	}
	return nil
}

// deadline lets a stream with a short grpc-timeout run out, then shows that one with a long one still works.
func deadlineMode(ctx context.Context) error {
	short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	s, err := open(short)
	if err != nil {
		return err
	}
	if err := receive(s, nil); err != nil {
		return err
	}
	if err := want("past the deadline", ended(s), codes.DeadlineExceeded); err != nil {
		return err
	}
	return logsMode(ctx)
}

// metadata sends names and values of every kind next to -metadata's.
func metadataMode(ctx context.Context) error {
	ctx = metadata.AppendToOutgoingContext(ctx, "x-empty", "", "x-twice", "a", "x-twice", "b",
		"x-long", strings.Repeat("v", 4000), "x-all-bin", string([]byte{0, 1, 254, 255, '\n'}), "x-all-bin", "",
		"x-punctuation_.-9", "~!@#$%^&*()=+[]{}|;:'\",<>/? ")
	return logsMode(ctx)
}

// cancel resets streams in the middle of the manifest and after a log; the connection goes on.
func cancelMode(ctx context.Context) error {
	cc, err := dial()
	if err != nil {
		return err
	}
	for i := range *fN {
		one, cancel := context.WithCancel(ctx)
		s, err := openOn(one, cc)
		if err == nil && i%2 == 0 {
			err = receive(s, nil)
			if err == nil {
				err = sendLogs(s, i, 1)
			}
		}
		cancel()
		if err != nil {
			return err
		}
	}
	s, err := openOn(ctx, cc)
	if err != nil {
		return err
	}
	if err := receive(s, nil); err != nil {
		return err
	}
	if err := sendLogs(s, *fN, 1); err != nil {
		return err
	}
	return finish(s)
}

func main() {
	flag.Parse()
	run := modes[*fMode]
	if run == nil {
		var names []string
		for name := range modes {
			names = append(names, name)
		}
		sort.Strings(names)
		fmt.Fprintln(os.Stderr, "client: -mode is one of", strings.Join(names, " "))
		os.Exit(2)
	}
	ctx, cancel := context.WithTimeout(context.Background(), *fTimeout)
	defer cancel()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "client:", err)
		os.Exit(1)
	}
}
