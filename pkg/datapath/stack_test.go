package datapath

import (
	"fmt"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"github.com/sallyport-dev/sallyport/bpf"
)

const (
	// maxStack is what a chain of calls may have in all (MAX_BPF_STACK).
	maxStack = 512
	// frameUnit is what kernels before 6.8 round each frame up to; later ones to 16.
	frameUnit = 32
)

// frame is one function of a program: how deep its stack is, and whom it calls.
type frame struct {
	depth int
	calls []string
}

// TestStacksFitOldKernels: the kernel adds up the frames of the deepest chain of calls, and older ones round each up
// further. What this machine's kernel loads, Linux 6.1 may refuse.
func TestStacksFitOldKernels(t *testing.T) {
	spec, err := bpf.LoadSallyport()
	if err != nil {
		t.Fatal(err)
	}
	for name, p := range spec.Programs {
		depth, chain := deepest(name, frames(p), nil)
		if depth > maxStack {
			t.Errorf("%s: %d bytes of stack in %s, want at most %d", name, depth, strings.Join(chain, " > "), maxStack)
		}
		t.Logf("%s: %d in %s", name, depth, strings.Join(chain, " > "))
	}
}

// frames reads a program's functions. A frame is as deep as the furthest byte below its frame pointer that it touches
// or takes the address of.
func frames(p *ebpf.ProgramSpec) map[string]*frame {
	all := map[string]*frame{}
	var now *frame
	var copies [asm.R9 + 1]bool // registers that are the frame pointer
	for _, in := range p.Instructions {
		if s := in.Symbol(); s != "" && (now == nil || strings.HasPrefix(s, "sp_")) {
			now = &frame{}
			all[s] = now
		}
		if in.IsFunctionCall() {
			now.calls = append(now.calls, in.Reference())
		}
		class := in.OpCode.Class()
		offset := 0
		switch {
		case class == asm.LdXClass && in.Src == asm.RFP, (class == asm.StXClass || class == asm.StClass) && in.Dst == asm.RFP:
			offset = int(in.Offset)
		case in.OpCode == asm.Mov.Reg(asm.R0, asm.RFP).OpCode && in.Dst <= asm.R9:
			copies[in.Dst] = in.Src == asm.RFP
			continue
		case in.OpCode == asm.Add.Imm(asm.R0, 0).OpCode && in.Dst <= asm.R9 && copies[in.Dst]:
			offset = int(in.Constant)
			copies[in.Dst] = false
		}
		now.depth = max(now.depth, -offset)
	}
	return all
}

// deepest follows the calls that need most.
func deepest(name string, all map[string]*frame, above []string) (depth int, chain []string) {
	f := all[name]
	if f == nil {
		return 0, nil
	}
	for _, c := range f.calls {
		if d, sub := deepest(c, all, append(above, name)); d > depth {
			depth, chain = d, sub
		}
	}
	return depth + max(frameUnit, (f.depth+frameUnit-1)/frameUnit*frameUnit), append([]string{fmt.Sprintf("%s (%d)", name, f.depth)}, chain...)
}
