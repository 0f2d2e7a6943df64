package agent

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// cluster of a test: a lab whose pods have processes in control groups as kubelet names them, and a node's resources.
type podLab struct {
	*directory
	lab     *lab.Lab
	decided map[uint64]string
	writes  []string // what was written, in its order
	runs    []*lab.Process
}

func newPodLab(t *testing.T, selectors string) *podLab {
	t.Helper()
	c := &podLab{directory: newDirectory(t), lab: lab.New(t, lab.Options{Pods: 1})}
	if c.lab.Cgroup() == "" {
		t.Skip("this kernel has no control groups of version 2")
	}
	c.pods = newPods(newCgroups(c.lab.Cgroup()), filepath.Join(t.TempDir(), "pods.json"), false)
	c.classify = classifier{pods: []string{"vethpods*"}, px0: func() int { return -1 }}
	c.moved = make(chan struct{}, 1)
	apply := c.apply
	c.apply = func(s []datapath.Service) (uint32, error) {
		c.writes = append(c.writes, "table")
		return apply(s)
	}
	c.decide = func(pods map[uint64]string) error {
		c.decided = pods
		c.writes = append(c.writes, fmt.Sprint("decided ", len(pods)))
		return nil
	}
	t.Cleanup(c.stop)
	c.write("a.yaml", selectors)
	return c
}

func (c *podLab) stop() {
	for _, p := range c.runs {
		_ = p.Kill() // it may have ended
	}
	c.runs = nil
}

// start has the node begin a pod: its namespace, its device, and a process in a container's control group.
func (c *podLab) start(number int) (uid string, pod *lab.Namespace) {
	c.t.Helper()
	pod, err := c.lab.StartPod(number, nil)
	must(c.t, err)
	uid = fmt.Sprintf("%08d-0000-4000-8000-000000000000", number)
	c.contain(uid, "ab", pod)
	return uid, pod
}

// contain has a process run in a container of the pod, in some namespace.
func (c *podLab) contain(uid, container string, in *lab.Namespace) {
	c.t.Helper()
	dir := "kubepods"
	for _, name := range []string{"", "pod" + uid, strings.Repeat(container, 32)} {
		dir = filepath.Join(dir, name)
		if _, err := os.Stat(filepath.Join(c.lab.Cgroup(), dir)); err == nil {
			continue
		}
		g, err := c.lab.NewGroup(dir)
		must(c.t, err)
		if len(name) == 64 {
			run, err := g.Start(in, exec.Command("sleep", "600"))
			must(c.t, err)
			c.runs = append(c.runs, run)
		}
	}
}

// look has the node look at the pods, where it is.
func (c *podLab) look(facts ...policy.Pod) {
	c.t.Helper()
	must(c.t, c.pods.Set(facts))
	must(c.t, c.lab.Node.Do(func() error {
		if c.current() == nil {
			return c.load()
		}
		c.settle()
		return nil
	}))
}

// row is a service's in the table.
func (c *podLab) row(name string) datapath.Service {
	c.t.Helper()
	row, _ := c.current().service(name)
	return row
}

func (c *podLab) says(parts ...string) {
	c.t.Helper()
	if told := strings.Join(c.problems.lines(), "\n"); len(parts) == 0 && told != "" || !contains(told, parts...) {
		c.t.Errorf("problems %q, want %q", told, parts)
	}
}

// names are the pods that are decided.
func (c *podLab) names() (all []string) {
	for _, name := range c.decided {
		all = append(all, name)
	}
	slices.Sort(all)
	return all
}

const dbSelector = `apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: db}
spec: {target: Pod, ports: [5432], podSelector: {namespace: shop, matchLabels: {app: db}}}
`

func facts(uid, name string, labels map[string]string, at ...netip.Addr) policy.Pod {
	slices.SortFunc(at, netip.Addr.Compare)
	return policy.Pod{UID: uid, Namespace: "shop", Name: name, Labels: labels, Addresses: at}
}

