package agent

import (
	"errors"
	"net"
	"net/netip"
	"reflect"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

func TestProbeTargets(t *testing.T) {
	services := []datapath.Service{
		{Name: "datagrams", Target: datapath.TargetHost, Protocol: datapath.UDP, Ports: []uint16{53}},
		{Name: "a", Target: datapath.TargetHost, Ports: []uint16{5432, 5433}},
		{Name: "b", Target: datapath.TargetHost, Ports: []uint16{6000}},
		{Name: "absent", Target: datapath.TargetPod, Addresses: []netip.Addr{clientA}, Ports: []uint16{1}},
		{Name: "c", Target: datapath.TargetPod, Addresses: []netip.Addr{clientA, clientB}, Ports: []uint16{80}, Ifindex: 3},
		{Name: "d", Target: datapath.TargetPod, Addresses: []netip.Addr{clientB}, Ports: []uint16{81}, Ifindex: 4},
	}
	want := []netip.AddrPort{
		netip.MustParseAddrPort("127.0.0.1:5432"),
		netip.MustParseAddrPort("10.1.0.2:80"),
		netip.MustParseAddrPort("[fd00:1::2]:80"),
	}
	if got := probeTargets(services); !reflect.DeepEqual(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// TestProbeBelievesCountersOnly: an answer proves nothing; a counter that moved does.
func TestProbeBelievesCountersOnly(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	target := netip.MustParseAddrPort(ln.Addr().String())
	for _, c := range []struct {
		name  string
		moves flow.Reason
		err   error
	}{
		{"the service answered itself", flow.ReasonPathLive, errNotCrossed},
		{"steered, no listener", flow.ReasonNoListener, nil},
		{"steered, the proxy took it", flow.ReasonPxAccept, nil},
	} {
		n := uint64(0)
		p := probe{counters: func() (map[flow.Reason]datapath.Counter, error) {
			n++
			return map[flow.Reason]datapath.Counter{c.moves: {Packets: n}}, nil
		}}
		if err := p.all(t.Context(), []netip.AddrPort{target}); !errors.Is(err, c.err) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}
