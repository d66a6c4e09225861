package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// rawStream is one connection with one Process stream.
type rawStream struct {
	c       net.Conn
	m       manifest
	rbuf    []byte // rbuf[r:w] is read but not used yet
	r, w    int
	grpcBuf []byte // of the manifest: a message that is not whole yet
	credit  int    // DATA bytes taken since the last WINDOW_UPDATE
	update  int    // send one from so many on

	wmu   sync.Mutex // one writer at a time
	mu    sync.Mutex // guards what follows
	cond  *sync.Cond // it has changed
	connW int64      // flow control: what may be sent
	strW  int64
	initW int64
	ended bool // by END_STREAM or RST_STREAM, or by err
	err   error
}

func openRaw(ctx context.Context) (*rawStream, error) {
	c, err := new(net.Dialer).DialContext(ctx, "tcp", *fAddr)
	if err != nil {
		return nil, err
	}
	if tlsCfg != nil {
		t := tls.Client(c, tlsCfg)
		if err := t.HandshakeContext(ctx); err != nil {
			c.Close()
			return nil, err
		}
		if t.ConnectionState().NegotiatedProtocol != "h2" {
			c.Close()
			return nil, errors.New("no ALPN h2")
		}
		c = t
	}
	s := &rawStream{c: c, connW: 65535, strW: 65535, initW: 65535, update: 16384, rbuf: make([]byte, 4096)}
	if *fMode == "fetch" {
		s.update, s.rbuf = fetchWindow/4, make([]byte, 256<<10)
	}
	s.cond = sync.NewCond(&s.mu)
	if err := s.write(hello); err != nil {
		c.Close()
		return nil, err
	}
	return s, nil
}

func (s *rawStream) close() { s.c.Close() }

func (s *rawStream) write(b []byte) error {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	_, err := s.c.Write(b)
	return err
}

// fill makes at least n bytes available in rbuf[r:w].
func (s *rawStream) fill(n int) error {
	if len(s.rbuf)-s.r < n {
		to := s.rbuf
		if n > len(to) {
			to = make([]byte, n+4096)
		}
		s.w = copy(to, s.rbuf[s.r:s.w])
		s.rbuf, s.r = to, 0
	}
	for s.w-s.r < n {
		k, err := s.c.Read(s.rbuf[s.w:])
		s.w += k
		if err != nil && s.w-s.r < n {
			return err
		}
	}
	return nil
}

// step reads one frame and does what it asks for.
func (s *rawStream) step() error {
	if err := s.fill(9); err != nil {
		return err
	}
	h := s.rbuf[s.r : s.r+9]
	n, typ, flags := int(h[0])<<16|int(h[1])<<8|int(h[2]), h[3], h[4]
	id := uint32(h[5]&0x7f)<<24 | uint32(h[6])<<16 | uint32(h[7])<<8 | uint32(h[8])
	if n > 16384 {
		return fmt.Errorf("frame of %d bytes", n)
	}
	s.r += 9
	if err := s.fill(n); err != nil {
		return err
	}
	p := s.rbuf[s.r : s.r+n]
	s.r += n
	if s.r == s.w {
		s.r, s.w = 0, 0
	}
	switch typ {
	case DATA:
		if err := s.data(p, flags); err != nil {
			return err
		}
	case RST_STREAM:
		s.end(fmt.Errorf("RST_STREAM %x", p))
	case SETTINGS:
		if flags&ACK == 0 {
			s.settings(p)
			return s.write(frameHdr(nil, 0, SETTINGS, ACK, 0))
		}
	case PING:
		if flags&ACK == 0 {
			return s.write(append(frameHdr(nil, 8, PING, ACK, 0), p...))
		}
	case GOAWAY:
		if n >= 8 && (p[4]|p[5]|p[6]|p[7]) != 0 {
			return fmt.Errorf("GOAWAY code %d %q", p[7], p[8:])
		}
	case WINDOW_UPDATE:
		v := int64(p[0]&0x7f)<<24 | int64(p[1])<<16 | int64(p[2])<<8 | int64(p[3])
		s.mu.Lock()
		if id == 0 {
			s.connW += v
		} else {
			s.strW += v
		}
		s.cond.Broadcast()
		s.mu.Unlock()
	}
	if (typ == DATA || typ == HEADERS) && flags&END_STREAM != 0 {
		s.end(nil)
	}
	return nil
}

