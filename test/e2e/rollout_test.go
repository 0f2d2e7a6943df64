package e2e_test

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

const echoRollout = `---
apiVersion: sallyport.dev/v1alpha1
kind: Rollout
metadata: {name: echo}
spec:
  services: [host-echo]
  operators: [alice]
  advance: Auto
  waves:
    - {name: first, nodes: [node-1], mode: Enforce, bake: 1s}
    - {name: all, percent: 100, mode: Enforce, bake: 5s}
  budget: {refusals: 2, window: 10m, except: [%s]}
`

// rolledOut are two nodes with one roll-out: the client between them reaches the service of each.
type rolledOut struct{ here, there *world }

func (r rolledOut) agents() string { return r.here.files.run + "," + r.there.files.run }

// resources has the service shadowed by itself; except are clients whose refusals do not count.
func (r rolledOut) resources(t *testing.T, except string) {
	t.Helper()
	for _, w := range []*world{r.here, r.there} {
		text := strings.NewReplacer("name: host-echo}\nspec:\n", "name: host-echo}\nspec:\n  mode: Shadow\n", `"}]}]`, `", uses: [request, approve, rollout]}]}]`).Replace(w.resources(t))
		w.writeResources(t, "10-world.yaml", strings.TrimSuffix(text, "---\n")+fmt.Sprintf(echoRollout, except))
	}
}

// rolloutStatus is what the tests look at in `sallyport rollout status`.
type rolloutStatus struct {
	Nodes []struct {
		Rollouts struct {
			Node     string
			Rollouts []struct {
				Phase    string
				Wave     int
				Baked    bool
				Why      string
				Services []struct {
					Mode        string
					WouldRefuse int `json:"would_refuse"`
					Live        int
				}
			}
		}
	}
}

// stands gives phase, wave and mode of each node: "Running 1 Enforce, Running 1 Shadow".
func (r rolledOut) stands(t *testing.T) string {
	t.Helper()
	var all []string
	for _, n := range read[rolloutStatus](t, r.here, "rollout", "status", "--agents", r.agents()).Nodes {
		for _, one := range n.Rollouts.Rollouts {
			all = append(all, fmt.Sprintf("%s %d %s", one.Phase, one.Wave, one.Services[0].Mode))
		}
	}
	return strings.Join(all, ", ")
}

func (r rolledOut) wait(t *testing.T, want string) {
	t.Helper()
	waitUntil(t, want, func() bool { return r.stands(t) == want })
}

func (r rolledOut) say(verb string, more ...string) said {
	return r.here.try(append([]string{"rollout", verb, "echo", "--agents", r.agents(), "--key", r.here.key, "--by", "alice", "--why", "the test says so"}, more...)...)
}

func (r rolledOut) must(t *testing.T, s said) {
	t.Helper()
	if s.err != nil {
		t.Fatal(s)
	}
}

