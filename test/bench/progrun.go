package main

import (
	"errors"
	"fmt"
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

// attached opens the program of that name in a device's chain: the one that packets meet. The current
// namespace is the device's.
func attached(ifindex int, attach ebpf.AttachType, name string) (*ebpf.Program, error) {
	chain, err := link.QueryPrograms(link.QueryOptions{Target: ifindex, Attach: attach})
	if err != nil {
		return nil, fmt.Errorf("query device %d: %w", ifindex, err)
	}
	for _, at := range chain.Programs {
		p, err := ebpf.NewProgramFromID(at.ID)
		if err != nil {
			return nil, fmt.Errorf("open program %d: %w", at.ID, err)
		}
		info, err := p.Info()
		if err == nil && info.Name == name {
			return p, nil
		}
		if err := errors.Join(err, p.Close()); err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("find %s on device %d: not in its chain", name, ifindex)
}

// emptyProgram lets every packet go on: what any program in the chain costs.
func emptyProgram(attach ebpf.AttachType) (*ebpf.Program, error) {
	return ebpf.NewProgram(&ebpf.ProgramSpec{Name: "empty", Type: ebpf.SchedCLS, AttachType: attach, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, actNext), asm.Return()}})
}

// driver is a program that goes on in another by a jump table, which the kernel empties when it is closed.
type driver struct {
	*ebpf.Program
	jump *ebpf.Map
}

func (d driver) Close() error { return errors.Join(d.Program.Close(), d.jump.Close()) }

// turns writes a number below n, at random, over the two bytes at an offset of the packet, and goes on in
// the target: by it a run of one packet is a run of many flows.
func turns(target *ebpf.Program, attach ebpf.AttachType, offset int16, n int32) (d driver, err error) {
	d.jump, err = ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
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
			asm.Mov.Reg(asm.R1, asm.R6), asm.LoadMapPtr(asm.R2, d.jump.FD()), asm.Mov.Imm(asm.R3, 0),
			asm.FnTailCall.Call(),
			asm.Mov.Imm(asm.R0, actDrop).WithSymbol("out"), asm.Return(),
		}})
	if err != nil {
		return d, errors.Join(fmt.Errorf("load driver: %w", err), d.jump.Close())
	}
	if err := d.jump.Put(uint32(0), target); err != nil {
		return d, errors.Join(fmt.Errorf("fill jump table: %w", err), d.Close())
	}
	return d, nil
}

// probe is one packet at one program.
type probe struct {
	prog  *ebpf.Program
	ctx   skBuff
	frame []byte
}

// send runs the program once.
func (p probe) send() (int32, error) {
	code, err := p.prog.Run(&ebpf.RunOptions{Data: p.frame, Context: &p.ctx})
	return int32(code), err
}

// cost is the median of several batches, in nanoseconds of a packet. A batch is short, so that most of
// them are not interrupted; the system call is spread over all its packets.
func (p probe) cost(batches, packets int) (float64, error) {
	var costs []float64
	for range batches {
		o := ebpf.RunOptions{Data: p.frame, Context: &p.ctx, Repeat: uint32(packets)}
		began := time.Now()
		if _, err := p.prog.Run(&o); err != nil {
			return 0, fmt.Errorf("run program: %w", err)
		}
		costs = append(costs, float64(time.Since(began).Nanoseconds())/float64(packets))
	}
	return quantile(costs, 0.5), nil
}
