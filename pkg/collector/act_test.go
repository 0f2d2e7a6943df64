package collector

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

// acting is a collector with one that may act, and a node that takes acts.
func acting(t *testing.T, change func(*Config)) (*running, *node) {
	t.Helper()
	r := start(t, newIDs(t), func(c *Config) {
		c.Actors, c.Socket, c.SocketUIDs = []string{"spiffe://example.org/oncall/*"}, filepath.Join(t.TempDir(), "sock"), []uint32{uint32(os.Getuid())}
		if change != nil {
			change(c)
		}
	})
	return r, r.takesActs(t, "node-1")
}

func (r *running) takesActs(t *testing.T, name string) *node {
	t.Helper()
	_, vkey := nodeSigner(t, name, epoch1)
	n, _ := r.greet(t, &api.Hello{Node: name, Epoch: epoch1, Version: wireVersion, NodeKey: vkey, Acts: true})
	return n
}

func (r *running) actor(t *testing.T, path string) api.AuditClient {
	t.Helper()
	return api.NewAuditClient(r.dial(t, r.ids.of(path)))
}

func revocation(node, grant string) *api.ActRequest {
	return &api.ActRequest{Node: node, What: &api.ActRequest_Revoke{Revoke: &api.Revocation{Grant: grant, Why: "over"}}}
}

// asked is the next act that the node is sent.
func (n *node) asked() *api.Act {
	n.t.Helper()
	act := must(n.next())(n.t).GetAct()
	if act == nil {
		n.t.Fatal("another frame than an act")
	}
	return act
}

func (n *node) acted(a *api.Acted) {
	n.t.Helper()
	n.send(&api.AgentFrame{Frame: &api.AgentFrame_Acted{Acted: a}})
}

// told is how a call of Act ended.
type told struct {
	reply *api.ActReply
	err   error
}

func act(ctx context.Context, c api.AuditClient, r *api.ActRequest) <-chan told {
	out := make(chan told, 1)
	go func() {
		reply, err := c.Act(ctx, r)
		out <- told{reply, err}
	}()
	return out
}

func (g told) want(t *testing.T, code codes.Code, words ...string) {
	t.Helper()
	for _, w := range append(words, "") {
		if status.Code(g.err) != code || !strings.Contains(status.Convert(g.err).Message(), w) {
			t.Errorf("have %v, want %s with %q", g.err, code, w)
		}
	}
}

// Who may have nodes act: actors and users of the socket, each by the name that was proven. Readers may not, nor nodes; actors read nothing by that.
func TestWhoMayAct(t *testing.T) {
	r, n := acting(t, nil)
	for _, path := range []string{"/ops/alice", "/auditor", "/sallyport/agent/node-1"} {
		(<-act(t.Context(), r.actor(t, path), revocation("node-1", "g"))).want(t, codes.PermissionDenied, path+" is not among the collector's actors")
	}
	if _, err := r.actor(t, "/nobody").Act(t.Context(), revocation("node-1", "g")); status.Code(err) != codes.Unavailable {
		t.Errorf("a stranger: %v", err)
	}
	stream, err := r.actor(t, "/oncall/eve").Flows(t.Context(), &api.FlowQuery{})
	if _, err = drain(stream, err); status.Code(err) != codes.PermissionDenied {
		t.Errorf("an actor reads: %v", err)
	}
	local := must(dialUnix(r.cfg.Socket))(t)
	defer local.Close()
	for who, client := range map[string]api.AuditClient{
		"spiffe://example.org/oncall/eve":            r.actor(t, "/oncall/eve"),
		fmt.Sprintf("uid:%d@collector", os.Getuid()): api.NewAuditClient(local),
	} {
		done := act(t.Context(), client, revocation("node-1", who))
		a := n.asked()
		if a.GetActor() != who || a.GetRevoke().GetGrant() != who || a.GetRevoke().GetWhy() != "over" {
			t.Errorf("%s: the node is asked %v", who, a)
		}
		n.acted(&api.Acted{Id: a.GetId(), Grant: &api.Grant{Id: who, State: "revoked"}})
		if g := <-done; g.err != nil || g.reply.GetGrant().GetId() != who {
			t.Errorf("%s: %v, %v", who, g.reply, g.err)
		}
	}
}

