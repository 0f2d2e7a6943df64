package datapath_test

import (
	"encoding/binary"
	"fmt"

	"github.com/sallyport-dev/sallyport/test/reference"
	"github.com/sallyport-dev/sallyport/test/shape"
)

// drawn is a case at a place.
type drawn struct {
	shape.Case
	place *place
	frame reference.Frame
	mark  uint32
	// tagType is the EtherType of the tag beside the packet, in network order.
	tagType uint16
}

// draw makes the case of an index, and chooses as what it is seen.
func (d *differential) draw(index uint64) drawn {
	c := d.seen(d.gen.Case(index))
	r := d.gen.Rand
	if c.place.tagged != nil && !c.place.ingress() && r.IntN(16) == 0 {
		c.frame.Tagged, c.frame.TCI = true, []uint16{0, 0xe000, 5, 0xfff}[r.IntN(4)]
	}
	c.frame.Segmented = r.IntN(16) == 0
	if r.IntN(8) == 0 {
		c.mark = []uint32{1, r.Uint32()}[r.IntN(2)]
	}
	return c
}

// seen is the case as Linux has it at its place.
func (d *differential) seen(of shape.Case) drawn {
	c := drawn{Case: of, tagType: vlanType, place: &d.places[of.Place]}
	c.frame = reference.Frame{Hook: c.place.hook, Ifindex: c.place.device, Data: c.Frame}
	c.frame.Own = c.place.name != "sp_port_out" // a test run has a socket of the node; what leaves at a port has left by its bridge
	if c.place.hook == reference.L3In || c.place.hook == reference.L3Out {
		c.stripEthernet()
	} else if c.place.ingress() {
		c.takeTag()
	}
	if len(c.frame.Data) >= 14 {
		c.frame.Protocol = binary.BigEndian.Uint16(c.frame.Data[12:])
	}
	return c
}

// takeTag puts the first tag beside the packet, as Linux does with whatever it receives.
func (c *drawn) takeTag() {
	b := c.Frame
	if len(b) < 18 || b[12] != 0x81 && b[12] != 0x88 || b[13] != 0x00 && b[13] != 0xa8 {
		return
	}
	c.frame.Tagged, c.frame.TCI, c.tagType = true, binary.BigEndian.Uint16(b[14:]), binary.NativeEndian.Uint16(b[12:])
	c.frame.Data = append(b[:12:12], b[16:]...)
}

// stripEthernet makes a packet that begins at its IP header. A test run takes the protocol from where an
// Ethernet header has it, so the source address gets it there.
func (c *drawn) stripEthernet() {
	if len(c.Frame) < 14+20 {
		return
	}
	c.frame.Data = c.Frame[14:]
	if c.V6 {
		c.frame.Data[12], c.frame.Data[13] = 0x86, 0xdd
	} else {
		c.frame.Data[12], c.frame.Data[13] = 8, 0
	}
}

func (c drawn) String() string {
	return fmt.Sprintf("case %d (%s) at %s device %d tagged %v %#x segmented %v mark %#x\n%x", c.Index, c.Shape, c.place.name,
		c.place.device, c.frame.Tagged, c.frame.TCI, c.frame.Segmented, c.mark, c.frame.Data)
}
