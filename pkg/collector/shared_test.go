package collector

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/mod/sumdb/note"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/proof"
)

// beside starts another collector on the same database, with the same key.
func (r *running) beside(t *testing.T) *running {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, keyFile), must(os.ReadFile(filepath.Join(r.cfg.Dir, keyFile)))(t), 0o600); err != nil {
		t.Fatal(err)
	}
	return start(t, r.ids, func(c *Config) {
		*c = r.cfg
		c.Dir = dir
	})
}

func onPostgres(t *testing.T) ids {
	t.Helper()
	i := newIDs(t)
	i.at = newDatabase(t)
	return i
}

// wander stores numbers up to last, over one of the collectors and then another, and leaves some without waiting for what it hears.
func wander(ctx context.Context, r []*running, name string, last uint64) error {
	signer, vkey, err := newSigner(proof.NodeSigner(name, epoch1), seedOf(name, epoch1))
	if err != nil {
		return err
	}
	for reached := uint64(0); reached < last; {
		at := r[rand.IntN(len(r))]
		reached, err = visit(ctx, at, name, signer, vkey, last)
		switch status.Code(err) {
		case codes.OK, codes.Unavailable, codes.Aborted: // no gap: what was left on the way at another does not come in between
		default:
			return err
		}
	}
	return nil
}

// visit is one stream, of a few batches. It returns how far the welcome was.
func visit(ctx context.Context, r *running, name string, signer note.Signer, vkey string, last uint64) (uint64, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := api.NewAuditIngestClient(r.dial(r.ids.t, r.ids.of(agentPath+name))).Stream(ctx)
	if err != nil {
		return 0, err
	}
	if err := stream.Send(&api.AgentFrame{Frame: &api.AgentFrame_Hello{Hello: &api.Hello{Node: name, Epoch: epoch1, Version: wireVersion, NodeKey: vkey}}}); err != nil {
		return 0, nil // the answer says why
	}
	f, err := stream.Recv()
	if err != nil {
		return 0, err
	}
	w := f.GetWelcome()
	reached := w.GetFlowSeq()
	c := &chain{signed: w.GetFlowSeal()}
	if len(c.signed) > 0 {
		key, err := note.NewVerifier(vkey)
		if err != nil {
			return 0, err
		}
		s, err := proof.OpenSeal(c.signed, key)
		if err != nil {
			return 0, err
		}
		c.number = s.Number
	}
	next := reached + 1
	for range 1 + rand.IntN(4) {
		if next > last {
			return reached, nil
		}
		to := min(next+rand.Uint64N(40), last)
		b, err := c.seal(sequence{name, epoch1, flows}, flowEntries(next, to), signer, nil)
		if err != nil {
			return 0, err
		}
		if err := stream.Send(&api.AgentFrame{Frame: &api.AgentFrame_Batch{Batch: b}}); err != nil {
			return reached, nil
		}
		if rand.IntN(3) == 0 {
			return reached, nil // somebody else is asked how far it came
		}
		for acked := false; !acked; {
			f, err := stream.Recv()
			if err != nil {
				return reached, err
			}
			acked = f.GetAck() != nil
		}
		next = to + 1
	}
	return reached, nil
}

// exactlyOnce holds what a collector has of nodes against what they sent, and its log against its key.
func exactlyOnce(t *testing.T, r *running, nodes int, last uint64) {
	t.Helper()
	for k := range nodes {
		got := r.flows(t, &api.FlowQuery{Node: fmt.Sprint("node-", k), Limit: 1 << 20})
		for at, f := range got {
			if f.GetSeq() != uint64(at+1) {
				t.Fatalf("node %d has number %d at %d", k, f.GetSeq(), at)
			}
		}
		if uint64(len(got)) != last {
			t.Errorf("node %d has %d records, want %d", k, len(got), last)
		}
	}
	key := r.logKeyOf(t)
	r.everyLeaf(t, key)
	report, err := proof.Verify(bytes.NewReader(r.evidence(t, &api.EvidenceRequest{})), key)
	if err != nil || report.Verdict != proof.Proven || report.Records != uint64(nodes)*last {
		t.Errorf("%v: %d records, %s, %v", report.Verdict, report.Records, report.Why, err)
	}
}

