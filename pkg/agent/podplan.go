package agent

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

var (
	errNoAddress = errors.New("has no address yet: the cluster tells of it")
	errUntold    = errors.New("chooses pods, and no cluster tells of any (spec.kubernetes of the agent's configuration): " +
		"its ports are closed in every network namespace but the node's")
)

// podsAgain is how soon a pod is looked for again that the cluster has told of and that is not there yet.
const podsAgain = 50 * time.Millisecond

// What problems of pods are about, where it is not one pod or service.
const (
	podsDevices = "devices of the node"
	podsDecided = "table of known pods"
	podsTable   = "services table"
	podsKept    = "what the cluster said"
)

var podsSubjects = []string{podsDevices, podsDecided, podsTable, podsKept}

// podPlan is where the services of a set are that choose their pods, and which namespaces are decided with it.
type podPlan struct {
	places    map[string][]datapath.Place // by service
	contested []datapath.Service          // what several services claim: closed, and nobody's
	decided   map[uint64]string           // pods by the cookies of their namespaces
	early     map[uint64]string           // of these, the pods that no service in force needs a row for
	waits     bool                        // for pods that are not there yet
}

// first is what may be decided before the table is written: pods that nothing of it concerns, and what was decided before and still is.
func (p podPlan) first(before map[uint64]string) map[uint64]string {
	first := maps.Clone(p.early)
	for cookie, pod := range p.decided {
		if _, was := before[cookie]; was {
			first[cookie] = pod
		}
	}
	return first
}

