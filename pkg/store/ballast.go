package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// ballast is a file that does nothing but have room on the disk: urgent writes throw it off when others have filled the rest.
// Until it is taken on again, nothing else is written.
type ballast struct {
	path   string
	size   int64 // bytes; 0: there is to be none
	thrown bool
}

// find sees what an earlier process did with it.
func (b *ballast) find() error {
	st, err := os.Stat(b.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	b.thrown = err == nil && st.Size() == 0
	return err
}

// throw makes room, if there is any to make.
func (b *ballast) throw() bool {
	if b.size == 0 || b.thrown || os.Truncate(b.path, 0) != nil {
		return false
	}
	b.thrown = true
	return true
}

// take takes it on, if the disk has twice the room. Where it never was, a disk without that room does without.
func (b *ballast) take() error {
	if b.size == 0 {
		return nil
	}
	err := b.allocate()
	if err == nil {
		b.thrown = false
	}
	if !b.thrown {
		return nil
	}
	return fmt.Errorf("%w: the disk is, and what was kept for people is in use: %w", ErrFull, err)
}

func (b *ballast) allocate() error {
	if st, err := os.Stat(b.path); err == nil && st.Size() >= b.size {
		return nil
	}
	var disk unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(b.path), &disk); err != nil {
		return err
	}
	if free := int64(disk.Bavail) * disk.Bsize; free < 2*b.size {
		return fmt.Errorf("%d bytes are free, it takes %d", free, 2*b.size)
	}
	f, err := os.OpenFile(b.path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), 0, 0, b.size); err != nil {
		return errors.Join(err, f.Truncate(0))
	}
	return nil
}
