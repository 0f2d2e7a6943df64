package store

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"
)

func openTest(t *testing.T, path string) *Store {
	t.Helper()
	s, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func testPath(t *testing.T) string { return filepath.Join(t.TempDir(), "state", "node.db") }

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func TestModes(t *testing.T) {
	path := testPath(t)
	s := openTest(t, path)
	must(s.Append(t.Context(), []byte("x")))(t)
	files := must(os.ReadDir(filepath.Dir(path)))(t)
	if len(files) < 3 {
		t.Errorf("want database, log and count file, have %v", files)
	}
	for _, f := range files {
		if mode := must(f.Info())(t).Mode().Perm(); mode != 0o600 {
			t.Errorf("%s has mode %#o", f.Name(), mode)
		}
	}
	if mode := must(os.Stat(filepath.Dir(path)))(t).Mode().Perm(); mode != 0o700 {
		t.Errorf("directory has mode %#o", mode)
	}
}

func TestOpenRefuses(t *testing.T) {
	t.Run("directory open to others", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.Chmod(dir, 0o777); err != nil {
			t.Fatal(err)
		}
		if s, err := Open(filepath.Join(dir, "node.db")); err == nil {
			s.Close()
			t.Fatal("opened")
		}
	})
	t.Run("not a database", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "node.db")
		if err := os.WriteFile(path, []byte("this is something else altogether, by the look of it"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(path); !errors.Is(err, ErrDamaged) {
			t.Fatal(err)
		}
	})
	t.Run("later layout", func(t *testing.T) {
		path := testPath(t)
		s := openTest(t, path)
		must(s.db.Exec("CREATE TABLE later (one INTEGER); PRAGMA user_version = 99"))(t)
		s.Close()
		if _, err := Open(path); !errors.Is(err, ErrVersion) {
			t.Fatal(err)
		}
	})
	t.Run("in use", func(t *testing.T) {
		path := testPath(t)
		child := startChild(t, path, 1)
		child.waitLines(t, 1)
		if _, err := Open(path); !errors.Is(err, ErrInUse) {
			t.Fatal(err)
		}
		child.kill(t)
	})
}

func TestEntriesAndAck(t *testing.T) {
	path := testPath(t)
	s := openTest(t, path)
	ctx := t.Context()
	for i := range 10 {
		if seq := must(s.Append(ctx, fmt.Appendf(nil, "entry %d", i+1)))(t); seq != uint64(i+1) {
			t.Fatalf("entry %d has number %d", i+1, seq)
		}
	}
	if last := must(s.AppendAll(ctx, []Item{{Data: []byte("five lost"), Numbers: 5}, {}}))(t); last != 16 {
		t.Fatalf("last number is %d, want 16", last)
	}
	if err := s.Ack(ctx, 17, Note{"acked", []byte("17")}); !errors.Is(err, ErrAhead) {
		t.Fatalf("acknowledged what was never written: %v", err)
	}
	if notes := must(s.Notes(ctx, "acked"))(t); notes != nil {
		t.Errorf("a note was kept of what was refused: %q", notes)
	}
	for range 2 { // inside the five: up to 10 is gone, the five stay; and then there is nothing to remove
		if err := s.Ack(ctx, 13, Note{"acked", []byte("13")}); err != nil {
			t.Fatal(err)
		}
	}
	epoch := s.Epoch()
	s.Close()
	s = openTest(t, path)
	if s.Epoch() != epoch {
		t.Errorf("epoch changed from %s to %s", epoch, s.Epoch())
	}
	if notes, want := must(s.Notes(ctx, ""))(t), []Note{{"acked", []byte("13")}}; !reflect.DeepEqual(notes, want) {
		t.Errorf("notes are %q, want %q", notes, want)
	}
	got := must(s.Entries(ctx, 0, 100))(t)
	want := []Entry{{15, []byte("five lost")}, {16, nil}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("entries are %v, want %v", got, want)
	}
	if last, acked, err := s.Seqs(ctx); err != nil || last != 16 || acked != 10 {
		t.Errorf("numbers are %d, %d, %v", last, acked, err)
	}
	if got := must(s.Entries(ctx, 15, 1))(t); len(got) != 1 || got[0].Seq != 16 {
		t.Errorf("entries after 15: %v", got)
	}
}

