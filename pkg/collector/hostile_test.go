package collector

import (
	"bytes"
	"context"
	"database/sql"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffegrpc/grpccredentials"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/proof"
)

// An address may have a zone, which is any text. No engine refuses a record for it, and what is looked for is found.
func TestZones(t *testing.T) { onEngines(t, testZones) }

func testZones(t *testing.T, i ids) {
	r := start(t, i, nil)
	n, _ := r.connect(t, "node-1", epoch1)
	n.store(flows, flowEntry(1, func(f *api.FlowRecord) { f.Client = "[fe80::1%a\x00b]:4000" }),
		flowEntry(2, func(f *api.FlowRecord) {
			f.Client, f.Server = "[fe80::1%eth0]:4000", "[fe80::2%"+strings.Repeat("z\x00", 1<<16)+"]:1"
		}))
	if got := r.flows(t, &api.FlowQuery{}); len(got) != 2 {
		t.Errorf("%d records", len(got))
	}
	if got := seqs(r.flows(t, &api.FlowQuery{Client: "fe80::1%eth0"})); len(got) != 1 || got[0] != 2 {
		t.Errorf("with the zone: %v", got)
	}
}

// What one node says cannot take the proof from what others say: it is refused, or a proof takes it.
func TestNodeCannotSpoilEvidence(t *testing.T) {
	r := start(t, newIDs(t), nil)
	honest, _ := r.connect(t, "node-1", epoch1)
	honest.store(flows, flowEntries(1, 3)...)

	signer, vkey := nodeSigner(t, "node-2", epoch1)
	for _, key := range []string{vkey[:len(vkey)-4] + "\n" + vkey[len(vkey)-4:], vkey + "\r", vkey + strings.Repeat("\n", 1<<20)} {
		n := r.open(t, "node-2")
		n.send(&api.AgentFrame{Frame: &api.AgentFrame_Hello{Hello: &api.Hello{Node: "node-2", Epoch: epoch1, Version: wireVersion, NodeKey: key}}})
		b := must((&chain{}).seal(sequence{"node-2", epoch1, flows}, flowEntries(1, 2), signer, nil))(t)
		n.sendBatch(b)
		n.refused(codes.InvalidArgument)
	}

	n, _ := r.connect(t, "node-2", epoch1)
	forgotten := &api.Entry{Seq: 5, Record: &api.Entry_Loss{Loss: &api.LossRecord{Stage: stageCollector, Cause: causeForgotten, Count: 5}}}
	n.sendBatch(n.sealed(flows, []*api.Entry{forgotten}, func(s *proof.Seal) { s.Before = proof.Follows([]byte("another")) }))
	n.refused(codes.FailedPrecondition)

	report := must(proof.Verify(bytes.NewReader(r.evidence(t, &api.EvidenceRequest{})), r.logKeyOf(t)))(t)
	if report.Verdict != proof.Proven || report.Records != 3 {
		t.Errorf("%v: %d records, %s", report.Verdict, report.Records, report.Why)
	}
}

// Grant events are of the critical class: readers name them by their number in it.
func TestFlowClassHasFlows(t *testing.T) {
	r := start(t, newIDs(t), nil)
	for i, e := range []*api.Entry{grantEntry(1, "g1", "REVOKED"), {Seq: 1, Record: &api.Entry_Tide{Tide: &api.Tide{}}}} {
		n, _ := r.connect(t, fmt.Sprint("node-", i), epoch1)
		n.batch(flows, e)
		n.refused(codes.InvalidArgument)
	}
	n, _ := r.connect(t, "node-1", epoch1)
	n.store(critical, grantEntry(1, "g1", "REVOKED"), flowEntry(2, nil))
	n.store(flows, lossEntry(1, 1), flowEntry(2, nil))
}

// open is a stream of a node that has not said anything.
func (r *running) open(t *testing.T, name string) *node {
	t.Helper()
	return &node{t: t, name: name, epoch: epoch1, chains: map[api.Class]*chain{}, stream: must(api.NewAuditIngestClient(r.dial(t, r.ids.of(agentPath+name))).Stream(t.Context()))(t)}
}

