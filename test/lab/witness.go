package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"
)

// Given is one TCP packet that a service's socket was given.
type Given struct {
	Time     time.Time // by the kernel
	Src, Dst netip.AddrPort
	Flags    uint8 // byte 13 of the TCP header
}

// Witness sees what the sockets of services are given, by a filter on the sockets themselves. The
// kernel asks it last: behind the hooks of every device, behind routing, netfilter and the programs of
// control groups. What it saw would have been answered.
type Witness struct {
	filter *ebpf.Program
	events *ebpf.Map
	lost   *ebpf.Map
	reader *ringbuf.Reader
	done   chan struct{}
}

// given is an event as the filter writes it, with ports and addresses as on the wire.
type given struct {
	KtimeNs  uint64
	Src, Dst [16]byte
	Ports    [4]byte
	Flags    uint8
	Version  uint8
	_        [2]byte
}

const (
	givenSize = 48
	// givenBuffer is the size of the ring, in bytes.
	givenBuffer = 8 << 20
)

// NewWitness calls f, from one goroutine, for every packet to a service that Watch was called for. The
// caller closes it.
func NewWitness(f func(Given)) (_ *Witness, err error) {
	w := &Witness{done: make(chan struct{})}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.free())
		}
	}()
	if w.events, err = ebpf.NewMap(&ebpf.MapSpec{Name: "lab_given", Type: ebpf.RingBuf, MaxEntries: givenBuffer}); err != nil {
		return nil, fmt.Errorf("make ring: %w", err)
	}
	if w.lost, err = ebpf.NewMap(&ebpf.MapSpec{Name: "lab_lost", Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1}); err != nil {
		return nil, fmt.Errorf("make counter: %w", err)
	}
	w.filter, err = ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "lab_witness", Type: ebpf.SocketFilter, License: "GPL", Instructions: witness(w.events.FD(), w.lost.FD()),
	})
	if err != nil {
		return nil, fmt.Errorf("load filter: %w", err)
	}
	if w.reader, err = ringbuf.NewReader(w.events); err != nil {
		return nil, fmt.Errorf("read ring: %w", err)
	}
	go w.run(f)
	return w, nil
}

// Watch has the witness see what the service is given from now on, on every connection that it accepts.
func (w *Witness) Watch(s *Service) error {
	conn, ok := s.ln.(syscall.Conn)
	if !ok {
		return fmt.Errorf("watch %s: a %T has no socket", s.Addr, s.ln)
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return fmt.Errorf("watch %s: %w", s.Addr, err)
	}
	var set error
	err = raw.Control(func(fd uintptr) {
		set = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_BPF, w.filter.FD())
	})
	if err = errors.Join(err, set); err != nil {
		return fmt.Errorf("watch %s: %w", s.Addr, err)
	}
	return nil
}

// Lost is how many packets there were that f was not called for.
func (w *Witness) Lost() (n uint64, err error) {
	err = w.lost.Lookup(uint32(0), &n)
	return n, err
}

// Close returns when f is called no more.
func (w *Witness) Close() error {
	err := w.reader.Close()
	<-w.done
	return errors.Join(err, w.free())
}

func (w *Witness) free() error {
	return errors.Join(w.filter.Close(), w.events.Close(), w.lost.Close())
}

func (w *Witness) run(f func(Given)) {
	defer close(w.done)
	for {
		r, err := w.reader.Read()
		if err != nil {
			return // closed
		}
		var g given
		if _, err := binary.Decode(r.RawSample, binary.NativeEndian, &g); err == nil {
			f(g.given())
		}
	}
}

func (g given) given() Given {
	src, dst := netip.AddrFrom16(g.Src), netip.AddrFrom16(g.Dst)
	if g.Version>>4 == 4 {
		src, dst = netip.AddrFrom4([4]byte(g.Src[:4])), netip.AddrFrom4([4]byte(g.Dst[:4]))
	}
	return Given{
		Time: sinceBoot(g.KtimeNs), Flags: g.Flags,
		Src: netip.AddrPortFrom(src, binary.BigEndian.Uint16(g.Ports[0:])),
		Dst: netip.AddrPortFrom(dst, binary.BigEndian.Uint16(g.Ports[2:])),
	}
}

// sinceBoot converts by the present distance of the clocks.
func sinceBoot(ktime uint64) time.Time {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return time.Time{}
	}
	return time.Now().Add(time.Duration(int64(ktime) - now.Nano()))
}

// witness is the filter: it writes an event and passes the packet. The data of the packet begin with
// its TCP header.
func witness(events, lost int) asm.Instructions {
	const at, network = -givenSize, 1 // BPF_HDR_START_NET
	load := func(fn asm.BuiltinFunc, from, to, size int32) asm.Instructions {
		in := asm.Instructions{asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, from), asm.Mov.Reg(asm.R3, asm.RFP),
			asm.Add.Imm(asm.R3, at+to), asm.Mov.Imm(asm.R4, size)}
		if fn == asm.FnSkbLoadBytesRelative {
			in = append(in, asm.Mov.Imm(asm.R5, network))
		}
		return append(in, fn.Call())
	}
	in := asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1), asm.Mov.Imm(asm.R0, 0)}
	for off := range int16(givenSize / 8) {
		in = append(in, asm.StoreMem(asm.RFP, at+off*8, asm.R0, asm.DWord))
	}
	in = append(in, asm.FnKtimeGetNs.Call(), asm.StoreMem(asm.RFP, at, asm.R0, asm.DWord))
	in = append(in, load(asm.FnSkbLoadBytesRelative, 0, 45, 1)...)
	in = append(in, asm.LoadMem(asm.R1, asm.RFP, at+45, asm.Byte), asm.RSh.Imm(asm.R1, 4), asm.JEq.Imm(asm.R1, 6, "v6"))
	in = append(in, load(asm.FnSkbLoadBytesRelative, 12, 8, 4)...)
	in = append(in, load(asm.FnSkbLoadBytesRelative, 16, 24, 4)...)
	in = append(in, asm.Ja.Label("tcp"))
	v6 := load(asm.FnSkbLoadBytesRelative, 8, 8, 16)
	v6[0] = v6[0].WithSymbol("v6")
	in = append(append(in, v6...), load(asm.FnSkbLoadBytesRelative, 24, 24, 16)...)
	tcp := load(asm.FnSkbLoadBytes, 0, 40, 4)
	tcp[0] = tcp[0].WithSymbol("tcp")
	in = append(append(in, tcp...), load(asm.FnSkbLoadBytes, 13, 44, 1)...)
	in = append(in, asm.LoadMapPtr(asm.R1, events), asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, at),
		asm.Mov.Imm(asm.R3, givenSize), asm.Mov.Imm(asm.R4, 0), asm.FnRingbufOutput.Call(), asm.JEq.Imm(asm.R0, 0, "pass"),
		asm.StoreImm(asm.RFP, at, 0, asm.Word), asm.LoadMapPtr(asm.R1, lost), asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, at),
		asm.FnMapLookupElem.Call(), asm.JEq.Imm(asm.R0, 0, "pass"), asm.Mov.Imm(asm.R1, 1), asm.StoreXAdd(asm.R0, asm.R1, asm.DWord))
	return append(in, asm.Mov.Imm(asm.R0, -1).WithSymbol("pass"), asm.Return())
}
