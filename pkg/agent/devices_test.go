package agent

import (
	"reflect"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
)

var testClassifier = classifier{pods: []string{"veth*", "cali*"}, ignore: []string{"dummy?", "lo"}, px0: 9}

func TestClassify(t *testing.T) {
	for _, c := range []struct {
		link   link
		role   datapath.Role
		hooked bool
	}{
		{link{"lo", 1, true}, datapath.RoleLo, true},
		{link{"eth0", 2, false}, datapath.RoleUplink, true},
		{link{"veth12ab", 3, false}, datapath.RolePod, true},
		{link{"cali0", 4, false}, datapath.RolePod, true},
		{link{"wg0", 5, false}, datapath.RoleUplink, true},
		{link{"dummy0", 6, false}, "", false},
		{link{"dummy10", 7, false}, datapath.RoleUplink, true},
		{link{"px0", 9, false}, "", false},
		{link{"px0", 10, false}, datapath.RoleUplink, true},
	} {
		role, hooked := testClassifier.role(c.link)
		if role != c.role || hooked != c.hooked {
			t.Errorf("%+v: %q %v, want %q %v", c.link, role, hooked, c.role, c.hooked)
		}
	}
}

func TestPlanHooks(t *testing.T) {
	links := []link{{"eth0", 2, false}, {"lo", 1, true}, {"veth1", 3, false}, {"px0", 9, false}, {"dummy0", 6, false}}
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
	links = []link{{"eth0", 2, false}, {"lo", 1, true}, {"uplink1", 3, false}, {"px0", 9, false}, {"veth2", 12, false}}
	changed := planHooks(have, links, testClassifier)
	want := []hookWant{{lo, false}, {datapath.Device{Name: "veth2", Ifindex: 12, Role: datapath.RolePod}, true},
		{eth0, false}, {datapath.Device{Name: "uplink1", Ifindex: 3, Role: datapath.RoleUplink}, true}}
	if !reflect.DeepEqual(changed.attach, want) || !reflect.DeepEqual(changed.detach, []int{7}) {
		t.Errorf("changed: %+v", changed)
	}
}
