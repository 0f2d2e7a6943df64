package proof_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"math"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/proof"
	"github.com/sallyport-dev/sallyport/test/evidence"
)

// Lines of the bundle of some.
const (
	atCheckpoint = iota
	atKeyA
	atFlows1
	atEvent1
	atGrants1
	atKeyB
	atFlowsB
	atFlows2
	atEvent2
	atGrants2
	atFlows3
	atEnd
)

// some is a log of two nodes, and the bundle of all that is in it.
func some(t testing.TB) (*evidence.Log, []proof.Line) {
	l := evidence.NewLog(t, "")
	a := l.Node("node-a")
	a.Batch(proof.ClassFlow, evidence.Flow("f1"), evidence.Loss("kernel_ring", "full", 40), evidence.Flow("f2"))
	a.Batch(proof.ClassCritical, evidence.Grant("G", "ACTIVATED"))
	l.Node("node-b").Batch(proof.ClassFlow, evidence.Flow("f3"))
	a.Batch(proof.ClassFlow, evidence.Loss("kernel_ring", "full", 2), evidence.Flow("f4"))
	a.Batch(proof.ClassCritical, evidence.Flow("f5"), evidence.Grant("G", "REVOKED"))
	a.Batch(proof.ClassFlow, evidence.Flow("f6"))
	return l, l.Bundle(func(proof.Line) bool { return true })
}

