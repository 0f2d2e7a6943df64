package store

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var noon = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

func at(t time.Time) GrantRow {
	row := testGrant("g" + t.Format(time.RFC3339Nano))
	row.Activated = t
	return row
}

// The latest time is durable, never goes back by itself, and holds activations up.
func TestClockMark(t *testing.T) {
	path := testPath(t)
	s := openTest(t, path)
	ctx := t.Context()
	if err := s.See(ctx, noon); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		now  time.Time
		want error
	}{
		{noon.Add(-ClockBound), nil}, {noon.Add(-ClockBound - 1), ErrClockBehind}, {noon.Add(-time.Hour), ErrClockBehind},
		{noon.Add(time.Hour), nil}, {noon, ErrClockBehind}, {noon.Add(time.Hour), ErrReplayed},
	} {
		s.Close()
		s = openTest(t, path)
		if err := s.Activate(ctx, at(c.now), []byte("event")); !errors.Is(err, c.want) {
			t.Errorf("activation at %s: %v, want %v", c.now, err, c.want)
		}
	}
	if err := s.See(ctx, noon); !errors.Is(err, ErrClockBehind) {
		t.Errorf("seen an hour back: %v", err)
	}
	if got := s.Memory(); got != (Memory{Latest: noon.Add(time.Hour)}) {
		t.Errorf("memory is %+v", got)
	}
	if err := s.Vouch(ctx, Owner{Node: "a"}, noon, noon, []byte("vouched")); err != nil {
		t.Fatal(err)
	}
	if err := s.Activate(ctx, at(noon), []byte("event")); err != nil {
		t.Errorf("after somebody vouched for the clock: %v", err)
	}
	if entries := must(s.Entries(ctx, 0, 10))(t); len(entries) != 4 || string(entries[2].Data) != "vouched" {
		t.Errorf("entries: %v", entries)
	}
	if got := s.Memory(); !got.Floor.IsZero() {
		t.Errorf("a clock that was wrong took nothing from the memory: floor %s", got.Floor)
	}
}

