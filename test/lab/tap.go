package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

const (
	tapSnap   = 256      // bytes kept of a packet, from its IP header on
	tapWhole  = 1 << 17  // more than any packet has
	tapBuffer = 64 << 20 // bytes of packets that may wait to be read
)

// Packet is one TCP or UDP packet that a Tap saw.
type Packet struct {
	// Time is the kernel's receive (or send) time stamp, CLOCK_REALTIME. Boot is the same instant in
	// CLOCK_BOOTTIME, to within the time that two clock readings take.
	Time     time.Time
	Boot     time.Duration
	Ifindex  int
	Outgoing bool // sent by the namespace, not received by it
	Src, Dst netip.AddrPort
	UDP      bool
	SYN, ACK bool
	FIN, RST bool
	Seq      uint32
	Payload  int    // bytes behind the TCP or UDP header
	Head     []byte // the first of them; of Capture all
}

// Tap records the TCP and UDP packets that pass the devices of a namespace, by a packet socket of its own.
// A packet received is recorded before any tc program sees it: to know what reached a service, tap
// the namespace that the service is in.
type Tap struct {
	file *os.File
	raw  syscall.RawConn
	snap int // bytes kept of a packet
	done chan struct{}

	mu      sync.Mutex // guards the rest
	packets []Packet
	more    chan struct{} // closed and replaced when packets grows
	err     error
}

// Tap starts recording packets with one of the ports on either side; no ports means all. Close of
// the Lab ends it.
func (n *Namespace) Tap(ports ...uint16) (*Tap, error) { return n.tap(tapSnap, ports) }

// Capture is Tap that keeps packets whole.
func (n *Namespace) Capture(ports ...uint16) (*Tap, error) { return n.tap(tapWhole, ports) }

func (n *Namespace) tap(snap int, ports []uint16) (*Tap, error) {
	var fd int
	err := n.Do(func() (err error) {
		fd, err = openTap(snap, ports)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("tap %s: %w", n.Name, err)
	}
	t := &Tap{file: os.NewFile(uintptr(fd), "tap of "+n.Name), snap: snap, done: make(chan struct{}), more: make(chan struct{})}
	if t.raw, err = t.file.SyscallConn(); err != nil {
		return nil, errors.Join(err, t.file.Close())
	}
	go t.run()
	n.lab.onClose(t.Close)
	return t, nil
}

// openTap binds only after the filter is in place, so that no other packet slips in.
func openTap(snap int, ports []uint16) (fd int, err error) {
	fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open packet socket: %w", err)
	}
	defer func() {
		if err != nil {
			_ = unix.Close(fd)
		}
	}()
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, tapBuffer); err != nil {
		return -1, fmt.Errorf("set buffer: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1); err != nil {
		return -1, fmt.Errorf("set time stamps: %w", err)
	}
	filter, err := tapFilter(snap, ports)
	if err != nil {
		return -1, err
	}
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, filter); err != nil {
		return -1, fmt.Errorf("attach filter: %w", err)
	}
	all := &unix.SockaddrLinklayer{Protocol: binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_ALL))}
	if err := unix.Bind(fd, all); err != nil {
		return -1, fmt.Errorf("bind packet socket: %w", err)
	}
	return fd, nil
}

// tapFilter passes TCP and UDP of both families without IPv6 extension headers, and with IPv4 options.
func tapFilter(snap int, ports []uint16) (*unix.SockFprog, error) {
	const accept, reject = 200, 201 // labels, resolved below
	in := []bpf.Instruction{
		bpf.LoadAbsolute{Off: 0, Size: 1},
		bpf.ALUOpConstant{Op: bpf.ALUOpShiftRight, Val: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 6, SkipTrue: 5},
		bpf.LoadAbsolute{Off: 9, Size: 1}, // IPv4
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_TCP, SkipTrue: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.IPPROTO_UDP, SkipTrue: reject},
		bpf.LoadMemShift{Off: 0},
		bpf.Jump{Skip: 4},
		bpf.LoadAbsolute{Off: 6, Size: 1}, // IPv6
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_TCP, SkipTrue: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.IPPROTO_UDP, SkipTrue: reject},
		bpf.LoadConstant{Dst: bpf.RegX, Val: 40},
	}
	for _, off := range []uint32{0, 2} {
		if len(ports) == 0 {
			break
		}
		in = append(in, bpf.LoadIndirect{Off: off, Size: 2})
		for _, p := range ports {
			in = append(in, bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(p), SkipTrue: accept})
		}
	}
	if len(ports) > 0 {
		in = append(in, bpf.RetConstant{Val: 0})
	}
	in = append(in, bpf.RetConstant{Val: uint32(snap)}, bpf.RetConstant{Val: 0})
	for i := range in {
		if j, ok := in[i].(bpf.JumpIf); ok {
			switch j.SkipTrue {
			case accept:
				j.SkipTrue = uint8(len(in) - 2 - i - 1)
			case reject:
				j.SkipTrue = uint8(len(in) - 1 - i - 1)
			}
			in[i] = j
		}
	}
	return assemble(in)
}

func assemble(in []bpf.Instruction) (*unix.SockFprog, error) {
	raw, err := bpf.Assemble(in)
	if err != nil {
		return nil, fmt.Errorf("assemble filter: %w", err)
	}
	prog := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		prog[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	return &unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}, nil
}

// run drains the socket whenever it is readable, until it is closed.
func (t *Tap) run() {
	defer close(t.done)
	_ = t.raw.Read(func(fd uintptr) bool {
		return t.drain(int(fd)) != nil
	})
}

