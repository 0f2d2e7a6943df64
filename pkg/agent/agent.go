// Package agent is the reconciler of a node: resources and grants go in, tables and records come out.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/identity"
	"github.com/sallyport-dev/sallyport/pkg/kube"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/px"
	"github.com/sallyport-dev/sallyport/pkg/store"
	"google.golang.org/grpc"
)

// recentRecords is how many flow records the agent keeps for those who look at the node itself.
const recentRecords = 4096

// node is the running agent: its parts, each made by one entry of the list in parts.
type node struct {
	opt     Options
	cfg     policy.AgentConfig
	log     *slog.Logger
	clock   clock
	started time.Time
	notify  notifier
	pulse   *pulse

	problems    *problems
	alarms      *alarms
	recent      *recent
	flowCounts  *flowCounter
	eventCounts *eventCounter
	ports       *portUse

	lock        *lock
	cgroup      string // that the backstop is attached to
	store       *store.Store
	px          *px.Namespace
	freshPx     bool // px was not there before
	pxMoving    sync.Mutex
	datapath    *datapath.Datapath
	identity    *identity.Source // nil where nobody asks for it
	broker      identity.Broker  // nil: nobody tells the identities of workloads
	callers     *openers
	audit       *audit.Streamer
	sink        *sink
	kube        *kube.Source // nil: resources are files
	applied     *applied     // nil: there is no cluster
	pods        *pods
	resources   *resources
	devices     *devices
	backstop    *backstop
	uplinks     *uplinks
	around      *surroundings
	grants      *grants
	probes      *probes
	rollouts    *rollouts
	readiness   *readiness
	canaries    *canaries
	lately      *lately
	losses      *lossLedger
	tides       *tides
	reports     *reports
	proxyStates *proxyStates
	relay       *relay
	operators   *endpoint
	proxy       *endpoint
	metrics     *metricsServer // nil without an address
	candidate   *candidate
	sweepNow    chan struct{}
	stopping    chan struct{}

	automation *automation // nil: workloads cannot ask
	acts       *acts       // nil: there is no collector
}

// Run enforces until ctx ends, and then leaves enforcement on: hooks, tables and live paths stay, and paths end on time. It
// needs root. Describe gives the next step for its errors.
func Run(ctx context.Context, o Options) error {
	cfg, err := o.config()
	if err != nil {
		return err
	}
	if err := makeDirs(cfg); err != nil {
		return err
	}
	n := newNode(o, cfg)
	if n.cgroup, err = backstopCgroup(cfg); err != nil {
		return err
	}
	return runParts(ctx, n.parts(), n.log)
}

func newNode(o Options, cfg policy.AgentConfig) *node {
	log := o.logger()
	n := &node{
		opt: o, cfg: cfg, log: log, clock: bootClock(), started: time.Now(), notify: notifier{socket: o.NotifySocket}, pulse: newPulse(),
		problems: newProblems(log), recent: newRecent(recentRecords), flowCounts: newFlowCounter(), eventCounts: newEventCounter(), ports: newPortUse(), lately: &lately{},
		sweepNow: make(chan struct{}, 1), stopping: make(chan struct{}),
	}
	n.alarms = newAlarms(n.clock, log, n.recordAlarm)
	n.relay = newRelay(n.listedEndpoints, defaultRelayLimits, log)
	n.candidate = &candidate{dir: cfg.Spec.Candidate, recent: n.recent, problems: n.problems, log: log}
	return n
}

