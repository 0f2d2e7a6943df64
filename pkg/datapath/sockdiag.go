package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// ErrNoDestroy says that the kernel cannot destroy sockets: it was built without CONFIG_INET_DIAG_DESTROY.
var ErrNoDestroy = errors.New("kernel lacks CONFIG_INET_DIAG_DESTROY: idle connections of ended paths end at their next packet")

// States of TCP sockets that are no connections (include/net/tcp_states.h).
const (
	tcpSynReceived = 3 // of a listener, which knows nobody yet
	tcpTimeWait    = 6
	tcpListen      = 10
)

// sockets finds and destroys the TCP sockets of one network namespace, by sock_diag.
type sockets struct{ conn map[int]*nl.SocketHandle }

// openSockets opens those of a namespace, or of the calling thread's when ns is not open.
func openSockets(ns netns.NsHandle) (*sockets, error) {
	s, err := nl.GetNetlinkSocketAt(ns, netns.None(), unix.NETLINK_INET_DIAG)
	if err == nil {
		err = errors.Join(s.SetSendTimeout(&nl.SocketTimeoutTv), s.SetReceiveTimeout(&nl.SocketTimeoutTv))
	}
	if err != nil {
		return nil, fmt.Errorf("open sock_diag: %w", err)
	}
	return &sockets{conn: map[int]*nl.SocketHandle{unix.NETLINK_INET_DIAG: {Socket: s}}}, nil
}

func (s *sockets) Close() {
	for _, h := range s.conn {
		h.Close()
	}
}

// diagID is struct inet_diag_sockid, diagRequest struct inet_diag_req_v2, diagAnswer the head of struct
// inet_diag_msg (linux/inet_diag.h). Ports and addresses are in network order.
type diagID struct {
	SourcePort, DestinationPort [2]byte
	Source, Destination         [16]byte
	Interface                   uint32
	Cookie                      [2]uint32
}

type diagRequest struct {
	Family, Protocol, Ext, Pad uint8
	States                     uint32
	ID                         diagID
}

type diagAnswer struct {
	Family, State, Timer, Retrans uint8
	ID                            diagID
}

var noCookie = [2]uint32{^uint32(0), ^uint32(0)}

func diagOf(local, remote netip.AddrPort, ifindex int) diagRequest {
	r := diagRequest{Family: unix.AF_INET, Protocol: unix.IPPROTO_TCP, States: ^uint32(0)}
	if local.Addr().Is6() {
		r.Family = unix.AF_INET6
	}
	r.ID = diagID{Cookie: noCookie}
	if local.Addr().IsLinkLocalUnicast() {
		r.ID.Interface = uint32(ifindex) // else the address says nothing
	}
	binary.BigEndian.PutUint16(r.ID.SourcePort[:], local.Port())
	binary.BigEndian.PutUint16(r.ID.DestinationPort[:], remote.Port())
	copy(r.ID.Source[:], local.Addr().AsSlice())
	copy(r.ID.Destination[:], remote.Addr().AsSlice())
	return r
}

// destroy ends the connection with this very tuple, if there is one; the kernel tells its peer by RST. Without the
// cookie of a connection it would fall back to the listener.
func (s *sockets) destroy(local, remote netip.AddrPort, ifindex int) error {
	req := diagOf(local, remote, ifindex)
	found, err := s.ask(nl.SOCK_DIAG_BY_FAMILY, 0, req)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find socket of %s to %s: %w", local, remote, err)
	}
	if found.State == tcpListen || found.State == tcpTimeWait {
		return nil
	}
	req.ID.Cookie = found.ID.Cookie
	if _, err := s.ask(nl.SOCK_DESTROY, unix.NLM_F_ACK, req); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("destroy socket of %s to %s: %w", local, remote, noDestroy(err))
	}
	return nil
}

// has tells whether there is a connection with this very tuple, that can still carry data.
func (s *sockets) has(local, remote netip.AddrPort, ifindex int) bool {
	found, err := s.ask(nl.SOCK_DIAG_BY_FAMILY, 0, diagOf(local, remote, ifindex))
	return err == nil && found.State != 0 && found.State != tcpListen && found.State != tcpTimeWait
}

func noDestroy(err error) error {
	if errors.Is(err, unix.EOPNOTSUPP) {
		return ErrNoDestroy
	}
	return err
}

func (s *sockets) ask(message, flags int, r diagRequest) (a diagAnswer, err error) {
	got, err := s.askRaw(message, flags, r)
	if err != nil || len(got) == 0 {
		return a, err
	}
	_, err = binary.Decode(got, binary.NativeEndian, &a)
	return a, err
}

// askRaw gives the first answer as it came; none is no error.
func (s *sockets) askRaw(message, flags int, r diagRequest) ([]byte, error) {
	body, err := binary.Append(nil, binary.NativeEndian, r)
	if err != nil {
		return nil, err
	}
	req := nl.NewNetlinkRequest(message, flags)
	req.Sockets = s.conn
	req.AddRawData(body)
	got, err := req.Execute(unix.NETLINK_INET_DIAG, 0)
	if err != nil || len(got) == 0 {
		return nil, err
	}
	return got[0], nil
}

// CanDestroy tells whether the kernel can end idle connections: nil, or ErrNoDestroy.
func CanDestroy() error {
	s, err := openSockets(netns.None())
	if err != nil {
		return err
	}
	defer s.Close()
	nobody := netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
	r := diagOf(nobody, nobody, 0)
	r.ID.Cookie = [2]uint32{} // no socket has it
	_, err = s.ask(nl.SOCK_DESTROY, unix.NLM_F_ACK, r)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return ErrNoDestroy
	}
	return nil
}
