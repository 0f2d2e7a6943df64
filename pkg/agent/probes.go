package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// probeTerm is how long paths of probes last. New ones take over when half of it is left.
	probeTerm = time.Hour
	// probeLook is how often it is looked for what they are to be: a control group may be made anew at any time.
	probeLook = time.Second
	// probeRetry is how soon something is tried again that did not open.
	probeRetry = 10 * time.Second
	// probeRequester stands where a grant has who asked for it. No person and no workload has such a name.
	probeRequester = "(probes)"
)

// probes keeps paths open for the probes of kubelet that services list: from the addresses that the node has towards their pods, of sockets
// that were made in kubelet's control group. They are grants like others, of a kind of their own, that the agent makes of the resources.
type probes struct {
	grants   *grants
	group    func(path string) uint64                         // the kernel's number of a control group; 0: there is none
	source   func(to netip.Addr) (from netip.Addr, err error) // by which address the node talks to a pod
	problems *problems
	clock    clock
	term     time.Duration
	kick     chan struct{}
	failed   map[string]failedProbes // owned by Run; by service
}

// failedProbes is why the paths of a service did not open.
type failedProbes struct {
	at  time.Duration // CLOCK_BOOTTIME
	why error
}

// poke asks Run to look at once.
func (p *probes) poke() {
	if p == nil {
		return
	}
	select {
	case p.kick <- struct{}{}:
	default: // it has not looked yet
	}
}

// Run looks until ctx ends. The paths stay, and end on time.
func (p *probes) Run(ctx context.Context) error {
	tick := time.NewTicker(probeLook)
	defer tick.Stop()
	for {
		p.look(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-p.kick:
		}
	}
}

// look opens, renews and ends paths. What is wrong with those of a service is a problem of its own, and leaves it closed to probes.
func (p *probes) look(ctx context.Context) {
	e := p.grants.enforced()
	if e == nil {
		return
	}
	listed := make(map[string]bool)
	for _, s := range e.set.Services() {
		if s.Spec.Probes == nil || !s.Enforced() {
			continue
		}
		listed[s.Name] = true
		p.problems.report(problemKubelet, s.Name, p.serve(ctx, s, e))
	}
	for _, name := range p.grants.probing.services() {
		if !listed[name] {
			p.problems.report(problemKubelet, name, p.grants.endProbes(ctx, name, "its service lists no probes here any more"))
			listed[name] = true
		}
	}
	maps.DeleteFunc(p.failed, func(name string, _ failedProbes) bool { return !listed[name] })
	p.problems.keep(problemKubelet, func(name string) bool { return listed[name] })
}

// serve makes the paths of one service what they are to be. Where it cannot be told what, there are none.
func (p *probes) serve(ctx context.Context, s policy.ProtectedService, e *enforced) error {
	want, err := p.want(s, e)
	if err != nil {
		return errors.Join(err, p.grants.endProbes(ctx, s.Name, oneLine(err.Error())))
	}
	if len(want.Addresses) == 0 {
		return p.grants.endProbes(ctx, s.Name, "none of its pods is on this node")
	}
	now := p.clock.boot()
	if last := p.failed[s.Name]; last.why != nil && now-last.at < probeRetry {
		return last.why
	}
	err = p.grants.keepProbes(ctx, want)
	p.failed[s.Name] = failedProbes{now, err}
	return err
}

// want is what the paths of a service are to be now; without addresses, there is nothing to be probed on this node.
func (p *probes) want(s policy.ProtectedService, e *enforced) (want grant.Payload, err error) {
	cgroup := p.group(s.Spec.Probes.Cgroup)
	if cgroup == 0 {
		return want, &policy.Error{Msg: fmt.Sprintf("%s: there is no control group %s on this node: kubelet's probes go to the proxy", s.Name, s.Spec.Probes.Cgroup),
			Hint: "write into spec.probes.cgroup what kubelet's /proc/PID/cgroup has after 0::"}
	}
	row, _ := e.service(s.Name)
	now := p.clock.wall().UTC()
	want = grant.Payload{Kind: grant.Probe, Requester: probeRequester, Service: s.Name, Binding: policy.BindingWorkload, Cgroup: cgroup,
		Ports: s.Spec.Probes.Ports, NotBefore: now, NotAfter: now.Add(p.term), Duration: p.term, Reason: "probes of " + s.Spec.Probes.Cgroup, Audience: p.grants.node}
	for _, place := range row.Places() {
		if place.Ifindex == 0 {
			continue
		}
		for _, a := range place.Addresses {
			from, err := p.source(a)
			if err != nil {
				return want, fmt.Errorf("%s: %w", s.Name, err)
			}
			if !slices.Contains(want.Addresses, from) {
				want.Addresses = append(want.Addresses, from)
			}
		}
	}
	slices.SortFunc(want.Addresses, netip.Addr.Compare)
	return want, nil
}

// routeSource is the address that a socket of the node gets towards another one.
func routeSource(to netip.Addr) (netip.Addr, error) {
	routes, err := netlink.RouteGet(to.AsSlice())
	if err != nil || len(routes) == 0 || routes[0].Type != unix.RTN_UNICAST {
		return netip.Addr{}, errors.Join(fmt.Errorf("no route of the node leads to %s", to), err)
	}
	from, ok := netip.AddrFromSlice(routes[0].Src)
	if !ok {
		return netip.Addr{}, fmt.Errorf("the node has no address towards %s", to)
	}
	return from.Unmap(), nil
}

