package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// xdpThere is the XDP program that a device has.
type xdpThere struct {
	program uint32 // 0: none
	name    string
	ours    bool // a program of Sallyport, of this version or another
	mode    XDPMode
}

// foreign is the id of a program of somebody else, or 0.
func (x xdpThere) foreign() uint32 {
	if x.ours {
		return 0
	}
	return x.program
}

func readXDP(dev netlink.Link) (xdpThere, error) {
	x := dev.Attrs().Xdp
	if x == nil || !x.Attached {
		return xdpThere{}, nil
	}
	there := xdpThere{program: x.ProgId, mode: XDPNative}
	if x.AttachMode == nl.XDP_ATTACHED_SKB {
		there.mode = XDPGeneric
	}
	var err error
	there.name, err = programName(ebpf.ProgramID(x.ProgId))
	there.ours = slices.Contains(programNames(), there.name)
	return there, err
}

// xdpRefusedError says that the kernel or the driver would not have the program.
type xdpRefusedError struct{ errno unix.Errno }

func (e *xdpRefusedError) Error() string {
	if e.errno == unix.EOPNOTSUPP {
		return "the driver cannot"
	}
	return "the driver refuses: " + e.errno.Error()
}

// xdpProgram is the filter for a mode. Generic XDP gets the one that does not know of several buffers.
func (d *Datapath) xdpProgram(mode XDPMode) (name string, prog *ebpf.Program, flags link.XDPAttachFlags) {
	if mode == XDPGeneric {
		return "sp_xdp_generic", d.objs.SpXdpGeneric, link.XDPGenericMode
	}
	return "sp_xdp_up", d.objs.SpXdpUp, link.XDPDriverMode
}

// linkXDP adopts what there is, or makes a link. A filter in another mode, or one that lost its pin, goes first: for that
// moment tc is alone.
func (d *Datapath) linkXDP(o XDPOutcome, there xdpThere) (xdpState, error) {
	name, prog, flags := d.xdpProgram(o.Mode)
	now := xdpState{outcome: o, program: name}
	pin := filepath.Join(linksDir(d.cfg.Dir), xdpKey(o.Ifindex))
	if there.ours && there.mode == o.Mode {
		var err error
		now.link, err = d.heldXDP(o.Ifindex, pin)
		if err == nil {
			return now, updateXDP(now.link, there, prog)
		}
		if !errors.Is(err, os.ErrNotExist) {
			return now, err
		}
	}
	if err := d.unlinkXDP(o.Ifindex, there); err != nil {
		return now, err
	}
	l, err := link.AttachXDP(link.XDPOptions{Program: prog, Interface: o.Ifindex, Flags: flags})
	if errno := unix.Errno(0); errors.As(err, &errno) {
		return now, &xdpRefusedError{errno}
	} else if err != nil {
		return now, err
	}
	if err := l.Pin(pin); err != nil {
		closeLink(l)
		return now, fmt.Errorf("pin link: %w", err)
	}
	now.link = l
	return now, nil
}

func updateXDP(l link.Link, there xdpThere, prog *ebpf.Program) error {
	same, err := sameProgram(ebpf.ProgramID(there.program), prog)
	if same || err != nil {
		return err
	}
	if err := l.Update(prog); err != nil {
		return fmt.Errorf("update link: %w", err)
	}
	return nil
}

// xdpKey is the name of the pin of a device's filter.
func xdpKey(ifindex int) string { return fmt.Sprintf("sp_xdp-%d", ifindex) }

// heldXDP is the link that this process holds, or the pinned one. os.ErrNotExist: there is none for the device.
func (d *Datapath) heldXDP(ifindex int, pin string) (link.Link, error) {
	if l := d.xdp[ifindex].link; l != nil && filters(l, ifindex) {
		return l, nil
	} else if l != nil {
		closeLink(l)
	}
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return nil, fmt.Errorf("open pinned link: %w", err)
	}
	if !filters(l, ifindex) {
		closeLink(l)
		return nil, os.ErrNotExist
	}
	return l, nil
}

// filters says whether a link is still attached to the device.
func filters(l link.Link, ifindex int) bool {
	info, err := l.Info()
	return err == nil && info.XDP() != nil && int(info.XDP().Ifindex) == ifindex
}

// unlinkXDP takes our filter off a device, whoever else holds it, and leaves everybody else's. It is off when this returns:
// the kernel would take its time with a link that only loses its holders.
func (d *Datapath) unlinkXDP(ifindex int, there xdpThere) error {
	if there.ours {
		if err := detachXDP(ifindex, there.program); err != nil {
			return fmt.Errorf("detach: %w", err)
		}
	}
	return d.forgetXDP(ifindex)
}

// forgetXDP takes the filter off a device, which may be gone, and lets its link and its pin go.
func (d *Datapath) forgetXDP(ifindex int) error {
	var err error
	if l := d.xdp[ifindex].link; l != nil {
		if attachedSomewhere(l) { // also where the device moved to
			err = l.Detach()
		}
		closeLink(l)
	}
	delete(d.xdp, ifindex)
	return errors.Join(err, d.removePin(xdpKey(ifindex)))
}

func (d *Datapath) closeXDP() error {
	var errs []error
	for _, x := range d.xdp {
		if x.link != nil {
			errs = append(errs, x.link.Close())
		}
	}
	d.xdp = map[int]xdpState{}
	return errors.Join(errs...)
}

// detachXDP detaches the link by which a device has a program. The number of a device is that of its network namespace,
// but a program is on one device of a number only, unless tests share programs, which they do not.
func detachXDP(ifindex int, program uint32) error {
	return eachLink(func(l link.Link, info link.Info) error {
		if xdp := info.XDP(); xdp == nil || int(xdp.Ifindex) != ifindex || uint32(info.Program) != program {
			return nil
		}
		return l.Detach()
	})
}

// xdpDevices lists the devices of the current network namespace that have a filter of ours.
func xdpDevices() (map[netlink.Link]xdpThere, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	found := map[netlink.Link]xdpThere{}
	for _, dev := range links {
		there, err := readXDP(dev)
		if err != nil {
			return nil, fmt.Errorf("look for XDP on %s: %w", dev.Attrs().Name, err)
		}
		if there.ours {
			found[dev] = there
		}
	}
	return found, nil
}

// linkDevice is the ifindex of the device that a link of ours is attached to; 0 when the device is gone.
func linkDevice(info *link.Info) (ifindex int, known bool) {
	switch {
	case info.TCX() != nil:
		return int(info.TCX().Ifindex), true
	case info.XDP() != nil:
		return int(info.XDP().Ifindex), true
	}
	return 0, false
}
