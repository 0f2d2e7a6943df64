package datapath

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/bpf"
)

// attachment is one link of one program; its pin has the name of its key, which names the place.
type attachment struct {
	hook
	link    link.Link
	ifindex int
	device  string
	role    Role
}

// hook is a program and the place in a device's chain that it belongs to. A device whose role changes
// keeps its places.
type hook struct {
	place  string
	name   string
	prog   *ebpf.Program
	attach ebpf.AttachType
}

// hooks are the programs of a role; those of a device whose packets begin with the IP header differ.
func (d *Datapath) hooks(role Role, l3 bool) []hook {
	in, out := ebpf.AttachTCXIngress, ebpf.AttachTCXEgress
	switch role {
	case RoleLo:
		return []hook{{"sp_lo_in", "sp_lo_in", d.objs.SpLoIn, in}}
	case RolePx0:
		return []hook{{"sp_px0_in", "sp_px0_in", d.objs.SpPx0In, in}}
	case RolePx1:
		return []hook{{"sp_px1_in", "sp_px1_in", d.objs.SpPx1In, in}}
	case rolePxLo:
		return []hook{{"sp_px_lo_in", "sp_px_lo_in", d.objs.SpPxLoIn, in}, {"sp_px_lo_out", "sp_px_lo_out", d.objs.SpPxLoOut, out}}
	}
	if l3 {
		return []hook{{"sp_l3_in", "sp_l3_in", d.objs.SpL3In, in}, {"sp_l3_out", "sp_l3_out", d.objs.SpL3Out, out}}
	}
	if role == RolePod {
		return []hook{{"sp_dev_in", "sp_dev_in", d.objs.SpDevIn, in}, {"sp_dev_out", "sp_pod_out", d.objs.SpPodOut, out}}
	}
	return []hook{{"sp_dev_in", "sp_dev_in", d.objs.SpDevIn, in}, {"sp_dev_out", "sp_dev_out", d.objs.SpDevOut, out}}
}

// rolePxLo is lo of the px namespace.
const rolePxLo Role = "pxlo"

// Attach hooks a device of the current network namespace, or adopts its pinned links and gives them
// this version's programs. Attaching twice is harmless.
func (d *Datapath) Attach(ifindex int, role Role) error {
	return d.attach(ifindex, role, fmt.Sprint(ifindex))
}

