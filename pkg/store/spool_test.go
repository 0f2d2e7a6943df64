package store

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

const spoolEpoch = "01J00000000000000000000000"

func openSpool(t *testing.T, dir string, budget int64) *Spool {
	t.Helper()
	s := must(OpenSpool(dir, spoolEpoch, budget))(t)
	t.Cleanup(s.Close)
	return s
}

// spooledUpTo makes entries of the numbers from first on, some of which stand for several.
func spooledUpTo(first uint64, n int) (out []Spooled) {
	for range n {
		e := Spooled{First: first, Last: first + first%3/2}
		e.Data = []byte(fmt.Sprintf("%d to %d %s", e.First, e.Last, bytes.Repeat([]byte("x"), int(first%200))))
		out = append(out, e)
		first = e.Last + 1
	}
	return out
}

func appendSpool(t *testing.T, s *Spool, entries []Spooled) {
	t.Helper()
	for len(entries) > 0 {
		entries = entries[must(s.Append(entries))(t):]
	}
}

// readSpooled gives everything above a number, and holds that no number is missing or there twice.
func readSpooled(t *testing.T, s *Spool, after uint64) (out []Spooled) {
	t.Helper()
	for {
		got := must(s.Read(after, 7))(t)
		if len(got) == 0 {
			break
		}
		for _, e := range got {
			if first := max(e.First, after+1); first != after+1 || e.Last < first {
				t.Fatalf("%d to %d comes after %d", e.First, e.Last, after)
			}
			after = e.Last
			out = append(out, e)
		}
	}
	if _, to := s.Range(); after != to {
		t.Fatalf("read up to %d, kept up to %d", after, to)
	}
	return out
}

// sameSpooled counts the entries that cannot be read, and holds that the others are those of want.
func sameSpooled(t *testing.T, got, want []Spooled) (unread uint64) {
	t.Helper()
	written := map[uint64]Spooled{}
	for _, e := range want {
		written[e.First] = e
	}
	for _, e := range got {
		if e.Data == nil {
			unread += e.Last - e.First + 1
		} else if w := written[e.First]; w.Last != e.Last || !bytes.Equal(w.Data, e.Data) {
			t.Fatalf("%d to %d is %q, written was %q", e.First, e.Last, e.Data, w.Data)
		}
	}
	return unread
}

func spoolFiles(t *testing.T, dir string) []string {
	t.Helper()
	return must(filepath.Glob(filepath.Join(dir, spoolEpoch, "*")))(t)
}

func TestSpoolKeeps(t *testing.T) {
	dir := t.TempDir()
	s := openSpool(t, dir, 4<<20)
	all := spooledUpTo(1, 20000)
	for i := 0; i < len(all); i += 1000 {
		appendSpool(t, s, all[i:i+1000])
		if i == 9000 { // as after a kill
			s = openSpool(t, dir, 4<<20)
		}
	}
	if n := len(spoolFiles(t, dir)); n < 5 {
		t.Errorf("%d files", n)
	}
	for _, s := range []*Spool{s, openSpool(t, dir, 4<<20)} {
		if got := readSpooled(t, s, 0); len(got) != len(all) || sameSpooled(t, got, all) != 0 {
			t.Errorf("read %d of %d entries", len(got), len(all))
		}
		if got := readSpooled(t, s, all[12345].Last); len(got) != len(all)-12346 {
			t.Errorf("read %d entries from the middle", len(got))
		}
	}
	if err := s.Trim(all[15000].Last); err != nil {
		t.Fatal(err)
	}
	from, to := s.Range()
	if from == 0 || from > all[15000].Last || to != all[len(all)-1].Last {
		t.Errorf("kept are %d to %d", from, to)
	}
	if got := must(s.Read(from-1, 10))(t); len(got) != 0 {
		t.Errorf("read %v, which was removed", got)
	}
	if err := s.Trim(to); err != nil || s.Size() != 0 || len(spoolFiles(t, dir)) != 0 {
		t.Errorf("%v, %d bytes and the files %v are left", err, s.Size(), spoolFiles(t, dir))
	}
	appendSpool(t, s, spooledUpTo(to+1, 10))
	if got := readSpooled(t, s, to); len(got) != 10 {
		t.Errorf("read %d entries after it was empty", len(got))
	}
}