// parts is the order of start; stop is the reverse. Tables come before hooks, and what an earlier agent left is settled
// before the lease lets anything new in. The store outlives all that writes to it.
func (n *node) parts() []part {
	return []part{
		{name: "lock", start: n.takeLock, stop: func() error { return n.lock.release() }},
		{name: "store", start: n.openStore, stop: func() error { return n.store.Close() }},
		{name: "px", start: n.makePx, stop: n.leavePx},
		{name: "datapath", start: n.openDatapath, stop: func() error { return n.datapath.Close() }},
		{name: "identity", start: n.makeIdentity, run: n.runIdentity, stop: n.closeBroker},
		{name: "audit", start: n.makeAudit, run: func(ctx context.Context) error { return n.audit.Run(ctx) }},
		{name: "control groups", start: n.makeCallers, run: func(ctx context.Context) error { return n.callers.groups.Run(ctx) }},
		{name: "callers", run: func(ctx context.Context) error { return n.callers.Run(ctx) }},
		{name: "alarms", run: n.runAlarms},
		{name: "cluster", start: n.makeCluster, run: n.runCluster},
		{name: "resources", start: n.loadResources},
		{name: "pods of the cluster", run: n.followPods},
		{name: "hooks of px", start: func(context.Context) error { return n.datapath.AttachPx() }},
		{name: "hooks of devices", start: n.hookDevices},
		{name: "backstop", start: n.attachBackstop, run: func(ctx context.Context) error { return n.backstop.Run(ctx) }},
		{name: "grants", start: n.adoptGrants, stop: n.tellRefusals},
		{name: "roll-outs", run: func(ctx context.Context) error { return n.rollouts.Run(ctx) }},
		{name: "tides", start: n.makeTides},
		{name: "events", start: n.rebuildFlows, run: func(ctx context.Context) error { return n.events().Run(ctx) }},
		{name: "sweeper", run: func(ctx context.Context) error { return n.sweeper().Run(ctx) }},
		{name: "lease", run: func(ctx context.Context) error { return n.keeper().Run(ctx) }},
		{name: "probes of kubelet", run: func(ctx context.Context) error { return n.probes.Run(ctx) }},
		{name: "px watch", run: func(ctx context.Context) error { return n.pxWatch().Run(ctx) }},
		{name: "pin watch", run: func(ctx context.Context) error { return n.pinWatch().Run(ctx) }},
		{name: "guard watch", run: func(ctx context.Context) error { return n.guardWatch().Run(ctx) }},
		{name: "address watch", run: func(ctx context.Context) error { return n.sources().Run(ctx) }},
		{name: "device watch", run: func(ctx context.Context) error { return n.devices.Run(ctx) }},
		{name: "grants of the cluster", run: n.runApplied},
		{name: "resource watch", run: func(ctx context.Context) error { return n.resources.Run(ctx) }},
		{name: "proxy's socket", start: n.listenProxy, run: func(ctx context.Context) error { return n.proxy.Run(ctx) }},
		{name: "operators' socket", start: n.listenOperators, run: func(ctx context.Context) error { return n.operators.Run(ctx) }},
		{name: "automation", start: n.makeAutomation, run: n.runAutomation},
		{name: "metrics", start: n.makeMetrics, run: n.runMetrics},
		{name: "candidate", run: n.runCandidate},
		{name: "canaries", run: func(ctx context.Context) error { return n.canaries.Run(ctx) }},
		{name: "readiness", run: func(ctx context.Context) error { return n.readiness.Run(ctx) }},
		{name: "service manager", stop: n.beginStop},
	}
}

func (n *node) takeLock(context.Context) (err error) {
	n.lock, err = takeLock(n.cfg.LockFile())
	return err
}

func (n *node) openStore(context.Context) (err error) {
	var damage string
	if n.store, damage, err = openOrRecover(storeFile(n.cfg), n.clock, n.log); err != nil {
		return err
	}
	if damage != "" {
		n.alarms.recorded(alarmStoreDamaged, damage)
		n.eventCounts.count(stepAlarm)
	}
	if err := n.store.Claim(context.Background(), n.owner()); err != nil {
		return errors.Join(err, n.store.Close())
	}
	n.problems.report(problemMemory, "store", n.store.CatchUp(context.Background()))
	n.losses, err = openLossLedger(lossFilePath(n.cfg), n.store.BootID())
	if err != nil {
		return errors.Join(err, n.store.Close())
	}
	return nil
}

func (n *node) owner() store.Owner {
	return store.Owner{Node: n.cfg.Name, Machine: machineID(), Witness: witnessFile(n.cfg)}
}

func (n *node) makePx(context.Context) (err error) {
	before, err := px.Open(n.cfg.PxPath())
	if err == nil {
		err = before.Close()
	} else if errors.Is(err, px.ErrNotThere) {
		n.freshPx, err = true, nil
	}
	if err != nil {
		return err
	}
	n.px, err = px.Create(px.Config{Path: n.cfg.PxPath()})
	return err
}

