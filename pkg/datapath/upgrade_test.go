package datapath_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// otherVersion gives every program one instruction more, which does nothing.
func otherVersion(spec *ebpf.CollectionSpec) {
	for _, p := range spec.Programs {
		first := p.Instructions[0]
		nothing := asm.Mov.Reg(asm.R1, asm.R1).WithMetadata(first.Metadata)
		p.Instructions[0] = first.WithMetadata(asm.Metadata{})
		p.Instructions = append(asm.Instructions{nothing}, p.Instructions...)
	}
}

// traffic goes over live connections, and asks without a path, until it is stopped.
type traffic struct {
	stop context.CancelFunc
	wg   sync.WaitGroup

	mu    sync.Mutex
	asked int      // guarded by mu
	wrong []string // guarded by mu
}

func (n *node) traffic(t *testing.T, conns map[string]net.Conn, closed []cell) *traffic {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	f := &traffic{stop: stop}
	for name, c := range conns {
		f.wg.Go(func() {
			for ctx.Err() == nil {
				_, err := lab.Ask(c)
				f.note(err, name)
			}
		})
	}
	for _, c := range closed {
		f.wg.Go(func() {
			// Each question is a connection, whose legs nobody sweeps here: a hundred a second fit for minutes.
			pace := time.NewTicker(10 * time.Millisecond)
			defer pace.Stop()
			for ctx.Err() == nil {
				<-pace.C
				within, cancel := context.WithTimeout(ctx, 5*time.Second)
				who, err := c.ask(within)
				cancel()
				if who != "proxy" && ctx.Err() == nil {
					f.note(errors.Join(fmt.Errorf("answered by %s", who), err), c.name)
				} else {
					f.note(nil, c.name)
				}
			}
		})
	}
	return f
}

func (f *traffic) note(err error, what string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked++
	if err != nil && len(f.wrong) < 10 {
		f.wrong = append(f.wrong, fmt.Sprintf("%s: %v", what, err))
	}
}

func (f *traffic) end(t *testing.T) {
	t.Helper()
	f.stop()
	f.wg.Wait()
	if len(f.wrong) > 0 || f.asked == 0 {
		t.Errorf("%d questions, wrong: %q", f.asked, f.wrong)
	}
}

// running are the tags of the programs that hold the node's hooks.
func (n *node) running(t *testing.T) (tags map[string]bool) {
	t.Helper()
	tags = map[string]bool{}
	must(t, n.Node.Do(func() error {
		all, err := datapath.RunningTags()
		for _, tag := range all {
			tags[tag] = true
		}
		return err
	}))
	return tags
}

// TestUpgradeAndBack exchanges the programs of every hook while bypassed and proxied connections carry
// questions, by the next version and by a rollback, again and again. No connection is reset, and nobody
// without a path is answered by the service.
func TestUpgradeAndBack(t *testing.T) { eachProfile(t, testUpgradeAndBack) }

func testUpgradeAndBack(t *testing.T, profile datapath.Profile) {
	t.Parallel()
	n := newNode(t, profile, func(c *datapath.Config) { c.MaxLegs = 1 << 17 })
	n.copyProxy(t)
	conns := map[string]net.Conn{}
	var closed []cell
	for _, c := range n.cells() {
		switch {
		case strings.HasPrefix(c.name, "host/remote"), strings.HasPrefix(c.name, "pod/pod"):
			conns["proxied "+c.name] = c.dial(t)
			c.path(n, t, 30*time.Minute)
			conns["bypassed "+c.name] = c.dialDirect(t)
		case strings.HasPrefix(c.name, "host/pod"), strings.HasPrefix(c.name, "pod/node"):
			closed = append(closed, c)
		}
	}
	for _, c := range conns {
		_, err := lab.Ask(c)
		must(t, err)
	}
	if _, err := n.rollback(); !errors.Is(err, datapath.ErrNoPrevious) {
		t.Errorf("%v, want %v", err, datapath.ErrNoPrevious)
	}
	traffic := n.traffic(t, conns, closed)
	first := n.running(t)
	for range 5 {
		must(t, n.d.Close())
		n.cf.Change(otherVersion)
		n.open(t)
		must(t, n.attachAll(n.d))
		second := n.running(t)
		for tag := range second {
			if first[tag] {
				t.Fatalf("%v run still, after %v: not upgraded", second, first)
			}
		}
		must(t, n.d.Close())
		hooks, err := n.rollback()
		must(t, err)
		if back := n.running(t); hooks < len(first) || len(back) != len(first) {
			t.Errorf("%d hooks rolled back to %v, want %v", hooks, back, first)
		} else {
			for tag := range back {
				if !first[tag] {
					t.Errorf("%s runs after the rollback, want %v", tag, first)
				}
			}
		}
		n.cf.Change(nil) // the version of before takes over what the rollback left
		n.open(t)
		must(t, n.attachAll(n.d))
	}
	traffic.end(t)
	t.Logf("%d questions", traffic.asked)
}

func (n *node) rollback() (hooks int, err error) {
	err = n.Node.Do(func() error {
		hooks, err = datapath.Rollback(n.cf.Dir, n.cf.PxNetns)
		return err
	})
	return hooks, err
}
