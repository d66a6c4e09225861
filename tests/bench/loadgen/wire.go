package main

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"time"
)

// ---- protobuf by hand ----

func uv(b []byte, v uint64) []byte {
	for v >= 0x80 {
		b = append(b, byte(v)|0x80)
		v >>= 7
	}
	return append(b, byte(v))
}

func lenField(b []byte, num int, s []byte) []byte {
	b = uv(b, uint64(num<<3|2))
	b = uv(b, uint64(len(s)))
	return append(b, s...)
}

// marker begins the text of every message of this run.
func marker() []byte { return fmt.Appendf(nil, "LG%dc", *fRun) }

// agentLog makes ClientStreamMessage{agent_log: {text, "1", "INFO", now}}; the text of *fSize bytes is
// "LG<run>c<conn>s<seq>;" and then x to its end.
func agentLog(conn, seq int, now time.Time) []byte {
	text := strconv.AppendInt(marker(), int64(conn), 10)
	text = append(strconv.AppendInt(append(text, 's'), int64(seq), 10), ';')
	text = append(text, bytes.Repeat([]byte("x"), max(0, *fSize-len(text)))...)
	ts := uv(append(uv([]byte{1 << 3}, uint64(now.Unix())), 2<<3), uint64(now.Nanosecond()))
	log := lenField(nil, 1, text)
	log = lenField(log, 2, []byte("1"))
	log = lenField(log, 3, []byte("INFO"))
	log = lenField(log, 4, ts)
	return lenField(nil, 1, log)
}

func rdUv(b []byte) (uint64, []byte, error) {
	var v uint64
	for i := 0; i < len(b) && i < 10; i++ {
		v |= uint64(b[i]&0x7f) << (7 * i)
		if b[i] < 0x80 {
			return v, b[i+1:], nil
		}
	}
	return 0, nil, errors.New("bad varint")
}

func rdField(b []byte) (num int, v uint64, s, rest []byte, err error) {
	t, b, err := rdUv(b)
	if err != nil {
		return
	}
	num = int(t >> 3)
	switch t & 7 {
	case 0:
		v, rest, err = rdUv(b)
	case 2:
		var n uint64
		n, b, err = rdUv(b)
		if err == nil && n > uint64(len(b)) {
			err = errors.New("short field")
		}
		if err == nil {
			s, rest = b[:n], b[n:]
		}
	default:
		err = fmt.Errorf("wire type %d", t&7)
	}
	return
}

// manifest takes ServerStreamMessage{runReqChunks} until is_last, and compares the data with -expect.
type manifest struct {
	bytes, chunks int
	done          bool
}

func (m *manifest) add(b []byte) error {
	num, _, s, rest, err := rdField(b)
	if err != nil || num != 1 || len(rest) > 0 {
		return fmt.Errorf("want one runReqChunks, got field %d and %d bytes more, %v", num, len(rest), err)
	}
	m.chunks++
	for len(s) > 0 {
		var v uint64
		var data []byte
		if num, v, data, s, err = rdField(s); err != nil {
			return err
		}
		switch num {
		case 1:
			if expect != nil && !bytes.HasPrefix(expect[min(m.bytes, len(expect)):], data) {
				return fmt.Errorf("the manifest's bytes from %d on are not those of -expect", m.bytes)
			}
			m.bytes += len(data)
		case 3:
			m.done = v != 0
		}
	}
	if m.done && expect != nil && m.bytes != len(expect) {
		return fmt.Errorf("a manifest of %d bytes, want %d", m.bytes, len(expect))
	}
	return nil
}

// ---- HTTP/2 by hand ----

// Frame types and flags (RFC 9113 6).
const (
	DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
	END_STREAM, ACK, END_HEADERS, PADDED                             = 1, 1, 4, 8
	INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE                              = 4, 5
)

func be32(b []byte, v uint32) []byte { return append(b, byte(v>>24), byte(v>>16), byte(v>>8), byte(v)) }

func frameHdr(b []byte, n int, typ, flags byte, id uint32) []byte {
	return be32(append(b, byte(n>>16), byte(n>>8), byte(n), typ, flags), id)
}

// lit appends a literal field without indexing, its name from the static table (idx) or as text.
func lit(b []byte, idx int, name, val string) []byte {
	switch {
	case idx == 0:
		b = append(append(b, 0, byte(len(name))), name...)
	case idx < 15:
		b = append(b, byte(idx))
	default:
		b = append(b, 0x0f, byte(idx-15))
	}
	return append(append(b, byte(len(val))), val...)
}

// hello is what opens a connection and its stream 1.
var hello []byte

// Windows for a fetch of long manifests: what grpc-go's own estimate comes to on a fast link, more or less.
const fetchWindow = 4 << 20

func makeHello() []byte {
	b := []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
	if *fMode == "fetch" {
		b = frameHdr(b, 6, SETTINGS, 0, 0)
		b = be32(append(b, 0, INITIAL_WINDOW_SIZE), fetchWindow)
		b = be32(frameHdr(b, 4, WINDOW_UPDATE, 0, 0), fetchWindow-65535)
	} else {
		b = frameHdr(b, 0, SETTINGS, 0, 0)
	}
	h := []byte{0x83, 0x86} // :method POST, :scheme http
	if tlsCfg != nil {
		h[1] = 0x87
	}
	h = lit(h, 4, "", "/cvms.Service/Process")
	h = lit(h, 1, "", *fAddr)
	h = lit(h, 31, "", "application/grpc")
	h = lit(h, 58, "", "loadgen-raw/1")
	h = lit(h, 0, "te", "trailers")
	return append(frameHdr(b, len(h), HEADERS, END_HEADERS, 1), h...)
}