func testGrant(id string) GrantRow {
	return GrantRow{
		ID: id, State: StateActive, Envelope: []byte(`{"payload":""}`), Payload: []byte(`{"id":"x"}`),
		Activated: time.Unix(1700000000, 5).UTC(), Deadline: time.Unix(1700000300, 7).UTC(), DeadlineBoot: 12345 * time.Second,
		NotAfter: time.Unix(1700003600, 0).UTC(), Keep: time.Unix(1800000000, 0).UTC(),
		BootID: "boot", Slots: []uint32{1, 7}, Signers: []string{"sp:1"}, People: []string{"alice"}, Kind: "breakGlass", Digest: "of " + id,
	}
}

func TestGrantLife(t *testing.T) {
	path := testPath(t)
	s := openTest(t, path)
	ctx := t.Context()
	want := testGrant("g1")
	if err := s.Activate(ctx, want, []byte("activated")); err != nil {
		t.Fatal(err)
	}
	if err := s.Activate(ctx, want, []byte("again")); !errors.Is(err, ErrReplayed) {
		t.Fatalf("second activation: %v", err)
	}
	other := want
	other.Digest = "of another"
	if err := s.Activate(ctx, other, []byte("another")); !errors.Is(err, ErrOther) || !strings.Contains(err.Error(), want.Digest) {
		t.Fatalf("activation of another by its id: %v", err)
	}
	if err := s.SetSlots(ctx, "g1", []uint32{9}); err != nil {
		t.Fatal(err)
	}
	if active := must(s.ActiveGrants(ctx))(t); len(active) != 1 || active[0].ID != "g1" {
		t.Errorf("active grants are %+v", active)
	}
	if err := s.EndGrant(ctx, "g1", StateRevoked, "by uid:0", []byte("revoked")); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		id   string
		want error
	}{{"g1", ErrEnded}, {"g2", ErrNoGrant}} {
		if err := s.EndGrant(ctx, c.id, StateExpired, "", []byte("no")); !errors.Is(err, c.want) {
			t.Errorf("end of %s: %v, want %v", c.id, err, c.want)
		}
	}
	if err := s.SetSlots(ctx, "g2", nil); !errors.Is(err, ErrNoGrant) {
		t.Errorf("slots of g2: %v", err)
	}
	s.Close()
	s = openTest(t, path)
	if active := must(s.ActiveGrants(ctx))(t); len(active) != 0 {
		t.Errorf("active grants are %+v", active)
	}
	want.State, want.Slots, want.EndedWhy = StateRevoked, []uint32{9}, "by uid:0"
	if got := must(s.Grants(ctx))(t); !reflect.DeepEqual(got, []GrantRow{want}) {
		t.Errorf("grants are %+v, want %+v", got, want)
	}
	if err := s.Activate(ctx, want, []byte("again")); !errors.Is(err, ErrReplayed) {
		t.Errorf("activation after restart: %v", err)
	}
	entries := must(s.Entries(ctx, 0, 10))(t)
	if len(entries) != 2 || string(entries[0].Data) != "activated" || string(entries[1].Data) != "revoked" {
		t.Errorf("entries are %v", entries)
	}
}

// One envelope handed in many times at once opens one path.
func TestActivateOnce(t *testing.T) {
	s := openTest(t, testPath(t))
	var wg sync.WaitGroup
	results := make(chan error, 32)
	for range cap(results) {
		wg.Go(func() { results <- s.Activate(t.Context(), testGrant("g"), []byte("event")) })
	}
	wg.Wait()
	close(results)
	accepted := 0
	for err := range results {
		if err == nil {
			accepted++
		} else if !errors.Is(err, ErrReplayed) {
			t.Error(err)
		}
	}
	if accepted != 1 {
		t.Errorf("accepted %d times", accepted)
	}
	if entries := must(s.Entries(t.Context(), 0, 100))(t); len(entries) != 1 {
		t.Errorf("%d entries", len(entries))
	}
}

