// loadgen measures a server of cvms.Service/Process.  Each run prints one JSON line; an error, a lost message among
// them, stands in its "error" and makes the exit status 1.
//
// Two clients: -client raw, a minimal HTTP/2 client in this program, so cheap that the server and not the client is the
// bottleneck, and -client grpc (google.golang.org/grpc, what a real agent uses).
package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime/debug"
	"syscall"
	"time"
)

var (
	fMode    = flag.String("mode", "latency", "latency | ingest | idle | fetch | get | upload | send | startup | verify")
	fAddr    = flag.String("addr", "127.0.0.1:7001", "the server's address")
	fCA      = flag.String("ca", "", "use TLS 1.2 (ALPN h2), with this CA")
	fPID     = flag.Int("pid", 0, "the server's pid (its processor time and memory are read from the kernel)")
	fStdout  = flag.String("stdout", "", "ingest, verify: the server's stdout, a file")
	fExpect  = flag.String("expect", "", "file with the manifest's bytes: every manifest is compared with it")
	fFile    = flag.String("file", "", "upload, send: what is sent; get: the path")
	fN       = flag.Int("n", 500, "latency: connections; startup: starts; idle: connections made beside the idle ones")
	fConns   = flag.Int("conns", 1, "ingest, idle, fetch, get: connections")
	fMsgs    = flag.Int("msgs", 10000, "ingest: messages of each connection")
	fSize    = flag.Int("size", 100, "ingest: bytes of AgentLog.message")
	fHold    = flag.Duration("hold", 0, "idle: how long nothing happens while the server is watched")
	fClient  = flag.String("client", "raw", "latency, upload: raw | grpc")
	fRun     = flag.Uint("run", 0, "ingest, verify: the number in every message's marker (0: from the clock)")
	fTimeout = flag.Duration("timeout", 60*time.Second, "limit for one operation")
)

var (
	tlsCfg *tls.Config
	expect []byte
)

// raiseDescriptors makes room for the connections, as far as the hard limit goes.
func raiseDescriptors() {
	var rl syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &rl) == nil {
		rl.Cur = rl.Max
		_ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &rl)
	}
}

func setup() (err error) {
	debug.SetGCPercent(400)
	raiseDescriptors()
	if *fCA != "" {
		b, err := os.ReadFile(*fCA)
		if err != nil {
			return err
		}
		tlsCfg = &tls.Config{NextProtos: []string{"h2"}, ServerName: "localhost", MaxVersion: tls.VersionTLS12,
			RootCAs: x509.NewCertPool()}
		if !tlsCfg.RootCAs.AppendCertsFromPEM(b) {
			return errors.New("no certificate in " + *fCA)
		}
	}
	if *fExpect != "" {
		expect, err = os.ReadFile(*fExpect)
	}
	if *fRun == 0 {
		*fRun = uint(time.Now().UnixNano()/1000) % 100000000
	}
	hello = makeHello()
	return err
}

func main() {
	flag.Parse()
	mode := map[string]func() (out, error){"latency": latency, "ingest": ingest, "idle": idle, "fetch": fetch, "get": get,
		"upload": upload, "send": send, "startup": startup, "verify": verifyOnly}[*fMode]
	if mode == nil {
		fmt.Fprintf(os.Stderr, "loadgen: unknown mode %q\n", *fMode)
		os.Exit(2)
	}
	o, err := out(nil), setup()
	if err == nil {
		o, err = mode()
	}
	if o == nil {
		o = out{}
	}
	if err != nil {
		o["error"] = err.Error()
	}
	b, _ := json.Marshal(o)
	fmt.Println(string(b))
	if err != nil {
		os.Exit(1)
	}
}
