// Package privilege says which capabilities each process needs, and refuses a start with fewer: what
// fails later fails at the wrong moment, and does not say why.
package privilege

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrMissing is what Check's errors wrap.
var ErrMissing = errors.New("capabilities are missing")

// Capability is one of capabilities(7), and what the process does with it.
type Capability struct {
	Name   string // with CAP_
	For    string
	number uint
}

// Set is all that a process needs to have effective when it starts, and nothing else.
type Set struct {
	Process      string // as people call it
	Unit         string // of systemd, that gives it
	Capabilities []Capability
}

// Agent is the set of `sallyport-agent run` and `uninstall`. The kernel takes CAP_SYS_ADMIN for CAP_BPF
// and CAP_PERFMON, too.
func Agent() Set {
	return Set{"agent", "sallyport-agent.service", []Capability{
		{"CAP_NET_ADMIN", "px0, programs on devices and control groups, and the end of sockets", unix.CAP_NET_ADMIN},
		{"CAP_SYS_ADMIN", "the px namespace and those of pods, and programs, maps and links", unix.CAP_SYS_ADMIN},
		{"CAP_SYS_PTRACE", "pods' namespaces that no mount shows", unix.CAP_SYS_PTRACE},
		{"CAP_CHOWN", "the proxy's socket, for the proxy's group", unix.CAP_CHOWN},
	}}
}

// Guard is the set of `sallyport-agent guard`. Since Linux 5.19 root's uid alone would do.
func Guard() Set {
	return Set{"guard", "sallyport-guard.service", []Capability{
		{"CAP_BPF", "opening pinned links", unix.CAP_BPF},
	}}
}

// Launcher is the set of sallyport-proxy until it has entered px. What it becomes there has
// CAP_NET_RAW alone, and checks that by itself.
func Launcher() Set {
	return Set{"launcher of the proxy", "sallyport-proxy.service", []Capability{
		{"CAP_SYS_ADMIN", "entering px", unix.CAP_SYS_ADMIN},
		{"CAP_SETUID", "becoming the proxy's user", unix.CAP_SETUID},
		{"CAP_SETGID", "becoming the proxy's group", unix.CAP_SETGID},
		{"CAP_SETPCAP", "giving up all other capabilities", unix.CAP_SETPCAP},
		{"CAP_NET_RAW", "the proxy's transparent sockets", unix.CAP_NET_RAW},
	}}
}

// Check compares the set with the effective one of the calling thread. Its error wraps ErrMissing
// and names each missing capability and what it is for.
func (s Set) Check() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("read own capabilities: %w", err)
	}
	return s.check(uint64(data[1].Effective)<<32 | uint64(data[0].Effective))
}

func (s Set) check(effective uint64) error {
	var missing []string
	for _, c := range s.Capabilities {
		if effective&(1<<c.number) == 0 {
			missing = append(missing, fmt.Sprintf("%s (%s)", c.Name, c.For))
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return fmt.Errorf("%w: the %s has no %s", ErrMissing, s.Process, strings.Join(missing, ", no "))
}

// Hint is the next step after ErrMissing.
func (s Set) Hint() string {
	return "start it by " + s.Unit + ", or give it " + s.String() +
		" (systemd: CapabilityBoundingSet=, Kubernetes: securityContext.capabilities.add)"
}

// String lists the capabilities as a unit file does.
func (s Set) String() string {
	var names []string
	for _, c := range s.Capabilities {
		names = append(names, c.Name)
	}
	return strings.Join(names, " ")
}
