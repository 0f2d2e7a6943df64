package agent

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
)

// Steps of a grant's life, as grant events name them.
const (
	stepActivated   = "ACTIVATED"
	stepRevoked     = "REVOKED"
	stepExpired     = "EXPIRED"
	stepSpent       = "SPENT"
	stepIdle        = "IDLE"
	stepWarned      = "WARNED"    // of its end, or of the end of its budget
	stepSignalled   = "SIGNALLED" // a signal was given, or took something from a grant
	stepRefused     = "REFUSED"
	stepUninstalled = "UNINSTALLED"
	stepAlarm       = "ALARM"
	stepRolledBack  = "ROLLED_BACK"
	stepPanic       = "PANIC"  // every path ended at once, and none is opened
	stepLifted      = "LIFTED" // the panic
)

// States of a grant on this node.
const (
	stateActive  = "active"
	stateExpired = "expired"
	stateRevoked = "revoked"
	stateSpent   = "spent"
	stateIdle    = "idle"
	stateEnded   = "ended" // it ended with the node's boot, or was never whole
)

// actorKernel is who ended a grant whose path was found closed: whoever wrote the kernel's map did it.
const actorKernel = "kernel"

// ending is how a grant comes to its end.
type ending struct {
	grant string
	state string             // of the grant
	step  string             // of its event
	path  datapath.PathState // of its paths that are still live
	why   string
	actor string
}

// live is what the agent believes of an active grant.
type live struct {
	grant    string
	clients  []netip.Addr
	deadline time.Duration // CLOCK_BOOTTIME
	budget   datapath.Budget
	ingress  datapath.Ingress
	port     uint16 // of the client; 0: any
	cgroup   uint64 // of the client; 0: any
}

// pathPlan is what makes the kernel's paths and the active grants agree.
type pathPlan struct {
	end     []ending
	orphans []datapath.PathStatus // live in the kernel, but under no active grant
	idle    []uint32              // ended slots of grants that have ended
}

// byGrant are paths by the grants that they have. It changes the list that it is given.
func byGrant(paths []datapath.PathStatus) map[string][]datapath.PathStatus {
	out := make(map[string][]datapath.PathStatus, len(paths))
	paths = slices.DeleteFunc(paths, func(p datapath.PathStatus) bool { return p.State == datapath.PathFree })
	slices.SortStableFunc(paths, func(a, b datapath.PathStatus) int { return strings.Compare(a.Grant, b.Grant) })
	for len(paths) > 0 {
		n := slices.IndexFunc(paths, func(p datapath.PathStatus) bool { return p.Grant != paths[0].Grant })
		if n < 0 {
			n = len(paths)
		}
		out[paths[0].Grant] = paths[:n:n]
		paths = paths[n:]
	}
	return out
}

// planPaths compares the kernel's paths with the active grants. The kernel is never made to hold more than before: a grant
// whose paths are not all there, and as recorded, ends.
func planPaths(active []live, paths map[string][]datapath.PathStatus, now time.Duration) pathPlan {
	var plan pathPlan
	known := make(map[string]bool, len(active))
	for _, l := range active {
		known[l.grant] = true
		if e, over := endOf(l, paths[l.grant], now); over {
			plan.end = append(plan.end, e)
		}
	}
	for id, left := range paths {
		for _, p := range left {
			if known[id] {
				continue
			}
			if isOpen(p) {
				plan.orphans = append(plan.orphans, p)
			} else {
				plan.idle = append(plan.idle, p.Slot)
			}
		}
	}
	slices.Sort(plan.idle)
	return plan
}

// isOpen tells whether a slot admits packets, or is about to.
func isOpen(p datapath.PathStatus) bool {
	return p.State == datapath.PathActive || p.State == datapath.PathPending
}

// endOf tells whether an active grant is over, and how. What the kernel already closed comes first.
func endOf(l live, paths []datapath.PathStatus, now time.Duration) (ending, bool) {
	e := ending{grant: l.grant, actor: "agent"}
	for _, p := range paths {
		switch p.State {
		case datapath.PathRevoked:
			return e.revoked(actorKernel, fmt.Sprintf("state of slot %d was set to revoked", p.Slot)), true
		case datapath.PathSpent:
			return e.as(stateSpent, stepSpent, datapath.PathSpent, "budget is used up"), true
		case datapath.PathExpired:
			return e.as(stateExpired, stepExpired, datapath.PathExpired, "deadline"), true
		}
	}
	if now >= l.deadline {
		return e.as(stateExpired, stepExpired, datapath.PathExpired, "deadline"), true
	}
	if why := mismatch(l, paths); why != "" {
		return e.as(stateEnded, stepRevoked, datapath.PathRevoked, why), true
	}
	return ending{}, false
}

// mismatch tells what is wrong with a grant's live paths: each client has one, active, with the recorded deadline.
func mismatch(l live, paths []datapath.PathStatus) string {
	if len(paths) == 0 {
		return "no path in the kernel"
	}
	missing := slices.Clone(l.clients)
	for _, p := range paths {
		i := slices.Index(missing, p.Client)
		switch {
		case p.State != datapath.PathActive:
			return fmt.Sprintf("slot %d was never opened", p.Slot)
		case i < 0:
			return fmt.Sprintf("slot %d serves %s, which the record does not name", p.Slot, p.Client)
		case p.Deadline > l.deadline:
			return fmt.Sprintf("slot %d has a later deadline than the record", p.Slot)
		case p.Ingress != l.ingress:
			return fmt.Sprintf("slot %d is for other devices than the record", p.Slot)
		case p.ClientPort != l.port || p.Cgroup != l.cgroup:
			return fmt.Sprintf("slot %d is bound to other sockets than the record", p.Slot)
		case p.Budget != l.budget:
			return fmt.Sprintf("slot %d has another budget than the record", p.Slot)
		}
		missing = slices.Delete(missing, i, i+1)
	}
	if len(missing) > 0 {
		return fmt.Sprintf("activation was cut off: no path for %v", missing)
	}
	return ""
}

func (e ending) as(state, step string, path datapath.PathState, why string) ending {
	e.state, e.step, e.path, e.why = state, step, path, why
	return e
}

func (e ending) revoked(actor, why string) ending {
	e.actor = actor
	return e.as(stateRevoked, stepRevoked, datapath.PathRevoked, why)
}
