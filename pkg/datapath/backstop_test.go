package datapath_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// late is a pod that appeared while nobody looked: its device was never hooked.
type late struct {
	*lab.Namespace
	device  string // on the node
	ifindex int
}

// latePod makes one.
func (n *node) latePod(t *testing.T) late {
	t.Helper()
	pod, err := n.StartPod(0, nil)
	must(t, err)
	device := lab.StartedDevice(0)
	ifindex, err := n.Node.Ifindex(device)
	must(t, err)
	return late{pod, device, ifindex}
}

// cannotReach holds that nobody answers there, and that nothing of it got to a socket.
func cannotReach(t *testing.T, from *lab.Namespace, to netip.AddrPort) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	if own, seen, err := from.Ask(ctx, netip.AddrPort{}, to); err == nil {
		t.Errorf("%s was reached from %s (it saw %s), want nobody", to, own, seen)
	}
}

// refusedOf gives what was refused of a device of the node.
func (n *node) refusedOf(t *testing.T, device string) (packets uint64) {
	t.Helper()
	must(t, n.Node.Do(func() error {
		all, err := n.d.Refused()
		for _, r := range all {
			if r.Host && r.Device == device {
				packets += r.Packets
			}
		}
		return err
	}))
	return packets
}

// TestLateClient: a new pod on a device without hooks reaches neither a service of the node nor one of a
// pod, from its first packet, and is counted.
func TestLateClient(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	n.copyProxy(t)
	p := n.latePod(t)
	for _, f := range lab.Families() {
		t.Run(f.String(), func(t *testing.T) {
			before := n.refusedOf(t, p.device)
			cannotReach(t, p.Namespace, netip.AddrPortFrom(n.Node.Addr(f), hostPort))
			if n.refusedOf(t, p.device) == before {
				t.Errorf("nothing was counted for %s: %+v", p.device, n.refusals(t))
			}
			// To a pod: its own device has hooks, which steer.
			_, seen, err := p.Ask(within(t), netip.AddrPort{}, netip.AddrPortFrom(n.Pod.Addr(f), podPort))
			if err != nil || seen.Addr() != p.Addr(f) {
				t.Errorf("to a pod with hooks: %v saw %s, want the proxy for %s", err, seen, p.Addr(f))
			}
			if _, _, err := p.Ask(within(t), netip.AddrPort{}, n.unprotected(t, f)); err != nil {
				t.Errorf("unprotected port: %v", err)
			}
		})
	}
}

// TestLateDatagrams: nor does a datagram of such a pod reach a UDP service of the node.
func TestLateDatagrams(t *testing.T) {
	t.Parallel()
	const port = 8095
	n := newNode(t, datapath.ProfileAuto)
	p := n.latePod(t)
	_, err := n.d.SetServices(append(n.d.Services(), datapath.Service{ID: 9, Name: "datagrams", Target: datapath.TargetHost, Protocol: datapath.UDP,
		Ports: []uint16{port}, Idle: time.Minute}))
	must(t, err)
	for _, f := range lab.Families() {
		to := netip.AddrPortFrom(n.Node.Addr(f), port)
		var in, out *net.UDPConn
		must(t, n.Node.Do(func() (err error) { in, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(to)); return err }))
		defer in.Close()
		must(t, p.Do(func() (err error) { out, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to)); return err }))
		defer out.Close()
		before := n.refusedOf(t, p.device)
		_, err := out.Write([]byte("?"))
		must(t, err)
		must(t, in.SetReadDeadline(time.Now().Add(300*time.Millisecond)))
		if k, from, err := in.ReadFromUDPAddrPort(make([]byte, 16)); err == nil {
			t.Errorf("%v: %d bytes arrived from %s", f, k, from)
		}
		if n.refusedOf(t, p.device) == before {
			t.Errorf("%v: nothing was counted: %s", f, n.counters(t))
		}
	}
}

// unprotected is a service of the node on another port.
func (n *node) unprotected(t *testing.T, f lab.Family) netip.AddrPort {
	t.Helper()
	s, err := n.Node.WhoAnswers(netip.AddrPortFrom(n.Node.Addr(f), 9999))
	must(t, err)
	return s.Addr
}

func (n *node) refusals(t *testing.T) (all []datapath.Refusal) {
	t.Helper()
	must(t, n.Node.Do(func() (err error) { all, err = n.d.Refused(); return err }))
	return all
}

