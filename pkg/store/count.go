package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// countFile is one page, mapped shared: what is written to it is there for the next process, however
// this one ends. The page is written whole when it is made, so that a full disk cannot take it away. While a disk does not
// take the file, the page is in memory, and a kill loses it.
type countFile struct {
	mu     sync.Mutex
	page   []byte // nil after close
	mapped bool
}

const (
	countMagic = "SPLYCNT1"
	countSize  = 4096

	offEpoch  = 8
	offBoot   = 40
	offWrites = 128
	offFlow   = 136
	offQueued = 144

	// Where the head stood at the last write, for a store whose head is damaged. The collector may have been known to have more
	// of the flow class since.
	offSeq       = 152
	offBase      = 160
	offSettled   = 168 // of offQueued, in the store
	offFlowAcked = 176
)

// readCount says what the process before left: how many writes it saw acknowledged, and whether the
// counters are of this boot. A file of another epoch means that the database beside it was lost or
// exchanged, and used grants with it: ErrDamaged.
func readCount(path, epoch, boot string) (last uint64, exact bool, err error) {
	old, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, err
	}
	want := countHeader(epoch, boot)
	if len(old) != countSize || !bytes.Equal(old[:offBoot], want[:offBoot]) {
		return 0, false, fmt.Errorf("%w: %s belongs to another database; move it aside to begin a new epoch", ErrDamaged, path)
	}
	return binary.NativeEndian.Uint64(old[offWrites:]), bytes.Equal(old[offBoot:offWrites], want[offBoot:offWrites]), nil
}

func countHeader(epoch, boot string) []byte {
	page := make([]byte, countSize)
	copy(page, countMagic)
	copy(page[offEpoch:], epoch)
	copy(page[offBoot:], boot)
	return page
}

// countPage is what the counters are as far as the store knows.
func countPage(boot string, h head) []byte {
	page := countHeader(h.epoch, boot)
	binary.NativeEndian.PutUint64(page[offFlow:], h.flowReserved)
	binary.NativeEndian.PutUint64(page[offQueued:], h.queued)
	(&countFile{page: page}).follow(h)
	return page
}

// follow notes where a write that is durable left the head.
func (c *countFile) follow(h head) {
	for off, n := range map[int]uint64{offSeq: h.seq, offBase: h.baseSeq, offSettled: h.queued, offFlowAcked: h.flowAcked} {
		c.raise(off, n)
	}
	c.raise(offWrites, h.writes) // last: whoever believes in it believes in the others
}

// settle puts the page where the next process finds it, in place of what is there.
func (c *countFile) settle(path string) error {
	c.mu.Lock()
	page := bytes.Clone(c.page)
	c.mu.Unlock()
	if err := replaceFile(path, page); err != nil {
		return err
	}
	file, err := mapCount(path)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, off := range []int{offFlow, offQueued, offSeq, offBase, offSettled, offFlowAcked, offWrites} { // it was counted on
		file.raise(off, binary.NativeEndian.Uint64(c.page[off:]))
	}
	c.page, c.mapped = file.page, true
	return nil
}

func mapCount(path string) (*countFile, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	page, err := unix.Mmap(int(f.Fd()), 0, countSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", path, err)
	}
	return &countFile{page: page, mapped: true}, nil
}

// replaceFile writes beside the file and renames, so that a kill leaves the old file or the new one.
func replaceFile(path string, data []byte) error {
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// raise never goes back: calls may overtake each other. No file has nothing to raise.
func (c *countFile) raise(off int, v uint64) {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.page != nil && binary.NativeEndian.Uint64(c.page[off:]) < v {
		binary.NativeEndian.PutUint64(c.page[off:], v)
	}
}

func (c *countFile) load(off int) uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.page == nil {
		return 0
	}
	return binary.NativeEndian.Uint64(c.page[off:])
}

func (c *countFile) close() error {
	if c == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.page == nil {
		return nil
	}
	var err error
	if c.mapped {
		err = errors.Join(unix.Msync(c.page, unix.MS_SYNC), unix.Munmap(c.page))
	}
	c.page = nil
	return err
}

// CountFlow notes that flow numbers up to n are given out. It does no I/O; what it notes survives a
// kill of the process, but not a power loss. After Close it does nothing.
func (s *Store) CountFlow(n uint64) { s.count.raise(offFlow, n) }

// CountFlowAcked notes that the collector has flow numbers up to n, for a store that is damaged before that is durable: they are not
// lost then. Like CountFlow it survives a kill of the process.
func (s *Store) CountFlowAcked(n uint64) { s.count.raise(offFlowAcked, n) }

// CountQueued notes that n entries were ever taken into a queue for AppendAll in this epoch. Like
// CountFlow it survives a kill of the process.
func (s *Store) CountQueued(n uint64) { s.count.raise(offQueued, n) }
