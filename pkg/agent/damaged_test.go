package agent

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/store"
	"google.golang.org/protobuf/proto"
)

// spoilStore has all that the store holds in its file, and changes the file. It gives how many numbers were pending.
func spoilStore(t *testing.T, file string, spoil func([]byte) []byte) (pending uint64) {
	t.Helper()
	s, err := store.Open(file)
	must(t, err)
	last, acked, err := s.Seqs(t.Context())
	must(t, errors.Join(err, s.Close()))
	db, err := os.ReadFile(file)
	must(t, err)
	must(t, os.WriteFile(file, spoil(bytes.Clone(db)), 0o600))
	return last - acked
}

// damageTold counts the entries that tell of damage, and gives how many numbers all entries take.
func damageTold(t *testing.T, file string) (alarms, losses, lost, numbers uint64) {
	t.Helper()
	s, err := store.Open(file)
	must(t, err)
	defer s.Close()
	entries, err := s.Entries(t.Context(), 0, 1<<20)
	must(t, err)
	for _, entry := range entries {
		var e api.Entry
		must(t, proto.Unmarshal(entry.Data, &e))
		if g := e.GetGrant(); g.GetStep() == stepAlarm && contains(g.GetWhy(), string(alarmStoreDamaged), store.ErrDamaged.Error(), ".damaged-") {
			alarms++
			numbers = entry.Seq // it is told last
		}
		if l := e.GetLoss(); l.GetStage() == audit.StageAgentStore && l.GetCause() == audit.CauseDamaged && !l.GetAtMost() {
			losses, lost = losses+1, lost+l.GetCount()
		}
	}
	return alarms, losses, lost, numbers
}

// TestStartWithADamagedStore: the node is enforced, all paths end, nothing is activated, status says what happened and what to
// do, and one alarm and one loss tell of it, also after a further start.
func TestStartWithADamagedStore(t *testing.T) {
	in := install(t)
	file := storeFile(in.cfg)
	for _, c := range []struct {
		name  string
		spoil func([]byte) []byte
		all   bool // is gone
	}{
		{"head of zeros", func(db []byte) []byte { clear(db[4096:8192]); return db }, false},
		{"emptied", func([]byte) []byte { return nil }, true},
	} {
		process := in.ready("run")
		used := in.signer.envelope(t, nil)
		reply, err := in.activate(t.Context(), in.agent(), used)
		if c.name == "emptied" { // still in doubt after the first
			if err == nil || !contains(err.Error(), store.ErrDoubt.Error(), "sallyport grant vouch") {
				t.Errorf("activated in doubt: %v", err)
			}
		} else {
			must(t, err)
		}
		must(t, process.Kill())
		pending := spoilStore(t, file, c.spoil)
		damaged, err := os.ReadFile(file)
		must(t, err)

		for range 2 {
			process = in.ready("run")
			in.eventually("status tells of it", func() bool {
				return contains(strings.Join(in.status().Problems, "\n"), "memory: no grant is activated", "the store was damaged", file+".damaged-", "sallyport grant vouch")
			})
			_, open := in.grantsAndPaths()
			if s := in.status(); s.Services != 1 || len(open) != 0 || s.LivePaths != 0 {
				t.Errorf("%s: open paths %v, status %v", c.name, open, s)
			}
			if _, err := in.activate(t.Context(), in.agent(), used); err == nil || !contains(err.Error(), "hint: ") {
				t.Errorf("%s: grant %v is used again: %v", c.name, reply.GetGrant().GetId(), err)
			}
			must(t, process.Stop(10*time.Second))
		}
		if alarms, losses, lost, numbers := damageTold(t, file); alarms != 1 || c.all != (losses == 1) || c.all != (lost == pending) || numbers != pending+1 {
			t.Errorf("%s: %d alarms, %d losses of %d, numbers up to %d; %d were pending", c.name, alarms, losses, lost, numbers, pending)
		}
		kept, err := filepath.Glob(file + ".damaged-*")
		must(t, err)
		same := false
		for _, k := range kept {
			data, err := os.ReadFile(k)
			must(t, err)
			same = same || bytes.Equal(data, damaged)
		}
		if !same {
			t.Errorf("%s: the damaged file is none of %v", c.name, kept)
		}
	}
	in.uninstall()
}

// TestVouchForADamagedStore: what was used stays used when somebody vouched, whatever the damage took, and an active grant
// whose record is gone loses its path.
func TestVouchForADamagedStore(t *testing.T) {
	b, c := crewed(t)
	file := filepath.Join(b.lab.Dir, "state", "node.db")
	l := b.begin()
	var envelopes [][]byte
	var ids []string
	for i := range 2 { // the first is over, the second goes on
		e := b.asked(c, "alice bob", func(p *grant.Payload) { p.Addresses = p.Addresses[:1] })
		row, err := l.Activate(t.Context(), e, "uid:0")
		must(t, err)
		envelopes, ids = append(envelopes, e), append(ids, row.ID)
		if i == 0 {
			_, err = l.Revoke(t.Context(), row.ID, "", "uid:0")
			must(t, err)
		}
	}
	l.kill()
	spoilStore(t, file, func(db []byte) []byte {
		return bytes.ReplaceAll(db, []byte(ids[1]), []byte("01ZZZZZZZZZZZZZZZZZZZZZZZZ"))
	})
	s, damage, err := openOrRecover(file, b.clock.clock(), slog.New(slog.DiscardHandler))
	must(t, err)
	must(t, s.Close())
	if damage == "" {
		t.Fatal("nobody noticed")
	}
	l = b.begin()
	defer l.kill()
	must(t, l.adopt(t.Context()))
	if states, open := l.states(); len(open) != 0 || states[ids[0]] == store.StateActive || states[ids[1]] != "" {
		t.Errorf("revived: %v, open %v", states, open)
	}
	for _, e := range envelopes {
		if _, err := l.Activate(t.Context(), e, "uid:0"); !errors.Is(err, store.ErrDoubt) && !errors.Is(err, store.ErrReplayed) {
			t.Errorf("used again: %v", err)
		}
	}
	must(t, l.Vouch(t.Context(), c.vouches(t, "erin", l.challenges.mint(), time.Now()), "uid:0"))
	for _, e := range envelopes {
		if _, err := l.Activate(t.Context(), e, "uid:0"); !errors.Is(err, ErrForgotten) && !errors.Is(err, store.ErrReplayed) {
			t.Errorf("used again, when somebody vouched: %v", err)
		}
	}
	fresh := b.asked(c, "alice bob", func(p *grant.Payload) { p.NotBefore = time.Now() })
	if _, err := l.Activate(t.Context(), fresh, "uid:0"); err != nil {
		t.Errorf("a grant of afterwards: %v", err)
	}
}
