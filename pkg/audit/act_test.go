package audit_test

import (
	"context"
	"fmt"
	"maps"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

func revoke(id uint64, grant string) *api.Act {
	return &api.Act{Id: id, Actor: "somebody", What: &api.Act_Revoke{Revoke: &api.Revocation{Grant: grant, Why: "over"}}}
}

// An act reaches the node by the stream that it opened, with who asks, and the answer reaches who asked. A node that takes no acts is not asked.
func TestActs(t *testing.T) {
	s := newSite(t)
	s.startCollector()
	var got []*api.Act
	s.act = func(_ context.Context, act *api.Act) *api.Acted {
		got = append(got, act)
		return &api.Acted{Grant: &api.Grant{Id: act.GetRevoke().GetGrant(), State: "revoked"}}
	}
	n := s.startNode(100)
	n.drained(t)
	conn := must(grpc.NewClient("unix:"+s.socket(), grpc.WithTransportCredentials(insecure.NewCredentials())))(t)
	defer conn.Close()
	for _, id := range []string{"g1", "g2"} {
		reply, err := api.NewAuditClient(conn).Act(t.Context(), &api.ActRequest{Node: "node-1",
			What: &api.ActRequest_Revoke{Revoke: &api.Revocation{Grant: id, Why: "over"}}})
		if err != nil || reply.GetGrant().GetId() != id {
			t.Fatalf("%v, %v", reply, err)
		}
	}
	n.stop()
	if len(got) != 2 || got[0].GetActor() != "uid:0@collector" || got[1].GetRevoke().GetWhy() != "over" {
		t.Errorf("the node was asked %v", got)
	}
}

// A collector that asks for what is malformed, huge or unknown, thousands of times, gets refusals, and takes records meanwhile. One act is done
// at a time, a few wait, and acknowledgements do not.
func TestHostileActs(t *testing.T) {
	s := newSite(t)
	h := s.newHands(t)
	begun, proceed := make(chan string, 10000), make(chan struct{})
	var atOnce atomic.Int32
	s.act = func(_ context.Context, act *api.Act) *api.Acted {
		if atOnce.Add(1) > 1 {
			t.Error("two acts at a time")
		}
		defer atOnce.Add(-1)
		if len(act.GetStatement()) > 0 {
			t.Errorf("a statement of %d bytes", len(act.GetStatement()))
		}
		begun <- act.GetRevoke().GetGrant()
		<-proceed
		return &api.Acted{Code: uint32(codes.NotFound), Refusal: "no such grant"}
	}
	n := s.startNode(10000)
	h.acts <- revoke(1, "g")
	<-begun // it is not done until the end
	const many = 3000
	for i := range uint64(many) {
		switch id := i + 2; {
		case i%1000 == 0:
			h.acts <- &api.Act{Id: id, What: &api.Act_Statement{Statement: make([]byte, 3<<20)}}
		case i%2 == 0:
			h.acts <- revoke(id, "unknown")
		default:
			h.acts <- &api.Act{Id: id}
		}
		if i%100 == 0 {
			n.Flow(proxied(fmt.Sprint("f", i)))
		}
	}
	n.drained(t)
	close(proceed)
	n.Flow(proxied("last"))
	st := n.drained(t)
	if st.FlowProduced != many/100+1 || h.have(api.Class_CLASS_FLOW).seq != st.FlowProduced {
		t.Errorf("%d records were produced, %d are there", st.FlowProduced, h.have(api.Class_CLASS_FLOW).seq)
	}
	answers := map[uint64]*api.Acted{}
	waitFor(t, func() bool { h.with(func() { maps.Copy(answers, h.acted) }); return answers[1] != nil }, func() string { return "the first act has no answer" })
	for id, a := range answers {
		if a.GetCode() == 0 || a.GetRefusal() == "" || a.GetGrant() != nil {
			t.Errorf("act %d: %v", id, a)
		}
	}
	if len(answers) < 10 {
		t.Errorf("%d answers", len(answers))
	}
	if done := len(begun) + 1; done > 40 { // the rest is refused at once, or waits for its turn
		t.Errorf("%d acts were begun", done)
	}
}

// What waits when its stream ends is not begun: nobody would hear the answer. What was begun is brought to its end, an orderly stop included.
func TestActsOfADeadStream(t *testing.T) {
	s := newSite(t)
	h := s.newHands(t)
	begun, proceed := make(chan string, 10), make(chan struct{})
	s.act = func(ctx context.Context, act *api.Act) *api.Acted {
		begun <- act.GetRevoke().GetGrant()
		<-proceed
		if ctx.Err() != nil {
			t.Errorf("act %s was given up: %v", act.GetRevoke().GetGrant(), ctx.Err())
		}
		return &api.Acted{}
	}
	n := s.startNode(100)
	h.acts <- revoke(1, "begun")
	<-begun
	h.acts <- revoke(2, "waits")
	n.Flow(proxied("behind")) // once it is acknowledged, the act before the acknowledgement is there, too
	n.drained(t)
	h.cut <- struct{}{}
	h.acts <- revoke(1, "on another stream")
	n.Flow(proxied("behind again"))
	n.drained(t)
	proceed <- struct{}{}
	if next := <-begun; next != "on another stream" {
		t.Errorf("%q was begun for nobody", next)
	}
	stopped := make(chan struct{})
	go func() { defer close(stopped); n.stop() }()
	waitFor(t, func() (none bool) { h.with(func() { none = h.streams == 0 }); return none }, func() string { return "the node does not stop" })
	proceed <- struct{}{}
	<-stopped
}
