package agent

import (
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// TestPlaceOfPod: a pod with two devices is behind both, and no other pod is.
func TestPlaceOfPod(t *testing.T) {
	l := lab.New(t, lab.Options{Pods: 2})
	ns, err := netns.GetFromPath(l.Pod.Path())
	must(t, err)
	defer ns.Close()
	must(t, l.Node.Netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "vethsecond"}, PeerName: "net1", PeerNamespace: netlink.NsFd(int(ns))}))
	second, err := l.Node.Ifindex("vethsecond")
	must(t, err)
	first, err := l.Node.Ifindex(lab.PodDevice(0))
	must(t, err)
	var s policy.ProtectedService
	s.Spec.Addresses = append(s.Spec.Addresses, l.Pod.Addr(lab.IPv4), l.Pod.Addr(lab.IPv6))
	must(t, l.Node.Do(func() error {
		got, err := locator{classify: classifier{pods: []string{"vethpod*"}, px0: func() int { return 0 }}, ports: bridgePorts{}}.find(s)
		if got.device != first || !slices.Equal(got.besides, []int{second}) {
			t.Errorf("the pod is behind %d and %v, want %d and %d", got.device, got.besides, first, second)
		}
		return err
	}))
}
