//go:build k8s

package k8s

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"path/filepath"
	"time"

	"github.com/sallyport-dev/sallyport/test/packet"
)

// wire is a packet socket of an attacker's pod: its frames come from here, and what it sees comes here.
type wire struct {
	mac    [6]byte
	in     io.Writer
	frames chan []byte
}

// wire opens one on a device, in the container of a pod. past says that what is sent shuns the egress hooks of the device.
func (c *inCluster) wire(pod, device, past string) *wire {
	c.t.Helper()
	cmd := c.nodes[0].inside(context.Background(), filepath.Join(c.bin, "kubectl"), "--kubeconfig", c.kubeconfig("admin"), "exec", "-i", pod, "--", "/probe", "wire", device, past)
	in, err := cmd.StdinPipe()
	must(c.t, err)
	out, err := cmd.StdoutPipe()
	must(c.t, err)
	must(c.t, cmd.Start())
	lines := bufio.NewReader(out)
	first, err := nextFrame(lines)
	if err != nil || len(first) != 6 {
		c.t.Fatalf("open %s in %s: %v", device, pod, errors.Join(err, cmd.Wait()))
	}
	w := &wire{mac: [6]byte(first), in: in, frames: make(chan []byte, 10000)}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			frame, err := nextFrame(lines)
			if err != nil {
				return
			}
			select {
			case w.frames <- frame:
			default: // nobody reads: it is of no attack
			}
		}
	}()
	c.t.Cleanup(func() {
		_ = in.Close()
		<-ended
		_ = cmd.Wait()
	})
	return w
}

func nextFrame(r *bufio.Reader) ([]byte, error) {
	line, err := r.ReadString('\n')
	if err != nil {
		return nil, err
	}
	return base64.StdEncoding.DecodeString(line[:len(line)-1])
}

func (w *wire) send(frames ...[]byte) error {
	for _, f := range frames {
		if _, err := fmt.Fprintln(w.in, base64.StdEncoding.EncodeToString(f)); err != nil {
			return err
		}
	}
	return nil
}

// answer is how far an attacker got.
type answer string

const (
	nobody   answer = "nobody answered"
	reset    answer = "reset"
	accepted answer = "somebody accepted and said nothing" // which the proxy does
	breached answer = "the database answered"
)

// shake is a TCP client of its own that asks the database for TLS, as PostgreSQL has it. p is its SYN; before each that it sends, it sends beside.
func (w *wire) shake(p packet.Packet, beside ...[]byte) (answer, error) {
	for len(w.frames) > 0 {
		<-w.frames
	}
	syn := p
	got := nobody
	again := time.NewTicker(300 * time.Millisecond)
	defer again.Stop()
	end := time.After(3 * time.Second)
	if err := w.send(append(beside, syn.Bytes())...); err != nil {
		return got, err
	}
	for {
		select {
		case <-end:
			return got, nil
		case <-again.C:
			if err := w.send(beside...); err != nil {
				return got, err
			}
			if got == nobody {
				if err := w.send(syn.Bytes()); err != nil {
					return got, err
				}
			}
		case frame := <-w.frames:
			s, ok := readSegment(frame)
			if !ok || s.src != p.Dst || s.dst != p.Src {
				continue
			}
			switch {
			case s.flags&packet.RST != 0:
				if got == accepted {
					return accepted, nil
				}
				return reset, nil
			case s.flags&packet.SYN != 0 && s.flags&packet.ACK != 0:
				got = accepted
				p.Flags, p.Seq, p.Ack, p.Payload = packet.ACK, syn.Seq+1, s.seq+1, nil
				request := p
				request.Flags, request.Payload = packet.ACK|packet.PSH, []byte{0, 0, 0, 8, 4, 210, 22, 47}
				if err := w.send(p.Bytes(), request.Bytes()); err != nil {
					return got, err
				}
			case len(s.payload) == 1 && (s.payload[0] == 'N' || s.payload[0] == 'S'):
				return breached, nil
			}
		}
	}
}

// segment is what there is of TCP in a frame.
type segment struct {
	src, dst netip.AddrPort
	flags    uint8
	seq      uint32
	payload  []byte
}

// readSegment reads a frame without tags, options of IP, or extension headers, as the kernel sends them.
func readSegment(b []byte) (s segment, ok bool) {
	if len(b) < 14+40 {
		return s, false
	}
	typ, b := binary.BigEndian.Uint16(b[12:]), b[14:]
	var src, dst netip.Addr
	switch {
	case typ == 0x0800 && b[0] == 0x45 && b[9] == packet.TCP:
		src, dst = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
		length := min(len(b), int(binary.BigEndian.Uint16(b[2:])))
		b = b[20:max(20, length)]
	case typ == 0x86dd && b[6] == packet.TCP:
		src, dst = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
		b = b[40:min(len(b), 40+int(binary.BigEndian.Uint16(b[4:])))]
	default:
		return s, false
	}
	if len(b) < 20 || len(b) < int(b[12]>>4)*4 {
		return s, false
	}
	s.src, s.dst = netip.AddrPortFrom(src, binary.BigEndian.Uint16(b)), netip.AddrPortFrom(dst, binary.BigEndian.Uint16(b[2:]))
	s.seq, s.flags, s.payload = binary.BigEndian.Uint32(b[4:]), b[13], b[int(b[12]>>4)*4:]
	return s, true
}

// claim is a frame that tells `to` that the address is at the sender: an answer of ARP, or an advertisement of NDP that overrides.
func claim(address netip.Addr, at [6]byte, to netip.Addr, mac [6]byte) []byte {
	if address.Is4() {
		b := append(append(append([]byte(nil), mac[:]...), at[:]...), 0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 2)
		b = append(append(append(b, at[:]...), address.AsSlice()...), mac[:]...)
		return append(b, to.AsSlice()...)
	}
	p := packet.Packet{SrcMAC: at, DstMAC: mac, TTL: 255, Src: netip.AddrPortFrom(address, 0)}
	quote := append(address.AsSlice(), append([]byte{2, 1}, at[:]...)...)
	return p.ICMPErrorQuoting(address, to, 136, 0, 0xa0000000, quote)
}
