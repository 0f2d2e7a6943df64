package agent

import (
	"reflect"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
)

var testClassifier = classifier{pods: []string{"veth*", "cali*"}, ignore: []string{"dummy?", "lo"}, px0: func() int { return 9 }}

func TestClassify(t *testing.T) {
	for _, c := range []struct {
		link   link
		role   datapath.Role
		hooked bool
	}{
		{link{name: "lo", ifindex: 1, loopback: true}, datapath.RoleLo, true},
		{link{name: "eth0", ifindex: 2, loopback: false}, datapath.RoleUplink, true},
		{link{name: "veth12ab", ifindex: 3, loopback: false}, datapath.RolePod, true},
		{link{name: "cali0", ifindex: 4, loopback: false}, datapath.RolePod, true},
		{link{name: "wg0", ifindex: 5, loopback: false}, datapath.RoleUplink, true},
		{link{name: "dummy0", ifindex: 6, loopback: false}, "", false},
		{link{name: "dummy10", ifindex: 7, loopback: false}, datapath.RoleUplink, true},
		{link{name: "px0", ifindex: 9, loopback: false}, "", false},
		{link{name: "px0", ifindex: 10, loopback: false}, datapath.RoleUplink, true},
	} {
		role, hooked := testClassifier.role(c.link)
		if role != c.role || hooked != c.hooked {
			t.Errorf("%+v: %q %v, want %q %v", c.link, role, hooked, c.role, c.hooked)
		}
	}
}

func TestPlanHooks(t *testing.T) {
	links := []link{{name: "eth0", ifindex: 2, loopback: false}, {name: "lo", ifindex: 1, loopback: true}, {name: "veth1", ifindex: 3, loopback: false}, {name: "px0", ifindex: 9, loopback: false}, {name: "dummy0", ifindex: 6, loopback: false}}
	lo := datapath.Device{Name: "lo", Ifindex: 1, Role: datapath.RoleLo}
	veth1 := datapath.Device{Name: "veth1", Ifindex: 3, Role: datapath.RolePod}
	eth0 := datapath.Device{Name: "eth0", Ifindex: 2, Role: datapath.RoleUplink}
	first := planHooks(nil, links, testClassifier)
	if want := []hookWant{{lo, true}, {veth1, true}, {eth0, true}}; !reflect.DeepEqual(first.attach, want) || first.detach != nil {
		t.Fatalf("first: %+v", first)
	}
	have := []datapath.Device{lo, veth1, eth0, {Name: "px0", Ifindex: 9, Role: datapath.RolePx0},
		{Name: "px1", Ifindex: 2, Role: datapath.RolePx1}, {Name: "lo", Ifindex: 1, Role: datapath.RolePx1}}
	again := planHooks(have, links, testClassifier)
	if want := []hookWant{{lo, false}, {veth1, false}, {eth0, false}}; !reflect.DeepEqual(again.attach, want) || again.detach != nil {
		t.Errorf("nothing changed, but: %+v", again)
	}
	have = append(have, datapath.Device{Name: "veth7", Ifindex: 7, Role: datapath.RolePod})
	links = []link{{name: "eth0", ifindex: 2, loopback: false}, {name: "lo", ifindex: 1, loopback: true}, {name: "uplink1", ifindex: 3, loopback: false}, {name: "px0", ifindex: 9, loopback: false}, {name: "veth2", ifindex: 12, loopback: false}}
	changed := planHooks(have, links, testClassifier)
	want := []hookWant{{lo, false}, {datapath.Device{Name: "veth2", Ifindex: 12, Role: datapath.RolePod}, true},
		{eth0, false}, {datapath.Device{Name: "uplink1", Ifindex: 3, Role: datapath.RoleUplink}, true}}
	if !reflect.DeepEqual(changed.attach, want) || !reflect.DeepEqual(changed.detach, []int{7}) {
		t.Errorf("changed: %+v", changed)
	}
}

// TestMasters: a packet meets the hooks of a device and of its master, so these share the work.
func TestMasters(t *testing.T) {
	dev := func(name, kind string, ifindex int) *link { return &link{name: name, kind: kind, ifindex: ifindex} }
	bond, team, bridge, ovs := dev("bond0", "bond", 20), dev("team0", "team", 21), dev("br0", "bridge", 22), dev("ovs", "openvswitch", 23)
	closed := dev("dummy0", "bond", 24) // ignored: it has no hooks
	slave := func(name string, master *link) link {
		l := *dev(name, "veth", 30)
		l.master = master
		return l
	}
	for _, c := range []struct {
		link   link
		role   datapath.Role
		hooked bool
	}{
		{*bond, datapath.RoleUplink, true},
		{*bridge, datapath.RoleBridge, true},
		{slave("eth1", bond), "", false},
		{slave("eth1", team), "", false},
		{slave("veth1", bond), "", false},
		{slave("eth1", bridge), datapath.RolePort, true},
		{slave("veth1", bridge), datapath.RolePodPort, true},
		{slave("eth1", ovs), datapath.RoleUplink, true},
		{slave("veth1", ovs), datapath.RolePod, true},
		{slave("eth1", closed), datapath.RoleUplink, true},
	} {
		if role, hooked := testClassifier.role(c.link); role != c.role || hooked != c.hooked {
			t.Errorf("%s of %v: %q %v, want %q %v", c.link.name, c.link.master, role, hooked, c.role, c.hooked)
		}
	}
}

// TestPlanOfABond: a device that is enslaved loses its hooks when its master has them, and not before.
func TestPlanOfABond(t *testing.T) {
	bond := link{name: "bond0", ifindex: 20, kind: "bond"}
	eth1 := link{name: "eth1", ifindex: 5, master: &bond}
	have := []datapath.Device{{Name: "eth1", Ifindex: 5, Role: datapath.RoleUplink}}
	plan := planHooks(have, []link{eth1, bond}, testClassifier)
	if len(plan.attach) != 1 || plan.attach[0].Ifindex != 20 || len(plan.detach) != 0 || plan.release[5] != 20 {
		t.Errorf("enslaved: %+v", plan)
	}
	if got := released(plan, have); len(got) != 0 {
		t.Errorf("released %v before the master is hooked", got)
	}
	have = append(have, datapath.Device{Name: "bond0", Ifindex: 20, Role: datapath.RoleUplink})
	if got := released(plan, have); !reflect.DeepEqual(got, []int{5}) {
		t.Errorf("released %v, want eth1", got)
	}
	eth1.master = nil
	plan = planHooks(have[1:], []link{eth1, bond}, testClassifier)
	if len(plan.attach) != 2 || !plan.attach[0].fresh && !plan.attach[1].fresh {
		t.Errorf("free again: %+v", plan)
	}
}
