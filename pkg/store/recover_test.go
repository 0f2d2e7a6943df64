package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// was is what a store held before it was damaged.
type was struct {
	epoch   string
	entries []Entry
	pending uint64 // numbers of entries that were not acknowledged
	grants  map[string]GrantRow
	used    []GrantRow
	said    []StatementRow
	notes   []Note
	flow    FlowState
}

// fillAll leaves a store in good order with rows in every table, and most tables on several pages.
func fillAll(t *testing.T, path string) was {
	t.Helper()
	s, ctx := openTest(t, path), t.Context()
	for i := range 30 {
		must(s.Append(ctx, fmt.Appendf(nil, "entry number %d with %0*d", i, 300+i*50, i)))(t)
	}
	must(s.AppendAll(ctx, []Item{{Data: []byte("seven lost"), Numbers: 7}, {Data: []byte("after them")}}))(t)
	for i := range 12 {
		g := testGrant(fmt.Sprintf("g%d", i))
		g.Envelope = fmt.Appendf(nil, "%01000d", i)
		if err := s.Activate(ctx, g, []byte("activated "+g.ID), Note{Name: "use/" + g.ID, Data: fmt.Appendf(nil, "%0900d", i)}); err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			if err := s.EndGrant(ctx, g.ID, StateRevoked, "", []byte("revoked "+g.ID)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for i := range 8 {
		said := testStatement(fmt.Sprintf("denied%d", i), StepDenied)
		said.Why = strings.Repeat("w", 700)
		if err := s.State(ctx, said, []byte("denied")); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(s.Keep(ctx, []Note{{"seal-key", []byte("of the epoch")}, {"acked/critical", []byte("of the epoch")}}), s.Ack(ctx, 6),
		s.SaveFlow(ctx, 40, 10, []Entry{{12, bytes.Repeat([]byte("x"), 3000)}, {30, bytes.Repeat([]byte("y"), 3000)}, {40, []byte("last")}})); err != nil {
		t.Fatal(err)
	}
	w := whatIs(t, s)
	if err := errors.Join(s.Close(), os.Remove(path+"-kept")); err != nil { // it takes time to copy
		t.Fatal(err)
	}
	return w
}

func whatIs(t *testing.T, s *Store) was {
	t.Helper()
	ctx := t.Context()
	last, acked, err := s.Seqs(ctx)
	if err != nil {
		t.Fatal(err)
	}
	w := was{epoch: s.Epoch(), entries: must(s.Entries(ctx, 0, 1<<20))(t), pending: last - acked, grants: map[string]GrantRow{},
		said: must(s.Statements(ctx))(t), notes: must(s.Notes(ctx, ""))(t), flow: must(s.Flow(ctx))(t)}
	for _, g := range must(s.Grants(ctx))(t) {
		w.grants[g.ID] = g
		w.used = append(w.used, g)
	}
	return w
}

// tell gives a record of what is lost, as an agent does, and an alarm.
func tell(r Recovered) (items []Item, err error) {
	if r.Lost > 0 {
		items = append(items, Item{Data: []byte("lost"), Numbers: r.Lost})
	}
	return append(items, Item{Data: []byte("alarm")}), nil
}

// damagedCopy puts changed bytes of a store, and its other files, in a directory of their own.
func damagedCopy(t *testing.T, path string, change func(db []byte) []byte) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "state")
	if err := os.CopyFS(dir, os.DirFS(filepath.Dir(path))); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	db := filepath.Join(dir, filepath.Base(path))
	if err := os.WriteFile(db, change(must(os.ReadFile(db))(t)), 0o600); err != nil {
		t.Fatal(err)
	}
	return db
}

// mended opens a store that may be damaged, and recovers it where it is. recovered is nil where it was not.
func mended(t *testing.T, path string) (s *Store, recovered *Recovered) {
	t.Helper()
	s, err := Open(path)
	if err == nil {
		t.Cleanup(func() { s.Close() })
		return s, nil
	}
	if !errors.Is(err, ErrDamaged) {
		t.Fatalf("opened: %v, want %v", err, ErrDamaged)
	}
	files := filesIn(t, filepath.Dir(path))
	r := must(Recover(path, tell))(t)
	now := filesIn(t, filepath.Dir(path))
	for name, data := range files {
		if kept := strings.Replace(name, filepath.Base(path), filepath.Base(r.File), 1); !bytes.Equal(now[kept], data) {
			t.Errorf("%s is not kept as it was, as %s", name, kept)
		}
	}
	return openTest(t, path), &r
}

func filesIn(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	for _, f := range must(os.ReadDir(dir))(t) {
		if strings.HasSuffix(f.Name(), "-kept") {
			continue
		}
		files[f.Name()] = must(os.ReadFile(filepath.Join(dir, f.Name())))(t)
	}
	return files
}

// survives holds a recovered store against what there was.
func (w was) survives(t *testing.T, s *Store, r Recovered) {
	t.Helper()
	ctx := t.Context()
	if s.Epoch() == w.epoch || s.Epoch() != r.Epoch || r.Before != "" && r.Before != w.epoch {
		t.Errorf("epoch %s after %s, recovered %+v", s.Epoch(), w.epoch, r)
	}
	if doubt := s.Memory().Doubt; !strings.Contains(doubt, r.File) {
		t.Errorf("doubt: %q", doubt)
	}
	last, acked, err := s.Seqs(ctx)
	if err != nil || acked != 0 || r.Unsure || last != w.pending+1 { // and the alarm
		t.Errorf("numbers up to %d, acknowledged %d, %v; there were %d; recovered %+v", last, acked, err, w.pending, r)
	}
	entries := must(s.Entries(ctx, 0, 1<<20))(t)
	if n := len(entries); n == 0 || string(entries[n-1].Data) != "alarm" {
		t.Fatalf("%d entries, and no alarm: %v", n, r)
	}
	entries = entries[:len(entries)-1]
	if r.Lost > 0 {
		entries = entries[:len(entries)-1]
	}
	if len(entries) != r.Entries {
		t.Errorf("%d entries, recovered %+v", len(entries), r)
	}
	rest := w.entries
	for _, e := range entries {
		i := slices.IndexFunc(rest, func(o Entry) bool { return bytes.Equal(o.Data, e.Data) })
		if i < 0 {
			t.Fatalf("entry %d is none that was, or not in its place: %.60q", e.Seq, e.Data)
		}
		rest = rest[i+1:]
	}
	for _, g := range must(s.Grants(ctx))(t) {
		if !reflect.DeepEqual(g, w.grants[g.ID]) {
			t.Errorf("grant %s is not what it was: %+v", g.ID, g)
		}
	}
	for _, said := range must(s.Statements(ctx))(t) {
		if !slices.ContainsFunc(w.said, func(o StatementRow) bool { return reflect.DeepEqual(o, said) }) {
			t.Errorf("statement that nobody made: %+v", said)
		}
	}
	for _, n := range must(s.Notes(ctx, ""))(t) {
		if ofEpoch(n.Name) || !slices.ContainsFunc(w.notes, func(o Note) bool { return reflect.DeepEqual(o, n) }) {
			t.Errorf("note that should not be: %+v", n)
		}
	}
	w.flowsSurvive(t, must(s.Flow(ctx))(t))
	w.nothingRevives(t, s)
}

func (w was) flowsSurvive(t *testing.T, flow FlowState) {
	t.Helper()
	if flow.Acked != 0 || flow.Produced != w.flow.Produced-w.flow.Acked {
		t.Errorf("flow numbers from %d to %d, were from %d to %d", flow.Acked, flow.Produced, w.flow.Acked, w.flow.Produced)
	}
	for _, e := range flow.Spool {
		if was := (Entry{e.Seq + w.flow.Acked, e.Data}); !slices.ContainsFunc(w.flow.Spool, func(o Entry) bool { return reflect.DeepEqual(o, was) }) {
			t.Errorf("spooled record %d is none that was", e.Seq)
		}
	}
}

// nothingRevives: what was used or denied is not to be used, and what ended has ended, before and after a further start.
func (w was) nothingRevives(t *testing.T, s *Store) {
	t.Helper()
	ctx := t.Context()
	path := s.path
	for range 2 {
		for _, g := range w.used {
			if err := s.Activate(ctx, g, nil); !errors.Is(err, ErrReplayed) && !errors.Is(err, ErrDoubt) {
				t.Errorf("grant %s can be used again: %v", g.ID, err)
			}
		}
		for _, said := range w.said {
			if err := s.Activate(ctx, testGrant(said.Grant), nil); !errors.Is(err, ErrFinal) && !errors.Is(err, ErrDoubt) {
				t.Errorf("grant %s can be used, which was denied: %v", said.Grant, err)
			}
		}
		for _, g := range must(s.ActiveGrants(ctx))(t) {
			if w.grants[g.ID].State != StateActive {
				t.Errorf("grant %s is active again", g.ID)
			}
		}
		s.Close()
		s = openTest(t, path)
	}
	s.Close()
}

// Whatever page is damaged, and in whatever way: nothing that was not written survives, the rest is counted to the unit, and
// nothing that is over begins again.
func TestRecoverPages(t *testing.T) {
	path := testPath(t)
	w := fillAll(t, path)
	size := int(must(os.Stat(path))(t).Size())
	ways := map[string]func(page []byte){ // each on half of the pages: the next run has the others
		"zeros": func(page []byte) { clear(page) },
		"garbage": func(page []byte) {
			rng := rand.New(rand.NewPCG(1, 2))
			for i := range page {
				page[i] = byte(rng.Uint32())
			}
		},
		"one bit": func(page []byte) { page[len(page)-9] ^= 4 },
		"counts":  func(page []byte) { page[3] ^= 0x10; page[4] ^= 1 },
	}
	full, sum := 0, Recovered{}
	for name, spoil := range ways {
		for at := rand.IntN(2) * pageSize; at < size; at += 2 * pageSize {
			s, r := mended(t, damagedCopy(t, path, func(db []byte) []byte { spoil(db[at : at+pageSize]); return db }))
			if r == nil {
				continue
			}
			w.survives(t, s, *r)
			if r.Lost == 0 {
				full++
			}
			sum.Entries, sum.Grants, sum.Statements, sum.Notes, sum.Flows = max(sum.Entries, r.Entries), max(sum.Grants, r.Grants), max(sum.Statements, r.Statements), max(sum.Notes, r.Notes), max(sum.Flows, r.Flows)
			if t.Failed() {
				t.Fatalf("%s in page %d of %d: %+v", name, at/pageSize, size/pageSize, r)
			}
		}
	}
	if want := (Recovered{Entries: len(w.entries), Grants: len(w.grants), Statements: len(w.said), Notes: len(w.notes) - 2, Flows: 3}); full == 0 || !reflect.DeepEqual(sum, want) {
		t.Errorf("at best %+v are taken over, want %+v; %d lost no entry", sum, want, full)
	}
}

// Every byte of the file's header, and bytes everywhere.
func TestRecoverFlippedBits(t *testing.T) {
	path := testPath(t)
	w := fillAll(t, path)
	size := int(must(os.Stat(path))(t).Size())
	rng := rand.New(rand.NewPCG(3, 4))
	var at []int
	for i := range 112 {
		at = append(at, i)
	}
	for range 100 {
		at = append(at, rng.IntN(size))
	}
	recovered := 0
	for _, i := range at {
		for _, bit := range []byte{1 << rng.IntN(8), 0xff} {
			s, r := mended(t, damagedCopy(t, path, func(db []byte) []byte { db[i] ^= bit; return db }))
			if r == nil {
				if now := whatIs(t, s); !reflect.DeepEqual(now, w) {
					t.Errorf("byte %d is damaged, and nobody noticed", i)
				}
				continue
			}
			recovered++
			if w.survives(t, s, *r); t.Failed() {
				t.Fatalf("byte %d: %+v", i, r)
			}
		}
	}
	t.Logf("%d of %d damaged bytes were found", recovered, 2*len(at))
}

// A file that is cut off anywhere, that is empty, that is gone, or that is something else.
func TestRecoverCutOff(t *testing.T) {
	path := testPath(t)
	w := fillAll(t, path)
	size := int(must(os.Stat(path))(t).Size())
	cuts := []int{0, 1, 99, 512, pageSize - 1, size - 1}
	for at := pageSize; at < size; at += pageSize {
		cuts = append(cuts, at)
	}
	for _, at := range cuts {
		s, r := mended(t, damagedCopy(t, path, func(db []byte) []byte { return db[:at] }))
		if r == nil {
			t.Fatalf("opened with %d of %d bytes", at, size)
		}
		if w.survives(t, s, *r); t.Failed() {
			t.Fatalf("%d of %d bytes: %+v", at, size, r)
		}
	}
	gone := damagedCopy(t, path, func(db []byte) []byte { return db })
	if err := os.Remove(gone); err != nil {
		t.Fatal(err)
	}
	s, r := mended(t, gone)
	w.survives(t, s, *r)
	s, r = mended(t, damagedCopy(t, path, func([]byte) []byte { return []byte("this is something else altogether, by the look of it") }))
	w.survives(t, s, *r)
}

// A log that lost its tail: what was acknowledged and is gone is counted to the unit, whatever the log still has.
func TestRecoverTornLog(t *testing.T) {
	path := testPath(t)
	openTest(t, path).Close() // the tables are in the file itself
	child := startChild(t, path, 1)
	child.waitLines(t, 60)
	l := newLedger()
	for _, line := range child.kill(t) {
		l.note(t, line)
	}
	wal := must(os.ReadFile(path + "-wal"))(t)
	found := 0
	for _, spoil := range []func([]byte) []byte{
		func(b []byte) []byte { return nil },
		func(b []byte) []byte { return b[:32] },
		func(b []byte) []byte { return b[:len(b)/2] },
		func(b []byte) []byte { return b[:len(b)*9/10] },
		func(b []byte) []byte { b[len(b)/3] ^= 1; return b },
		func(b []byte) []byte { b[20] ^= 1; return b },
	} {
		torn := filepath.Join(copyStore(t, path, len(wal)), "node.db")
		if err := os.WriteFile(torn+"-wal", spoil(bytes.Clone(wal)), 0o600); err != nil {
			t.Fatal(err)
		}
		count := must(os.ReadFile(torn + "-count"))(t)
		pending := binary.NativeEndian.Uint64(count[offSeq:]) - binary.NativeEndian.Uint64(count[offBase:])
		s, r := mended(t, torn)
		if r == nil {
			continue // the end of the log need not be in use
		}
		found++
		if log, err := os.ReadFile(r.File + "-wal"); err != nil || !bytes.Equal(log, spoil(bytes.Clone(wal))) {
			t.Errorf("the log is not kept as it was: %d bytes of %d, %v", len(log), len(wal), err)
		}
		if last, _, err := s.Seqs(t.Context()); err != nil || last != pending+1 || r.Unsure {
			t.Errorf("numbers up to %d, %v; %d were pending; %+v", last, err, pending, r)
		}
		if flow := must(s.Flow(t.Context()))(t); flow.Produced != l.flow {
			t.Errorf("flow numbers up to %d, there were %d", flow.Produced, l.flow)
		}
		for id := range l.active {
			if err := s.Activate(t.Context(), testGrant(id), nil); !errors.Is(err, ErrReplayed) && !errors.Is(err, ErrDoubt) && !errors.Is(err, ErrOther) {
				t.Errorf("grant %s can be used again: %v", id, err)
			}
		}
	}
	if found < 3 {
		t.Errorf("%d torn logs were found", found)
	}
}

// A header that SQLite does not read past leaves the log as it was.
func TestRecoverKeepsLogOfUnreadable(t *testing.T) {
	path := testPath(t)
	openTest(t, path).Close()
	child := startChild(t, path, 1)
	child.waitLines(t, 60)
	child.kill(t)
	wal := must(os.ReadFile(path + "-wal"))(t)
	for _, at := range []int{0, 16, 18, 20} {
		spoilt := filepath.Join(copyStore(t, path, len(wal)), "node.db")
		file := must(os.ReadFile(spoilt))(t)
		file[at] ^= 0xff
		if err := os.WriteFile(spoilt, file, 0o600); err != nil {
			t.Fatal(err)
		}
		_, r := mended(t, spoilt)
		if r == nil {
			continue // the log has a first page of its own
		}
		if log, err := os.ReadFile(r.File + "-wal"); err != nil || !bytes.Equal(log, wal) {
			t.Errorf("byte %d: the log is not kept as it was: %d bytes of %d, %v", at, len(log), len(wal), err)
		}
		if rest := must(filepath.Glob(spoilt + "-wal-seen*"))(t); rest != nil {
			t.Errorf("byte %d: %v is left", at, rest)
		}
	}
}

// After a power loss nobody knows where the numbers of a lost head ended: the loss is a bound. A whole head knows.
func TestRecoverAfterPowerLoss(t *testing.T) {
	path := testPath(t)
	w := fillAll(t, path)
	rebooted(t, path)
	for name, c := range map[string]struct {
		spoil  func([]byte) []byte
		unsure bool
	}{
		"head": {func(db []byte) []byte {
			return bytes.Replace(db, []byte(w.epoch), []byte("01ZZZZZZZZZZZZZZZZZZZZZZZZ"), 1)
		}, true},
		"entry": {func(db []byte) []byte {
			return bytes.Replace(db, []byte("entry number 20"), []byte("entry number 99"), 1)
		}, false},
	} {
		s, r := mended(t, damagedCopy(t, path, c.spoil))
		if r == nil || r.Unsure != c.unsure || r.Lost == 0 || c.unsure && r.Lost < maxPages*pageSize/leastEntry {
			t.Errorf("%s: recovered %+v", name, r)
		}
		if _, unsure, err := s.Unsettled(t.Context()); err != nil || unsure != c.unsure {
			t.Errorf("%s: the queue is unsure: %v, %v", name, unsure, err)
		}
	}
}

// The loss is where it is: entries before and after it stay, in their order, but for the one whose number it hides.
func TestRecoverAroundADamagedEntry(t *testing.T) {
	path := testPath(t)
	w := fillAll(t, path)
	s, r := mended(t, damagedCopy(t, path, func(db []byte) []byte {
		return bytes.Replace(db, []byte("entry number 20"), []byte("entry number 99"), 1)
	}))
	if r.Lost != 2 || r.Entries != len(w.entries)-2 || !slices.Equal(r.Broken, []string{"entries"}) || r.Grants != len(w.grants) {
		t.Errorf("recovered %+v", r)
	}
	w.survives(t, s, *r)
}

// What the queue had taken and not written is gone too, and counted.
func TestRecoverCountsTheQueue(t *testing.T) {
	path := testPath(t)
	s := openTest(t, path)
	must(s.AppendAll(t.Context(), []Item{{Data: []byte("a"), Queued: true}, {Data: []byte("b"), Queued: true}}))(t)
	s.CountQueued(7)
	s.Close()
	_, r := mended(t, damagedCopy(t, path, func([]byte) []byte { return nil }))
	if r.Lost != 7 || r.Unsure {
		t.Errorf("recovered %+v", r)
	}
}

// What the collector acknowledged is not lost, also where that was not durable yet when the store was damaged.
func TestRecoverKnowsWhatTheCollectorHas(t *testing.T) {
	path := testPath(t)
	s := openTest(t, path)
	if err := s.ReserveFlow(t.Context(), 100, 10); err != nil {
		t.Fatal(err)
	}
	s.CountFlow(70)
	s.CountFlowAcked(60)
	s.Close()
	s, _ = mended(t, damagedCopy(t, path, func([]byte) []byte { return nil }))
	if flow := must(s.Flow(t.Context()))(t); flow.Acked != 0 || flow.Produced != 10 {
		t.Errorf("flow numbers up to %d, of which the collector has %d; 10 are gone", flow.Produced, flow.Acked)
	}
}
