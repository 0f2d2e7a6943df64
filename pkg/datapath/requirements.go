package datapath

import (
	"errors"
	"fmt"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"
)

// ErrKernel says that the kernel lacks what enforcement needs.
var ErrKernel = errors.New("kernel lacks a feature")

// requirement is one thing that the kernel must have.
type requirement struct {
	name  string
	since string // the version of Linux that brought it
	probe func() error
}

// requirements are all of them: what is not named here is not asked for. Each is probed, for a version
// says little about a distribution's kernel.
func (p Profile) requirements() []requirement {
	helper := func(typ ebpf.ProgramType, fn asm.BuiltinFunc) func() error {
		return func() error { return features.HaveProgramHelper(typ, fn) }
	}
	all := []requirement{
		{"classifier programs", "4.1", func() error { return features.HaveProgramType(ebpf.SchedCLS) }},
		{"programs of control groups", "4.10", func() error { return features.HaveProgramType(ebpf.CGroupSKB) }},
		{"hash tables of the LRU kind", "4.10", func() error { return features.HaveMapType(ebpf.LRUHash) }},
		{"route look-ups", "4.18", helper(ebpf.SchedCLS, asm.FnFibLookup)},
		{"look-ups of sockets", "5.2", helper(ebpf.SchedCLS, asm.FnSkcLookupTcp)},
		{"assigning packets to sockets", "5.7", helper(ebpf.SchedCLS, asm.FnSkAssign)},
		{"the boot clock in programs", "5.8", helper(ebpf.SchedCLS, asm.FnKtimeGetBootNs)},
		{"ring buffers", "5.8", func() error { return features.HaveMapType(ebpf.RingBuf) }},
		{"programs at socket look-ups", "5.9", func() error { return features.HaveProgramType(ebpf.SkLookup) }},
		{"redirection through neighbours", "5.10", helper(ebpf.SchedCLS, asm.FnRedirectNeigh)},
		{"atomic operations that fetch", "5.12", probeFetch},
		{"types of the kernel (BTF)", "5.4", probeTypes},
	}
	if p == ProfileTCX {
		all = append(all, requirement{"tcx links (hooks: tcx)", "6.6", haveTCX})
	}
	return all
}

// checkKernel probes every requirement and names all that are missing.
func checkKernel(all []requirement) error {
	var missing []string
	for _, r := range all {
		err := r.probe()
		switch {
		case err == nil:
		case errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.EINVAL):
			missing = append(missing, fmt.Sprintf("%s (Linux %s)", r.name, r.since))
		default:
			return fmt.Errorf("probe kernel for %s: %w", r.name, err)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("%w: this is Linux %s, without %s", ErrKernel, kernelRelease(), strings.Join(missing, ", "))
	}
	return nil
}

// CheckKernel says what the kernel lacks for a profile. The error wraps ErrKernel. It changes nothing.
func CheckKernel(p Profile) error {
	p, err := p.choose()
	if err != nil {
		return err
	}
	return checkKernel(p.requirements())
}

func kernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "of unknown version"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// probeFetch loads a program that the features package does not have.
func probeFetch() error {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
		asm.Mov.Imm(asm.R1, 1),
		asm.StoreMem(asm.RFP, -8, asm.R1, asm.DWord),
		asm.FetchAdd.Mem(asm.RFP, asm.R1, asm.DWord, -8),
		asm.Mov.Imm(asm.R0, 0),
		asm.Return(),
	}})
	if err != nil {
		return err
	}
	return p.Close()
}

func probeTypes() error {
	if _, err := btf.LoadKernelSpec(); err != nil {
		return fmt.Errorf("%w: %s", ebpf.ErrNotSupported, err)
	}
	return nil
}
