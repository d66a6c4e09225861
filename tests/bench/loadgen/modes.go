package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

// cycle connects, takes the manifest and closes; microseconds from dial to the whole manifest.
func cycle() (us float64, m manifest, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), *fTimeout)
	defer cancel()
	var s interface {
		recvManifest() (manifest, error)
		close()
	}
	t := time.Now()
	if *fClient == "grpc" {
		s, err = openGRPC(ctx)
	} else {
		s, err = openRaw(ctx)
	}
	if err != nil {
		return 0, m, err
	}
	m, err = s.recvManifest()
	us = float64(time.Since(t).Nanoseconds()) / 1e3
	s.close()
	return us, m, err
}

// latency makes n connections one after the other.
func latency() (out, error) {
	for range min(10, *fN) { // both sides get warm
		if _, _, err := cycle(); err != nil {
			return nil, err
		}
	}
	var all []float64
	var m manifest
	meter := startMeter()
	for range *fN {
		us, got, err := cycle()
		if err != nil {
			return nil, err
		}
		m, all = got, append(all, us)
	}
	o := meter.stop(out{"n": *fN, "manifest_bytes": m.bytes, "chunks": m.chunks})
	o["server_cpu_us_per_conn"], o["client_cpu_us_per_conn"] = o.per("server_cpu_s", *fN), o.per("client_cpu_s", *fN)
	quantiles(o, "us", all)
	return o, nil
}

// openAll opens -conns streams, some at a time, and takes their manifests.
func openAll() ([]*rawStream, error) {
	ss := make([]*rawStream, *fConns)
	var next atomic.Int64
	var wg sync.WaitGroup
	var first atomic.Value
	for range 64 {
		wg.Go(func() {
			for i := next.Add(1) - 1; int(i) < len(ss) && first.Load() == nil; i = next.Add(1) - 1 {
				ctx, cancel := context.WithTimeout(context.Background(), *fTimeout)
				s, err := openRaw(ctx)
				cancel()
				if err == nil {
					_, err = s.recvManifest()
				}
				if err != nil {
					first.CompareAndSwap(nil, fmt.Errorf("connection %d: %w", i, err))
					return
				}
				s.startReader()
				ss[i] = s
			}
		})
	}
	wg.Wait()
	err, _ := first.Load().(error)
	return ss, err
}

// each runs f for all streams at once and returns the first error.
func each(ss []*rawStream, f func(i int, s *rawStream) error) error {
	var wg sync.WaitGroup
	var first atomic.Value
	for i, s := range ss {
		wg.Go(func() {
			if err := f(i, s); err != nil {
				first.CompareAndSwap(nil, fmt.Errorf("stream %d: %w", i, err))
			}
		})
	}
	wg.Wait()
	err, _ := first.Load().(error)
	return err
}

// ingest sends -msgs messages on each of -conns streams, a DATA frame each, as grpc-go does.  All bytes are made before
// the clock starts.  The server's time counts until every message stands on its stdout, whole and in order.
func ingest() (out, error) {
	st, err := os.Stat(*fStdout)
	if err != nil {
		return nil, err
	}
	ss, err := openAll()
	if err != nil {
		return nil, err
	}
	frames, now := make([][]byte, len(ss)), time.Now()
	for i := range ss {
		for k := range *fMsgs {
			m := agentLog(i, k, now)
			b := frameHdr(frames[i], 5+len(m), DATA, 0, 1)
			frames[i] = append(be32(append(b, 0), uint32(len(m))), m...)
		}
	}
	total := *fConns * *fMsgs
	meter := startMeter()
	err = each(ss, func(i int, s *rawStream) error { return s.send(frames[i], len(frames[i]) / *fMsgs) })
	o := meter.stop(out{"conns": *fConns, "msgs": *fMsgs, "size": *fSize})
	if err != nil {
		return o, err
	}
	size, err := verify(*fStdout, st.Size())
	if err != nil {
		return o, err
	}
	o["server_cpu_s"] = round(cpu(*fPID) - meter.srv)
	o["msgs_per_server_cpu_s"] = round(float64(total) / o["server_cpu_s"].(float64))
	o["server_cpu_us_per_msg"], o["client_cpu_us_per_msg"] = o.per("server_cpu_s", total), o.per("client_cpu_s", total)
	o["stdout_bytes_per_msg"] = round(float64(size) / float64(total))
	return o, each(ss, func(_ int, s *rawStream) error { return s.finish() })
}

