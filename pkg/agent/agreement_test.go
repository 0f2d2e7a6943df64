package agent

import (
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

// fate of a first packet.
type fate string

const (
	passes   fate = "passes"
	atProxy  fate = "steered"
	unpassed fate = "refused"
)

// round is how many cases one set of resources gets.
const round = 500

// agreement is a node on which one case after another is asked of policy, of explain and of the kernel.
type agreement struct {
	*testbed
	datapath *datapath.Datapath
	rand     *rand.Rand
	ids      *serviceIDs
	programs map[string]*ebpf.Program
	devices  map[string]int
	pod      []netip.Addr
	clients  []netip.Addr
	text     string                    // of the set, for the failure's message
	live     map[pathKey][]uint16      // ports of the paths that policy allowed
	asked    map[fate]int              // by policy
	explain  int                       // cases in which explain could be asked
	overlaps int                       // cases steered to the node's service where a pod that is only watched has the port, too
	services []policy.ProtectedService // of the set
}

// pathKey is whom a path serves.
type pathKey struct {
	client  netip.Addr
	service string
}

func newAgreement(t *testing.T, cases int, seed uint64) *agreement {
	t.Helper()
	a := &agreement{testbed: newTestbed(t, 256), rand: rand.New(rand.NewPCG(seed, 5)), programs: map[string]*ebpf.Program{}, devices: map[string]int{}, asked: map[fate]int{}}
	a.config.MaxFlows, a.config.MaxLegs = uint32(max(cases, 4096)), uint32(max(cases, 4096)) // nothing is full, and so atProxy or dropped
	must(t, a.lab.Node.Do(func() (err error) {
		if a.datapath, err = datapath.Open(a.config); err != nil {
			return err
		}
		return a.datapath.AttachPx()
	}))
	t.Cleanup(func() { must(t, a.datapath.Close()) })
	for program, device := range map[string]string{"sp_dev_in": lab.Uplink, "sp_pod_out": lab.PodDevice(0)} {
		pins, err := filepath.Glob(filepath.Join(a.config.Dir, "*", "progs", "current", program))
		must(t, err)
		p, err := ebpf.LoadPinnedProgram(strings.Join(pins, ""), nil)
		must(t, err)
		t.Cleanup(func() { must(t, p.Close()) })
		a.programs[program] = p
		a.devices[program], err = a.lab.Node.Ifindex(device)
		must(t, err)
	}
	for _, f := range lab.Families() {
		a.pod = append(a.pod, a.lab.Pod.Addr(f))
		a.own = append(a.own, a.lab.Node.Addr(f), a.lab.Node.Other(f))
	}
	for i := range 40 {
		a.clients = append(a.clients, netip.MustParseAddr(fmt.Sprintf("10.1.0.%d", 100+i)), netip.MustParseAddr(fmt.Sprintf("fd00:1::%x", 0x100+i)))
	}
	a.ids = newServiceIDs(a.datapath.Services())
	a.drain()
	return a
}

// drain reads records as the agent does: without room for a record there is no bypass.
func (a *agreement) drain() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.datapath.ReadEvents(ctx, func(flow.Record) {}) }()
	a.t.Cleanup(func() {
		cancel()
		<-done
	})
}

func choice[T any](r *rand.Rand, list ...T) T { return list[r.IntN(len(list))] }

// some gives a part of a list, at least one of it.
func some[T any](r *rand.Rand, list []T) []T {
	out := slices.Clone(list)
	r.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out[:1+r.IntN(len(out))]
}

var (
	portsTCP = []uint16{1000, 1001, 1002, 1003}
	portsUDP = []uint16{1003, 1004, 1005}
)

func listed[T any](list []T) string {
	var texts []string
	for _, one := range list {
		texts = append(texts, fmt.Sprintf(`"%v"`, one))
	}
	return strings.Join(texts, ", ")
}

func portList(list []uint16) string {
	return strings.Trim(strings.ReplaceAll(fmt.Sprint(list), " ", ", "), "[]")
}

