package collector

import (
	"context"
	"database/sql"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// history is a collector's directory with three days, and 40 records of a node on each.
type history struct {
	ids ids
	dir string
	at  *clock
}

const historyPerDay = 40

func newHistory(t *testing.T) history {
	t.Helper()
	h := history{newIDs(t), filepath.Join(t.TempDir(), "days"), &clock{t: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)}}
	r := h.run(t)
	n, _ := r.connect(t, "node-1", epoch1)
	for day := range uint64(3) {
		if day > 0 {
			h.at.pass(24 * time.Hour)
		}
		n.store(flows, flowEntries(day*historyPerDay+1, (day+1)*historyPerDay)...)
	}
	r.stop()
	return h
}

func (h history) run(t *testing.T) *running {
	t.Helper()
	return start(t, h.ids, func(c *Config) { c.Dir, c.Now, c.Boot = h.dir, h.at.now, h.at.boot })
}

func (h history) path(day int) string {
	return filepath.Join(h.dir, fmt.Sprintf("2026-03-%02d.db", day))
}

// goesOn has a node take up its sequence after the mark, with a loss for what is gone, as agents do.
func goesOn(t *testing.T, r *running, mark, last uint64) {
	t.Helper()
	n, w := r.connect(t, "node-1", epoch1)
	if w.GetFlowSeq() != mark {
		t.Fatalf("welcome says %d, want %d", w.GetFlowSeq(), mark)
	}
	if mark < last {
		n.store(flows, lossEntry(last, last-mark))
	}
	n.store(flows, flowEntries(last+1, last+5)...)
}

func mangle(t *testing.T, path string, change func([]byte) []byte) {
	t.Helper()
	if err := os.WriteFile(path, change(must(os.ReadFile(path))(t)), 0o600); err != nil {
		t.Fatal(err)
	}
}

func execute(t *testing.T, path string, statements ...string) {
	t.Helper()
	db := must(sql.Open("sqlite", path))(t)
	defer db.Close()
	for _, s := range statements {
		must(db.Exec(s))(t)
	}
}

// Whatever became of the newest day: the collector starts, goes on from the day before, and answers from the others.
func TestDamagedNewestDay(t *testing.T) {
	t.Parallel()
	change := func(f func([]byte) []byte) func(*testing.T, string) {
		return func(t *testing.T, path string) { mangle(t, path, f) }
	}
	sql := func(statements ...string) func(*testing.T, string) {
		return func(t *testing.T, path string) { execute(t, path, statements...) }
	}
	for name, damage := range map[string]func(*testing.T, string){
		"half":           change(func(b []byte) []byte { return b[:len(b)/2] }),
		"a page and one": change(func(b []byte) []byte { return b[:4097] }),
		"100 bytes":      change(func(b []byte) []byte { return b[:100] }),
		"one byte":       change(func(b []byte) []byte { return b[:1] }),
		"no database":    change(func([]byte) []byte { return []byte("this is a text, and not a database at all") }),
		"magic":          change(func(b []byte) []byte { b[0] ^= 1; return b }),
		"page size":      change(func(b []byte) []byte { b[16] ^= 0x10; return b }),
		"layout":         change(func(b []byte) []byte { b[63] ^= 0x40; return b }),
		"layout 0":       change(func(b []byte) []byte { b[63] = 0; return b }),
		"schema page":    change(func(b []byte) []byte { clear(b[100:4096]); return b }),
		"table gone":     sql("DROP TABLE losses"),
		"mark too high":  sql("UPDATE marks SET seq = seq + 7"),
		"mark too low":   sql("UPDATE marks SET seq = seq - 7"),
		"mark gone":      sql("DELETE FROM marks"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHistory(t)
			damage(t, h.path(3))
			damaged := must(os.ReadFile(h.path(3)))(t)
			r := h.run(t)
			goesOn(t, r, 2*historyPerDay, 3*historyPerDay)
			if got := len(r.flows(t, &api.FlowQuery{})); got != 2*historyPerDay+5 {
				t.Errorf("%d records are there", got)
			}
			if len(damaged) < 512 { // which is none to SQLite: the file is used
				return
			}
			if aside := must(os.ReadFile(h.path(3) + ".damaged-1"))(t); len(aside) != len(damaged) {
				t.Errorf("set aside are %d bytes of %d", len(aside), len(damaged))
			}
			r.stop()
			if files := must(filepath.Glob(filepath.Join(h.dir, "*.damaged-*")))(t); len(files) != 1 {
				t.Errorf("set aside are %v", files)
			}
			h.run(t)
		})
	}
}

// A file of another version is no damage: it is left where it is, and the collector does not start beside it.
func TestOtherLayout(t *testing.T) {
	h := newHistory(t)
	execute(t, h.path(3), "CREATE TABLE later (id INTEGER)", fmt.Sprintf("PRAGMA user_version = %d", layout+1))
	c, err := New(Config{Dir: h.dir, TrustDomain: domain, Source: h.ids.of("/sallyport/collector"), Listen: "127.0.0.1:0", Logger: slog.New(slog.DiscardHandler)})
	if err == nil {
		c.Close()
		t.Fatal("it was taken")
	}
	must(os.Stat(h.path(3)))(t)
}