// TestPodsAreFollowed: a service is at the pods that it chooses, by what their processes are in and the node's routes say; a pod is decided
// when its rows are there, and not before.
func TestPodsAreFollowed(t *testing.T) {
	t.Parallel()
	c := newPodLab(t, dbSelector)
	isDB, isWeb := map[string]string{"app": "db"}, map[string]string{"app": "web"}
	c.look()
	if row := c.row("db"); !row.Selected || len(row.Pods) != 0 || row.Target != datapath.TargetPod {
		t.Errorf("without pods: %+v", row)
	}
	u1, first := c.start(1)
	u2, second := c.start(2)
	device := func(n int) int {
		t.Helper()
		index, err := c.lab.Node.Ifindex(lab.StartedDevice(n))
		must(t, err)
		return index
	}
	a4, a6, b4 := first.Addr(lab.IPv4), first.Addr(lab.IPv6), second.Addr(lab.IPv4)

	c.look(facts(u1, "db-0", isDB), facts(u2, "web-0", isWeb))
	if got := c.names(); !slices.Equal(got, []string{"shop/web-0"}) || len(c.row("db").Pods) != 0 {
		t.Errorf("before the cluster tells of addresses %v are decided, %+v", got, c.row("db"))
	}
	c.says()

	c.writes = nil
	c.look(facts(u1, "db-0", isDB, a4, a6), facts(u2, "web-0", isWeb, b4))
	want := datapath.Place{Addresses: []netip.Addr{a4, a6}, Ifindex: device(1)}
	if got := c.row("db").Pods; len(got) != 1 || !got[0].Same(want) {
		t.Errorf("the service is at %+v, want %+v", got, want)
	}
	if got := c.names(); !slices.Equal(got, []string{"shop/db-0", "shop/web-0"}) || !slices.Equal(c.writes, []string{"table", "decided 2"}) {
		t.Errorf("decided are %v, written was %v", got, c.writes)
	}
	if s, ok := c.current().handed.PodServiceAt(policy.ProtocolTCP, netip.AddrPortFrom(a6, 5432)); !ok || s.Name != "db" {
		t.Errorf("the proxy is told of %+v", s)
	}

	// It gets a label, and loses it; the other one stands still.
	c.look(facts(u1, "db-0", isDB, a4, a6), facts(u2, "web-0", isDB, b4))
	if got := c.row("db").Pods; len(got) != 2 || got[1].Ifindex != device(2) || !got[0].Same(want) {
		t.Errorf("two pods: %+v", got)
	}
	c.look(facts(u1, "db-0", isDB, a4, a6), facts(u2, "web-0", isWeb, b4))
	if got := c.row("db").Pods; len(got) != 1 || !got[0].Same(want) || len(c.decided) != 2 {
		t.Errorf("one pod again: %+v", got)
	}

	// Who has the API server's word says that the pod is at another's address: neither is given.
	c.look(facts(u1, "db-0", isDB, b4), facts(u2, "web-0", isWeb, b4))
	c.says("pod shop/db-0", "leads into the pod")
	if got := c.names(); !slices.Equal(got, []string{"shop/web-0"}) || len(c.row("db").Pods) != 0 {
		t.Errorf("with another's address: decided %v, %+v", got, c.row("db"))
	}
	c.look(facts(u1, "db-0", isDB, c.lab.Node.Addr(lab.IPv4)), facts(u2, "web-0", isWeb, b4))
	c.says("pod shop/db-0", "no route of the node leads to its address")

	// The cluster forgets a pod that still runs: it is closed.
	c.look(facts(u1, "db-0", isDB, a4, a6))
	if got := c.names(); !slices.Equal(got, []string{"shop/db-0"}) {
		t.Errorf("a pod that the cluster has forgotten: decided %v", got)
	}
	c.says()
}

// TestPodsOutliveTheCluster: without the API server the next agent goes by what it said last, of the pods that are still there.
func TestPodsOutliveTheCluster(t *testing.T) {
	t.Parallel()
	c := newPodLab(t, dbSelector)
	uid, pod := c.start(1)
	c.look(facts(uid, "db-0", map[string]string{"app": "db"}, pod.Addr(lab.IPv4)), facts("ffffffff-0000-4000-8000-000000000000", "gone", nil))
	before := c.row("db").Pods
	next := newPods(newCgroups(c.lab.Cgroup()), c.pods.file, false)
	must(t, next.load())
	c.pods, c.before = next, nil
	must(t, c.lab.Node.Do(func() error { c.settle(); return nil }))
	if got := c.row("db").Pods; len(got) != 1 || !got[0].Same(before[0]) || !slices.Equal(c.names(), []string{"shop/db-0"}) {
		t.Errorf("after a restart at %+v, before at %+v; decided %v", got, before, c.names())
	}
}