// isProbe tells whether the grant is one that the agent made of a service's probes.
func (h *held) isProbe() bool { return h.payload.Kind == grant.Probe }

// unlisted tells why the resources do not list these probes any more; empty: they do.
func (h *held) unlisted(set *policy.Set, row datapath.Service) string {
	s, ok := set.Service(h.payload.Service)
	lists := ok && s.Enforced() && s.Spec.Probes != nil && !slices.ContainsFunc(h.payload.Ports, func(port uint16) bool { return !slices.Contains(s.Spec.Probes.Ports, port) })
	if !lists || h.service.ID != row.ID {
		return fmt.Sprintf("the probes of service %s are not what they were", h.payload.Service)
	}
	return ""
}

// keepProbes opens what is wanted unless it is open, and ends what else is open for the service. Paths that end soon are followed by others,
// which take the new connections: those that are under way go on.
func (g *grants) keepProbes(ctx context.Context, want grant.Payload) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	var last *held
	var errs []error
	for _, h := range g.probing.of(want.Service) {
		switch {
		case h.over != nil:
		case !sameProbes(h.payload, want):
			errs = append(errs, g.endProbe(ctx, h, "what is to be probed, by whom or from where is not what it was"))
		case last == nil || h.row.DeadlineBoot > last.row.DeadlineBoot:
			last = h
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if last != nil && last.row.DeadlineBoot-g.clock.boot() > want.Duration/2 {
		return nil
	}
	return g.openProbes(ctx, want, last)
}

func sameProbes(a, b grant.Payload) bool {
	return a.Cgroup == b.Cgroup && slices.Equal(a.Ports, b.Ports) && slices.Equal(a.Addresses, b.Addresses)
}

// endProbes ends all that is open for the probes of a service.
func (g *grants) endProbes(ctx context.Context, service, why string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	var errs []error
	for _, h := range g.probing.of(service) {
		if h.over == nil {
			errs = append(errs, g.endProbe(ctx, h, why))
		}
	}
	return errors.Join(errs...)
}

// endProbe closes; a record that the disk does not take is written by a tick. g.mu is held.
func (g *grants) endProbe(ctx context.Context, h *held, why string) error {
	err := g.end(ctx, h, ending{grant: h.row.ID}.revoked("agent", inShort(why)))
	if errors.Is(err, errNotRecorded) {
		return nil
	}
	return err
}

// openProbes records and opens paths, in the order of every activation; last, if there is one, has those that they follow. g.mu is held.
func (g *grants) openProbes(ctx context.Context, want grant.Payload, last *held) error {
	payload, err := want.Named(g.clock.wall())
	if err != nil {
		return err
	}
	a := &activation{ask: &wanted{payload: payload}, actor: "agent"}
	if last != nil {
		a.after = last.row.ID
	}
	for _, step := range []activationStep{{"list", g.listProbes}, {"record", g.record}, {"map", g.openPaths}, {"note slots", g.noteSlots}} {
		if err := step.do(ctx, a); err != nil {
			if a.recorded {
				g.abandon(ctx, a, err)
			}
			return fmt.Errorf("open paths for the probes of %s: %w", want.Service, err)
		}
	}
	g.events.count(stepActivated)
	g.log.Info("probes open", "grant", a.held.row.ID, "service", want.Service, "cgroup", want.Cgroup, "deadline", a.held.row.Deadline)
	g.recorded()
	a.held.forget()
	return nil
}

// listProbes is the first step for what the resources list: they vouch for it, and nobody has to sign or ask.
func (g *grants) listProbes(_ context.Context, a *activation) (err error) {
	if err := g.refusePanic(); err != nil {
		return err
	}
	e := g.enforced()
	if e == nil {
		return ErrNoResources
	}
	p := a.ask.payload
	row, _ := e.service(p.Service)
	a.verified = grant.Proven(p, "resources:"+e.verified.Digest())
	a.held = &held{payload: p, service: row}
	if why := a.held.unlisted(e.set, row); why != "" {
		return errors.New(why)
	}
	for _, c := range a.held.clients() {
		for _, h := range g.serving[c] {
			if h.row.ID != a.after && h.inTheWayOf(a.held) {
				return fmt.Errorf("%w: %s", ErrOverlap, h.row.ID)
			}
		}
	}
	now, boot := g.clock.read()
	a.held.row, err = g.newRow(a, policy.Allowance{}, now, boot)
	return err
}

// probing are the active grants of probes. Safe for concurrent use; the zero value is empty.
type probing struct {
	mu     sync.Mutex
	active map[string][]*held // guarded by mu; by service
	ids    map[string]bool    // guarded by mu
}

func (p *probing) take(h *held) {
	if !h.isProbe() {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.active == nil {
		p.active, p.ids = make(map[string][]*held), make(map[string]bool)
	}
	if !p.ids[h.row.ID] {
		p.active[h.payload.Service] = append(p.active[h.payload.Service], h)
		p.ids[h.row.ID] = true
	}
}

func (p *probing) drop(h *held) {
	if !h.isProbe() {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.ids, h.row.ID)
	name := h.payload.Service
	if p.active[name] = slices.DeleteFunc(p.active[name], func(o *held) bool { return o == h }); len(p.active[name]) == 0 {
		delete(p.active, name)
	}
}

// has tells whether a grant is one of probes.
func (p *probing) has(grant string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ids[grant]
}

func (p *probing) of(service string) []*held {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.active[service])
}

func (p *probing) services() (names []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name := range p.active {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