func verify(t testing.TB, l *evidence.Log, lines []proof.Line) proof.Report {
	t.Helper()
	r, err := proof.Verify(bytes.NewReader(evidence.Write(t, lines)), l.Verifier)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestVerifyTellsWhatIsProven(t *testing.T) {
	t.Parallel()
	l, lines := some(t)
	r := verify(t, l, lines)
	id := func(node, class string) proof.Sequence {
		return proof.Sequence{Node: node, Epoch: evidence.Epoch, Class: class}
	}
	want := proof.Report{Checkpoint: r.Checkpoint, Records: 8, Events: 2, Lost: 42, Sequences: []proof.SequenceReport{
		{Sequence: id("node-a", "flow"), Seals: 3, First: 1, Last: 46, Whole: true, Records: 4, Lost: 42, Losses: []proof.Loss{{Stage: "kernel_ring", Cause: "full", Count: 42}}},
		{Sequence: id("node-a", "critical"), Seals: 2, First: 1, Last: 3, Whole: true, Records: 3, Events: 2},
		{Sequence: id("node-b", "flow"), Seals: 1, First: 1, Last: 1, Whole: true, Records: 1},
	}}
	if !reflect.DeepEqual(r, want) || r.Checkpoint.Size != l.Size() {
		t.Errorf("have\n%+v\nwant\n%+v", r, want)
	}
}

// TestVerifyTakesPartsOfALog: a later time of one node, a grant's events, one record, and a bundle that grew.
func TestVerifyTakesPartsOfALog(t *testing.T) {
	t.Parallel()
	l, lines := some(t)
	later := verify(t, l, evidence.End([]proof.Line{lines[atCheckpoint], lines[atKeyA], lines[atFlows2]}))
	if later.Verdict != proof.Proven || later.Records != 1 || later.Sequences[0].Whole || later.Sequences[0].First != 43 {
		t.Errorf("a later time: %+v", later)
	}
	receipt := verify(t, l, evidence.End([]proof.Line{lines[atCheckpoint], lines[atEvent1], lines[atEvent2]}))
	if receipt.Verdict != proof.Proven || receipt.Records != 0 || receipt.Events != 2 {
		t.Errorf("a receipt: %+v", receipt)
	}
	one := verify(t, l, evidence.End([]proof.Line{lines[atCheckpoint], lines[atKeyA], l.Record(lines[atFlows1], 0), l.Record(lines[atFlows1], 1)}))
	if one.Verdict != proof.Proven || one.Records != 1 || one.Lost != 40 || one.Sequences[0].Seals != 0 {
		t.Errorf("single records: %+v", one)
	}
	from := l.Size()
	l.Node("node-c").Batch(proof.ClassFlow, evidence.Flow("f7"))
	again := proof.Line{Kind: proof.LineCheckpoint, Note: string(l.Checkpoint(l.Size())), From: from, Proof: l.Grown(l.Size(), from)}
	more := append(slices.Clone(lines[:atEnd]), again)
	more = append(more, l.Bundle(nil)[9:11]...)
	if r := verify(t, l, evidence.End(more)); r.Verdict != proof.Proven || r.Records != 9 || r.Checkpoint.Size != l.Size() {
		t.Errorf("a bundle that grew: %+v", r)
	}
	if r := verify(t, l, evidence.End(lines[:1])); r.Verdict != proof.Proven || r.Records != 0 {
		t.Errorf("a bundle of nothing: %+v", r)
	}
}

// clone copies lines as deep as tests change them.
func clone(lines []proof.Line) []proof.Line {
	lines = slices.Clone(lines)
	for i := range lines {
		lines[i].Leaf, lines[i].Proof, lines[i].Entries = bytes.Clone(lines[i].Leaf), slices.Clone(lines[i].Proof), slices.Clone(lines[i].Entries)
		for j := range lines[i].Entries {
			lines[i].Entries[j].Data = bytes.Clone(lines[i].Entries[j].Data)
		}
	}
	return lines
}

func TestVerifyDisprovesEveryChange(t *testing.T) {
	t.Parallel()
	l, whole := some(t)
	swap := func(b []proof.Line, i, j int) []proof.Line { b[i], b[j] = b[j], b[i]; return b }
	without := func(b []proof.Line, i int) []proof.Line { return evidence.End(slices.Delete(b, i, i+1)) }
	for name, change := range map[string]func([]proof.Line) []proof.Line{
		"record changed":      func(b []proof.Line) []proof.Line { b[atFlows1].Entries[0].Data[3] ^= 1; return b },
		"number changed":      func(b []proof.Line) []proof.Line { b[atFlows1].Entries[0].Seq++; return b },
		"records swapped":     func(b []proof.Line) []proof.Line { e := b[atFlows1].Entries; e[0], e[2] = e[2], e[0]; return b },
		"record deleted":      func(b []proof.Line) []proof.Line { b[atFlows1].Entries = b[atFlows1].Entries[1:]; return b },
		"all records deleted": func(b []proof.Line) []proof.Line { b[atFlows1].Entries = nil; return b },
		"record put in": func(b []proof.Line) []proof.Line {
			e := b[atFlows1].Entries
			b[atFlows1].Entries = append(e, e[0])
			return b
		},
		"batch deleted":          func(b []proof.Line) []proof.Line { return without(b, atFlows2) },
		"line deleted, end kept": func(b []proof.Line) []proof.Line { return slices.Delete(b, atEvent1, atEvent1+1) },
		"batches swapped":        func(b []proof.Line) []proof.Line { return swap(b, atFlows1, atFlows2) },
		"batch twice":            func(b []proof.Line) []proof.Line { return evidence.End(slices.Insert(b, atFlows1, b[atFlows1])) },
		"records of another":     func(b []proof.Line) []proof.Line { b[atFlowsB].Entries = b[atFlows1].Entries[:1]; return b },
		"seal changed":           func(b []proof.Line) []proof.Line { b[atFlows1].Leaf[len("sallyport seal v1\n")] ^= 1; return b },
		"place changed":          func(b []proof.Line) []proof.Line { b[atFlows1].Index++; return b },
		"place beyond the log":   func(b []proof.Line) []proof.Line { b[atFlows1].Index = 1 << 40; return b },
		"place before the log":   func(b []proof.Line) []proof.Line { b[atFlows1].Index = -1; return b },
		"proof changed":          func(b []proof.Line) []proof.Line { b[atFlows1].Proof[0][0] ^= 1; return b },
		"proof cut":              func(b []proof.Line) []proof.Line { b[atFlows1].Proof = b[atFlows1].Proof[1:]; return b },
		"event changed":          func(b []proof.Line) []proof.Line { b[atEvent1].Leaf[len(b[atEvent1].Leaf)-1] ^= 1; return b },
		"event twice":            func(b []proof.Line) []proof.Line { return evidence.End(slices.Insert(b, atEvent1, b[atEvent1])) },
		"key changed":            func(b []proof.Line) []proof.Line { b[atKeyA].Leaf[len(b[atKeyA].Leaf)-4] ^= 1; return b },
		"kind changed":           func(b []proof.Line) []proof.Line { b[atEvent1].Kind = proof.LineKey; return b },
		"checkpoint changed": func(b []proof.Line) []proof.Line {
			b[0].Note = strings.Replace(b[0].Note, "\n10\n", "\n11\n", 1)
			return b
		},
		"checkpoint rolled back": func(b []proof.Line) []proof.Line { b[0].Note = string(l.Checkpoint(5)); return b },
		"set back behind another": func(b []proof.Line) []proof.Line {
			return evidence.End(append(b[:atEnd], proof.Line{Kind: "checkpoint", Note: string(l.Checkpoint(5))}))
		},
		"checkpoint of a foreign log": func(b []proof.Line) []proof.Line {
			other, _ := some(t)
			other.Key = evidence.NewKey(t, other.Name(), "foreign")
			b[0].Note = string(other.Checkpoint(l.Size()))
			return b
		},
		"checkpoint without its signature": func(b []proof.Line) []proof.Line { b[0].Note, _, _ = strings.Cut(b[0].Note, "\n— "); return b },
		"split view": func(b []proof.Line) []proof.Line {
			fork := evidence.NewLog(t, "")
			for range 12 {
				fork.Node("node-x")
			}
			again := proof.Line{Kind: "checkpoint", Note: string(fork.Checkpoint(12)), From: l.Size(), Proof: fork.Grown(12, l.Size())}
			return evidence.End(append(b[:atEnd], again))
		},
	} {
		r := verify(t, l, change(clone(whole)))
		if r.Verdict != proof.Disproved || r.Why == "" {
			t.Errorf("%s: %s, %s", name, r.Verdict, r.Why)
		}
	}
	one := l.Record(whole[atFlows1], 0)
	for name, change := range map[string]func(*proof.Line){
		"place":  func(l *proof.Line) { l.At++ },
		"beyond": func(l *proof.Line) { l.At = 1 << 40 },
		"path":   func(l *proof.Line) { l.Path = []tlog.Hash{l.Path[0], l.Path[0]} },
		"none":   func(l *proof.Line) { l.Path = nil },
		"data":   func(l *proof.Line) { l.Entries = []proof.Entry{{Seq: 1, Data: []byte("x")}} },
		"number": func(l *proof.Line) { l.Entries = []proof.Entry{{Seq: 2, Data: l.Entries[0].Data}} },
	} {
		changed := one
		change(&changed)
		if r := verify(t, l, evidence.End([]proof.Line{whole[0], whole[atKeyA], changed})); r.Verdict != proof.Disproved {
			t.Errorf("record, %s: %s, %s", name, r.Verdict, r.Why)
		}
	}
	if r := verify(t, l, evidence.End([]proof.Line{whole[0], whole[atKeyA], one, one})); r.Verdict != proof.Disproved {
		t.Errorf("record twice: %s", r.Verdict)
	}
	batch := whole[atFlows1]
	for name, both := range map[string][]proof.Line{"batch, then its record": {batch, one}, "record, then its batch": {one, batch}, "batch twice": {batch, batch}} {
		lines := append([]proof.Line{whole[0], whole[atKeyA]}, both...)
		if r := verify(t, l, evidence.End(lines)); r.Verdict != proof.Disproved || !strings.Contains(r.Why, "twice") {
			t.Errorf("%s: %s, %s", name, r.Verdict, r.Why)
		}
	}
}

// TestVerifyDisprovesWhatTheLogItselfHas: a node, or a collector, that signs what does not fit.
func TestVerifyDisprovesWhatTheLogItselfHas(t *testing.T) {
	t.Parallel()
	for name, make := range map[string]func(*evidence.Log, *evidence.Node){
		"a seal left out": func(_ *evidence.Log, n *evidence.Node) {
			n.Seal("flow", func(s *proof.Seal) { s.Number++ }, evidence.Flow("f2"))
		},
		"a seal again": func(_ *evidence.Log, n *evidence.Node) {
			n.Seal("flow", func(s *proof.Seal) { s.Number-- }, evidence.Flow("f2"))
		},
		"another seal before": func(_ *evidence.Log, n *evidence.Node) {
			n.Seal("flow", func(s *proof.Seal) { s.Before[0] ^= 1 }, evidence.Flow("f2"))
		},
		"numbers again": func(_ *evidence.Log, n *evidence.Node) {
			n.Seal("flow", func(s *proof.Seal) { s.First-- }, evidence.Flow("f2"))
		},
		"numbers left out": func(_ *evidence.Log, n *evidence.Node) { n.Skip("flow", 3); n.Batch("flow", evidence.Flow("f2")) },
		"a number left out": func(_ *evidence.Log, n *evidence.Node) {
			f := evidence.Flow("f3")
			f.Seq = 4
			n.Batch("flow", evidence.Flow("f2"), f)
		},
		"fewer lost than said": func(_ *evidence.Log, n *evidence.Node) {
			n.Seal("flow", func(s *proof.Seal) { s.Lost++ }, evidence.Loss("a", "b", 2))
		},
		"more lost than said": func(_ *evidence.Log, n *evidence.Node) {
			n.Seal("flow", func(s *proof.Seal) { s.Lost-- }, evidence.Loss("a", "b", 2))
		},
		"a loss of none": func(_ *evidence.Log, n *evidence.Node) {
			n.Batch("flow", evidence.Flow("f2"), evidence.Loss("a", "b", 0), evidence.Flow("f3"))
		},
		"numbers that go round": func(_ *evidence.Log, n *evidence.Node) { // 2 to math.MaxInt64 are lost, and again, and it still fits in 64 bits
			const last = math.MaxInt64
			entries := []*api.Entry{evidence.Loss("a", "b", last-1), evidence.Loss("a", "b", last), evidence.Loss("a", "b", 4), evidence.Loss("a", "b", last-2)}
			n.Seal("flow", func(s *proof.Seal) { s.Last, s.Lost = last, last-1 }, entries...)
		},
		"the first follows another": func(l *evidence.Log, _ *evidence.Node) {
			l.Node("node-b").Seal("flow", func(s *proof.Seal) { s.Before[0] ^= 1 }, evidence.Flow("f2"))
		},
		"forgotten, but not at first": func(_ *evidence.Log, n *evidence.Node) {
			n.Seal("flow", func(s *proof.Seal) { s.Number += 3 }, evidence.Flow("f2"), evidence.Loss("collector", "forgotten", 2))
		},
		"forgotten, with an older number": func(_ *evidence.Log, n *evidence.Node) {
			n.Seal("flow", func(s *proof.Seal) { s.Number-- }, evidence.Loss("collector", "forgotten", 2))
		},
		"another loss at first": func(_ *evidence.Log, n *evidence.Node) {
			n.Seal("flow", func(s *proof.Seal) { s.Number += 3 }, evidence.Loss("kernel_ring", "full", 2))
		},
		"forgotten by somebody else": func(_ *evidence.Log, n *evidence.Node) {
			n.Seal("flow", func(s *proof.Seal) { s.Number += 3 }, evidence.Loss("agent_store", "forgotten", 2))
		},
		"lost at the collector otherwise": func(_ *evidence.Log, n *evidence.Node) {
			n.Seal("flow", func(s *proof.Seal) { s.Number += 3 }, evidence.Loss("collector", "other", 2))
		},
		"a seal before its key": func(l *evidence.Log, _ *evidence.Node) {
			l.Append(evidence.NewLog(t, "").Node("node-b").Unlogged("flow", nil, evidence.Flow("f2")))
			l.Node("node-b")
		},
		"two keys of a node": func(l *evidence.Log, _ *evidence.Node) {
			other := evidence.NewKey(l.T(), proof.NodeSigner("node-a", evidence.Epoch), "other")
			l.Append(proof.Line{Kind: proof.LineKey, Leaf: proof.KeyLeaf("node-a", evidence.Epoch, other.VKey)})
		},
		"a seal of another node": func(l *evidence.Log, n *evidence.Node) {
			l.Node("node-b")
			n.Seal("flow", func(s *proof.Seal) {
				s.Node, s.Number, s.First, s.Last, s.Before = "node-b", 1, 1, 1, proof.Follows(nil)
			}, first(evidence.Flow("f2")))
		},
		"two records in one": func(_ *evidence.Log, n *evidence.Node) { // of one kind to one reader, and of another to the next
			n.Batch("flow", with(evidence.Flow("f2"), evidence.Data(t, evidence.Grant("G", "ACTIVATED"))))
		},
		"no record": func(_ *evidence.Log, n *evidence.Node) { n.Batch("flow", with(evidence.Flow("f2"), []byte{0xff})) },
		"another event than was sealed": func(l *evidence.Log, n *evidence.Node) {
			id := proof.Sequence{Node: "node-a", Epoch: evidence.Epoch, Class: "critical"}
			l.Append(proof.Line{Kind: proof.LineEvent, Leaf: proof.EventLeaf(id, proof.Entry{Seq: 1, Data: evidence.Data(l.T(), evidence.Grant("G", "REVOKED"))})})
			n.Batch("critical", evidence.Grant("G", "ACTIVATED"))
		},
	} {
		l := evidence.NewLog(t, "")
		n := l.Node("node-a")
		n.Batch("flow", evidence.Flow("f1"))
		make(l, n)
		all := l.Bundle(func(proof.Line) bool { return true })
		lines := all[:1:1]
		for _, isKey := range []bool{true, false} { // keys first
			for _, line := range all[1 : len(all)-1] {
				if isKey == (line.Kind == proof.LineKey) {
					lines = append(lines, line)
				}
			}
		}
		if r := verify(t, l, evidence.End(lines)); r.Verdict != proof.Disproved {
			t.Errorf("%s: %s, %s", name, r.Verdict, r.Why)
		}
	}
}

// TestVerifyHoldsASingleRecordToItsSeal: it has a number of its seal, and loses no more than that says.
func TestVerifyHoldsASingleRecordToItsSeal(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		change func(*proof.Seal)
		lost   uint64
		want   proof.Verdict
	}{
		"as it is":   {nil, 2, proof.Proven},
		"before":     {func(s *proof.Seal) { s.First, s.Last = 5, 6 }, 2, proof.Disproved},
		"behind":     {func(s *proof.Seal) { s.Last = 2 }, 2, proof.Disproved},
		"loses more": {func(s *proof.Seal) { s.Lost = 1 }, 2, proof.Disproved},
		"loses none": {nil, 0, proof.Disproved},
	} {
		l := evidence.NewLog(t, "")
		batch := l.Node("node-a").Seal("flow", test.change, evidence.Flow("f1"), evidence.Flow("f2"), evidence.Loss("a", "b", test.lost))
		lines := l.Bundle(func(line proof.Line) bool { return line.Kind == proof.LineKey })
		if r := verify(t, l, evidence.End(append(lines[:2], l.Record(batch, 2)))); r.Verdict != test.want {
			t.Errorf("%s: %s, %s", name, r.Verdict, r.Why)
		}
	}
}

