package datapath

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// XDPMode is where the filter of an uplink runs.
type XDPMode string

// Modes of the filter. Auto is a wish and never an outcome.
const (
	XDPAuto    XDPMode = "auto"
	XDPNative  XDPMode = "native"
	XDPGeneric XDPMode = "generic"
	XDPOff     XDPMode = "off"
)

// XDPCause is why a filter is as it is. Few values: a label of metrics.
type XDPCause string

// Causes of an outcome.
const (
	XDPAsked    XDPCause = "asked"     // configuration names the mode
	XDPProbed   XDPCause = "probed"    // the driver took it
	XDPKind     XDPCause = "kind"      // the device is of a kind that it would harm
	XDPNoDriver XDPCause = "no_driver" // the driver refused
	XDPOccupied XDPCause = "occupied"  // a program of somebody else is there
	XDPTooLarge XDPCause = "mtu"       // frames beyond a page on a kernel before 5.18
)

// XDPOutcome is what became of the wish for one device.
type XDPOutcome struct {
	Device  string
	Ifindex int
	Mode    XDPMode // native, generic or off
	Cause   XDPCause
	Why     string // Cause in a sentence
}

func (o XDPOutcome) with(mode XDPMode, cause XDPCause, format string, args ...any) XDPOutcome {
	o.Mode, o.Cause, o.Why = mode, cause, fmt.Sprintf(format, args...)
	return o
}

// xdpState is a device's outcome, all that it was decided by, and the link, if there is one.
type xdpState struct {
	outcome XDPOutcome
	asked   xdpQuestion
	program string
	link    link.Link
}

type xdpQuestion struct {
	name    string
	mtu     int
	wish    XDPMode
	foreign uint32 // id of a program that is not ours
}

