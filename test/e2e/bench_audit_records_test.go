package e2e_test

import (
	"bytes"
	"fmt"
	"net/netip"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// What the records of simulated nodes are about. A node has few of the services, and few come to it.
const (
	drawnServices   = 40
	servicesOfNode  = 3
	drawnIdentities = 2000
	idsOfNode       = 40
	clientsOfNode   = 200
	grantEvery      = 1000 // records of a node, in which one grant begins and ends
	rareEvery       = 50_000
)

const (
	visitor    = "spiffe://example.org/ns/visitors/sa/once" // came to the first node, once
	rareReason = flow.ReasonSourceRoute
)

var drawnReasons = []flow.Reason{flow.ReasonNoTLS, flow.ReasonNotAuthorised, flow.ReasonHandshakeTimeout, flow.ReasonNoListener, flow.ReasonHandshakeFailed}

// drawn is a number from 0 to n-1 that looks random, and is the same for the same record.
func drawn(node, k, n int) int {
	x := uint64(node)<<32 + uint64(k) + 0x9e3779b97f4a7c15 // splitmix64
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return int((x ^ x>>31) % uint64(n))
}

func drawnService(i int) string { return fmt.Sprintf("service-%02d", i) }

func drawnIdentity(i int) string {
	return fmt.Sprintf("spiffe://example.org/ns/team-%02d/sa/app-%04d", i%50, i)
}

func drawnClient(node, i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 20, byte(node), byte(i)})
}

func drawnGrant(node, k int) string { return fmt.Sprintf("01JSIM%03dGRANT%08d", node, k/grantEvery) }

// drawnRecord is the k-th of a node. Two that follow each other are of one flow.
func drawnRecord(node, k int, at time.Time) flow.Record {
	switch k / 2 % 10 {
	case 8:
		return bypassedRecord(node, k, at)
	case 9:
		return deniedRecord(node, k, at)
	}
	return proxiedRecord(node, k, at)
}

func plainRecord(node, k int, at time.Time) flow.Record {
	pair := k / 2
	r := flow.Record{Event: flow.EventOpen, Time: at, Boot: time.Duration(k) * time.Millisecond, CPU: k % 8, Seq: uint64(k),
		FlowID: fmt.Sprintf("01JSIM%03dC9DB9KARVAY8MN-%08x", node, pair), Protocol: "tcp", Service: drawnService((node*servicesOfNode + drawn(node, pair, servicesOfNode)) % drawnServices), Device: "eth0",
		Client: netip.AddrPortFrom(drawnClient(node, drawn(node, -pair, clientsOfNode)), uint16(1024+pair%60000)),
		Server: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 30, byte(node), 7}), 5432), Count: 1}
	if k%2 == 1 {
		r.Event, r.BytesToServer, r.BytesToClient, r.PacketsToServer, r.PacketsToClient = flow.EventClose, 4_210, 1_830_552, 61, 1_302
	}
	return r
}

func proxiedRecord(node, k int, at time.Time) flow.Record {
	r := plainRecord(node, k, at)
	r.Verdict, r.Reason, r.Identity = flow.VerdictProxied, flow.ReasonIdentity, drawnIdentity((node*idsOfNode/2+drawn(node, k/2, idsOfNode))%drawnIdentities)
	if r.Event == flow.EventClose {
		r.Reason = flow.ReasonClosed
	}
	if node == 0 && k == 2 {
		r.Identity = visitor
	}
	return r
}

func bypassedRecord(node, k int, at time.Time) flow.Record {
	r := plainRecord(node, k, at)
	r.Verdict, r.Reason, r.Grant, r.Slot = flow.VerdictBypassed, flow.ReasonPathOpen, drawnGrant(node, k), 1
	if r.Event == flow.EventClose {
		r.Reason = flow.ReasonClosed
	}
	return r
}

func deniedRecord(node, k int, at time.Time) flow.Record {
	r := plainRecord(node, k, at)
	r.Event, r.Verdict, r.Reason = flow.EventDeny, flow.VerdictDenied, drawnReasons[drawn(node, k, len(drawnReasons))]
	if k%rareEvery == 18 {
		r.Reason = rareReason
	}
	return r
}

// drawnEvent is a step of a grant in place of the k-th record, or nil.
func drawnEvent(node, k int, at time.Time) *api.GrantEvent {
	step := map[int]string{0: "ACTIVATED", grantEvery / 2: "EXPIRED"}[k%grantEvery]
	if step == "" {
		return nil
	}
	e := &api.GrantEvent{Grant: drawnGrant(node, k), Step: step, Time: timestamppb.New(at), Requester: "alice", Actor: "agent",
		Service: drawnService(node * servicesOfNode % drawnServices), Clients: []string{"10.20.1.2"}, Deadline: timestamppb.New(at.Add(time.Hour)), Slots: []uint32{1},
		Why: "nightly backup", Signers: []string{"SHA256:nThbg6kXUpJWGl7E1IGOCspRomTxdCARLviKw6E5SY8"}}
	if step == "ACTIVATED" {
		e.Envelope = bytes.Repeat([]byte("envelope"), 120)
	}
	return e
}
