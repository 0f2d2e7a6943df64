package datapath

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// toAddr writes an address as the kernel keeps it: 16 bytes, IPv4 mapped.
func toAddr(a netip.Addr) bpf.Addr { return bpf.Addr{Bytes: a.As16()} }

// fromAddr reads it back; mapped addresses become IPv4.
func fromAddr(a bpf.Addr) netip.Addr { return netip.AddrFrom16(a.Bytes).Unmap() }

// toLabel cuts a name to what a label holds, and ends it with a zero.
func toLabel(s string) (l [32]int8) {
	writeLabel(l[:], s)
	return l
}

func fromLabel(l [32]int8) string { return readLabel(l[:]) }

// writeLabel cuts what does not fit: the last byte stays zero.
func writeLabel(l []int8, s string) {
	for i := 0; i < len(s) && i < len(l)-1; i++ {
		l[i] = int8(s[i])
	}
}

func readLabel(l []int8) string {
	b := make([]byte, len(l))
	for i, c := range l {
		b[i] = byte(c)
	}
	before, _, _ := bytes.Cut(b, []byte{0})
	return string(before)
}

// eventSize is the size of a record in the rings.
var eventSize = binary.Size(bpf.Event{})

// decodeEvent reads a record of a ring. A record of another size is of another version of the programs.
func decodeEvent(raw []byte) (*bpf.Event, error) {
	if len(raw) < eventSize {
		return nil, fmt.Errorf("read event: %d bytes, want %d", len(raw), eventSize)
	}
	e := new(bpf.Event)
	if _, err := binary.Decode(raw, binary.NativeEndian, e); err != nil {
		return nil, fmt.Errorf("read event: %w", err)
	}
	return e, nil
}

func flowID(id uint64) string { return fmt.Sprintf("k%x", id) }

// wall turns a CLOCK_BOOTTIME reading into wall-clock time for people.
func wall(boot time.Duration) time.Time {
	return time.Now().Add(boot - BootTime())
}

func deviceName(ifindex uint32) string {
	if ifindex == 0 {
		return ""
	}
	dev, err := net.InterfaceByIndex(int(ifindex))
	if err != nil {
		return fmt.Sprintf("if%d", ifindex)
	}
	return dev.Name
}

func fromEvent(e *bpf.Event) flow.Record {
	boot := time.Duration(e.BootNs)
	r := flow.Record{
		Event: flow.Event(e.Kind), Time: wall(boot), Boot: boot, CPU: int(e.Cpu), Seq: e.Seq,
		Verdict: flow.Verdict(e.Verdict), Reason: flow.Reason(e.Reason), Protocol: Protocol(e.Protocol).String(),
		Client:  netip.AddrPortFrom(fromAddr(e.Client), e.ClientPort),
		Server:  netip.AddrPortFrom(fromAddr(e.Server), e.ServerPort),
		Service: fromLabel(e.Service), Device: deviceName(e.Ifindex), Grant: fromLabel(e.Grant), Slot: e.Slot,
		BytesToServer: e.BytesToServer, BytesToClient: e.BytesToClient,
		PacketsToServer: e.PacketsToServer, PacketsToClient: e.PacketsToClient, Count: e.Count,
	}
	if e.FlowId != 0 {
		r.FlowID = flowID(e.FlowId)
	}
	return r
}

// fromFlow reads a flow entry; the path gives it its labels.
func fromFlow(k *bpf.FlowKey, f *bpf.Flow, p *bpf.Path, event flow.Event, reason flow.Reason) flow.Record {
	boot := BootTime()
	r := flow.Record{
		Event: event, Time: wall(boot), Boot: boot, CPU: -1, FlowID: flowID(f.Id),
		Verdict: flow.VerdictBypassed, Reason: reason, Protocol: Protocol(k.Protocol).String(),
		Client: netip.AddrPortFrom(fromAddr(k.Client), k.ClientPort),
		Server: netip.AddrPortFrom(fromAddr(k.Server), k.ServerPort),
		Device: deviceName(f.Ifindex), Slot: f.Slot,
		BytesToServer: f.BytesToServer, BytesToClient: f.BytesToClient,
		PacketsToServer: f.PacketsToServer, PacketsToClient: f.PacketsToClient, Count: 1,
	}
	if p.Epoch == f.Epoch {
		r.Service, r.Grant = fromLabel(p.Service), fromLabel(p.Grant)
	}
	return r
}