// resources are some services, of the node and of a pod, and some policies for them.
func (a *agreement) resources() string {
	const head = "apiVersion: sallyport.dev/v1alpha1\nkind: "
	r, text := a.rand, ""
	add := func(kind, name, spec string, args ...any) {
		text += fmt.Sprintf(head+"%s\nmetadata: {name: %s}\nspec: {%s}\n---\n", kind, name, fmt.Sprintf(spec, args...))
	}
	pod := a.pod // a pod is closed at all of its addresses
	names := []string{"host-tcp"}
	mode := func() string { return choice(r, "Enforce", "Enforce", "Enforce", "Shadow", "Observe") }
	// in a pod that is only watched: its addresses may be the node's, where a service of the node comes first if it is enforced
	inPod := func() (string, string) {
		m := mode()
		if m != "Enforce" && r.IntN(2) == 0 {
			return m, listed(slices.Concat(pod, some(r, a.own)))
		}
		return m, listed(pod)
	}
	add("ProtectedService", "host-tcp", "target: Host, mode: %s, udp: %s, ports: [%s]", mode(), choice(r, "Allow", "Deny", `""`), portList(some(r, portsTCP)))
	if r.IntN(2) == 0 {
		names = append(names, "host-udp")
		add("ProtectedService", "host-udp", "target: Host, mode: %s, protocol: UDP, ports: [%s]", mode(), portList(some(r, portsUDP)))
	}
	if r.IntN(2) == 0 {
		names = append(names, "pod-tcp")
		m, at := inPod()
		add("ProtectedService", "pod-tcp", "target: Pod, mode: %s, udp: %s, ports: [%s], addresses: [%s]", m, choice(r, "Allow", "Deny", `""`), portList(some(r, portsTCP)), at)
	}
	if r.IntN(2) == 0 {
		names = append(names, "pod-udp")
		m, at := inPod()
		add("ProtectedService", "pod-udp", "target: Pod, mode: %s, protocol: UDP, ports: [%s], addresses: [%s]", m, portList(some(r, portsUDP)), at)
	}
	for i := range 1 + r.IntN(3) {
		add("BypassPolicy", fmt.Sprintf("p%d", i), "services: [%s], bindings: [address], sources: [%s], maxDuration: %s, requesters: [alice], maxReach: %d",
			strings.Join(some(r, names), ", "), listed(some(r, []string{"10.1.0.0/25", "10.1.0.128/25", "10.1.0.100", "fd00:1::/64", "fd00:1::110/124"})),
			choice(r, "1m", "15m", "1h"), choice(r, 1, 3, 64))
	}
	if r.IntN(3) == 0 {
		add("DenyList", "d", "reason: r, addresses: [%s]", listed(some(r, a.clients)[:1]))
	}
	add("Keyring", "k", "version: 1, people: [{name: alice, keys: [{publicKey: %q}]}]", a.signer.key.Public())
	return strings.TrimSuffix(text, "---\n")
}

// next is another set in force, with paths for what its evaluator allows of some grants. policy test has to say the same.
func (a *agreement) next() *enforced {
	a.t.Helper()
	must(a.t, a.close())
	a.text, a.live = a.resources(), map[pathKey][]uint16{}
	set, err := policy.Parse("r.yaml", []byte(a.text))
	must(a.t, err)
	a.services = set.Services()
	maker := &resources{ids: a.ids, problems: newProblems(slog.New(slog.DiscardHandler)),
		locate: func(policy.ProtectedService) (place, error) { return place{device: a.devices["sp_pod_out"]}, nil }}
	e := &enforced{verified: set, set: set, handed: set, services: maker.compile(set, podPlan{})}
	e.generation, err = a.datapath.SetServices(e.services)
	must(a.t, err)
	must(a.t, a.datapath.Renew(time.Minute))
	var tests string
	for i := range 40 {
		tests += a.grant(e, i)
	}
	tested, err := policy.Parse("r.yaml", []byte(strings.Replace(a.text, "requesters: [alice], maxReach", "requesters: [alice], tests: ["+tests+"], maxReach", 1)))
	must(a.t, err)
	if err := tested.Test(); err != nil || tested.Tests() != 40 {
		a.t.Fatalf("policy test says otherwise than the evaluator: %v\n%s", err, a.text)
	}
	return e
}