// A store that comes from elsewhere, or from before, activates nothing until somebody vouches for it.
func TestDoubt(t *testing.T) {
	home := Owner{Node: "a", Machine: "1"}
	for _, c := range []struct {
		name   string
		second Owner
		change func(t *testing.T, dir string)
		says   string
	}{
		{name: "the same", second: home},
		{name: "the machine is not known", second: Owner{Node: "a"}},
		{name: "another node", second: Owner{Node: "b", Machine: "1"}, says: `by the node "a"`},
		{name: "another machine", second: Owner{Node: "a", Machine: "2"}, says: "on the machine 1"},
		{name: "restored from before", second: home, says: "older than it was", change: func(t *testing.T, dir string) {
			replaceDir(t, dir, dir+".before")
		}},
		{name: "lost", second: home, says: "another store was in its place", change: func(t *testing.T, dir string) {
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "restored from before, and rebooted", second: home, change: func(t *testing.T, dir string) {
			replaceDir(t, dir, dir+".before")
			rebootedWitness(t, filepath.Dir(dir)+"/witness")
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := testPath(t)
			dir := filepath.Dir(path)
			home.Witness, c.second.Witness = filepath.Dir(dir)+"/witness", filepath.Dir(dir)+"/witness"
			ctx := t.Context()
			s := openTest(t, path)
			if err := errors.Join(s.Claim(ctx, home), s.Close(), os.CopyFS(dir+".before", os.DirFS(dir))); err != nil {
				t.Fatal(err)
			}
			s = openTest(t, path)
			if err := errors.Join(s.Claim(ctx, home), s.Activate(ctx, at(noon), nil), s.Close()); err != nil {
				t.Fatal(err)
			}
			if c.change != nil {
				c.change(t, dir)
			}
			for range 2 { // a doubt stays
				s = openTest(t, path)
				if err := s.Claim(ctx, c.second); err != nil {
					t.Fatal(err)
				}
				if got := s.Memory().Doubt; (got != "") != (c.says != "") || !strings.Contains(got, c.says) {
					t.Fatalf("doubt %q, want %q", got, c.says)
				}
				if err := s.Activate(ctx, at(noon.Add(time.Second)), nil); c.says != "" && !errors.Is(err, ErrDoubt) {
					t.Fatalf("activation in doubt: %v", err)
				}
				s.Close()
			}
			s = openTest(t, path)
			if err := errors.Join(s.Claim(ctx, c.second), s.Vouch(ctx, c.second, noon, noon.Add(time.Minute), nil), s.Close()); err != nil {
				t.Fatal(err)
			}
			s = openTest(t, path)
			if err := s.Claim(ctx, c.second); err != nil {
				t.Fatal(err)
			}
			want := Memory{Latest: noon}
			if c.says != "" {
				want.Floor = noon.Add(time.Minute)
			}
			if got := s.Memory(); got != want {
				t.Errorf("after somebody vouched: %+v, want %+v", got, want)
			}
		})
	}
}

// Who vouches is believed from then on, also while the witness cannot follow.
func TestVouchWithoutAWitness(t *testing.T) {
	path, ctx := testPath(t), t.Context()
	run := &disk{t: t, dir: mountTmpfs(t, "1m")}
	home := Owner{Node: "a", Witness: run.dir + "/witness"}
	s := openTest(t, path)
	if err := errors.Join(s.Claim(ctx, home), s.Close(), os.RemoveAll(filepath.Dir(path))); err != nil {
		t.Fatal(err)
	}
	run.remount(unix.MS_RDONLY)
	s = openTest(t, path)
	if err := s.Claim(ctx, home); err != nil || s.Memory().Doubt == "" {
		t.Fatalf("another store in its place: %v, doubt %q", err, s.Memory().Doubt)
	}
	if err := s.Vouch(ctx, home, noon, noon, nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Activate(ctx, at(noon.Add(time.Second)), nil); err != nil || s.Memory().Doubt != "" {
		t.Errorf("after somebody vouched: %v, doubt %q", err, s.Memory().Doubt)
	}
	if err := s.CatchUp(ctx); !errors.Is(err, ErrUnwritable) {
		t.Errorf("nobody is told of the witness: %v", err)
	}
	run.remount(0)
	if err := errors.Join(s.CatchUp(ctx), s.Activate(ctx, at(noon.Add(2*time.Second)), nil), s.Close()); err != nil {
		t.Fatal(err)
	}
	if w := must(readWitness(home.Witness, s.BootID()))(t); w.against(head{epoch: s.Epoch()}) == "" {
		t.Error("the witness does not follow") // it knows of more than none
	}
	s = openTest(t, path)
	if err := s.Claim(ctx, home); err != nil || s.Memory().Doubt != "" {
		t.Errorf("at the next start: %v, doubt %q", err, s.Memory().Doubt)
	}
}

func replaceDir(t *testing.T, dir, by string) {
	t.Helper()
	if err := errors.Join(os.RemoveAll(dir), os.CopyFS(dir, os.DirFS(by)), os.Chmod(dir, 0o700)); err != nil {
		t.Fatal(err)
	}
}

func rebootedWitness(t *testing.T, path string) {
	t.Helper()
	page := must(os.ReadFile(path))(t)
	copy(page[offBoot:], "00000000-0000-0000-0000-000000000000")
	if err := os.WriteFile(path, page, 0o600); err != nil {
		t.Fatal(err)
	}
}

func testStatement(grant, step string) StatementRow {
	return StatementRow{Digest: "of " + grant, Step: step, Grant: grant, By: "bob", At: noon, Why: "not tonight", Envelope: []byte("signed")}
}

// What was said stays said: a withdrawn or denied grant is never activated, a review changes nothing.
func TestStatements(t *testing.T) {
	path := testPath(t)
	s := openTest(t, path)
	ctx := t.Context()
	var want []StatementRow
	for grant, step := range map[string]string{"g1": StepWithdrawn, "g2": StepDenied, "g3": StepReviewed} {
		row := testStatement(grant, step)
		want = append(want, row)
		if err := s.State(ctx, row, []byte(step)); err != nil {
			t.Fatal(err)
		}
		if err := s.State(ctx, row, []byte("again")); !errors.Is(err, ErrStated) {
			t.Errorf("said again: %v", err)
		}
	}
	for range 2 {
		for _, id := range []string{"g1", "g2"} {
			if err := s.Activate(ctx, testGrant(id), []byte("activated")); !errors.Is(err, ErrFinal) || !strings.Contains(err.Error(), "by bob") {
				t.Errorf("%s: %v", id, err)
			}
		}
		s.Close()
		s = openTest(t, path)
		if got := must(s.Statements(ctx))(t); !reflect.DeepEqual(got, want) {
			t.Errorf("said %+v, want %+v", got, want)
		}
	}
	if err := s.Activate(ctx, testGrant("g3"), []byte("activated")); err != nil {
		t.Errorf("a review is in the way: %v", err)
	}
	if entries := must(s.Entries(ctx, 0, 100))(t); len(entries) != 4 {
		t.Errorf("%d entries, want one for each statement and the activation", len(entries))
	}
}
