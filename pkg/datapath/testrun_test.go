package datapath_test

import (
	"fmt"
	"runtime"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// testRun is the part of union bpf_attr (linux/bpf.h) that BPF_PROG_TEST_RUN reads.
type testRun struct {
	prog, retval                  uint32
	sizeIn, sizeOut               uint32
	dataIn, dataOut               uint64
	repeat, duration              uint32
	contextSizeIn, contextSizeOut uint32
	contextIn, contextOut         uint64
	flags, cpu, batch, _          uint32
}

// runner runs one program on many frames, one system call and no allocation each. Not for use by two
// goroutines at a time; the thread has to be in the namespace of the frames' devices.
type runner struct {
	attr    testRun
	context skBuff
	pin     runtime.Pinner
}

func newRunner(t testing.TB, p *ebpf.Program) *runner {
	r := &runner{}
	r.pin.Pin(r)
	t.Cleanup(r.pin.Unpin)
	r.attr = testRun{prog: uint32(p.FD()), contextSizeIn: uint32(unsafe.Sizeof(r.context)),
		contextIn: uint64(uintptr(unsafe.Pointer(&r.context)))}
	return r
}

// run gives the program's verdict on the frame, with the context that stands in r.
func (r *runner) run(frame []byte) (int32, error) {
	r.attr.retval, r.attr.sizeIn = 0, uint32(len(frame))
	r.attr.sizeOut, r.attr.contextSizeOut = 0, 0 // the kernel wrote there what it would have given out
	r.attr.dataIn = uint64(uintptr(unsafe.Pointer(unsafe.SliceData(frame))))
	_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_TEST_RUN, uintptr(unsafe.Pointer(&r.attr)), unsafe.Sizeof(r.attr))
	runtime.KeepAlive(frame)
	if errno != 0 {
		return 0, fmt.Errorf("run program: %w", errno)
	}
	return int32(r.attr.retval), nil
}

// tagging makes a program that puts a VLAN tag beside the packet and goes on in the given one. The tag is
// what cb[0] says, plus one; none is zero. Its EtherType is in cb[1], in network order. A tail call takes programs of
// its own attach type only.
func tagging(t testing.TB, target *ebpf.Program, attach ebpf.AttachType) *ebpf.Program {
	t.Helper()
	jump, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	check(t, err)
	t.Cleanup(func() { check(t, jump.Close()) })
	const cb = 48 // of __sk_buff
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "tag", Type: ebpf.SchedCLS, AttachType: attach, License: "GPL",
		Instructions: asm.Instructions{
			asm.Mov.Reg(asm.R6, asm.R1),
			asm.LoadMem(asm.R3, asm.R6, cb, asm.Word),
			asm.JEq.Imm(asm.R3, 0, "go on"),
			asm.Sub.Imm(asm.R3, 1),
			asm.Mov.Imm(asm.R0, 0), asm.StoreMem(asm.R6, cb, asm.R0, asm.Word), // 6.1 takes no constants here
			asm.LoadMem(asm.R2, asm.R6, cb+4, asm.Word),
			asm.FnSkbVlanPush.Call(),
			asm.Mov.Reg(asm.R1, asm.R6).WithSymbol("go on"), asm.LoadMapPtr(asm.R2, jump.FD()), asm.Mov.Imm(asm.R3, 0),
			asm.FnTailCall.Call(),
			asm.Mov.Imm(asm.R0, 77), asm.Return(),
		}})
	check(t, err)
	t.Cleanup(func() { check(t, p.Close()) })
	check(t, jump.Put(uint32(0), target))
	return p
}
