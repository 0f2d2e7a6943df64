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
	first := planHooks(nil, links, testClassifier)
	want := []datapath.Device{
		{Name: "lo", Ifindex: 1, Role: datapath.RoleLo},
		{Name: "veth1", Ifindex: 3, Role: datapath.RolePod},
		{Name: "eth0", Ifindex: 2, Role: datapath.RoleUplink},
	}
	if !reflect.DeepEqual(first.attach, want) || first.detach != nil {
		t.Fatalf("first: %+v", first)
	}
	have := append(want, datapath.Device{Name: "px0", Ifindex: 9, Role: datapath.RolePx0},
		datapath.Device{Name: "px1", Ifindex: 2, Role: datapath.RolePx1})
	if again := planHooks(have, links, testClassifier); again.attach != nil || again.detach != nil {
		t.Errorf("nothing changed, but: %+v", again)
	}
	links = []link{{"eth0", 2, false}, {"lo", 1, true}, {"uplink1", 3, false}, {"px0", 9, false}, {"veth2", 12, false}}
	changed := planHooks(append(have, datapath.Device{Name: "veth7", Ifindex: 7, Role: datapath.RolePod}), links, testClassifier)
	wantAttach := []datapath.Device{
		{Name: "veth2", Ifindex: 12, Role: datapath.RolePod},
		{Name: "uplink1", Ifindex: 3, Role: datapath.RoleUplink},
	}
	if !reflect.DeepEqual(changed.attach, wantAttach) || !reflect.DeepEqual(changed.detach, []int{7}) {
		t.Errorf("changed: %+v", changed)
	}
}