// first is an entry with the number 1.
func first(e *api.Entry) *api.Entry {
	e.Seq = 1
	return e
}

// with puts bytes behind those of an entry.
func with(e *api.Entry, more []byte) *api.Entry {
	e.ProtoReflect().SetUnknown(more)
	return e
}

// TestVerifyDisprovesALogInAnotherOrder: seals that follow each other stand in the log in that order.
func TestVerifyDisprovesALogInAnotherOrder(t *testing.T) {
	t.Parallel()
	l := evidence.NewLog(t, "")
	n := l.Node("node-a")
	one, two := n.Unlogged("flow", nil, evidence.Flow("f1")), n.Unlogged("flow", nil, evidence.Flow("f2"))
	two.Index = l.Append(two)
	one.Index = l.Append(one)
	lines := append(l.Bundle(func(line proof.Line) bool { return line.Kind == proof.LineKey })[:2], l.Prove(one), l.Prove(two))
	if r := verify(t, l, evidence.End(lines)); r.Verdict != proof.Disproved || !strings.Contains(r.Why, "stands in the log before") {
		t.Errorf("have %s, %s", r.Verdict, r.Why)
	}
}

// TestVerifyTakesABreakThatTheNodeTells: the collector was set back, and the node goes on with its own chain.
func TestVerifyTakesABreakThatTheNodeTells(t *testing.T) {
	t.Parallel()
	l := evidence.NewLog(t, "")
	n := l.Node("node-a")
	n.Batch("flow", evidence.Flow("f1"))
	n.Seal("flow", func(s *proof.Seal) { s.Number, s.Before = 9, proof.Follows([]byte("forgotten")) }, evidence.Loss("collector", "forgotten", 30), evidence.Flow("f2"))
	n.Batch("flow", evidence.Flow("f3"))
	r := verify(t, l, l.Bundle(nil))
	if r.Verdict != proof.Proven || r.Sequences[0].Breaks != 1 || r.Lost != 30 || r.Records != 3 {
		t.Errorf("have %+v", r)
	}
}