func (s *rawStream) data(p []byte, flags byte) error {
	if flags&PADDED != 0 {
		return errors.New("padded DATA is not handled")
	}
	if s.credit += len(p); s.credit >= s.update {
		b := be32(frameHdr(nil, 4, WINDOW_UPDATE, 0, 0), uint32(s.credit))
		b = be32(frameHdr(b, 4, WINDOW_UPDATE, 0, 1), uint32(s.credit))
		s.credit = 0
		if err := s.write(b); err != nil {
			return err
		}
	}
	s.grpcBuf = append(s.grpcBuf, p...)
	for len(s.grpcBuf) >= 5 && !s.m.done {
		b := s.grpcBuf
		n := 5 + (int(b[1])<<24 | int(b[2])<<16 | int(b[3])<<8 | int(b[4]))
		if len(b) < n {
			break
		}
		if err := s.m.add(b[5:n]); err != nil {
			return err
		}
		s.grpcBuf = append(b[:0], b[n:]...)
	}
	if s.m.done {
		s.grpcBuf = nil
	}
	return nil
}

func (s *rawStream) settings(p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for ; len(p) >= 6; p = p[6:] {
		v := int64(p[2])<<24 | int64(p[3])<<16 | int64(p[4])<<8 | int64(p[5])
		if p[0] == 0 && p[1] == INITIAL_WINDOW_SIZE {
			s.strW += v - s.initW
			s.initW = v
		}
	}
	s.cond.Broadcast()
}

func (s *rawStream) end(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ended {
		s.ended, s.err = true, err
		s.cond.Broadcast()
	}
}

// recvManifest reads in the calling goroutine until the manifest is whole.
func (s *rawStream) recvManifest() (manifest, error) {
	_ = s.c.SetReadDeadline(time.Now().Add(*fTimeout))
	for !s.m.done {
		if err := s.step(); err != nil {
			return s.m, err
		}
		if s.alive() != nil {
			return s.m, fmt.Errorf("the stream ended before its manifest: %v", s.err)
		}
	}
	_ = s.c.SetReadDeadline(time.Time{})
	return s.m, nil
}

// startReader reads in a goroutine of its own from now on.
func (s *rawStream) startReader() {
	go func() {
		for {
			if err := s.step(); err != nil {
				s.end(err)
				return
			}
		}
	}()
}

// alive says why the stream is over, if it is.
func (s *rawStream) alive() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended && s.err == nil {
		return errors.New("the server ended the stream")
	}
	return s.err
}

// send writes DATA frames of `size` bytes each, up to 64 KiB at once, as the windows allow.
func (s *rawStream) send(frames []byte, size int) error {
	payload := int64(size - 9)
	for len(frames) > 0 {
		s.mu.Lock()
		for min(s.connW, s.strW) < payload && !s.ended {
			s.cond.Wait()
		}
		n := min(min(s.connW, s.strW)/payload, int64(65536/size), int64(len(frames)/size))
		s.connW -= n * payload
		s.strW -= n * payload
		s.mu.Unlock()
		if err := s.alive(); err != nil {
			return err
		}
		if err := s.write(frames[:int(n)*size]); err != nil {
			return err
		}
		frames = frames[int(n)*size:]
	}
	return nil
}

// finish half-closes and waits for the server's end of the stream.
func (s *rawStream) finish() error {
	if err := s.write(frameHdr(nil, 0, DATA, END_STREAM, 1)); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for !s.ended {
		s.cond.Wait()
	}
	return s.err
}
