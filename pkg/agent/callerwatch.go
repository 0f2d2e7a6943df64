package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/identity"
)

// nanosInTick is the unit of a process's start in proc(5), on every architecture.
const nanosInTick = 10 * time.Millisecond

// workloadKey names a workload for as long as the node is up: none of its parts is ever given to another one. A number of a process is,
// but not with the same start.
type workloadKey struct {
	pod   string // UID, with the control group that is the pod's
	top   string
	group uint64

	pid     int32
	started uint64 // in clock ticks after boot
	as      account
}

// account is what a process is at work as: its effective user and group.
type account struct{ user, group uint32 }

// attended is a workload of which a broker tells the identity, from its first connection until it ends.
type attended struct {
	key   workloadKey
	pin   *identity.Pin // nil of a pod
	stop  context.CancelFunc
	first chan struct{} // closed when the broker has said something

	mu    sync.Mutex
	heard bool          // guarded by mu; first is closed
	id    string        // guarded by mu; the latest
	lost  time.Duration // guarded by mu; boot time since which it is no more its own; 0: it is
	why   string        // guarded by mu; it has none

	svids, before []*x509svid.SVID // guarded by mu; with their keys: those that it has, and those that these took the place of
	denied        bool             // guarded by mu; by the broker's word it has none
}

// attend gives the workload's watch and begins it if there is none. Without one it says why.
func (c *openers) attend(key workloadKey) (a *attended, why string) {
	c.endChanged(key)
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.workloads[key] != nil:
		return c.workloads[key], ""
	case c.broker == nil || c.ctx == nil:
		return nil, whyNoBroker
	case len(c.workloads) >= keptWorkloads:
		return nil, whyTooMany
	case key.pod != "" && key.group == 0:
		return nil, whyEnded
	}
	a = &attended{key: key, first: make(chan struct{}), why: whyNotYet}
	if key.pid != 0 {
		if a.pin, why = pinned(key); why != "" {
			return nil, why
		}
	}
	if c.workloads == nil {
		c.workloads = make(map[workloadKey]*attended)
	}
	c.workloads[key] = a
	ctx, stop := context.WithCancel(c.ctx)
	a.stop = stop
	c.running.Go(func() { c.watch(ctx, a) })
	return a, ""
}

// endChanged ends the watch of a process that has become another one, by running another program: what connects from now on is not what
// was attested, and sweep may not have seen that yet.
func (c *openers) endChanged(key workloadKey) {
	c.mu.Lock()
	a := c.workloads[key]
	c.mu.Unlock()
	if a != nil && a.pin != nil && errors.Is(a.pin.Check(), identity.ErrBecameAnother) {
		c.end(a)
	}
}

// pinned holds on to the process that the kernel saw, and to none that has its number since.
func pinned(key workloadKey) (*identity.Pin, string) {
	pin, err := identity.NewPin(key.pid)
	if errors.Is(err, identity.ErrEnded) {
		return nil, whyEnded
	}
	if err != nil {
		return nil, oneLine(err.Error())
	}
	started, err := startOf(key.pid)
	if err != nil || started != key.started || pin.Check() != nil { // the start is the pinned one's if it is alive now
		_ = pin.Close()
		return nil, whyEnded
	}
	if as, err := accountOf(key.pid); err != nil || as != key.as { // a set-user-ID program, perhaps, while a child has the connection
		_ = pin.Close()
		return nil, whyUser
	}
	return pin, ""
}

// accountOf reads what the process is at work as that has a number now (proc(5), status).
func accountOf(pid int32) (as account, err error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return account{}, fmt.Errorf("look at process %d: %w", pid, err)
	}
	for line := range strings.Lines(string(status)) {
		var own uint32 // the real one, which says nothing
		switch {
		case strings.HasPrefix(line, "Uid:"):
			_, err = fmt.Sscanf(line, "Uid: %d %d", &own, &as.user)
		case strings.HasPrefix(line, "Gid:"):
			_, err = fmt.Sscanf(line, "Gid: %d %d", &own, &as.group)
		}
		if err != nil {
			return account{}, fmt.Errorf("look at process %d: read %q: %w", pid, line, err)
		}
	}
	return as, nil
}

