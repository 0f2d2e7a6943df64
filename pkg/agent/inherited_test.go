package agent

import (
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// inheritance is a pod whose workload holds a path, and the pod that gets its address.
type inheritance struct {
	*automated
	group *lab.Group
	f     lab.Family
	to    netip.AddrPort // the service
	shows *lab.Process   // the pod's namespace
	pod   *lab.Namespace
	held  *asking
	grant string
}

const inherited = 5 // number of the pods

// bequeath starts the first pod, whose workload opens a path.
func (i *inheritance) bequeath(binding string) {
	i.t.Helper()
	var err error
	i.pod = i.startPod()
	i.shows, err = i.pod.Start(exec.Command("sleep", "1h"))
	must(i.t, err)
	i.held = i.dialIn(backup, i.group, i.pod, i.lab.Node.Addr(i.f))
	i.grant = i.held.open(func(r *api.PathRequest) { r.Binding = binding }).Grant
	if !i.groupReaches(i.group, i.pod, netip.AddrPort{}, i.to) {
		i.t.Errorf("%v, %s: the pod does not reach it", i.f, binding)
	}
}

// die ends the pod without a word of its holder.
func (i *inheritance) die() {
	i.t.Helper()
	must(i.t, i.shows.Kill())
	must(i.t, i.pod.End())
}

func (a *automated) startPod() *lab.Namespace {
	a.t.Helper()
	pod, err := a.lab.StartPod(inherited, nil)
	must(a.t, err)
	a.awaitPodHooks()
	return pod
}

func (a *automated) awaitPodHooks() {
	a.t.Helper()
	a.eventually("the pod's hooks", func() bool {
		return contains(strings.Join(hookedDevices(a.status()), " "), lab.StartedDevice(inherited))
	})
}

// TestInheritedAddress: a pod that gets the address of one whose workload held a path does not get the path, though the
// holder never said that it is gone.
func TestInheritedAddress(t *testing.T) {
	a := automate(t, time.Hour, "")
	agent := a.ready("run")
	group, err := a.lab.NewGroup("nightly")
	must(t, err)
	for _, f := range lab.Families() {
		to := a.postgres(f)
		for _, binding := range []string{policy.BindingAddress, policy.BindingWorkload} {
			i := inheritance{automated: a, group: group, f: f, to: to}
			i.bequeath(binding)
			i.die()
			heir, err := a.lab.StartPod(inherited, nil)
			must(t, err)
			if why := a.endedWhy(i.grant); !contains(why, whyHolderGone) { // by the device, but where the machine is so slow that its silence is seen first
				t.Errorf("%v, %s: ended because %q", f, binding, why)
			}
			a.awaitPodHooks()
			if a.reaches(heir, netip.AddrPort{}, to) {
				t.Errorf("%v, %s: the heir of the address reached it", f, binding)
			}
			must(t, heir.End())
			must(t, i.held.raw.Close())
		}
	}
	must(t, agent.Stop(10*time.Second))
	a.uninstall()
}

// TestInheritedWhileAway: nor does it when all of that happens while no agent runs. The one that comes then knows whose the path was.
func TestInheritedWhileAway(t *testing.T) {
	a := automate(t, time.Hour, "")
	agent := a.ready("run")
	group, err := a.lab.NewGroup("nightly")
	must(t, err)
	for _, f := range lab.Families() {
		to := a.postgres(f)
		for _, c := range []struct{ binding, why string }{
			{policy.BindingAddress, "its address is another pod's"},
			{policy.BindingWorkload, "its address is another pod's"},
			{policy.BindingAddress, "its pod's device is not there any more"},
		} {
			i := inheritance{automated: a, group: group, f: f, to: to}
			i.bequeath(c.binding)
			must(t, agent.Kill())
			i.die()
			var heir *lab.Namespace
			if c.why == "its address is another pod's" {
				heir, err = a.lab.StartPod(inherited, nil)
				must(t, err)
			}
			if c.binding == policy.BindingWorkload && a.reaches(heir, netip.AddrPort{}, to) {
				t.Errorf("%v: another pod reached what is bound to a workload", f)
			}
			agent = a.ready("run")
			if why := a.endedWhy(i.grant); !contains(why, whyHolderGone, c.why) {
				t.Errorf("%v, %s: ended because %q, want %q", f, c.binding, why, c.why)
			}
			if heir != nil {
				a.awaitPodHooks()
				if a.reaches(heir, netip.AddrPort{}, to) {
					t.Errorf("%v, %s: the heir of the address reached it", f, c.binding)
				}
				must(t, heir.End())
			}
			_ = i.held.raw.Close() // the agent that it was with is dead
		}
	}
	must(t, agent.Stop(10*time.Second))
	a.uninstall()
}
