package datapath

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// Target says where a protected service's sockets live.
type Target uint32

// Targets of a service.
const (
	// TargetHost is a service in the node's host network namespace, on every local address.
	TargetHost Target = 1
	// TargetPod is a service behind one host-side device.
	TargetPod Target = 2
	// TargetRemote is a service on another node, of TCP and in Enforce: connections of this node's workloads to it go to the
	// proxy. It has no devices and no paths.
	TargetRemote Target = 3
)

// Mode is how far a service is protected.
type Mode uint32

// Modes of a service. In the others than Enforce its traffic passes, is counted, and is told of in records.
const (
	// Enforce steers, bypasses and denies.
	Enforce Mode = 0
	// Observe counts.
	Observe Mode = 1
	// Shadow counts by what Enforce would do.
	Shadow Mode = 2
)

// Protocol is an IP protocol number (IANA).
type Protocol uint8

// Protocols of a service.
const (
	TCP Protocol = 6
	UDP Protocol = 17
)

// String is the name in flow records.
func (p Protocol) String() string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	}
	return fmt.Sprintf("ip-%d", uint8(p))
}

// number makes the zero Protocol TCP.
func (p Protocol) number() Protocol {
	if p == 0 {
		return TCP
	}
	return p
}

// Service is one row group of the services table: a protected service on its addresses and ports.
type Service struct {
	ID        uint32 // stable for a name while the agent lives, never 0
	Name      string // label in the map, cut to 31 bytes
	Target    Target
	Protocol  Protocol     // 0: TCP
	Addresses []netip.Addr // TargetPod, TargetRemote: its addresses; TargetHost: empty for every local address
	Ports     []uint16
	Ifindex   int           // TargetPod: the host-side device; 0: not known yet, closed at every device
	Besides   []int         // TargetPod: other host-side devices of the same pod, in order
	Selected  bool          // TargetPod: it is in those Pods, and its ports are closed in every namespace that is not decided
	Pods      []Place       // Selected: in the place of Addresses, Ifindex and Besides
	Idle      time.Duration // UDP: silence that ends a flow, in whole seconds, at least one
	Mode      Mode          // Enforce, unless it is said
	DenyUDP   bool          // TCP: refuses UDP to the same addresses and ports, but for those of a UDP service
}

// Place is one pod of a service that has several.
type Place struct {
	Addresses []netip.Addr
	Ifindex   int   // the host-side device; 0: not known yet, closed at every device
	Besides   []int // other host-side devices of the pod, in order
}

// Places lists the pods that the service is in, as far as anybody knows them.
func (s *Service) Places() []Place {
	if s.Selected {
		return s.Pods
	}
	return []Place{{s.Addresses, s.Ifindex, s.Besides}}
}

// Same compares two pods.
func (p Place) Same(q Place) bool {
	return p.Ifindex == q.Ifindex && slices.Equal(p.Besides, q.Besides) && slices.Equal(p.Addresses, q.Addresses)
}

// PathState is the u32 in the path state map. An operator revokes by hand by storing 3.
type PathState uint32

// States of a path slot.
const (
	PathFree    PathState = 0
	PathPending PathState = 1
	PathActive  PathState = 2
	PathRevoked PathState = 3
	PathExpired PathState = 4
	PathSpent   PathState = 5
)

// Path is what the kernel needs to let one client address reach one service directly.
type Path struct {
	Grant     string // grant id, at most 31 bytes
	Client    netip.Addr
	ServiceID uint32
	Service   string        // label in the map
	Ports     []uint16      // ports of the service that the path serves; at least one
	Deadline  time.Duration // absolute CLOCK_BOOTTIME
	Budget    Budget
	Ingress   Ingress // only clients that are reached by this kind of device
	// ClientPort and Cgroup bind the path to sockets of the client: to one port of it, or to those of a control group (by the
	// kernel's number) on this node; one of the two at most. 0: to none, it serves the address. Of TCP, where by Cgroup.
	ClientPort uint16
	Cgroup     uint64
	// After is a grant whose live paths this one may take new connections over from. What these have open goes on until they end.
	// The kernel does not keep it.
	After string
}

// Budget is what a path may carry in both directions together; 0 is no limit. Bytes are those of IP packets, headers
// included. Used up bytes or packets end the path at the packet that they do not cover; used up connections keep new ones
// out, and the path ends with its last connection.
type Budget struct {
	Bytes, Packets, Connections uint64
	ConnectionsPerSecond        uint32
}

// PathStatus is a path slot as the kernel has it.
type PathStatus struct {
	Slot  uint32
	Epoch uint32 // counts the uses of the slot
	State PathState
	Path
	Flows                            uint64 // opened so far
	BytesToServer, BytesToClient     uint64 // IP bytes, headers included
	PacketsToServer, PacketsToClient uint64
}

// Counter is what one reason has counted.
type Counter struct{ Packets, Bytes uint64 }

// Device is a hooked device.
type Device struct {
	Name     string
	Ifindex  int
	Role     Role
	Programs []string
}

// Role is the part that a device plays.
type Role string

// Roles of devices.
const (
	RoleUplink Role = "uplink"
	RolePod    Role = "pod"
	// RoleBridge is a bridge; its ports have RolePort and, if there is a pod behind, RolePodPort. The
	// ports see the services of pods, the bridge those of the node.
	RoleBridge  Role = "bridge"
	RolePort    Role = "port"
	RolePodPort Role = "pod-port"
	RoleLo      Role = "lo"
	RolePx0     Role = "px0"
	RolePx1     Role = "px1"
)

// ofDevice says whether the role is that of a device of the node which comes and goes.
func (r Role) ofDevice() bool {
	return slices.Contains([]Role{RoleUplink, RolePod, RoleBridge, RolePort, RolePodPort}, r)
}

// Losses are records that the kernel could not hand over, per ring.
type Losses struct{ MustDeliver, BestEffort uint64 }

// EventFunc takes one record. It must not keep the reader waiting.
type EventFunc func(flow.Record)
