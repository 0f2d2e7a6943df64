package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// ballast is a file that does nothing but have room on the disk: urgent writes throw it off, a part at a time, when others have
// filled the rest, who may take what a write leaves of the part. Until it is whole again, nothing else is written.
type ballast struct {
	path   string
	size   int64 // bytes; 0: there is to be none
	thrown bool  // some of it
}

// find sees what an earlier process did with it.
func (b *ballast) find() error {
	st, err := os.Stat(b.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	b.thrown = err == nil && st.Size() < b.size
	return err
}

// throw makes room, if there is any to make.
func (b *ballast) throw() bool {
	st, err := os.Stat(b.path)
	if b.size == 0 || err != nil || st.Size() == 0 || os.Truncate(b.path, max(0, st.Size()-thrownBytes)) != nil {
		return false
	}
	b.thrown = true
	return true
}

// take takes it on, if the disk has twice the room. Where it never was, a disk without that room does without, as does one
// whose file system reserves none.
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
	var has int64
	if st, err := os.Stat(b.path); err == nil {
		has = st.Size()
	}
	if has >= b.size {
		return nil
	}
	var disk unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(b.path), &disk); err != nil {
		return err
	}
	if free, takes := int64(disk.Bavail)*disk.Bsize, max(2*b.size-has, b.size); free < takes {
		return fmt.Errorf("%d bytes are free, it takes %d", free, takes)
	}
	beside := b.path + ".new" // a file that never was whole is none
	f, err := os.OpenFile(beside, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(unix.Fallocate(int(f.Fd()), 0, 0, b.size), f.Close()); err != nil {
		return errors.Join(err, os.Remove(beside))
	}
	return os.Rename(beside, b.path)
}
