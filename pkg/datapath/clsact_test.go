package datapath_test

import (
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// foreignProgram is somebody else's program that lets everything go on.
func foreignProgram(t *testing.T) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "other", Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.LoadImm(asm.R0, -1, asm.DWord), asm.Return()}})
	must(t, err)
	t.Cleanup(func() { must(t, p.Close()) })
	return p
}

// foreignFilter puts it on the ingress of a device of the node, with clsact if there is none.
func (n *node) foreignFilter(t *testing.T, device string, priority uint16, handle uint32) {
	t.Helper()
	dev, err := n.Node.Netlink.LinkByName(device)
	must(t, err)
	if !n.hasClsact(t, device) {
		must(t, n.Node.Netlink.QdiscAdd(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: dev.Attrs().Index,
			Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}))
	}
	must(t, n.Node.Netlink.FilterAdd(&netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: dev.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Handle: handle,
			Protocol: unix.ETH_P_ALL, Priority: priority},
		Fd: foreignProgram(t).FD(), Name: "other", DirectAction: true}))
}

func (n *node) hasClsact(t *testing.T, device string) bool {
	t.Helper()
	dev, err := n.Node.Netlink.LinkByName(device)
	must(t, err)
	all, err := n.Node.Netlink.QdiscList(dev)
	must(t, err)
	for _, q := range all {
		if q.Type() == "clsact" {
			return true
		}
	}
	return false
}

// filters are the names of the BPF filters on one side of a device, first to run first.
func filters(h *netlink.Handle, dev netlink.Link, parent uint32) (names []string, err error) {
	all, err := h.FilterList(dev, parent)
	for _, f := range all {
		if b, ok := f.(*netlink.BpfFilter); ok && b.Handle != 0 {
			names = append(names, b.Name)
		}
	}
	return names, err
}

// TestForeignPriority: where somebody else has priority 1 nothing is touched, and the error says who
// and where.
func TestForeignPriority(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileClsact)
	must(t, n.Node.Netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "taken0"}, PeerName: "taken1"}))
	n.foreignFilter(t, "taken0", 1, 1)
	ifindex, err := n.Node.Ifindex("taken0")
	must(t, err)
	err = n.Node.Do(func() error { return n.d.Attach(ifindex, datapath.RolePod) })
	if !errors.Is(err, datapath.ErrOwned) || !strings.Contains(err.Error(), "taken0") || !strings.Contains(err.Error(), `bpf "other"`) {
		t.Errorf("%v, want %v with device and owner", err, datapath.ErrOwned)
	}
	dev, err := n.Node.Netlink.LinkByName("taken0")
	must(t, err)
	if names, err := filters(n.Node.Netlink, dev, netlink.HANDLE_MIN_INGRESS); err != nil || len(names) != 1 || names[0] != "other" {
		t.Errorf("filters are %v (%v), want the other's alone", names, err)
	}
}

// TestForeignQdisc: a qdisc that was there, or that somebody uses, is there after the uninstall too.
func TestForeignQdisc(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileClsact)
	must(t, n.Node.Netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "late0"}, PeerName: "late1"}))
	n.foreignFilter(t, "late0", 7, 1) // with a qdisc that is not ours
	ifindex, err := n.Node.Ifindex("late0")
	must(t, err)
	must(t, n.Node.Do(func() error { return n.d.Attach(ifindex, datapath.RoleUplink) }))
	n.foreignFilter(t, lab.Uplink, 7, 1) // into the qdisc that is ours
	n.uninstall(t)
	must(t, n.Node.Do(func() error { _, err := datapath.DetachAll(n.Cgroup()); return err }))
	n.noHooks(t)
	for device, want := range map[string]bool{"late0": true, lab.Uplink: true, lab.PodDevice(0): false, "lo": false} {
		if got := n.hasClsact(t, device); got != want {
			t.Errorf("%s has clsact: %v, want %v", device, got, want)
		}
	}
}

// TestOtherProfile: a node whose configuration changes from links to filters, or back, has each hook
// once, and a live connection goes on.
func TestOtherProfile(t *testing.T) { eachProfile(t, testOtherProfile) }

func testOtherProfile(t *testing.T, profile datapath.Profile) {
	needTCX(t)
	t.Parallel()
	n := newNode(t, profile)
	n.copyProxy(t)
	direct, proxied := n.cells()[0], n.cells()[4]
	direct.path(n, t, time.Minute)
	conn := direct.dialDirect(t)
	through := proxied.dial(t)
	_, err := lab.Ask(through)
	must(t, err)
	must(t, n.d.Close())

	n.cf.Profile = datapath.ProfileTCX
	if profile == datapath.ProfileTCX {
		n.cf.Profile = datapath.ProfileClsact
	}
	n.open(t)
	must(t, n.attachAll(n.d))
	if n.d.Profile() != n.cf.Profile {
		t.Errorf("profile is %s, want %s", n.d.Profile(), n.cf.Profile)
	}
	var hooks []string
	must(t, n.Node.Do(func() (err error) { hooks, err = datapath.Attached(n.Cgroup()); return err }))
	if len(hooks) != 11 { // with those at sockets
		t.Errorf("hooks are %v, want each once", hooks)
	}
	for name, c := range map[string]net.Conn{"bypassed": conn, "proxied": through} {
		if _, err := lab.Ask(c); err != nil {
			t.Errorf("the %s connection: %v", name, err)
		}
	}
}