// leavePx keeps px for the proxy, unless it was made for a datapath that could then not be opened.
func (n *node) leavePx() error {
	if n.freshPx && n.datapath == nil {
		return n.px.Remove()
	}
	return n.px.Close()
}

func (n *node) openDatapath(context.Context) (err error) {
	n.datapath, err = datapath.Open(datapath.Config{
		Dir: n.cfg.PinDir(), PxNetns: n.cfg.PxPath(), Px0: n.px.Px0(), ListenPort: n.cfg.Spec.Proxy.ListenPort,
		MaxTTL: policy.MaxGrantDuration, Profile: datapath.Profile(n.cfg.Spec.Hooks), Repaired: n.repaired, Logger: n.log,
	})
	if err != nil {
		return err
	}
	n.canaries = &canaries{enforced: n.currentResources, steered: n.datapath.Steered, paths: n.datapath.Paths, problems: n.problems, alarm: n.alarms.raise,
		clock: n.clock, seen: map[canaryTarget]canaryResult{}, flows: map[canaryFlow]time.Duration{}}
	n.readiness = newReadiness(probe{counters: n.datapath.Counters}, n.currentResources, n.problems, n.notify)
	n.readiness.open, n.canaries.changed = n.canaries.open, n.readiness.poke
	n.problems.report(problemSockets, "", datapath.CanDestroy())
	n.log.Info("datapath open", "adopted", n.datapath.Adopted(), "hooks", n.datapath.Profile())
	return nil
}

// repaired makes an alarm of a hook that was mended.
func (n *node) repaired(r datapath.Repair) {
	name := alarmHookLost
	if r.Kind == datapath.RepairBehind {
		name = alarmHookBehind
	}
	n.alarms.raise(name, r.String())
}

func (n *node) currentResources() *enforced { return n.resources.current() }

func (n *node) makeIdentity(context.Context) (err error) {
	if n.cfg.Spec.Collector == nil && n.cfg.Spec.Automation == nil && n.cfg.Spec.Workloads.API == policy.WorkloadsNone {
		return nil
	}
	n.identity, err = identity.New(identity.Config{Address: n.cfg.Spec.WorkloadAPI, ID: n.cfg.AgentID(), Logger: n.log})
	if err != nil {
		return err
	}
	broker, err := openBroker(n.cfg, n.identity, n.log)
	if err == nil {
		n.broker = broker
	}
	return err
}

func (n *node) runIdentity(ctx context.Context) error {
	if n.identity == nil {
		<-ctx.Done()
		return nil
	}
	return n.identity.Run(ctx)
}

func (n *node) makeAudit(ctx context.Context) (err error) {
	taken, err := unkept(ctx, n.datapath, n.store)
	if err == nil {
		err = n.datapath.Allow(datapath.Count(taken), false)
	}
	if err != nil {
		return fmt.Errorf("look for what an earlier agent had in hand: %w", err)
	}
	cfg := audit.Config{Store: n.store, Node: n.cfg.Name, FlowBuffer: int(n.cfg.Spec.FlowBuffer), SpoolDir: spoolDir(n.cfg),
		SpoolBudget: int64(n.cfg.Spec.FlowSpool), Logger: n.log, Alarm: func(why string) { n.alarms.raise(alarmLog, why) },
		Taken: cpuRanges(taken), Kept: n.datapath.Kept}
	if c := n.cfg.Spec.Collector; c != nil {
		cfg.Address, cfg.Source, cfg.ServerID, cfg.LogKey = c.Address, n.identity, n.cfg.CollectorID(), c.LogKey
		n.acts = &acts{mayRevoke: c.MayRevoke, log: n.log}
		cfg.Act = n.acts.do
	}
	if n.audit, err = audit.New(cfg); err != nil {
		return err
	}
	n.datapath.SetKept(taken) // it is told of
	n.around = &surroundings{clock: n.clock}
	n.sink = &sink{audit: n.audit, recent: n.recent, counts: n.flowCounts, ports: n.ports, lately: n.lately}
	return nil
}

