package store

import (
	"errors"
	"fmt"
	"os"
	"reflect"
	"testing"
)

// rebooted makes the count file look as if it were of another boot.
func rebooted(t *testing.T, path string) {
	t.Helper()
	page := must(os.ReadFile(path + "-count"))(t)
	copy(page[offBoot:], "00000000-0000-0000-0000-000000000000")
	if err := os.WriteFile(path+"-count", page, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestFlowNumbers(t *testing.T) {
	stop := func(t *testing.T, s *Store) {
		if err := s.SaveFlow(t.Context(), 70, 10, []Entry{{11, []byte("a")}, {70, []byte("59 lost")}}, Note{"acked", []byte("10")}); err != nil {
			t.Fatal(err)
		}
	}
	kill := func(*testing.T, *Store) {}
	for _, c := range []struct {
		name   string
		end    func(*testing.T, *Store)
		reboot bool
		want   FlowState
	}{
		{"stopped", stop, false, FlowState{Acked: 10, Produced: 70, Spool: []Entry{{11, []byte("a")}, {70, []byte("59 lost")}}}},
		{"stopped, rebooted", stop, true, FlowState{Acked: 10, Produced: 70, Spool: []Entry{{11, []byte("a")}, {70, []byte("59 lost")}}}},
		{"killed", kill, false, FlowState{Acked: 5, Produced: 70}},
		{"power lost", kill, true, FlowState{Acked: 5, Produced: 1000, Unsure: 1000}},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := testPath(t)
			s := openTest(t, path)
			if err := s.ReserveFlow(t.Context(), 1000, 5, Note{"acked", []byte("5")}); err != nil {
				t.Fatal(err)
			}
			s.CountFlow(70)
			c.end(t, s)
			s.Close()
			if c.reboot {
				rebooted(t, path)
			}
			for range 2 { // an Open changes nothing
				s = openTest(t, path)
				if got := must(s.Flow(t.Context()))(t); !reflect.DeepEqual(got, c.want) {
					t.Errorf("have %+v, want %+v", got, c.want)
				}
				if notes, want := must(s.Notes(t.Context(), ""))(t), []Note{{"acked", fmt.Append(nil, c.want.Acked)}}; !reflect.DeepEqual(notes, want) {
					t.Errorf("notes are %q, want %q", notes, want)
				}
				s.Close()
			}
		})
	}
}

func TestFlowAckForgets(t *testing.T) {
	path := testPath(t)
	s := openTest(t, path)
	ctx := t.Context()
	if err := errors.Join(s.ReserveFlow(ctx, 100, 0), s.Close()); err != nil {
		t.Fatal(err)
	}
	rebooted(t, path)
	s = openTest(t, path)
	if err := s.SaveFlow(ctx, 120, 0, []Entry{{110, []byte("a")}, {120, []byte("b")}}); err != nil {
		t.Fatal(err)
	}
	if err := s.ReserveFlow(ctx, 200, 110); err != nil {
		t.Fatal(err)
	}
	want := FlowState{Acked: 110, Produced: 120, Spool: []Entry{{120, []byte("b")}}}
	if got := must(s.Flow(ctx))(t); !reflect.DeepEqual(got, want) {
		t.Errorf("have %+v, want %+v", got, want)
	}
}

func TestQueueAccounts(t *testing.T) {
	path := testPath(t)
	s := openTest(t, path)
	ctx := t.Context()
	row := testGrant("g")
	row.BootID = s.BootID()
	if err := errors.Join(s.Activate(ctx, row, nil), s.ReserveFlow(ctx, 1, 0)); err != nil {
		t.Fatal(err)
	}
	s.CountQueued(10)
	must(s.AppendAll(ctx, []Item{{Queued: true}, {Queued: true}, {Queued: true}}))(t)
	s.Close()

	s = openTest(t, path)
	if n, unsure, err := s.Unsettled(ctx); n != 7 || unsure || err != nil {
		t.Errorf("after a kill: %d, %v, %v; want 7 lost", n, unsure, err)
	}
	if err := s.Settle(ctx, []Item{{Data: []byte("seven lost"), Numbers: 7}}, s.Queued()); err != nil {
		t.Fatal(err)
	}
	if n, unsure, err := s.Unsettled(ctx); n != 0 || unsure || err != nil {
		t.Errorf("after it was settled: %d, %v, %v", n, unsure, err)
	}
	s.Close()

	rebooted(t, path)
	s = openTest(t, path)
	if n, unsure, err := s.Unsettled(ctx); n != 0 || !unsure || err != nil {
		t.Errorf("after a power loss: %d, %v, %v; want unsure", n, unsure, err)
	}
	if last, _, err := s.Seqs(ctx); last != 11 || err != nil {
		t.Errorf("last number %d, %v, want 11", last, err)
	}
}