// TestLateServer: a pod with a protected service on a device without hooks is closed to everybody but the
// proxy, from its first packet.
func TestLateServer(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	p := n.latePod(t)
	n.protectAlso(t, p)
	for _, f := range lab.Families() {
		_, err := p.WhoAnswers(netip.AddrPortFrom(unspecified(f), podPort))
		must(t, err)
		to := netip.AddrPortFrom(p.Addr(f), podPort)
		for name, from := range map[string]*lab.Namespace{"remote": n.Client, "pod": n.Pods[1], "node": n.Node} {
			t.Run(name+"/"+f.String(), func(t *testing.T) {
				n.unhook(t, map[string]string{"remote": lab.Uplink, "pod": lab.PodDevice(1), "node": "lo"}[name])
				before := n.countedBackstop(t)
				cannotReach(t, from, to)
				if n.countedBackstop(t) == before {
					t.Errorf("nothing was counted: %s", n.counters(t))
				}
			})
		}
	}
	i := slices.IndexFunc(n.refusals(t), func(r datapath.Refusal) bool { return !r.Host && r.Ifindex > 1 && r.Packets > 0 && r.Bytes > 0 })
	if i < 0 {
		t.Errorf("refusals are %+v, want one of the pod's device in its own namespace", n.refusals(t))
	}
}

func (n *node) countedBackstop(t *testing.T) uint64 {
	t.Helper()
	c, err := n.d.Counters()
	must(t, err)
	return c[flow.ReasonBackstop].Packets
}

// protectAlso puts the late pod's service into the table. Its device is known, and has no hooks.
func (n *node) protectAlso(t *testing.T, p late) {
	t.Helper()
	services := n.d.Services()
	services = append(services, datapath.Service{ID: 3, Name: "late-echo", Target: datapath.TargetPod, Ports: []uint16{podPort},
		Ifindex: p.ifindex, Addresses: []netip.Addr{p.Addr(lab.IPv4), p.Addr(lab.IPv6)}})
	_, err := n.d.SetServices(services)
	must(t, err)
}

// unhook takes the hooks off a device, as if it had never had any.
func (n *node) unhook(t *testing.T, device string) {
	t.Helper()
	ifindex, err := n.Node.Ifindex(device)
	must(t, err)
	must(t, n.Node.Do(func() error { return n.d.Detach(ifindex) }))
}

// TestRefusedAtOnce: the client of a service of the node is told, and does not wait.
func TestRefusedAtOnce(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	p := n.latePod(t)
	for _, f := range lab.Families() {
		_, err := p.Dial(within(t), netip.AddrPort{}, netip.AddrPortFrom(n.Node.Addr(f), hostPort))
		if !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%v: %v, want %v", f, err, unix.ECONNREFUSED)
		}
	}
}

// TestSecondLine: with the look-up hook gone, the control group still refuses.
func TestSecondLine(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	p := n.latePod(t)
	must(t, n.Node.Do(func() error { return datapath.DetachBackstop(n.d, "sp_sklookup") }))
	for _, f := range lab.Families() {
		before := n.refusedOf(t, p.device)
		cannotReach(t, p.Namespace, netip.AddrPortFrom(n.Node.Addr(f), hostPort))
		if n.refusedOf(t, p.device) == before {
			t.Errorf("%v: nothing was counted", f)
		}
	}
	must(t, n.Node.Do(func() error { return datapath.DetachBackstop(n.d, "sp_cg_in") }))
	for _, f := range lab.Families() { // the control: without either, the attack arrives
		if own, seen, err := p.Ask(within(t), netip.AddrPort{}, netip.AddrPortFrom(n.Node.Addr(f), hostPort)); err != nil || own != seen {
			t.Errorf("%v: %s was seen as %s (%v), want an answer of the service: no line is left", f, own, seen, err)
		}
	}
}

// TestPodsOwnLoopback: a pod reaches its own service by its own address, unless that is denied.
func TestPodsOwnLoopback(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	for _, f := range lab.Families() {
		to := netip.AddrPortFrom(n.Pod.Addr(f), podPort)
		must(t, n.d.DenyPodLoopback(false))
		if _, _, err := n.Pod.Ask(within(t), netip.AddrPort{}, to); err != nil {
			t.Errorf("%v: admitted by default: %v", f, err)
		}
		c, err := n.d.Counters()
		must(t, err)
		if c[flow.ReasonPodLoopback].Packets == 0 {
			t.Errorf("%v: not counted: %s", f, n.counters(t))
		}
		must(t, n.d.DenyPodLoopback(true))
		cannotReach(t, n.Pod, to)
	}
}

// TestBackstopComesBack: a link that somebody detached is made anew, and its loss is told.
func TestBackstopComesBack(t *testing.T) {
	n := newLeakFree(t, datapath.ProfileAuto)
	attach := func() (made []string) {
		must(t, n.Node.Do(func() (err error) { made, err = n.d.AttachBackstop(n.Cgroup()); return err }))
		return made
	}
	if made := attach(); len(made) > 0 {
		t.Errorf("attached anew: %v, want none", made)
	}
	for _, name := range []string{"sp_cg_in", "sp_cg_out", "sp_sklookup"} {
		must(t, n.Node.Do(func() error { return datapath.DetachBackstop(n.d, name) }))
		if made := attach(); !slices.Equal(made, []string{name}) {
			t.Errorf("attached anew: %v, want %s", made, name)
		}
	}
	if got := n.d.Backstop(); len(got) != 3 || got[0].Where != n.Cgroup() {
		t.Errorf("backstop is %+v, want all three parts", got)
	}
}

