package inventory

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// States of sockets (include/net/tcp_states.h). An unconnected UDP socket is closed.
const (
	stateSynSent = 2
	stateSynRecv = 3
	stateClose   = 7
	stateListen  = 10
)

// socket is one socket of a namespace. Its inode is 0 once no process has it.
type socket struct {
	protocol      string
	state         uint8
	local, remote netip.AddrPort
	inode         uint32
}

// waits says whether others may come to the socket.
func (s socket) waits() bool {
	if s.protocol == UDP {
		return s.state == stateClose && s.remote.Port() == 0
	}
	return s.state == stateListen
}

// connection says whether two ends have talked by it.
func (s socket) connection() bool {
	return s.protocol == TCP && s.state != stateListen && s.state != stateClose && s.state != stateSynSent && s.state != stateSynRecv
}

// readSockets asks for all of TCP and UDP.
func readSockets(h *netlink.Handle) ([]socket, error) {
	var all []socket
	for _, ask := range []struct {
		protocol string
		list     func(uint8) ([]*netlink.Socket, error)
	}{{TCP, h.SocketDiagTCP}, {UDP, h.SocketDiagUDP}} {
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			found, err := ask.list(family)
			if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) { // the next look sees what changed
				return nil, fmt.Errorf("list %s sockets: %w", ask.protocol, err)
			}
			for _, s := range found {
				all = append(all, socket{
					protocol: ask.protocol, state: s.State, inode: s.INode,
					local: addrPort(s.ID.Source, s.ID.SourcePort), remote: addrPort(s.ID.Destination, s.ID.DestinationPort),
				})
			}
		}
	}
	return all, nil
}

func addrPort(ip net.IP, port uint16) netip.AddrPort {
	a, _ := netip.AddrFromSlice(ip)
	return netip.AddrPortFrom(a.Unmap(), port)
}
