package agent

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/pkg/collector"
	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/store"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffegrpc/grpccredentials"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const eve = "spiffe://example.org/oncall/eve" // may act, and read

// proven is an identity of the tests' trust domain.
type proven struct {
	*x509svid.SVID
	*x509bundle.Bundle
}

// awayNode is a life whose records go to a real collector, and which that may have end grants.
type awayNode struct {
	*life
	acts   atomic.Pointer[acts]
	client api.AuditClient // eve's
}

// watch has a collector look after a life, until the test ends.
func (l *life) watch() *awayNode {
	l.t.Helper()
	w := &awayNode{life: l}
	w.may(true)
	auth, err := devauthority.New(spiffeid.RequireTrustDomainFromString("example.org"), devauthority.Options{})
	must(l.t, err)
	as := func(id string) proven {
		svid, err := auth.Issue(spiffeid.RequireFromString(id))
		must(l.t, err)
		return proven{svid, auth.Bundle()}
	}
	server := spiffeid.RequireFromString("spiffe://example.org/sallyport/collector")
	log := slog.New(slog.DiscardHandler)
	c, err := collector.New(collector.Config{Dir: filepath.Join(l.lab.Dir, "days"), TrustDomain: server.TrustDomain(), Source: as(server.String()),
		Listen: "127.0.0.1:0", Actors: []string{eve}, Readers: []string{eve}, Logger: log})
	must(l.t, err)
	w.runs(c.Run)
	s, err := audit.New(audit.Config{Store: l.store, Node: testNode, Address: c.Addr().String(), ServerID: server, Logger: log,
		Source: as("spiffe://example.org/sallyport/agent/" + testNode),
		Act:    func(ctx context.Context, act *api.Act) *api.Acted { return w.acts.Load().do(ctx, act) }})
	must(l.t, err)
	l.kick = s.Kick
	w.runs(s.Run)
	me := as(eve)
	conn, err := grpc.NewClient("passthrough:///"+c.Addr().String(), grpc.WithTransportCredentials(grpccredentials.MTLSClientCredentials(me, me, tlsconfig.AuthorizeID(server))))
	must(l.t, err)
	l.t.Cleanup(func() { conn.Close() })
	w.client = api.NewAuditClient(conn)
	l.eventually("a node that is connected", func() bool { // only one that is there does not know the grant
		_, err := w.revoke("nothing")
		return status.Code(err) == codes.NotFound
	})
	return w
}

// runs runs f until the test ends, and before the life is killed.
func (w *awayNode) runs(f func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	w.t.Cleanup(func() {
		cancel()
		must(w.t, <-done)
	})
}

// may says whether the collector's word ends grants.
func (w *awayNode) may(revoke bool) {
	a := &acts{mayRevoke: revoke, log: slog.New(slog.DiscardHandler)}
	a.grants.Store(w.grants)
	w.acts.Store(a)
}

func (w *awayNode) revoke(id string) (*api.Grant, error) {
	reply, err := w.client.Act(w.t.Context(), &api.ActRequest{Node: testNode, What: &api.ActRequest_Revoke{Revoke: &api.Revocation{Grant: id, Why: "over"}}})
	return reply.GetGrant(), err
}

func (w *awayNode) say(statement, envelope []byte) (*api.Grant, error) {
	reply, err := w.client.Act(w.t.Context(), &api.ActRequest{Node: testNode, What: &api.ActRequest_Statement{Statement: statement}, Envelope: envelope})
	return reply.GetGrant(), err
}

// refused holds that a call was, in these words.
func (w *awayNode) refused(err error, code codes.Code, words ...string) {
	w.t.Helper()
	if status.Code(err) != code || !contains(status.Convert(err).Message(), append(words, "hint: ")...) {
		w.t.Errorf("have %v, want %s with %q and a hint", err, code, words)
	}
}

// stays holds that a grant has its open path still.
func (w *awayNode) stays(id string) {
	w.t.Helper()
	if states, open := w.states(); states[id] != store.StateActive || open[id] != 1 {
		w.t.Errorf("grant is %q with %d open paths", states[id], open[id])
	}
}