// Two collectors in front of one database keep one log. Nodes come and go between them and have each record once, and whoever follows at one sees
// what came to the other.
func TestTwoCollectors(t *testing.T) {
	const nodes, last = 4, 500
	i := onPostgres(t)
	a := start(t, i, nil)
	b := a.beside(t)
	within, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	follower := must(a.reader(t).Flows(within, &api.FlowQuery{Follow: true}))(t)
	followed := make(chan error, 1)
	go func() {
		seen := map[string]uint64{}
		for range nodes * last {
			f, err := follower.Recv()
			if err == nil && f.GetSeq() != seen[f.GetNode()]+1 {
				err = fmt.Errorf("%s: %d follows %d", f.GetNode(), f.GetSeq(), seen[f.GetNode()])
			}
			if err != nil {
				followed <- err
				return
			}
			seen[f.GetNode()]++
		}
		followed <- nil
	}()
	var wg sync.WaitGroup
	for k := range nodes {
		wg.Go(func() {
			if err := wander(within, []*running{a, b}, fmt.Sprint("node-", k), last); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if err := <-followed; err != nil {
		t.Error(err)
	}
	for _, r := range []*running{a, b} {
		exactlyOnce(t, r, nodes, last)
	}
	if x, y := a.head(t), b.head(t); x.size != y.size || !bytes.Equal(x.checkpoint, y.checkpoint) {
		t.Errorf("heads are of %d and %d leaves", x.size, y.size)
	}
}

// Who follows at one collector is told at once of what comes to another.
func TestHearsOfOthers(t *testing.T) {
	a := start(t, onPostgres(t), nil)
	b := a.beside(t)
	within, cancel := context.WithTimeout(t.Context(), postgresLook-10*time.Second) // then it would look without being told
	defer cancel()
	follower := must(a.reader(t).Flows(within, &api.FlowQuery{Follow: true}))(t)
	n, _ := b.connect(t, "node-1", epoch1)
	for seq := uint64(1); seq <= 3; seq++ {
		n.store(flows, flowEntry(seq, nil))
		if f := must(follower.Recv())(t); f.GetSeq() != seq {
			t.Fatalf("have %d, want %d", f.GetSeq(), seq)
		}
	}
}

// The server is killed and comes back, again and again: what was acknowledged is there, each record once, in a log that is proven. While it is away readers are
// told so.
func TestDatabaseKilled(t *testing.T) {
	const nodes, last, kills = 3, 1000, 2
	server := newPostgres(t)
	if err := server.run(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.stop(syscall.SIGQUIT); os.RemoveAll(server.dir) })
	i := newIDs(t)
	i.at = server.address("postgres")
	r := start(t, i, nil)
	within, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		var wg sync.WaitGroup
		for k := range nodes {
			wg.Go(func() {
				if err := wander(within, []*running{r}, fmt.Sprint("node-", k), last); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}()
	for range kills {
		select {
		case <-r.engine.changed():
		case <-done: // faster than we are
		}
		<-time.After(rand.N(50 * time.Millisecond)) // in the middle of something
		server.stop(syscall.SIGKILL)
		stream, err := r.reader(t).Flows(t.Context(), &api.FlowQuery{})
		if _, err := drain(stream, err); status.Code(err) != codes.Unavailable {
			t.Errorf("reader was told %v", err)
		}
		if err := server.run(); err != nil {
			t.Fatal(err)
		}
	}
	<-done
	exactlyOnce(t, r, nodes, last)
}

// While the database is away nothing is stored, and that shows for as long as nodes try: they do not get as far as a batch.
func TestDatabaseAwayShows(t *testing.T) {
	server := newPostgres(t)
	if err := server.run(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.stop(syscall.SIGQUIT); os.RemoveAll(server.dir) })
	i := newIDs(t)
	i.at = server.address("postgres")
	r := start(t, i, func(c *Config) { c.Metrics = "127.0.0.1:0" })
	server.stop(syscall.SIGQUIT)
	_, vkey := nodeSigner(t, "node-1", epoch1)
	for tried := range 2 {
		stream := must(api.NewAuditIngestClient(r.dial(t, r.ids.of(agentPath+"node-1"))).Stream(t.Context()))(t)
		hello := &api.Hello{Node: "node-1", Epoch: epoch1, Version: wireVersion, NodeKey: vkey}
		if err := stream.Send(&api.AgentFrame{Frame: &api.AgentFrame_Hello{Hello: hello}}); err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
			t.Fatalf("node was told %v", err)
		}
		want := fmt.Sprintf("\nsallyport_collector_refused_batches_total{cause=\"storage\"} %d\n", tried+1)
		if !strings.Contains(r.scrape(t), want) {
			t.Errorf("metrics lack %s", want)
		}
	}
}

// A database has one log, with one key, in one layout. What does not fit is refused with words, and is left as it is.
func TestDatabaseRefused(t *testing.T) {
	i := onPostgres(t)
	r := start(t, i, nil)
	n, _ := r.connect(t, "node-1", epoch1)
	n.store(flows, flowEntries(1, 3)...)
	r.stop()
	refused := func(want string, change func(*Config)) {
		t.Helper()
		cfg := r.cfg
		change(&cfg)
		c, err := New(cfg)
		if err == nil {
			c.Close()
		}
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("have %v, want %q", err, want)
		}
	}
	files := start(t, newIDs(t), nil)
	m, _ := files.connect(t, "node-1", epoch1)
	m.store(flows, flowEntry(1, nil))
	files.stop()
	empty := newDatabase(t)
	refused("copy it from a collector that has it", func(c *Config) { c.Dir = t.TempDir() })
	refused("and "+filepath.Join(files.cfg.Dir, keyFile)+" is another", func(c *Config) { c.Dir = files.cfg.Dir })
	refused("has days of a log", func(c *Config) { c.Dir, c.Postgres = files.cfg.Dir, empty })
	refused("database cannot be used", func(c *Config) { c.Postgres += " user=nobody password=secret" })
	refused("database cannot be used", func(c *Config) { c.Postgres = "host=/nowhere password=secret" })
	refused("is neither", func(c *Config) { c.Postgres = "postgres://x:secret@h:port/" })
	shared.sql(t, "postgres", `CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0`)
	refused("its encoding is LATIN1", func(c *Config) { c.Postgres = shared.address("latin") })
	r.database(t, `UPDATE head SET layout = layout + 1`)
	refused("it has layout 2, this program knows 1", func(*Config) {})
	r.database(t, `UPDATE head SET layout = layout - 1`, `UPDATE head SET size = 1`)
	refused("other hashes than its checkpoint says", func(*Config) {})
	r.database(t, `UPDATE head SET size = 2`)
	r = start(t, i, func(c *Config) { c.Dir = r.cfg.Dir })
	n, w := r.connect(t, "node-1", epoch1)
	if w.GetFlowSeq() != 3 {
		t.Fatalf("welcome: %v", w)
	}
	n.store(flows, flowEntry(4, nil))
}

// database runs statements, as somebody with the database's password may.
func (r *running) database(t *testing.T, statements ...string) {
	t.Helper()
	db := sql.OpenDB(must(sqlConnector(r.cfg.Postgres))(t))
	defer db.Close()
	for _, s := range statements {
		must(db.Exec(s))(t)
	}
}

// What is changed in the database is not proven any more.
func TestMutatedDatabase(t *testing.T) {
	for _, change := range []string{
		`UPDATE flows SET data = (SELECT data FROM flows WHERE seq = 2) WHERE seq = 3`,
		`DELETE FROM flows WHERE seq = 3`,
		`UPDATE hashes SET hash = (SELECT hash FROM hashes WHERE idx = 1) WHERE idx = 2`,
		`UPDATE leaves SET data = (SELECT data FROM leaves WHERE idx = 1) WHERE idx = 2`,
		`DELETE FROM batches WHERE number = 1`,
	} {
		r := start(t, onPostgres(t), nil)
		n, _ := r.connect(t, "node-1", epoch1)
		n.store(flows, flowEntries(1, 3)...)
		n.store(flows, flowEntries(4, 5)...)
		prove := func() (proof.Verdict, error) {
			bundle, err := r.tryEvidence(t, &api.EvidenceRequest{})
			if err != nil {
				return 0, err
			}
			report, err := proof.Verify(bytes.NewReader(bundle), r.logKeyOf(t))
			if err == nil && report.Records != 5 { // fewer are proven of what is left
				err = errors.New("records are missing")
			}
			return report.Verdict, err
		}
		if v, err := prove(); err != nil || v != proof.Proven {
			t.Fatalf("unchanged: %v, %v", v, err)
		}
		r.database(t, change)
		if v, err := prove(); err == nil && v == proof.Proven {
			t.Errorf("%s: proven", change)
		}
		r.stop()
	}
}

// The next day's partitions are there before it begins, and somebody who reads the oldest day for long holds up no node when it is to go.
func TestPartitions(t *testing.T) {
	at := &clock{t: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)}
	i := onPostgres(t)
	shared.sql(t, "postgres", `ALTER DATABASE `+must(pgx.ParseConfig(i.at))(t).Database+` SET synchronous_commit = off`)
	r := start(t, i, func(c *Config) { c.Now, c.Boot, c.Retain = at.now, at.boot, 24*time.Hour })
	db := sql.OpenDB(must(sqlConnector(r.cfg.Postgres))(t))
	defer db.Close()
	parts := func() (names []string) {
		rows := must(db.Query(`SELECT relid::text FROM pg_partition_tree('flows') WHERE isleaf ORDER BY 1`))(t)
		defer rows.Close()
		for rows.Next() {
			var name string
			if err := rows.Scan(&name); err != nil {
				t.Fatal(err)
			}
			names = append(names, name)
		}
		return names
	}
	if got := parts(); !slices.Equal(got, []string{"flows_20260302"}) {
		t.Errorf("before the first record: %v", got)
	}
	n, _ := r.connect(t, "node-1", epoch1)
	n.store(flows, flowEntry(1, nil))
	at.pass(24 * time.Hour)
	n.store(flows, flowEntry(2, nil))
	var level string
	if err := r.engine.(*postgresEngine).writer.QueryRow(`SHOW synchronous_commit`).Scan(&level); err != nil || level != "on" {
		t.Errorf("synchronous_commit is %s, %v", level, err)
	}
	reading := must(db.Begin())(t)
	defer reading.Rollback()
	must(reading.Exec(`SELECT count(*) FROM flows`))(t)
	at.pass(24 * time.Hour)
	n.store(flows, flowEntry(3, nil))
	n.store(flows, flowEntry(4, nil)) // behind the one who wanted the day to go
	if got := r.dayNames(t); len(got) != 3 {
		t.Errorf("days are %v", got)
	}
	if err := reading.Rollback(); err != nil {
		t.Fatal(err)
	}
	at.pass(2 * time.Hour)
	r.engine.keep(t.Context())
	if got := parts(); !slices.Equal(got, []string{"flows_20260302", "flows_20260303", "flows_20260304"}) {
		t.Errorf("parts are %v", got)
	}
	if got := seqs(r.flows(t, &api.FlowQuery{})); !slices.Equal(got, []uint64{2, 3, 4}) {
		t.Errorf("left are %v", got)
	}
}
