package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/px"
	"github.com/sallyport-dev/sallyport/pkg/store"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// agentEnv makes the test binary the agent: "run", "guard" or "uninstall", with the configuration in configEnv.
const (
	agentEnv  = "SALLYPORT_TEST_AGENT"
	configEnv = "SALLYPORT_TEST_CONFIG"
	notifyEnv = "SALLYPORT_TEST_NOTIFY"
)

func runAgentProcess(command string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	o := Options{ConfigFile: os.Getenv(configEnv), Version: "test", NotifySocket: os.Getenv(notifyEnv),
		Logger: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	var err error
	switch command {
	case "run":
		err = Run(ctx, o)
	case "guard":
		err = Guard(ctx, o)
	case "uninstall":
		var removed Removed
		removed, err = Uninstall(ctx, o, "uid:0")
		fmt.Println(removed.Describe())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, Describe(err))
		return 1
	}
	return 0
}

const testNode = "node-1"

// signer is alice, with her key.
type signer struct{ key grant.PrivateKey }

func newSigner(t *testing.T) signer {
	t.Helper()
	key, err := grant.GenerateKey()
	must(t, err)
	return signer{key}
}

// resources are those of the tests: one service, on the host, that alice may open a bypass to.
func (s signer) resources(maxDuration string) string {
	return fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: postgres}
spec:
  target: Host
  ports: [5432, 5433]
---
apiVersion: sallyport.dev/v1alpha1
kind: BypassPolicy
metadata: {name: backup}
spec:
  services: [postgres]
  bindings: [address]
  sources: ["10.0.0.0/8", "fd00::/16"]
  maxDuration: %s
  requesters: [alice]
---
apiVersion: sallyport.dev/v1alpha1
kind: Keyring
metadata: {name: operators}
spec:
  version: 1
  people:
    - name: alice
      keys: [{publicKey: "%s"}]
