package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/store"
	"golang.org/x/sync/errgroup"
)

// TestInTurns: who waits for the lock gets it while another looks at many things, each of which takes a turn.
func TestInTurns(t *testing.T) {
	var mu sync.Mutex
	var got atomic.Bool
	seen := 0
	err := inTurns(&mu, make([]int, 100), func(int) error {
		if seen == 0 {
			go func() {
				mu.Lock()
				defer mu.Unlock()
				got.Store(true)
			}()
		}
		if !got.Load() {
			seen++
			time.Sleep(2 * time.Millisecond) // a look that takes longer than a turn
		}
		return nil
	})
	must(t, err)
	if seen > 10 {
		t.Errorf("waited for %d of 100 looks", seen)
	}
}

// fill activates so many grants, each of one client.
func (l *life) fill(n int) (all []*held) {
	l.t.Helper()
	for i := range n {
		_, err := l.Activate(l.t.Context(), l.signer.envelope(l.t, clientNumber(i)), "uid:0")
		must(l.t, err)
	}
	return l.every()
}

// another is one for a client of its own, that also begins when the test's clock was moved.
func (l *life) another(i int) *activation {
	return l.activation(l.signer.envelope(l.t, func(p *grant.Payload) {
		clientNumber(i)(p)
		p.NotAfter = p.NotAfter.Add(time.Hour)
	}))
}

func clientNumber(i int) func(*grant.Payload) {
	return func(p *grant.Payload) {
		p.Addresses = []netip.Addr{netip.AddrFrom4([4]byte{10, 8, byte(i >> 8), byte(i)})}
	}
}

// TestMassEndKeepsNobodyWaiting: while many grants end, others are activated after each few records.
func TestMassEndKeepsNobodyWaiting(t *testing.T) {
	const many = 10 * endBatch
	b := newTestbed(t, 8*many)
	for _, c := range []struct {
		name string
		end  func(*life, []*held) error
	}{
		{"jump of the clock", func(l *life, _ []*held) error { return l.endAll(t.Context(), stepRevoked, "the clock moved", "agent") }},
		{"changed resources", func(l *life, _ []*held) error {
			e := *l.enforced()
			e.services = slices.Clone(e.services)
			e.services[0].ID++ // another instance
			return l.recheck(t.Context(), &e)
		}},
		{"broken network", func(l *life, all []*held) error { return l.breakNetwork(all) }},
		{"deadline", func(l *life, _ []*held) error {
			_, err := l.tick(t.Context())
			return err
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := b.begin()
			defer l.kill()
			all := l.fill(many)
			if c.name == "deadline" { // the last: the node remembers the time
				l.later(2 * time.Minute)
			}
			left, err := l.activateWhile(func() error { return c.end(l, all) }, many)
			must(t, err)
			if left < many/2 {
				t.Errorf("activated when %d of %d were left to end", left, many)
			}
			states, open := l.states()
			for _, h := range all {
				if states[h.row.ID] == store.StateActive || open[h.row.ID] != 0 {
					t.Errorf("%s is %s, with %d paths", h.row.ID, states[h.row.ID], open[h.row.ID])
				}
			}
			must(t, l.endAll(t.Context(), stepRevoked, "next", "test"))
		})
	}
}

// activateWhile has one more grant activated while others end, and gives how many were left to end by then.
func (l *life) activateWhile(end func() error, client int) (left int, err error) {
	l.t.Helper()
	a := l.another(client)
	ended, activated := make(chan error, 1), make(chan error, 1)
	l.mu.Lock() // both wait for it
	go func() { ended <- end() }()
	go func() {
		_, err := l.grants.Activate(l.t.Context(), a.envelope, a.answer, "uid:0")
		for errors.Is(err, datapath.ErrShut) { // it was under way when the clock jumped
			again := l.another(client)
			_, err = l.grants.Activate(l.t.Context(), again.envelope, again.answer, "uid:0")
		}
		left = len(l.every()) - 1
		activated <- err
	}()
	l.mu.Unlock()
	err = errors.Join(<-activated, <-ended)
	return left, err
}

