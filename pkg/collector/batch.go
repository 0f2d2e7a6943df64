package collector

import (
	"fmt"

	"golang.org/x/mod/sumdb/note"
	"google.golang.org/protobuf/proto"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/proof"
)

// maxEntries is how many entries a batch has at most. A node sends a few hundred; each costs the writer a row, and all nodes wait for it.
const maxEntries = 4096

// batch is what a node sent of one sequence, and how it is kept.
type batch struct {
	sequence
	entries []*api.Entry
	data    [][]byte // of each entry: an Entry without its number

	seal   proof.Seal
	signed []byte // the seal as it came
	vkey   string // of the node
	turn   int64  // of the stream
}

// decode reads entries from the bytes that are kept of them.
func (b *batch) decode(raw []*api.Raw) error {
	if len(raw) > maxEntries {
		return fmt.Errorf("%w: batch has %d entries, at most %d are taken", errEntry, len(raw), maxEntries)
	}
	for _, r := range raw {
		e := &api.Entry{}
		err := proto.Unmarshal(r.GetData(), e)
		if err == nil {
			err = proof.CheckEntry(r.GetData(), proofLoss(e.GetLoss()), e.GetGrant() != nil)
		}
		if err != nil {
			return fmt.Errorf("%w: entry %d: %w", errEntry, r.GetSeq(), err)
		}
		if b.class == api.Class_CLASS_FLOW && e.GetFlow() == nil && e.GetLoss() == nil && e.GetRecord() != nil {
			return fmt.Errorf("%w: entry %d is of the critical class", errEntry, r.GetSeq()) // readers know an event by its number in that class
		}
		e.Seq = r.GetSeq() // the number that is sealed
		b.entries, b.data = append(b.entries, e), append(b.data, r.GetData())
	}
	return nil
}

// proofLoss is a loss as proofs know it.
func proofLoss(l *api.LossRecord) *proof.Loss {
	if l == nil {
		return nil
	}
	return &proof.Loss{Stage: l.GetStage(), Cause: l.GetCause(), Count: l.GetCount()}
}

// open holds the batch against its seal, as far as that can be done without knowing what is stored.
func (b *batch) open(key note.Verifier) error {
	seal, err := proof.OpenSeal(b.signed, key)
	if err != nil {
		return fmt.Errorf("%w: %w", errEntry, err)
	}
	if seal.Sequence != b.proofSequence() {
		return fmt.Errorf("%w: seal %d is of class %s in epoch %s of node %q", errEntry, seal.Number, seal.Class, seal.Epoch, seal.Node)
	}
	if err := seal.Check(b.proofEntries()); err != nil {
		return fmt.Errorf("%w: %w", errEntry, err)
	}
	end, lost, err := continues(seal.First-1, b.entries)
	switch {
	case err != nil:
		return err
	case end != seal.Last || lost != seal.Lost:
		return fmt.Errorf("%w: seal %d counts %d as lost up to %d, its entries %d up to %d", errEntry, seal.Number, seal.Lost, seal.Last, lost, end)
	}
	b.seal = seal
	return nil
}

func (b *batch) proofEntries() []proof.Entry {
	out := make([]proof.Entry, len(b.entries))
	for i, e := range b.entries {
		out[i] = proof.Entry{Seq: e.GetSeq(), Data: b.data[i]}
	}
	return out
}

// proofSequence is the sequence as it is named in proofs.
func (s sequence) proofSequence() proof.Sequence {
	class := proof.ClassFlow
	if s.class == api.Class_CLASS_CRITICAL {
		class = proof.ClassCritical
	}
	return proof.Sequence{Node: s.node, Epoch: s.epoch, Class: class}
}
