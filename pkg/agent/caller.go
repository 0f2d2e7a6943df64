package agent

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/identity"
)

// Whys of callers that are not attested.
const (
	whyNoSocket  = "no socket of this node is known to have sent its SYN"
	whyLater     = "another connection from there has begun since"
	whyUnseen    = "the beginning of its connection was not seen"
	whyNoSYN     = "the packet that was refused opened nothing: it proves no socket"
	whyDatagrams = "whose a datagram is cannot be told"
	whyUnknown   = "its control group is not known"
	whyPassed    = "its socket was made in another control group than that of the process that connected it"
	whyUser      = "the process works as another user or group than when it connected"
	whyNoProcess = "it is not known which process connected it"
	whyInfra     = "it is in a pod's control group and in none of its containers"
	whyEnded     = "it had ended before it was asked about"
	whyNotYet    = "its identity is not known yet"
	whyNoBroker  = "nobody is configured to tell the identities of workloads (spec.workloads)"
	whyTooMany   = "too many workloads are attested at once"
)

// Bounds of what is kept about callers.
const (
	keptFlows     = 65536 // in each of two generations
	keptWorkloads = 4096
	keptNear      = 4096
	lookAtCallers = time.Second
	firstWord     = 2 * time.Second // how long the proxy's question waits for a broker's
	openSlack     = time.Second     // between a hook's decision and the time of its record
)

// openers tells whose socket a connection of this node comes from: by what the socket said of itself in the kernel when it sent its
// SYN, and by nothing that can be chosen by others, such as an address. It keeps what it has found for as long as records of
// the connection may come. Safe for concurrent use.
type openers struct {
	opened func(client, server netip.AddrPort) (datapath.Caller, error)
	near   func(netip.Addr) bool // is it an address of the node, or of a pod on it?
	groups *cgroups
	broker identity.Broker // nil: nobody tells identities
	boot   func() time.Duration

	mu                   sync.Mutex
	flows                [2]map[flowName]*called   // guarded by mu; younger first
	workloads            map[workloadKey]*attended // guarded by mu
	known                map[netip.Addr]bool       // guarded by mu; near, for a moment
	attested, unattested uint64                    // guarded by mu; connections of this node
	ctx                  context.Context           // guarded by mu; of Run, nil before it
	running              sync.WaitGroup            // watches
}

// flowName is a flow's id and who gave it.
type flowName struct{ source, id string }

// called is whose a connection is.
type called struct {
	workload flow.Workload
	began    time.Duration
	attended *attended // nil: nobody is asked for its identity
	counted  bool      // guarded by openers.mu, as the identity in workload
}

// Run keeps up with the ends of workloads until ctx ends.
func (c *openers) Run(ctx context.Context) error {
	c.mu.Lock()
	c.ctx = ctx
	c.mu.Unlock()
	defer c.stop()
	tick := time.NewTicker(lookAtCallers)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			c.sweep()
		}
	}
}

// complete fills in the caller of a record, as far as it is proven. It never waits for anybody.
func (c *openers) complete(source string, rec flow.Record) flow.Record {
	if c == nil {
		return rec
	}
	name := flowName{source, rec.FlowID}
	if found := c.remembered(name); found != nil {
		last := rec.Event == flow.EventClose
		if last {
			c.forget(name)
		}
		rec.Caller = c.describe(found, last)
		return rec
	}
	rec.Caller = c.ofRecord(source, rec)
	return rec
}

// ofRecord finds the caller of a connection of which this is the first record.
func (c *openers) ofRecord(source string, rec flow.Record) *flow.Workload {
	why := ""
	switch {
	case rec.Event == flow.EventWatched || rec.Event == flow.EventBackstop || rec.Client.Port() == 0:
		return nil
	case rec.Protocol != datapath.TCP.String():
		why = whyDatagrams
	case rec.Event == flow.EventOpen || rec.Event == flow.EventUpdate:
	case source == sourceProxy && rec.Event == flow.EventDeny:
	case rec.Reason == flow.ReasonLegsFull:
	case rec.Event == flow.EventDeny:
		why = whyNoSYN
	default:
		why = whyUnseen
	}
	if why != "" {
		return c.unproven(rec.Client.Addr(), why)
	}
	found, w := c.find(rec.Client, rec.Server, rec.Boot)
	if found == nil {
		return w
	}
	if source == sourceKernel && rec.Event == flow.EventOpen && rec.Boot-found.began > openSlack {
		return c.unproven(rec.Client.Addr(), whyNoSocket)
	}
	last := rec.FlowID == "" || rec.Event == flow.EventDeny
	if !last {
		c.remember(flowName{source, rec.FlowID}, found)
	}
	return c.describe(found, last)
}