// verifier looks for the messages of this run in a server's output, given piece by piece.
type verifier struct {
	marker []byte
	next   []int // the sequence number that each connection's next message must have
	left   int
	carry  []byte
}

// number reads digits up to stop.
func number(b []byte, stop byte) (v int, rest []byte, ok bool) {
	for i, c := range b {
		if c == stop {
			return v, b[i+1:], i > 0
		}
		if c < '0' || c > '9' || v > 1<<40 {
			break
		}
		v = v*10 + int(c-'0')
	}
	return 0, nil, false
}

// message checks the one that starts at d, which has room for all of it.
func (v *verifier) message(d []byte) error {
	conn, rest, ok := number(d[len(v.marker):], 's')
	seq, rest, ok2 := number(rest, ';')
	if !ok || !ok2 || conn >= len(v.next) {
		return fmt.Errorf("not a message of this run: %.80q", d)
	}
	if want := v.next[conn]; seq != want {
		return fmt.Errorf("connection %d: message %d stands where %d should", conn, seq, want)
	}
	head := len(d) - len(rest)
	tail := max(0, *fSize-head)
	if len(rest) < tail || bytes.Count(rest[:tail], []byte("x")) != tail {
		return fmt.Errorf("connection %d: message %d is damaged: %.200q", conn, seq, d)
	}
	v.next[conn]++
	v.left--
	return nil
}

func (v *verifier) take(b []byte) error {
	const longest = 64 // marker, numbers and what ends them
	d := append(v.carry, b...)
	for {
		i := bytes.Index(d, v.marker)
		if i < 0 {
			i = max(0, len(d)-len(v.marker)+1)
		} else if len(d)-i >= max(*fSize, longest)+1 { // one more: a message is never the last of the output
			if err := v.message(d[i:]); err != nil {
				return err
			}
			d = d[i+len(v.marker):]
			continue
		}
		v.carry = bytes.Clone(d[i:])
		return nil
	}
}

// verify scans the file from off on, and waits for late output as long as there is some; bytes seen.
func verify(path string, off int64) (size int64, err error) {
	v := verifier{marker: marker(), next: make([]int, *fConns), left: *fConns * *fMsgs}
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	patience := 10 * time.Second
	if *fMode == "verify" {
		patience = 0
	}
	for limit := time.Now().Add(patience); v.left > 0; {
		n, err := f.ReadAt(buf, off+size)
		if size += int64(n); n > 0 {
			limit = time.Now().Add(patience)
			if err := v.take(buf[:n]); err != nil {
				return size, err
			}
			continue
		}
		if time.Now().After(limit) {
			return size, fmt.Errorf("%d of %d messages are missing (%v)", v.left, len(v.next)**fMsgs, err)
		}
		time.Sleep(2 * time.Millisecond)
	}
	return size, nil
}

func verifyOnly() (out, error) {
	size, err := verify(*fStdout, 0)
	return out{"bytes": size}, err
}

// idle opens -conns streams and leaves them alone; then, if -n is set, makes that many connections beside them.
func idle() (out, error) {
	before := rssKiB(*fPID)
	meter := startMeter()
	ss, err := openAll()
	if err != nil {
		return nil, err
	}
	o := meter.stop(out{"conns": *fConns})
	o["setup_s"] = o["wall_s"]
	time.Sleep(time.Second) // what the connections brought about is over
	c, w := cpu(*fPID), switches(*fPID)
	time.Sleep(*fHold)
	o["idle_cpu_s"], o["idle_wakeups"] = round(cpu(*fPID)-c), switches(*fPID)-w
	after := rssKiB(*fPID)
	o["rss_kib"], o["rss_kib_per_conn"] = after, round(float64(after-before)/float64(*fConns))
	if *fN > 0 {
		l, err := latency()
		if err != nil {
			return o, err
		}
		o["server_cpu_us_per_conn"] = l["server_cpu_us_per_conn"]
	}
	return o, each(ss, func(_ int, s *rawStream) error { return s.alive() })
}