// breakNetwork has all holders let go at once.
func (l *life) breakNetwork(all []*held) error {
	var broken errgroup.Group
	l.leavers.turn.Lock() // until all have come
	for _, h := range all {
		broken.Go(func() error { return l.LetGo(l.t.Context(), h, whyHolderGone) })
	}
	l.eventually("all holders", func() bool {
		l.leavers.mu.Lock()
		defer l.leavers.mu.Unlock()
		return len(l.leavers.wait) == len(all)
	})
	l.leavers.turn.Unlock()
	return broken.Wait()
}

// TestKilledInAMassEnd: all paths are closed before anything is recorded, and the next agent records what was not.
func TestKilledInAMassEnd(t *testing.T) {
	b := newTestbed(t, 8*endBatch)
	for _, c := range []struct {
		name string
		end  func(*life)
	}{
		{"in the kernel alone", func(l *life) { must(t, l.closeAll(ending{}.revoked("agent", "the clock moved"))) }},
		{"after some records", func(l *life) {
			var over []doomed
			for _, h := range l.every() {
				over = append(over, doomed{h, ending{grant: h.row.ID}.revoked("agent", "the clock moved")})
			}
			must(t, l.endMany(t.Context(), over[:1]))
			gone, leave := context.WithCancel(t.Context())
			leave()
			if l.endMany(gone, over) == nil {
				t.Error("recorded what could not be")
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := b.begin()
			all := l.fill(3 * endBatch)
			c.end(l)
			if _, open := l.states(); len(open) != 0 {
				t.Errorf("open before the records: %v", open)
			}
			l.kill()
			l = b.begin()
			defer l.kill()
			must(t, l.adopt(t.Context()))
			states, open := l.states()
			ends := make(map[string]int)
			for _, e := range l.storedEvents() {
				if e.GetStep() == stepRevoked {
					ends[e.GetGrant()]++
				}
			}
			for _, h := range all {
				if id := h.row.ID; states[id] != store.StateRevoked || open[id] != 0 || ends[id] != 1 {
					t.Errorf("%s is %s, with %d paths and %d ends on record", id, states[id], open[id], ends[id])
				}
			}
		})
	}
}

// TestFullTableGivesBackOneSlot: a path that needs a slot which an ended one still holds takes that of one.
func TestFullTableGivesBackOneSlot(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	defer l.kill()
	for _, h := range l.fill(16) {
		_, err := l.Revoke(t.Context(), h.row.ID, "", "uid:0")
		must(t, err)
	}
	_, err := l.tick(t.Context())
	must(t, err)
	_, err = l.Activate(t.Context(), b.signer.envelope(t, nil), "uid:0")
	must(t, err)
	paths, err := l.datapath.Paths()
	must(t, err)
	shown := slices.DeleteFunc(paths, func(p datapath.PathStatus) bool { return p.State != datapath.PathRevoked })
	if len(shown) != 15 {
		t.Errorf("%d ended paths are left to look at", len(shown))
	}
}

// TestRecheckNeedsNoDisk: when the disk gives and takes nothing, changed resources end what they refuse, and nothing else; the record
// follows.
func TestRecheckNeedsNoDisk(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	defer l.kill()
	refused, stays := l.twoGrants()
	gone, leave := context.WithCancel(t.Context())
	leave()
	if err := l.recheck(gone, l.denying(clientA)); !errors.Is(err, errNotRecorded) {
		t.Errorf("recorded on a disk that takes nothing: %v", err)
	}
	if _, open := l.states(); open[refused] != 0 || open[stays] != 1 {
		t.Errorf("open: %v", open)
	}
	_, err := l.tick(t.Context())
	must(t, err)
	if states, _ := l.states(); states[refused] != store.StateRevoked || states[stays] != store.StateActive {
		t.Errorf("recorded: %v", states)
	}
	revoked, err := policy.Parse("test.yaml", []byte(strings.Replace(b.signer.resources("15m"), "spec:\n  version: 1\n",
		fmt.Sprintf("spec:\n  version: 2\n  revokedKeys: [%q]\n", b.signer.key.Public().ID()), 1)))
	must(t, err)
	must(t, l.recheck(t.Context(), &enforced{verified: revoked, set: revoked, services: l.enforced().services}))
	row, err := l.store.Grant(t.Context(), stays)
	must(t, err)
	if _, open := l.states(); open[stays] != 0 || !contains(row.EndedWhy, "resources changed", "is revoked") {
		t.Errorf("signed by a key that is revoked now: %s, open %v", row.EndedWhy, open)
	}
}

// TestRecheckWithoutNodeAddresses: where the node's addresses cannot be read, what the resources refuse all the same ends, the rest goes on,
// and whoever asked is told to ask again. They are read once for many grants.
func TestRecheckWithoutNodeAddresses(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	defer l.kill()
	refused, stays := l.twoGrants()
	unread, reads := errors.New("netlink is out of order"), 0
	l.grants.own = func([]netip.Addr) ([]netip.Addr, error) { reads++; return nil, unread }
	if err := l.recheck(t.Context(), l.denying(clientA)); !errors.Is(err, unread) || reads != 1 {
		t.Errorf("read %d times: %v", reads, err)
	}
	if _, open := l.states(); open[refused] != 0 || open[stays] != 1 {
		t.Errorf("open: %v", open)
	}
}

func (l *life) twoGrants() (a, b string) {
	l.t.Helper()
	first, err := l.Activate(l.t.Context(), l.signer.envelope(l.t, nil), "uid:0")
	must(l.t, err)
	second, err := l.Activate(l.t.Context(), l.signer.envelope(l.t, func(p *grant.Payload) { p.Addresses = []netip.Addr{clientB} }), "uid:0")
	must(l.t, err)
	return first.ID, second.ID
}

// denying is what is in force, with a deny list of one address.
func (l *life) denying(a netip.Addr) *enforced {
	l.t.Helper()
	set, err := policy.Parse("test.yaml", []byte(l.signer.resources("15m")+fmt.Sprintf(
		"---\napiVersion: sallyport.dev/v1alpha1\nkind: DenyList\nmetadata: {name: out}\nspec: {reason: left, addresses: [%q]}\n", a)))
	must(l.t, err)
	return &enforced{verified: set, set: set, services: l.enforced().services}
}

// TestSlotOfALivePathIsNoEndedOne: a slot that was seen with an ended path, and has a live one by the time it is noted, or by the time
// it is to be given back, keeps it.
func TestSlotOfALivePathIsNoEndedOne(t *testing.T) {
	b := newTestbed(t, 4)
	l := b.begin()
	defer l.kill()
	gone := l.fill(4)[0]
	_, err := l.Revoke(t.Context(), gone.row.ID, "", "uid:0")
	must(t, err)
	_, err = l.tick(t.Context())
	must(t, err)
	slot := gone.row.Slots[0]
	row, err := l.Activate(t.Context(), b.signer.envelope(t, nil), "uid:0")
	must(t, err)
	if !slices.Equal(row.Slots, []uint32{slot}) {
		t.Fatalf("slots %v, want %d", row.Slots, slot)
	}
	now := l.grants.clock.boot()
	for when, note := range map[string]func() error{
		"noted":             func() error { return l.free([]uint32{slot}, now) },
		"to be given back":  func() error { l.ended[slot] = now; return nil },
		"given back by age": func() error { l.ended[slot] = now - keepEnded; return l.free([]uint32{slot}, now) },
	} {
		must(t, note())
		if _, err := l.Activate(t.Context(), b.signer.envelope(t, clientNumber(99)), "uid:0"); !errors.Is(err, datapath.ErrPathsFull) {
			t.Errorf("%s: activated where nothing is free: %v", when, err)
		}
		if _, open := l.states(); open[row.ID] != 1 {
			t.Fatalf("%s: the live path was ended", when)
		}
	}
}