// TestRollout: the first wave breaks a client that Shadow could not see; its node falls back by itself and serves the client again, the other
// node goes no further, and both do once the policy is mended. What is done falls back no more. A kill in between changes nothing.
func TestRollout(t *testing.T) {
	leak.Check(t)
	r := rolledOut{here: newWorld(t, options{plain: true})}
	r.there = newWorld(t, options{plain: true, beside: r.here})
	r.there.key = r.here.key
	r.resources(t, "")
	for _, w := range []*world{r.here, r.there} {
		for _, d := range []*daemon{w.collector, w.agent, w.proxy} {
			d.start(t)
		}
	}
	here, there := r.here.ways("host-echo", lab.IPv4)[0], r.there.ways("host-echo", lab.IPv4)[0]
	for range 3 {
		served(t, here)
	}
	r.wait(t, "Running 0 Shadow, Running 0 Shadow")
	standing := here.dialDirect(t)
	waitUntil(t, "what Shadow has seen", func() bool {
		s := read[rolloutStatus](t, r.here, "rollout", "status").Nodes[0].Rollouts.Rollouts[0].Services[0]
		return s.WouldRefuse == 4 && s.Live == 1
	})
	if s := r.say("advance", "--yes"); s.err == nil || !strings.Contains(s.stderr, "4 of 4 connections were refused, and the budget is 2 refused within 10m") {
		t.Errorf("over the budget: %s", s)
	}
	r.must(t, r.say("advance", "--yes", "--despite-forecast"))
	r.wait(t, "Running 1 Enforce, Running 1 Shadow")
	standing.wantCut(t)
	if o := here.identified(within(t, patience), r.here, web); o.who != proxied {
		t.Errorf("who proves an identity is answered by %s", o)
	}
	served(t, there)

	began := time.Now()
	for range 3 { // nobody knows it: another address than those that Shadow saw
		if o := planted(here).plain(within(t, patience)); o.who == direct {
			t.Fatalf("without an identity: %s", o)
		}
	}
	r.wait(t, "FellBack 1 Shadow, Running 1 Shadow")
	waitUntil(t, "the client's answer", func() bool { return planted(here).plain(within(t, patience)).who == direct })
	t.Logf("fell back and served again %v after the first refusal", time.Since(began).Round(time.Millisecond))
	if s := r.say("advance", "--yes", "--despite-forecast"); s.err == nil || !strings.Contains(s.stderr, "node-1: FellBack: host-echo: 3 of 4 connections were refused") {
		t.Errorf("another wave: %s", s)
	}
	if s := r.here.try("rollout", "run", "echo", "--agents", r.agents(), "--key", r.here.key, "--by", "alice"); s.err == nil {
		t.Errorf("the controller does not see it: %s", s)
	}
	r.wait(t, "FellBack 1 Shadow, Halted 1 Shadow")
	r.here.agent.kill(t)
	r.here.agent.start(t)
	r.wait(t, "FellBack 1 Shadow, Halted 1 Shadow")

	r.resources(t, fmt.Sprintf("%q", here.other))
	for _, w := range []*world{r.here, r.there} {
		waitUntil(t, "the mended policy", func() bool {
			kept, err := os.ReadFile(w.files.state + "/verified.yaml")
			return err == nil && strings.Contains(string(kept), "except:") && strings.Contains(string(kept), here.other.String())
		})
	}
	r.must(t, r.say("resume", "--yes"))
	r.wait(t, "Running 1 Enforce, Running 1 Shadow")
	for range 4 {
		planted(here).plain(within(t, patience))
	}
	r.here.agent.kill(t)
	r.here.agent.start(t)
	r.wait(t, "Running 1 Enforce, Running 1 Shadow")
	served(t, there)
	r.must(t, r.here.try("rollout", "run", "echo", "--agents", r.agents(), "--key", r.here.key, "--by", "alice", "--every", "100ms"))
	if got := r.stands(t); got != "Done 2 Enforce, Done 2 Enforce" {
		t.Errorf("in the end: %s", got)
	}
	for _, way := range []way{here, there} {
		for range 4 {
			if o := way.plain(within(t, patience)); o.who == direct {
				t.Errorf("without an identity, in the end: %s", o)
			}
		}
	}
	if got := r.stands(t); got != "Done 2 Enforce, Done 2 Enforce" {
		t.Errorf("what is done falls back: %s", got)
	}
	waitUntil(t, "the records of it", func() bool {
		var steps []string
		for _, e := range r.here.grantEvents(t) {
			steps = append(steps, e.Event.Step)
		}
		return slices.Equal(slices.DeleteFunc(steps, func(s string) bool { return s == "ALARM" }), []string{"ADVANCED", "FELL_BACK", "RESUMED", "ADVANCED", "ROLLED_OUT"})
	})
}

// planted is the way of a client that comes from another address.
func planted(w way) way {
	w.from = w.other
	return w
}

func served(t *testing.T, w way) {
	t.Helper()
	if o := w.plain(within(t, patience)); o.who != direct {
		t.Errorf("%s from %s: %s", w.service, netip.AddrPortFrom(w.from, 0), o)
	}
}