// grant draws a grant, opens its paths where policy allows it, and writes it as a test of a policy.
func (a *agreement) grant(e *enforced, i int) string {
	a.t.Helper()
	service := choice(a.rand, a.services...)
	g := policy.GrantFacts{Service: service.Name, Addresses: some(a.rand, a.clients)[:1+a.rand.IntN(2)], Duration: choice(a.rand, time.Minute, 15*time.Minute, 2*time.Hour),
		Binding: policy.BindingAddress, Reason: "r", Requester: "alice", Signers: []policy.Signer{{Person: "alice"}}}
	if a.rand.IntN(2) == 0 {
		g.Ports = some(a.rand, service.Spec.Ports)
	}
	expect := policy.ExpectRefuse
	if e.set.Evaluate(g).Allowed {
		expect = policy.ExpectAllow
		a.open(e, g, i)
	}
	return fmt.Sprintf("{name: r, expect: %s, service: %s, requester: alice, addresses: [%s], ports: [%s], duration: %s}, ",
		expect, g.Service, listed(g.Addresses), portList(g.Ports), g.Duration)
}

// open opens the paths of a grant, unless one of its clients has a path to the service.
func (a *agreement) open(e *enforced, g policy.GrantFacts, i int) {
	a.t.Helper()
	row, _ := e.service(g.Service)
	ports := g.Ports
	if len(ports) == 0 {
		ports = row.Ports
	}
	for _, client := range g.Addresses {
		key := pathKey{client, g.Service}
		if a.live[key] != nil {
			continue
		}
		_, err := a.datapath.OpenPath(datapath.Path{Grant: fmt.Sprintf("01J8ZQ4X5M3T9V0Y2B7C6D%04d", i), Client: client, ServiceID: row.ID, Service: g.Service,
			Ports: ports, Deadline: datapath.BootTime() + g.Duration})
		must(a.t, err)
		a.live[key] = ports
	}
}

// close ends what the set before had opened.
func (a *agreement) close() error {
	paths, err := a.datapath.Paths()
	for _, p := range paths {
		if err == nil && p.State != datapath.PathFree {
			err = a.datapath.EndPath(p.Slot, datapath.PathRevoked)
		}
		if err == nil && p.State != datapath.PathFree {
			err = a.datapath.FreePath(p.Slot)
		}
	}
	return err
}

// drawn is one case: the first packet of a connection, or a datagram.
type drawn struct {
	client, server netip.AddrPort
	udp            bool
}

func (a *agreement) draw() drawn {
	r := a.rand
	client := choice(r, a.clients...)
	server := choice(r, slices.Concat(a.own, a.own, a.pod, a.pod, []netip.Addr{netip.MustParseAddr("10.1.0.77"), netip.MustParseAddr("fd00:1::77")})...)
	for server.Is4() != client.Is4() {
		client = choice(r, a.clients...)
	}
	d := drawn{client: netip.AddrPortFrom(client, uint16(1024+r.IntN(60000))), udp: r.IntN(3) == 0}
	d.server = netip.AddrPortFrom(server, choice(r, slices.Concat(portsTCP, portsUDP, []uint16{9})...))
	return d
}

// at is the service of that protocol at a place: a pod's by its addresses, the node's at its own.
func (a *agreement) at(target policy.Target, protocol string, server netip.AddrPort) (policy.ProtectedService, bool) {
	for _, s := range a.services {
		here := slices.Contains(s.Spec.Addresses, server.Addr()) || target == policy.TargetHost && slices.Contains(a.own, server.Addr())
		if here && s.Spec.Target == target && s.Spec.Protocol == protocol && slices.Contains(s.Spec.Ports, server.Port()) {
			return s, true
		}
	}
	return policy.ProtectedService{}, false
}

// byPolicy is what the resources and the grants that policy test allows say of the case, in so many words, and which service
// decides it.
func (a *agreement) byPolicy(d drawn) (f fate, service string) {
	protocol, otherwise := policy.ProtocolTCP, atProxy
	if d.udp {
		protocol, otherwise = policy.ProtocolUDP, unpassed
	}
	for _, target := range []policy.Target{policy.TargetPod, policy.TargetHost} {
		service, ok := a.at(target, protocol, d.server)
		tcp, beside := a.at(target, policy.ProtocolTCP, d.server)
		switch {
		case !ok && d.udp && beside && tcp.Enforced() && tcp.Spec.UDP != policy.UDPAllow:
			return unpassed, tcp.Name
		case !ok || !service.Enforced():
		case slices.Contains(a.live[pathKey{d.client.Addr(), service.Name}], d.server.Port()):
			return passes, service.Name
		default:
			return otherwise, service.Name
		}
	}
	return passes, ""
}