// drain reads what waits in the socket.
func (t *Tap) drain(fd int) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	before := len(t.packets)
	defer func() {
		if len(t.packets) > before {
			close(t.more)
			t.more = make(chan struct{})
		}
	}()
	buf, oob := make([]byte, t.snap), make([]byte, 128)
	for {
		n, oobn, _, from, err := unix.Recvmsg(fd, buf, oob, 0)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ENETDOWN):
			continue
		case err != nil:
			t.err = fmt.Errorf("read packet: %w", err)
			return t.err
		}
		p, ok := parse(buf[:n])
		ll, isLL := from.(*unix.SockaddrLinklayer)
		if !ok || !isLL {
			continue
		}
		p.Ifindex, p.Outgoing = ll.Ifindex, ll.Pkttype == unix.PACKET_OUTGOING
		p.Time, p.Boot = stamp(oob[:oobn])
		t.packets = append(t.packets, p)
	}
}

// Packets are the packets recorded so far, among them all that had passed when it was called.
func (t *Tap) Packets() ([]Packet, error) {
	// After Close there is nothing more to drain, and Control says so.
	_ = t.raw.Control(func(fd uintptr) { _ = t.drain(int(fd)) })
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.packets), t.err
}

// Count is the number of packets recorded so far for which match is true.
func (t *Tap) Count(match func(Packet) bool) (int, error) {
	all, err := t.Packets()
	return len(slices.DeleteFunc(all, func(p Packet) bool { return !match(p) })), err
}

// Wait returns the first packet for which match is true, as soon as there is one.
func (t *Tap) Wait(ctx context.Context, match func(Packet) bool) (Packet, error) {
	for seen := 0; ; {
		t.mu.Lock()
		fresh, more, err := t.packets[seen:], t.more, t.err
		t.mu.Unlock()
		if i := slices.IndexFunc(fresh, match); i >= 0 {
			return fresh[i], nil
		}
		if err != nil {
			return Packet{}, err
		}
		seen += len(fresh)
		select {
		case <-more:
		case <-ctx.Done():
			return Packet{}, fmt.Errorf("wait for packet: %w after %d others", ctx.Err(), seen)
		}
	}
}

// Lost is how many packets the kernel could not record since the last call.
func (t *Tap) Lost() (uint32, error) {
	var lost uint32
	var err error
	cerr := t.raw.Control(func(fd uintptr) {
		var s *unix.TpacketStats
		if s, err = unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
			lost = s.Drops
		}
	})
	return lost, errors.Join(cerr, err)
}

// Close ends the recording. What was recorded stays readable.
func (t *Tap) Close() error {
	err := t.file.Close()
	<-t.done
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// parse reads an IP packet that may be cut off after its TCP or UDP header.
func parse(b []byte) (p Packet, ok bool) {
	src, dst, protocol, l4, length, ok := network(b)
	if !ok || len(l4) < 8 {
		return p, false
	}
	p.Src = netip.AddrPortFrom(src, binary.BigEndian.Uint16(l4[0:]))
	p.Dst = netip.AddrPortFrom(dst, binary.BigEndian.Uint16(l4[2:]))
	header := 8
	if p.UDP = protocol == unix.IPPROTO_UDP; !p.UDP {
		if header, ok = p.tcp(l4); !ok {
			return p, false
		}
	}
	if header > length {
		return p, false
	}
	p.Payload = length - header
	p.Head = slices.Clone(l4[min(header, len(l4)):min(header+p.Payload, len(l4))])
	return p, true
}

// tcp reads a TCP header and gives its length.
func (p *Packet) tcp(b []byte) (header int, ok bool) {
	if len(b) < 20 {
		return 0, false
	}
	p.Seq = binary.BigEndian.Uint32(b[4:])
	flags := b[13]
	p.FIN, p.SYN, p.RST, p.ACK = flags&1 != 0, flags&2 != 0, flags&4 != 0, flags&16 != 0
	header = int(b[12]>>4) * 4
	return header, header >= 20
}

// network takes the IP header off. length is what follows it by the header's word.
func network(b []byte) (src, dst netip.Addr, protocol byte, l4 []byte, length int, ok bool) {
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		ihl := int(b[0]&0xf) * 4
		if ihl < 20 || ihl > len(b) {
			return src, dst, 0, nil, 0, false
		}
		src, dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		return src, dst, b[9], b[ihl:], int(binary.BigEndian.Uint16(b[2:])) - ihl, true
	case len(b) >= 40 && b[0]>>4 == 6:
		src, dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		return src, dst, b[6], b[40:], int(binary.BigEndian.Uint16(b[4:])), true
	}
	return src, dst, 0, nil, 0, false
}

// stamp reads the time stamp of a message and converts it by the present distance of the clocks.
func stamp(oob []byte) (time.Time, time.Duration) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return time.Time{}, 0
	}
	for _, m := range msgs {
		if m.Header.Level != unix.SOL_SOCKET || m.Header.Type != unix.SO_TIMESTAMPNS || len(m.Data) < 16 {
			continue
		}
		at := time.Unix(int64(binary.NativeEndian.Uint64(m.Data)), int64(binary.NativeEndian.Uint64(m.Data[8:])))
		var boot unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot); err != nil {
			return at, 0
		}
		return at, time.Duration(boot.Nano()) - time.Since(at)
	}
	return time.Time{}, 0
}
