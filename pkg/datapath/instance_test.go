package datapath_test

import (
	"context"
	"io"
	"maps"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// TestPodOfUnknownDevice: a pod that is up before the table knows its device, or behind another device
// than the table says, is closed, also to those who have a path to the instance before. There is no
// proxy: nobody else could answer.
func TestPodOfUnknownDevice(t *testing.T) { eachProfile(t, testPodOfUnknownDevice) }

func testPodOfUnknownDevice(t *testing.T, profile datapath.Profile) {
	t.Parallel()
	n := newNode(t, profile)
	other, err := n.Node.Ifindex(lab.PodDevice(1))
	must(t, err)
	known := n.d.Services()
	for name, ifindex := range map[string]int{"none": 0, "another": other} {
		for _, c := range n.cells() {
			if c.serviceID != podID {
				continue
			}
			t.Run(name+"/"+c.name, func(t *testing.T) {
				_, err := n.d.SetServices(known)
				must(t, err)
				slot := c.path(n, t, time.Minute)
				live := c.dialDirect(t)
				_, err = n.d.SetServices(moved(known, podID, ifindex))
				must(t, err)
				if answers(t, live) {
					t.Errorf("live connection goes on; counters:%s", n.counters(t))
				}
				ctx, cancel := context.WithTimeout(within(t), silence)
				defer cancel()
				if conn, err := c.client.Dial(ctx, netip.AddrPortFrom(c.from, 0), c.target()); err == nil {
					conn.Close()
					t.Errorf("service answers a SYN; counters:%s", n.counters(t))
				}
				must(t, n.d.EndPath(slot, datapath.PathRevoked))
			})
		}
	}
}

// silence is how long to wait for an answer that must not come.
const silence = 200 * time.Millisecond

func answers(t *testing.T, conn net.Conn) bool {
	t.Helper()
	must(t, conn.SetDeadline(time.Now().Add(silence)))
	_, err := io.WriteString(conn, "still there?\n")
	must(t, err)
	n, _ := conn.Read(make([]byte, 1))
	return n > 0
}

// moved puts a service behind another device.
func moved(services []datapath.Service, id uint32, ifindex int) []datapath.Service {
	out := append([]datapath.Service(nil), services...)
	for i := range out {
		if out[i].ID == id {
			out[i].Ifindex = ifindex
		}
	}
	return out
}

// TestDeviceOfTheSameNumber: a path ends with the device that it leads to. Another device that takes over
// its name and its number, under this handle or while there was none, does not inherit it.
func TestDeviceOfTheSameNumber(t *testing.T) { eachProfile(t, testDeviceOfTheSameNumber) }

func testDeviceOfTheSameNumber(t *testing.T, profile datapath.Profile) {
	t.Parallel()
	n := newNode(t, profile)
	const name, number = "vethnew", 4242
	address := netip.MustParseAddr("10.9.0.2")
	services := []datapath.Service{{ID: 9, Name: "new", Target: datapath.TargetPod, Ports: []uint16{podPort}, Ifindex: number,
		Addresses: []netip.Addr{address}}}
	hook := func() {
		t.Helper()
		must(t, n.Node.Do(func() error { return n.d.Attach(number, datapath.RolePod) }))
	}
	again := func() {
		t.Helper()
		must(t, n.d.Close())
		n.open(t)
	}
	renew := func() {
		t.Helper()
		must(t, n.Node.Netlink.LinkDel(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, Index: number}}))
		makeDevice(t, n, name, number)
	}
	for what, c := range map[string]struct {
		change func()
		want   datapath.PathState
	}{
		"same device":                     {func() {}, datapath.PathActive},
		"same device, another handle":     {again, datapath.PathActive},
		"another device":                  {renew, datapath.PathRevoked},
		"another device, other handle":    {func() { renew(); again() }, datapath.PathRevoked},
		"another device, in the meantime": {func() { must(t, n.d.Close()); renew(); n.open(t) }, datapath.PathRevoked},
	} {
		t.Run(what, func(t *testing.T) {
			makeDevice(t, n, name, number)
			hook()
			_, err := n.d.SetServices(services)
			must(t, err)
			slot, err := n.d.OpenPath(datapath.Path{Grant: "01NEW", Client: n.Client.Addr(lab.IPv4), ServiceID: 9, Service: "new",
				Ports: []uint16{podPort}, Deadline: datapath.BootTime() + time.Minute})
			must(t, err)
			c.change()
			hook()
			if s := n.state(t, slot); s != c.want {
				t.Errorf("path is in state %d, want %d", s, c.want)
			}
			must(t, n.d.EndPath(slot, datapath.PathRevoked))
			must(t, n.d.FreePath(slot))
			must(t, n.Node.Netlink.LinkDel(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, Index: number}}))
			must(t, n.d.Detach(number))
		})
	}
}

// makeDevice adds a veth whose other end nobody uses.
func makeDevice(t *testing.T, n *node, name string, ifindex int) {
	t.Helper()
	must(t, n.Node.Netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, Index: ifindex}, PeerName: name + "p"}))
}

func (n *node) state(t *testing.T, slot uint32) datapath.PathState {
	t.Helper()
	paths, err := n.d.Paths()
	must(t, err)
	for _, p := range paths {
		if p.Slot == slot {
			return p.State
		}
	}
	t.Fatalf("no path in slot %d", slot)
	return 0
}

// TestServicesOfOnePod: services of one pod share its devices, also at the same port, and what is pinned says which.
func TestServicesOfOnePod(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	pod, second := n.ifindex(t, lab.PodDevice(0)), n.ifindex(t, lab.Uplink)
	one := func(id uint32, name string, f lab.Family, ports ...uint16) datapath.Service {
		return datapath.Service{ID: id, Name: name, Target: datapath.TargetPod, Protocol: datapath.TCP, Addresses: []netip.Addr{n.Pod.Addr(f)},
			Ports: ports, Ifindex: pod, Besides: []int{second}, DenyUDP: true}
	}
	want := []datapath.Service{one(1, "first", lab.IPv4, 8080), one(2, "second", lab.IPv6, 8080, 8081)}
	_, err := n.d.SetServices(want)
	must(t, err)
	must(t, n.d.Close())
	must(t, n.Node.Do(func() (err error) { n.d, err = datapath.Open(n.cf); return err }))
	ports := map[string]int{}
	for _, s := range n.d.Services() {
		ports[s.Name] = len(s.Ports)
		if s.Ifindex != pod || len(s.Addresses) != 1 {
			t.Errorf("read back as %+v", s)
		}
	}
	if !maps.Equal(ports, map[string]int{"first": 1, "second": 2}) {
		t.Errorf("ports read back: %v", ports)
	}
	var besides []int
	for _, s := range n.d.Services() {
		besides = append(besides, s.Besides...)
	}
	if !slices.Contains(besides, second) {
		t.Error("the second device is forgotten")
	}
}
