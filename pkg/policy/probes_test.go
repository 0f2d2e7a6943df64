package policy_test

import (
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

const probesOf = head + `ProtectedService
metadata: {name: db}
spec: {target: Pod, ports: [5432, 5433], addresses: [10.2.0.2]@}
`

func withProbes(text string) string { return strings.Replace(probesOf, "@", text, 1) }

// TestProbesAreRead: what cannot be kubelet's is refused where it is written, with the next step.
func TestProbesAreRead(t *testing.T) {
	const good = "/system.slice/kubelet.service"
	set, err := policy.Parse("x", []byte(withProbes(", probes: {ports: [5432], cgroup: "+good+"}")))
	if err != nil {
		t.Fatal(err)
	}
	again, err := policy.Parse("y", set.YAML())
	if err != nil || again.Digest() != set.Digest() || again.Services()[0].Spec.Probes.Cgroup != good {
		t.Errorf("read back: %v, %v", again, err)
	}
	for text, want := range map[string]string{
		", probes: {ports: [80], cgroup: /k}":                    "spec.probes.ports[0]: 80 is not one of the service's",
		", probes: {ports: [], cgroup: /k}":                      "spec.probes.ports: needs at least one port",
		", probes: {ports: [5432, 5432], cgroup: /k}":            "spec.probes.ports[1]: port 5432 is already",
		", probes: {ports: [5432]}":                              "spec.probes.cgroup: is missing",
		", probes: {ports: [5432], cgroup: /}":                   "spec.probes.cgroup: \"/\" is not such a path",
		", probes: {ports: [5432], cgroup: k}":                   "spec.probes.cgroup: \"k\" is not such a path",
		", probes: {ports: [5432], cgroup: /a/../b}":             "is not such a path",
		", probes: {ports: [5432], cgroup: /a/kubepods.slice/b}": "is of pods: kubelet is in none",
		", probes: {ports: [5432], cgroup: /k, all: true}":       "all",
		", protocol: UDP, probes: {ports: [5432], cgroup: /k}":   "spec.probes: kubelet probes by TCP",
	} {
		if _, err := policy.Parse("x", []byte(withProbes(text))); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
	host := strings.NewReplacer("target: Pod", "target: Host", "addresses: [10.2.0.2]", "udp: Deny").Replace(withProbes(", probes: {ports: [5432], cgroup: /k}"))
	if _, err := policy.Parse("x", []byte(host)); err == nil || !strings.Contains(err.Error(), "they are for services in pods") {
		t.Errorf("of a Host service: %v", err)
	}
}

// TestProbesLoosening: an exception, a port more and another group are looser; less is tighter.
func TestProbesLoosening(t *testing.T) {
	const none, one, two, other = "", ", probes: {ports: [5432], cgroup: /k}", ", probes: {ports: [5432, 5433], cgroup: /k}", ", probes: {ports: [5432], cgroup: /l}"
	for _, c := range []struct {
		old, next string
		want      policy.Effect
	}{
		{none, one, policy.Looser}, {one, two, policy.Looser}, {one, other, policy.Looser}, {other, two, policy.Looser},
		{two, one, policy.Tighter}, {one, none, policy.Tighter},
	} {
		parse := func(text string) *policy.Set {
			set, err := policy.Parse("x", []byte(withProbes(text)))
			if err != nil {
				t.Fatal(err)
			}
			return set
		}
		changes := policy.Changes(parse(c.old), parse(c.next))
		if len(changes) != 1 || changes[0].Effect != c.want || !strings.HasPrefix(changes[0].Field, "spec.probes") {
			t.Errorf("%q to %q: %+v, want %s", c.old, c.next, changes, c.want)
		}
	}
}