// A full store refuses the grant, whole, and goes on when there is room again.
func TestFull(t *testing.T) {
	s := openTest(t, testPath(t))
	ctx := context.Background()
	must(s.db.Exec("PRAGMA max_page_count = 40"))(t)
	var last uint64
	var err error
	for err == nil {
		var seq uint64
		if seq, err = s.Append(ctx, make([]byte, 3000)); err == nil {
			last = seq
		}
	}
	if !errors.Is(err, ErrFull) {
		t.Fatal(err)
	}
	big := testGrant("g")
	big.Envelope = make([]byte, 20000)
	if err := s.Activate(ctx, big, []byte("event")); !errors.Is(err, ErrFull) {
		t.Fatalf("activation in a full store: %v", err)
	}
	if grants := must(s.Grants(ctx))(t); len(grants) != 0 {
		t.Fatalf("grants in a full store: %v", grants)
	}
	if got, _, err := s.Seqs(ctx); err != nil || got != last {
		t.Fatalf("last number %d, %v, want %d", got, err, last)
	}
	if err := s.Ack(ctx, last); err != nil {
		t.Fatal(err)
	}
	if err := s.Activate(ctx, big, []byte("event")); err != nil {
		t.Fatalf("activation after room was made: %v", err)
	}
}

// A flipped bit is found, or it changed nothing that we would read.
func TestFlippedBits(t *testing.T) {
	path := testPath(t)
	fill(t, path)
	want := content(t, openTest(t, path))
	whole := must(os.ReadFile(path))(t)
	count := must(os.ReadFile(path + "-count"))(t)
	rng := rand.New(rand.NewPCG(1, 2))
	found := 0
	for range 300 {
		damaged := append([]byte(nil), whole...)
		at := rng.IntN(len(damaged))
		damaged[at] ^= 1 << rng.IntN(8)
		dir := t.TempDir()
		p := filepath.Join(dir, "node.db")
		if err := errors.Join(os.WriteFile(p, damaged, 0o600), os.WriteFile(p+"-count", count, 0o600)); err != nil {
			t.Fatal(err)
		}
		s, err := Open(p)
		if err != nil {
			found++
			continue
		}
		if got := content(t, s); !reflect.DeepEqual(got, want) {
			t.Errorf("flip at %d of %d was returned as good data", at, len(damaged))
		}
		s.Close()
	}
	t.Logf("%d of 300 flips found, the others changed nothing", found)
	if found < 50 {
		t.Errorf("only %d flips were found", found)
	}
}

// Rows that are taken out, changed or swapped with the tools of the database are found.
func TestEdited(t *testing.T) {
	for name, edit := range map[string]string{
		"entry changed":       `UPDATE entries SET data = x'00' WHERE seq = 7`,
		"entry removed":       `DELETE FROM entries WHERE seq = 7`,
		"last entry removed":  `DELETE FROM entries WHERE seq = (SELECT max(seq) FROM entries)`,
		"all entries removed": `DELETE FROM entries`,
		"entries swapped":     `UPDATE entries SET seq = CASE seq WHEN 3 THEN 1004 ELSE 1003 END WHERE seq IN (3, 4)`,
		"used id removed":     `DELETE FROM replay WHERE id = 'g2'`,
		"last used id":        `DELETE FROM replay WHERE n = (SELECT max(n) FROM replay)`,
		"grant removed":       `DELETE FROM grants WHERE id = 'g2'`,
		"kept for shorter":    `UPDATE grants SET keep = 1 WHERE id = 'g2'`,
		"made by the node":    `UPDATE grants SET not_after = 0 WHERE id = 'g2'`,
		"floor taken away":    `UPDATE head SET forgotten = 1`,
		"deadline moved":      `UPDATE grants SET deadline_boot = deadline_boot + 1 WHERE id = 'g2'`,
		"state set back":      `UPDATE grants SET state = 'active' WHERE id = 'g0'`,
		"kind changed":        `UPDATE grants SET kind = '' WHERE id = 'g2'`,
		"people changed":      `UPDATE grants SET people = '[]' WHERE id = 'g2'`,
		"statement removed":   `DELETE FROM statements WHERE digest = 'of g7'`,
		"last statement":      `DELETE FROM statements WHERE n = (SELECT max(n) FROM statements)`,
		"statement changed":   `UPDATE statements SET step = 'reviewed' WHERE digest = 'of g7'`,
		"clock set back":      `UPDATE head SET latest = latest - 1`,
		"doubt taken away":    `UPDATE head SET doubt = doubt || '.'`,
		"spool changed":       `UPDATE spool SET data = x'00'`,
		"head set back":       `UPDATE head SET seq = seq - 1`,
	} {
		t.Run(name, func(t *testing.T) {
			path := testPath(t)
			fill(t, path)
			s := openTest(t, path)
			must(s.db.Exec(edit))(t)
			s.Close()
			if _, err := Open(path); !errors.Is(err, ErrDamaged) {
				t.Errorf("opened: %v", err)
			}
		})
	}
}

