package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
)

// Verdicts of the programs (linux/pkt_cls.h).
const (
	actNext     int32 = -1
	actDrop     int32 = 2
	actRedirect int32 = 7

	socketPass int32 = 1 // of a control group
	xdpPass    int32 = 2
)

// skBuff is struct __sk_buff of linux/bpf.h, as far as a test run reads it.
type skBuff struct {
	Len, PktType, Mark, QueueMapping, Protocol, VlanPresent, VlanTCI, VlanProto, Priority uint32
	IngressIfindex, Ifindex, TCIndex                                                      uint32
	CB                                                                                    [5]uint32
	_                                                                                     [19]uint32
	FlowKeys, Tstamp                                                                      uint64
	WireLen, GSOSegs                                                                      uint32
	Sk                                                                                    uint64
	GSOSize, TstampType                                                                   uint32
	HWTstamp                                                                              uint64
}

// ours is how the names of our programs begin.
const ours = "sp_"

// attached opens our program at a place: the one that packets meet. A device is of the current namespace.
func attached(target int, attach ebpf.AttachType) (*ebpf.Program, error) {
	chain, err := link.QueryPrograms(link.QueryOptions{Target: target, Attach: attach})
	if err != nil {
		return nil, fmt.Errorf("query programs: %w", err)
	}
	for _, at := range chain.Programs {
		p, err := ebpf.NewProgramFromID(at.ID)
		if err != nil {
			return nil, fmt.Errorf("open program %d: %w", at.ID, err)
		}
		info, err := p.Info()
		if err == nil && strings.HasPrefix(info.Name, ours) {
			return p, nil
		}
		if err := errors.Join(err, p.Close()); err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("find our program: not among %d at %v", len(chain.Programs), attach)
}

// emptyProgram gives every packet the same verdict: what any program at that place costs.
func emptyProgram(kind ebpf.ProgramType, attach ebpf.AttachType, verdict int32) (*ebpf.Program, error) {
	return ebpf.NewProgram(&ebpf.ProgramSpec{Name: "empty", Type: kind, AttachType: attach, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, verdict), asm.Return()}})
}

// driver is a program with a map of its own. A jump table must stay open: the kernel empties it when it is closed.
type driver struct {
	*ebpf.Program
	table *ebpf.Map
}

func (d driver) Close() error { return errors.Join(d.Program.Close(), d.table.Close()) }

// turns writes a number below n, at random, over the two bytes at an offset of the packet, and goes on in
// the target: by it a run of one packet is a run of many flows.
func turns(target *ebpf.Program, attach ebpf.AttachType, offset int16, n int32) (d driver, err error) {
	d.table, err = ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		return d, fmt.Errorf("make jump table: %w", err)
	}
	d.Program, err = ebpf.NewProgram(&ebpf.ProgramSpec{Name: "turns", Type: ebpf.SchedCLS, AttachType: attach, License: "GPL",
		Instructions: asm.Instructions{
			asm.Mov.Reg(asm.R6, asm.R1),
			asm.FnGetPrandomU32.Call(),
			asm.Mod.Imm32(asm.R0, n),
			asm.HostTo(asm.BE, asm.R0, asm.Half),
			asm.LoadMem(asm.R2, asm.R6, 76, asm.Word), // data
			asm.LoadMem(asm.R3, asm.R6, 80, asm.Word), // data_end
			asm.Mov.Reg(asm.R4, asm.R2),
			asm.Add.Imm(asm.R4, int32(offset)+2),
			asm.JGT.Reg(asm.R4, asm.R3, "out"),
			asm.StoreMem(asm.R2, offset, asm.R0, asm.Half),
			asm.Mov.Reg(asm.R1, asm.R6), asm.LoadMapPtr(asm.R2, d.table.FD()), asm.Mov.Imm(asm.R3, 0),
			asm.FnTailCall.Call(),
			asm.Mov.Imm(asm.R0, actDrop).WithSymbol("out"), asm.Return(),
		}})
	if err != nil {
		return d, errors.Join(fmt.Errorf("load driver: %w", err), d.table.Close())
	}
	if err := d.table.Put(uint32(0), target); err != nil {
		return d, errors.Join(fmt.Errorf("fill jump table: %w", err), d.Close())
	}
	return d, nil
}

// lookUp is a program that finds one of n entries at random, in a hash like another one, and adds to it: what
// any program pays that keeps state for each flow. It is closed with its hash.
func lookUp(like *ebpf.Map, attach ebpf.AttachType, n int) (d driver, err error) {
	d.table, err = ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: like.KeySize(), ValueSize: like.ValueSize(), MaxEntries: like.MaxEntries()})
	if err != nil {
		return d, fmt.Errorf("make hash: %w", err)
	}
	key, value := make([]byte, like.KeySize()), make([]byte, like.ValueSize())
	for i := range n {
		binary.NativeEndian.PutUint32(key, uint32(i))
		if err := d.table.Put(key, value); err != nil {
			return d, errors.Join(fmt.Errorf("fill hash: %w", err), d.table.Close())
		}
	}
	size := int16(like.KeySize()+7) &^ 7
	code := asm.Instructions{asm.FnGetPrandomU32.Call(), asm.Mod.Imm32(asm.R0, int32(n)), asm.Mov.Imm(asm.R1, 0)}
	for at := int16(8); at <= size; at += 8 {
		code = append(code, asm.StoreMem(asm.RFP, -at, asm.R1, asm.DWord))
	}
	d.Program, err = ebpf.NewProgram(&ebpf.ProgramSpec{Name: "look_up", Type: ebpf.SchedCLS, AttachType: attach, License: "GPL",
		Instructions: append(code,
			asm.StoreMem(asm.RFP, -size, asm.R0, asm.Word),
			asm.LoadMapPtr(asm.R1, d.table.FD()), asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, int32(-size)),
			asm.FnMapLookupElem.Call(),
			asm.JEq.Imm(asm.R0, 0, "missing"),
			asm.Mov.Imm(asm.R1, 1), asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),
			asm.Mov.Imm(asm.R0, actNext), asm.Return(),
			asm.Mov.Imm(asm.R0, actDrop).WithSymbol("missing"), asm.Return(),
		)})
	if err != nil {
		return d, errors.Join(fmt.Errorf("load program: %w", err), d.table.Close())
	}
	return d, nil
}

// probe is one packet at one program.
type probe struct {
	prog  *ebpf.Program
	ctx   *skBuff // nil for XDP
	frame []byte
}

func (p probe) options(packets int) *ebpf.RunOptions {
	o := &ebpf.RunOptions{Data: p.frame, Repeat: uint32(packets)}
	if p.ctx != nil {
		o.Context = p.ctx
	}
	return o
}

// send runs the program once.
func (p probe) send() (int32, error) {
	code, err := p.prog.Run(p.options(1))
	return int32(code), err
}

// cost is the median of several batches, in nanoseconds of a packet. A batch is short, so that most of
// them are not interrupted; the system call is spread over all its packets.
func (p probe) cost(batches, packets int) (float64, error) {
	var costs []float64
	for range batches {
		o := p.options(packets)
		began := time.Now()
		if _, err := p.prog.Run(o); err != nil {
			return 0, fmt.Errorf("run program: %w", err)
		}
		costs = append(costs, float64(time.Since(began).Nanoseconds())/float64(packets))
	}
	return quantile(costs, 0.5), nil
}
