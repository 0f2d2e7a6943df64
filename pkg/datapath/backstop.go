package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/bpf"
)

// Pins of the backstop's links, and the names of its programs.
const (
	cgroupHook   = "sp_cg_in"
	senderHook   = "sp_cg_out"
	sklookupHook = "sp_sklookup"
)

// AttachBackstop attaches the backstop: to the sockets of a control group (version 2) and everything below
// it, in all network namespaces, and to the look-ups of sockets in the current one, which must be the
// host's. It adopts pinned links, and makes those anew that lost their place, saying which. Attaching
// twice is harmless.
func (d *Datapath) AttachBackstop(cgroup string) (made []string, err error) {
	id, err := cgroupID(cgroup)
	if err != nil {
		return nil, err
	}
	netns, err := ownNetns()
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	places := []backstopPlace{
		{cgroupHook, d.objs.SpCgIn, atCgroup(id), func() (link.Link, error) {
			return link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: ebpf.AttachCGroupInetIngress, Program: d.objs.SpCgIn})
		}},
		{senderHook, d.objs.SpCgOut, atCgroup(id), func() (link.Link, error) {
			return link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: ebpf.AttachCGroupInetEgress, Program: d.objs.SpCgOut})
		}},
		{sklookupHook, d.objs.SpSklookup, atNetns(netns), func() (link.Link, error) { return attachToOwnNetns(d.objs.SpSklookup) }},
	}
	for _, p := range places {
		fresh, err := d.holdPlace(p)
		if err != nil {
			return made, fmt.Errorf("attach %s: %w", p.name, err)
		}
		if fresh {
			made = append(made, p.name)
		}
	}
	d.cgroup = cgroup
	return made, nil
}

func atCgroup(id uint64) func(link.Info) bool {
	return func(l link.Info) bool { return l.Cgroup() != nil && l.Cgroup().CgroupId == id }
}

func atNetns(n namespace) func(link.Info) bool {
	return func(l link.Info) bool { return l.NetNs() != nil && l.NetNs().NetnsInode == n.inode }
}

// backstopPlace is where one program of the backstop belongs.
type backstopPlace struct {
	name   string
	prog   *ebpf.Program
	at     func(link.Info) bool // is a link of this kind attached here?
	attach func() (link.Link, error)
}

// holdPlace keeps the link that is there, or the pinned one, or makes one. d.mu is held.
func (d *Datapath) holdPlace(p backstopPlace) (fresh bool, err error) {
	pin := filepath.Join(linksDir(d.cfg.Dir), p.name)
	l := d.backstop[p.name]
	if l == nil {
		l, err = link.LoadPinnedLink(pin, nil)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return false, fmt.Errorf("open pinned link: %w", err)
		}
	}
	if l != nil {
		if info, err := l.Info(); err == nil && p.at(*info) {
			d.backstop[p.name] = l
			return false, updateLink(l, p.prog)
		}
		closeLink(l) // detached, or its control group is gone
		delete(d.backstop, p.name)
		if err := os.Remove(pin); err != nil && !errors.Is(err, os.ErrNotExist) {
			return false, fmt.Errorf("remove stale pin: %w", err)
		}
	}
	if l, err = p.attach(); err != nil {
		return false, err
	}
	if err := l.Pin(pin); err != nil {
		closeLink(l)
		return false, fmt.Errorf("pin link: %w", err)
	}
	d.backstop[p.name] = l
	return true, d.replaceAt(p, l)
}

// replaceAt takes off what a datapath left there that lost its pins: its tables explain nothing any more.
func (d *Datapath) replaceAt(p backstopPlace, l link.Link) error {
	info, err := l.Info()
	if err != nil {
		return fmt.Errorf("read link: %w", err)
	}
	return eachLink(func(other link.Link, o link.Info) error {
		if o.ID == info.ID || !p.at(o) {
			return nil
		}
		if name, err := programName(o.Program); err != nil || name != p.name {
			return nil // freed since, or somebody else's
		}
		d.cfg.Logger.Warn("replaced a hook that had lost its pin", "program", p.name, "link", o.ID)
		return other.Detach()
	})
}