// addresses are those of a service's pods.
func (p podPlan) addresses(service string) (all []netip.Addr) {
	for _, place := range p.places[service] {
		all = append(all, place.Addresses...)
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return all
}

// podPlanner makes a plan of a set.
type podPlanner struct {
	classify classifier
	links    []netlink.Link
	services []policy.ProtectedService
	plan     podPlan
	problems map[string][]error // by pod
	said     map[netip.Addr]int // how many pods that run are said to have an address
}

// plan says where the services of the set are whose pods are chosen. What is wrong with a pod is a problem of its own, and leaves it closed.
func (r *resources) plan(set *policy.Set) podPlan {
	if r.pods == nil {
		return podPlan{}
	}
	known, waits := r.pods.look()
	links, err := netlink.LinkList()
	r.problems.report(problemPods, podsDevices, err)
	p := &podPlanner{classify: r.classify, links: links, services: set.Services(), problems: make(map[string][]error),
		plan: podPlan{places: make(map[string][]datapath.Place), decided: make(map[uint64]string), early: make(map[uint64]string), waits: waits}}
	p.said = addressesOf(known)
	for _, k := range known {
		p.add(k)
	}
	for pod, errs := range p.problems {
		r.problems.report(problemPods, pod, errors.Join(errs...))
	}
	r.reportSelectors(set, p.problems)
	return p.plan
}

// addressesOf counts the pods that run at each address.
func addressesOf(known []*knownPod) map[netip.Addr]int {
	said := make(map[netip.Addr]int)
	for _, k := range known {
		if len(k.namespaces) == 0 {
			continue
		}
		for _, a := range slices.Compact(slices.Clone(k.Now.Addresses)) {
			said[a]++
		}
	}
	return said
}

// reportSelectors tells of services that choose what cannot be protected so.
func (r *resources) reportSelectors(set *policy.Set, pods map[string][]error) {
	told, subjects := r.pods.isTold(), make(map[string]bool)
	for _, s := range set.Services() {
		if s.Spec.PodSelector == nil {
			continue
		}
		subjects[s.Name] = true
		var errs []error
		if !told {
			errs = append(errs, fmt.Errorf("%s %w", s.Name, errUntold))
		}
		if on := r.pods.hostNetwork(s.Spec.PodSelector); len(on) > 0 {
			errs = append(errs, fmt.Errorf("%s chooses %s on the network of the node: its ports are not protected by a podSelector; "+
				"protect them with target: Host", s.Name, strings.Join(on, ", ")))
		}
		r.problems.report(problemPods, s.Name, errors.Join(errs...))
	}
	r.problems.keep(problemPods, func(name string) bool {
		return slices.Contains(podsSubjects, name) || subjects[name] || pods[name] != nil
	})
}

// add finds the place of one pod, and what of it is whose.
func (p *podPlanner) add(k *knownPod) {
	name := k.Now.String()
	if err := k.doubt(); err != nil {
		p.problems[name] = append(p.problems[name], fmt.Errorf("pod %s %w", name, err))
		return
	}
	enforced, watched := p.claims(k)
	decide := func(into map[uint64]string) {
		for cookie := range k.namespaces {
			into[cookie] = name
		}
	}
	if len(enforced)+len(watched) == 0 {
		decide(p.plan.early)
		decide(p.plan.decided)
		return
	}
	if len(k.namespaces) == 0 {
		return // closed until it is there
	}
	place, err := p.place(k)
	if err != nil {
		if !errors.Is(err, errNoAddress) {
			p.problems[name] = append(p.problems[name], fmt.Errorf("pod %s: %w", name, err))
		}
		if len(enforced) == 0 {
			decide(p.plan.decided)
		}
		return
	}
	decide(p.plan.decided)
	p.share(name, place, enforced, true)
	p.share(name, place, slices.DeleteFunc(watched, func(s policy.ProtectedService) bool { return overlapsAny(s, enforced) }), false)
}

// claims lists the services that choose a pod: those that close it, and those that only watch.
func (p *podPlanner) claims(k *knownPod) (enforced, watched []policy.ProtectedService) {
	for _, s := range p.services {
		switch {
		case !k.isChosen(s.Spec.PodSelector):
		case s.Enforced():
			enforced = append(enforced, s)
		default:
			watched = append(watched, s)
		}
	}
	return enforced, watched
}

// share gives the pod to those services whose ports nobody else claims there. What several claim is nobody's: labels are not
// signed, and who may change them must not give a pod to a service that lets others in.
func (p *podPlanner) share(pod string, place datapath.Place, claims []policy.ProtectedService, enforced bool) {
	var contested []policy.ProtectedService
	for i, s := range claims {
		others := slices.Concat(claims[:i], claims[i+1:], p.listedAt(place))
		if overlapsAny(s, others) {
			contested = append(contested, s)
			continue
		}
		p.plan.places[s.Name] = append(p.plan.places[s.Name], place)
	}
	if len(contested) == 0 {
		return
	}
	names := make([]string, len(contested))
	for i, s := range contested {
		names[i] = s.Name
		if enforced {
			p.plan.contested = append(p.plan.contested, contestedRow(pod, place, s))
		}
	}
	p.problems[pod] = append(p.problems[pod], fmt.Errorf("pod %s: ports of %s are claimed by more than one service: nobody is let in there; "+
		"change a podSelector or the ports", pod, strings.Join(names, " and ")))
}

// listedAt are the services that list an address of the pod.
func (p *podPlanner) listedAt(place datapath.Place) (all []policy.ProtectedService) {
	for _, s := range p.services {
		if slices.ContainsFunc(s.Spec.Addresses, func(a netip.Addr) bool { return slices.Contains(place.Addresses, a) }) {
			all = append(all, s)
		}
	}
	return all
}

func overlapsAny(s policy.ProtectedService, others []policy.ProtectedService) bool {
	return slices.ContainsFunc(others, func(o policy.ProtectedService) bool {
		return o.Spec.Protocol == s.Spec.Protocol &&
			slices.ContainsFunc(s.Spec.Ports, func(port uint16) bool { return slices.Contains(o.Spec.Ports, port) })
	})
}

// contestedRow closes the ports that a service has at a pod, under a name that no service can have: no path is for it.
func contestedRow(pod string, place datapath.Place, s policy.ProtectedService) datapath.Service {
	row := rowOf(s)
	row.Name, row.Target, row.Selected, row.Pods = fmt.Sprintf("(%s of %s)", s.Name, pod), datapath.TargetPod, true, []datapath.Place{place}
	return row
}

// place finds where a pod is: the devices of the node that lead into its namespace, and those of its addresses that the node's routes
// send there. What the cluster says of addresses counts only so far: another's is nobody's to give.
func (p *podPlanner) place(k *knownPod) (place datapath.Place, err error) {
	if len(k.Now.Addresses) == 0 {
		return place, errNoAddress
	}
	ids := slices.Collect(maps.Values(k.namespaces))
	inside := make(map[int]netlink.Link)
	for _, l := range p.links {
		if a := l.Attrs(); a.NetNsID >= 0 && slices.Contains(ids, a.NetNsID) {
			inside[a.Index] = l
		}
	}
	for _, a := range k.Now.Addresses {
		device, err := p.leadsTo(a, inside)
		if err != nil {
			return place, err
		}
		if place.Ifindex != 0 && place.Ifindex != device {
			return place, fmt.Errorf("its addresses %v are behind different devices", k.Now.Addresses)
		}
		place.Ifindex = device
	}
	place.Addresses = slices.SortedFunc(slices.Values(k.Now.Addresses), netip.Addr.Compare)
	for index := range inside {
		if index != place.Ifindex {
			place.Besides = append(place.Besides, index)
		}
	}
	slices.Sort(place.Besides)
	return place, nil
}

// leadsTo gives the device among those of a pod that the node's route to an address ends at, or whose bridge it ends at.
func (p *podPlanner) leadsTo(a netip.Addr, inside map[int]netlink.Link) (int, error) {
	routes, err := netlink.RouteGet(a.AsSlice())
	if err != nil || len(routes) == 0 || routes[0].Type != unix.RTN_UNICAST {
		return 0, errors.Join(fmt.Errorf("no route of the node leads to its address %s", a), err)
	}
	out := routes[0].LinkIndex
	for index, l := range inside {
		if index != out && l.Attrs().MasterIndex != out {
			continue
		}
		at := toLink(l)
		if master := slices.IndexFunc(p.links, func(m netlink.Link) bool { return m.Attrs().Index == l.Attrs().MasterIndex }); master >= 0 {
			of := toLink(p.links[master])
			at.master = &of
		}
		if role, _ := p.classify.role(at); role != datapath.RolePod && role != datapath.RolePodPort {
			return 0, fmt.Errorf("its device %s is no pod device (devices.pods)", at.name)
		}
		if index != out {
			err = p.isBehind(index, out, a)
		}
		return index, err
	}
	return 0, fmt.Errorf("the node's route to its address %s ends at no device that leads into the pod", a)
}

// isBehind says what speaks against an address being behind this port of a bridge: the node's route leads to all of its ports alike.
func (p *podPlanner) isBehind(port, bridge int, a netip.Addr) error {
	if at := bridgePort(bridge, a); at != 0 && at != port {
		return fmt.Errorf("its address %s is behind another port of its bridge", a)
	}
	if p.said[a] > 1 {
		return fmt.Errorf("its address %s is said to be another pod's, too", a)
	}
	return nil
}