`, maxDuration, s.key.Public())
}

// payload is a grant that the resources allow; change alters it before it is signed.
func (s signer) payload(t *testing.T, change func(*grant.Payload)) grant.Payload {
	t.Helper()
	now := time.Now().UTC() // to the nanosecond: no two grants say the same
	p := grant.Payload{Requester: "alice", Service: "postgres", Binding: policy.BindingAddress, Addresses: []netip.Addr{clientA},
		NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Hour), Duration: time.Minute, Reason: "backup", Audience: testNode}
	if change != nil {
		change(&p)
	}
	if p.ID != "" { // made at another time, or not its own
		return p
	}
	p, err := p.Named(now)
	must(t, err)
	return p
}

func (s signer) envelope(t *testing.T, change func(*grant.Payload)) []byte {
	t.Helper()
	envelope, err := grant.Sign(t.Context(), s.payload(t, change), s.key)
	must(t, err)
	return envelope
}

// testbed is a node with a real datapath and a real store, on which agents can come and go.
type testbed struct {
	t      *testing.T
	lab    *lab.Lab
	signer signer
	config datapath.Config
	clock  *testOffset
	own    []netip.Addr
	set    *policy.Set
	bootID string        // instead of the real one
	owner  store.Owner   // of the store
	truth  time.Duration // by which the clocks of people differ from this process's
	alarms []alarmName   // that were raised
}

// testOffset moves the real clocks.
type testOffset struct{ wall, boot time.Duration }

func (o *testOffset) clock() clock {
	return clock{
		wall: func() time.Time { return time.Now().Add(o.wall) },
		boot: func() time.Duration { return datapath.BootTime() + o.boot },
	}
}

func newTestbed(t *testing.T, maxPaths uint32) *testbed {
	t.Helper()
	leak.Check(t)
	return newTestbedBeside(t, maxPaths)
}

// newTestbedBeside is newTestbed for tests that run beside others: what is left is not looked for.
func newTestbedBeside(t *testing.T, maxPaths uint32) *testbed {
	t.Helper()
	b := &testbed{t: t, lab: lab.New(t, lab.Options{}), signer: newSigner(t), clock: &testOffset{}}
	bpffs, err := b.lab.MountBPFFS()
	must(t, err)
	netns := filepath.Join(b.lab.Dir, "px")
	must(t, b.lab.Node.Do(func() error {
		ns, err := px.Create(px.Config{Path: netns})
		if err != nil {
			return err
		}
		b.config = datapath.Config{Dir: filepath.Join(bpffs, "sallyport"), PxNetns: netns, Px0: ns.Px0(), ListenPort: 15001,
			MaxFlows: 1024, MaxLegs: 1024, MaxPaths: maxPaths, MaxTTL: policy.MaxGrantDuration}
		return ns.Close()
	}))
	t.Cleanup(func() {
		_, err := datapath.Uninstall(b.config.Dir)
		must(t, err)
		must(t, b.lab.Node.Do(func() error { return px.Remove(px.Config{Path: netns}) }))
	})
	b.set, err = policy.Parse("test.yaml", []byte(b.signer.resources("15m")))
	must(t, err)
	b.owner = store.Owner{Node: testNode, Machine: "1", Witness: filepath.Join(b.lab.Dir, "witness")}
	return b
}

// life is one life of an agent's grants on the testbed: what a kill takes away.
type life struct {
	*testbed
	*grants
}

// begin starts a life: store and datapath are opened, nothing is adopted yet.
func (b *testbed) begin() *life {
	b.t.Helper()
	d, err := datapath.Open(b.config)
	must(b.t, err)
	return b.beginOn(d)
}

// beginOn is begin for many lives that follow each other: loading the programs anew takes most of the time.
func (b *testbed) beginOn(d *datapath.Datapath) *life {
	b.t.Helper()
	s, err := store.Open(filepath.Join(b.lab.Dir, "state", "node.db"))
	must(b.t, err)
	must(b.t, s.Claim(b.t.Context(), b.owner))
	log := slog.New(slog.DiscardHandler)
	bootID := s.BootID()
	if b.bootID != "" {
		bootID = b.bootID
	}
	problems := newProblems(log)
	l := &life{testbed: b, grants: &grants{
		node: testNode, bootID: bootID, owner: b.owner, store: s, datapath: d, clock: b.clock.clock(), problems: problems,
		challenges: &challenges{node: testNode, boot: bootID, clock: b.clock.clock()},
		reviews:    &reviews{clock: b.clock.clock(), problems: problems, alarm: func(name alarmName, _ string) { b.alarms = append(b.alarms, name) }},
		own:        func([]netip.Addr) ([]netip.Addr, error) { return b.own, nil }, history: newHistory(),
		panicMark: b.panicMark(), saidFile: filepath.Join(b.lab.Dir, policy.SignalsFile), events: newEventCounter(), log: log, recorded: func() {}, kick: func() {}, active: make(map[string]*held), serving: make(map[clientOf][]*held), ended: make(map[uint32]time.Duration),
	}}
	ids := newServiceIDs(d.Services())
	r := &resources{ids: ids, problems: l.problems}
	services := r.compile(b.set, podPlan{})
	generation, err := d.SetServices(services)
	must(b.t, err)
	l.enforced = func() *enforced {
		return &enforced{verified: b.set, set: b.set, handed: b.set, services: services, generation: generation}
	}
	return l
}

func (b *testbed) panicMark() panicMark { return panicMark(filepath.Join(b.lab.Dir, "panic")) }

// answer is alice's to a new challenge of the node.
func (l *life) answer(envelope []byte) []byte {
	l.t.Helper()
	return l.signer.answer(l.t, envelope, l.challenges.mint())
}

func (s signer) answer(t *testing.T, envelope []byte, c grant.Challenge) []byte {
	t.Helper()
	challenge, err := json.Marshal(c)
	must(t, err)
	answer, err := grant.Answer(t.Context(), envelope, challenge, s.key, time.Now())
	if err != nil {
		return nil // the envelope is none, or for another node: then nothing can be answered
	}
	return answer
}

// Activate has alice answer a challenge, and begins the grant.
func (l *life) Activate(ctx context.Context, envelope []byte, actor string) (store.GrantRow, error) {
	l.t.Helper()
	return l.grants.Activate(ctx, envelope, l.answer(envelope), actor)
}

// activation is one on its way.
func (l *life) activation(envelope []byte) *activation {
	l.t.Helper()
	return &activation{envelope: envelope, answer: l.answer(envelope), actor: "uid:0"}
}

// kill ends the life as SIGKILL does: nothing is undone.
func (l *life) kill() {
	l.t.Helper()
	must(l.t, l.store.Close())
	must(l.t, l.datapath.Close())
}

// states are the grants' states by id; open the ids that have an open path.
func (l *life) states() (states map[string]string, open map[string]int) {
	l.t.Helper()
	rows, err := l.all(l.t.Context())
	must(l.t, err)
	states, open = make(map[string]string), make(map[string]int)
	for _, row := range rows {
		states[row.ID] = row.State
	}
	paths, err := l.datapath.Paths()
	must(l.t, err)
	for _, p := range paths {
		if isOpen(p) {
			open[p.Grant]++
		}
	}
	return states, open
}

// recorded checks invariant 5: no open path without an active row of this boot.
func (l *life) recorded() {
	l.t.Helper()
	states, open := l.states()
	for id := range open {
		if states[id] != store.StateActive {
			l.t.Errorf("open path of grant %s, whose row is %q", id, states[id])
		}
	}
}

// steps lists the steps of the grant events in the store, in their order.
func (l *life) steps() (steps []string) {
	l.t.Helper()
	for _, e := range l.storedEvents() {
		steps = append(steps, e.GetStep())
	}
	return steps
}

// eventually waits for what others do.
func (b *testbed) eventually(what string, ok func() bool) {
	b.t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(30 * time.Second); !ok(); {
		select {
		case <-tick.C:
		case <-deadline:
			b.t.Fatalf("not in time: %s", what)
		}
	}
}

func contains(s string, parts ...string) bool {
	for _, p := range parts {
		if !strings.Contains(s, p) {
			return false
		}
	}
	return true
}
