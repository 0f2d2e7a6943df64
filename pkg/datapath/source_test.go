package datapath_test

import (
	"net/netip"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// TestForeignSource: a pod that sends with the address of a client that has a path reaches the service, unless its device is
// held to its own. Its own connections work either way.
func TestForeignSource(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	n.copyProxy(t)
	pod, err := n.Node.Ifindex(lab.PodDevice(1))
	must(t, err)
	for _, key := range []string{"all", lab.PodDevice(1)} { // else the kernel itself drops them, in IPv4
		must(t, n.Node.Sysctl("ipv4/conf/"+key+"/rp_filter", "0"))
	}
	for _, f := range lab.Families() {
		for _, held := range []bool{false, true} {
			t.Run(f.String()+map[bool]string{false: "/not held", true: "/held"}[held], func(t *testing.T) {
				must(t, n.d.SetDevices(map[int]datapath.DeviceFacts{pod: {Pod: true, BoundIPv4: held, BoundIPv6: held}}))
				c := n.cells()[4] // a client to the pod
				if f == lab.IPv6 {
					c = n.cells()[11]
				}
				slot := c.path(n, t, time.Minute)
				before, err := n.d.Counters()
				must(t, err)
				from := netip.AddrPortFrom(c.from, 40000)
				frame := tcp(from, netip.AddrPortFrom(n.Pod.Addr(f), podPort), syn)
				frame.SrcMAC, err = n.Pods[1].MAC("eth0")
				must(t, err)
				frame.DstMAC, err = n.Node.MAC(lab.PodDevice(1))
				must(t, err)
				tap, err := n.Pod.Tap(podPort)
				must(t, err)
				must(t, n.Pods[1].Inject("eth0", frame.Bytes()))
				count := func(r flow.Reason) uint64 {
					now, err := n.d.Counters()
					must(t, err)
					return now[r].Packets - before[r].Packets
				}
				if held {
					waitUntil(t, "the drop", func() bool { return count(flow.ReasonSourceForeign) == 1 })
				}
				if got, err := (cell{client: n.Pods[1], from: n.Pods[1].Addr(f), to: n.Node.Addr(f), port: hostPort}).ask(within(t)); got != "proxy" {
					t.Errorf("the pod's own connection was answered by %s (%v)", got, err)
				}
				arrived := func() bool {
					seen, err := tap.Count(func(p lab.Packet) bool { return p.Src == from && p.SYN })
					must(t, err)
					return seen > 0
				}
				if held && arrived() {
					t.Error("a packet with the client's address arrived")
				} else if !held {
					waitUntil(t, "the packet that nothing stops", arrived)
				}
				must(t, n.d.EndPath(slot, datapath.PathRevoked))
				must(t, n.d.FreePath(slot))
			})
		}
	}
}