// TestAdoptedBackstop: the next agent finds the links and keeps them.
func TestAdoptedBackstop(t *testing.T) {
	n := newLeakFree(t, datapath.ProfileAuto)
	before, err := n.d.LinkIDs()
	must(t, err)
	must(t, n.d.Close())
	n.open(t)
	must(t, n.attachAll(n.d))
	after, err := n.d.LinkIDs()
	must(t, err)
	for _, name := range []string{"sp_cg_in", "sp_cg_out", "sp_sklookup"} {
		if before[name] == 0 || before[name] != after[name] {
			t.Errorf("%s: link %d, was %d", name, after[name], before[name])
		}
	}
}

// TestFindCgroup: the root is found wherever it is mounted, and nothing else is taken for it.
func TestFindCgroup(t *testing.T) {
	root, err := datapath.FindCgroup()
	must(t, err)
	if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err != nil {
		t.Errorf("%s is no control group: %v", root, err)
	}
	n := newLeakFree(t, datapath.ProfileAuto)
	for _, dir := range []string{n.Dir, filepath.Join(root, "not-there"), "/"} {
		must(t, n.Node.Do(func() error {
			if _, err := n.d.AttachBackstop(dir); !errors.Is(err, datapath.ErrCgroup) {
				t.Errorf("attach to %s: %v, want %v", dir, err, datapath.ErrCgroup)
			}
			return nil
		}))
	}
}

// TestChosenSocket: another program's choice of a socket does not open the port of that socket.
func TestChosenSocket(t *testing.T) {
	t.Parallel()
	const open, closed = 9998, 8082
	n := newNode(t, datapath.ProfileAuto)
	_, err := n.d.SetServices(append(n.d.Services(), datapath.Service{ID: 4, Name: "chosen", Target: datapath.TargetHost, Ports: []uint16{closed}}))
	must(t, err)
	for _, f := range lab.Families() {
		s, err := n.Node.WhoAnswers(netip.AddrPortFrom(n.Node.Other(f), open-1))
		must(t, err)
		n.chooseSocket(t, open, n.listen(t, f, closed))
		cannotReach(t, n.Client, netip.AddrPortFrom(n.Node.Addr(f), open))
		if n.countedBackstop(t) == 0 {
			t.Errorf("%v: nothing was counted: %s", f, n.counters(t))
		}
		if _, _, err := n.Client.Ask(within(t), netip.AddrPort{}, s.Addr); err != nil {
			t.Errorf("%v: unprotected port: %v", f, err)
		}
	}
}

// listen opens a listener of the node on every address.
func (n *node) listen(t *testing.T, f lab.Family, port uint16) *net.TCPListener {
	t.Helper()
	ln, err := n.Node.Listen(netip.AddrPortFrom(unspecified(f), port))
	must(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln.(*net.TCPListener)
}

// chooseSocket has a program of somebody else give connections to one port to a listener of another one.
func (n *node) chooseSocket(t *testing.T, port int32, ln *net.TCPListener) {
	t.Helper()
	sockets, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.SockMap, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	must(t, err)
	t.Cleanup(func() { sockets.Close() })
	raw, err := ln.SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) { err = sockets.Put(uint32(0), uint64(fd)) }))
	must(t, err)
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "choose", Type: ebpf.SkLookup, AttachType: ebpf.AttachSkLookup, License: "GPL",
		Instructions: chooser(port, sockets)})
	must(t, err)
	t.Cleanup(func() { prog.Close() })
	must(t, n.Node.Do(func() error {
		ns, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			return err
		}
		defer ns.Close()
		l, err := link.AttachNetNs(int(ns.Fd()), prog)
		if err == nil {
			t.Cleanup(func() { l.Close() })
		}
		return err
	}))
}

// chooser assigns the first socket of a map to look-ups for a port of this host.
func chooser(port int32, sockets *ebpf.Map) asm.Instructions {
	const localPort = 60 // in struct bpf_sk_lookup
	return asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R1, asm.R6, localPort, asm.Word),
		asm.JNE.Imm(asm.R1, port, "pass"),
		asm.StoreImm(asm.RFP, -4, 0, asm.Word),
		asm.LoadMapPtr(asm.R1, sockets.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "pass"),
		asm.Mov.Reg(asm.R7, asm.R0),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Reg(asm.R2, asm.R7),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnSkAssign.Call(),
		asm.Mov.Reg(asm.R1, asm.R7),
		asm.FnSkRelease.Call(),
		asm.Mov.Imm(asm.R0, 1).WithSymbol("pass"),
		asm.Return(),
	}
}
