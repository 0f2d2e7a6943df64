package client

import (
	"net/netip"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// MatchFlow tells whether a record answers the query, by the rules of the collector: empty
// fields match everything, Since is inclusive and Until is not, Client is an address without
// port. A verdict without an event leaves out what was only watched, whose verdict is what Enforce
// would say. The record does not name its node, so Node is not looked at; Limit and Follow are no
// matter of one record.
func MatchFlow(q *api.FlowQuery, r *api.FlowRecord) bool {
	return equal(q.GetService(), r.GetService()) &&
		equal(q.GetIdentity(), r.GetIdentity()) &&
		equal(q.GetGrant(), r.GetGrant()) &&
		equal(q.GetVerdict(), r.GetVerdict()) && !hypothetical(q, r) &&
		equal(q.GetReason(), r.GetReason()) &&
		equal(q.GetEvent(), r.GetEvent()) &&
		matchClient(q.GetClient(), r.GetClient()) &&
		matchTime(q, r)
}

// hypothetical tells of a verdict that nobody asked for: a record that is only watched was let go.
func hypothetical(q *api.FlowQuery, r *api.FlowRecord) bool {
	return q.GetVerdict() != "" && q.GetEvent() == "" && r.GetEvent() == flow.EventWatched.String()
}

func equal(want, got string) bool { return want == "" || want == got }

func matchClient(want, got string) bool {
	if want == "" {
		return true
	}
	address, err := netip.ParseAddr(want)
	client, err2 := netip.ParseAddrPort(got)
	return err == nil && err2 == nil && address.Unmap() == client.Addr().Unmap()
}

func matchTime(q *api.FlowQuery, r *api.FlowRecord) bool {
	at := r.GetTime().AsTime()
	if q.GetSince() != nil && at.Before(q.GetSince().AsTime()) {
		return false
	}
	return q.GetUntil() == nil || at.Before(q.GetUntil().AsTime())
}
