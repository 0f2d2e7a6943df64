package collector

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/proof"
)

// An address may have a zone, which is any text. No engine refuses a record for it, and what is looked for is found.
func TestZones(t *testing.T) { onEngines(t, testZones) }

func testZones(t *testing.T, i ids) {
	r := start(t, i, nil)
	n, _ := r.connect(t, "node-1", epoch1)
	n.store(flows, flowEntry(1, func(f *api.FlowRecord) { f.Client = "[fe80::1%a\x00b]:4000" }),
		flowEntry(2, func(f *api.FlowRecord) {
			f.Client, f.Server = "[fe80::1%eth0]:4000", "[fe80::2%"+strings.Repeat("z\x00", 1<<16)+"]:1"
		}))
	if got := r.flows(t, &api.FlowQuery{}); len(got) != 2 {
		t.Errorf("%d records", len(got))
	}
	if got := seqs(r.flows(t, &api.FlowQuery{Client: "fe80::1%eth0"})); len(got) != 1 || got[0] != 2 {
		t.Errorf("with the zone: %v", got)
	}
}

// What one node says cannot take the proof from what others say: it is refused, or a proof takes it.
func TestNodeCannotSpoilEvidence(t *testing.T) {
	r := start(t, newIDs(t), nil)
	honest, _ := r.connect(t, "node-1", epoch1)
	honest.store(flows, flowEntries(1, 3)...)

	signer, vkey := nodeSigner(t, "node-2", epoch1)
	for _, key := range []string{vkey[:len(vkey)-4] + "\n" + vkey[len(vkey)-4:], vkey + "\r", vkey + strings.Repeat("\n", 1<<20)} {
		n := r.open(t, "node-2")
		n.send(&api.AgentFrame{Frame: &api.AgentFrame_Hello{Hello: &api.Hello{Node: "node-2", Epoch: epoch1, Version: wireVersion, NodeKey: key}}})
		b := must((&chain{}).seal(sequence{"node-2", epoch1, flows}, flowEntries(1, 2), signer, nil))(t)
		n.sendBatch(b)
		n.refused(codes.InvalidArgument)
	}

	n, _ := r.connect(t, "node-2", epoch1)
	forgotten := &api.Entry{Seq: 5, Record: &api.Entry_Loss{Loss: &api.LossRecord{Stage: stageCollector, Cause: causeForgotten, Count: 5}}}
	n.sendBatch(n.sealed(flows, []*api.Entry{forgotten}, func(s *proof.Seal) { s.Before = proof.Follows([]byte("another")) }))
	n.refused(codes.FailedPrecondition)

	report := must(proof.Verify(bytes.NewReader(r.evidence(t, &api.EvidenceRequest{})), r.logKeyOf(t)))(t)
	if report.Verdict != proof.Proven || report.Records != 3 {
		t.Errorf("%v: %d records, %s", report.Verdict, report.Records, report.Why)
	}
}

// Grant events are of the critical class: readers name them by their number in it.
func TestFlowClassHasFlows(t *testing.T) {
	r := start(t, newIDs(t), nil)
	for i, e := range []*api.Entry{grantEntry(1, "g1", "REVOKED"), {Seq: 1, Record: &api.Entry_Tide{Tide: &api.Tide{}}}} {
		n, _ := r.connect(t, fmt.Sprint("node-", i), epoch1)
		n.batch(flows, e)
		n.refused(codes.InvalidArgument)
	}
	n, _ := r.connect(t, "node-1", epoch1)
	n.store(critical, grantEntry(1, "g1", "REVOKED"), flowEntry(2, nil))
	n.store(flows, lossEntry(1, 1), flowEntry(2, nil))
}

// open is a stream of a node that has not said anything.
func (r *running) open(t *testing.T, name string) *node {
	t.Helper()
	return &node{t: t, name: name, epoch: epoch1, chains: map[api.Class]*chain{}, stream: must(api.NewAuditIngestClient(r.dial(t, r.ids.of(agentPath+name))).Stream(t.Context()))(t)}
}
