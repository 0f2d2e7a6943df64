package agent

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/store"
)

// TestLeaseWaitsForNobody: while somebody holds the grants with a disk that does not answer, the lease is renewed, and a jump
// of the clock closes every path; its records follow.
func TestLeaseWaitsForNobody(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	defer l.kill()
	row, err := l.Activate(t.Context(), b.signer.envelope(t, nil), "uid:0")
	must(t, err)
	k := &keeper{datapath: l.datapath, grants: l.grants, lease: 10 * time.Second, clock: b.clock.clock(), problems: l.problems,
		alarm: func(alarmName, string) {}, pulse: newPulse()}
	k.begin()
	b.clock.wall = 6 * time.Second
	ctx, stop := context.WithCancel(t.Context())
	var settling sync.WaitGroup
	defer settling.Wait()
	defer stop()
	l.mu.Lock()
	settling.Go(func() { k.settleAll(ctx) })
	ticked := make(chan struct{})
	go func() {
		defer close(ticked)
		k.tick()
		k.tick()
	}()
	select {
	case <-ticked:
	case <-time.After(10 * time.Second):
		t.Error("a tick waits for the disk")
	}
	left, err := l.datapath.LeaseLeft()
	must(t, err)
	if _, open := l.states(); len(open) != 0 || left < 9*time.Second {
		t.Errorf("lease of %s left, open %v", left, open)
	}
	l.mu.Unlock()
	b.eventually("the record", func() bool {
		states, _ := l.states()
		return states[row.ID] == store.StateRevoked
	})
	_, err = l.Activate(t.Context(), b.signer.envelope(t, nil), "uid:0")
	must(t, err)
}

// TestTimeIsRememberedAsItWasSeen: what waited for the disk while the clock was set ahead has the time of before: the node does not take
// the right time for one that went back.
func TestTimeIsRememberedAsItWasSeen(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	defer l.kill()
	k := &keeper{datapath: l.datapath, grants: l.grants, lease: 10 * time.Second, clock: b.clock.clock(), problems: l.problems,
		alarm: func(alarmName, string) {}, pulse: newPulse()}
	k.begin()
	k.steady -= time.Hour
	k.tick()
	waited := k.takeLeft()
	b.clock.wall = 10 * 365 * 24 * time.Hour
	k.settle(t.Context(), waited)
	if got := l.store.Memory().Latest; time.Since(got).Abs() > time.Minute {
		t.Errorf("remembers %s", got)
	}
	k.tick()
	k.settle(t.Context(), k.takeLeft())
	b.clock.wall = 0
	if err := l.store.Memory().Check(time.Now()); err != nil {
		t.Errorf("set back: %v", err)
	}
}
