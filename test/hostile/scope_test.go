package hostile

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// errNoLinkLocal says that a device has no address of its link yet.
var errNoLinkLocal = errors.New("no link-local address")

// linkLocal is the address that a device of a namespace gave itself.
func linkLocal(n *lab.Namespace, device string) (found netip.Addr, err error) {
	err = n.Do(func() error {
		dev, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		addrs, err := dev.Addrs()
		if err != nil {
			return err
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().IsLinkLocalUnicast() {
				found = p.Addr()
				return nil
			}
		}
		return errNoLinkLocal
	})
	return found, err
}

// linkWay is a way to a service that leaves no routing table: by the address of the link between the two.
type linkWay struct {
	name   string
	from   func(*world) *lab.Namespace
	device string // of the sender, to the link
	to     func(*world) *lab.Namespace
	inner  string // of the receiver
}

func linkWays() []linkWay {
	node := func(w *world) *lab.Namespace { return w.Node }
	return []linkWay{
		{"node to pod", node, lab.PodDevice(0), func(w *world) *lab.Namespace { return w.Pod }, "eth0"},
		{"pod to node", func(w *world) *lab.Namespace { return w.Pods[1] }, "eth0", node, lab.PodDevice(1)},
	}
}

// reaches says whether the service answers at its link-local address within a time.
func (l linkWay) reaches(t *testing.T, w *world, within time.Duration) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	for ctx.Err() == nil {
		to, err := linkLocal(l.to(w), l.inner)
		if errors.Is(err, errNoLinkLocal) {
			continue
		}
		check(t, err)
		once, done := context.WithTimeout(ctx, 500*time.Millisecond) // a new address answers nobody yet
		_, _, err = l.from(w).Ask(once, netip.AddrPort{}, netip.AddrPortFrom(to.WithZone(l.device), port))
		done()
		if err == nil {
			return true
		}
	}
	return false
}

// TestLinkLocal goes to the services by addresses that no policy lists, because each link has them: at the hooks, and
// at the backstop alone.
func TestLinkLocal(t *testing.T) {
	leak.Check(t)
	control, hooked, bare := newWorld(t, false), newWorld(t, true), build(t)
	if bare.Cgroup() == "" {
		t.Skip("no control groups of version 2 are mounted: the backstop needs them")
	}
	bare.load(t)
	check(t, bare.Node.Do(func() error {
		_, err := bare.d.AttachBackstop(bare.Cgroup())
		return err
	}))
	for _, l := range linkWays() {
		t.Run(l.name, func(t *testing.T) {
			if !l.reaches(t, control, 10*time.Second) {
				t.Fatal("nobody answers without enforcement")
			}
			for name, w := range map[string]*world{"hooks": hooked, "backstop": bare} {
				if l.reaches(t, w, 2*time.Second) {
					t.Errorf("%s: the service answers", name)
				}
			}
		})
	}
}
