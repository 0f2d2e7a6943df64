package collector

import (
	"bufio"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/proof"
)

const (
	killEnv   = "SALLYPORT_COLLECTOR_TEST_KILL"
	killAtEnv = "SALLYPORT_COLLECTOR_TEST_KILL_AT" // a database
)

// killNodes write at once, each its two classes in turn.
const killNodes = 4

// work stores sealed batches until it is killed, and says on stdout what was acknowledged.
func work(dir, at string) error {
	e, key, err := openEngine(Config{Dir: dir, Postgres: at, TrustDomain: domain, Now: time.Now, Boot: bootTime, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	w := newWriter(e, key)
	go w.run()
	failed := make(chan error)
	for i := range killNodes {
		go func() { failed <- workNode(w, fmt.Sprint("node-", i)) }()
	}
	return <-failed
}

var stdout sync.Mutex

func workNode(w *writer, name string) error {
	signer, vkey, err := newSigner(proof.NodeSigner(name, epoch1), seedOf(name, epoch1))
	if err != nil {
		return err
	}
	key, err := note.NewVerifier(vkey)
	if err != nil {
		return err
	}
	for i := 0; ; i++ {
		of := sequence{name, epoch1, flows}
		stored := w.engine.stored(context.Background())
		m, err := stored.mark(of)
		if err != nil {
			return err
		}
		entries := flowEntries(m.seq+1, m.seq+1+rand.Uint64N(20))
		if i%2 == 0 {
			of.class = critical
			if m, err = stored.mark(of); err != nil {
				return err
			}
			entries = []*api.Entry{grantEntry(m.seq+1, "g", "ACTIVATED"), lossEntry(m.seq+4, 3)}
		}
		c := chain{m.number, m.seal}
		sent, err := c.seal(of, entries, signer, nil)
		if err != nil {
			return err
		}
		b, err := (&session{node: name, epoch: epoch1, vkey: vkey, key: key}).read(sent)
		if err != nil {
			return err
		}
		r, err := w.put(context.Background(), b)
		if err != nil {
			return err
		}
		h, err := stored.head()
		if err != nil {
			return err
		}
		stdout.Lock()
		fmt.Println(name, int(of.class), r.mark.seq, r.mark.number, h.size)
		stdout.Unlock()
	}
}

// A kill at any moment leaves what was acknowledged, and of everything either all or nothing: records, their seals, the log's leaves
// and hashes, and the checkpoint.
func TestKilled(t *testing.T) { onEngines(t, testKilled) }

func testKilled(t *testing.T, i ids) {
	rounds, _ := strconv.Atoi(os.Getenv("SALLYPORT_KILLS"))
	if rounds == 0 {
		rounds = 2
	}
	var dir string
	var older proof.Checkpoint
	for round := range rounds {
		if round%20 == 0 { // all of it is proven in each round
			dir, older = filepath.Join(t.TempDir(), "days"), proof.Checkpoint{}
			if i.at != "" {
				i.at = newDatabase(t)
			}
		}
		acked := killChild(t, dir, i.at)
		r := start(t, i, func(c *Config) { c.Dir = dir })
		key := r.logKeyOf(t)
		for s, m := range acked {
			if got := r.mark(t, s); got.seq < m.seq || got.number < m.number {
				t.Errorf("%v is stored up to %d, seal %d; acknowledged was %d, seal %d", s, got.seq, got.number, m.seq, m.number)
			}
		}
		older = grownTo(t, key, older, r.treeHead(t, older.Size).GetGrown())
		got, err := proven(r.evidence(t, &api.EvidenceRequest{}), key)
		if err != nil || len(got) != r.countRecords(t) {
			t.Fatalf("%d entries are proven, %d are there: %v", len(got), r.countRecords(t), err)
		}
		r.everyLeaf(t, key)
		r.stop()
	}
	if older.Size == 0 {
		t.Error("the log is empty")
	}
}

// killChild lets a process of its own write for a while, and returns what it acknowledged before it was killed.
func killChild(t *testing.T, dir, at string) map[sequence]mark {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel() // kills
	cmd := exec.CommandContext(ctx, must(os.Executable())(t))
	cmd.Env = append(os.Environ(), killEnv+"="+dir, killAtEnv+"="+at)
	cmd.Stderr = os.Stderr
	out := must(cmd.StdoutPipe())(t)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	acked := map[sequence]mark{}
	left := 1 + rand.IntN(60) // acknowledgements, and then a moment that is in the middle of something
	for lines := bufio.NewScanner(out); lines.Scan(); {
		var s sequence
		var class int
		var m mark
		var size int64
		if n, err := fmt.Sscan(lines.Text(), &s.node, &class, &m.seq, &m.number, &size); n != 5 {
			t.Fatalf("line %q: %v", lines.Text(), err)
		}
		s.epoch, s.class = epoch1, api.Class(class)
		acked[s] = m
		if left--; left == 0 {
			time.AfterFunc(rand.N(20*time.Millisecond), cancel)
		}
	}
	if err := cmd.Wait(); left > 0 {
		t.Fatalf("child ended: %v", err)
	}
	return acked
}

func (r *running) countRecords(t *testing.T) (n int) {
	t.Helper()
	r.eachDay(t, func(db tables) error {
		for _, table := range recordTables {
			var here int
			if err := db.QueryRow(`SELECT count(*) FROM ` + table + db.suffix).Scan(&here); err != nil {
				return err
			}
			n += here
		}
		return nil
	})
	return n
}

// Whatever is changed in a day's file, evidence from it is not proven any more, or not given.
func TestMutatedDay(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "days")
	i := newIDs(t)
	r := start(t, i, func(c *Config) { c.Dir = dir })
	n, _ := r.connect(t, "node-1", epoch1)
	for seq := uint64(1); seq < 40; seq += 4 {
		n.store(flows, flowEntries(seq, seq+3)...)
		n.store(critical, grantEntry(seq, "g", "ACTIVATED"), lossEntry(seq+2, 2), grantEntry(seq+3, "g", "ENDED"))
	}
	key := r.logKeyOf(t)
	r.stop()
	all, grant := &api.EvidenceRequest{}, &api.EvidenceRequest{Grant: "g"}
	one := &api.EvidenceRequest{Node: "node-1", Epoch: epoch1, Class: flows, Seq: 6}
	for _, c := range []struct {
		name, do string
		ask      *api.EvidenceRequest
	}{
		{"record changed", `UPDATE flows SET data = (SELECT data FROM flows WHERE seq = 9) WHERE seq = 6`, all},
		{"record changed", `UPDATE flows SET data = (SELECT data FROM flows WHERE seq = 9) WHERE seq = 6`, one},
		{"record deleted", `DELETE FROM flows WHERE seq = 6`, all},
		{"record deleted", `DELETE FROM flows WHERE seq = 6`, one},
		{"records swapped", `UPDATE flows SET seq = CASE seq WHEN 6 THEN -7 WHEN 7 THEN -6 END WHERE seq IN (6, 7); UPDATE flows SET seq = -seq WHERE seq < 0`, all},
		{"records swapped", `UPDATE flows SET seq = CASE seq WHEN 6 THEN -7 WHEN 7 THEN -6 END WHERE seq IN (6, 7); UPDATE flows SET seq = -seq WHERE seq < 0`, one},
		{"loss changed", `UPDATE losses SET data = CAST((SELECT data FROM losses WHERE seq = 7) || x'01' AS BLOB) WHERE seq = 7`, all},
		{"event changed", `UPDATE grant_events SET data = (SELECT data FROM grant_events WHERE seq = 4) WHERE seq = 5`, grant},
		{"event changed", `UPDATE grant_events SET data = (SELECT data FROM grant_events WHERE seq = 4) WHERE seq = 5`, all},
		{"event moved", `UPDATE grant_events SET leaf = leaf + 1 WHERE seq = 5`, grant},
		{"batch deleted", `DELETE FROM batches WHERE class = 2 AND number = 4`, all},
		{"batch and its records deleted", `DELETE FROM flows WHERE seq BETWEEN 13 AND 16; DELETE FROM batches WHERE class = 2 AND number = 4`, all},
		{"batch moved", `UPDATE batches SET leaf = 1000 WHERE class = 2 AND number = 4`, all},
		{"leaf changed", `UPDATE leaves SET data = (SELECT data FROM leaves WHERE idx = 9) WHERE idx = 5`, all},
		{"leaf deleted", `DELETE FROM leaves WHERE idx = 9; DELETE FROM leaves WHERE idx = 10; DELETE FROM leaves WHERE idx = 11`, all},
		{"hash changed", `UPDATE hashes SET hash = (SELECT hash FROM hashes WHERE idx = 9) WHERE idx = 5`, all},
		{"hash deleted", `DELETE FROM hashes WHERE idx = 5`, all},
		{"key changed", `UPDATE keys SET vkey = replace(vkey, 'A', 'B')`, all},
		{"key moved", `UPDATE keys SET leaf = leaf + 1`, all},
		{"log cut off", `UPDATE head SET size = size - 1`, all},
	} {
		t.Run(c.name, func(t *testing.T) {
			copied := filepath.Join(t.TempDir(), "days")
			if err := os.CopyFS(copied, os.DirFS(dir)); err != nil {
				t.Fatal(err)
			}
			for _, f := range must(filepath.Glob(filepath.Join(copied, "2*"+daySuffix)))(t) {
				db := must(sql.Open("sqlite", f))(t)
				_, err := db.Exec(c.do)
				if err := errors.Join(err, db.Close()); err != nil {
					t.Fatal(err)
				}
			}
			cfg := r.cfg
			cfg.Dir = copied
			if got, err := New(cfg); err != nil {
				return // it is seen at the start
			} else if err := got.Close(); err != nil {
				t.Fatal(err)
			}
			r := start(t, i, func(c *Config) { c.Dir = copied })
			bundle, err := r.tryEvidence(t, c.ask)
			if err != nil {
				return
			}
			if got, err := proven(bundle, key); err == nil && len(got) > 0 { // none: the day was set aside
				t.Errorf("%d entries are proven", len(got))
			}
		})
	}
	r = start(t, i, func(c *Config) { c.Dir = dir })
	for _, q := range []*api.EvidenceRequest{all, grant, one} {
		if got, err := proven(r.evidence(t, q), key); err != nil || len(got) == 0 {
			t.Errorf("unchanged: %d entries are proven, %v", len(got), err)
		}
	}
}
