package main

import (
	"context"
	"database/sql"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffegrpc/grpccredentials"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	_ "modernc.org/sqlite"

	"github.com/sallyport-dev/sallyport/pkg/api"
	daily "github.com/sallyport-dev/sallyport/pkg/collector"
	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/pkg/proof"
	"github.com/sallyport-dev/sallyport/test/evidence"
)

// realCollector is one that serves, with its directory.
type realCollector struct {
	t         *testing.T
	authority *devauthority.Authority
	dir       string
	socket    string
	address   string
	stop      func()
}

type issued struct {
	*x509svid.SVID
	*x509bundle.Bundle
}

func (r *realCollector) identity(path string) issued {
	r.t.Helper()
	svid, err := r.authority.Issue(spiffeid.RequireFromPath(domain, path))
	if err != nil {
		r.t.Fatal(err)
	}
	return issued{svid, r.authority.Bundle()}
}

func newRealCollector(t *testing.T) *realCollector {
	t.Helper()
	authority, err := devauthority.New(domain, devauthority.Options{})
	if err != nil {
		t.Fatal(err)
	}
	r := &realCollector{t: t, authority: authority, dir: filepath.Join(t.TempDir(), "days"), socket: shortSocket(t)}
	r.start()
	t.Cleanup(func() { r.stop() })
	return r
}