// last is the last event of a step of a grant, at the collector.
func (w *awayNode) last(step, id string) *api.GrantEvent {
	w.t.Helper()
	var last *api.GrantEvent
	w.eventually("the record of "+step, func() bool {
		stream, err := w.client.GrantEvents(w.t.Context(), &api.GrantQuery{Grant: id})
		for last = nil; err == nil; {
			var e *api.StoredGrantEvent
			if e, err = stream.Recv(); err == nil && e.GetEvent().GetStep() == step {
				last = e.GetEvent()
			}
		}
		return last != nil
	})
	return last
}

// TestActs has a collector act on one node.
func TestActs(t *testing.T) {
	b, c := crewed(t)
	l := b.begin()
	t.Cleanup(l.kill)
	w := l.watch()
	t.Run("revokes", func(t *testing.T) { w.collectorRevokes(t, c) })
	t.Run("hands in", func(t *testing.T) { w.collectorHandsIn(t, c) })
	t.Run("is hostile", func(t *testing.T) { w.hostileCollector(t, c) })
}

// collectorRevokes: an actor at the collector ends a grant where the node's configuration allows that: closed and on record, with who it was,
// when the call returns.
func (w *awayNode) collectorRevokes(t *testing.T, c crew) {
	b, l := w.testbed, w.life
	row, err := l.Activate(t.Context(), b.asked(c, "alice bob", nil), "uid:0")
	must(t, err)

	w.may(false)
	_, err = w.revoke(row.ID)
	w.refused(err, codes.FailedPrecondition, `node "node-1": `, "ends no grant on the collector's word", "spec.collector.mayRevoke")
	w.stays(row.ID)
	w.acts.Store(&acts{mayRevoke: true, log: slog.New(slog.DiscardHandler)}) // before its grants are adopted
	_, err = w.revoke(row.ID)
	w.refused(err, codes.FailedPrecondition, "just starting")
	w.may(true)
	_, err = w.revoke("01HZZZZZZZZZZZZZZZZZZZZZZ9")
	w.refused(err, codes.NotFound, "no active grant")
	w.stays(row.ID)

	g, err := w.revoke(row.ID)
	must(t, err)
	states, open := l.states()
	if g.GetState() != "revoked" || g.GetEndedWhy() != "over" || g.GetRequester() != "alice" || states[row.ID] != store.StateRevoked || open[row.ID] != 0 {
		t.Errorf("grant is %v, %q on the node, with %d open paths", g, states[row.ID], open[row.ID])
	}
	if e := w.last(stepRevoked, row.ID); e.GetActor() != eve+" via collector" || e.GetWhy() != "over" || e.GetGrant() != row.ID {
		t.Errorf("record: %v", e)
	}
	before, _, err := l.store.Seqs(t.Context())
	must(t, err)
	_, err = w.revoke(row.ID) // the first answer may have been lost
	w.refused(err, codes.AlreadyExists, "it is revoked: over", "nothing is left to do")
	if n, _, err := l.store.Seqs(t.Context()); err != nil || n != before {
		t.Errorf("%d events on record, there were %d; %v", n, before, err)
	}
}

