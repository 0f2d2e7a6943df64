package hostile

import (
	"encoding/binary"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
	"github.com/sallyport-dev/sallyport/test/packet"
)

// buffer is how a frame lies in the kernel's memory: by a virtio header before it (packet(7),
// PACKET_VNET_HDR; VIRTIO 1.3, section 5.1.6).
type buffer struct {
	name    string
	payload int
	linear  int // bytes that are in one piece; 0: all headers
	segment int // bytes of payload in each segment that the packet stands for; 0: it stands for itself
}

func buffers() []buffer {
	return []buffer{
		{"linear", 1000, 0, 0},
		{"Ethernet header alone linear", 6000, 14, 0},
		{"half an IP header linear", 6000, 24, 0},
		{"IP header alone linear", 6000, 34, 0},
		{"half a TCP header linear", 6000, 40, 0},
		{"segments", 6000, 0, 1000},
		{"segments of 64 KiB", 60000, 0, 1400},
	}
}

// header is the virtio header for a TCP segment whose layers begin there.
func (b buffer) header(v6 bool, at packet.Offsets) []byte {
	h := make([]byte, 10)
	linear := b.linear
	if b.segment > 0 {
		h[0], h[1] = 1, 1 // the checksum is to be made; TCP over IPv4
		if v6 {
			h[1] = 4
		}
		linear = at.Payload
		binary.NativeEndian.PutUint16(h[4:], uint16(b.segment))
		binary.NativeEndian.PutUint16(h[6:], uint16(at.L4))
		binary.NativeEndian.PutUint16(h[8:], 16)
	}
	binary.NativeEndian.PutUint16(h[2:], uint16(linear))
	return h
}

func (b buffer) send(a way, p packet.Packet) error {
	p.Payload = make([]byte, b.payload)
	frame, at := p.Build()
	index, err := a.from.Ifindex(a.device)
	if err != nil {
		return err
	}
	return each(unix.AF_PACKET, 0, [][]byte{append(b.header(a.dst.Is6(), at), frame...)}, func(fd int, raw []byte) error {
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
			return fmt.Errorf("ask for headers: %w", err)
		}
		return unix.Sendto(fd, raw, 0, &unix.SockaddrLinklayer{Ifindex: index})
	})
}

// TestBuffers: what a program cannot read in one piece it reads all the same, and a packet that stands for
// many is judged as one.
func TestBuffers(t *testing.T) {
	leak.Check(t)
	control, enforced := newWorld(t, false), newWorld(t, true)
	for _, b := range buffers() {
		for _, f := range lab.Families() {
			t.Run(b.name+"/"+f.String(), func(t *testing.T) {
				for w, arrives := range map[*world]bool{control: true, enforced: false} {
					a := named(w.ways(t, f), "client to host")
					p := a.packet()
					p.Flags = packet.ACK
					check(t, a.from.Do(func() error { return b.send(a, p) }))
					if n := a.attack(t, nil)["arrived"]; (n > 0) != arrives {
						t.Errorf("enforced %v: %d arrived", w.d != nil, n)
					}
				}
			})
		}
	}
}