// What an engine cannot take of one node does not keep out those that share its commit.
func TestGroupOfOthers(t *testing.T) { onEngines(t, testGroupOfOthers) }

func testGroupOfOthers(t *testing.T, i ids) {
	r := start(t, i, nil)
	n, _ := r.connect(t, "node-0", epoch1)
	n.store(flows, flowEntry(1, nil))
	if i.at != "" {
		r.database(t, `ALTER TABLE flows ADD CHECK (service <> 'poison')`)
	} else if _, err := r.files().all()[0].writer.Exec(`CREATE TRIGGER poison BEFORE INSERT ON flows WHEN new.service = 'poison' BEGIN SELECT RAISE(ABORT, 'no'); END`); err != nil {
		t.Fatal(err)
	}
	g := newIngest(t.Context(), r.write, r.peers, r.nodes, r.meters, r.log)
	var group []job
	for k, service := range []string{"a", "poison", "b"} {
		name := fmt.Sprint("node-", k+1)
		signer, vkey := nodeSigner(t, name, epoch1)
		s := must(g.open(t.Context(), &api.Hello{Node: name, Epoch: epoch1, Version: wireVersion, NodeKey: vkey}, name))(t)
		if err := g.enter(t.Context(), s); err != nil {
			t.Fatal(err)
		}
		sent := must((&chain{}).seal(sequence{name, epoch1, flows}, []*api.Entry{flowEntry(1, func(f *api.FlowRecord) { f.Service = service })}, signer, nil))(t)
		group = append(group, job{must(s.read(sent))(t), make(chan result, 1)})
	}
	r.write.commit(group)
	for k, j := range group {
		if res := <-j.done; (res.err != nil) != (k == 1) {
			t.Errorf("node-%d: %v", k+1, res.err)
		}
	}
	if got := r.flows(t, &api.FlowQuery{}); len(got) != 3 {
		t.Errorf("%d records", len(got))
	}
}

// Who can write to the database has no log signed but the one that was: the key is not in it.
func TestForgedHeadIsNotSigned(t *testing.T) {
	r := start(t, onPostgres(t), nil)
	n, _ := r.connect(t, "node-1", epoch1)
	n.store(flows, flowEntries(1, 3)...)
	last := r.head(t)
	r.database(t, `UPDATE hashes SET hash = sha256(hash) WHERE idx = 2`)
	n.batch(flows, flowEntries(4, 5)...)
	n.refused(codes.Unavailable)
	if h := r.head(t); !bytes.Equal(h.checkpoint, last.checkpoint) {
		t.Errorf("signed was\n%s", h.checkpoint)
	}
}

// A database that hangs holds up no stop, however many batches wait for it.
func TestStopWithHangingDatabase(t *testing.T) {
	r := start(t, onPostgres(t), nil)
	var nodes []*node
	for k := range 4 {
		n, _ := r.connect(t, fmt.Sprint("node-", k), epoch1)
		n.store(flows, flowEntry(1, nil))
		nodes = append(nodes, n)
	}
	db := sql.OpenDB(must(sqlConnector(r.cfg.Postgres))(t))
	defer db.Close()
	held := must(db.Begin())(t)
	must(held.Exec(`SELECT one FROM head FOR UPDATE`))(t)
	for _, n := range nodes {
		n.batch(flows, flowEntry(2, nil))
	}
	r.waits(t)
	began := time.Now()
	r.stop()
	if took := time.Since(began); took > 4*stopTimeout {
		t.Errorf("the stop took %s", took)
	}
	if err := held.Rollback(); err != nil {
		t.Fatal(err)
	}
}

// waits returns when a statement of the collector waits for a lock.
func (r *running) waits(t *testing.T) {
	t.Helper()
	db := sql.OpenDB(must(sqlConnector(r.cfg.Postgres))(t))
	defer db.Close()
	for n := 0; n == 0; {
		if err := db.QueryRow(`SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`).Scan(&n); err != nil {
			t.Fatal(err)
		}
	}
}

