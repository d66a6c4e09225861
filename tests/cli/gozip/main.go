// Writes the zip that archive/zip makes of each folder named as an argument to stdout, in pieces: 4 bytes of length,
// most significant first, then the bytes; a piece of length 0 ends a zip.
package main

import (
	"archive/zip"
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"time"
)

type pieces struct{}

func (pieces) Write(p []byte) (int, error) {
	if err := binary.Write(os.Stdout, binary.BigEndian, uint32(len(p))); err != nil {
		return 0, err
	}
	return os.Stdout.Write(p)
}

func main() {
	for _, root := range os.Args[1:] {
		if err := run(root); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
}

func run(root string) error {
	var names []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			names = append(names, path)
		}
		return err
	})
	if err != nil {
		return err
	}
	sort.Strings(names)
	out := bufio.NewWriterSize(pieces{}, 1<<20)
	archive := zip.NewWriter(out)
	for _, name := range names {
		if err := add(archive, root, name); err != nil {
			return err
		}
	}
	if err := archive.Close(); err != nil {
		return err
	}
	if err := out.Flush(); err != nil {
		return err
	}
	_, err = pieces{}.Write(nil)
	return err
}

func add(archive *zip.Writer, root, path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return err
	}
	header, err := zip.FileInfoHeader(info)
	if err != nil {
		return err
	}
	if header.Name, err = filepath.Rel(root, path); err != nil {
		return err
	}
	header.Method = zip.Store
	header.Modified = time.Unix(0, 0)
	to, err := archive.CreateHeader(header)
	if err == nil {
		_, err = io.CopyBuffer(to, file, make([]byte, 1<<20))
	}
	return err
}