// collectorHandsIn: what somebody signed counts whatever the collector may, for those alone who may say it, and opens nothing.
func (w *awayNode) collectorHandsIn(t *testing.T, c crew) {
	b, l := w.testbed, w.life
	w.may(false)
	glass := b.asked(c, "alice carol dave", breakGlass)
	row, err := l.Activate(t.Context(), glass, "uid:0")
	must(t, err)

	_, err = w.say(b.says(c, "mallory", grant.StepDenied, glass), nil)
	w.refused(err, codes.InvalidArgument, "mallory")
	_, err = w.say(b.says(c, "erin", grant.StepReviewed, glass), nil)
	w.refused(err, codes.InvalidArgument, "it is active until")
	w.stays(row.ID)
	g, err := w.say(b.says(c, "alice", grant.StepWithdrawn, glass), nil)
	must(t, err)
	if _, open := l.states(); g.GetState() != "revoked" || open[row.ID] != 0 {
		t.Errorf("withdrawn: %v, %d open paths", g, open[row.ID])
	}
	_, err = w.say(b.says(c, "dave", grant.StepReviewed, glass), nil)
	w.refused(err, codes.InvalidArgument, "dave may not review it")
	if _, over := l.reviews.counts(); over != 1 {
		t.Errorf("%d reviews are open", over)
	}
	review := b.says(c, "erin", grant.StepReviewed, glass)
	_, err = w.say(review, glass)
	must(t, err)
	if live, over := l.reviews.counts(); live+over != 0 {
		t.Errorf("%d reviews are open", live+over)
	}
	if e := w.last(stepReviewed, row.ID); e.GetActor() != eve+" via collector" || !contains(e.GetWhy(), "erin") || string(e.GetEnvelope()) != string(review) {
		t.Errorf("record: %v", e)
	}
	_, err = w.say(review, nil)
	w.refused(err, codes.AlreadyExists, "nothing is left to do")

	waiting := b.asked(c, "alice bob", nil)
	denied := b.says(c, "carol", grant.StepDenied, waiting)
	_, err = w.say(denied, nil)
	w.refused(err, codes.InvalidArgument, "never activated")
	_, err = w.say(b.signer.answer(t, waiting, l.challenges.mint()), waiting) // begins it on the node's own socket, and nowhere else
	w.refused(err, codes.InvalidArgument, "step")
	g, err = w.say(denied, waiting)
	must(t, err)
	if _, err := l.Activate(t.Context(), waiting, "uid:0"); g != nil || !errors.Is(err, store.ErrFinal) {
		t.Errorf("denied: %v; activated: %v", g, err)
	}
}

// hostileCollector: whatever it sends is refused or taken for what it is, and what it says cannot pass for something else in the record.
func (w *awayNode) hostileCollector(t *testing.T, c crew) {
	b, l := w.testbed, w.life
	a := &acts{mayRevoke: true, log: slog.New(slog.DiscardHandler)}
	a.grants.Store(l.grants)
	envelope := b.asked(c, "alice bob", nil)
	row, err := l.Activate(t.Context(), envelope, "uid:0")
	must(t, err)
	before, _, err := l.store.Seqs(t.Context())
	must(t, err)
	good := b.says(c, "carol", grant.StepDenied, envelope)
	revoke := func(id string) *api.Act {
		return &api.Act{Actor: "x", What: &api.Act_Revoke{Revoke: &api.Revocation{Grant: id}}}
	}
	say := func(statement, envelope []byte) *api.Act {
		return &api.Act{Actor: "x", What: &api.Act_Statement{Statement: statement}, Envelope: envelope}
	}
	for name, act := range map[string]*api.Act{
		"nothing": {}, "no grant": revoke(""), "odd": revoke("' OR 1=1 --\x00\x1b[2J"), "long": revoke(strings.Repeat("g", 1<<20)), "a path": revoke("../../" + row.ID),
		"no statement": say(nil, nil), "no JSON": say([]byte("{"), nil), "deep": say([]byte(strings.Repeat("[", 60000)), nil), "large": say(make([]byte, 1<<20), nil),
		"a grant": say(envelope, envelope), "cut off": say(good[:len(good)-10], nil), "about another": say(b.says(c, "carol", grant.StepDenied, b.asked(c, "alice bob", nil)), envelope),
		"other key": say(crew{"carol": c["mallory"]}.says(t, "carol", grant.StepDenied, envelope, time.Now()), nil),
	} {
		if acted := a.do(t.Context(), act); acted.GetCode() == 0 || acted.GetRefusal() == "" || acted.GetGrant() != nil || len(acted.GetRefusal()) > 10000 {
			t.Errorf("%s: %.200v", name, acted)
		}
	}
	if n, _, err := l.store.Seqs(t.Context()); err != nil || n != before {
		t.Errorf("%d events on record, there were %d; %v", n, before, err)
	}
	w.stays(row.ID)
	forged := revoke(row.ID)
	forged.Actor, forged.GetRevoke().Why = "uid:0\x1b[2J\n", "no\x00thing\u202e"
	if acted := a.do(t.Context(), forged); acted.GetCode() != 0 {
		t.Fatal(acted)
	}
	if e := w.last(stepRevoked, row.ID); e.GetActor() != "uid:0[2J via collector" || e.GetWhy() != "nothing" {
		t.Errorf("record: %v", e)
	}
}
