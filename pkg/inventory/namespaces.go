package inventory

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// space is one network namespace as it was at one look.
type space struct {
	inode     uint64
	where     Where
	addresses []netip.Addr // all of it
	sockets   []socket
}

// has says whether the address is one of the namespace.
func (s *space) has(a netip.Addr) bool { return a.IsLoopback() || slices.Contains(s.addresses, a) }

// reach are the addresses by which others reach the namespace.
func (s *space) reach() []netip.Addr {
	var all []netip.Addr
	for _, a := range s.addresses {
		if !a.IsLoopback() && !a.IsLinkLocalUnicast() {
			all = append(all, a)
		}
	}
	return all
}

// readSpaces looks into every network namespace that a process is in. One that ends meanwhile is left out.
func readSpaces() ([]*space, error) {
	home, err := netns.Get()
	if err != nil {
		return nil, fmt.Errorf("open own network namespace: %w", err)
	}
	defer home.Close()
	behind, err := behindDevices()
	if err != nil {
		return nil, err
	}
	own, err := inodeOf(int(home))
	if err != nil {
		return nil, err
	}
	first, err := readSpace(home, own)
	if err != nil {
		return nil, err
	}
	first.where = Host
	spaces := []*space{first}
	for inode, file := range namespaceFiles() {
		if inode == own {
			continue
		}
		if s := readOther(file, inode, behind); s != nil {
			spaces = append(spaces, s)
		}
	}
	return spaces, nil
}

// readOther gives nil for a namespace that is gone, or whose number now belongs to another.
func readOther(file string, inode uint64, behind map[int]bool) *space {
	ns, err := netns.GetFromPath(file)
	if err != nil {
		return nil
	}
	defer ns.Close()
	if now, err := inodeOf(int(ns)); err != nil || now != inode {
		return nil
	}
	s, err := readSpace(ns, inode)
	if err != nil {
		return nil
	}
	s.where = Apart
	if id, err := netlink.GetNetNsIdByFd(int(ns)); err == nil && id >= 0 && behind[id] {
		s.where = Pod
	}
	return s
}

// behindDevices are the numbers that the host has for the namespaces at the other ends of its devices.
func behindDevices() (map[int]bool, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	ids := map[int]bool{}
	for _, l := range links {
		if id := l.Attrs().NetNsID; id >= 0 {
			ids[id] = true
		}
	}
	return ids, nil
}

// namespaceFiles gives one file for each network namespace that a process is in, by inode.
func namespaceFiles() map[uint64]string {
	files := map[uint64]string{}
	processes, _ := filepath.Glob("/proc/[0-9]*/ns/net") // the pattern is right
	for _, file := range processes {
		name, err := os.Readlink(file)
		if err != nil {
			continue // it ended
		}
		var inode uint64
		if _, err := fmt.Sscanf(name, "net:[%d]", &inode); err == nil && files[inode] == "" {
			files[inode] = file
		}
	}
	return files
}

func inodeOf(fd int) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, fmt.Errorf("look at network namespace: %w", err)
	}
	return st.Ino, nil
}

func readSpace(ns netns.NsHandle, inode uint64) (*space, error) {
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE, unix.NETLINK_INET_DIAG)
	if err != nil {
		return nil, fmt.Errorf("open sock_diag: %w", err)
	}
	defer h.Close()
	s := &space{inode: inode}
	list, err := h.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range list {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			s.addresses = append(s.addresses, ip.Unmap())
		}
	}
	s.sockets, err = readSockets(h)
	return s, err
}