// A log that lost its tail takes acknowledged entries with it; the count file remembers them. What was not acknowledged yet
// when the process died may be missing.
func TestLostTail(t *testing.T) {
	path := testPath(t)
	openTest(t, path).Close() // the tables are in the file itself
	child := startChild(t, path, 1)
	child.waitLines(t, 40)
	l := newLedger()
	for _, line := range child.kill(t) {
		l.note(t, line)
	}
	wal := must(os.ReadFile(path + "-wal"))(t)
	for _, size := range []int{0, 32, len(wal) / 2, len(wal) * 9 / 10, len(wal) - 4096, len(wal)} {
		cut := filepath.Join(copyStore(t, path, size), "node.db")
		s, err := Open(cut)
		if errors.Is(err, ErrDamaged) && size < len(wal) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
		if l.check(t, cut); t.Failed() { // the end of the log need not be in use
			t.Fatalf("with %d of %d bytes of the log", size, len(wal))
		}
	}
}

// copyStore copies the files beside path and cuts the log.
func copyStore(t *testing.T, path string, logSize int) string {
	t.Helper()
	dir := t.TempDir()
	if err := errors.Join(os.CopyFS(dir, os.DirFS(filepath.Dir(path))), os.Truncate(filepath.Join(dir, "node.db-wal"), int64(logSize))); err != nil {
		t.Fatal(err)
	}
	return dir
}

// A database that is gone takes the used grants with it. That is no new epoch by itself.
func TestLostDatabase(t *testing.T) {
	path := testPath(t)
	fill(t, path)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path); !errors.Is(err, ErrDamaged) {
		t.Errorf("opened: %v", err)
	}
}

// What is acknowledged has been through fsync: no test that only kills processes would notice.
func TestSynchronous(t *testing.T) {
	s := openTest(t, testPath(t))
	for pragma, want := range map[string]string{"synchronous": "2", "journal_mode": "wal", "locking_mode": "exclusive"} {
		var got string
		if err := s.db.QueryRow("PRAGMA " + pragma).Scan(&got); err != nil || got != want {
			t.Errorf("%s is %s, %v; want %s", pragma, got, err, want)
		}
	}
}

func fill(t *testing.T, path string) {
	t.Helper()
	s := openTest(t, path)
	ctx := t.Context()
	for i := range 20 {
		must(s.Append(ctx, fmt.Appendf(nil, "entry number %d with %01500d", i, i)))(t)
	}
	for i := range 3 {
		if err := s.Activate(ctx, testGrant(fmt.Sprintf("g%d", i)), []byte("activated")); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.EndGrant(ctx, "g0", StateExpired, "", []byte("expired")); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"g7", "g8"} {
		if err := s.State(ctx, testStatement(id, StepDenied), []byte("denied")); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.SaveFlow(ctx, 12, 3, []Entry{{4, []byte("flow")}, {12, []byte("flow")}}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

type everything struct {
	Epoch   string
	Entries []Entry
	Grants  []GrantRow
	Said    []StatementRow
	Memory  Memory
	Flow    FlowState
}

func content(t *testing.T, s *Store) everything {
	t.Helper()
	ctx := t.Context()
	return everything{s.Epoch(), must(s.Entries(ctx, 0, 1000))(t), must(s.Grants(ctx))(t), must(s.Statements(ctx))(t), s.Memory(), must(s.Flow(ctx))(t)}
}
