package leak

import (
	"errors"
	"net"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/test/lab"
)

// TestLabTakesItsFiltersAlong although a connection that nobody holds keeps the namespace: what was sent on it is not acknowledged.
func TestLabTakesItsFiltersAlong(t *testing.T) {
	needRoot(t)
	before := begin(t)
	l := lab.New(t, lab.Options{})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(hang(l, program(t, "sp_leak")))
	must(leaveUnanswered(t, l))
	must(l.Close())
	left, err := wait(token, before, grace)
	if err != nil || len(left) > 0 {
		t.Errorf("after the lab is gone: %v (%v)", left, err)
	}
}

// hang leaves a program with nothing but a filter on the node's lo.
func hang(l *lab.Lab, p *ebpf.Program) error {
	lo, err := l.Node.Netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	attrs := netlink.QdiscAttrs{LinkIndex: lo.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}
	if err := l.Node.Netlink.QdiscAdd(&netlink.Clsact{QdiscAttrs: attrs}); err != nil {
		return err
	}
	err = l.Node.Netlink.FilterAdd(&netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: lo.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 1},
		Fd:          p.FD(), Name: "sp_leak", DirectAction: true,
	})
	return errors.Join(err, p.Close())
}

// TestFilterOfAnotherProcess: a program that nothing but a filter holds is of whoever holds its maps.
func TestFilterOfAnotherProcess(t *testing.T) {
	needRoot(t)
	begin(t)
	l := lab.New(t, lab.Options{})
	before, err := take(token)
	if err != nil {
		t.Fatal(err)
	}
	spec := &ebpf.MapSpec{Name: "sp_leak_map", Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1}
	var shared [2]*ebpf.Map // one that the other process holds, and one that it does not
	for i := range shared {
		if shared[i], err = ebpf.NewMap(spec); err != nil {
			t.Fatal(err)
		}
	}
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "sp_leak", Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
		asm.LoadMapPtr(asm.R1, shared[0].FD()), asm.LoadMapPtr(asm.R2, shared[1].FD()), asm.LoadImm(asm.R0, -1, asm.DWord), asm.Return(),
	}})
	if err != nil {
		t.Fatal(err)
	}
	if err := hang(l, p); err != nil {
		t.Fatal(err)
	}
	pid := holder(t, shared[0].FD())
	defer func() { _ = unix.Kill(pid, unix.SIGKILL) }()
	for _, m := range shared {
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
	}
	sees(t, before)
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	sees(t, before, `map \d+: sp_leak_map`, `map \d+: sp_leak_map`, `program \d+: sp_leak`)
}

// leaveUnanswered has the node close a connection whose peer went silent.
func leaveUnanswered(t *testing.T, l *lab.Lab) error {
	ln, err := l.Client.Listen(netip.AddrPortFrom(l.Client.Addr(lab.IPv4), 7000))
	if err != nil {
		return err
	}
	defer ln.Close()
	c, err := l.Node.Dial(t.Context(), netip.AddrPort{}, ln.Addr().(*net.TCPAddr).AddrPort())
	if err != nil {
		return err
	}
	up, err := l.Node.Netlink.LinkByName(lab.Uplink)
	if err != nil {
		return err
	}
	if err := l.Node.Netlink.LinkSetDown(up); err != nil {
		return err
	}
	if _, err := c.Write([]byte("is anybody there?")); err != nil {
		return err
	}
	return c.Close()
}
