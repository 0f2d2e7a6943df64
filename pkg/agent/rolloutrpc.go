package agent

import (
	"context"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/rollout"
)

// shownClients bounds those that an answer lists of one service.
const shownClients = 20

// Rollouts tells how far roll-outs have come, and what Enforce would do here.
func (o *operators) Rollouts(_ context.Context, req *api.RolloutsRequest) (*api.RolloutsReply, error) {
	reply := &api.RolloutsReply{Node: o.rollouts.node}
	e := o.enforced()
	if e == nil {
		return reply, nil
	}
	for _, r := range e.verified.Rollouts() {
		if req.GetName() == "" || req.GetName() == r.Name {
			reply.Rollouts = append(reply.Rollouts, o.describeRollout(e, r))
		}
	}
	if len(reply.Rollouts) == 0 && req.GetName() != "" {
		return nil, toStatus(noRollout(plain(req.GetName())))
	}
	return reply, nil
}

// StateRollout takes a signed word about a roll-out.
func (o *operators) StateRollout(ctx context.Context, req *api.StateRolloutRequest) (*api.StateRolloutReply, error) {
	r, err := o.rollouts.State(ctx, req.GetStatement(), caller(ctx))
	if err != nil {
		return nil, toStatus(err)
	}
	return &api.StateRolloutReply{Rollout: o.describeRollout(o.enforced(), r)}, nil
}

// HaltRollout lets no wave begin. Every operator may: it opens nothing.
func (o *operators) HaltRollout(ctx context.Context, req *api.HaltRolloutRequest) (*api.HaltRolloutReply, error) {
	halted, err := o.rollouts.Halt(ctx, plain(req.GetName()), orNoReason(plain(req.GetWhy())), caller(ctx))
	if err != nil {
		return nil, toStatus(err)
	}
	return &api.HaltRolloutReply{Halted: halted}, nil
}

func (o *operators) describeRollout(e *enforced, r policy.Rollout) *api.Rollout {
	s := rollout.Follow(r, o.rollouts.state(r.Name))
	out := &api.Rollout{Name: r.Name, Plan: r.Plan(), Phase: string(s.Stands()), Wave: uint32(s.Wave), Since: timestamp(s.Since),
		Baked: s.Baked(r, o.clock.wall()), Changed: timestamp(s.Changed), By: s.By, Why: s.Why, Budget: r.Spec.Budget.String(),
		Auto: r.Spec.Advance == policy.AdvanceAuto}
	for _, w := range r.Spec.Waves {
		out.Waves = append(out.Waves, &api.RolloutWave{Name: w.Name, Mode: string(w.Mode), Bake: durationpb.New(w.Bake.Duration), Here: w.Has(o.rollouts.node)})
	}
	for _, name := range r.Spec.Services {
		out.Services = append(out.Services, o.describeRolledOut(e, r, name))
	}
	return out
}

func (o *operators) describeRolledOut(e *enforced, r policy.Rollout, name string) *api.RolloutService {
	svc, _ := e.set.Service(name)
	out := &api.RolloutService{Name: name, Mode: string(svc.Spec.Mode)}
	out.Served, out.Refused = o.rollouts.watch.within(r, name)
	if svc.Enforced() {
		out.OverBudget = rollout.Spent(r.Spec.Budget, out.Served, out.Refused)
		return out
	}
	f := o.rollouts.watch.forecast(r, name)
	out.WouldRefuse, out.SeenSince = f.refused, timestamp(o.clock.wallAt(f.since))
	out.OverBudget = rollout.Spent(r.Spec.Budget, f.seen-min(f.seen, f.refused), f.refused)
	for _, c := range f.clients[:min(len(f.clients), shownClients)] {
		out.Clients = append(out.Clients, &api.RolloutClient{Address: c.addr.String(), Opens: c.opens, Last: timestamp(o.clock.wallAt(c.last)), Why: oneLine(c.why)})
	}
	row, _ := e.service(name)
	live, err := o.liveAt(row)
	if err != nil {
		out.LiveUnknown = oneLine(err.Error())
	}
	out.Live = uint32(live)
	return out
}

// liveAt counts the connections that Enforce would cut: those that the service has, and that are not under a path.
func (o *operators) liveAt(row datapath.Service) (int, error) {
	all, err := o.datapath.Connections(row)
	if err != nil {
		return 0, err
	}
	flows, err := o.datapath.LiveFlows()
	if err != nil {
		return 0, err
	}
	for _, f := range flows {
		if f.Service == row.Name {
			all--
		}
	}
	return max(all, 0), nil
}

// collectRollouts tells of every roll-out its wave, and its phase.
func (m *metrics) collectRollouts(ch chan<- prometheus.Metric) {
	e := m.node.resources.current()
	if e == nil {
		return
	}
	for _, r := range e.verified.Rollouts() {
		s := rollout.Follow(r, m.node.rollouts.state(r.Name))
		gauge(ch, m.wave, float64(s.Wave), r.Name)
		for _, phase := range []rollout.Phase{rollout.Running, rollout.Halted, rollout.FellBack, rollout.Done} {
			gauge(ch, m.phase, truth(s.Stands() == phase), r.Name, string(phase))
		}
	}
}
