package agent

import (
	"context"
	"fmt"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/identity"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// status puts together what the parts say of themselves. What cannot be read is a problem of its own line.
func (n *node) status(ctx context.Context) *api.StatusReply {
	reply := &api.StatusReply{
		Node: n.cfg.Name, Version: n.opt.Version, Started: timestamppb.New(n.started), Bpffs: n.cfg.Spec.BPFFS,
		Hooks: n.hooks(), Panic: n.grants.standing(), Reasons: make(map[string]uint64), IdentityState: n.identityAndCallers(), Ready: true,
	}
	if why := n.readiness.state(); why != nil {
		reply.Ready, reply.NotReadyWhy = false, oneLine(why.Error())
	}
	if e := n.resources.current(); e != nil {
		reply.Services, reply.Generation, reply.NotEnforced = uint32(len(e.services)), e.generation, notEnforced(e.set)
		reply.Rollouts = n.rollouts.lines(e)
	}
	for _, a := range n.alarms.list() {
		reply.Problems = append(reply.Problems, "alarm "+a.String())
	}
	reply.Problems = append(reply.Problems, n.problems.lines()...)
	for _, read := range []func(context.Context, *api.StatusReply) error{n.proxyStatus, n.proxyParts, n.kernelStatus, n.auditStatus} {
		if err := read(ctx, reply); err != nil {
			reply.Problems = append(reply.Problems, "status: "+oneLine(err.Error()))
		}
	}
	return reply
}

func (n *node) hooks() []*api.HookStatus {
	xdp := make(map[string]string)
	for _, x := range n.datapath.XDP() {
		xdp[x.Device] = fmt.Sprintf("%s: %s", x.Mode, x.Why)
	}
	var out []*api.HookStatus
	for _, d := range n.datapath.Devices() {
		out = append(out, &api.HookStatus{Device: d.Name, Ifindex: uint32(d.Ifindex), Role: string(d.Role), Programs: d.Programs,
			Xdp: xdp[d.Name], Bound: n.bound(d)})
	}
	for _, p := range n.datapath.Backstop() {
		out = append(out, &api.HookStatus{Device: p.Where, Role: "backstop", Programs: []string{p.Program}})
	}
	return out
}

// bound tells whether a pod's device is held to its pod's addresses.
func (n *node) bound(d datapath.Device) string {
	if d.Role != datapath.RolePod && d.Role != datapath.RolePodPort {
		return ""
	}
	if families := n.datapath.Bound(d.Ifindex); families != "" {
		return families
	}
	return "UNBOUND"
}

func (n *node) proxyStatus(_ context.Context, reply *api.StatusReply) (err error) {
	reply.ProxyListening, err = n.proxyListening()
	return err
}

func (n *node) proxyListening() (bool, error) {
	return proxyListening(n.px, n.cfg.Spec.Proxy.ListenPort)
}

func (n *node) kernelStatus(_ context.Context, reply *api.StatusReply) error {
	left, err := n.datapath.LeaseLeft()
	if err != nil {
		return fmt.Errorf("read lease: %w", err)
	}
	reply.LeaseLeft = durationpb.New(max(left, 0))
	paths, err := n.datapath.Paths()
	if err != nil {
		return fmt.Errorf("read paths: %w", err)
	}
	for _, p := range paths {
		if p.State == datapath.PathActive {
			reply.LivePaths++
		}
	}
	flows, err := n.datapath.LiveFlows()
	if err != nil {
		return fmt.Errorf("read live flows: %w", err)
	}
	reply.LiveFlows = uint32(len(flows))
	counters, err := n.datapath.Counters()
	if err != nil {
		return fmt.Errorf("read counters: %w", err)
	}
	for reason, c := range counters {
		reply.Reasons[reason.String()] = c.Packets
	}
	return nil
}

func (n *node) auditStatus(ctx context.Context, reply *api.StatusReply) error {
	s, err := n.audit.Status(ctx)
	if err != nil {
		return fmt.Errorf("read state of audit: %w", err)
	}
	reply.Collector = collectorState(s)
	if s.FlowSpooled > 0 {
		reply.Collector += fmt.Sprintf("; flow records take %d of %d MiB on the disk", (s.SpoolBytes+1<<20-1)>>20, n.cfg.Spec.FlowSpool>>20)
	}
	reply.SpoolCritical, reply.SpoolFlow, reply.LostFlow = s.CriticalPending, s.FlowPending+s.FlowSpooled, s.FlowLost
	for _, problem := range []string{s.StoreProblem, s.SpoolProblem} {
		if problem != "" {
			reply.Problems = append(reply.Problems, fmt.Sprintf("audit: %s; look at the disk of %s, and make room if it is full", oneLine(problem), n.cfg.Spec.StateDir))
		}
	}
	if s.LogProblem != "" {
		reply.Problems = append(reply.Problems, "the collector's log is not the one that it was: "+oneLine(s.LogProblem)+
			"; the agent's journal has both checkpoints: keep them, and ask who runs the collector")
	}
	return nil
}

func collectorState(s audit.Status) string {
	switch {
	case s.Address == "":
		return "none configured: records stay on this node"
	case s.Connected:
		return fmt.Sprintf("connected to %s since %s, its log seen up to leaf %d", s.Address, s.Since.UTC().Format(time.RFC3339), s.LogSize)
	}
	if s.Since.IsZero() {
		return "not met yet (" + s.Address + ")"
	}
	return fmt.Sprintf("away since %s (%s): %s; records wait on this node", s.Since.UTC().Format(time.RFC3339), s.Address, oneLine(s.Problem))
}

// identityState tells of the agent's own identity, which only collector and workloads ask for.
func (n *node) identityAndCallers() string {
	attested, unattested := n.callers.tallies()
	return describeCallers(n.identityState(), attested, unattested)
}

func (n *node) identityState() string {
	if n.identity == nil {
		return "not needed: no collector, no automation"
	}
	s := n.identity.Status()
	text := string(s.State)
	switch s.State {
	case identity.StaleValid:
		text += " until " + s.NotAfter.UTC().Format(time.RFC3339)
	case identity.Expired:
		text += " since " + s.NotAfter.UTC().Format(time.RFC3339)
	}
	if s.Err != nil {
		text += ": " + oneLine(s.Err.Error())
	}
	return text + trustState(n.cfg.Spec.TrustDomain, s.Trusts) + n.brokerState() + remoteState(n.resources.current(), n.broker != nil)
}
