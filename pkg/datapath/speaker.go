package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// ErrNotLocal says that no socket of this node has a tuple, or that nobody knows its control group.
var ErrNotLocal = errors.New("no socket of this node's control groups")

const (
	diagCgroup = 21 // INET_DIAG_CGROUP_ID (linux/inet_diag.h), since Linux 5.8
	diagHeader = 72 // size of struct inet_diag_msg
)

// CgroupOf gives the kernel's number of the control group of the socket at the local end of a TCP connection: one of the
// node, or of a pod that its routes lead to by a device. It must be called in the host's namespace. The error wraps
// ErrNotLocal, also for a socket of the root, which is that of everything that is in no group.
func CgroupOf(local, remote netip.AddrPort) (uint64, error) {
	ns, ifindex, err := namespaceOf(local.Addr())
	if err != nil {
		return 0, err
	}
	if ns.IsOpen() {
		defer ns.Close()
	}
	s, err := openSockets(ns)
	if err != nil {
		return 0, err
	}
	defer s.Close()
	id, err := s.cgroup(local, remote, ifindex)
	switch {
	case err != nil:
		return 0, fmt.Errorf("find socket of %s to %s: %w", local, remote, err)
	case id <= rootCgroupID:
		return 0, fmt.Errorf("%w: that of %s is in none but the root", ErrNotLocal, local)
	}
	return id, nil
}

// namespaceOf finds the namespace that has an address: the current one (not open), or one behind a device of it.
func namespaceOf(a netip.Addr) (ns netns.NsHandle, ifindex int, err error) {
	routes, err := netlink.RouteGet(a.AsSlice())
	switch {
	case err != nil || len(routes) == 0:
		return netns.None(), 0, fmt.Errorf("%w: no route to %s", ErrNotLocal, a)
	case routes[0].Type == unix.RTN_LOCAL:
		return netns.None(), 0, nil
	}
	ns, err = namespaceBehind(routes[0].LinkIndex)
	if err != nil {
		return ns, 0, fmt.Errorf("%w: %s: %w", ErrNotLocal, a, err)
	}
	return ns, 0, nil
}

// cgroup reads the control group of the socket with this very tuple.
func (s *sockets) cgroup(local, remote netip.AddrPort, ifindex int) (uint64, error) {
	got, err := s.askRaw(nl.SOCK_DIAG_BY_FAMILY, 0, diagOf(local, remote, ifindex))
	if errors.Is(err, unix.ENOENT) || err == nil && len(got) < diagHeader {
		return 0, ErrNotLocal
	}
	if err != nil {
		return 0, err
	}
	if state := got[1]; state == tcpListen || state == tcpTimeWait {
		return 0, ErrNotLocal
	}
	attributes, err := nl.ParseRouteAttr(got[diagHeader:])
	if err != nil {
		return 0, err
	}
	for _, a := range attributes {
		if a.Attr.Type == diagCgroup && len(a.Value) == 8 {
			return binary.NativeEndian.Uint64(a.Value), nil
		}
	}
	return 0, ErrNotLocal
}
