package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"golang.org/x/sys/unix"
)

const (
	// canaryEvery is how often each enforced port is tried.
	canaryEvery = time.Minute
	// canaryPatience bounds one connection: a port whose proxy is dead says nothing.
	canaryPatience = time.Second
	// canaryWide is how many connections are tried at a time.
	canaryWide = 8
	// canaryLinger is for how long a record of a canary's connection may come after it: the proxy holds equal denials back for a while.
	canaryLinger = 15 * time.Second
)

// What a canary saw of a port.
const (
	canaryClosed  = "closed"  // the kernel steered it, and nobody answered its bytes
	canaryOpen    = "open"    // it was not steered, or somebody answered
	canaryUnknown = "unknown" // it could not be tried
)

// canaries connect to every enforced TCP port as any process of the node could, without a proof of who they are. That a connection
// comes about proves nothing, since the proxy answers. The kernel is asked whether it steered this very connection; only then is a byte
// written, which is no TLS and must be reset. So nothing of a canary reaches the service, not even where enforcement fails.
type canaries struct {
	enforced func() *enforced
	steered  func(client, server netip.AddrPort) (bool, error)
	paths    func() ([]datapath.PathStatus, error)
	problems *problems
	alarm    func(alarmName, string)
	clock    clock
	changed  func() // is told when something is open, and when nothing is any more; nil: nobody asks

	rounds sync.Mutex // one at a time
	mu     sync.Mutex
	seen   map[canaryTarget]canaryResult // guarded by mu; of targets of the latest round
	flows  map[canaryFlow]time.Duration  // guarded by mu; boot time until which their records are ours
}

// canaryTarget is one port of a service at one address.
type canaryTarget struct {
	service string
	at      netip.AddrPort
}

// canaryResult is what was seen of a target, and when it was last proven to be closed: boot time, 0 if it never was.
type canaryResult struct {
	state, why string
	closed     time.Duration
}

type canaryFlow struct{ client, server netip.AddrPort }

// served is a client's address that a path serves.
type served struct {
	client  netip.Addr
	service string
}

// errServed says that a canary would take somebody's path: it is let through there, and counts against its budget.
var errServed = errors.New("a grant's path serves the address that it would come from")

// Run tries all targets once a minute until ctx ends. The first round comes after a minute: readiness has crossed the hooks by then.
func (c *canaries) Run(ctx context.Context) error {
	tick := time.NewTicker(canaryEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			_ = c.round(ctx) // only that ctx ended
		}
	}
}

// round tries every target once and tells what it saw. It fails if ctx ends.
func (c *canaries) round(ctx context.Context) error {
	c.rounds.Lock()
	defer c.rounds.Unlock()
	results := c.tryAll(ctx, c.targets())
	open := slices.DeleteFunc(slices.Collect(maps.Keys(results)), func(t canaryTarget) bool { return results[t].state != canaryOpen })
	maps.Copy(results, c.tryAll(ctx, open)) // it may have been opened by who may while it was tried
	enforced := map[canaryTarget]bool{}
	for _, t := range c.targets() {
		enforced[t] = true
	}
	maps.DeleteFunc(results, func(t canaryTarget, _ canaryResult) bool { return !enforced[t] })
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("try enforced ports: %w", err)
	}
	was := c.open()
	c.tell(results)
	if now := c.open(); c.changed != nil && (was == nil) != (now == nil) {
		c.changed()
	}
	return nil
}

func (c *canaries) targets() []canaryTarget { return canaryTargets(inForce(c.enforced().services)) }

// tryAll tries a few targets at a time.
func (c *canaries) tryAll(ctx context.Context, targets []canaryTarget) map[canaryTarget]canaryResult {
	results := make(map[canaryTarget]canaryResult, len(targets))
	open, err := c.served()
	if err != nil {
		for _, t := range targets {
			results[t] = canaryResult{state: canaryUnknown, why: err.Error()}
		}
		return results
	}
	var mu sync.Mutex
	var trying sync.WaitGroup
	places := make(chan struct{}, canaryWide)
	for _, t := range targets {
		places <- struct{}{}
		trying.Go(func() {
			defer func() { <-places }()
			r := c.try(ctx, t, open)
			mu.Lock()
			defer mu.Unlock()
			results[t] = r
		})
	}
	trying.Wait()
	return results
}

