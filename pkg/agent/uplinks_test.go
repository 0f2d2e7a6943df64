package agent

import (
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// withXDP adds to the configuration.
func (in *installed) withXDP(spec string) {
	in.t.Helper()
	text, err := os.ReadFile(in.config)
	must(in.t, err)
	kept, _, _ := strings.Cut(string(text), "  xdp:")
	must(in.t, os.WriteFile(in.config, []byte(kept+"  xdp: "+spec+"\n"), 0o600))
}

func (in *installed) xdp() string {
	in.t.Helper()
	for _, h := range in.status().Hooks {
		if h.Device == lab.Uplink {
			return h.Xdp
		}
	}
	in.t.Fatal("the uplink has no hooks")
	return ""
}

// syn sends one from outside with a source of its own.
func (in *installed) syn(source netip.Addr) {
	in.t.Helper()
	p := packet.Packet{Src: netip.AddrPortFrom(source, 40000), Dst: netip.AddrPortFrom(in.lab.Node.Addr(lab.IPv4), 5432), Flags: packet.SYN}
	if !source.Is4() {
		p.Dst = netip.AddrPortFrom(in.lab.Node.Addr(lab.IPv6), 5432)
	}
	var err error
	p.SrcMAC, err = in.lab.Client.MAC("eth0")
	must(in.t, err)
	p.DstMAC, err = in.lab.Node.MAC(lab.Uplink)
	must(in.t, err)
	must(in.t, in.lab.Client.Inject("eth0", p.Bytes()))
}

// dropped waits until a reason has counted so many packets, sending one for each look.
func (in *installed) dropped(reason string, source netip.Addr) {
	in.t.Helper()
	before := in.status().Reasons[reason]
	in.eventually(source.String()+" is dropped as "+reason, func() bool {
		in.syn(source)
		return in.status().Reasons[reason] > before
	})
}

// TestUplinks: what configuration asks of XDP is done, shown, and told as a problem where it cannot be done.
func TestUplinks(t *testing.T) {
	in := install(t)
	in.withXDP(`{mode: native, denySources: ["198.51.100.0/24", "2001:db8:bad::/48"], synsPerSource: {rate: 1, burst: 3}}`)
	agent := in.ready("run")
	if got := in.xdp(); got != "native: configured" {
		t.Errorf("XDP is %q", got)
	}
	for _, f := range lab.Families() {
		in.dropped("XDP_OWN_SOURCE", in.lab.Pod.Addr(f)) // by the route to its device
	}
	in.dropped("XDP_DENIED", netip.MustParseAddr("198.51.100.77"))
	in.dropped("XDP_DENIED", netip.MustParseAddr("2001:db8:bad::77"))
	in.dropped("XDP_SYN_SOURCE", in.lab.Client.Addr(lab.IPv4))
	in.newAddress("10.1.0.44/32")
	in.dropped("XDP_OWN_SOURCE", netip.MustParseAddr("10.1.0.44"))
	if got := in.scrape(); !contains(got, `sallyport_uplinks{cause="asked",xdp="native"} 1`) {
		t.Error("metrics lack the uplink")
	}
	must(t, agent.Stop(10*time.Second))

	in.withXDP(`{mode: auto, denySources: ["198.51.100.0/24"]}`)
	agent = in.ready("run")
	if got := in.xdp(); !strings.HasPrefix(got, "off: up0 is no network card") {
		t.Errorf("XDP is %q", got)
	}
	if s := in.status(); !slices.ContainsFunc(s.Problems, func(p string) bool { return strings.Contains(p, errNoFilter.Error()) }) {
		t.Errorf("problems are %q", s.Problems)
	}
	must(t, agent.Stop(10*time.Second))
	in.uninstall()
}

// newAddress gives the node one more.
func (in *installed) newAddress(cidr string) {
	in.t.Helper()
	lo, err := in.lab.Node.Netlink.LinkByName("lo")
	must(in.t, err)
	addr, err := netlink.ParseAddr(cidr)
	must(in.t, err)
	must(in.t, in.lab.Node.Netlink.AddrAdd(lo, addr))
}

// TestUplinkTaken: a mode that was asked for by name and is not to be had is a problem.
func TestUplinkTaken(t *testing.T) {
	p := newProblems(slog.New(slog.DiscardHandler))
	b := newTestbed(t, 64)
	d, err := datapath.Open(b.config)
	must(t, err)
	defer d.Close()
	u := &uplinks{datapath: d, classify: classifier{pods: []string{"vethpod*"}, px0: func() int { return 0 }}, problems: p}
	u.spec.Mode = "native"
	must(t, b.lab.Node.Do(func() error {
		up, err := netlink.LinkByName(lab.Uplink)
		if err != nil {
			return err
		}
		attrs := netlink.LinkAttrs{Name: "mv0", ParentIndex: up.Attrs().Index}
		if err := netlink.LinkAdd(&netlink.Macvlan{LinkAttrs: attrs, Mode: netlink.MACVLAN_MODE_BRIDGE}); err != nil {
			return err
		}
		links, err := listLinks()
		u.sync(links)
		return err
	}))
	if got := p.lines(); !slices.ContainsFunc(got, func(line string) bool { return contains(line, "xdp mv0: no native XDP: native: the driver cannot") }) {
		t.Errorf("problems are %q", got)
	}
}

func TestEndsAt(t *testing.T) {
	to := func(cidr string) *net.IPNet {
		_, n, err := net.ParseCIDR(cidr)
		must(t, err)
		return n
	}
	direct := netlink.Route{LinkIndex: 3, Type: unix.RTN_UNICAST}
	for _, c := range []struct {
		dst  string
		gw   net.IP
		typ  int
		want bool
	}{
		{"10.2.0.0/24", nil, unix.RTN_UNICAST, true}, {"10.2.0.7/32", nil, unix.RTN_UNICAST, true}, {"fd00:2::/64", nil, unix.RTN_UNICAST, true},
		{"10.2.0.0/24", net.IPv4(10, 1, 0, 2), unix.RTN_UNICAST, false}, {"0.0.0.0/0", nil, unix.RTN_UNICAST, false},
		{"::/0", nil, unix.RTN_UNICAST, false}, {"fe80::/64", nil, unix.RTN_UNICAST, false}, {"ff00::/8", nil, unix.RTN_UNICAST, false},
		{"169.254.0.0/16", nil, unix.RTN_UNICAST, false}, {"10.2.0.0/24", nil, unix.RTN_BLACKHOLE, false},
	} {
		r := direct
		r.Dst, r.Gw, r.Type = to(c.dst), c.gw, c.typ
		if got, ok := endsAt(r); ok != c.want || ok && got.String() != c.dst {
			t.Errorf("%s by %v: %v %v, want %v", c.dst, c.gw, got, ok, c.want)
		}
	}
	if _, ok := endsAt(direct); ok {
		t.Error("a route without destination ends somewhere")
	}
}

// TestOwnSources: pods that protected services are in are ours if they are here.
func TestOwnSources(t *testing.T) {
	l := lab.New(t, lab.Options{Pods: 2})
	here, away := netip.MustParseAddr("10.7.0.1"), netip.MustParseAddr("10.7.0.2")
	must(t, l.Node.Do(func() error {
		got, err := ownSources(classifier{pods: []string{"vethpod*"}, px0: func() int { return 0 }}, []datapath.Service{
			{Target: datapath.TargetPod, Ifindex: 3, Addresses: []netip.Addr{here}}, {Target: datapath.TargetPod, Addresses: []netip.Addr{away}}})
		for _, want := range []string{"10.7.0.1/32", "10.2.0.0/24", "10.3.0.0/24", "fd00:2::/64", "10.1.0.1/32", "fd00:1::1/128", "127.0.0.1/32"} {
			if !slices.Contains(got, netip.MustParsePrefix(want)) {
				t.Errorf("own sources %v lack %s", got, want)
			}
		}
		for _, other := range []string{"10.7.0.2/32", "10.1.0.0/24", "fd00:1::/64", "fe80::/64"} {
			if slices.Contains(got, netip.MustParsePrefix(other)) {
				t.Errorf("own sources %v have %s", got, other)
			}
		}
		return err
	}))
}
