package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// errHere says that an address of a remote service is of this node.
var errHere = errors.New("leads to this node: nothing is steered there as to a remote service; take the address out of the RemoteService, " +
	"or protect what is there with a ProtectedService")

// elsewhere is the set without those addresses of remote services that are of this node or of its pods, or that a protected service
// has: who comes there proves itself as everywhere. Each is a problem. r.mu is held.
func (r *resources) elsewhere(set *policy.Set) *policy.Set {
	near := make(map[string][]error)
	kept := set.LeaveOut(func(service string, a netip.Addr) bool {
		out, err := r.leavesOut(set, service, a)
		if err != nil {
			near[service] = append(near[service], fmt.Errorf("%s of remote service %s %w", a, service, err))
		}
		return out
	})
	for _, s := range set.RemoteServices() {
		if r.closed != nil {
			near[s.Name] = append(near[s.Name], r.closed(s))
		}
		r.problems.report(problemService, s.Name, errors.Join(near[s.Name]...))
	}
	r.problems.keep(problemService, func(name string) bool {
		_, protected := set.Service(name)
		_, remote := set.RemoteService(name)
		return protected || remote
	})
	return kept
}

// leavesOut says whether nothing is steered to an address as to a remote service, and what is wrong with the address. A protected
// service that is only watched takes nothing away: what goes there would go in the clear.
func (r *resources) leavesOut(set *policy.Set, service string, a netip.Addr) (bool, error) {
	remote, _ := set.RemoteService(service)
	for _, port := range remote.Spec.Ports {
		s, ok := set.PodServiceAt(policy.ProtocolTCP, netip.AddrPortFrom(a, port))
		if ok && modeOf(s) == datapath.Enforce {
			return true, fmt.Errorf("is one of the protected service %s, which stands; take the address out of one of the two", s.Name)
		}
	}
	if r.isHere == nil {
		return false, nil
	}
	switch here, err := r.isHere(a); {
	case err != nil:
		return r.isLeftOut(service, a), fmt.Errorf("stays as it was, for nobody can tell whether it is of this node: %w", err)
	case here:
		return true, errHere
	}
	return false, nil
}

// isLeftOut says whether the address is left out of what is in force. What was not there before is not: a question that failed must
// not have anything go in the clear.
func (r *resources) isLeftOut(service string, a netip.Addr) bool {
	if r.now == nil {
		return false
	}
	had, _ := r.now.set.RemoteService(service)
	has, _ := r.now.handed.RemoteService(service)
	return slices.Contains(had.Spec.Addresses, a) && !slices.Contains(has.Spec.Addresses, a)
}

// remoteRow is the row of a remote service. It is enforced: whoever asks for it is steered.
func remoteRow(s policy.RemoteService) datapath.Service {
	return datapath.Service{Name: s.Name, Target: datapath.TargetRemote, Protocol: datapath.TCP, Mode: datapath.Enforce,
		Addresses: s.Spec.Addresses, Ports: s.Spec.Ports}
}

// isHere tells whether an address is the node's own, or of a pod on it. One behind a bridge that has not spoken yet is taken for
// elsewhere until it does, and one behind a bridge that leads elsewhere too always is: a pod there can say that it has any.
func (n *node) isHere(where locator) func(netip.Addr) (bool, error) {
	return func(a netip.Addr) (bool, error) {
		own, err := n.around.own([]netip.Addr{a})
		if err != nil || isOwn(a, own) {
			return true, err
		}
		device, err := where.behind(a)
		if err != nil {
			return false, nil // no route leads to a pod of this node
		}
		if !where.isPod(device) {
			return false, nil
		}
		shared, err := where.isShared(device)
		return !shared, err
	}
}

// describeRemote is a remote service as it stands: what is left out is not among its addresses.
func describeRemote(s policy.RemoteService, row datapath.Service) *api.Service {
	out := &api.Service{Name: s.Name, Id: row.ID, Target: "Remote", Addresses: texts(row.Addresses), Protocol: policy.ProtocolTCP,
		Allow: s.Spec.Callers, Source: s.Source.String(), Mode: string(policy.ModeEnforce)}
	for _, p := range s.Spec.Ports {
		out.Ports = append(out.Ports, uint32(p))
	}
	return out
}

// remoteState names the remote services that are in force; empty where there are none. Without attestation nobody is let out to them.
func remoteState(e *enforced, attests bool) string {
	if e == nil {
		return ""
	}
	var names []string
	for _, s := range e.handed.RemoteServices() {
		name := s.Name
		if s.Spec.Without == policy.WithoutPass && attests {
			name += " (in the clear where it speaks no TLS)"
		}
		names = append(names, name)
	}
	if len(names) == 0 {
		return ""
	}
	if !attests {
		return "; closed to workloads of this node: " + strings.Join(names, ", ")
	}
	return "; workloads speak for themselves to " + strings.Join(names, ", ")
}
