package hostile

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
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

// secondDevice gives the first pod another device, with addresses that no policy lists, and says what it is on the node.
func (w *world) secondDevice(t *testing.T) (name string, at map[lab.Family]netip.Addr) {
	t.Helper()
	ns, err := netns.GetFromPath(w.Pod.Path())
	check(t, err)
	defer ns.Close()
	name, at = "vethsecond", map[lab.Family]netip.Addr{}
	check(t, w.Node.Netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "net1", PeerNamespace: netlink.NsFd(int(ns))}))
	for f, cidr := range map[lab.Family]string{lab.IPv4: "10.90.0.0/24", lab.IPv6: "fd00:90::/64"} {
		p := netip.MustParsePrefix(cidr)
		own := p.Addr().Next()
		at[f] = own.Next()
		for device, side := range map[string]struct {
			in *lab.Namespace
			a  netip.Addr
		}{name: {w.Node, own}, "net1": {w.Pod, at[f]}} {
			dev, err := side.in.Netlink.LinkByName(device)
			check(t, err)
			check(t, side.in.Netlink.LinkSetUp(dev))
			check(t, side.in.Netlink.AddrAdd(dev, &netlink.Addr{Flags: unix.IFA_F_NODAD,
				IPNet: &net.IPNet{IP: side.a.AsSlice(), Mask: net.CIDRMask(p.Bits(), side.a.BitLen())}}))
		}
	}
	if w.d == nil {
		return name, at
	}
	w.hook(t, name, datapath.RolePod)
	index, err := w.Node.Ifindex(name)
	check(t, err)
	services := w.d.Services()
	for i := range services {
		if services[i].Target == datapath.TargetPod {
			services[i].Besides = []int{index}
		}
	}
	_, err = w.d.SetServices(services)
	check(t, err)
	return name, at
}

// asks says whether the service answers at an address within a time.
func asks(t *testing.T, from *lab.Namespace, to netip.Addr, within time.Duration) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	for ctx.Err() == nil {
		once, done := context.WithTimeout(ctx, 500*time.Millisecond) // a new address answers nobody yet
		_, _, err := from.Ask(once, netip.AddrPort{}, netip.AddrPortFrom(to, port))
		done()
		if err == nil {
			return true
		}
	}
	return false
}

// TestAnotherAddress goes to a pod's service at addresses of the pod that no policy lists: a second one of its device, and
// that of a second device.
func TestAnotherAddress(t *testing.T) {
	leak.Check(t)
	control, hooked := newWorld(t, false), newWorld(t, true)
	_, second := control.secondDevice(t)
	_, hookedSecond := hooked.secondDevice(t)
	for _, f := range lab.Families() {
		for name, to := range map[string][2]netip.Addr{"second address": {control.Pod.Other(f), hooked.Pod.Other(f)}, "second device": {second[f], hookedSecond[f]}} {
			for from, who := range map[string]func(*world) *lab.Namespace{
				"node": func(w *world) *lab.Namespace { return w.Node }, "pod": func(w *world) *lab.Namespace { return w.Pods[1] },
				"client": func(w *world) *lab.Namespace { return w.Client }} {
				if name == "second device" && from != "node" {
					continue // its answers leave by the first, which the node's path filter refuses
				}
				t.Run(fmt.Sprintf("%s/%s/%s", name, f, from), func(t *testing.T) {
					t.Parallel()
					if !asks(t, who(control), to[0], 10*time.Second) {
						t.Fatal("nobody answers without enforcement")
					}
					if asks(t, who(hooked), to[1], 2*time.Second) {
						t.Error("the service answers")
					}
				})
			}
		}
	}
}