func TestVerifyCannotTell(t *testing.T) {
	t.Parallel()
	l, lines := some(t)
	file := evidence.Write(t, lines)
	with := func(line string) []byte {
		return append(bytes.Clone(file[:bytes.LastIndexByte(file[:len(file)-1], '\n')+1]), line...)
	}
	for name, data := range map[string][]byte{
		"nothing":          nil,
		"without its end":  with(""),
		"cut off":          file[:len(file)/2],
		"no JSON":          with("x\n"),
		"other JSON":       with("[]\n"),
		"an empty line":    with("\n"),
		"two in one":       with(`{"kind":"end","count":11} {"kind":"end","count":11}` + "\n"),
		"an unknown kind":  with(`{"kind":"proven"}` + "\n"),
		"an unknown field": with(`{"kind":"end","count":11,"verdict":"proven"}` + "\n"),
		"more behind":      append(bytes.Clone(file), file...),
		"no checkpoint":    evidence.Write(t, evidence.End(lines[1:])),
		"only an end":      evidence.Write(t, evidence.End(nil)),
		"no key":           evidence.Write(t, evidence.End(slices.Delete(slices.Clone(lines), atKeyA, atKeyA+1))),
		"no record":        evidence.Write(t, evidence.End([]proof.Line{lines[0], lines[atKeyA], {Kind: proof.LineRecord, Index: lines[atFlows1].Index, Leaf: lines[atFlows1].Leaf, Proof: lines[atFlows1].Proof}})),
	} {
		r, err := proof.Verify(bytes.NewReader(data), l.Verifier)
		if err != nil || r.Verdict != proof.CannotTell || r.Why == "" {
			t.Errorf("%s: %s, %s, %v", name, r.Verdict, r.Why, err)
		}
	}
	if r, err := proof.Verify(endless{}, l.Verifier); err != nil || r.Verdict != proof.CannotTell {
		t.Errorf("a line without an end: %s, %v", r.Verdict, err)
	}
	broken := errors.New("disk is broken")
	r, err := proof.Verify(io.MultiReader(bytes.NewReader(file[:len(file)/2]), iotest.ErrReader(broken)), l.Verifier)
	if !errors.Is(err, broken) || r.Verdict != proof.CannotTell {
		t.Errorf("a reader that fails: %s, %v", r.Verdict, err)
	}
	r, err = proof.Verify(bytes.NewReader(bytes.TrimSuffix(file, []byte("\n"))), l.Verifier)
	if err != nil || r.Verdict != proof.Proven {
		t.Errorf("without the last line's end: %s, %v", r.Verdict, err)
	}
}