// TestLabelsOpenNothing: where sets are signed, a pod stays with the service that has chosen it; and what two services claim is given
// to neither.
func TestLabelsOpenNothing(t *testing.T) {
	t.Parallel()
	c := newPodLab(t, dbSelector+"---\n"+strings.NewReplacer("{name: db}", "{name: all}", "{app: db}", "{all: yes-all}").Replace(dbSelector))
	c.pods.sticky = true
	uid, pod := c.start(1)
	at := pod.Addr(lab.IPv4)
	c.look(facts(uid, "db-0", map[string]string{"app": "db"}, at))
	if len(c.row("db").Pods) != 1 {
		t.Fatalf("%+v", c.row("db"))
	}
	c.look(facts(uid, "db-0", map[string]string{"app": "none"}, at))
	if len(c.row("db").Pods) != 1 {
		t.Errorf("relabelled: %+v", c.row("db"))
	}
	c.look(facts(uid, "db-0", map[string]string{"all": "yes-all"}, at))
	c.says("ports of", "all and db", "more than one service")
	for _, name := range []string{"db", "all"} {
		if row := c.row(name); len(row.Pods) != 0 {
			t.Errorf("claimed by two: %+v", row)
		}
	}
	closed := c.row("(db of shop/db-0)")
	if len(closed.Pods) != 1 || closed.Pods[0].Addresses[0] != at || closed.Mode != datapath.Enforce || len(c.decided) != 1 {
		t.Errorf("claimed by two: the row that closes it is %+v", closed)
	}
	if _, ok := c.current().handed.PodServiceAt(policy.ProtocolTCP, netip.AddrPortFrom(at, 5432)); ok {
		t.Error("the proxy is told of a service there")
	}
	c.pods.sticky = false
	c.look(facts(uid, "db-0", nil, at), policy.Pod{UID: "x", Namespace: "shop", Name: "hosty", Labels: map[string]string{"app": "db"}, HostNetwork: true})
	c.says("db chooses shop/hosty", "target: Host")
}

// TestClaimsOfAPod: a service that lists an address claims it as one does that chooses the pod; one that only watches claims nothing that
// another one closes; and the same port of another protocol is nobody else's.
func TestClaimsOfAPod(t *testing.T) {
	t.Parallel()
	named := func(name, more string) string {
		return "---\n" + strings.NewReplacer("{name: db}", "{name: "+name+"}", "target: Pod,", "target: Pod, "+more).Replace(dbSelector)
	}
	c := newPodLab(t, dbSelector+named("seen", "mode: Observe,")+named("datagrams", "protocol: UDP,"))
	uid, pod := c.start(1)
	at := pod.Addr(lab.IPv4)
	db := facts(uid, "db-0", map[string]string{"app": "db"}, at)
	c.look(db)
	c.says()
	if len(c.row("db").Pods) != 1 || len(c.row("seen").Pods) != 0 || len(c.row("datagrams").Pods) != 1 {
		t.Errorf("db %+v, seen %+v, datagrams %+v", c.row("db").Pods, c.row("seen").Pods, c.row("datagrams").Pods)
	}
	c.write("b.yaml", fmt.Sprintf("apiVersion: sallyport.dev/v1alpha1\nkind: ProtectedService\nmetadata: {name: listed}\nspec: {target: Pod, ports: [5432], addresses: [%s]}\n", at))
	must(t, c.lab.Node.Do(c.load))
	c.says("ports of db are claimed by more than one service")
	if len(c.row("db").Pods) != 0 || len(c.row("(db of shop/db-0)").Pods) != 1 {
		t.Errorf("db %+v, closed %+v", c.row("db").Pods, c.row("(db of shop/db-0)").Pods)
	}
}

