package store

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Workloads and records fill their part and no more: people still begin, and whatever ends is recorded.
func TestRoomForPeople(t *testing.T) {
	path := mountTmpfs(t, "8m") + "/node.db"
	small := pages{most: 400, kept: 250}
	s, err := openSized(path, small)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	ctx, event := t.Context(), make([]byte, 300)
	var flood []End
	for {
		row := testGrant(fmt.Sprintf("%026d", len(flood)))
		row.Kind, row.NotAfter = "", time.Time{}
		if err = s.Activate(ctx, row, event); err != nil {
			break
		}
		flood = append(flood, End{ID: row.ID, State: StateExpired, Event: event})
	}
	if !errors.Is(err, ErrFull) || len(flood) < 100 {
		t.Fatalf("after %d grants: %v", len(flood), err)
	}
	for i := 0; err == nil || i == 0; i++ { // what is left of the part goes in small pieces
		_, err = s.Append(ctx, make([]byte, 10))
	}
	for what, err := range map[string]error{
		"record": err, "records of flows": func() error { _, err := s.AppendAll(ctx, []Item{{Data: event}, {Data: event}}); return err }(),
		"note": s.Keep(ctx, []Note{{"signal/x", make([]byte, 8000)}}, event),
	} {
		if !errors.Is(err, ErrFull) {
			t.Errorf("%s: %v, want %v", what, err, ErrFull)
		}
	}
	glass := testGrant("glass")
	for what, err := range map[string]error{
		"break-glass": s.Activate(ctx, glass, event), "statement": s.State(ctx, testStatement("other", StepDenied), event),
		"panic": s.KeepUrgent(ctx, []Note{{"panic", event}}, event), "vouch": s.Vouch(ctx, Owner{}, noon, noon, event),
		"time": s.See(ctx, noon.Add(time.Hour)), "numbers of flows": s.ReserveFlow(ctx, 1000, 0),
	} {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := s.EndGrants(ctx, append(flood, End{ID: "glass", State: StateRevoked, Event: event})); err != nil {
		t.Errorf("ends: %v", err)
	}
	s.Close()
	if s, err = openSized(path, small); err != nil {
		t.Fatal(err)
	}
	if active := must(s.ActiveGrants(ctx))(t); len(active) != 0 {
		t.Errorf("%d grants are active", len(active))
	}
	last, _, err := s.Seqs(ctx)
	if err = errors.Join(err, s.Ack(ctx, last)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Append(ctx, event); err != nil {
		t.Errorf("a record, when there is room again: %v", err)
	}
}

// On a disk that others have filled people still begin, and ends are recorded, also after a restart; nothing else is written
// until there is room again.
func TestRoomOnAFullDisk(t *testing.T) {
	d, ctx := newDisk(t, true), t.Context()
	kept := pages{most: maxPages, kept: keptPages, disk: 256 << 10}
	open := func() *Store {
		t.Helper()
		s := must(openSized(d.path, kept))(t)
		t.Cleanup(func() { s.Close() })
		return s
	}
	s := open()
	if err := s.Claim(ctx, Owner{Node: "a"}); err != nil {
		t.Fatal(err)
	}
	d.fill()
	check := func(when string, want error) {
		t.Helper()
		_, err := s.Append(ctx, make([]byte, 4000))
		if caught := s.CatchUp(ctx); !errors.Is(err, want) || !errors.Is(caught, want) {
			t.Errorf("%s: a record %v, catching up %v, want %v", when, err, caught, want)
		}
	}
	if _, err := s.Append(ctx, make([]byte, 9000)); !errors.Is(err, ErrFull) {
		t.Errorf("a record on a full disk: %v", err)
	}
	glass := testGrant("glass")
	glass.Activated = noon
	if err := errors.Join(s.Activate(ctx, glass, make([]byte, 9000)), s.EndGrant(ctx, at(noon).ID, StateRevoked, "", []byte("ended"))); err != nil {
		t.Fatal(err)
	}
	check("when people have begun", ErrFull)
	s.Close()
	s = open()
	check("after a restart", ErrFull)
	if err := s.EndGrant(ctx, "glass", StateRevoked, "", make([]byte, 9000)); err != nil {
		t.Error(err)
	}
	d.empty()
	check("when there is room again", nil)
	d.fill()
	if err := s.KeepUrgent(ctx, []Note{{"panic", make([]byte, 9000)}}); err != nil {
		t.Errorf("once more: %v", err)
	}
}

// limitFiles has no file of the process grow beyond size bytes, until the returned function is called.
func limitFiles(t *testing.T, size uint64) (lift func()) {
	t.Helper()
	var before unix.Rlimit
	signal.Ignore(unix.SIGXFSZ)
	if err := unix.Prlimit(0, unix.RLIMIT_FSIZE, nil, &before); err != nil {
		t.Fatal(err)
	}
	if err := unix.Prlimit(0, unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: size, Max: before.Max}, nil); err != nil {
		t.Fatal(err)
	}
	lift = func() {
		if err := unix.Prlimit(0, unix.RLIMIT_FSIZE, &before, nil); err != nil {
			t.Error(err)
		}
		signal.Reset(unix.SIGXFSZ)
	}
	t.Cleanup(lift)
	return lift
}

// A disk that never reserved the room is not taken for one whose reserve is in use, and has nothing of it left.
func TestNoRoomIsReserved(t *testing.T) {
	path, ctx := mountTmpfs(t, "8m")+"/node.db", t.Context()
	lift := limitFiles(t, 1<<20)
	start := func() []string {
		t.Helper()
		s := must(openSized(path, pages{most: maxPages, kept: keptPages, disk: 2 << 20}))(t)
		defer s.Close()
		if _, err := s.Append(ctx, []byte("record")); err != nil {
			t.Error(err)
		}
		return must(filepath.Glob(path + "-kept*"))(t)
	}
	for range 2 {
		if kept := start(); len(kept) != 0 {
			t.Errorf("left over: %v", kept)
		}
	}
	lift()
	start()
	if st, err := os.Stat(path + "-kept"); err != nil || st.Size() != 2<<20 {
		t.Errorf("when it can be reserved: %v, %v", st, err)
	}
}

// What is kept goes in parts: whoever takes what a write leaves of one does not have the next.
func TestRoomIsGivenInParts(t *testing.T) {
	d, ctx := &disk{t: t, dir: mountTmpfs(t, "4m")}, t.Context()
	s := must(openSized(d.dir+"/node.db", pages{most: maxPages, kept: keptPages, disk: 4 * thrownBytes}))(t)
	t.Cleanup(func() { s.Close() })
	written, event := 0, make([]byte, 100<<10)
	for err := error(nil); err == nil; written++ {
		d.fill()
		err = s.KeepUrgent(ctx, []Note{{"panic", event}}, event)
		if err != nil && !errors.Is(err, ErrFull) {
			t.Fatal(err)
		}
	}
	if written <= 4 {
		t.Errorf("%d writes found room in 4 parts", written-1)
	}
	d.empty()
	if _, err := s.Append(ctx, event); err != nil {
		t.Error(err)
	}
	if st := must(os.Stat(d.dir + "/node.db-kept"))(t); st.Size() != 4*thrownBytes {
		t.Errorf("%d bytes are kept when there is room again", st.Size())
	}
	d.fill()
	if err := s.KeepUrgent(ctx, []Note{{"panic", make([]byte, 2*thrownBytes)}}); err != nil {
		t.Errorf("what takes several parts: %v", err)
	}
}

// A quota refuses in other words than a full disk does, as this limit does: what is kept is tried all the same.
func TestRoomIsGivenToAQuota(t *testing.T) {
	path, ctx := mountTmpfs(t, "4m")+"/node.db", t.Context()
	s := must(openSized(path, pages{most: maxPages, kept: keptPages, disk: thrownBytes}))(t)
	t.Cleanup(func() { s.Close() })
	kept := func() int64 { t.Helper(); return must(os.Stat(path + "-kept"))(t).Size() }
	lift := limitFiles(t, 64<<10)
	if err := s.KeepUrgent(ctx, []Note{{"panic", make([]byte, 100<<10)}}); !errors.Is(err, ErrUnwritable) || kept() != 0 {
		t.Errorf("%v, and %d bytes are kept", err, kept())
	}
	lift()
	if err := errors.Join(s.CatchUp(ctx), s.KeepUrgent(ctx, []Note{{"panic", make([]byte, 100<<10)}})); err != nil || kept() != thrownBytes {
		t.Errorf("without the limit: %v, and %d bytes are kept", err, kept())
	}
}
