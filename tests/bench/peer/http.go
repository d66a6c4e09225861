package main

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
)

var serve = flag.String("serve", "", "a file that is served over HTTP instead, as /plain and as /sealed")

const piece = 1 << 20

// sealed encrypts the file anew for each request, piece by piece, each with a nonce and tag of its own: Go's library has
// no AES-GCM for a stream.
func sealed(w http.ResponseWriter, _ *http.Request) {
	f, err := os.Open(*serve)
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	defer f.Close()
	st, _ := f.Stat()
	block, _ := aes.NewCipher(make([]byte, 32))
	gcm, _ := cipher.NewGCM(block)
	buf, nonce := make([]byte, piece, piece+gcm.Overhead()), make([]byte, gcm.NonceSize())
	pieces := (st.Size() + piece - 1) / piece
	w.Header().Set("Content-Length", fmt.Sprint(st.Size()+pieces*int64(gcm.Overhead())))
	for i := uint64(0); ; i++ {
		n, _ := io.ReadFull(f, buf[:piece])
		if n == 0 {
			return
		}
		binary.BigEndian.PutUint64(nonce, i)
		if _, err := w.Write(gcm.Seal(buf[:0], nonce, buf[:n], nil)); err != nil {
			return
		}
	}
}

func files() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/plain", func(w http.ResponseWriter, r *http.Request) { http.ServeFile(w, r, *serve) })
	mux.HandleFunc("/sealed", sealed)
	return mux
}