// Readers who have all connections that there are for them hold up no node.
func TestReadersHoldUpNoNode(t *testing.T) {
	r := start(t, onPostgres(t), nil)
	e := r.engine.(*postgresEngine)
	for range e.readers.Stats().MaxOpenConnections {
		defer must(e.readers.Conn(t.Context()))(t).Close()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := r.engine.stored(ctx).head(); err != nil {
		t.Errorf("while others read: %v", err)
	}
	if e.keep(ctx); ctx.Err() != nil { // between two commits
		t.Error("what is due waits for readers")
	}
}

// A standby is no database for a collector, even to ask: what it has not heard of yet would count as lost.
func TestStandbyRefused(t *testing.T) {
	r := start(t, onPostgres(t), nil)
	r.stop()
	cfg := r.cfg
	cfg.Postgres += " options='-c default_transaction_read_only=on'"
	c, err := New(cfg)
	if err == nil {
		c.Close()
	}
	if err == nil || !strings.Contains(err.Error(), "read only connection") {
		t.Errorf("have %v", err)
	}
}

// Who was proven once is not for ever: a connection takes no calls any more when it is of an age.
func TestConnectionsEnd(t *testing.T) {
	r := start(t, newIDs(t), func(c *Config) { c.proofTTL = 100 * time.Millisecond })
	as, dials := r.ids.of("/ops/alice"), make(chan struct{}, 1000)
	conn := must(grpc.NewClient("passthrough:///"+r.Addr().String(), grpc.WithContextDialer(func(ctx context.Context, at string) (net.Conn, error) {
		dials <- struct{}{}
		return (&net.Dialer{}).DialContext(ctx, "tcp", at)
	}), grpc.WithTransportCredentials(grpccredentials.MTLSClientCredentials(as, as, tlsconfig.AuthorizeID(spiffeid.RequireFromPath(domain, "/sallyport/collector"))))))(t)
	defer conn.Close()
	for began := time.Now(); len(dials) < 2; {
		if _, err := api.NewAuditClient(conn).Nodes(t.Context(), &api.NodesRequest{}); err != nil {
			t.Fatal(err)
		}
		if time.Since(began) > 20*time.Second {
			t.Fatal("one connection takes calls for ever")
		}
	}
}

// A time that no column has is before all records, or after.
func TestFarTimes(t *testing.T) {
	r := start(t, newIDs(t), nil)
	n, _ := r.connect(t, "node-1", epoch1)
	n.store(flows, flowEntries(1, 3)...)
	first, last := &timestamppb.Timestamp{Seconds: -62135596800}, &timestamppb.Timestamp{Seconds: 253402300799}
	if got := r.flows(t, &api.FlowQuery{Since: first, Until: last}); len(got) != 3 {
		t.Errorf("from year 1 to 9999 are %d records", len(got))
	}
	report := must(proof.Verify(bytes.NewReader(r.evidence(t, &api.EvidenceRequest{Since: first, Until: last})), r.logKeyOf(t)))(t)
	if report.Records != 3 {
		t.Errorf("evidence from year 1 to 9999 is of %d records", report.Records)
	}
}

// A node that begins stream after stream has one that waits for the database, not all of them: others wait there, too.
func TestManyStreams(t *testing.T) {
	r := start(t, onPostgres(t), nil)
	db := sql.OpenDB(must(sqlConnector(r.cfg.Postgres))(t))
	defer db.Close()
	held := must(db.Begin())(t)
	defer held.Rollback()
	must(held.Exec(`SELECT one FROM head FOR UPDATE`))(t)
	var streams []*node
	for range 10 {
		n := r.open(t, "node-1")
		n.send(hello("node-1", epoch1, wireVersion))
		streams = append(streams, n)
	}
	ended := make(chan error, len(streams))
	for _, n := range streams {
		go func() { _, err := n.next(); ended <- err }()
	}
	for range len(streams) - 2 { // one has the turn, and one is the last
		select {
		case err := <-ended:
			if status.Code(err) != codes.Aborted {
				t.Errorf("a stream ended with %v", err)
			}
		case <-time.After(20 * time.Second):
			t.Fatal("streams that are over wait for the database")
		}
	}
}
