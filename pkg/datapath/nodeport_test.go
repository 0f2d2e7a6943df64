package datapath_test

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// nodePort is a port of the node that leads to the pod's service, as a NodePort, a hostPort and the address of a Service do.
const nodePort = 30080

// forward puts in the node what kube-proxy and portmap put there: the destination is changed before the packet is routed; with
// masquerade, the source too.
func (n *node) forward(t *testing.T, masquerade bool) {
	t.Helper()
	rules := "table inet ports {}\ndelete table inet ports\ntable inet ports {\n chain pre {\n  type nat hook prerouting priority dstnat;\n" +
		fmt.Sprintf("  meta nfproto ipv4 tcp dport %d dnat ip to %s:%d\n", nodePort, n.Pod.Addr(lab.IPv4), podPort) +
		fmt.Sprintf("  meta nfproto ipv6 tcp dport %d dnat ip6 to [%s]:%d\n }\n", nodePort, n.Pod.Addr(lab.IPv6), podPort)
	if masquerade {
		rules += " chain post {\n  type nat hook postrouting priority srcnat;\n  ct status dnat masquerade\n }\n"
	}
	n.rules(t, rules+"}\n")
}

// TestPortsOfTheNode: who comes by a port of the node that leads to a pod meets the pod's protection: the proxy, or the path of the client's
// address. With the source masqueraded everybody is the node: no path of a client serves.
func TestPortsOfTheNode(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	n.copyProxy(t)
	for _, masquerade := range []bool{false, true} {
		n.forward(t, masquerade)
		for _, f := range lab.Families() {
			t.Run(fmt.Sprintf("masquerade %v/%s", masquerade, f), func(t *testing.T) {
				c := cell{"nodePort", n.Client, n.Client.Addr(f), n.Node.Addr(f), podPort, podID}
				ask := func(bypassed bool) {
					t.Helper()
					opened := n.counted(t, flow.ReasonPathOpen)
					own, seen, err := n.Client.Ask(within(t), netip.AddrPort{}, netip.AddrPortFrom(c.to, nodePort))
					if err != nil || (own.Addr() == seen.Addr()) == masquerade || masquerade && seen.Addr() != nodeTowards(n, f) {
						t.Fatalf("client %s, and the service saw %s: %v; counters:%s", own, seen, err, n.counters(t))
					}
					if got := n.counted(t, flow.ReasonPathOpen) > opened; got != bypassed {
						t.Errorf("went around the proxy: %v, want %v; counters:%s", got, bypassed, n.counters(t))
					}
				}
				ask(false)
				slot := c.path(n, t, time.Minute)
				ask(!masquerade)
				must(t, n.d.EndPath(slot, datapath.PathRevoked))
				ask(false)
			})
		}
	}
}
