package hostile

import (
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/test/packet"
)

// clientPort is the attacker's port.
const clientPort = 40000

// packet is what the shapes of an attack on this way are made of: a SYN to the protected port.
func (a way) packet() packet.Packet {
	return packet.Packet{SrcMAC: a.srcMAC, DstMAC: a.dstMAC, Src: netip.AddrPortFrom(a.src, clientPort),
		Dst: netip.AddrPortFrom(a.dst, port), Flags: packet.SYN, Seq: 1000, Ack: 2000, Window: 65535}
}

// marker is a datagram that nothing may keep from arriving.
func (a way) marker() []byte {
	p := a.packet()
	p.Protocol, p.Dst = packet.UDP, netip.AddrPortFrom(a.dst, markerPort)
	return p.Bytes()
}

// attack sends the frames and then the marker, and tells what has arrived and what was answered. All of them leave by one socket
// and one queue, so they arrive in order.
func (a way) attack(t *testing.T, frames [][]byte) map[string]int {
	t.Helper()
	check(t, a.from.Do(func() error { return a.send(append(frames, a.marker())) }))
	return a.judge.since(t)
}

func (a way) send(frames [][]byte) error {
	if a.raw {
		return a.sendRaw(frames)
	}
	index, err := a.from.Ifindex(a.device)
	if err != nil {
		return err
	}
	return each(unix.AF_PACKET, 0, frames, func(fd int, b []byte) error {
		return unix.Sendto(fd, b, 0, &unix.SockaddrLinklayer{Ifindex: index})
	})
}

// sendRaw gives the packets to the node's own IP output, which may refuse them.
func (a way) sendRaw(frames [][]byte) error {
	family, to := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Addr: a.dst4()})
	if a.dst.Is6() {
		family, to = unix.AF_INET6, &unix.SockaddrInet6{Addr: a.dst.As16()}
	}
	return each(family, unix.IPPROTO_RAW, frames, func(fd int, b []byte) error {
		err := unix.Sendto(fd, b[14:], 0, to)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EMSGSIZE) {
			return nil
		}
		return err
	})
}

func (a way) dst4() [4]byte {
	if a.dst.Is4() {
		return a.dst.As4()
	}
	return [4]byte{}
}

// each opens a raw socket and has it send every frame.
func each(family, protocol int, frames [][]byte, send func(fd int, b []byte) error) error {
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return err
	}
	for _, b := range frames {
		err = errors.Join(err, send(fd, b))
	}
	return errors.Join(err, unix.Close(fd))
}

// fits says whether every frame is short enough for the way.
func (a way) fits(frames [][]byte) bool {
	for _, b := range frames {
		if len(b) > a.mtu+14 {
			return false
		}
	}
	return true
}
