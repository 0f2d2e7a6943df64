package datapath_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// accepting is somebody else's program that ends the chain: what comes after it never runs.
func accepting(t *testing.T) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "accept", Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.LoadImm(asm.R0, 0, asm.DWord), asm.Return()}})
	must(t, err)
	t.Cleanup(func() { must(t, p.Close()) })
	return p
}

// takeOff removes our hook from the ingress of a device, as root can.
func (n *node) takeOff(t *testing.T, profile datapath.Profile, device string) {
	t.Helper()
	if profile == datapath.ProfileTCX {
		links, err := n.d.LinkIDs()
		must(t, err)
		ifindex, err := n.Node.Ifindex(device)
		must(t, err)
		_, err = n.Node.Run(within(t), "bpftool", "link", "detach", "id", fmt.Sprint(links[fmt.Sprintf("sp_dev_in-%d", ifindex)]))
		must(t, err)
		return
	}
	_, err := n.Node.Run(within(t), "tc", "filter", "del", "dev", device, "ingress")
	must(t, err)
}

// putAhead puts a program before ours on the ingress of a device.
func (n *node) putAhead(t *testing.T, profile datapath.Profile, device string) {
	t.Helper()
	dev, err := n.Node.Netlink.LinkByName(device)
	must(t, err)
	prog := accepting(t)
	if profile == datapath.ProfileClsact {
		must(t, n.Node.Netlink.FilterAdd(&netlink.BpfFilter{
			FilterAttrs: netlink.FilterAttrs{LinkIndex: dev.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 2,
				Protocol: unix.ETH_P_ALL, Priority: 1},
			Fd: prog.FD(), Name: "accept", DirectAction: true}))
		return
	}
	must(t, n.Node.Do(func() error {
		l, err := link.AttachTCX(link.TCXOptions{Interface: dev.Attrs().Index, Program: prog, Attach: ebpf.AttachTCXIngress, Anchor: link.Head()})
		if err == nil {
			t.Cleanup(func() { must(t, l.Close()) })
		}
		return err
	}))
}

// TestHooksAreMended: a hook that was taken off, or that another program was put before, is in its place
// again after the next look at the devices. Until then the backstop holds.
func TestHooksAreMended(t *testing.T) { eachProfile(t, testHooksAreMended) }

func testHooksAreMended(t *testing.T, profile datapath.Profile) {
	for _, attack := range []struct {
		name string
		kind datapath.RepairKind
		do   func(n *node, t *testing.T)
	}{
		{"taken off", datapath.RepairLost, func(n *node, t *testing.T) { n.takeOff(t, profile, lab.Uplink) }},
		{"put behind", datapath.RepairBehind, func(n *node, t *testing.T) { n.putAhead(t, profile, lab.Uplink) }},
		{"qdisc deleted", datapath.RepairLost, func(n *node, t *testing.T) {
			_, err := n.Node.Run(within(t), "tc", "qdisc", "del", "dev", lab.Uplink, "clsact")
			must(t, err)
		}},
	} {
		if attack.name == "qdisc deleted" && profile == datapath.ProfileTCX {
			continue // a link is not of the qdisc
		}
		t.Run(attack.name, func(t *testing.T) {
			t.Parallel()
			var repairs []datapath.Repair
			n := newNodeOn(t, lab.Options{Pods: 2}, func(c *datapath.Config) {
				c.Profile, c.Repaired = profile, func(r datapath.Repair) { repairs = append(repairs, r) }
			})
			n.copyProxy(t)
			c := n.cells()[0]
			slot := c.path(n, t, time.Minute)
			conn := c.dialDirect(t)
			attack.do(n, t)
			must(t, n.d.EndPath(slot, datapath.PathRevoked))
			around := n.count(t, flow.ReasonBackstop)
			if got, _ := c.ask(brief(t)); got != "nobody" {
				t.Errorf("without the hook: answered by %s, want the backstop to hold", got)
			}
			if n.count(t, flow.ReasonBackstop) == around {
				t.Error("nothing came around the hook: the attack is none")
			}
			must(t, n.attachAll(n.d))
			n.wantSays(t, c, "proxy")
			wantReset(t, conn)
			if len(repairs) == 0 || repairs[0].Kind != attack.kind || repairs[0].Program != "sp_dev_in" || repairs[0].Place != lab.Uplink+" ingress" {
				t.Errorf("repairs %+v, want one of %s", repairs, attack.kind)
			}
			told := len(repairs)
			must(t, n.attachAll(n.d))
			if len(repairs) != told {
				t.Errorf("repaired again: %+v", repairs[told:])
			}
		})
	}
}

func (n *node) count(t *testing.T, r flow.Reason) uint64 {
	t.Helper()
	all, err := n.d.Counters()
	must(t, err)
	return all[r].Packets
}

func (n *node) wantSays(t *testing.T, c cell, want string) {
	t.Helper()
	if got, err := c.ask(within(t)); got != want {
		t.Fatalf("%s: answered by %s (%v), want %s; counters:%s", c.name, got, err, want, n.counters(t))
	}
}

// TestPxIsMended: px0 is made anew, and the proxy that runs serves again. Until then traffic is closed.
func TestPxIsMended(t *testing.T) { eachProfile(t, testPxIsMended) }

func testPxIsMended(t *testing.T, profile datapath.Profile) {
	t.Parallel()
	n := newNode(t, profile)
	n.copyProxy(t)
	px0, err := n.Node.Netlink.LinkByName("px0")
	must(t, err)
	must(t, n.Node.Netlink.LinkDel(px0))
	for _, c := range n.cells() {
		if got, _ := c.ask(brief(t)); got != "nobody" {
			t.Errorf("%s without px0: answered by %s", c.name, got)
		}
	}
	must(t, n.Node.Do(func() error {
		missing, err := n.px.Repair()
		if err != nil || !missing {
			return fmt.Errorf("repaired: %v, %w", missing, err)
		}
		if err := n.d.MovePx(n.px.Px0()); err != nil {
			return err
		}
		return n.d.AttachPx()
	}))
	must(t, n.px.Check())
	n.everySays(t, "proxy", "px made anew")
}