// makeCallers comes before anything takes flow records.
func (n *node) makeCallers(context.Context) error {
	n.callers = &openers{opened: n.datapath.Caller, near: n.isNear, groups: newCgroups(n.cgroup), broker: n.broker, boot: n.clock.boot}
	n.sink.callers = n.callers
	return nil
}

// isNear tells whether a client with this address is on the node itself. Nothing but words is decided by it.
func (n *node) isNear(a netip.Addr) bool {
	own, err := n.around.own([]netip.Addr{a})
	return a.IsLoopback() || err == nil && slices.Contains(own, a) || podDevice(a, n.datapath.Devices()) != 0
}

func (n *node) runAlarms(ctx context.Context) error {
	return n.alarms.Run(ctx, func(err error) { n.problems.report(problemAlarms, "", err) })
}

func (n *node) classifier() classifier {
	d := n.cfg.Spec.Devices
	return classifier{pods: d.Pods, ignore: d.Ignore, px0: n.px.Px0}
}

func (n *node) loadResources(ctx context.Context) error {
	from, err := n.origin(ctx)
	if err != nil {
		return err
	}
	n.pods = newPods(n.callers.groups, podsFile(n.cfg), n.cfg.Spec.PolicySignatures == policy.SignaturesRequired)
	n.problems.report(problemPods, podsKept, n.pods.load())
	where := locator{classify: n.classifier(), ports: bridgePorts{}}
	n.resources = &resources{
		from: from, verified: verifiedFile(n.cfg), proxy: n.cfg.PolicyFile(),
		ids: newServiceIDs(n.datapath.Services()), apply: n.datapath.SetServices,
		locate: where.find, isHere: n.isHere(where), signed: signedOnly(n.cfg, n.clock), modes: n.modes, fits: n.fits, closed: n.isClosed, problems: n.problems, changed: n.resourcesChanged,
		loosened: n.loosened, decide: n.datapath.SetDecided, pods: n.pods, classify: n.classifier(),
		kick: make(chan struct{}, 1), moved: make(chan struct{}, 1),
	}
	n.pods.changed = n.resources.podsMoved
	n.grants = &grants{
		node: n.cfg.Name, bootID: n.store.BootID(), owner: n.owner(), store: n.store,
		challenges: &challenges{node: n.cfg.Name, boot: n.store.BootID(), clock: n.clock},
		reviews:    &reviews{clock: n.clock, problems: n.problems, alarm: n.alarms.raise}, datapath: n.datapath, enforced: n.resources.current,
		own: n.around.own, clock: n.clock, problems: n.problems, events: n.eventCounts, ports: n.ports, history: newHistory(), log: n.log,
		panicMark: panicFile(n.cfg), saidFile: n.cfg.SignalsFile(), recorded: func() { n.audit.Kick() }, kick: n.grantsMoved,
		active: make(map[string]*held), serving: make(map[clientOf][]*held), ended: make(map[uint32]time.Duration),
	}
	if err := n.makeRollouts(ctx); err != nil {
		return err
	}
	n.sink.isProbe = n.grants.probing.has
	n.probes = &probes{grants: n.grants, group: n.callers.groups.number, source: routeSource, problems: n.problems, clock: n.clock,
		term: probeTerm, kick: make(chan struct{}, 1), failed: make(map[string]failedProbes)}
	if n.kube != nil {
		n.applied = newApplied(n.kube, n.grants, n.clock)
	}
	err = n.resources.load()
	if err == nil {
		n.lately.moved(n.resources.current().services, n.started)
	}
	return err
}

// makeRollouts recalls how far roll-outs have come before any table is made.
func (n *node) makeRollouts(ctx context.Context) error {
	n.rollouts = &rollouts{node: n.cfg.Name, store: n.store, clock: n.clock, enforced: n.resources.current, hear: n.grants.hear,
		apply: n.resources.poke, recorded: func() { n.audit.Kick() }, alarm: n.alarms.raise, events: n.eventCounts, problems: n.problems,
		log: n.log, kick: make(chan struct{}, 1)}
	n.rollouts.watch = &rolloutWatch{clock: n.clock, state: n.rollouts.state, kick: n.rollouts.soon}
	n.sink.watch = n.rollouts.watch
	return n.rollouts.recall(ctx)
}