// endless is a line that goes on.
type endless struct{}

func (endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 'x'
	}
	return len(p), nil
}

// TestVerifyNeedsLittleMemory: what nobody signed makes a reader hold little more than a line. It is not parallel: all memory is its own.
func TestVerifyNeedsLittleMemory(t *testing.T) {
	l, lines := some(t)
	begin := evidence.Write(t, lines[:atFlows1])
	one := string(bytes.TrimSuffix(evidence.Write(t, lines[atFlows1:atFlows1+1]), []byte("\n")))
	signed, _, _ := strings.Cut(one, `"entries":`)
	long := func(head, element string) []byte {
		const room = 4 << 20
		return append(bytes.Clone(begin), head+"["+strings.Repeat(element+",", room/(len(element)+1))+element+"]}\n"...)
	}
	for name, test := range map[string]struct {
		file []byte
		want proof.Verdict
	}{
		"records of no seal":        {long(`{"kind":"batch","entries":`, "{}"), proof.Disproved},
		"more records than sealed":  {long(signed+`"entries":`, "{}"), proof.Disproved},
		"records where none belong": {long(`{"kind":"checkpoint","entries":`, "{}"), proof.CannotTell},
	} {
		for reader, read := range map[string]func() bool{
			"verify": func() bool {
				r, err := proof.Verify(bytes.NewReader(test.file), l.Verifier)
				return err == nil && r.Verdict == test.want
			},
			"checkpoints": func() bool {
				for range proof.Checkpoints(bytes.NewReader(test.file)) {
				}
				return true
			},
		} {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			ok := read()
			runtime.ReadMemStats(&after)
			if took := (after.TotalAlloc - before.TotalAlloc) >> 20; !ok || took > 48 {
				t.Errorf("%s of %s: as it should be: %t, with %d MiB", reader, name, ok, took)
			}
		}
	}
}

