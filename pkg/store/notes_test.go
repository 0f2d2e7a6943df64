package store

import (
	"errors"
	"reflect"
	"strings"
	"testing"
)

func TestNotes(t *testing.T) {
	path := testPath(t)
	s := openTest(t, path)
	ctx := t.Context()
	keep := func(events int, notes ...Note) {
		t.Helper()
		if err := s.Keep(ctx, notes, [][]byte{[]byte("one"), []byte("two")}[:events]...); err != nil {
			t.Fatal(err)
		}
	}
	keep(1, Note{"used/b", []byte("1")}, Note{"used/a", []byte("2")}, Note{"usedness", []byte("3")})
	keep(2, Note{"used/b", []byte("4")}, Note{Name: "usedness"}, Note{Name: "never there"})
	s.Close()
	s = openTest(t, path)
	for prefix, want := range map[string][]Note{
		"used/": {{"used/a", []byte("2")}, {"used/b", []byte("4")}}, "": {{"used/a", []byte("2")}, {"used/b", []byte("4")}}, "used%": nil,
	} {
		if got := must(s.Notes(ctx, prefix))(t); !reflect.DeepEqual(got, want) {
			t.Errorf("notes of %q are %q, want %q", prefix, got, want)
		}
	}
	if last, _, err := s.Seqs(ctx); last != 3 || err != nil {
		t.Errorf("%d entries, %v; want 3", last, err)
	}
	if _, err := s.db.ExecContext(ctx, `UPDATE notes SET data = x'78' WHERE name = 'used/a'`); err != nil {
		t.Fatal(err)
	}
	s.Close()
	if _, err := Open(path); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "used/a") {
		t.Errorf("open with a changed note: %v", err)
	}
}

// TestEndGrants: several ends are one transaction; what ended before keeps its end.
func TestEndGrants(t *testing.T) {
	s := openTest(t, testPath(t))
	defer s.Close()
	ctx := t.Context()
	for _, id := range []string{"a", "b", "c"} {
		if err := s.Activate(ctx, testGrant(id), []byte("activated "+id)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.EndGrant(ctx, "b", StateExpired, "deadline", []byte("expired b")); err != nil {
		t.Fatal(err)
	}
	end := func(id string) End {
		return End{ID: id, State: StateRevoked, Why: "panic", Event: []byte("end of " + id), Note: Note{"use/" + id, []byte("much")}}
	}
	ends := []End{end("a"), end("b"), end("c")}
	if err := s.EndGrants(ctx, append(ends, End{ID: "nobody"})); !errors.Is(err, ErrNoGrant) {
		t.Errorf("an end of what never was: %v", err)
	}
	for _, g := range must(s.Grants(ctx))(t) {
		if (g.State == StateActive) != (g.ID != "b") {
			t.Errorf("after a failed transaction %s is %s", g.ID, g.State)
		}
	}
	if err := s.EndGrants(ctx, ends); err != nil {
		t.Fatal(err)
	}
	for _, g := range must(s.Grants(ctx))(t) {
		if want := map[string]string{"a": StateRevoked, "b": StateExpired, "c": StateRevoked}[g.ID]; g.State != want {
			t.Errorf("%s is %s, want %s", g.ID, g.State, want)
		}
	}
	if notes := must(s.Notes(ctx, "use/"))(t); len(notes) != 2 || notes[0].Name != "use/a" || notes[1].Name != "use/c" {
		t.Errorf("notes are %q", notes)
	}
	if last, _, err := s.Seqs(ctx); last != 6 || err != nil {
		t.Errorf("%d entries, %v; want 3 activations and 3 ends", last, err)
	}
}

// TestNotesOfActiveGrants: a note of a grant that has ended, or is forgotten, is not kept; the others are.
func TestNotesOfActiveGrants(t *testing.T) {
	s := openTest(t, testPath(t))
	defer s.Close()
	ctx := t.Context()
	for _, id := range []string{"a", "b"} {
		if err := s.Activate(ctx, testGrant(id), []byte("activated "+id)); err != nil {
			t.Fatal(err)
		}
	}
	end := End{ID: "b", State: StateRevoked, Event: []byte("end of b"), Note: Note{"use/b", []byte("last")}}
	if err := s.EndGrants(ctx, []End{end}); err != nil {
		t.Fatal(err)
	}
	late := map[string]Note{"a": {"use/a", []byte("some")}, "b": {"use/b", []byte("earlier")}, "c": {"use/c", []byte("none")}}
	if err := s.KeepOfActive(ctx, late); err != nil {
		t.Fatal(err)
	}
	want := []Note{{"use/a", []byte("some")}, {"use/b", []byte("last")}}
	if got := must(s.Notes(ctx, "use/"))(t); !reflect.DeepEqual(got, want) {
		t.Errorf("notes are %q, want %q", got, want)
	}
}