// An older day whose pages are torn is found by whoever reads it. They are told, and the next reader has the rest.
func TestDamagedOldDay(t *testing.T) {
	h := newHistory(t)
	mangle(t, h.path(1), func(b []byte) []byte { // the tables' pages, not the first
		for i := 4096; i < len(b); i++ {
			b[i] = 0xa5
		}
		return b
	})
	// The marks of an older day need no reading if it is not the newest; this one is found at the start.
	r := h.run(t)
	if got := len(r.flows(t, &api.FlowQuery{})); got != 2*historyPerDay {
		t.Errorf("%d records are there", got)
	}
	execute(t, h.path(2), "UPDATE flows SET data = x'ffffff' WHERE seq = 50") // as a disk would, under a collector that runs
	stream, err := r.reader(t).Flows(t.Context(), &api.FlowQuery{})
	if _, err := drain(stream, err); status.Code(err) != codes.DataLoss {
		t.Errorf("reader was told %v", err)
	}
	if got := len(r.flows(t, &api.FlowQuery{})); got != historyPerDay {
		t.Errorf("%d records are there after it", got)
	}
	goesOn(t, r, 3*historyPerDay, 3*historyPerDay)
}

// The newest day goes bad under a collector that runs: a reader or the writer finds it, and what follows is stored.
func TestDamagedWhileRunning(t *testing.T) {
	t.Run("found by the writer", func(t *testing.T) {
		h := newHistory(t)
		r := h.run(t)
		n, _ := r.connect(t, "node-1", epoch1)
		execute(t, h.path(3), "DELETE FROM marks", "UPDATE flows SET seq = seq + 1000")
		execute(t, h.path(3), "UPDATE flows SET seq = 121 WHERE seq = 1100")
		n.batch(flows, flowEntries(121, 125)...)
		n.refused(codes.Unavailable)
		goesOn(t, r, 2*historyPerDay, 3*historyPerDay)
	})
	t.Run("found by a reader", func(t *testing.T) {
		h := newHistory(t)
		r := h.run(t)
		execute(t, h.path(3), "UPDATE flows SET data = x'ffffff' WHERE seq = 100")
		stream, err := r.reader(t).Flows(t.Context(), &api.FlowQuery{})
		if _, err := drain(stream, err); status.Code(err) != codes.DataLoss {
			t.Errorf("reader was told %v", err)
		}
		n, w := r.connect(t, "node-1", epoch1)
		if w.GetFlowSeq() != 3*historyPerDay {
			t.Fatalf("welcome: %v", w)
		}
		n.batch(flows, flowEntries(121, 125)...) // by now the day is gone
		n.refused(codes.FailedPrecondition)
		goesOn(t, r, 2*historyPerDay, 3*historyPerDay)
		if got := len(r.flows(t, &api.FlowQuery{})); got != 2*historyPerDay+5 {
			t.Errorf("%d records are there", got)
		}
	})
}

// Bytes flip anywhere in the newest file: the collector starts, says of no more records that it has them than it was sent, and takes more.
func TestFlippedBytes(t *testing.T) {
	t.Parallel()
	h := newHistory(t)
	sound := must(os.ReadFile(h.path(3)))(t)
	for seed := range uint64(40) {
		random := rand.New(rand.NewPCG(seed, 1))
		dir := filepath.Join(t.TempDir(), "days")
		if err := os.CopyFS(dir, os.DirFS(h.dir)); err != nil {
			t.Fatal(err)
		}
		flipped := append([]byte(nil), sound...)
		for range 1 + random.IntN(8) {
			flipped[random.IntN(len(flipped))] ^= byte(1 << random.IntN(8))
		}
		if err := os.WriteFile(filepath.Join(dir, "2026-03-03.db"), flipped, 0o600); err != nil {
			t.Fatal(err)
		}
		takesMore(t, history{h.ids, dir, h.at}, seed)
	}
}

// takesMore hands over a record, and reads, until both have met what is damaged.
func takesMore(t *testing.T, h history, seed uint64) {
	t.Helper()
	r := h.run(t)
	defer r.stop()
	last := uint64(3 * historyPerDay)
	for try := range 8 {
		n, w := r.connect(t, "node-1", epoch1)
		mark := w.GetFlowSeq()
		if mark > last {
			t.Fatalf("seed %d: collector says that it has %d of %d", seed, mark, last)
		}
		var batch []*api.Entry
		if mark < last {
			batch = append(batch, lossEntry(last, last-mark))
		}
		n.batch(flows, append(batch, flowEntry(last+1, nil))...)
		f, stored := n.stream.Recv()
		if stored == nil {
			last = f.GetAck().GetSeq()
		}
		stream, err := r.reader(t).Flows(t.Context(), &api.FlowQuery{})
		got, err := drain(stream, err)
		if stored == nil && err == nil && len(got) > 2*historyPerDay {
			return
		}
		if try == 7 || err != nil && status.Code(err) != codes.DataLoss {
			t.Fatalf("seed %d: %d records; stored: %v; read: %v", seed, len(got), stored, err)
		}
	}
}