func attachToOwnNetns(p *ebpf.Program) (link.Link, error) {
	f, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("open own namespace: %w", err)
	}
	defer f.Close()
	return link.AttachNetNs(int(f.Fd()), p)
}

// backstopAt finds the links of the backstop on a control group (empty: none) and on the current network
// namespace, whoever holds them.
func backstopAt(cgroup string, each func(link.Link, string) error) error {
	netns, err := ownNetns()
	if err != nil {
		return err
	}
	nowhere := func(link.Info) bool { return false }
	at := map[string]func(link.Info) bool{sklookupHook: atNetns(netns), cgroupHook: nowhere, senderHook: nowhere}
	if cgroup != "" {
		id, err := cgroupID(cgroup)
		if err != nil {
			return err
		}
		at[cgroupHook], at[senderHook] = atCgroup(id), atCgroup(id)
	}
	return eachLink(func(l link.Link, info link.Info) error {
		for name, here := range at {
			if !here(info) {
				continue
			}
			if is, err := programName(info.Program); err != nil || is != name {
				continue // freed since, or somebody else's
			}
			return each(l, name)
		}
		return nil
	})
}

// eachLink walks over every link of the machine, over some more than once. An error of f does not end the walk.
func eachLink(f func(link.Link, link.Info) error) error {
	for {
		// EAGAIN: somebody is just making a link. Its id is known already, and it is not given out yet.
		if err := walkLinks(f); !errors.Is(err, unix.EAGAIN) {
			return err
		}
	}
}

func walkLinks(f func(link.Link, link.Info) error) error {
	var errs []error
	var last link.ID
	for {
		it := &link.Iterator{ID: last}
		for it.Next() {
			if info, err := it.Link.Info(); err == nil { // else freed since
				errs = append(errs, f(it.Link, *info))
			}
		}
		if err := it.Err(); err != nil && !errors.Is(err, unix.EAGAIN) {
			errs = append(errs, fmt.Errorf("list links: %w", err))
		} else if err != nil { // the next one is being made at this moment
			last = it.ID
			runtime.Gosched()
			continue
		}
		return errors.Join(errs...)
	}
}

// BackstopPlace is where one program of the backstop is attached.
type BackstopPlace struct{ Program, Where string }

// Backstop tells what of the backstop is attached now.
func (d *Datapath) Backstop() []BackstopPlace {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []BackstopPlace
	for _, p := range []BackstopPlace{{cgroupHook, d.cgroup}, {senderHook, d.cgroup}, {sklookupHook, "netns"}} {
		if l := d.backstop[p.Program]; l != nil && attachedSomewhere(l) {
			out = append(out, p)
		}
	}
	return out
}

// attachedSomewhere is false for a link that was detached, or whose place is gone.
func attachedSomewhere(l link.Link) bool {
	info, err := l.Info()
	if err != nil {
		return false
	}
	if device, known := linkDevice(info); known {
		return device != 0
	}
	switch {
	case info.Cgroup() != nil:
		return info.Cgroup().CgroupId != 0
	case info.NetNs() != nil:
		return info.NetNs().NetnsInode != 0
	}
	return true
}

// DenyPodLoopback closes a pod's service to the pod itself, or opens it again.
func (d *Datapath) DenyPodLoopback(deny bool) error {
	return d.changeConfig(func(c *bpf.Config) {
		c.DenyPodLoopback = 0
		if deny {
			c.DenyPodLoopback = 1
		}
	})
}

func (d *Datapath) changeConfig(change func(*bpf.Config)) error {
	var c bpf.Config
	if err := d.objs.SpConfig.Lookup(uint32(0), &c); err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	change(&c)
	if err := d.objs.SpConfig.Put(uint32(0), &c); err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	return nil
}

// namespace identifies a network namespace in the kernel's two ways.
type namespace struct {
	cookie uint64 // never given twice
	inode  uint32 // what /proc shows
}

// ownNetns is the namespace of the calling thread.
func ownNetns() (namespace, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return namespace{}, fmt.Errorf("open socket: %w", err)
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return namespace{}, fmt.Errorf("read namespace cookie: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
		return namespace{}, fmt.Errorf("read own namespace: %w", err)
	}
	return namespace{cookie, uint32(st.Ino)}, nil
}
