package agent

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// probed is a service of the lab's pod; probes is what it lists, or nothing.
func probed(in *installed, probes string) string {
	return fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: db}
spec: {target: Pod, ports: [5432, 5433], addresses: [%s, "%s"]%s}
`, in.lab.Pod.Addr(lab.IPv4), in.lab.Pod.Addr(lab.IPv6), probes)
}

const listedProbes = ", probes: {ports: [5432], cgroup: /kubelet}"

// openProbes lists the open paths, which are all of probes.
func (in *installed) openProbes() (open []*api.Path) {
	in.t.Helper()
	reply, err := in.agent().Paths(in.t.Context(), &api.PathsRequest{})
	must(in.t, err)
	for _, p := range reply.Paths {
		if p.State == "active" {
			open = append(open, p)
		}
	}
	return open
}

// TestProbesOfKubelet: what a service lists as kubelet's control group reaches the pod at the listed port, by both families, and nobody else
// does: not a process of the node beside it, nor one in a group below it, nor one elsewhere in its group; and it as little at other
// ports. A group that is made anew is another one, and without one the service is closed to probes and status says so.
func TestProbesOfKubelet(t *testing.T) {
	in := install(t)
	a := &automated{installed: in}
	at := map[lab.Family][2]netip.AddrPort{}
	for _, f := range lab.Families() {
		var both [2]netip.AddrPort
		for i, port := range []uint16{5432, 5433} {
			s, err := in.lab.Pod.WhoAnswers(netip.AddrPortFrom(in.lab.Pod.Addr(f), port))
			must(t, err)
			both[i] = s.Addr
		}
		at[f] = both
	}
	in.resources(probed(in, listedProbes))
	agent := in.ready("run")
	told := func(part string) func() bool {
		return func() bool { return contains(strings.Join(in.status().Problems, "\n"), part) }
	}
	in.eventually("a missing group is a problem", told("kubelet db: db: there is no control group /kubelet on this node"))
	if !told("write into spec.probes.cgroup")() || len(in.openProbes()) != 0 {
		t.Errorf("%v, open %v", in.status().Problems, in.openProbes())
	}
	kubelet, err := in.lab.NewGroup("kubelet")
	must(t, err)
	in.eventually("probes are open", func() bool { return len(in.openProbes()) == 2 })
	in.eventually("no problem", func() bool { return !told("kubelet db")() })
	below, err := in.lab.NewGroup("kubelet/below")
	must(t, err)
	other, err := in.lab.NewGroup("kubelet-2")
	must(t, err)
	closed := func(when string, g *lab.Group, ns *lab.Namespace, to netip.AddrPort) {
		t.Helper()
		if a.groupReaches(g, ns, netip.AddrPort{}, to) {
			t.Errorf("%s: reached %v", when, to)
		}
	}
	for f, to := range at {
		if !a.groupReaches(kubelet, in.lab.Node, netip.AddrPort{}, to[0]) {
			t.Errorf("%v: the probe does not reach it", f)
		}
		closed("kubelet, at a port that is not listed", kubelet, in.lab.Node, to[1])
		closed("a group below", below, in.lab.Node, to[0])
		closed("another group", other, in.lab.Node, to[0])
		closed("in kubelet's group, and on another network", kubelet, in.lab.Client, to[0])
		if a.reaches(in.lab.Node, netip.AddrPort{}, to[0]) {
			t.Errorf("%v: a process of the node reached it", f)
		}
	}
	flows := func(reason string) (n int) {
		for _, r := range in.flows() {
			if r.Reason == reason && r.Event == "OPEN" && r.Service == "db" {
				n++
			}
		}
		return n
	}
	in.eventually("records of probes", func() bool { return flows("PROBE") == 2 })
	if flows("PATH_OPEN") != 0 {
		t.Error("probes are told of as grants")
	}
	grants, err := in.agent().Grants(t.Context(), &api.GrantsRequest{})
	must(t, err)
	if len(grants.Grants) != 1 || grants.Grants[0].Kind != string(grant.Probe) || grants.Grants[0].Reason != "probes of /kubelet" {
		t.Errorf("grants: %v", grants)
	}

	t.Run("another agent", func(t *testing.T) {
		before := in.openProbes()[0].Grant
		must(t, agent.Kill())
		agent = in.ready("run")
		for f, to := range at {
			if !a.groupReaches(kubelet, in.lab.Node, netip.AddrPort{}, to[0]) {
				t.Errorf("%v: the probe does not reach it", f)
			}
		}
		if open := in.openProbes(); len(open) != 2 || open[0].Grant != before {
			t.Errorf("before %s, open %v", before, open)
		}
	})
	t.Run("group made anew", func(t *testing.T) {
		before := in.openProbes()[0].Grant
		must(t, os.Remove(below.Dir))
		must(t, os.Remove(kubelet.Dir))
		in.eventually("nobody is there", func() bool { return len(in.openProbes()) == 0 && told("kubelet db")() })
		kubelet, err = in.lab.NewGroup("kubelet")
		must(t, err)
		in.eventually("probes are open", func() bool { return len(in.openProbes()) == 2 })
		if open := in.openProbes(); open[0].Grant == before {
			t.Errorf("the paths of the group that is gone are open: %v", open)
		}
		for f, to := range at {
			if !a.groupReaches(kubelet, in.lab.Node, netip.AddrPort{}, to[0]) {
				t.Errorf("%v: the probe does not reach it", f)
			}
		}
	})
	t.Run("not listed", func(t *testing.T) {
		in.resources(probed(in, ""))
		in.eventually("probes are closed", func() bool { return len(in.openProbes()) == 0 })
		closed("not listed", kubelet, in.lab.Node, at[lab.IPv4][0])
		in.resources(probed(in, listedProbes))
		in.eventually("probes are open", func() bool { return len(in.openProbes()) == 2 })
		in.resources(probed(in, ", mode: Shadow"+listedProbes))
		in.eventually("nothing is to be opened", func() bool { return len(in.openProbes()) == 0 })
	})
	must(t, agent.Stop(10*time.Second))
	in.uninstall()
}

// flows are the records that the agent has.
func (in *installed) flows() (all []*api.FlowRecord) {
	in.t.Helper()
	stream, err := in.agent().Flows(in.t.Context(), &api.AgentFlowsRequest{Limit: 50})
	must(in.t, err)
	for {
		rec, err := stream.Recv()
		if err != nil {
			return all
		}
		all = append(all, rec)
	}
}

// TestProbesFollowEachOther: paths of probes are followed by others before they end, which take what is new and leave them what they have;
// no deadline is moved. What changes ends them, and a kill between steps leaves nothing that is not recorded.
func TestProbesFollowEachOther(t *testing.T) {
	b := newTestbed(t, 16)
	set := strings.Replace(dbSelector, "ports: [5432]", "ports: [5432], probes: {ports: [5432], cgroup: /kubelet}", 1)
	var err error
	b.set, err = policy.Parse("test.yaml", []byte(set))
	must(t, err)
	l := b.begin()
	must(t, l.adopt(t.Context()))
	want := func() grant.Payload {
		now := l.grants.clock.wall().UTC()
		return grant.Payload{Kind: grant.Probe, Requester: probeRequester, Service: "db", Binding: policy.BindingWorkload, Cgroup: 77, Ports: []uint16{5432},
			Addresses: []netip.Addr{clientA, clientB}, NotBefore: now, NotAfter: now.Add(time.Hour), Duration: time.Hour, Reason: "probes", Audience: testNode}
	}
	open := func() (ids []string, deadlines map[string]time.Duration) {
		t.Helper()
		l.recorded()
		paths, err := l.datapath.Paths()
		must(t, err)
		deadlines = map[string]time.Duration{}
		for _, p := range paths {
			if isOpen(p) {
				deadlines[p.Grant] = p.Deadline
				ids = append(ids, p.Grant)
			}
		}
		slices.Sort(ids)
		return slices.Compact(ids), deadlines
	}
	for range 2 {
		must(t, l.keepProbes(t.Context(), want()))
	}
	first, deadlines := open()
	if len(first) != 1 {
		t.Fatalf("open: %v", first)
	}
	b.clock.wall, b.clock.boot = 31*time.Minute, 31*time.Minute
	for range 2 {
		must(t, l.keepProbes(t.Context(), want()))
	}
	both, after := open()
	if len(both) != 2 || after[first[0]] != deadlines[first[0]] || after[both[1]]-after[first[0]] < 30*time.Minute {
		t.Errorf("open %v, deadlines %v after %v", both, after, deadlines)
	}
	if _, err := l.tick(t.Context()); err != nil {
		t.Error(err)
	}
	l.kill()
	l = b.begin()
	must(t, l.adopt(t.Context()))
	if again, _ := open(); !slices.Equal(again, both) || !l.probing.has(both[0]) || !l.probing.has(both[1]) {
		t.Errorf("after a restart %v, before %v", again, both)
	}
	other := want()
	other.Cgroup = 78
	must(t, l.keepProbes(t.Context(), other))
	if now, _ := open(); len(now) != 1 || slices.Contains(both, now[0]) {
		t.Errorf("with another group %v, before %v", now, both)
	}
	envelope, err := grant.Sign(t.Context(), want(), l.signer.key)
	if err == nil {
		_, err = l.Activate(t.Context(), envelope, "uid:0")
	}
	if err == nil || !contains(err.Error(), "kind") {
		t.Errorf("somebody signed one: %v", err)
	}
	must(t, l.endProbes(t.Context(), "db", "over"))
	if now, _ := open(); len(now) != 0 {
		t.Errorf("ended, and open: %v", now)
	}
	l.kill()
}
