package e2e_test

import (
	"context"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// killSample is how many steps of a start are killed at, beyond one of each kind.
const killSample = 1

// killTime bounds the kills of one kind of start: on a slow machine some of those chosen are left to other runs.
const killTime = 17 * time.Second

// hookKinds are the kinds of steps by which hooks change, where all else is there already.
var hookKinds = []string{"link create", "link update", "link detach", "pin", "map update", "rename", "unlink"}

// stepAt is the n-th step of a kind.
type stepAt struct {
	kind string
	nth  int
}

// killedStart is a start that the agent is killed in, from a state that prepare makes.
type killedStart struct {
	name    string
	proxied bool // enforcement and the proxy go on all the time, and an attacker tries
	prepare func(*killing, *testing.T)
}

var killedStarts = []killedStart{
	{"attach", false, func(k *killing, t *testing.T) { k.uninstall(t); k.nothingLeft(t) }},
	{"upgrade", true, func(k *killing, _ *testing.T) { k.build = 1 - k.build }},
	{"repair", true, (*killing).damageHooks},
}

// TestKilledAtEachStep kills the agent right before single system calls of its start: on a clean node, in an upgrade of the
// programs, and where it has to repair hooks. Whatever was half done, nobody without an identity gets an answer, the next
// start succeeds, the node then is as after a start that nobody killed, and an uninstall leaves nothing.
func TestKilledAtEachStep(t *testing.T) {
	leak.Check(t)
	seed := soakSettings(t).seed
	t.Logf("SOAK_SEED=%d", seed)
	k := newKilling(t, rand.New(rand.NewPCG(seed, 1)))
	for _, s := range killedStarts {
		t.Run(s.name, func(t *testing.T) { k.run(t, s) })
	}
	k.uninstall(t)
	k.nothingLeft(t)
	k.guard.stop(t)
	<-k.proxy.proc.Exited() // its namespace is gone
	k.collector.stop(t)
}

type killing struct {
	*world
	dice  *rand.Rand
	bins  [2]string // folders of the two builds
	build int       // the one to start
	clean []string  // the node as a start leaves it that nobody killed
}

func newKilling(t *testing.T, dice *rand.Rand) *killing {
	t.Helper()
	k := &killing{world: newWorld(t, options{plain: true}), dice: dice}
	k.bins = [2]string{k.bin, buildOther(t, filepath.Join(built.dir, "other"))}
	k.collector.start(t)
	k.agent.start(t)
	k.guard.start(t)
	k.clean = k.state(t)
	k.agent.stop(t)
	return k
}

// run kills one start after the other.
func (k *killing) run(t *testing.T, s killedStart) {
	if s.proxied {
		k.start(t)
		if k.proxy.proc == nil {
			k.proxy.start(t)
		}
		k.kill(t)
		stop := k.attack(t)
		defer stop()
	}
	s.prepare(k, t)
	steps := k.steps(t)
	k.check(t, s, "not killed")
	chosen, began := k.choose(steps, s.proxied), time.Now()
	for i, at := range chosen {
		if time.Since(began) > killTime {
			t.Logf("time for %v alone, not for %v", chosen[:i], chosen[i:])
			break
		}
		k.kill(t)
		s.prepare(k, t)
		reached := k.startKilled(t, at)
		k.check(t, s, fmt.Sprintf("killed before %s %d (reached: %v)", at.kind, at.nth, reached))
	}
	k.kill(t)
}

// kill returns when the agent is gone too. That its tracer is gone says that the agent was killed, not that it let go of its
// lock.
func (k *killing) kill(t *testing.T) {
	t.Helper()
	k.agent.kill(t)
	lock, err := os.Open(filepath.Join(k.files.run, "agent.pid"))
	must(t, err)
	defer lock.Close()
	must(t, unix.Flock(int(lock.Fd()), unix.LOCK_SH))
}

// agentOf is the agent of the build to start.
func (k *killing) agentOf() string { return filepath.Join(k.bins[k.build], "sallyport-agent") }

// start starts the agent, and waits for it.
func (k *killing) start(t *testing.T) {
	t.Helper()
	k.agent.name, k.agent.args = k.agentOf(), []string{"run", "--config", k.files.agent}
	k.agent.start(t)
}

// traced makes the next start of the agent one under the tracer.
func (k *killing) traced(t *testing.T, at stepAt) {
	t.Helper()
	self, err := os.Executable()
	must(t, err)
	k.agent.name, k.agent.args = self, []string{traceCommand, at.kind, fmt.Sprint(at.nth), k.agentOf(), "run", "--config", k.files.agent}
}

// steps are those of a start that is not killed.
func (k *killing) steps(t *testing.T) (all []stepAt) {
	t.Helper()
	k.traced(t, stepAt{})
	k.agent.start(t)
	k.kill(t)
	seen := map[string]int{}
	for line := range strings.Lines(k.agent.proc.Output()) {
		if kind, ok := strings.CutPrefix(strings.TrimSpace(line), stepPrefix); ok {
			seen[kind]++
			all = append(all, stepAt{kind, seen[kind]})
		}
	}
	if len(all) == 0 {
		t.Fatalf("no step was seen:\n%s", k.agent.proc.Output())
	}
	t.Logf("%d steps: %v", len(all), seen)
	return all
}

// choose takes one step of each kind, or of each that changes hooks, and some more.
func (k *killing) choose(steps []stepAt, hooksAlone bool) (chosen []stepAt) {
	byKind := map[string][]stepAt{}
	for _, s := range steps {
		byKind[s.kind] = append(byKind[s.kind], s)
	}
	for _, kind := range slices.Sorted(maps.Keys(byKind)) {
		if hooksAlone && !slices.Contains(hookKinds, kind) {
			continue
		}
		chosen = append(chosen, byKind[kind][k.dice.IntN(len(byKind[kind]))])
	}
	for range killSample {
		chosen = append(chosen, steps[k.dice.IntN(len(steps))])
	}
	k.dice.Shuffle(len(chosen), func(i, j int) { chosen[i], chosen[j] = chosen[j], chosen[i] })
	return chosen
}

// startKilled says whether it came to the step. What the agent does on the side is not the same in every start.
func (k *killing) startKilled(t *testing.T, at stepAt) (reached bool) {
	t.Helper()
	k.traced(t, at)
	must(t, k.agent.launch())
	select {
	case <-k.agent.proc.Exited():
		return true
	case <-k.agent.notify.ready:
		k.kill(t)
		return false
	case <-time.After(startTime):
		t.Fatalf("neither ready nor killed:\n%s", k.agent.proc.Output())
		return false
	}
}

// check starts the agent as a service manager does after it was killed, and looks at the node.
func (k *killing) check(t *testing.T, s killedStart, when string) {
	t.Helper()
	k.start(t)
	if got := k.state(t); !slices.Equal(got, k.clean) {
		t.Errorf("%s: the node has %q that it should not have, and lacks %q", when, minus(got, k.clean), minus(k.clean, got))
	}
	for _, p := range k.status(t).Problems {
		if !strings.HasPrefix(p, "alarm ") && !strings.HasPrefix(p, "backstop ") {
			t.Errorf("%s: problem: %s", when, p)
		}
	}
	for _, f := range lab.Families() {
		way := k.ways("host-echo", f)[0]
		if o := way.plain(within(t, attemptTime)); o.who == direct || s.proxied && o.who != cut {
			t.Errorf("%s: plain client answered by %s", when, o)
		}
	}
}

// state lists what is pinned and attached. Programs that are kept for a rollback may be there or not.
func (k *killing) state(t *testing.T) (all []string) {
	t.Helper()
	root := filepath.Join(k.bpffs, "sallyport")
	must(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err == nil && !strings.Contains(path, "/progs/previous") {
			all = append(all, strings.TrimPrefix(path, root))
		}
		return err
	}))
	all = append(all, attached(t, k.Node)...)
	for _, h := range k.status(t).Hooks {
		all = append(all, "status "+h.Device+" "+h.Role)
	}
	return slices.Sorted(slices.Values(all))
}

