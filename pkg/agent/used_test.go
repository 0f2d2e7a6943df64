package agent

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/test/lab"
)

func TestSuggest(t *testing.T) {
	a, b := netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("10.1.0.3")
	some := spent{Bytes: 10_000, Packets: 20, Flows: 2}
	two := []netip.Addr{a, b}
	fits := grant.Payload{Addresses: []netip.Addr{a}, Budget: policy.Budget{Bytes: 15 << 10, Connections: 4}}
	for _, c := range []struct {
		name    string
		granted time.Duration
		active  bool
		payload grant.Payload
		use     use
		want    []string // field, granted, suggested
	}{
		{"never used", time.Hour, false, fits, use{}, []string{"", "", ""}},
		{"it fits", 12 * time.Minute, false, fits, use{Last: 9 * time.Minute, Clients: map[netip.Addr]spent{a: some}}, nil},
		{"too long", time.Hour, false, fits, use{Last: 9 * time.Minute, Clients: map[netip.Addr]spent{a: some}}, []string{"duration", "1h", "15m"}},
		{"a second of a day", 24 * time.Hour, false, fits, use{Last: time.Second, Clients: map[netip.Addr]spent{a: some}}, []string{"duration", "24h", "1m"}},
		{"not over", time.Hour, true, fits, use{Last: 9 * time.Minute, Clients: map[netip.Addr]spent{a: some}}, nil},
		{"no limit of bytes", time.Minute, false, grant.Payload{Addresses: []netip.Addr{a}, Budget: policy.Budget{Connections: 4}},
			use{Last: time.Minute, Clients: map[netip.Addr]spent{a: some}}, []string{"budget.bytes", "no limit", "15KiB"}},
		{"too many connections", time.Minute, false, grant.Payload{Addresses: []netip.Addr{a}, Budget: policy.Budget{Bytes: 1 << 10, Connections: 50}},
			use{Last: time.Minute, Clients: map[netip.Addr]spent{a: some}}, []string{"budget.connections", "50", "4"}},
		{"too many sources", time.Minute, false, grant.Payload{Addresses: two, Budget: fits.Budget},
			use{Last: time.Minute, Clients: map[netip.Addr]spent{a: {}, b: some}}, []string{"addresses", "[10.1.0.2 10.1.0.3]", "[10.1.0.3]"}},
		{"too many ports", time.Minute, false, fits, use{Last: time.Minute, Clients: map[netip.Addr]spent{a: some}, Ports: []uint16{80}, Granted: []uint16{80, 443}},
			[]string{"ports", "[80 443]", "[80]"}},
	} {
		var got []string
		for _, s := range suggest(c.granted, !c.active, c.payload, &c.use) {
			got = append(got, s.field, s.granted, s.suggested)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

// TestUsedBesideGranted: what an active and an ended grant used, over a kill of the agent, to the byte of the kernel.
func TestUsedBesideGranted(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	l.hook()
	l.ports = newPortUse()
	row, err := l.Activate(t.Context(), b.signer.envelope(t, func(p *grant.Payload) {
		l.client(p)
		p.Addresses = append(p.Addresses, clientB)
		p.Duration = 15 * time.Minute
	}), "uid:0")
	must(t, err)
	look := func() {
		_, err := l.tick(t.Context())
		must(t, err)
		must(t, l.KeepUses(t.Context()))
		b.later(time.Second)
	}
	look()
	conn := l.dial()
	for range 5 {
		_, err := lab.Ask(conn)
		must(t, err)
		look()
	}
	l.ports.note(flow.Record{Event: flow.EventOpen, Grant: row.ID, Server: l.server()})
	for range 100 { // silence, in which what was seen is made durable
		look()
	}
	l.kill()

	l = b.begin()
	defer l.kill()
	must(t, l.adopt(t.Context()))
	o := &operators{grants: l.grants, datapath: l.datapath, clock: b.clock.clock()}
	used := func() *api.UsedGrant {
		reply, err := o.UsedGrants(t.Context(), nil)
		must(t, err)
		return reply.GetGrants()[0]
	}
	_, err = lab.Ask(conn)
	must(t, err)
	if u := used(); !u.GetKnown() || u.GetFlows() != 1 || u.GetBusy().AsDuration() < 5*time.Second || len(u.GetSuggestions()) == 0 {
		t.Errorf("active: %v", u)
	}
	_, err = l.Revoke(t.Context(), row.ID, "done", "uid:0")
	must(t, err)
	paths, err := l.datapath.Paths()
	must(t, err)
	var bytes uint64
	for _, p := range paths {
		bytes += p.BytesToServer + p.BytesToClient
	}
	u := used()
	if u.GetGrant().GetState() != stateRevoked || u.GetBytes() != bytes || bytes == 0 || u.GetGranted().AsDuration() != 15*time.Minute {
		t.Errorf("ended: %v, the kernel has %d bytes", u, bytes)
	}
	if busy, last, open := u.GetBusy().AsDuration(), u.GetLast().AsDuration(), u.GetOpen().AsDuration(); busy < 5*time.Second || busy > 10*time.Second ||
		last < 100*time.Second || last > open || open > 2*time.Minute {
		t.Errorf("busy for %v, last at %v, open for %v", busy, last, open)
	}
	if !slices.Equal(u.GetClients(), []string{"10.1.0.2"}) || !slices.Equal(u.GetPorts(), []uint32{5432}) || !slices.Equal(u.GetGrantedPorts(), []uint32{5432, 5433}) {
		t.Errorf("clients %v, ports %v of %v", u.GetClients(), u.GetPorts(), u.GetGrantedPorts())
	}
	var fields []string
	for _, s := range u.GetSuggestions() {
		fields = append(fields, s.GetField())
	}
	if want := []string{"duration", "budget.bytes", "budget.connections", "addresses", "ports"}; !slices.Equal(fields, want) {
		t.Errorf("suggestions for %v, want %v", fields, want)
	}
}

// TestKeptUseIsNoOlderThanTheEnd: of a grant that ends while uses are being kept the store has the end; and what could not be
// kept is kept the next time.
func TestKeptUseIsNoOlderThanTheEnd(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	defer l.kill()
	stays := l.fill(1)[0]
	row, err := l.Activate(t.Context(), b.signer.envelope(t, nil), "uid:0")
	must(t, err)
	for _, h := range l.active {
		h.use.Last, h.use.changed = time.Second, true
	}
	kept := func(id string) bool {
		uses, err := l.uses(t.Context())
		must(t, err)
		return uses[id] != nil
	}
	gone, leave := context.WithCancel(t.Context())
	leave()
	if err := l.keepSome(gone, l.changedUses()); err == nil || kept(stays.row.ID) {
		t.Errorf("kept by somebody who has left: %v", err)
	}
	changed := l.changedUses()
	_, err = l.Revoke(t.Context(), row.ID, "done", "uid:0")
	must(t, err)
	ended := func() time.Time {
		row, err := l.store.Grant(t.Context(), row.ID)
		must(t, err)
		at, err := l.endedAt(t.Context(), row)
		must(t, err)
		return at
	}
	before := ended()
	must(t, l.keepSome(t.Context(), changed))
	if now := ended(); !now.Equal(before) || now.Equal(row.Deadline) {
		t.Errorf("ended at %s, and later at %s", before, now)
	}
	if !kept(stays.row.ID) || len(l.changedUses()) != 0 {
		t.Error("what could not be kept before is not kept")
	}
}

// atDisk is a context that tells when somebody begins to wait with it, as the store does.
type atDisk struct {
	context.Context
	once  *sync.Once
	waits func()
}

func (c atDisk) Done() <-chan struct{} {
	c.once.Do(c.waits)
	return c.Context.Done()
}

// TestKeepingUseKeepsNobodyWaiting: while the disk takes its time, whoever ends a grant or looks at it has the lock.
func TestKeepingUseKeepsNobodyWaiting(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	defer l.kill()
	h := l.fill(1)[0]
	h.use.changed = true
	asked := false
	err := l.keepSome(atDisk{t.Context(), new(sync.Once), func() {
		if asked = true; !l.mu.TryLock() {
			t.Error("the lock is held")
			return
		}
		h.use.changed = true // there was traffic
		l.mu.Unlock()
	}}, []*held{h})
	must(t, err)
	if !asked || len(l.changedUses()) != 1 {
		t.Errorf("at the disk: %v; what changed meanwhile: %d", asked, len(l.changedUses()))
	}
}