// An agent whose collector lost its newest day counts what is gone, to the record.
func TestAgentCountsDamagedDay(t *testing.T) {
	i := newIDs(t)
	dir := filepath.Join(t.TempDir(), "days")
	address := ""
	run := func() *running {
		return start(t, i, func(c *Config) {
			c.Dir = dir
			if address != "" {
				c.Listen = address
			}
		})
	}
	r := run()
	address = r.Addr().String()
	st := must(store.Open(filepath.Join(t.TempDir(), "state", "node.db")))(t)
	defer st.Close()
	s := must(audit.New(audit.Config{Store: st, Node: "node-1", Address: address, Source: i.of(agentPath + "node-1"),
		ServerID: spiffeid.RequireFromPath(domain, "/sallyport/collector"), Logger: slog.New(slog.DiscardHandler)}))(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	produce := func(from, to int) {
		t.Helper()
		for k := from; k <= to; k++ {
			s.Flow(flow.Record{FlowID: fmt.Sprint("f", k), Event: flow.EventOpen})
		}
		for deadline := time.Now().Add(60 * time.Second); must(s.Status(ctx))(t).FlowPending > 0; {
			if time.Now().After(deadline) {
				t.Fatalf("not delivered: %+v", must(s.Status(ctx))(t))
			}
			<-time.After(10 * time.Millisecond)
		}
	}
	produce(1, 50)
	r.stop()
	mangle(t, must(filepath.Glob(filepath.Join(dir, "*.db")))(t)[0], func(b []byte) []byte { return b[:5000] })
	r = run()
	produce(51, 60)
	var ids []string
	for _, f := range r.flows(t, &api.FlowQuery{}) {
		ids = append(ids, f.GetFlow().GetFlowId())
	}
	if !reflect.DeepEqual(ids, []string{"f51", "f52", "f53", "f54", "f55", "f56", "f57", "f58", "f59", "f60"}) {
		t.Errorf("stored are %v", ids)
	}
	losses, err := r.reader(t).Losses(t.Context(), &api.LossQuery{})
	lost := uint64(0)
	for _, l := range must(drain(losses, err))(t) {
		if l.GetLoss().GetStage() != audit.StageCollector || l.GetLoss().GetCause() != audit.CauseForgotten {
			t.Errorf("loss is %v", l)
		}
		lost += l.GetLoss().GetCount()
	}
	if lost != 50 {
		t.Errorf("%d are counted lost, want 50", lost)
	}
}

// A clock that is set forward drops no day, whether the collector runs or starts then. What is written meanwhile is read, and later days
// go one by one.
func TestClockSetForward(t *testing.T) {
	h := newHistory(t)
	run := func() *running {
		return start(t, h.ids, func(c *Config) { c.Dir, c.Now, c.Boot, c.Retain = h.dir, h.at.now, h.at.boot, 48*time.Hour })
	}
	days := func(r *running) int { return len(r.files().all()) }
	r := run()
	h.at.set(h.at.now().Add(3650 * 24 * time.Hour))
	goesOn(t, r, 120, 120)
	if n := days(r); n != 4 {
		t.Fatalf("%d days are left", n)
	}
	h.at.pass(30 * time.Minute)
	if r.files().drop(t.Context()); days(r) != 4 {
		t.Errorf("%d days are left after half an hour", days(r))
	}
	h.at.set(h.at.now().Add(-3650 * 24 * time.Hour)) // somebody saw it
	goesOn(t, r, 125, 125)
	h.at.pass(2 * time.Hour)
	if r.files().drop(t.Context()); days(r) != 4 {
		t.Errorf("%d days are left after the clock was set back", days(r))
	}
	if got := len(r.flows(t, &api.FlowQuery{})); got != 130 {
		t.Errorf("%d records are there", got)
	}
	h.at.set(h.at.now().Add(3650 * 24 * time.Hour)) // nobody sees it, and the collector is started again
	r.stop()
	r = run()
	for hour := 1; hour <= 3; hour++ {
		if n := days(r); n != 5-hour {
			t.Errorf("%d days are left after %d hours", n, hour-1)
		}
		h.at.pass(time.Hour)
		for range 3 {
			r.files().drop(t.Context())
		}
	}
}

// A day that was set aside goes when its time is over, like the others.
func TestDamagedDayIsDropped(t *testing.T) {
	h := newHistory(t)
	mangle(t, h.path(1), func(b []byte) []byte { return b[:5000] })
	r := start(t, h.ids, func(c *Config) { c.Dir, c.Now, c.Boot, c.Retain = h.dir, h.at.now, h.at.boot, 24*time.Hour })
	aside := h.path(1) + ".damaged-1"
	must(os.Stat(aside))(t)
	for range 2 {
		h.at.pass(90 * time.Minute)
		r.files().drop(t.Context())
	}
	if _, err := os.Stat(aside); !os.IsNotExist(err) {
		t.Errorf("it is still there: %v", err)
	}
}
