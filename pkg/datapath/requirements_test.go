package datapath

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
)

// TestThisKernel: the kernel that the tests run on has everything, and each probe tells so.
func TestThisKernel(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: probes load programs (CAP_BPF)")
	}
	for _, p := range []Profile{ProfileAuto, ProfileClsact} {
		if err := CheckKernel(p); err != nil {
			t.Errorf("%s: %v", p, err)
		}
	}
}

// TestMissingFeatures: all that is missing is named at once, with the version that has it and the one that
// runs. A probe that failed for another reason says nothing about the kernel.
func TestMissingFeatures(t *testing.T) {
	good := requirement{"hats", "1.0", func() error { return nil }}
	lost := func(name, since string) requirement {
		return requirement{name, since, func() error { return ebpf.ErrNotSupported }}
	}
	if err := checkKernel([]requirement{good}); err != nil {
		t.Error(err)
	}
	err := checkKernel([]requirement{lost("shoes", "9.1"), good, lost("gloves", "9.2")})
	if !errors.Is(err, ErrKernel) || !strings.HasSuffix(err.Error(), "this is Linux "+kernelRelease()+", without shoes (Linux 9.1), gloves (Linux 9.2)") {
		t.Errorf("%v", err)
	}
	broken := requirement{"coats", "9.3", func() error { return os.ErrPermission }}
	if err := checkKernel([]requirement{broken}); errors.Is(err, ErrKernel) || !errors.Is(err, os.ErrPermission) {
		t.Errorf("%v", err)
	}
}
