package datapath

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const tcpEstablished = 1 // include/net/tcp_states.h

// Connections counts the TCP connections that sockets of a service have now, those under a path included. Of a UDP service there are none.
// A pod's connections with itself are not counted.
func (d *Datapath) Connections(s Service) (int, error) {
	if s.Protocol != TCP {
		return 0, nil
	}
	ns := netns.None()
	if s.Target == TargetPod {
		pod, err := namespaceBehind(s.Ifindex)
		if err != nil {
			return 0, fmt.Errorf("count connections of %s: %w", s.Name, err)
		}
		defer pod.Close()
		ns = pod
	}
	sockets, err := openSockets(ns)
	if err != nil {
		return 0, fmt.Errorf("count connections of %s: %w", s.Name, err)
	}
	defer sockets.Close()
	n := 0
	for _, any := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		all, err := sockets.established(any)
		if err != nil {
			return 0, fmt.Errorf("count connections of %s: %w", s.Name, err)
		}
		for _, id := range all {
			own := s.Target == TargetPod && id.isLoopback(any)
			if slices.Contains(s.Ports, binary.BigEndian.Uint16(id.SourcePort[:])) && !own {
				n++
			}
		}
	}
	return n, nil
}

func (id diagID) isLoopback(family netip.Addr) bool {
	a, _ := netip.AddrFromSlice(id.Destination[:family.BitLen()/8])
	return a.Unmap().IsLoopback()
}

// established lists the connections of an address family.
func (s *sockets) established(family netip.Addr) (all []diagID, err error) {
	r := diagOf(netip.AddrPortFrom(family, 0), netip.AddrPortFrom(family, 0), 0)
	r.States, r.ID = 1<<tcpEstablished, diagID{}
	body, err := binary.Append(nil, binary.NativeEndian, r)
	if err != nil {
		return nil, err
	}
	req := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
	req.Sockets = s.conn
	req.AddRawData(body)
	got, err := req.Execute(unix.NETLINK_INET_DIAG, 0)
	if err != nil {
		return nil, fmt.Errorf("list connections: %w", err)
	}
	for _, one := range got {
		var a diagAnswer
		if _, err := binary.Decode(one, binary.NativeEndian, &a); err != nil {
			return nil, fmt.Errorf("list connections: %w", err)
		}
		all = append(all, a.ID)
	}
	return all, nil
}
