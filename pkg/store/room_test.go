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
