package e2e_test

import (
	"context"
	"iter"
	"math/rand/v2"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
)

// questionFigures are of one kind.
type questionFigures struct {
	name string
	took []time.Duration
	rows int // of all answers
}

// questions are what people ask a collector, of the records that simulated nodes delivered.
type questions struct {
	plan   auditPlan
	audit  *client.Audit
	random *rand.Rand
	nodes  []*api.NodeState // the flow class of each
	end    time.Time        // of the records' times
}

// measureQuestions asks, one after the other.
func measureQuestions(t *testing.T, plan auditPlan, audit *client.Audit) (all []questionFigures) {
	t.Helper()
	q := &questions{plan: plan, audit: audit, random: rand.New(rand.NewPCG(1, 2)), end: time.Now()}
	reply, err := audit.Nodes(t.Context())
	must(t, err)
	for _, n := range reply.GetNodes() {
		if n.GetClass() == api.Class_CLASS_FLOW && n.GetNode() != nodeName {
			q.nodes = append(q.nodes, n)
		}
	}
	for _, kind := range []struct {
		name  string
		least int // records in each answer
		ask   func(context.Context) (int, error)
	}{
		{"newest 100", 100, q.flows(func(*api.FlowQuery) {})},
		{"newest 100 of one identity of 2,000", 1, q.flows(func(r *api.FlowQuery) { r.Identity = drawnRecord(q.node(), 0, q.end).Identity })},
		{"an identity that came once", 1, q.flows(func(r *api.FlowQuery) { r.Identity = visitor })},
		{"an identity that never came", 0, q.flows(func(r *api.FlowQuery) { r.Identity = visitor + "-no" })},
		{"flows under one grant", 1, q.flows(func(r *api.FlowQuery) { r.Grant, r.Limit = q.grant(), 1000 })},
		{"newest 100 of one service in a quarter of an hour", 0, q.flows(q.serviceAndTime)},
		{"newest 100 denials for one of 5 reasons", 1, q.flows(func(r *api.FlowQuery) {
			r.Verdict, r.Reason = "DENIED", drawnReasons[q.random.IntN(len(drawnReasons))].String()
		})},
		{"newest 100 denials for a rare reason", 1, q.flows(func(r *api.FlowQuery) { r.Verdict, r.Reason = "DENIED", rareReason.String() })},
		{"newest 100 of one client", 0, q.flows(func(r *api.FlowQuery) {
			r.Client = drawnClient(q.node(), q.random.IntN(clientsOfNode)).String()
		})},
		{"newest 100 of one node", 1, q.flows(func(r *api.FlowQuery) { r.Node = q.nodes[q.random.IntN(len(q.nodes))].GetNode() })},
		{"evidence of one record", 1, q.record},
		{"receipt of one grant", 1, q.receipt},
	} {
		f := questionFigures{name: kind.name}
		for began := time.Now(); len(f.took) < plan.queries && time.Since(began) < plan.patient; {
			start := time.Now()
			n, err := kind.ask(t.Context())
			must(t, err)
			f.took = append(f.took, time.Since(start))
			if f.rows += n; n < kind.least {
				t.Errorf("%s: %d records", kind.name, n)
			}
		}
		all = append(all, f)
	}
	return all
}

func (q *questions) node() int { return q.random.IntN(q.plan.nodes) }

// each is how many records a node made.
func (q *questions) each() int { return q.plan.records / q.plan.nodes }

func (q *questions) grant() string { return drawnGrant(q.node(), q.random.IntN(q.each())) }

func (q *questions) serviceAndTime(r *api.FlowQuery) {
	const window = fleetDay / 80
	since := q.end.Add(-fleetDay + time.Duration(q.random.Int64N(int64(fleetDay-window))))
	r.Service, r.Since, r.Until = drawnService(q.node()*servicesOfNode%drawnServices), timestamppb.New(since), timestamppb.New(since.Add(window))
}

func (q *questions) flows(narrow func(*api.FlowQuery)) func(context.Context) (int, error) {
	return func(ctx context.Context) (int, error) {
		r := &api.FlowQuery{Limit: 100}
		narrow(r)
		return counted(q.audit.Flows(ctx, r))
	}
}

func (q *questions) record(ctx context.Context) (int, error) {
	of := q.nodes[q.random.IntN(len(q.nodes))]
	return counted(q.audit.Evidence(ctx, &api.EvidenceRequest{Node: of.GetNode(), Epoch: of.GetEpoch(), Class: of.GetClass(), Seq: 1 + q.random.Uint64N(of.GetSeq())}))
}

func (q *questions) receipt(ctx context.Context) (int, error) {
	return counted(q.audit.Evidence(ctx, &api.EvidenceRequest{Grant: q.grant()}))
}

// counted reads an answer to its end.
func counted[M any](answer iter.Seq2[M, error]) (n int, err error) {
	for _, err := range answer {
		if err != nil {
			return n, err
		}
		n++
	}
	return n, nil
}
