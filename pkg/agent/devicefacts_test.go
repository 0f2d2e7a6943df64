package agent

import (
	"maps"
	"net"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestFactsOfDevices(t *testing.T) {
	c := classifier{pods: []string{"veth*"}, px0: func() int { return 9 }}
	bridge := &link{name: "br0", ifindex: 5, kind: "bridge"}
	shared, empty := &link{name: "br1", ifindex: 10, kind: "bridge"}, link{name: "br2", ifindex: 13, kind: "bridge"}
	links := []link{{name: "eth0", ifindex: 1}, {name: "veth1", ifindex: 2}, {name: "veth2", ifindex: 3}, {name: "veth3", ifindex: 4, master: bridge},
		*bridge, {name: "lo", ifindex: 6, loopback: true}, {name: "px0", ifindex: 9},
		*shared, {name: "veth4", ifindex: 11, master: shared}, {name: "eth1", ifindex: 12, master: shared}, empty}
	route := func(dst string, ifindex int) netlink.Route {
		_, n, err := net.ParseCIDR(dst)
		must(t, err)
		return netlink.Route{Dst: n, LinkIndex: ifindex, Type: unix.RTN_UNICAST}
	}
	gateway := route("10.9.0.0/16", 3)
	gateway.Gw = net.IPv4(10, 2, 0, 2)
	got := factsOf(c, links, []netlink.Route{route("10.2.0.2/32", 2), route("fd00::2/128", 2), route("fe80::/64", 3), gateway, route("10.1.0.0/24", 1), route("10.5.0.0/24", 5)})
	want := map[int]datapath.DeviceFacts{
		1: {Uplink: true}, 2: {Pod: true, BoundIPv4: true, BoundIPv6: true}, 3: {Pod: true}, 4: {Pod: true}, 5: {Pods: true}, 11: {Pod: true},
	}
	if !maps.Equal(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}