func (d *Datapath) attach(ifindex int, role Role, suffix string) error {
	dev, err := net.InterfaceByIndex(ifindex)
	if err != nil {
		return fmt.Errorf("find device %d: %w", ifindex, err)
	}
	l3, err := beginsWithIP(dev.Name)
	if err != nil {
		return fmt.Errorf("attach to %s: %w", dev.Name, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, h := range d.hooks(role, l3) {
		key := h.place + "-" + suffix // bpffs takes no dots
		if a, ok := d.devices[key]; ok && linkedTo(a.link, ifindex) {
			if err := updateLink(a.link, h.prog); err != nil {
				return fmt.Errorf("attach %s to %s: %w", h.name, dev.Name, err)
			}
			d.devices[key] = attachment{h, a.link, ifindex, dev.Name, role}
			continue
		} else if ok {
			closeLink(a.link)
			delete(d.devices, key)
		}
		l, err := d.linkHook(h, ifindex, role, filepath.Join(linksDir(d.cfg.Dir), key))
		if err != nil {
			return fmt.Errorf("attach %s to %s: %w", h.name, dev.Name, err)
		}
		d.devices[key] = attachment{h, l, ifindex, dev.Name, role}
		if err := d.replace(h, l, ifindex, dev.Name); err != nil {
			return err
		}
	}
	return nil
}

// replace takes a datapath off the chain that lost its pins and that only the guard still holds. The
// new link is there already, so there is no gap.
func (d *Datapath) replace(h hook, l link.Link, ifindex int, device string) error {
	info, err := l.Info()
	if err != nil {
		return fmt.Errorf("read link: %w", err)
	}
	old, err := detachBut(ifindex, h.attach, info.ID)
	if len(old) > 0 {
		d.cfg.Logger.Warn("replaced hooks that had lost their pins", "device", device, "program", h.name, "links", old)
	}
	if err != nil {
		return fmt.Errorf("replace %s on %s: %w", h.name, device, err)
	}
	return nil
}

// ErrLinkType says that a device has a link-layer header that the programs do not know.
var ErrLinkType = errors.New("unknown link-layer header")

// beginsWithIP asks for the link type of a device: Ethernet, or none at all. The kernel tells the two
// apart in the same way (dev_is_mac_header_xmit).
func beginsWithIP(name string) (bool, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false, fmt.Errorf("open socket: %w", err)
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq(name)
	if err == nil {
		err = unix.IoctlIfreq(fd, unix.SIOCGIFHWADDR, req)
	}
	if err != nil {
		return false, fmt.Errorf("read link type: %w", err)
	}
	switch typ := req.Uint16(); typ {
	case unix.ARPHRD_ETHER, unix.ARPHRD_LOOPBACK:
		return false, nil
	case unix.ARPHRD_NONE, unix.ARPHRD_VOID, unix.ARPHRD_RAWIP, unix.ARPHRD_TUNNEL, unix.ARPHRD_TUNNEL6, unix.ARPHRD_SIT,
		unix.ARPHRD_IPGRE, unix.ARPHRD_IP6GRE, unix.ARPHRD_PPP:
		return true, nil
	default:
		return false, fmt.Errorf("%w: type %d", ErrLinkType, typ)
	}
}

// linkHook adopts the pinned link or makes one at the head of the chain. The link is pinned before
// anything relies on it. A device that has to be linked is a new one, whatever its number: paths to
// what was behind that number end before.
func (d *Datapath) linkHook(h hook, ifindex int, role Role, pin string) (link.Link, error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if err == nil && linkedTo(l, ifindex) {
		return l, updateLink(l, h.prog)
	}
	if err == nil { // its device is gone
		closeLink(l)
		if err := os.Remove(pin); err != nil {
			return nil, fmt.Errorf("remove stale pin: %w", err)
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("open pinned link: %w", err)
	}
	if role == RolePod || role == RoleUplink { // px1's number is that of another namespace
		if err := d.endPathsBehind(ifindex); err != nil {
			return nil, err
		}
	}
	l, err = link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: h.prog, Attach: h.attach, Anchor: link.Head()})
	if err != nil {
		return nil, err
	}
	if err := l.Pin(pin); err != nil {
		closeLink(l)
		return nil, fmt.Errorf("pin link: %w", err)
	}
	return l, nil
}

// linkedTo says whether a link is still attached to the device; a link whose device went away has
// ifindex 0.
func linkedTo(l link.Link, ifindex int) bool {
	info, err := l.Info()
	if err != nil {
		return false
	}
	tcx := info.TCX()
	return tcx != nil && int(tcx.Ifindex) == ifindex
}

// updateLink gives an adopted link this version's program, unless it has the same code already.
func updateLink(l link.Link, prog *ebpf.Program) error {
	info, err := l.Info()
	if err != nil {
		return fmt.Errorf("read link: %w", err)
	}
	want, err := prog.Info()
	if err != nil {
		return fmt.Errorf("read program: %w", err)
	}
	old, err := ebpf.NewProgramFromID(info.Program)
	if err == nil {
		defer old.Close()
		if have, err := old.Info(); err == nil && have.Tag == want.Tag {
			return nil
		}
	}
	if err := l.Update(prog); err != nil {
		return fmt.Errorf("update link: %w", err)
	}
	return nil
}

// AttachPx hooks px0 in the current namespace, and px1 and lo in the px namespace.
func (d *Datapath) AttachPx() error {
	if err := d.attach(d.cfg.Px0, RolePx0, "px"); err != nil {
		return err
	}
	return inNetns(d.cfg.PxNetns, func() error {
		px1, err := net.InterfaceByName("px1")
		if err != nil {
			return fmt.Errorf("find px1: %w", err)
		}
		if err := d.setPx(px1.Index); err != nil {
			return err
		}
		if err := d.attach(px1.Index, RolePx1, "px"); err != nil {
			return err
		}
		return d.attach(1, rolePxLo, "px")
	})
}

// setPx tells the programs of px, from within it.
func (d *Datapath) setPx(px1 int) error {
	px, err := ownNetns()
	if err != nil {
		return err
	}
	return d.changeConfig(func(c *bpf.Config) { c.Px1Ifindex, c.PxNetns = uint32(px1), px.cookie })
}

// inNetns runs f in the namespace, on a thread that comes back from it. One that cannot come back ends
// with its goroutine; the process's first thread cannot end, so none is left there without need.
func inNetns(path string, f func() error) error {
	target, err := netns.GetFromPath(path)
	if err != nil {
		return fmt.Errorf("open namespace %s: %w", path, err)
	}
	defer target.Close()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := netns.Get()
		if err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("open own namespace: %w", err)
			return
		}
		defer home.Close()
		err = netns.Set(target)
		if err != nil {
			err = fmt.Errorf("enter namespace %s: %w", path, err)
		} else {
			err = f()
		}
		if netns.Set(home) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// Detach forgets a device that is gone and removes its pins. Links of a device that is still there
// are detached.
func (d *Datapath) Detach(ifindex int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	for key, a := range d.devices {
		if a.ifindex != ifindex || (a.role != RoleUplink && a.role != RolePod) {
			continue
		}
		closeLink(a.link)
		delete(d.devices, key)
		if err := os.Remove(filepath.Join(linksDir(d.cfg.Dir), key)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove pin: %w", err))
		}
	}
	return errors.Join(errs...)
}

// Devices lists what is hooked, by role and name.
func (d *Datapath) Devices() []Device {
	d.mu.Lock()
	defer d.mu.Unlock()
	byKey := map[string]Device{}
	for _, a := range d.devices {
		role := a.role
		if role == rolePxLo {
			role = RolePx1
		}
		id := fmt.Sprintf("%s/%s", role, a.device)
		dev := byKey[id]
		dev.Name, dev.Ifindex, dev.Role = a.device, a.ifindex, role
		dev.Programs = append(dev.Programs, a.name)
		slices.Sort(dev.Programs)
		byKey[id] = dev
	}
	var out []Device
	for _, id := range slices.Sorted(maps.Keys(byKey)) {
		out = append(out, byKey[id])
	}
	return out
}