func (n *node) modes(set *policy.Set) map[string]policy.Mode { return n.rollouts.modes(set) }

func (n *node) fits(set *policy.Set) error { return set.CheckNode(n.cfg) }

// isClosed is why a remote service serves nobody on this node.
func (n *node) isClosed(s policy.RemoteService) error {
	if e := s.Closed(n.cfg); e != nil {
		return fmt.Errorf("%s: whoever asks for it is refused; %s", e.Error(), e.Hint)
	}
	return nil
}

// resourcesChanged ends what the new resources would refuse and probes anew. The error says what could not be ended.
func (n *node) resourcesChanged(e *enforced) error {
	n.log.Info("resources in force", "digest", e.verified.Digest(), "services", len(e.services), "generation", e.generation)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	err := n.grants.recheck(ctx, e)
	if errors.Is(err, errNotRecorded) {
		err = nil // a tick records it, and tells why it cannot
	}
	n.problems.report(problemGrants, "resources", err)
	n.problems.report(problemRollouts, "resources", n.rollouts.follow(ctx, e))
	n.probes.poke()
	n.relay.recheck()
	n.lately.moved(e.services, time.Now())
	n.readiness.poke()
	n.applied.poke()
	return err
}

// hookDevices hooks every device that is there; the watch takes over from it.
func (n *node) hookDevices(context.Context) error {
	n.uplinks = &uplinks{datapath: n.datapath, classify: n.classifier(), spec: n.cfg.Spec.XDP, problems: n.problems}
	if err := n.uplinks.limit(); err != nil {
		return err
	}
	n.devices = &devices{datapath: n.datapath, moving: &n.pxMoving, classify: n.classifier(), uplinks: n.uplinks, problems: n.problems, log: n.log, changed: n.devicesChanged, moved: n.moves("device watch")}
	return n.devices.sync()
}

func (n *node) sources() *sources {
	s := &sources{datapath: n.datapath, classify: n.classifier(), services: n.datapath.Services, problems: n.problems}
	for _, r := range n.cfg.Spec.XDP.DenySources {
		s.denied = append(s.denied, r.Prefix)
	}
	return s
}

func (n *node) devicesChanged() {
	n.sweepSoon()
	n.resources.poke()
	n.readiness.poke()
}

// moves makes the function by which a loop shows that it moves.
func (n *node) moves(loop string) func() { return func() { n.pulse.beat(loop, n.clock.boot()) } }

// adoptGrants settles what an earlier agent left; from then on the collector may have grants ended.
func (n *node) adoptGrants(ctx context.Context) error {
	err := n.grants.adopt(ctx)
	if err == nil && n.acts != nil {
		n.acts.grants.Store(n.grants)
	}
	return err
}

// makeTides comes before anything takes flows from the kernel, or reads its rings.
func (n *node) makeTides(context.Context) error {
	n.tides = (&tides{datapath: n.datapath, store: n.store, clock: n.clock, alarm: n.alarms.raise,
		lost:     func(stage, cause string, count uint64) { n.audit.Lost(stage, cause, count) },
		recorded: func() { n.audit.Kick() }, ended: n.grants.endedSlots, service: n.serviceName, every: tideEvery, patience: tidePatience}).begin()
	n.sink.tides, n.grants.parting = n.tides, n.tides.part
	return n.tides.takeOver()
}

func (n *node) events() *kernelEvents { return &kernelEvents{datapath: n.datapath, sink: n.sink} }

func (n *node) rebuildFlows(context.Context) error { return n.events().rebuild() }

func (n *node) sweeper() *sweeper {
	return &sweeper{datapath: n.datapath, grants: n.grants, sink: n.sink, tides: n.tides, problems: n.problems, wake: n.sweepNow,
		losses: &ringLosses{datapath: n.datapath, ledger: n.losses, lost: n.audit.Lost, allow: n.tides.allow}}
}