func minus(all, gone []string) []string {
	return slices.DeleteFunc(slices.Clone(all), func(s string) bool { return slices.Contains(gone, s) })
}

// attack has clients try without an identity until stop is called, and judges at the services' sockets.
func (k *killing) attack(t *testing.T) (stop func()) {
	t.Helper()
	judge := newJudge(t)
	p, err := k.newProber(judge, 300)
	must(t, err)
	for _, n := range []*lab.Namespace{k.Client, k.Node, k.Pods[1]} {
		must(t, n.Sysctl("ipv4/ip_local_port_range", clientPorts))
	}
	for _, s := range k.echoes {
		must(t, judge.witness.Watch(s))
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { p.run(ctx, 1<<30, rand.New(rand.NewPCG(1, 2))) })
	return func() {
		cancel()
		wg.Wait()
		must(t, p.close())
		judge.blind(t)
		judge.mu.Lock()
		defer judge.mu.Unlock()
		t.Logf("%d probes, answered by %v, with an identity by %v", p.total(), p.answers, p.secured)
		for _, l := range judge.leaks {
			t.Errorf("leaked: %s", l)
		}
		if p.answers[cut] == 0 || judge.byProxy == 0 {
			t.Error("the services were not reached by the proxy either: this proves nothing")
		}
	}
}

// damageHooks takes the uplink's hook away and unpins another, while no agent runs.
func (k *killing) damageHooks(t *testing.T) {
	t.Helper()
	bpftool(t, nil, "link", "detach", "pinned", k.uplinkHook(t))
	must(t, os.Remove(strings.Replace(k.uplinkHook(t), "sp_dev_in", "sp_dev_out", 1)))
}