// TestVerifyReadsWhatACollectorTakes: a batch of more records than that is not decoded, and nothing said of it.
func TestVerifyReadsWhatACollectorTakes(t *testing.T) {
	t.Parallel()
	for count, want := range map[int]proof.Verdict{4096: proof.Proven, 4097: proof.CannotTell} {
		l := evidence.NewLog(t, "")
		l.Node("node-a").Batch("flow", slices.Repeat([]*api.Entry{evidence.Flow("f")}, count)...)
		if r := verify(t, l, l.Bundle(nil)); r.Verdict != want {
			t.Errorf("%d records: %s, %s", count, r.Verdict, r.Why)
		}
	}
}

// TestVerifyFindsEveryByte: whichever byte of a bundle has another bit, it is not proven, or says the same.
func TestVerifyFindsEveryByte(t *testing.T) {
	t.Parallel()
	l := evidence.NewLog(t, "")
	l.Node("node-a").Batch(proof.ClassCritical, evidence.Grant("G", "ACTIVATED"), evidence.Flow("f1"))
	file := evidence.Write(t, l.Bundle(func(proof.Line) bool { return true }))
	for i := range file {
		changed := bytes.Clone(file)
		changed[i] ^= 1 << (i % 8)
		holds(t, l, file, changed)
	}
}