// TestPodsThatCannotBePlaced stay closed, and it is said why: without a cluster, behind a device that is none of a pod, in two places.
func TestPodsThatCannotBePlaced(t *testing.T) {
	t.Parallel()
	c := newPodLab(t, dbSelector)
	must(t, c.lab.Node.Do(c.load))
	c.says("db chooses pods, and no cluster tells of any")
	uid, first := c.start(1)
	_, second := c.start(2)
	a, b := first.Addr(lab.IPv4), second.Addr(lab.IPv4)
	isDB := map[string]string{"app": "db"}
	closed := func(why string) {
		t.Helper()
		c.says("pod shop/db-0: ", why)
		if len(c.decided) != 0 || len(c.row("db").Pods) != 0 {
			t.Errorf("decided %v, %+v", c.decided, c.row("db").Pods)
		}
	}
	pods := c.classify.pods
	c.classify.pods = nil
	c.look(facts(uid, "db-0", isDB, a))
	closed("is no pod device (devices.pods)")
	c.classify.pods = pods
	c.contain(uid, "cd", second) // a container elsewhere
	c.look(facts(uid, "db-0", isDB, a, b))
	closed("are behind different devices")
	c.look(facts(uid, "db-0", isDB, a))
	if got := c.row("db").Pods; len(got) != 1 || len(got[0].Besides) != 1 || len(c.decided) != 2 {
		t.Errorf("at one of two devices: %+v, decided %v", got, c.decided)
	}
	c.says()
	c.contain(uid, "ef", c.lab.Node) // as a container is before it is moved
	c.look(facts(uid, "db-0", isDB, a))
	if len(c.decided) != 2 {
		t.Errorf("with a process on the node's own network: decided %v", c.decided)
	}
}

// TestWhatAPodWasCounts: where sets are signed, nothing that is said of a pod that runs lets it go: that it is gone and there again, in another
// namespace, under another account, or of so many kinds that it cannot be kept.
func TestWhatAPodWasCounts(t *testing.T) {
	t.Parallel()
	c := newPodLab(t, strings.Replace(dbSelector, "namespace: shop", "namespace: shop, serviceAccount: db", 1))
	c.pods.sticky = true
	uid, pod := c.start(1)
	is := func(account, namespace, app string) policy.Pod {
		p := facts(uid, "db-0", map[string]string{"app": app}, pod.Addr(lab.IPv4))
		p.ServiceAccount, p.Namespace = account, namespace
		return p
	}
	chosen := func(after string) {
		t.Helper()
		if len(c.row("db").Pods) != 1 || len(c.decided) != 1 {
			t.Errorf("%s: at %+v, decided %v", after, c.row("db").Pods, c.decided)
		}
	}
	for _, next := range []policy.Pod{is("web", "shop", "db"), is("db", "shops", "db"), is("db", "shop", "web")} {
		anew := newPods(c.pods.groups, c.pods.file, true)
		anew.changed, c.pods = c.pods.changed, anew
		c.look(is("db", "shop", "db"))
		chosen("in the beginning")
		c.look(next)
		chosen(fmt.Sprintf("as %+v", next))
	}
	c.look(is("db", "shop", "db"))
	c.look()
	if len(c.decided) != 0 {
		t.Errorf("said to be gone, and decided: %v", c.decided)
	}
	next := newPods(c.pods.groups, c.pods.file, true)
	must(t, next.load())
	next.changed, c.pods = c.pods.changed, next
	c.look(is("db", "shop", "web"))
	chosen("gone, and there again with other labels, over a restart")
	c.look(is("db", "shops", "db"))
	chosen("another namespace")
	for i := range 4 * keptLabels {
		c.look(is("db", "shop", []string{"db", "web"}[i%2]))
	}
	chosen("labels to and fro")
	c.says()
	for i := range 2 * keptLabels {
		c.look(is("db", "shop", fmt.Sprint(i)))
	}
	c.says("pod shop/db-0", "states of labels")
	if len(c.decided) != 0 {
		t.Errorf("with more than is kept: decided %v", c.decided)
	}
	c.stop()
}

// TestPodIsToldOfTwice: whoever can have another pod carry a pod's UID does not say what it is.
func TestPodIsToldOfTwice(t *testing.T) {
	t.Parallel()
	c := newPodLab(t, dbSelector)
	uid, pod := c.start(1)
	isDB := map[string]string{"app": "db"}
	own := facts(uid, "db-0", isDB, pod.Addr(lab.IPv4))
	other := policy.Pod{UID: uid, Namespace: "evil", Name: "db-0", Labels: isDB}
	c.look(own)
	for _, both := range [][]policy.Pod{{own, other}, {other, own}} {
		c.look(both...)
		if len(c.decided) != 0 || len(c.row("db").Pods) != 0 {
			t.Errorf("told of twice: decided %v, %+v", c.decided, c.row("db").Pods)
		}
		c.says("db-0", "told of twice")
		c.look(own)
		if len(c.decided) != 1 || len(c.row("db").Pods) != 1 {
			t.Errorf("told of once again: decided %v, %+v", c.decided, c.row("db").Pods)
		}
	}
	c.says()
}