// A flipped bit takes the entry that it is in, and no other.
func TestSpoolFlippedBits(t *testing.T) {
	dir := t.TempDir()
	s := openSpool(t, dir, 1<<20)
	all := spooledUpTo(1, 16)
	appendSpool(t, s, all[:8])
	s.Close()
	appendSpool(t, s, all[8:])
	for _, name := range spoolFiles(t, dir) {
		whole := must(os.ReadFile(name))(t)
		for at := range whole {
			flipped := bytes.Clone(whole)
			flipped[at] ^= 1 << (at % 8)
			if err := os.WriteFile(name, flipped, 0o600); err != nil {
				t.Fatal(err)
			}
			s := openSpool(t, dir, 1<<20)
			_, to := s.Range()
			unread := sameSpooled(t, readSpooled(t, s, 0), all) + all[len(all)-1].Last - to // the last one is as torn
			if unread < 1 || unread > 2 {
				t.Fatalf("byte %d of %s flipped: %d numbers cannot be read", at, name, unread)
			}
		}
		if err := os.WriteFile(name, whole, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// Wherever a kill tears the end of a file: what is before it is kept, and the numbers go on.
func TestSpoolTornTail(t *testing.T) {
	dir := t.TempDir()
	all := spooledUpTo(1, 10)
	appendSpool(t, openSpool(t, dir, 1<<20), all)
	name := spoolFiles(t, dir)[0]
	whole := must(os.ReadFile(name))(t)
	for cut := range whole {
		if err := os.WriteFile(name, whole[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		s := openSpool(t, dir, 1<<20)
		_, to := s.Range()
		kept := 0
		for size := 0; kept < len(all); kept++ {
			if size += spoolHeader + len(all[kept].Data); size > cut {
				break
			}
		}
		if got := readSpooled(t, s, 0); len(got) != kept || sameSpooled(t, got, all) != 0 {
			t.Fatalf("cut at %d: %d entries are kept, want %d", cut, len(got), kept)
		}
		appendSpool(t, s, spooledUpTo(to+1, 5))
		again := openSpool(t, dir, 1<<20)
		if got := readSpooled(t, again, 0); len(got) != kept+5 || sameSpooled(t, got, append(all[:kept:kept], spooledUpTo(to+1, 5)...)) != 0 {
			t.Fatalf("cut at %d: %d entries after 5 more", cut, len(got))
		}
		if err := again.Trim(to + 100); err != nil {
			t.Fatal(err)
		}
	}
}

// A file that is gone or empty is a gap, and stands in nobody's way.
func TestSpoolFileGone(t *testing.T) {
	for name, harm := range map[string]func(string) error{"removed": os.Remove, "empty": func(name string) error { return os.Truncate(name, 0) }} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := openSpool(t, dir, 1<<20)
			all := spooledUpTo(1, 5000)
			appendSpool(t, s, all)
			files := spoolFiles(t, dir)
			if err := harm(files[len(files)/2]); err != nil {
				t.Fatal(err)
			}
			for _, s := range []*Spool{s, openSpool(t, dir, 1<<20)} {
				if unread := sameSpooled(t, readSpooled(t, s, 0), all); unread == 0 || unread > 2000 {
					t.Errorf("%d numbers cannot be read", unread)
				}
			}
		})
	}
}

// Text that somebody had recorded makes no entry of its own when the entry around it is damaged.
func TestSpoolForgedEntry(t *testing.T) {
	forged := appendSpooled(nil, Spooled{First: 2, Last: 2, Data: []byte("forged")})
	if text := bytes.ToValidUTF8(forged, nil); bytes.Contains(text, spoolMark) {
		t.Error("a text can hold the mark")
	}
}

// A full disk takes nothing, keeps what it has, and keeps room for others.
func TestSpoolFullDisk(t *testing.T) {
	d := &disk{t: t, dir: mountTmpfs(t, "2m")}
	dir := filepath.Join(d.dir, "flows")
	s := openSpool(t, dir, 1<<20) // the files are small
	var n, last int
	var err error
	all := spooledUpTo(1, 100000)
	for n < len(all) {
		if last, err = s.Append(all[n:]); err != nil {
			break
		}
		n += last
	}
	var free unix.Statfs_t
	if err := unix.Statfs(d.dir, &free); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(err, ErrFull) || n == 0 || int64(free.Bavail)*free.Bsize < 200<<10 {
		t.Errorf("%d entries, %v, %d blocks are left", n, err, free.Bavail)
	}
	d.fill()
	for range 3 {
		if _, err := s.Append(all[n:]); !errors.Is(err, ErrFull) {
			t.Errorf("a full disk: %v", err)
		}
	}
	for _, s := range []*Spool{s, openSpool(t, dir, 1<<20)} {
		if got := readSpooled(t, s, 0); len(got) != n || sameSpooled(t, got, all) != 0 {
			t.Errorf("read %d of %d entries", len(got), n)
		}
	}
	d.empty()
	if err := s.Trim(all[n-1].Last); err != nil {
		t.Fatal(err)
	}
	appendSpool(t, s, all[n:n+100])
	if got := readSpooled(t, s, all[n-1].Last); len(got) != 100 {
		t.Errorf("read %d entries", len(got))
	}
}

// A write that fails in the middle leaves nothing behind that counts.
func TestSpoolWriteFails(t *testing.T) {
	dir := t.TempDir()
	s := openSpool(t, dir, 1<<20)
	all := spooledUpTo(1, 300)
	rng := rand.New(rand.NewPCG(1, 1))
	var kept []Spooled
	for len(kept) < len(all) {
		n := min(1+rng.IntN(20), len(all)-len(kept))
		if s.out != nil && rng.IntN(3) == 0 { // a file that is open to be read takes nothing, as a disk with an error
			name := s.out.Name()
			s.out.Close()
			s.out = must(os.Open(name))(t)
			if _, err := s.Append(all[len(kept) : len(kept)+n]); err == nil {
				t.Fatal("written")
			}
			torn := must(os.OpenFile(name, os.O_APPEND|os.O_WRONLY, 0))(t)
			left, _ := encodeSpool(all[len(kept):len(kept)+n], 1<<20) // and is not taken back
			must(torn.Write(append(left, left[:spoolHeader/2]...)))(t)
			torn.Close()
			continue
		}
		kept = append(kept, all[len(kept):len(kept)+must(s.Append(all[len(kept):len(kept)+n]))(t)]...)
	}
	for _, s := range []*Spool{s, openSpool(t, dir, 1<<20)} {
		if got := readSpooled(t, s, 0); len(got) != len(all) || sameSpooled(t, got, all) != 0 {
			t.Errorf("read %d of %d entries", len(got), len(all))
		}
	}
}

// Numbers of another epoch are others' numbers.
func TestSpoolOfAnotherEpoch(t *testing.T) {
	dir := t.TempDir()
	appendSpool(t, openSpool(t, dir, 1<<20), spooledUpTo(1, 10))
	s := must(OpenSpool(dir, "01J00000000000000000000001", 1<<20))(t)
	if from, to := s.Range(); from != to || len(spoolFiles(t, dir)) != 0 {
		t.Errorf("kept are %d to %d, there are %v", from, to, spoolFiles(t, dir))
	}
}
