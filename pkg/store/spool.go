package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Spool keeps flow records that the collector does not have, in files of one directory. It has a bound, it is no part of the
// database, and nothing in it is needed to start: what is damaged is left out, and Read tells which numbers that was.
//
// A file is named by the first number in it and has what comes before the next file. What Append acknowledged survives a kill
// and a power loss. Append, Oldest and Trim belong to one goroutine, Read to another.
type Spool struct {
	dir     string // of one epoch: numbers of another mean other records
	budget  int64
	segment int64 // bytes at which a file is whole

	mu    sync.Mutex // never held over I/O
	files []spoolFile

	out  *os.File // the last of files, or nil: what an earlier process left is not added to
	read struct { // what was read last
		file    spoolFile
		entries []Spooled
	}
}

// Spooled is a record of the spool, or losses told in its place, under the numbers from First to Last.
type Spooled struct {
	First, Last uint64
	Data        []byte // nil: it cannot be read any more
}

type spoolFile struct {
	first, last uint64
	size        int64
}

const (
	minSegment, maxSegment = 64 << 10, 1 << 20
	minOnDisk              = 4096 // bytes that the smallest file takes
	spoolSuffix            = ".flow"

	// What the spool leaves free on the disk, for the store first of all: a tenth, and no more than it needs.
	leftFree = 64 << 20
)

// spoolMark begins an entry. No text holds it, as it is not UTF-8: an entry that is damaged does not make another out of what
// somebody had recorded.
var spoolMark = []byte{0xf1, 0xff, 0xfe, 0x0a}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// spoolHeader is the mark, the checksum of all that follows, the two numbers and the length of the data.
const spoolHeader = 4 + 4 + 8 + 8 + 4

// OpenSpool finds what an earlier process kept below dir in that epoch, and removes what is of another: no collector can be told
// of that. It makes nothing. A budget of zero bytes takes nothing more.
func OpenSpool(dir, epoch string, budget int64) (*Spool, error) {
	s := &Spool{dir: filepath.Join(dir, epoch), budget: budget, segment: min(max(budget/16, minSegment), maxSegment)}
	if err := s.find(); err != nil {
		return nil, fmt.Errorf("open spool %s: %w", s.dir, err)
	}
	others, _ := os.ReadDir(dir)
	for _, o := range others {
		if o.Name() != epoch {
			_ = os.RemoveAll(filepath.Join(dir, o.Name())) // tried again by the next process
		}
	}
	return s, nil
}

func (s *Spool) find() error {
	list, err := os.ReadDir(s.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range list { // they come by name, and so by number
		first, err := strconv.ParseUint(strings.TrimSuffix(e.Name(), spoolSuffix), 10, 64)
		if err != nil || e.Name() != fileName(first) {
			continue
		}
		st, err := e.Info()
		if err != nil {
			return err
		}
		if n := len(s.files); n > 0 {
			s.files[n-1].last = first - 1
		}
		s.files = append(s.files, spoolFile{first: first, size: st.Size()})
	}
	return s.findEnd()
}

// findEnd tells the last number: that of the last entry that is whole. What a kill tore stands behind it, and is nothing.
func (s *Spool) findEnd() error {
	for n := len(s.files); n > 0; n-- {
		f := &s.files[n-1]
		f.last = math.MaxUint64
		data, err := s.load(*f)
		if err != nil {
			return err
		}
		if entries := parseSpool(data, f.first, f.last); len(entries) > 0 {
			f.last = entries[len(entries)-1].Last
			return nil
		}
		_ = os.Remove(s.path(f.first)) // if not, the next file of that name takes its place
		s.files = s.files[:n-1]
	}
	return nil
}

func fileName(first uint64) string { return fmt.Sprintf("%020d%s", first, spoolSuffix) }

func (s *Spool) path(first uint64) string { return filepath.Join(s.dir, fileName(first)) }

// Range tells that numbers above from and up to to are kept; they are equal where none is.
func (s *Spool) Range() (from, to uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.files) == 0 {
		return 0, 0
	}
	return s.files[0].first - 1, s.files[len(s.files)-1].last
}

// Size is how many bytes it takes.
func (s *Spool) Size() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	var n int64
	for _, f := range s.files {
		n += max(f.size, minOnDisk)
	}
	return n
}

// Full tells whether the oldest have to go before there is room for more within the budget.
func (s *Spool) Full() bool { return s.Size() > max(0, s.budget-s.segment) }

