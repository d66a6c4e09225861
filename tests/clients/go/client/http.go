package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"clients/cvms"

	"golang.org/x/net/http2"
)

// h2 is an HTTP/2 client without gRPC's help, for requests that grpc-go would not make.
func h2() (*http2.ClientConn, error) {
	c, err := net.Dial("tcp", *fAddr)
	if err != nil {
		return nil, err
	}
	if *fTLS {
		cfg, err := tlsConfig()
		if err != nil {
			return nil, err
		}
		c = tls.Client(c, cfg)
	}
	return (&http2.Transport{AllowHTTP: true, DisableCompression: true}).NewClientConn(c)
}

// frame is one gRPC message on the wire.
func frame(compressed byte, m []byte) []byte {
	n := len(m)
	return append([]byte{compressed, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}, m...)
}

func post(ctx context.Context, path string, body io.Reader, headers ...string) *http.Request {
	r, _ := http.NewRequestWithContext(ctx, "POST", "http://"+*fAddr+path, body)
	r.Header.Set("Content-Type", "application/grpc")
	r.Header.Set("Te", "trailers")
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	return r
}

// answer is what a request got: the HTTP status, and the header or trailer NAME.
type answer struct {
	*http.Response
	body []byte
}

func do(cc *http2.ClientConn, r *http.Request) (answer, error) {
	resp, err := cc.RoundTrip(r)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return answer{resp, b}, err
}

func (a answer) get(name string) string {
	if v := a.Trailer.Get(name); v != "" {
		return v
	}
	return a.Header.Get(name)
}

// http asks what no gRPC library would.
func httpMode(ctx context.Context) error {
	log := cvms.LogMessage("http", 1)
	check := frame(0, nil)
	never := func() io.Reader { r, _ := io.Pipe(); return r } // a request body that does not end
	const cancelled = "CANCEL"                                // RST_STREAM will do as well as trailers: grpc-go's server sends it past a deadline
	cases := []struct {                                       // a status of 0 is any
		name           string
		request        *http.Request
		status         int
		grpc           string
		header, wanted string
	}{
		{"health check", post(ctx, "/grpc.health.v1.Health/Check", bytes.NewReader(check)), 200, "0", "Content-Type", "application/grpc"},
		{"application/grpc+proto", post(ctx, "/grpc.health.v1.Health/Check", bytes.NewReader(check),
			"Content-Type", "application/grpc+proto"), 200, "0", "", ""},
		{"compressed flag without an encoding", post(ctx, cvms.Process, bytes.NewReader(frame(1, log))), 200, "13", "", ""},
		{"compressed with an unknown encoding", post(ctx, cvms.Process, bytes.NewReader(frame(1, log)), "Grpc-Encoding", "snappy"),
			200, "12", "Grpc-Accept-Encoding", "identity"},
		{"identity encoding", post(ctx, cvms.Process, bytes.NewReader(frame(0, log)), "Grpc-Encoding", "identity"), 200, "0", "", ""},
		{"no content type", post(ctx, cvms.Process, bytes.NewReader(check), "Content-Type", "text/plain"), 415, "", "", ""},
		{"GET", func() *http.Request {
			r := post(ctx, cvms.Process, nil)
			r.Method = "GET"
			return r
		}(), 405, "", "", ""},
		{"half a message, then the end", post(ctx, cvms.Process, bytes.NewReader(frame(0, log)[:9])), 200, "13", "", ""},
		{"deadline kept by the server", post(ctx, cvms.Process, never(), "Grpc-Timeout", "300m"), 200, "4", "", cancelled},
		{"deadline long past", post(ctx, cvms.Process, never(), "Grpc-Timeout", "1n"), 200, "4", "", cancelled},
		{"deadline far away", post(ctx, cvms.Process, bytes.NewReader(frame(0, log)), "Grpc-Timeout", "99999999H"), 200, "0", "", ""},
		{"deadline that is none", post(ctx, cvms.Process, bytes.NewReader(frame(0, log)), "Grpc-Timeout", "1x"), 0, "13", "", ""},
	}
	cc, err := h2()
	if err != nil {
		return err
	}
	var all error
	for _, c := range cases {
		a, err := do(cc, c.request)
		if reset := (http2.StreamError{}); errors.As(err, &reset) && c.wanted == cancelled && reset.Code == http2.ErrCodeCancel {
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		if (c.status != 0 && a.StatusCode != c.status) || (c.grpc != "" && a.get("Grpc-Status") != c.grpc) || (c.header != "" && a.get(c.header) != c.wanted) {
			all = errors.Join(all, fmt.Errorf("%s: want %d, grpc-status %q, %s %q; got %d, headers %v, trailers %v, body %.40s", c.name,
				c.status, c.grpc, c.header, c.wanted, a.StatusCode, a.Header, a.Trailer, hex.EncodeToString(a.body)))
		}
	}
	return all
}

// pings sends -n PINGs one after the other beside an open stream; each must be answered with its own bytes.
func pingsMode(ctx context.Context) error {
	cc, err := h2()
	if err != nil {
		return err
	}
	r, w := io.Pipe()
	resp, err := cc.RoundTrip(post(ctx, cvms.Process, r))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	for i := range *fN {
		one, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := cc.Ping(one)
		cancel()
		if err != nil {
			return fmt.Errorf("ping %d: %w", i, err)
		}
	}
	go func() {
		_, _ = w.Write(frame(0, cvms.LogMessage("after the pings", 1)))
		w.Close()
	}()
	if _, err := io.ReadAll(resp.Body); err != nil {
		return err
	}
	if s := resp.Trailer.Get("Grpc-Status"); s != "0" {
		return fmt.Errorf("grpc-status %q after the pings", s)
	}
	return nil
}

// get fetches each path after the flags -n times by net/http, -per at a time: over HTTP/1.1, with TLS without ALPN, or
// with -tag h2 as a client that is left to itself does.  It prints what came, and how often.
func getMode(ctx context.Context) error {
	t, scheme := &http.Transport{MaxConnsPerHost: *fPer, MaxIdleConnsPerHost: *fPer}, "http://"
	if *fTLS {
		cfg, err := tlsConfig()
		if err != nil {
			return err
		}
		cfg.NextProtos = nil
		t.TLSClientConfig, t.ForceAttemptHTTP2, scheme = cfg, *fTag == "h2", "https://"
	}
	get := func(path string) (string, error) {
		r, err := http.NewRequestWithContext(ctx, "GET", scheme+*fAddr+path, nil)
		if err != nil {
			return "", err
		}
		resp, err := (&http.Client{Transport: t}).Do(r)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		sum := sha256.New()
		if _, err := io.Copy(sum, resp.Body); err != nil {
			return "", err
		}
		if _, err := http.ParseTime(resp.Header.Get("Date")); err != nil {
			return "", err
		}
		return fmt.Sprintf("%s %d %x", resp.Proto, resp.StatusCode, sum.Sum(nil)), nil
	}
	var mu sync.Mutex
	var next atomic.Int64
	got, errs := map[string]int{}, make(chan error, *fPer)
	for range *fPer {
		go func() {
			for i := next.Add(1); i <= int64(*fN*flag.NArg()); i = next.Add(1) {
				what, err := get(flag.Arg(int(i) % flag.NArg()))
				if err != nil {
					errs <- err
					return
				}
				mu.Lock()
				got[what]++
				mu.Unlock()
			}
			errs <- nil
		}()
	}
	var err error
	for range *fPer {
		err = errors.Join(err, <-errs)
	}
	for what, n := range got {
		fmt.Println(what, n)
	}
	return err
}
