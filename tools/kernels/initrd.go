package main

import (
	"bufio"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// archive writes a root file system as the kernel reads it: cpio, "newc". Folders of a file come
// before it, by themselves.
type archive struct {
	w     *bufio.Writer
	dirs  map[string]bool
	inode int
}

func newArchive(w io.Writer) *archive {
	return &archive{w: bufio.NewWriterSize(w, 1<<20), dirs: map[string]bool{".": true, "/": true}}
}

func (a *archive) entry(name string, mode uint32, data []byte) error {
	a.inode++
	name = strings.TrimPrefix(name, "/")
	_, err := fmt.Fprintf(a.w, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		a.inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
	if err == nil {
		err = a.pad(110 + len(name) + 1)
	}
	if err == nil {
		_, err = a.w.Write(data)
	}
	if err == nil {
		err = a.pad(len(data))
	}
	if err != nil {
		return fmt.Errorf("write %s into initrd: %w", name, err)
	}
	return nil
}

func (a *archive) pad(written int) error {
	_, err := a.w.Write(make([]byte, (4-written%4)%4))
	return err
}

// dir makes a folder and those above it.
func (a *archive) dir(path string) error {
	path = filepath.Clean(path)
	if a.dirs[path] {
		return nil
	}
	a.dirs[path] = true
	return errors.Join(a.dir(filepath.Dir(path)), a.entry(path, 0o040755, nil))
}

func (a *archive) file(path string, mode fs.FileMode, data []byte) error {
	return errors.Join(a.dir(filepath.Dir(path)), a.entry(path, 0o100000|uint32(mode.Perm()), data))
}

// add copies a file of this machine.
func (a *archive) add(path, from string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return fmt.Errorf("read for initrd: %w", err)
	}
	info, err := os.Stat(from)
	if err != nil {
		return fmt.Errorf("read for initrd: %w", err)
	}
	return a.file(path, info.Mode(), data)
}

func (a *archive) close() error {
	return errors.Join(a.entry("TRAILER!!!", 0, nil), a.w.Flush())
}

// libraries are where Debian's linker looks.
var libraries = []string{"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/lib", "/usr/lib"}

// command copies a program of this machine with the libraries that it is linked to.
func (a *archive) command(path string, done map[string]bool) error {
	if done[path] {
		return nil
	}
	done[path] = true
	f, err := elf.Open(path)
	if err != nil {
		return fmt.Errorf("read program: %w", err)
	}
	defer f.Close()
	names, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("read libraries of %s: %w", path, err)
	}
	if p := f.Section(".interp"); p != nil {
		loader, err := p.Data()
		if err != nil {
			return fmt.Errorf("read loader of %s: %w", path, err)
		}
		if err := a.add(strings.TrimRight(string(loader), "\x00"), strings.TrimRight(string(loader), "\x00")); err != nil {
			return err
		}
	}
	for _, n := range names {
		i := slices.IndexFunc(libraries, func(dir string) bool { _, err := os.Stat(filepath.Join(dir, n)); return err == nil })
		if i < 0 {
			return fmt.Errorf("find library %s of %s: %w", n, path, fs.ErrNotExist)
		}
		if err := a.command(filepath.Join(libraries[i], n), done); err != nil {
			return err
		}
	}
	return a.add(path, path)
}