// grantsMoved has the sender send what is recorded, and the sweeper cut what ended.
func (n *node) grantsMoved() {
	n.audit.Kick()
	n.sweepSoon()
	n.applied.poke()
}

// loosened tells of what became looser without anybody's signature, where none is asked for.
func (n *node) loosened(looser []error) {
	for _, l := range looser {
		n.log.Warn("resources became looser, and nobody has to sign that here", "what", l)
	}
}

// runApplied follows the grants of the cluster, once what an earlier agent left is settled.
func (n *node) runApplied(ctx context.Context) error {
	if n.applied == nil {
		<-ctx.Done()
		return nil
	}
	return n.applied.Run(ctx)
}

func (n *node) sweepSoon() {
	select {
	case n.sweepNow <- struct{}{}:
	default: // it has not looked yet
	}
}

func (n *node) pxWatch() *pxWatch {
	return &pxWatch{px: n.px, moving: &n.pxMoving, move: n.datapath.MovePx, attach: n.datapath.AttachPx, problems: n.problems, alarm: n.alarms.raise}
}

func (n *node) pinWatch() *pinWatch {
	return &pinWatch{repin: n.datapath.Repin, problems: n.problems, alarm: n.alarms.raise}
}

func (n *node) guardWatch() *guardWatch {
	return &guardWatch{path: n.cfg.GuardFile(), problems: n.problems, boot: n.clock.boot}
}

func (n *node) keeper() *keeper {
	return &keeper{datapath: n.datapath, grants: n.grants, lease: n.cfg.Spec.Lease.Duration, clock: n.clock, problems: n.problems,
		alarm: n.alarms.raise, pulse: n.pulse, notify: n.notify}
}

func (n *node) listenProxy(context.Context) (err error) {
	n.proxyStates = &proxyStates{boot: n.clock.boot}
	n.reports = &reports{sink: n.sink, mark: n.canaries.mark, relay: n.relay, live: n.grants.liveFor, log: n.log, states: n.proxyStates,
		originations: newOriginations(n.callers, func() *policy.Set { return n.resources.current().handed }, n.clock),
		lost:         func(cause string, count uint64) { n.audit.Lost(audit.StageProxyBuffer, cause, count) }}
	n.proxy, err = newEndpoint(n.cfg.ProxySocket(), callers{uids: []uint32{n.cfg.Spec.Proxy.UID}},
		func(r grpc.ServiceRegistrar) { api.RegisterProxyReportServer(r, n.reports) })
	return err
}

func (n *node) listenOperators(context.Context) (err error) {
	o := n.cfg.Spec.Operators
	n.operators, err = newEndpoint(n.cfg.AgentSocket(), callers{uids: o.UIDs, gids: o.GIDs}, func(r grpc.ServiceRegistrar) {
		api.RegisterAgentServer(r, &operators{grants: n.grants, rollouts: n.rollouts, datapath: n.datapath, enforced: n.resources.current,
			status: n.status, listening: n.proxyListening, recent: n.recent, canaries: n.canaries, lately: n.lately, clock: n.clock, stopping: n.stopping})
	})
	return err
}

func (n *node) makeMetrics(context.Context) (err error) {
	if n.cfg.Spec.Metrics == "" {
		return nil
	}
	n.metrics, err = newMetricsServer(n.cfg.Spec.Metrics, n.problems, newMetrics(n), n.candidate)
	return err
}

func (n *node) runMetrics(ctx context.Context) error {
	if n.metrics == nil {
		<-ctx.Done()
		return nil
	}
	return n.metrics.Run(ctx)
}

// tellRefusals records at an orderly stop what was refused and only counted so far. A full disk makes the stop no less orderly.
func (n *node) tellRefusals() error {
	ctx, cancel := context.WithTimeout(context.Background(), stopGrace)
	defer cancel()
	if err := n.grants.tellRefusals(ctx, 0); err != nil {
		n.log.Error("refusals were counted and are not recorded", "err", err)
	}
	return nil
}

// beginStop is the first step of an orderly stop: it tells the service manager and lets followers leave.
func (n *node) beginStop() error {
	close(n.stopping)
	n.log.Info("stopping; enforcement stays on")
	return n.notify.stopping()
}