// What cannot be asked is refused in words, and no node hears of it. A node's own refusal comes as it is, but for codes that would speak of the collector.
func TestActRefused(t *testing.T) {
	r, n := acting(t, nil)
	r.connect(t, "node-old", epoch1)
	eve := r.actor(t, "/oncall/eve")
	statement := func(size, envelope int) *api.ActRequest {
		return &api.ActRequest{Node: "node-1", What: &api.ActRequest_Statement{Statement: make([]byte, size)}, Envelope: make([]byte, envelope)}
	}
	long := revocation("node-1", "g")
	long.GetRevoke().Why = strings.Repeat("x", maxWhy+1)
	unsaid := revocation("node-1", "g")
	unsaid.GetRevoke().Why = " "
	for _, c := range []struct {
		r     *api.ActRequest
		code  codes.Code
		words string
	}{
		{revocation("node-2", "g"), codes.FailedPrecondition, "`sallyport grant revoke g --why TEXT`"},
		{revocation("node-2\n", "g"), codes.FailedPrecondition, `"node-2\n" is not connected`},
		{revocation("node-old", "g"), codes.FailedPrecondition, "of a version that takes nothing"},
		{revocation("", "g"), codes.InvalidArgument, "node: "},
		{revocation("node-1", ""), codes.InvalidArgument, "grant: "},
		{revocation("node-1", strings.Repeat("g", maxGrantID+1)), codes.InvalidArgument, "grant: "},
		{long, codes.InvalidArgument, "why: "},
		{unsaid, codes.InvalidArgument, "why: "},
		{&api.ActRequest{Node: "node-1"}, codes.InvalidArgument, "what: "},
		{statement(0, 1), codes.InvalidArgument, "statement: "},
		{statement(maxSigned+1, 0), codes.InvalidArgument, "statement: "},
		{statement(1, maxSigned+1), codes.InvalidArgument, "statement: "},
	} {
		(<-act(t.Context(), eve, c.r)).want(t, c.code, c.words)
	}
	for code, want := range map[codes.Code]codes.Code{
		codes.NotFound: codes.NotFound, codes.AlreadyExists: codes.AlreadyExists, codes.InvalidArgument: codes.InvalidArgument,
		codes.Unavailable: codes.FailedPrecondition, codes.Unauthenticated: codes.FailedPrecondition, 4711: codes.FailedPrecondition,
	} {
		done := act(t.Context(), eve, statement(1, 2))
		a := n.asked() // and nothing of what is above
		if len(a.GetStatement()) != 1 || len(a.GetEnvelope()) != 2 {
			t.Errorf("the node is asked %v", a)
		}
		n.acted(&api.Acted{Id: a.GetId(), Code: uint32(code), Refusal: "not so\nhint: do this"})
		(<-done).want(t, want, "node \"node-1\": not so\nhint: do this")
	}
}

// A node that answers twice, for others, for nobody, at length or never harms nobody, and its records are taken.
func TestHostileActed(t *testing.T) {
	r, n := acting(t, nil)
	eve := r.actor(t, "/oncall/eve")
	done := act(t.Context(), eve, revocation("node-1", "g1"))
	first := n.asked()
	for _, a := range []*api.Acted{{}, {Id: first.GetId() + 1}, {Id: 1 << 63, Refusal: strings.Repeat("x", 1<<20)}} {
		n.acted(a)
	}
	n.acted(&api.Acted{Id: first.GetId(), Code: uint32(codes.Internal), Refusal: strings.Repeat("é", 1<<20)})
	n.acted(&api.Acted{Id: first.GetId()})
	n.store(flows, flowEntries(1, 3)...)
	g := <-done
	g.want(t, codes.Internal, "éé")
	if m := status.Convert(g.err).Message(); len(m) > maxRefusal+100 || !utf8.ValidString(m) {
		t.Errorf("%d bytes of refusal", len(m))
	}
	alone := newActs(true)
	id, answer, _ := alone.begin()
	for range 3 { // before anybody has heard the first: nothing waits for that
		alone.answer(&api.Acted{Id: id})
	}
	if <-answer; len(answer) != 0 {
		t.Error("a second answer")
	}
}

// So much is under way at a time, and who leaves makes room. What a node never answers ends with its caller's patience, in words.
func TestActsAreBounded(t *testing.T) {
	r, n := acting(t, nil)
	eve := r.actor(t, "/oncall/eve")
	ctx, leave := context.WithCancel(t.Context())
	var waiting []<-chan told
	for range maxActs {
		waiting = append(waiting, act(ctx, eve, revocation("node-1", "g")))
		n.asked()
	}
	(<-act(t.Context(), eve, revocation("node-1", "g"))).want(t, codes.ResourceExhausted, fmt.Sprint(maxActs), "hint: ")
	n.store(flows, flowEntries(1, 3)...)
	leave()
	for _, w := range waiting {
		(<-w).want(t, codes.Canceled)
	}
	soon, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	var last told
	for last = <-act(soon, eve, revocation("node-1", "g")); status.Code(last.err) == codes.ResourceExhausted; { // the collector has not seen yet that they left
		last = <-act(soon, eve, revocation("node-1", "g"))
	}
	last.want(t, codes.Aborted, "has not answered in time: it may have done it", "hint: ask again")
	n.asked()
	n.store(flows, flowEntries(4, 6)...)
}

// An act does not wait for batches that wait for the node's share.
func TestActsPassHeldBatches(t *testing.T) {
	r, n := acting(t, func(c *Config) { c.Limits = Limits{RecordsPerSecond: 1} })
	n.batch(flows, flowEntries(1, 1000)...) // a quarter of an hour
	soon, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	done := act(soon, r.actor(t, "/oncall/eve"), revocation("node-1", "g"))
	n.asked()
	other := r.takesActs(t, "node-1") // takes over: nobody is told that it was done
	(<-done).want(t, codes.Aborted, "was cut off before it answered: it may have done it")
	n.refused(codes.Aborted)
	done = act(soon, r.actor(t, "/oncall/eve"), revocation("node-1", "g"))
	other.acted(&api.Acted{Id: other.asked().GetId(), Grant: &api.Grant{Id: "g"}})
	if g := <-done; g.err != nil {
		t.Error(g.err)
	}
}

// A stop does not wait for a node's answer.
func TestActsStop(t *testing.T) {
	r, n := acting(t, nil)
	done := act(t.Context(), r.actor(t, "/oncall/eve"), revocation("node-1", "g"))
	n.asked()
	began := time.Now()
	r.stop()
	if g := <-done; g.err == nil || time.Since(began) > stopTimeout {
		t.Errorf("%v after %v", g.err, time.Since(began))
	}
}
