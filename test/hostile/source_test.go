package hostile

import (
	"net/netip"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// claim is an address that is not the attacker's.
type claim struct {
	name string
	from string // the attacker's ways begin with it
	as   func(w *world, f lab.Family) netip.Addr
	// refused says why Linux itself takes it from nobody in that family, also with rp_filter off.
	refused map[lab.Family]string
}

func claims() []claim {
	martian := map[lab.Family]string{lab.IPv4: "loopback comes from no device", lab.IPv6: "loopback comes from no device"}
	own := map[lab.Family]string{lab.IPv4: "the node's own address comes from no device"}
	loopback := func(_ *world, f lab.Family) netip.Addr { return f.Loopback() }
	node := func(w *world, f lab.Family) netip.Addr { return w.Node.Addr(f) }
	other := func(w *world, f lab.Family) netip.Addr { return w.Pods[2].Addr(f) }
	return []claim{
		{"a remote client", "pod", func(w *world, f lab.Family) netip.Addr { return w.Client.Addr(f) }, nil},
		{"another pod", "pod", other, nil},
		{"the pod of the service", "pod", func(w *world, f lab.Family) netip.Addr { return w.Pod.Addr(f) }, nil},
		{"the node", "pod", node, own},
		{"loopback", "pod", loopback, martian},
		{"a pod, from outside", "client", other, nil},
		{"the node, from outside", "client", node, own},
		{"loopback, from outside", "client", loopback, martian},
	}
}

// believing has the kernel's own check of sources off, and, where the node enforces, tells what the agent
// would: which device is the uplink's and which are of pods.
func (w *world) believing(t *testing.T) {
	t.Helper()
	facts := map[int]datapath.DeviceFacts{}
	for device, fact := range map[string]datapath.DeviceFacts{lab.Uplink: {Uplink: true},
		lab.PodDevice(0): {Pod: true, BoundIPv4: true, BoundIPv6: true}, lab.PodDevice(1): {Pod: true, BoundIPv4: true, BoundIPv6: true},
		lab.PodDevice(2): {Pod: true, BoundIPv4: true, BoundIPv6: true}} {
		check(t, w.Node.Sysctl("ipv4/conf/"+device+"/rp_filter", "0"))
		index, err := w.Node.Ifindex(device)
		check(t, err)
		facts[index] = fact
	}
	check(t, w.Node.Sysctl("ipv4/conf/all/rp_filter", "0"))
	if w.d != nil {
		check(t, w.d.SetDevices(facts))
	}
}

// grant opens a path of the address to each service, so that nothing but its source is wrong with an attack.
func (w *world) grant(t *testing.T, client netip.Addr) func() {
	t.Helper()
	if w.d == nil {
		return func() {}
	}
	var slots []uint32
	for _, id := range []uint32{hostTCP, podTCP} {
		slot, err := w.d.OpenPath(datapath.Path{Grant: "01HOSTILE", Client: client, ServiceID: id, Ports: []uint16{port},
			Deadline: datapath.BootTime() + time.Minute})
		check(t, err)
		slots = append(slots, slot)
	}
	return func() {
		for _, s := range slots {
			check(t, w.d.EndPath(s, datapath.PathRevoked))
		}
	}
}

// TestSources sends from addresses that have a path, but are not the sender's.
func TestSources(t *testing.T) {
	leak.Check(t)
	control, enforced := newWorld(t, false), newWorld(t, true)
	for _, w := range []*world{control, enforced} {
		w.believing(t)
	}
	for _, c := range claims() {
		for _, f := range lab.Families() {
			t.Run(c.name+"/"+f.String(), func(t *testing.T) {
				revoke := enforced.grant(t, c.as(enforced, f))
				for _, target := range []string{"host", "pod"} {
					name := c.from + " to " + target
					open, closed := named(control.ways(t, f), name), named(enforced.ways(t, f), name)
					refused := c.refused[f]
					if f == lab.IPv4 && c.as(control, f) == open.dst {
						refused = "a machine's own address comes from no device"
					}
					if n := open.claiming(t, c.as(control, f)); (n == 0) != (refused != "") {
						t.Errorf("%s: %d arrive without enforcement; refused by Linux itself: %q", name, n, refused)
					}
					if n := closed.claiming(t, c.as(enforced, f)); n > 0 {
						t.Errorf("%s: %d arrive", name, n)
					}
				}
				revoke()
			})
		}
	}
}

// TestSourceIsTheSenders is the other side of it: with the same settings, a path of the sender's own address
// lets it through.
func TestSourceIsTheSenders(t *testing.T) {
	leak.Check(t)
	w := newWorld(t, true)
	w.believing(t)
	for _, f := range lab.Families() {
		for _, a := range w.ways(t, f) {
			if a.raw {
				continue
			}
			t.Run(a.name+"/"+f.String(), func(t *testing.T) {
				revoke := w.grant(t, a.src)
				if n := a.claiming(t, a.src); n == 0 {
					t.Error("nothing arrives")
				}
				revoke()
			})
		}
	}
}

// claiming sends a SYN with another source.
func (a way) claiming(t *testing.T, src netip.Addr) int {
	t.Helper()
	p := a.packet()
	p.Src = netip.AddrPortFrom(src, clientPort)
	return a.attack(t, [][]byte{p.Bytes()})["arrived"]
}
