// Prints the SHA3-256 of the zip that archive/zip makes of each folder named as an argument.
package main

import (
	"archive/zip"
	"bufio"
	"crypto/sha3"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"time"
)

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
	hash := sha3.New256()
	out := bufio.NewWriterSize(hash, 1<<16)
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
	fmt.Printf("%x\n", hash.Sum(nil))
	return nil
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
