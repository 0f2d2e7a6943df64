package store

import (
	"errors"
	"fmt"
	"testing"
	"time"
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