// fetch takes long manifests on -conns connections at once.
func fetch() (out, error) {
	meter := startMeter()
	var total atomic.Int64
	err := each(make([]*rawStream, *fConns), func(int, *rawStream) error {
		_, m, err := cycle()
		total.Add(int64(m.bytes))
		return err
	})
	o := meter.stop(out{"conns": *fConns, "bytes": total.Load()})
	o["bytes_per_server_cpu_s"] = round(float64(total.Load()) / o["server_cpu_s"].(float64))
	return o, err
}

// get fetches -file, a path at the server, by HTTP/1.1 on -conns connections at once.
func get() (out, error) {
	meter := startMeter()
	var total atomic.Int64
	var g errgroup.Group
	for range *fConns {
		g.Go(func() error {
			resp, err := (&http.Client{Transport: &http.Transport{}}).Get("http://" + *fAddr + *fFile)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, resp.Body, make([]byte, 256<<10))
			if err == nil && (resp.StatusCode != 200 || n != resp.ContentLength) {
				err = fmt.Errorf("%s, %d bytes of %d", resp.Status, n, resp.ContentLength)
			}
			total.Add(n)
			return err
		})
	}
	err := g.Wait()
	o := meter.stop(out{"conns": *fConns, "bytes": total.Load()})
	o["rss_kib"] = float64(status(fmt.Sprintf("/proc/%d/status", *fPID), "VmHWM"))
	o["bytes_per_server_cpu_s"] = round(float64(total.Load()) / o["server_cpu_s"].(float64))
	return o, err
}

// startup runs the command after the flags n times: milliseconds from fork to the first accepted connection and to the
// first health answer SERVING (by grpc-go), and resident memory 100 ms later.
func startup() (out, error) {
	var accept, serving, rss []float64
	for range *fN {
		err := start(flag.Args(), func(pid int, ms func() float64) error {
			addr, err := net.ResolveTCPAddr("tcp", *fAddr)
			if err != nil {
				return err
			}
			for !accepts(addr) {
				if ms() > 10e3 {
					return errors.New("the port does not open")
				}
				pause := syscall.Timespec{Nsec: 5000} // a client that spins may keep the program off its processor
				_ = syscall.Nanosleep(&pause, nil)
			}
			accept = append(accept, ms())
			if err := health(); err != nil {
				return err
			}
			serving = append(serving, ms())
			time.Sleep(100 * time.Millisecond)
			rss = append(rss, float64(rssKiB(pid)))
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	o := out{"n": *fN}
	quantiles(o, "accept_ms", accept)
	quantiles(o, "serving_ms", serving)
	quantiles(o, "rss_kib", rss)
	return o, nil
}

// start runs a program while f looks at it, then ends it.
func start(args []string, f func(pid int, ms func() float64) error) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	pid, err := syscall.ForkExec(args[0], args, &syscall.ProcAttr{Env: os.Environ(),
		Files: []uintptr{null.Fd(), null.Fd(), null.Fd()}})
	if err != nil {
		return err
	}
	t := time.Now() // ForkExec returns at the exec: its own cost is no part of the program's start
	err = f(pid, func() float64 { return float64(time.Since(t).Nanoseconds()) / 1e6 })
	_ = syscall.Kill(pid, syscall.SIGKILL)
	_, _ = syscall.Wait4(pid, nil, 0, nil)
	return err
}

// accepts makes one connection by plain system calls.
func accepts(to *net.TCPAddr) bool {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer syscall.Close(fd)
	sa := &syscall.SockaddrInet4{Port: to.Port}
	copy(sa.Addr[:], to.IP.To4())
	return syscall.Connect(fd, sa) == nil
}

func health() error {
	cc, err := dialGRPC()
	if err != nil {
		return err
	}
	defer cc.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var request, answer []byte
	err = cc.Invoke(ctx, "/grpc.health.v1.Health/Check", &request, &answer)
	if err == nil && !bytes.Equal(answer, []byte{8, 1}) {
		err = fmt.Errorf("not SERVING: %x", answer)
	}
	return err
}