// Append makes entries durable, as many as go into one file, and gives how many. Their numbers go on from those before. On an
// error none is kept. ErrFull says that the disk has no room to spare.
func (s *Spool) Append(entries []Spooled) (n int, err error) {
	n, err = s.append(entries)
	if err != nil {
		return 0, fmt.Errorf("spool flow records: %w", ofFile(err))
	}
	return n, nil
}

func (s *Spool) append(entries []Spooled) (int, error) {
	if s.budget == 0 || len(entries) == 0 {
		return 0, nil
	}
	if err := errors.Join(s.makeDir(), s.leavesRoom()); err != nil {
		return 0, err
	}
	f, err := s.open(entries[0].First)
	if err != nil {
		return 0, err
	}
	data, n := encodeSpool(entries, s.segment-f.size)
	_, err = s.out.Write(data)
	if err = errors.Join(err, s.out.Sync()); err == nil && f.size == 0 {
		err = syncDir(s.dir)
	}
	if err != nil {
		return 0, errors.Join(err, s.abandon(f))
	}
	s.added(spoolFile{first: f.first, last: entries[n-1].Last, size: f.size + int64(len(data))}, f.size == 0)
	return n, nil
}

// open gives the file that is added to: the last, or a new one that begins with first.
func (s *Spool) open(first uint64) (spoolFile, error) {
	if s.out != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.files[len(s.files)-1], nil
	}
	out, err := os.OpenFile(s.path(first), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	s.out = out
	return spoolFile{first: first}, err
}

