package hostile

import (
	"net"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/px"
	"github.com/sallyport-dev/sallyport/test/lab"
)

const (
	hostTCP = iota + 1
	hostUDP
	podTCP
	podUDP
)

// world is a node with services of its own and in its first pod, and attackers around it.
type world struct {
	*lab.Lab
	d      *datapath.Datapath // nil: nothing is enforced
	judges map[*lab.Namespace]judge
}

// newWorld makes a node; without enforcement it is the control.
func newWorld(t *testing.T, enforce bool) *world {
	t.Helper()
	w := build(t)
	if enforce {
		w.load(t)
		w.attach(t)
	}
	return w
}

// build is a node that enforces nothing.
func build(t *testing.T) *world {
	t.Helper()
	w := &world{Lab: lab.New(t, lab.Options{Pods: 3, UplinkMTU: 9000}), judges: map[*lab.Namespace]judge{}}
	for _, n := range []*lab.Namespace{w.Node, w.Pod} {
		w.judges[n] = newJudge(t, n)
		w.listen(t, n)
	}
	return w
}

// listen has a service at the protected port of a namespace.
func (w *world) listen(t *testing.T, n *lab.Namespace) {
	t.Helper()
	for _, f := range lab.Families() {
		any := map[lab.Family]netip.Addr{lab.IPv4: netip.IPv4Unspecified(), lab.IPv6: netip.IPv6Unspecified()}[f]
		_, err := n.WhoAnswers(netip.AddrPortFrom(any, port))
		check(t, err)
		var udp *net.UDPConn
		network := map[lab.Family]string{lab.IPv4: "udp4", lab.IPv6: "udp6"}[f]
		check(t, n.Do(func() (err error) {
			udp, err = net.ListenUDP(network, net.UDPAddrFromAddrPort(netip.AddrPortFrom(any, port)))
			return err
		}))
		t.Cleanup(func() { check(t, udp.Close()) })
	}
}

// load loads the datapath into the node, hooked nowhere, with a proxy's namespace that nobody serves:
// whatever is steered ends there.
func (w *world) load(t *testing.T) {
	t.Helper()
	bpffs, err := w.MountBPFFS()
	check(t, err)
	where := px.Config{Path: filepath.Join(w.Dir, "px")}
	var space *px.Namespace
	check(t, w.Node.Do(func() (err error) { space, err = px.Create(where); return err }))
	t.Cleanup(func() {
		check(t, space.Close())
		check(t, w.Node.Do(func() error { return px.Remove(where) }))
	})
	cfg := datapath.Config{Dir: filepath.Join(bpffs, "sallyport"), PxNetns: where.Path, Px0: space.Px0(), ListenPort: 15001,
		MaxFlows: 4096, MaxLegs: 65536, MaxPaths: 64, RingBytes: 1 << 16, MaxTTL: time.Hour}
	check(t, w.Node.Do(func() (err error) { w.d, err = datapath.Open(cfg); return err }))
	t.Cleanup(func() {
		check(t, w.d.Close())
		_, err := datapath.Uninstall(cfg.Dir)
		check(t, err)
	})
	w.protect(t)
	check(t, w.d.Renew(time.Hour))
}

func (w *world) attach(t *testing.T) {
	t.Helper()
	check(t, w.Node.Do(w.d.AttachPx))
	for name, role := range map[string]datapath.Role{lab.Uplink: datapath.RoleUplink, "lo": datapath.RoleLo,
		lab.PodDevice(0): datapath.RolePod, lab.PodDevice(1): datapath.RolePod, lab.PodDevice(2): datapath.RolePod} {
		w.hook(t, name, role)
	}
}

func (w *world) hook(t *testing.T, device string, role datapath.Role) {
	t.Helper()
	index, err := w.Node.Ifindex(device)
	check(t, err)
	check(t, w.Node.Do(func() error { return w.d.Attach(index, role) }))
}

func (w *world) protect(t *testing.T) {
	t.Helper()
	pod, err := w.Node.Ifindex(lab.PodDevice(0))
	check(t, err)
	at := []netip.Addr{w.Pod.Addr(lab.IPv4), w.Pod.Addr(lab.IPv6)}
	ports := []uint16{port}
	_, err = w.d.SetServices([]datapath.Service{
		{ID: hostTCP, Name: "host-tcp", Target: datapath.TargetHost, Ports: ports},
		{ID: hostUDP, Name: "host-udp", Target: datapath.TargetHost, Protocol: datapath.UDP, Ports: ports, Idle: time.Minute},
		{ID: podUDP, Name: "pod-udp", Target: datapath.TargetPod, Protocol: datapath.UDP, Ports: ports, Idle: time.Minute, Ifindex: pod, Addresses: at},
		{ID: podTCP, Name: "pod-tcp", Target: datapath.TargetPod, Ports: ports, Ifindex: pod, Addresses: at},
	})
	check(t, err)
}

// way is an attacker and what it attacks.
type way struct {
	name     string
	from     *lab.Namespace
	device   string // of the attacker
	src, dst netip.Addr
	srcMAC   [6]byte
	dstMAC   [6]byte
	mtu      int
	judge    judge
	// raw sends from the IP header on, by a raw socket: what a packet socket sends on lo is refused.
	raw bool
}

func (a way) family() lab.Family {
	if a.dst.Is4() {
		return lab.IPv4
	}
	return lab.IPv6
}

func (a way) toPod() bool { return a.judge.in.Name == "pod0" }

// ways lists every attacker with every target, in one family.
func (w *world) ways(t *testing.T, f lab.Family) []way {
	t.Helper()
	remote := way{from: w.Client, device: "eth0", src: w.Client.Addr(f), dstMAC: mac(t, w.Node, lab.Uplink), mtu: 9000}
	pod := way{from: w.Pods[1], device: "eth0", src: w.Pods[1].Addr(f), dstMAC: mac(t, w.Node, lab.PodDevice(1)), mtu: 1500}
	var all []way
	for name, a := range map[string]way{"client": remote, "pod": pod} {
		a.srcMAC = mac(t, a.from, a.device)
		host, inPod := a, a
		host.name, host.dst, host.judge = name+" to host", w.Node.Addr(f), w.judges[w.Node]
		inPod.name, inPod.dst, inPod.judge, inPod.mtu = name+" to pod", w.Pod.Addr(f), w.judges[w.Pod], 1500
		all = append(all, host, inPod)
	}
	return append(all, way{name: "lo to host", raw: true, from: w.Node, device: "lo", src: f.Loopback(), dst: f.Loopback(), mtu: 65535, judge: w.judges[w.Node]})
}

func mac(t *testing.T, n *lab.Namespace, device string) [6]byte {
	t.Helper()
	m, err := n.MAC(device)
	check(t, err)
	return m
}
