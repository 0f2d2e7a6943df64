package reference

import (
	"net/netip"
	"slices"
)

// reaches says whether the packet, passed on from the hook, could come to a protected port.
func (w *World) reaches(f Frame, d dissection) bool {
	if d.kind == nothing || f.Hook == SocketIn && d.kind != ported {
		return false // a socket gets whole segments and datagrams
	}
	if d.dst.IsLoopback() && d.dst.Is6() && !f.Hook.routed() {
		return false // refused on every other device
	}
	if f.Hook == PodOut && (d.kind == later || d.kind == hidden) && (d.dst.IsMulticast() || w.shared(d.dst)) {
		return false // to a group, the first fragment decides, and keys are agreed on by address
	}
	return slices.ContainsFunc(w.Services, func(s Service) bool {
		if d.kind != hidden && s.Protocol != d.protocol {
			return false
		}
		if (d.kind == ported || d.kind == opening || d.kind == about) && s.Port != d.dport {
			return false
		}
		return w.arrives(f, d.dst, s) && (d.kind != about || w.has(s, d.sender))
	})
}

// arrives says whether what the hook passes on gets to the service's sockets by this destination.
func (w *World) arrives(f Frame, dst netip.Addr, s Service) bool {
	node := len(s.Addresses) == 0
	if node != f.Hook.ingress() {
		return false // services of the node are met on the way in, those of pods on the way out
	}
	if !node && f.Hook != PodOut && s.Device != f.Ifindex {
		return false
	}
	if f.Hook.routed() {
		return true
	}
	if !node && s.Device == f.Ifindex && !dst.IsMulticast() && !w.shared(dst) {
		return true // a pod may have any address besides those that are known
	}
	if dst.IsMulticast() || w.shared(dst) {
		// TCP takes unicast alone. What leaves by an uplink goes to other machines.
		return s.Protocol == protoUDP && (node || f.Hook == PodOut && s.Device == f.Ifindex)
	}
	return w.has(s, dst)
}

// leaves says whether it is a segment of a workload of this node for a service on another one. Only what is plainly one is held to
// that: the rest is refused there. A reset ends what is no connection of ours.
func (w *World) leaves(f Frame, d dissection) bool {
	if d.shape != TCP || d.resets || d.src.Is4In6() || !w.asks(f) {
		return false
	}
	return slices.ContainsFunc(w.Remote, func(s Service) bool { return s.Port == d.dport && w.has(s, d.dst) })
}

// asks says whether the hook is one where a workload of this node sends.
func (w *World) asks(f Frame) bool {
	pods := slices.Contains(w.Workloads, f.Ifindex)
	switch f.Hook {
	case DeviceIn, L3In:
		return pods
	case DeviceOut, L3Out:
		return f.Own && !pods
	}
	return false
}

// owns says whether the address has a protected port, whoever asks.
func (w *World) owns(a netip.Addr) bool {
	has := func(s Service) bool { return w.has(s, a) }
	return a.IsValid() && (slices.ContainsFunc(w.Services, has) || slices.ContainsFunc(w.Remote, has))
}

// toPod says whether what the hook passes on arrives at a pod that has a service.
func (w *World) toPod(f Frame) bool {
	return !f.Hook.ingress() && slices.ContainsFunc(w.Services, func(s Service) bool { return s.Device == f.Ifindex })
}

// has says whether the service is at that unicast address.
func (w *World) has(s Service, a netip.Addr) bool {
	if len(s.Addresses) == 0 {
		return a.IsLoopback() || slices.Contains(w.Local, a)
	}
	return slices.Contains(s.Addresses, a)
}

// staysHere says whether the address is none that a router passes on: among those of IPv4 are the networks
// from 224 and network 0 (RFC 1122, section 3.2.1.3).
func (w *World) staysHere(a netip.Addr) bool {
	if a.Is4() && (a.As4()[0] == 0 || a.As4()[0] >= 224) {
		return true
	}
	return a.IsMulticast() || a.IsLinkLocalUnicast() || a.IsLoopback() || a.IsUnspecified() || a.Is4In6() || w.shared(a)
}

// answers says whether the packet comes from a protected port.
func (w *World) answers(d dissection) bool {
	return slices.ContainsFunc(w.Services, func(s Service) bool {
		return s.Protocol == d.protocol && s.Port == d.sport && w.has(s, d.src)
	})
}

var limited = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// shared: 0.0.0.0 is the old form of the limited broadcast (RFC 1122, section 3.2.1.3).
func (w *World) shared(a netip.Addr) bool {
	return a == limited || a == netip.IPv4Unspecified() || slices.Contains(w.Shared, a)
}