func (s *Spool) makeDir() error {
	if _, err := os.Stat(s.dir); err == nil {
		return nil
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	parent := filepath.Dir(s.dir)
	return errors.Join(syncDir(parent), syncDir(filepath.Dir(parent)))
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// leavesRoom refuses what others need more.
func (s *Spool) leavesRoom() error {
	var disk unix.Statfs_t
	if err := unix.Statfs(s.dir, &disk); err != nil {
		return err
	}
	total, free := int64(disk.Blocks)*disk.Bsize, int64(disk.Bavail)*disk.Bsize
	if leave := min(total/10, leftFree); free < leave+s.segment {
		return fmt.Errorf("%w: %d bytes are free on the disk, and %d of them are left to the store", ErrFull, free, leave)
	}
	return nil
}

// abandon takes back what was added to f in vain. Where the disk does not allow it, the next file says where f ends.
func (s *Spool) abandon(f spoolFile) error {
	out := s.out
	s.out = nil
	if f.size == 0 {
		return errors.Join(out.Close(), os.Remove(out.Name()))
	}
	return errors.Join(out.Truncate(f.size), out.Close())
}

func (s *Spool) added(f spoolFile, anew bool) {
	s.mu.Lock()
	if anew {
		s.files = append(s.files, f)
	} else {
		s.files[len(s.files)-1] = f
	}
	s.mu.Unlock()
	if f.size >= s.segment {
		s.finish()
	}
}

// finish ends the last file; nothing of it waits to be written.
func (s *Spool) finish() {
	if s.out != nil {
		_ = s.out.Close()
		s.out = nil
	}
}

// Read gives up to limit entries above a number, in their order, and fewer where a file ends. It gives none if what comes next
// is not kept any more.
func (s *Spool) Read(after uint64, limit int) ([]Spooled, error) {
	f, ok := s.holding(after + 1)
	if !ok {
		return nil, nil
	}
	if s.read.file != f {
		entries, err := s.entries(f)
		if err != nil {
			return nil, fmt.Errorf("read spool: %w", err)
		}
		s.read.file, s.read.entries = f, entries
	}
	all := s.read.entries
	i := sort.Search(len(all), func(i int) bool { return all[i].Last > after })
	return all[i:min(i+limit, len(all))], nil
}

func (s *Spool) holding(n uint64) (spoolFile, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.files {
		if f.first <= n && n <= f.last {
			return f, true
		}
	}
	return spoolFile{}, false
}

// Oldest gives the entries that go first, when something has to: those of a whole file, for Trim to remove.
func (s *Spool) Oldest() ([]Spooled, error) {
	s.mu.Lock()
	if len(s.files) == 0 {
		s.mu.Unlock()
		return nil, nil
	}
	f := s.files[0]
	s.mu.Unlock()
	entries, err := s.entries(f)
	if err != nil {
		return nil, fmt.Errorf("read spool: %w", err)
	}
	return entries, nil
}

// entries gives every number of the file once. It has none if the file was trimmed in between.
func (s *Spool) entries(f spoolFile) ([]Spooled, error) {
	data, err := s.load(f)
	if err != nil {
		return nil, err
	}
	if _, ok := s.holding(f.last); !ok {
		return nil, nil
	}
	entries := parseSpool(data, f.first, f.last)
	next := f.first
	if n := len(entries); n > 0 {
		next = entries[n-1].Last + 1
	}
	if next <= f.last {
		entries = append(entries, Spooled{First: next, Last: f.last})
	}
	return entries, nil
}

// load reads what is known of the file. One that is not there, or that the disk cannot read, has nothing in it.
func (s *Spool) load(f spoolFile) ([]byte, error) {
	data, err := os.ReadFile(s.path(f.first))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EIO) {
		return nil, nil
	}
	return data[:min(int64(len(data)), f.size)], err
}

// Trim forgets numbers up to that one, by whole files.
func (s *Spool) Trim(upTo uint64) error {
	s.mu.Lock()
	n := sort.Search(len(s.files), func(i int) bool { return s.files[i].last > upTo })
	gone := slices.Clone(s.files[:n])
	s.files = slices.Delete(s.files, 0, n)
	empty := len(s.files) == 0
	s.mu.Unlock()
	if empty {
		s.finish()
	}
	var errs []error
	for _, f := range gone {
		if err := os.Remove(s.path(f.first)); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("trim spool: %w", ofFile(err))
	}
	return nil
}

// Close gives the files back. Nothing is lost by not calling it.
func (s *Spool) Close() { s.finish() }

// encodeSpool gives the bytes of the first entries that have room, at least of one.
func encodeSpool(entries []Spooled, room int64) (data []byte, n int) {
	for _, e := range entries {
		if n > 0 && int64(len(data)+spoolHeader+len(e.Data)) > room {
			break
		}
		data = appendSpooled(data, e)
		n++
	}
	return data, n
}

func appendSpooled(data []byte, e Spooled) []byte {
	at := len(data)
	data = append(data, spoolMark...)
	data = append(data, 0, 0, 0, 0)
	data = binary.LittleEndian.AppendUint64(data, e.First)
	data = binary.LittleEndian.AppendUint64(data, e.Last)
	data = binary.LittleEndian.AppendUint32(data, uint32(len(e.Data)))
	data = append(data, e.Data...)
	binary.LittleEndian.PutUint32(data[at+4:], crc32.Checksum(data[at+8:], castagnoli))
	return data
}

// parseSpool gives the entries of a file that has the numbers from first to last, and one without data for those between them
// that are missing. What is no entry, or has other numbers, is passed over.
func parseSpool(data []byte, first, last uint64) []Spooled {
	var out []Spooled
	for next := first; len(data) > 0; {
		e, size, ok := decodeSpooled(data)
		if !ok || e.First < next || e.Last > last {
			data = data[toMark(data):]
			continue
		}
		if e.First > next {
			out = append(out, Spooled{First: next, Last: e.First - 1})
		}
		out = append(out, e)
		next, data = e.Last+1, data[size:]
	}
	return out
}

// toMark is how far the next entry is, beyond what stands here.
func toMark(data []byte) int {
	if i := bytes.Index(data[1:], spoolMark); i >= 0 {
		return i + 1
	}
	return len(data)
}

func decodeSpooled(data []byte) (e Spooled, size int, ok bool) {
	if len(data) < spoolHeader || !bytes.HasPrefix(data, spoolMark) {
		return Spooled{}, 0, false
	}
	length := binary.LittleEndian.Uint32(data[24:])
	if uint64(length) > uint64(len(data)-spoolHeader) {
		return Spooled{}, 0, false
	}
	size = spoolHeader + int(length)
	if binary.LittleEndian.Uint32(data[4:]) != crc32.Checksum(data[8:size], castagnoli) {
		return Spooled{}, 0, false
	}
	e = Spooled{First: binary.LittleEndian.Uint64(data[8:]), Last: binary.LittleEndian.Uint64(data[16:]), Data: data[spoolHeader:size:size]}
	return e, size, e.First > 0 && e.First <= e.Last && e.Last < math.MaxUint64
}