// startOf reads when the process began that has a number now (proc(5), starttime).
func startOf(pid int32) (uint64, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("look at process %d: %w", pid, err)
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:])) // the name may hold anything
	if len(fields) < 20 {
		return 0, fmt.Errorf("look at process %d: %d fields in its stat", pid, len(fields))
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// Pauses before a workload is watched again whose watch has failed, from the first on.
const (
	watchAgain     = time.Second
	watchAgainMost = time.Minute
)

// watch follows what the broker says of a workload, for as long as it is the same. What a watch fails of may pass, as when no
// descriptor was left: it is begun again.
func (c *openers) watch(ctx context.Context, a *attended) {
	for pause := watchAgain; ; pause = min(2*pause, watchAgainMost) {
		err := c.broker.Watch(ctx, identity.Workload{PodUID: a.key.pod, PID: a.key.pid}, func(told identity.Attested) {
			if !c.isStill(a) {
				c.end(a)
				return
			}
			a.hear(told, c.boot())
		})
		switch {
		case ctx.Err() != nil:
			return
		case errors.Is(err, identity.ErrEnded):
			c.end(a)
			return
		case err != nil:
			a.lose(c.boot(), oneLine(err.Error()))
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
	}
}

// isStill tells whether it is the workload that was meant: the broker asks by a number of a process, which can be another's.
func (c *openers) isStill(a *attended) bool {
	if a.pin != nil {
		return a.pin.Check() == nil
	}
	return c.groups.is(a.key.top, a.key.group)
}

// end forgets a workload. What it was is still known to its connections.
func (c *openers) end(a *attended) {
	c.mu.Lock()
	if c.workloads[a.key] == a {
		delete(c.workloads, a.key)
	}
	c.mu.Unlock()
	a.stop()
	a.lose(c.boot(), whyEnded)
	if a.pin != nil {
		_ = a.pin.Close()
	}
}

// sweep ends what has ended, and has addresses looked at anew.
func (c *openers) sweep() {
	c.mu.Lock()
	c.known = nil
	var all []*attended
	for _, a := range c.workloads {
		all = append(all, a)
	}
	c.mu.Unlock()
	for _, a := range all {
		if !c.isStill(a) {
			c.end(a)
		}
	}
}

// stop ends all watches.
func (c *openers) stop() {
	c.mu.Lock()
	c.ctx = nil
	var all []*attended
	for _, a := range c.workloads {
		all = append(all, a)
	}
	c.mu.Unlock()
	for _, a := range all {
		c.end(a)
	}
	c.running.Wait()
}

func (a *attended) hear(told identity.Attested, now time.Duration) {
	if len(told.IDs) == 0 {
		why := "its identity is " + string(told.State)
		if told.Err != nil {
			why += ": " + oneLine(told.Err.Error())
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		a.gone(now, why)
		if told.State != identity.Unreachable { // that is no word about it
			a.denied = true
			a.say()
		}
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.id, a.lost, a.why, a.denied = told.IDs[0].String(), 0, "", false
	if !slices.EqualFunc(a.svids, told.SVIDs, sameLeaf) {
		a.before = a.svids
	}
	a.svids = told.SVIDs
	a.say()
}

func (a *attended) lose(now time.Duration, why string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.gone(now, why)
	a.say()
}

func sameLeaf(a, b *x509svid.SVID) bool { return a.Certificates[0].Equal(b.Certificates[0]) }

// gone notes since when it has no identity, and forgets the keys. a.mu is held.
func (a *attended) gone(now time.Duration, why string) {
	a.svids, a.before = nil, nil
	if a.lost == 0 {
		a.lost = now
	}
	a.why = why
}

// say wakes those who wait for the broker's first word. a.mu is held.
func (a *attended) say() {
	if !a.heard {
		a.heard = true
		close(a.first)
	}
}

// at is the identity that the workload had at some time since a connection of it began.
func (a *attended) at(began time.Duration) (id, why string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.id != "" && (a.lost == 0 || a.lost >= began) {
		return a.id, ""
	}
	return "", a.why
}

// now is the identity that it has.
func (a *attended) now() (id, why string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.lost != 0 {
		return "", a.why
	}
	return a.id, a.why
}

// who tells whose a connection is that is open now, and what it was found by, if anything. It waits for the first word of a broker,
// and not long.
func (c *openers) who(ctx context.Context, client, server netip.AddrPort) (*called, *flow.Workload) {
	found, w := c.find(client, server, c.boot())
	if found == nil {
		return nil, w
	}
	told := found.workload
	a := found.attended
	if a == nil {
		return found, &told
	}
	ctx, cancel := context.WithTimeout(ctx, firstWord)
	defer cancel()
	select {
	case <-a.first:
	case <-ctx.Done():
	}
	if !c.isStill(a) {
		told.Why = whyEnded
		return found, &told
	}
	told.Identity, told.Why = a.now()
	return found, &told
}

// tallies counts the connections of this node.
func (c *openers) tallies() (attested, unattested uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.attested, c.unattested
}