// holds fails if what is proven is not what the whole bundle has.
func holds(t *testing.T, l *evidence.Log, whole, data []byte) {
	r, err := proof.Verify(bytes.NewReader(data), l.Verifier)
	if err != nil || r.Verdict != proof.Proven {
		return
	}
	truth := parse(t, whole)
	for _, line := range parse(t, data) {
		if line.Kind != proof.LineCheckpoint && line.Kind != proof.LineEnd && !slices.ContainsFunc(truth, func(w proof.Line) bool { return within(line, w) }) {
			t.Fatalf("proven was\n%+v\nwhich the log does not have", line)
		}
	}
}

// within tells whether a line is one of the log's, or one record of it.
func within(line, of proof.Line) bool {
	if line.Index != of.Index || !bytes.Equal(line.Leaf, of.Leaf) {
		return false
	}
	if line.Kind == proof.LineRecord {
		return slices.ContainsFunc(of.Entries, func(e proof.Entry) bool {
			return e.Seq == line.Entries[0].Seq && bytes.Equal(e.Data, line.Entries[0].Data)
		})
	}
	return line.Kind == of.Kind && reflect.DeepEqual(line.Entries, of.Entries)
}

func parse(t *testing.T, data []byte) (lines []proof.Line) {
	for text := range bytes.Lines(data) {
		var l proof.Line
		if err := json.Unmarshal(text, &l); err != nil {
			t.Fatal(err)
		}
		lines = append(lines, l)
	}
	return lines
}

// FuzzVerify: nothing ends it, and nothing is proven that the log does not have.
func FuzzVerify(f *testing.F) {
	l, lines := some(f)
	whole := evidence.Write(f, lines)
	f.Add(whole)
	f.Add(evidence.Write(f, evidence.End([]proof.Line{lines[0], lines[atKeyA], l.Record(lines[atFlows1], 2)})))
	f.Add(evidence.Write(f, evidence.End([]proof.Line{lines[0], lines[atEvent1]})))
	f.Fuzz(func(t *testing.T, data []byte) { holds(t, l, whole, data) })
}

// TestFieldsAreThoseOfTheWire: the proof reads sealed bytes without the types of the wire, and sees the same in them.
func TestFieldsAreThoseOfTheWire(t *testing.T) {
	t.Parallel()
	l := evidence.NewLog(t, "")
	n := l.Node("node-a")
	loss := &api.LossRecord{Stage: "s", Cause: "c", Count: 3, AtMost: true, Ranges: []*api.CPURange{{Cpu: 1, First: 2, Last: 3}}}
	n.Batch("flow", &api.Entry{Record: &api.Entry_Loss{Loss: loss}}, evidence.Flow("f1"))
	n.Batch("critical", evidence.Grant("G", "ACTIVATED"), &api.Entry{Record: &api.Entry_Tide{Tide: &api.Tide{BootId: "b"}}})
	r := verify(t, l, l.Bundle(nil))
	if r.Verdict != proof.Proven || !reflect.DeepEqual(r.Sequences[0].Losses, []proof.Loss{{Stage: "s", Cause: "c", Count: 3}}) || r.Records != 3 {
		t.Errorf("have %+v", r)
	}
}