// served lists whom paths serve now.
func (c *canaries) served() (map[served]bool, error) {
	paths, err := c.paths()
	if err != nil {
		return nil, fmt.Errorf("read paths: %w", err)
	}
	all := map[served]bool{}
	for _, p := range paths {
		if isOpen(p) && p.ClientPort == 0 && p.Cgroup == 0 { // others serve certain sockets alone
			all[served{p.Client, p.Service}] = true
		}
	}
	return all, nil
}

// tell keeps the results, and raises an alarm for what is open.
func (c *canaries) tell(results map[canaryTarget]canaryResult) {
	now := c.clock.boot()
	c.mu.Lock()
	for t, r := range results {
		if r.state == canaryClosed {
			r.closed = now
		} else {
			r.closed = c.seen[t].closed
		}
		results[t] = r
	}
	c.seen = results
	maps.DeleteFunc(c.flows, func(_ canaryFlow, until time.Duration) bool { return until < now })
	c.mu.Unlock()
	errs := map[string][]error{}
	for _, t := range slices.SortedFunc(maps.Keys(results), compareTargets) {
		r := results[t]
		if r.state == canaryClosed {
			continue
		}
		errs[t.service] = append(errs[t.service], fmt.Errorf("a canary saw %s %s: %s", t.at, r.state, r.why))
		if r.state == canaryOpen {
			c.alarm(alarmCanary, fmt.Sprintf("%s of %s is open to who proves nothing: %s", t.at, t.service, r.why))
		}
	}
	c.problems.keep(problemCanary, func(service string) bool { return errs[service] != nil })
	for service, all := range errs {
		c.problems.report(problemCanary, service, errors.Join(all...))
	}
}

// latest gives what was seen of each target, in order.
func (c *canaries) latest() iter.Seq2[canaryTarget, canaryResult] {
	return func(yield func(canaryTarget, canaryResult) bool) {
		c.mu.Lock()
		seen := maps.Clone(c.seen)
		c.mu.Unlock()
		for _, t := range slices.SortedFunc(maps.Keys(seen), compareTargets) {
			if !yield(t, seen[t]) {
				return
			}
		}
	}
}

func compareTargets(a, b canaryTarget) int {
	return cmp.Or(cmp.Compare(a.service, b.service), a.at.Compare(b.at))
}

// canaryTargets are all ports of enforced TCP services: of the host at loopback, of pods at each of their addresses.
func canaryTargets(services []datapath.Service) []canaryTarget {
	var all []canaryTarget
	for _, s := range services {
		if s.Protocol == datapath.UDP {
			continue
		}
		for _, a := range probeAddresses(s) {
			for _, p := range s.Ports {
				all = append(all, canaryTarget{s.Name, netip.AddrPortFrom(a, p)})
			}
		}
	}
	return all
}

// try connects, and writes where the kernel says that it is the proxy that hears it.
func (c *canaries) try(ctx context.Context, t canaryTarget, open map[served]bool) canaryResult {
	to := t.at
	ctx, cancel := context.WithTimeout(ctx, canaryPatience)
	defer cancel()
	var from netip.AddrPort
	dialer := net.Dialer{ControlContext: func(_ context.Context, _, _ string, raw syscall.RawConn) error {
		source, err := canarySource(to)
		if err == nil && open[served{source, t.service}] {
			err = errServed
		}
		if err == nil {
			from, err = bindTo(raw, source)
		}
		if err == nil {
			c.expect(from, to)
		}
		return err
	}}
	dialer.SetMultipathTCP(false)
	conn, dialErr := dialer.DialContext(ctx, "tcp", to.String())
	if conn != nil {
		defer conn.Close()
	}
	if !from.IsValid() {
		return canaryResult{state: canaryUnknown, why: fmt.Sprintf("it was not sent: %v", dialErr)}
	}
	steered, err := c.steered(from, to)
	switch {
	case err != nil:
		return canaryResult{state: canaryUnknown, why: err.Error()}
	case !steered && conn != nil:
		return canaryResult{state: canaryOpen, why: "a connection came about that no hook had steered"}
	case !steered && errors.Is(dialErr, syscall.ECONNREFUSED):
		return canaryResult{state: canaryOpen, why: "its SYN was steered by no hook; nothing listens there"}
	case !steered:
		return canaryResult{state: canaryUnknown, why: fmt.Sprintf("its SYN met no hook that steers: %v", dialErr)}
	case conn == nil:
		return canaryResult{state: canaryClosed, why: "steered, and no proxy answered"}
	}
	return answered(ctx, conn)
}

// canaryPeep is no TLS, and the beginning of no request.
var canaryPeep = []byte{'\n'}

