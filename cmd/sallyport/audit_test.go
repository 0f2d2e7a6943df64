package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/proof"
	"github.com/sallyport-dev/sallyport/test/evidence"
)

func write(t *testing.T, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestVerdictsAreExitCodes: they are those of proof.Verdict, whatever it is that went wrong.
func TestVerdictsAreExitCodes(t *testing.T) {
	t.Parallel()
	l := someLog(t)
	lines := l.Bundle(nil)
	file := evidence.Write(t, lines)
	bundle, key := write(t, "bundle", file), write(t, "log.pub", []byte(l.VKey+"\n"))
	foreign := evidence.NewLog(t, "foreign")
	older := write(t, "older", l.Checkpoint(3))
	grown := func(from int64, proved *evidence.Log) string {
		return write(t, "grown", evidence.Write(t, []proof.Line{{Kind: proof.LineCheckpoint, Note: string(proved.Checkpoint(proved.Size())), From: from, Proof: l.Grown(l.Size(), from)}}))
	}
	proved := proof.Line{Kind: proof.LineCheckpoint, Note: string(l.Checkpoint(l.Size())), From: 3, Proof: l.Grown(l.Size(), 3)}
	several := write(t, "several", evidence.Write(t, []proof.Line{proved, {Kind: proof.LineCheckpoint, Note: proved.Note}}))
	fork := evidence.NewLog(t, "") // of the same key, with another history
	for range l.Size() {
		fork.Node("node-x")
	}
	for name, test := range map[string]struct {
		want int
		args []string
	}{
		"proven":                       {0, []string{"verify", bundle, "--key", key}},
		"the key itself":               {0, []string{"verify", bundle, "--key", l.VKey}},
		"a foreign key":                {1, []string{"verify", bundle, "--key", foreign.VKey}},
		"a line less":                  {1, []string{"verify", write(t, "less", evidence.Write(t, slices.Delete(slices.Clone(lines), 2, 3))), "--key", key}},
		"cut off":                      {2, []string{"verify", write(t, "cut", file[:len(file)-20]), "--key", key}},
		"no file":                      {2, []string{"verify", "/nowhere", "--key", key}},
		"a directory":                  {2, []string{"verify", t.TempDir(), "--key", key}},
		"no key":                       {2, []string{"verify", bundle}},
		"no such key":                  {2, []string{"verify", bundle, "--key", "/nowhere"}},
		"not a key":                    {2, []string{"verify", bundle, "--key", bundle}},
		"grew":                         {0, []string{"consistency", older, grown(3, l), "--key", key}},
		"grew, among others":           {0, []string{"consistency", older, several, "--key", key}},
		"the same":                     {0, []string{"consistency", bundle, bundle, "--key", key}},
		"set back":                     {1, []string{"consistency", bundle, older, "--key", key}},
		"two histories":                {1, []string{"consistency", older, grown(3, fork), "--key", key}},
		"two histories of one size":    {1, []string{"consistency", bundle, grown(0, fork), "--key", key}},
		"new of a foreign key":         {1, []string{"consistency", older, write(t, "new", foreign.Checkpoint(0)), "--key", key}},
		"no proof":                     {2, []string{"consistency", older, bundle, "--key", key}},
		"proof of another growth":      {2, []string{"consistency", older, grown(4, l), "--key", key}},
		"old of a foreign key":         {2, []string{"consistency", write(t, "old", foreign.Checkpoint(0)), bundle, "--key", key}},
		"old is nothing":               {2, []string{"consistency", write(t, "none", nil), bundle, "--key", key}},
		"old has no checkpoint":        {2, []string{"consistency", write(t, "end", []byte(`{"kind":"end","count":0}`)), bundle, "--key", key}},
		"no old":                       {2, []string{"consistency", "/nowhere", bundle, "--key", key}},
		"no new":                       {2, []string{"consistency", older, "/nowhere", "--key", key}},
		"no collector":                 {2, []string{"consistency", older, "--key", key}},
		"no collector that is reached": {2, []string{"consistency", older, "--key", key, "--collector", "unix:/nowhere"}},
	} {
		for _, format := range formats {
			r := command(t.Context(), nil, append([]string{"audit", "-o", format}, test.args...)...)
			if r.code != test.want || (r.code == 0) != (r.stderr == "") || (r.code == 0) != strings.Contains(r.stdout, "proven") && r.code == 0 {
				t.Errorf("%s (%s): %+v", name, format, r)
			}
		}
	}
}

// TestVerifyTellsThatEventsMayBeMissing: of a receipt, also beside batches of another sequence, and not of the node's batches themselves.
func TestVerifyTellsThatEventsMayBeMissing(t *testing.T) {
	t.Parallel()
	l := evidence.NewLog(t, "")
	n := l.Node("node-1")
	n.Batch(proof.ClassFlow, evidence.Flow("f"))
	n.Batch(proof.ClassCritical, evidence.Grant("G", "DENIED"), evidence.Grant("G", "ACTIVATED"))
	for name, test := range map[string]struct {
		lines []proof.Line
		want  bool
	}{
		"one event of two":      {l.Bundle(func(line proof.Line) bool { return line.Index == 3 }), true},
		"beside batches":        {l.Bundle(func(line proof.Line) bool { return line.Index <= 3 }), true},
		"the node's own batch":  {l.Bundle(nil), false},
		"that batch and events": {l.Bundle(func(proof.Line) bool { return true }), false},
	} {
		r := command(t.Context(), nil, "audit", "verify", write(t, "bundle", evidence.Write(t, test.lines)), "--key", l.VKey)
		if has := strings.Contains(r.stdout, "others of this grant may be missing"); r.code != 0 || has != test.want {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

// TestConsistencyAsksTheCollector: it is held to what somebody kept, also when it answers with another history; that answer is kept.
func TestConsistencyAsksTheCollector(t *testing.T) {
	t.Parallel()
	c := newCollector(t)
	older := write(t, "older", c.log.Checkpoint(3))
	socket := shortSocket(t)
	defer c.serve(t, socket)()
	ask := func(save string) result {
		return command(t.Context(), nil, "audit", "consistency", older, "--key", c.log.VKey, "--collector", "unix:"+socket, "--save", save)
	}
	saved := filepath.Join(t.TempDir(), "saved")
	if r := ask(saved); r.code != 0 {
		t.Fatalf("the true log: %+v", r)
	}
	if r := command(t.Context(), nil, "audit", "consistency", older, saved, "--key", c.log.VKey); r.code != 0 {
		t.Errorf("what was kept, against the older one: %+v", r)
	}
	size := c.log.Size()
	c.log = evidence.NewLog(t, "")
	for range size {
		c.log.Node("node-x")
	}
	other := filepath.Join(t.TempDir(), "other")
	if r := ask(other); r.code != exitDisproved {
		t.Errorf("another history: %+v", r)
	}
	if r := command(t.Context(), nil, "audit", "consistency", saved, other, "--key", c.log.VKey); r.code != exitDisproved || !strings.Contains(r.stderr, "two roots at 7 leaves") {
		t.Errorf("both that were kept: %+v", r)
	}
}

// TestGaps: what is missing fails, and so does a broken chain; nodes without either do not.
func TestGaps(t *testing.T) {
	t.Parallel()
	c := newCollector(t)
	socket := shortSocket(t)
	defer c.serve(t, socket)()
	ask := func() result { return command(t.Context(), nil, "audit", "gaps", "--collector", "unix:"+socket) }
	c.losses = append(c.losses, &api.StoredLoss{Node: "node-1", Class: api.Class_CLASS_FLOW, Loss: &api.LossRecord{Stage: "agent_spool", Cause: "buffer full", Count: 1, AtMost: true}})
	if r := ask(); r.code != exitFailed || !strings.Contains(r.stdout, "at most 42") || !strings.Contains(r.stderr, "at most 42 records missing") {
		t.Errorf("losses: %+v", r)
	}
	c.losses = nil // their day is gone
	if r := ask(); r.code != exitFailed || !strings.Contains(r.stderr, "41 records missing") {
		t.Errorf("losses of a day that is gone: %+v", r)
	}
	c.nodes = []*api.NodeState{{Node: "node-1", Class: api.Class_CLASS_FLOW, Seq: 5, Seals: 5, ChainBreaks: 1}}
	if r := ask(); r.code != exitFailed || !strings.Contains(r.stderr, "1 break in the chains of seals") {
		t.Errorf("a broken chain: %+v", r)
	}
	c.nodes[0].ChainBreaks = 0
	if r := command(t.Context(), nil, "audit", "gaps", "--node", "nosuch", "--collector", "unix:"+socket); r.code != exitFailed || !strings.Contains(r.stderr, `no node "nosuch"`) {
		t.Errorf("a node that is none: %+v", r)
	}
	if r := ask(); r.code != exitDone || !strings.Contains(r.stdout, "1 to 5") {
		t.Errorf("nothing missing: %+v", r)
	}
}

// TestGapsShowNumbers: which of the kernel's records are missing, where it is known.
func TestGapsShowNumbers(t *testing.T) {
	t.Parallel()
	c := newCollector(t)
	c.losses = nil
	for i := range 5 {
		c.losses = append(c.losses, &api.StoredLoss{Node: "node-1", Class: api.Class_CLASS_FLOW, Loss: &api.LossRecord{Stage: "kernel_ring", Cause: "must_deliver_full", Count: 4,
			Ranges: []*api.CPURange{{Cpu: int32(i), First: 5, Last: 5 + uint64(i)}}}})
	}
	socket := shortSocket(t)
	defer c.serve(t, socket)()
	for format, want := range map[string]string{"table": "cpu 0: 5, cpu 1: 5 to 6, cpu 2: 5 to 7, cpu 3: 5 to 8, and 1 more, with -o json\n",
		"json": `"ranges":[{"cpu":0,"first":5,"last":5},{"cpu":1,"first":5,"last":6},{"cpu":2,"first":5,"last":7},{"cpu":3,"first":5,"last":8},{"cpu":4,"first":5,"last":9}]`} {
		if r := command(t.Context(), nil, "audit", "gaps", "--collector", "unix:"+socket, "-o", format); !strings.Contains(r.stdout, want) {
			t.Errorf("%s: %+v", format, r)
		}
	}
}

// TestGapsShowDifferences: what the kernel counted and nothing explains fails; a counted loss is shown, and what agreed later is not.
func TestGapsShowDifferences(t *testing.T) {
	t.Parallel()
	c := newCollector(t)
	c.losses, c.nodes = nil, nil
	socket := shortSocket(t)
	defer c.serve(t, socket)()
	tide := func(cause string, kernel uint64) *api.StoredTide {
		return &api.StoredTide{Node: "node-1", Tide: &api.Tide{Time: timestamppb.New(began), BootId: "b", Paths: []*api.PathTide{
			{Slot: 1, Grant: "fine", Kernel: &api.Volume{Flows: 1, BytesToServer: 10}, Recorded: &api.Volume{Flows: 1, BytesToServer: 10}},
			{Slot: 2, Grant: "odd", Service: "postgres", Client: "10.1.0.2", Cause: cause, Kernel: &api.Volume{Flows: 3, BytesToServer: kernel, BytesToClient: 7},
				Recorded: &api.Volume{Flows: 1, BytesToServer: 100}, Live: &api.Volume{Flows: 1, BytesToServer: 20, BytesToClient: 8}},
		}}}
	}
	for _, step := range []struct {
		tide   *api.StoredTide
		code   int
		stdout string
		stderr string
	}{
		{tide("moving", 121), exitDone, "nothing is counted as lost\n", ""},
		{tide("unexplained", 123), exitFailed, "node-1  odd    postgres  10.1.0.2  +1     +3 B/+0    -1 B/+0    unexplained  2026", "1 path of which the kernel counted what nothing explains"},
		{tide("counted_loss", 124), exitDone, "+4 B/+0", ""},
		{tide("unexplained", 125), exitFailed, "+5 B/+0", "1 path"},
		{tide("", 120), exitDone, "nothing is counted as lost\n", ""},
	} {
		c.tides = append(c.tides, step.tide)
		r := command(t.Context(), nil, "audit", "gaps", "--collector", "unix:"+socket)
		if r.code != step.code || !strings.Contains(r.stdout, step.stdout) || !strings.Contains(r.stderr, step.stderr) || strings.Contains(r.stdout, "fine") {
			t.Errorf("after %v: %+v", step.tide, r)
		}
	}
}

// olderCollector knows losses, and neither nodes nor a log.
type olderCollector struct {
	api.UnimplementedAuditServer
	newer *collector
}

func (o *olderCollector) Losses(q *api.LossQuery, stream grpc.ServerStreamingServer[api.StoredLoss]) error {
	return o.newer.Losses(q, stream)
}

// TestAnOlderCollectorIsTold: what it knows is shown, and for the rest the error says what it is about.
func TestAnOlderCollectorIsTold(t *testing.T) {
	t.Parallel()
	socket := shortSocket(t)
	defer serveUnix(t, socket, func(s *grpc.Server) { api.RegisterAuditServer(s, &olderCollector{newer: newCollector(t)}) })()
	r := command(t.Context(), nil, "audit", "gaps", "--collector", "unix:"+socket)
	if r.code != exitFailed || !strings.Contains(r.stdout, "agent_spool") || !strings.Contains(r.stderr, "note: this collector is of an older version") {
		t.Errorf("gaps: %+v", r)
	}
	for _, args := range [][]string{{"key"}, {"export"}} {
		r := command(t.Context(), nil, append([]string{"audit", "--collector", "unix:" + socket}, args...)...)
		if r.code != exitFailed || !strings.Contains(r.stderr, "hint: the collector is of an older version") {
			t.Errorf("%v: %+v", args, r)
		}
	}
}

// TestExportLeavesNoHalfFile: what broke off would be taken for the whole.
func TestExportLeavesNoHalfFile(t *testing.T) {
	t.Parallel()
	out := filepath.Join(t.TempDir(), "out")
	if r := command(t.Context(), nil, "audit", "export", "--collector", "unix:/nowhere", "--out", out); r.code != exitUnreachable {
		t.Errorf("%+v", r)
	}
	if _, err := os.Stat(out); err == nil {
		t.Error("a file was left")
	}
}

// shortSocket is a path for a Unix socket, which must be short.
func shortSocket(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "collector.sock")
}
