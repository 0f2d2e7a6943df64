package datapath

import (
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// Profile is how programs are held on devices.
type Profile string

// Profiles. Auto is tcx where the kernel has it.
const (
	ProfileAuto   Profile = "auto"
	ProfileTCX    Profile = "tcx"    // links, Linux 6.6 and later
	ProfileClsact Profile = "clsact" // filters, Linux 5.15 and later
)

// choose settles Auto by asking the kernel.
func (p Profile) choose() (Profile, error) {
	switch p {
	case ProfileTCX, ProfileClsact:
		return p, nil
	case ProfileAuto, "":
		if haveTCX() == nil {
			return ProfileTCX, nil
		}
		return ProfileClsact, nil
	}
	return "", fmt.Errorf("unknown profile %q", p)
}

// haveTCX asks the kernel: one without tcx does not know its attach types. Every namespace has lo,
// which is device 1.
func haveTCX() error {
	_, err := link.QueryPrograms(link.QueryOptions{Target: 1, Attach: ebpf.AttachTCXIngress})
	return err
}

// prepare takes from the programs what filters do not know: kernels without tcx refuse its attach type.
func (p Profile) prepare(spec *ebpf.CollectionSpec) {
	if p != ProfileClsact {
		return
	}
	for _, prog := range spec.Programs {
		if prog.Type == ebpf.SchedCLS {
			prog.AttachType = ebpf.AttachNone
		}
	}
}