// answered holds the proxy to a reset without a byte.
func answered(ctx context.Context, conn net.Conn) canaryResult {
	deadline, _ := ctx.Deadline()
	_ = conn.SetDeadline(deadline) // it has one: the read tells if it does not
	if _, err := conn.Write(canaryPeep); err != nil {
		return canaryResult{state: canaryClosed, why: "refused before its first byte"}
	}
	n, err := io.ReadFull(conn, make([]byte, 1))
	switch {
	case n > 0:
		return canaryResult{state: canaryOpen, why: "bytes that are no TLS were answered"}
	case errors.Is(err, syscall.ECONNRESET):
		return canaryResult{state: canaryClosed, why: "bytes that are no TLS were reset"}
	}
	return canaryResult{state: canaryUnknown, why: fmt.Sprintf("bytes that are no TLS were not reset: %v", err)}
}

// canarySource is where a canary comes from. On loopback it is an address that others hardly use, so that the proxy's records of it
// are not joined with those of others.
// Elsewhere it is the kernel's choice, which a datagram socket tells: to connect that sends nothing.
func canarySource(to netip.AddrPort) (netip.Addr, error) {
	if to.Addr().IsLoopback() && to.Addr().Is4() {
		return netip.AddrFrom4([4]byte{127, 83, 80, 1}), nil
	}
	conn, err := net.Dial("udp", to.String())
	if err != nil {
		return netip.Addr{}, err
	}
	defer conn.Close()
	return conn.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap(), nil
}

// bindTo gives the socket address and port before it connects: whatever becomes of it, its tuple is known.
func bindTo(raw syscall.RawConn, source netip.Addr) (netip.AddrPort, error) {
	var bound unix.Sockaddr
	var err error
	controlled := raw.Control(func(fd uintptr) {
		if err = unix.Bind(int(fd), sockaddr(netip.AddrPortFrom(source, 0))); err == nil {
			bound, err = unix.Getsockname(int(fd))
		}
	})
	if err := errors.Join(controlled, err); err != nil {
		return netip.AddrPort{}, fmt.Errorf("bind: %w", err)
	}
	return fromSockaddr(bound), nil
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

func fromSockaddr(s unix.Sockaddr) netip.AddrPort {
	switch a := s.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port))
	}
	return netip.AddrPort{}
}

// expect notes a connection whose record is not somebody's attempt.
func (c *canaries) expect(from, to netip.AddrPort) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.flows[canaryFlow{from, to}] = c.clock.boot() + canaryLinger
}

// mark tells a canary's denial from others' in the trail, of which it is the Detail that says so. One that the proxy joined with others' is theirs.
func (c *canaries) mark(rec flow.Record) (flow.Record, bool) {
	if c == nil || rec.Count > 1 || rec.Reason != flow.ReasonNoTLS {
		return rec, false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	until, ours := c.flows[canaryFlow{rec.Client, rec.Server}]
	if !ours || c.clock.boot() > until {
		return rec, false
	}
	rec.Detail = oneLine("canary: " + rec.Detail)
	return rec, true
}

// open says which targets are not closed, by a canary's word; nil: none.
func (c *canaries) open() error {
	var errs []error
	for t, r := range c.latest() {
		if r.state == canaryOpen {
			errs = append(errs, fmt.Errorf("a canary saw %s of %s open: %s", t.at, t.service, r.why))
		}
	}
	return errors.Join(errs...)
}

// coverage is what canaries know of a service: the worst state of its ports, and the boot time of the oldest of their latest proofs.
type coverage struct {
	state, why string
	closed     time.Duration // 0: one of them was never proven
}

var canaryWorse = map[string]int{canaryClosed: 1, canaryUnknown: 2, canaryOpen: 3}

// coverage tells of every enforced TCP service, also of those that were not tried.
func (c *canaries) coverage() map[string]coverage {
	all := map[string]coverage{}
	for t, r := range c.latest() {
		have, ok := all[t.service]
		if !ok {
			have = coverage{closed: r.closed}
		}
		have.closed = min(have.closed, r.closed)
		if canaryWorse[r.state] > canaryWorse[have.state] {
			have.state, have.why = r.state, r.why
		}
		all[t.service] = have
	}
	if e := c.enforced(); e != nil {
		for _, s := range inForce(e.services) {
			if _, tried := all[s.Name]; !tried && s.Protocol != datapath.UDP && s.Target != datapath.TargetRemote {
				all[s.Name] = coverage{state: canaryUnknown, why: "not tried yet"}
			}
		}
	}
	return all
}
