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
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/bpf"
)

// attachment is one program at its place; its key names the place, and the pin of a link.
type attachment struct {
	hook
	hold    hold
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
	first, last := hook{"sp_dev_in", "sp_dev_in", d.objs.SpDevIn, in}, hook{"sp_dev_out", "sp_dev_out", d.objs.SpDevOut, out}
	switch role {
	case RolePod:
		last.name, last.prog = "sp_pod_out", d.objs.SpPodOut
	case RoleBridge:
		first.name, first.prog = "sp_bridge_in", d.objs.SpBridgeIn
		last.name, last.prog = "sp_bridge_out", d.objs.SpBridgeOut
	case RolePort, RolePodPort:
		first.name, first.prog = "sp_port_in", d.objs.SpPortIn
		last.name, last.prog = "sp_port_out", d.objs.SpPortOut
		if role == RolePodPort {
			last.name, last.prog = "sp_pod_port_out", d.objs.SpPodPortOut
		}
	}
	return []hook{first, last}
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
		if err := d.attachHook(h, key, place{ifindex, dev.Name, h.attach}, role); err != nil {
			return fmt.Errorf("attach %s to %s: %w", h.name, dev.Name, err)
		}
	}
	return nil
}

// attachHook brings one program to its place. Others of ours leave it last, so there is no gap: a
// datapath that lost its pins and that only the guard still holds, or one of another profile.
func (d *Datapath) attachHook(h hook, key string, p place, role Role) error {
	a, ok := d.devices[key]
	if ok && a.ifindex == p.ifindex && a.hold.there() {
		a.hook, a.device, a.role = h, p.device, role
		d.devices[key] = a
		return errors.Join(a.hold.update(h.prog), d.lead(a, p, key))
	}
	if ok {
		_ = a.hold.close()
		delete(d.devices, key)
	}
	kept, err := d.take(p, h.prog, key, role)
	if err != nil {
		return err
	}
	if ok && a.ifindex == p.ifindex {
		d.repaired(Repair{RepairLost, h.name, p.String()})
	}
	d.devices[key] = attachment{h, kept, p.ifindex, p.device, role}
	old, err := clearBut(p, kept)
	if len(old) > 0 {
		d.cfg.Logger.Warn("replaced hooks of another datapath", "device", p.device, "program", h.name, "hooks", len(old))
	}
	if _, links := kept.(pinned); !links { // what a link of before has left
		err = errors.Join(err, d.removePin(key))
	}
	return err
}

func (d *Datapath) removePin(key string) error {
	if err := os.Remove(filepath.Join(linksDir(d.cfg.Dir), key)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove pin: %w", err)
	}
	return nil
}

// take adopts what holds the place, or takes it. A device that has to be taken is a new one, whatever
// its number: paths to what was behind that number end before.
func (d *Datapath) take(p place, prog *ebpf.Program, key string, role Role) (hold, error) {
	fresh := func() error {
		if role.ofDevice() { // px1's number is that of another namespace
			return d.endPathsBehind(p.ifindex)
		}
		return nil
	}
	if d.profile == ProfileTCX {
		return takeLink(p, prog, filepath.Join(linksDir(d.cfg.Dir), key), fresh)
	}
	qdiscs := qdiscsDir(d.cfg.Dir)
	if role == RolePx1 || role == rolePxLo { // they go with px
		qdiscs = ""
	}
	return takeFilter(p, prog, qdiscs, fresh)
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

// MovePx tells that px was made anew: px0 has another number. AttachPx then hooks it.
func (d *Datapath) MovePx(px0 int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var c bpf.Config
	if err := d.objs.SpConfig.Lookup(uint32(0), &c); err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	d.cfg.Px0, c.Px0Ifindex = px0, uint32(px0)
	if err := d.objs.SpConfig.Put(uint32(0), &c); err != nil {
		return fmt.Errorf("write configuration: %w", err)
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

// Detach takes our hooks off a device, which may be gone, and forgets it.
func (d *Datapath) Detach(ifindex int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	for key, a := range d.devices {
		if a.ifindex != ifindex || !a.role.ofDevice() {
			continue
		}
		errs = append(errs, a.hold.drop(), a.hold.close(), d.removePin(key))
		delete(d.devices, key)
	}
	return errors.Join(append(errs, forgetQdisc(d.cfg.Dir, ifindex), d.forgetXDP(ifindex))...)
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
	for _, x := range d.xdp {
		id := fmt.Sprintf("%s/%s", RoleUplink, x.outcome.Device)
		if dev, ok := byKey[id]; ok && x.link != nil {
			dev.Programs = append(dev.Programs, x.program)
			byKey[id] = dev
		}
	}
	var out []Device
	for _, id := range slices.Sorted(maps.Keys(byKey)) {
		out = append(out, byKey[id])
	}
	return out
}
