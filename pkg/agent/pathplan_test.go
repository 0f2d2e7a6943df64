package agent

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
)

var (
	clientA = netip.MustParseAddr("10.1.0.2")
	clientB = netip.MustParseAddr("fd00:1::2")
)

func slot(n uint32, state datapath.PathState, grant string, client netip.Addr, deadline time.Duration) datapath.PathStatus {
	return datapath.PathStatus{Slot: n, State: state,
		Path: datapath.Path{Grant: grant, Client: client, Deadline: deadline}}
}

func withBudget(p datapath.PathStatus, bytes uint64) datapath.PathStatus {
	p.Budget.Bytes = bytes
	return p
}

func withIngress(p datapath.PathStatus) datapath.PathStatus {
	p.Ingress = datapath.IngressPod
	return p
}

func TestPlanPathsOfOneGrant(t *testing.T) {
	const end = 100 * time.Second
	a := func(s datapath.PathState) datapath.PathStatus { return slot(1, s, "g", clientA, end) }
	b := func(s datapath.PathState) datapath.PathStatus { return slot(2, s, "g", clientB, end) }
	for _, c := range []struct {
		name        string
		paths       []datapath.PathStatus
		now         time.Duration
		state, step string // empty: goes on
		why         string
	}{
		{"both live", []datapath.PathStatus{a(datapath.PathActive), b(datapath.PathActive)}, 99 * time.Second, "", "", ""},
		{"deadline", []datapath.PathStatus{a(datapath.PathActive), b(datapath.PathActive)}, end, stateExpired, stepExpired, "deadline"},
		{"kernel says expired", []datapath.PathStatus{a(datapath.PathExpired), b(datapath.PathActive)}, 0, stateExpired, stepExpired, "deadline"},
		{"revoked by hand", []datapath.PathStatus{a(datapath.PathActive), b(datapath.PathRevoked)}, 0, stateRevoked, stepRevoked, "slot 2"},
		{"spent", []datapath.PathStatus{a(datapath.PathSpent), b(datapath.PathActive)}, 0, stateSpent, stepSpent, "budget"},
		{"revoked by hand, then past the deadline", []datapath.PathStatus{a(datapath.PathRevoked)}, end, stateRevoked, stepRevoked, "slot 1"},
		{"killed after the record", nil, 0, stateEnded, stepRevoked, "no path in the kernel"},
		{"killed between two paths", []datapath.PathStatus{a(datapath.PathActive)}, 0, stateEnded, stepRevoked, "fd00:1::2"},
		{"killed within a path", []datapath.PathStatus{a(datapath.PathActive), b(datapath.PathPending)}, 0, stateEnded, stepRevoked, "slot 2"},
		{"lengthened by hand", []datapath.PathStatus{a(datapath.PathActive), slot(2, datapath.PathActive, "g", clientB, end+1)}, 0, stateEnded, stepRevoked, "later deadline"},
		{"shortened by hand", []datapath.PathStatus{a(datapath.PathActive), slot(2, datapath.PathActive, "g", clientB, end-1)}, 0, "", "", ""},
		{"another client", []datapath.PathStatus{a(datapath.PathActive), slot(2, datapath.PathActive, "g", netip.MustParseAddr("10.9.9.9"), end)}, 0, stateEnded, stepRevoked, "10.9.9.9"},
		{"ingress changed by hand", []datapath.PathStatus{a(datapath.PathActive), withIngress(b(datapath.PathActive))}, 0, stateEnded, stepRevoked, "other devices"},
		{"budget changed by hand", []datapath.PathStatus{a(datapath.PathActive), withBudget(b(datapath.PathActive), 1<<40)}, 0, stateEnded, stepRevoked, "another budget"},
		{"binding changed by hand", []datapath.PathStatus{a(datapath.PathActive), withCgroup(b(datapath.PathActive), 7)}, 0, stateEnded, stepRevoked, "other sockets"},
		{"one client twice", []datapath.PathStatus{a(datapath.PathActive), a(datapath.PathActive)}, 0, stateEnded, stepRevoked, "does not name"},
	} {
		plan := planPaths([]live{{grant: "g", clients: []netip.Addr{clientA, clientB}, deadline: end}}, byGrant(c.paths), c.now)
		if len(plan.orphans)+len(plan.idle) != 0 {
			t.Errorf("%s: slots of an active grant given away: %+v", c.name, plan)
		}
		if c.state == "" {
			if len(plan.end) != 0 {
				t.Errorf("%s: ended: %+v", c.name, plan.end)
			}
			continue
		}
		if len(plan.end) != 1 || plan.end[0].state != c.state || plan.end[0].step != c.step || !strings.Contains(plan.end[0].why, c.why) {
			t.Errorf("%s: %+v", c.name, plan.end)
		}
	}
}

func TestPlanPathsWithoutGrant(t *testing.T) {
	paths := []datapath.PathStatus{
		slot(0, datapath.PathFree, "", netip.Addr{}, 0),
		slot(1, datapath.PathActive, "unknown", clientA, time.Hour),
		slot(2, datapath.PathPending, "unknown", clientB, time.Hour),
		slot(3, datapath.PathExpired, "old", clientA, time.Second),
		slot(4, datapath.PathRevoked, "old", clientB, time.Second),
	}
	plan := planPaths(nil, byGrant(paths), 0)
	if len(plan.end) != 0 || len(plan.orphans) != 2 || len(plan.idle) != 2 || plan.idle[0] != 3 || plan.idle[1] != 4 {
		t.Errorf("%+v", plan)
	}
}

func withCgroup(p datapath.PathStatus, id uint64) datapath.PathStatus {
	p.Cgroup = id
	return p
}