// find looks a connection up that had begun at a time. Without a caller it says why there is none; nothing at all of a client that is
// elsewhere.
func (c *openers) find(client, server netip.AddrPort, at time.Duration) (*called, *flow.Workload) {
	from, err := c.opened(client, server)
	switch {
	case errors.Is(err, datapath.ErrNoCaller):
		return nil, c.unproven(client.Addr(), whyNoSocket)
	case err != nil:
		return nil, c.unproven(client.Addr(), oneLine(err.Error()))
	case from.Taken > at:
		return nil, c.unproven(client.Addr(), whyLater)
	}
	return c.identify(from), nil
}

// unproven is the caller of whom nothing is known, of a client on this node.
func (c *openers) unproven(client netip.Addr, why string) *flow.Workload {
	if !c.isNear(client) {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.count(false)
	return &flow.Workload{Why: why}
}

// identify completes what the kernel says of a socket. A pod is told by the group that the socket was made in; on the node itself it is
// the process that counts.
func (c *openers) identify(from datapath.Caller) *called {
	found := &called{began: from.Taken, workload: flow.Workload{Cgroup: from.Cgroup}}
	path, known := c.groups.path(from.Cgroup)
	in := containerOf(path)
	w := &found.workload
	w.Pod, w.Container = in.pod, in.id
	if in.pod == "" && !in.infra {
		w.PID, w.Started = from.PID, uint64(from.Started/nanosInTick)
	}
	switch {
	case !known:
		w.Why = whyUnknown
	case in.infra:
		w.Why = whyInfra
	case c.wasPassed(from, in.pod):
		w.Why = whyPassed
	case in.pod != "":
		found.attended, w.Why = c.attend(workloadKey{pod: in.pod, top: in.top, group: c.groups.number(in.top)})
	case from.PID == 0:
		w.Why = whyNoProcess
	default:
		found.attended, w.Why = c.attend(workloadKey{pid: w.PID, started: w.Started, as: account{from.User, from.Group}})
	}
	return found
}

// wasPassed tells whether a process connected a socket that was made elsewhere: in another pod, or of the node's in another group.
func (c *openers) wasPassed(from datapath.Caller, pod string) bool {
	if from.PID == 0 || from.ProcessCgroup == from.Cgroup {
		return false
	}
	path, _ := c.groups.path(from.ProcessCgroup)
	return pod == "" || containerOf(path).pod != pod
}

// describe gives what a record says. An identity that was once told of a connection stays that of all its records; the last one counts it.
func (c *openers) describe(found *called, last bool) *flow.Workload {
	c.mu.Lock()
	defer c.mu.Unlock()
	w := &found.workload
	if w.Identity == "" && found.attended != nil {
		w.Identity, w.Why = found.attended.at(found.began)
	}
	if !found.counted && (last || w.Identity != "" || found.attended == nil) {
		found.counted = true
		c.count(w.Identity != "")
	}
	told := *w
	return &told
}

func (c *openers) remembered(name flowName) *called {
	if name.id == "" {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if found := c.flows[0][name]; found != nil {
		return found
	}
	found := c.flows[1][name]
	if found != nil {
		delete(c.flows[1], name)
		c.keep(name, found)
	}
	return found
}

func (c *openers) remember(name flowName, found *called) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.keep(name, found)
}

// keep has what is not asked for give way: connections whose end nobody told. c.mu is held.
func (c *openers) keep(name flowName, found *called) {
	if c.flows[0] == nil || len(c.flows[0]) >= keptFlows {
		c.flows[0], c.flows[1] = make(map[flowName]*called), c.flows[0]
	}
	c.flows[0][name] = found
}

func (c *openers) forget(name flowName) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.flows[0], name)
	delete(c.flows[1], name)
}

// isNear remembers its answers until the next look.
func (c *openers) isNear(a netip.Addr) bool {
	c.mu.Lock()
	near, known := c.known[a]
	c.mu.Unlock()
	if known {
		return near
	}
	near = c.near(a)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.known == nil || len(c.known) >= keptNear {
		c.known = make(map[netip.Addr]bool)
	}
	c.known[a] = near
	return near
}

// count counts a connection of this node. c.mu is held.
func (c *openers) count(attested bool) {
	if attested {
		c.attested++
	} else {
		c.unattested++
	}
}