// SetXDP gives a device of the current network namespace the filter that wish allows it, or takes it away. The filter only ever
// drops what would not be served, so a device without one is no hole: the outcome says why, and only a device that cannot be
// looked at is an error. A wish that failed is tried again when it, or the device, has changed.
func (d *Datapath) SetXDP(ifindex int, wish XDPMode) (XDPOutcome, error) {
	dev, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		return XDPOutcome{}, fmt.Errorf("find device %d: %w", ifindex, err)
	}
	there, err := readXDP(dev)
	if err != nil {
		return XDPOutcome{}, fmt.Errorf("look for XDP on %s: %w", dev.Attrs().Name, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	asked := xdpQuestion{dev.Attrs().Name, dev.Attrs().MTU, wish, there.foreign()}
	before, known := d.xdp[ifindex]
	if known && before.asked == asked && (before.link != nil) == there.ours {
		return before.outcome, nil
	}
	now, err := d.settleXDP(dev, wish, there)
	if err != nil {
		return XDPOutcome{}, fmt.Errorf("set XDP of %s: %w", dev.Attrs().Name, err)
	}
	now.asked = asked
	d.xdp[ifindex] = now
	if before.outcome != now.outcome {
		d.cfg.Logger.Info("XDP settled", "device", now.outcome.Device, "mode", now.outcome.Mode, "why", now.outcome.Why)
	}
	return now.outcome, nil
}

// DropXDP takes our filter off a device that is to have none, and forgets it.
func (d *Datapath) DropXDP(ifindex int) error {
	dev, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		return fmt.Errorf("find device %d: %w", ifindex, err)
	}
	there, err := readXDP(dev)
	if err != nil {
		return fmt.Errorf("look for XDP on %s: %w", dev.Attrs().Name, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.unlinkXDP(ifindex, there)
}

func (d *Datapath) settleXDP(dev netlink.Link, wish XDPMode, there xdpThere) (xdpState, error) {
	outcome, err := d.chooseXDP(dev, wish, there)
	if err != nil {
		return xdpState{}, err
	}
	if outcome.Mode == XDPOff {
		return xdpState{outcome: outcome}, d.unlinkXDP(outcome.Ifindex, there)
	}
	now, err := d.linkXDP(outcome, there)
	if refused := (*xdpRefusedError)(nil); errors.As(err, &refused) {
		now.outcome = outcome.with(XDPOff, XDPNoDriver, "%s: %s", outcome.Mode, refused)
		return now, nil
	}
	return now, err
}

// XDP lists the outcomes of all devices that were asked for, by ifindex.
func (d *Datapath) XDP() []XDPOutcome {
	d.mu.Lock()
	defer d.mu.Unlock()
	var all []XDPOutcome
	for _, x := range d.xdp {
		all = append(all, x.outcome)
	}
	slices.SortFunc(all, func(a, b XDPOutcome) int { return a.Ifindex - b.Ifindex })
	return all
}

// chooseXDP decides all but what only the driver knows.
func (d *Datapath) chooseXDP(dev netlink.Link, wish XDPMode, there xdpThere) (XDPOutcome, error) {
	o := XDPOutcome{Device: dev.Attrs().Name, Ifindex: dev.Attrs().Index, Mode: XDPOff, Cause: XDPAsked}
	if wish == XDPOff {
		return o.with(XDPOff, XDPAsked, "configured"), nil
	}
	withoutEthernet, err := beginsWithIP(o.Device)
	switch {
	case err != nil:
		return o, err
	case withoutEthernet || dev.Attrs().RawFlags&unix.IFF_LOOPBACK != 0:
		return o.with(XDPOff, XDPKind, "no Ethernet device"), nil
	case dev.Type() == "veth" && dev.Attrs().MasterIndex != 0:
		return o.with(XDPOff, XDPKind, "a veth in a bridge leads to a pod, not to the network"), nil
	case there.foreign() != 0:
		return o.with(XDPOff, XDPOccupied, "program %d (%s) of somebody else is there", there.program, there.name), nil
	case wish != XDPGeneric && !d.frags && dev.Attrs().MTU > os.Getpagesize():
		return o.with(XDPOff, XDPTooLarge, "MTU %d is beyond a page: that needs kernel 5.18", dev.Attrs().MTU), nil
	case wish != XDPAuto:
		return o.with(wish, XDPAsked, "configured"), nil
	case dev.Type() != "device":
		return o.with(XDPOff, XDPKind, "%s is no network card: %s", o.Device, harm(dev.Type())), nil
	}
	return o.with(XDPNative, XDPProbed, "the driver takes it"), nil
}

// harm tells why auto leaves a kind of device alone.
func harm(kind string) string {
	switch kind {
	case "veth", "tun":
		return "native XDP on a " + kind + " costs it GRO and segmentation offload"
	case "bond":
		return "the members of the bond have filters"
	}
	return "native XDP is not for a " + kind
}

// adaptXDP makes the filter loadable on kernels before 5.18, which have frames in one buffer only, and says whether they may
// be in several.
func adaptXDP(spec *ebpf.CollectionSpec, oneBuffer bool) (frags bool, err error) {
	if oneBuffer {
		withoutFrags(spec)
		return false, nil
	}
	err = features.HaveProgramHelper(ebpf.XDP, asm.FnXdpLoadBytes)
	if err == nil {
		return true, nil
	}
	if !errors.Is(err, ebpf.ErrNotSupported) {
		return false, fmt.Errorf("look for XDP with several buffers: %w", err)
	}
	withoutFrags(spec)
	return false, nil
}

// withoutFrags replaces the two helpers by their failure, which the program takes for "one buffer".
func withoutFrags(spec *ebpf.CollectionSpec) {
	for _, p := range spec.Programs {
		if p.Type != ebpf.XDP {
			continue
		}
		p.Flags &^= unix.BPF_F_XDP_HAS_FRAGS
		for i, ins := range p.Instructions {
			if helper := asm.BuiltinFunc(ins.Constant); ins.IsBuiltinCall() && (helper == asm.FnXdpLoadBytes || helper == asm.FnXdpGetBuffLen) {
				p.Instructions[i] = asm.Mov.Imm(asm.R0, -1).WithMetadata(ins.Metadata)
			}
		}
	}
}