// byExplain asks explain, which knows of one service at each place; asked is false where that is one of another protocol.
func (a *agreement) byExplain(d drawn, e *enforced, paths []datapath.PathStatus) (f fate, asked bool) {
	service, ok := serviceAt(e.set, d.server, isOwn(d.server.Addr(), a.own))
	if ok && (service.Spec.Protocol == policy.ProtocolUDP) != d.udp {
		return "", false
	}
	r := decide(question{client: d.client.Addr(), server: d.server}, e, a.own, paths)
	switch r.Verdict {
	case flow.VerdictNone.String(), flow.VerdictBypassed.String():
		return passes, true
	case flow.VerdictProxied.String():
		return atProxy, true
	}
	return unpassed, true
}

// byKernel runs the program that sees the packet first.
func (a *agreement) byKernel(d drawn) (fate, error) {
	program := "sp_dev_in"
	if slices.Contains(a.pod, d.server.Addr()) {
		program = "sp_pod_out"
	}
	p := packet.Packet{SrcMAC: [6]byte{2, 0, 0, 0, 0, 1}, DstMAC: [6]byte{2, 0, 0, 0, 0, 2}, Src: d.client, Dst: d.server, Flags: packet.SYN, Seq: 1000, Window: 65535}
	if d.udp {
		p.Protocol, p.Flags, p.Payload = packet.UDP, 0, []byte("a question")
	}
	var skb [192]byte // struct __sk_buff
	binary.NativeEndian.PutUint32(skb[40:], uint32(a.devices[program]))
	verdict, err := a.programs[program].Run(&ebpf.RunOptions{Data: p.Bytes(), Context: skb})
	const next, redirect = -1, 7
	switch {
	case err != nil:
		return "", err
	case int32(verdict) == next:
		return passes, nil
	case verdict == redirect && !d.udp:
		return atProxy, nil
	}
	return unpassed, nil
}

// TestPolicyExplainAndKernelAgree: policy test, explain and the kernel's table say the same of every case. AGREE_CASES says how
// many cases, AGREE_SEED which.
func TestPolicyExplainAndKernelAgree(t *testing.T) {
	cases, seed := 20000, uint64(1)
	for name, into := range map[string]func(uint64){"AGREE_CASES": func(n uint64) { cases = int(n) }, "AGREE_SEED": func(n uint64) { seed = n }} {
		if text := os.Getenv(name); text != "" {
			n, err := strconv.ParseUint(text, 10, 32)
			must(t, err)
			into(n)
		}
	}
	a := newAgreement(t, cases, seed)
	must(t, a.lab.Node.Do(func() error {
		for done := 0; done < cases; done += round {
			e := a.next()
			paths, err := a.datapath.Paths()
			if err != nil {
				return err
			}
			for i := range min(round, cases-done) {
				if err := a.agree(e, paths, done+i); err != nil {
					return err
				}
			}
		}
		return nil
	}))
	t.Logf("%d cases, explain asked in %d, %d at two services: %v", cases, a.explain, a.overlaps, a.asked)
	if a.overlaps == 0 {
		t.Error("nothing was steered where a watched service has the port, too")
	}
	for _, f := range []fate{passes, atProxy, unpassed} {
		if a.asked[f] < cases/50 {
			t.Errorf("only %d cases %s: that shows little", a.asked[f], f)
		}
	}
}

// agree asks all three about one case.
func (a *agreement) agree(e *enforced, paths []datapath.PathStatus, index int) error {
	d := a.draw()
	want, by := a.byPolicy(d)
	if at, _ := e.set.ServiceAt(policy.ProtocolTCP, d.server); want == atProxy {
		if at.Name != by {
			return fmt.Errorf("case %d: what is steered to %v is for %s, and the proxy takes it for %s\n%s", index, d.server, by, at.Name, a.text)
		}
		if _, watched := a.at(policy.TargetPod, policy.ProtocolTCP, d.server); watched && slices.Contains(a.own, d.server.Addr()) {
			a.overlaps++
		}
	}
	a.asked[want]++
	said, asked := a.byExplain(d, e, paths)
	if asked {
		a.explain++
	} else {
		said = want
	}
	got, err := a.byKernel(d)
	if err != nil || got != want || said != want {
		return fmt.Errorf("case %d: %v to %v, UDP %v: policy %s, explain %s, kernel %s %w\n%s", index, d.client, d.server, d.udp, want, said, got, err, a.text)
	}
	return nil
}