func (r *realCollector) start() {
	r.t.Helper()
	c, err := daily.New(daily.Config{Dir: r.dir, TrustDomain: domain, Source: r.identity("/sallyport/collector"), Listen: "127.0.0.1:0",
		Socket: r.socket, SocketUIDs: []uint32{uint32(os.Getuid())}, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		r.t.Fatal(err)
	}
	r.address = c.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	r.stop = func() {
		cancel()
		if err := <-done; err != nil {
			r.t.Errorf("collector: %v", err)
		}
		r.stop = func() {}
	}
}

// audit runs a command against the collector.
func (r *realCollector) audit(args ...string) result {
	return command(r.t.Context(), nil, append([]string{"audit", "--collector", "unix:" + r.socket}, args...)...)
}

// send delivers sealed batches as a node does.
func (r *realCollector) send(name string, n *evidence.Node, batches ...proof.Line) {
	r.t.Helper()
	me := r.identity("/sallyport/agent/" + name)
	server := spiffeid.RequireFromPath(domain, "/sallyport/collector")
	conn, err := grpc.NewClient("passthrough:///"+r.address, grpc.WithTransportCredentials(grpccredentials.MTLSClientCredentials(me, me, tlsconfig.AuthorizeID(server))))
	if err != nil {
		r.t.Fatal(err)
	}
	defer conn.Close()
	stream, err := api.NewAuditIngestClient(conn).Stream(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	r.exchange(stream, &api.AgentFrame{Frame: &api.AgentFrame_Hello{Hello: &api.Hello{Node: name, Epoch: evidence.Epoch, Version: 2, NodeKey: n.VKey}}})
	for _, b := range batches {
		batch := &api.Batch{Class: api.Class_CLASS_FLOW, Epoch: evidence.Epoch, Seal: b.Leaf}
		if strings.Contains(string(b.Leaf), "\n"+proof.ClassCritical+"\n") {
			batch.Class = api.Class_CLASS_CRITICAL
		}
		for _, e := range b.Entries {
			batch.Raw = append(batch.Raw, &api.Raw{Seq: e.Seq, Data: e.Data})
		}
		for f := r.exchange(stream, &api.AgentFrame{Frame: &api.AgentFrame_Batch{Batch: batch}}); f.GetAck() == nil; {
			if f, err = stream.Recv(); err != nil {
				r.t.Fatal(err)
			}
		}
	}
}

func (r *realCollector) exchange(stream api.AuditIngest_StreamClient, f *api.AgentFrame) *api.CollectorFrame {
	r.t.Helper()
	if err := stream.Send(f); err != nil {
		r.t.Fatal(err)
	}
	answer, err := stream.Recv()
	if err != nil {
		r.t.Fatal(err)
	}
	return answer
}

// tamper changes the day's file behind the collector's back.
func (r *realCollector) tamper(statement string) {
	r.t.Helper()
	r.stop()
	files, err := filepath.Glob(filepath.Join(r.dir, "20*.db"))
	if err != nil || len(files) == 0 {
		r.t.Fatalf("no day: %v", err)
	}
	changed := int64(0)
	for _, f := range files {
		db, err := sql.Open("sqlite", f)
		if err != nil {
			r.t.Fatal(err)
		}
		done, err := db.Exec(statement)
		if err != nil {
			r.t.Fatal(err)
		}
		n, _ := done.RowsAffected()
		changed += n
		db.Close()
	}
	if changed == 0 {
		r.t.Fatalf("nothing was changed by %s", statement)
	}
	r.start()
}

// TestEvidenceOfACollector: what a collector gives is proven, with its own public key, and is disproved after its files were changed.
func TestEvidenceOfACollector(t *testing.T) {
	t.Parallel()
	r := newRealCollector(t)
	n := evidence.NewLog(t, "").Node("node-a")
	const grant = "01J8ZQ4X5M3T9V0Y2B7C6D1E4F"
	r.send("node-a", n,
		n.Unlogged(proof.ClassCritical, nil, evidence.Grant(grant, "ACTIVATED"), evidence.Grant(grant, "REVOKED")),
		n.Unlogged(proof.ClassFlow, nil, evidence.Flow("f1"), evidence.Flow("f2"), evidence.Loss("kernel_ring", "full", 40)),
		n.Unlogged(proof.ClassFlow, nil, evidence.Flow("f3")))
	key := filepath.Join(r.dir, "log.pub")
	verify := func(name string, flags ...string) result {
		t.Helper()
		file := filepath.Join(t.TempDir(), name)
		if e := r.audit(append([]string{"export", "--out", file}, flags...)...); e.code != 0 {
			t.Fatalf("%s: %+v", name, e)
		}
		return command(t.Context(), nil, "audit", "verify", file, "--key", key, "-o", "json")
	}
	for name, want := range map[string]struct {
		flags []string
		has   string
	}{
		"all":       {[]string{"--since", "1h"}, `"records":5,"events":0,"lost":40`},
		"node":      {[]string{"--node", "node-a"}, `"whole":true`},
		"nothing":   {[]string{"--until", "1h"}, `"records":0`},
		"a receipt": {[]string{"--grant", grant}, `"records":0,"events":2`},
		"a record":  {[]string{"--record", "node-a/" + evidence.Epoch + "/flow/2"}, `"records":1,"events":0,"lost":0`},
		"a loss":    {[]string{"--record", "node-a/" + evidence.Epoch + "/flow/17"}, `"records":0,"events":0,"lost":40`},
	} {
		if v := verify(name, want.flags...); v.code != 0 || !strings.Contains(v.stdout, want.has) {
			t.Errorf("%s: %+v", name, v)
		}
	}
	if v := r.audit("gaps"); v.code != exitFailed || !strings.Contains(v.stdout, "40") || !strings.Contains(v.stderr, "40 records missing") {
		t.Errorf("gaps: %+v", v)
	}
	public, err := os.ReadFile(key)
	if k := r.audit("key"); err != nil || k.stdout != string(public) {
		t.Errorf("key: %+v, not %s", k, public)
	}
	older := filepath.Join(t.TempDir(), "older")
	if e := r.audit("export", "--out", older); e.code != 0 {
		t.Fatalf("%+v", e)
	}
	r.send("node-a", n, n.Unlogged(proof.ClassFlow, nil, evidence.Flow("f4")))
	if v := r.audit("consistency", older, "--key", key); v.code != 0 || !strings.Contains(v.stdout, "proven") {
		t.Errorf("consistency: %+v", v)
	}
	events := r.audit("export", "--format", "ocsf")
	if events.code != 0 || strings.Count(events.stdout, "\n") != 6 {
		t.Errorf("events: %+v", events)
	}
	s := readSchema(t)
	for line := range strings.Lines(events.stdout) {
		if problems := s.check(parseEvent(t, []byte(line))); len(problems) > 0 {
			t.Errorf("%s%v", line, problems)
		}
	}

	r.tamper(`UPDATE flows SET data = CAST(replace(data, 'f2', 'fX') AS BLOB) WHERE seq = 2`)
	for _, flags := range [][]string{{"--node", "node-a"}, {"--record", "node-a/" + evidence.Epoch + "/flow/2"}, {"--record", "node-a/" + evidence.Epoch + "/flow/1"}} {
		want := exitDisproved
		v := verify("changed", flags...)
		if v.code != want {
			t.Errorf("a record was changed, %v: %+v", flags, v)
		}
	}
	if v := verify("a receipt of before", "--grant", grant); v.code != 0 {
		t.Errorf("what was not changed: %+v", v)
	}
	r.tamper(`UPDATE grant_events SET data = CAST(replace(data, 'REVOKED', 'EXPIRED') AS BLOB)`)
	if v := verify("a receipt", "--grant", grant); v.code != exitDisproved {
		t.Errorf("a grant event was changed: %+v", v)
	}
}

// TestACollectorThatWasSetBack is disproved by what somebody kept, though it agrees with itself.
func TestACollectorThatWasSetBack(t *testing.T) {
	t.Parallel()
	r := newRealCollector(t)
	n := evidence.NewLog(t, "").Node("node-a")
	batches := []proof.Line{n.Unlogged(proof.ClassFlow, nil, evidence.Flow("f1")), n.Unlogged(proof.ClassFlow, nil, evidence.Flow("f2"))}
	r.send("node-a", n, batches[0])
	r.stop()
	back := filepath.Join(t.TempDir(), "back")
	if err := os.CopyFS(back, os.DirFS(r.dir)); err != nil {
		t.Fatal(err)
	}
	r.start()
	r.send("node-a", n, batches[1])
	kept, key := filepath.Join(t.TempDir(), "kept"), filepath.Join(r.dir, "log.pub")
	if e := r.audit("export", "--out", kept); e.code != 0 {
		t.Fatalf("%+v", e)
	}
	r.stop()
	r.dir = back
	r.start()
	if v := r.audit("consistency", kept, "--key", key); v.code != exitDisproved || !strings.Contains(v.stderr, "set back") {
		t.Errorf("set back: %+v", v)
	}
	again := filepath.Join(t.TempDir(), "again")
	if e := r.audit("export", "--out", again); e.code != 0 {
		t.Fatalf("%+v", e)
	}
	if v := command(t.Context(), nil, "audit", "verify", again, "--key", key); v.code != 0 {
		t.Errorf("by itself: %+v", v)
	}
}