// TestPodsOfOneBridge: a route to a bridge leads to all that is behind it. An address that two pods are said to have is nobody's, so that
// a service that lets more in does not stand for another one's pod.
func TestPodsOfOneBridge(t *testing.T) {
	t.Parallel()
	c := newPodLab(t, dbSelector+"---\n"+strings.NewReplacer("{name: db}", "{name: web}", "{app: db}", "{app: web}").Replace(dbSelector))
	isDB, isWeb := map[string]string{"app": "db"}, map[string]string{"app": "web"}
	u1, first := c.start(1)
	u2, second := c.start(2)
	a, b := first.Addr(lab.IPv4), second.Addr(lab.IPv4)
	must(t, c.lab.Node.Do(func() error {
		bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "cni0"}}
		errs := []error{netlink.LinkAdd(bridge), netlink.LinkSetUp(bridge)}
		for n, at := range map[int]netip.Addr{1: a, 2: b} {
			device, err := netlink.LinkByName(lab.StartedDevice(n))
			if err != nil {
				return err
			}
			errs = append(errs, netlink.LinkSetMaster(device, bridge), netlink.RouteReplace(&netlink.Route{LinkIndex: bridge.Index,
				Dst: &net.IPNet{IP: at.AsSlice(), Mask: net.CIDRMask(32, 32)}, Scope: netlink.SCOPE_LINK}))
		}
		return errors.Join(errs...)
	}))
	c.look(facts(u1, "db-0", isDB, a), facts(u2, "web-0", isWeb, b))
	if len(c.row("db").Pods) != 1 || len(c.row("web").Pods) != 1 || len(c.decided) != 2 {
		t.Fatalf("each where it is: %+v, %+v, decided %v", c.row("db").Pods, c.row("web").Pods, c.decided)
	}
	c.look(facts(u1, "db-0", isDB, a), facts(u2, "web-0", isWeb, a))
	c.says("said to be another pod's")
	if len(c.row("db").Pods) != 0 || len(c.row("web").Pods) != 0 || len(c.decided) != 0 {
		t.Errorf("both at one address: %+v, %+v, decided %v", c.row("db").Pods, c.row("web").Pods, c.decided)
	}
	// The kernel knows whose it is.
	must(t, c.lab.Node.Do(func() error { return knownBehind("cni0", lab.StartedDevice(1), a) }))
	c.look(facts(u1, "db-0", isDB), facts(u2, "web-0", isWeb, a))
	c.says("pod shop/web-0", "behind another port")
	c.look(facts(u1, "db-0", isDB, a), facts(u2, "web-0", isWeb, b))
	c.says()
}

// knownBehind has the kernel know that an address is behind a port of a bridge, as after a packet from there.
func knownBehind(bridge, port string, a netip.Addr) error {
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 1}
	master, err := netlink.LinkByName(bridge)
	if err != nil {
		return err
	}
	device, err := netlink.LinkByName(port)
	if err != nil {
		return err
	}
	return errors.Join(
		netlink.NeighSet(&netlink.Neigh{LinkIndex: master.Attrs().Index, IP: a.AsSlice(), HardwareAddr: mac, State: netlink.NUD_PERMANENT}),
		netlink.NeighSet(&netlink.Neigh{LinkIndex: device.Attrs().Index, Family: unix.AF_BRIDGE, HardwareAddr: mac, State: netlink.NUD_NOARP, Flags: netlink.NTF_MASTER}))
}

// TestDamagedPods: a bit that the disk has turned makes no other labels.
func TestDamagedPods(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "pods.json")
	p := newPods(nil, file, false)
	must(t, p.Set([]policy.Pod{facts("u", "db-0", map[string]string{"app": "db"})}))
	again := newPods(nil, file, false)
	must(t, again.load())
	if k := again.known["u"]; k == nil || k.Now.Labels["app"] != "db" {
		t.Errorf("%+v", k)
	}
	data, err := os.ReadFile(file)
	must(t, err)
	must(t, os.WriteFile(file, []byte(strings.Replace(string(data), `"db"`, `"dc"`, 1)), 0o600))
	again = newPods(nil, file, false)
	if err := again.load(); err == nil || !contains(err.Error(), "damaged") || again.isTold() {
		t.Errorf("%v", err)
	}
}
