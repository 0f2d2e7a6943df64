package audit

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"google.golang.org/protobuf/proto"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/proof"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// Notes in the store that seals need.
const (
	noteSealKey       = "seal-key" // private key and public key, on a line each
	noteAckedCritical = "acked/critical"
	noteAckedFlow     = "acked/flow"
)

// entry is a record or a loss on its way.
type entry struct {
	proof.Entry
	lost uint64 // numbers that it counts as lost
}

// encode makes the bytes that are sealed: those of the entry without its number.
func encode(e *api.Entry) (entry, error) {
	data, err := proto.Marshal(&api.Entry{Record: e.GetRecord()})
	if err != nil {
		return entry{}, fmt.Errorf("encode entry %d: %w", e.GetSeq(), err)
	}
	return entry{proof.Entry{Seq: e.GetSeq(), Data: data}, e.GetLoss().GetCount()}, nil
}

func encodeAll(from []*api.Entry) ([]entry, error) {
	out := make([]entry, 0, len(from))
	for _, e := range from {
		to, err := encode(e)
		if err != nil {
			return nil, err
		}
		out = append(out, to)
	}
	return out, nil
}

// link is a signed seal, as the next one of its sequence has to know it. The zero value is what the first one follows.
type link struct {
	number, last uint64
	signed       []byte
}

// acked are the last seals that the collector is known to have, of each class.
type acked struct{ critical, flow link }

// notes are nil as long as there is nothing to keep.
func (l link) notes(name string) []store.Note {
	if l.signed == nil {
		return nil
	}
	return []store.Note{{Name: name, Data: l.signed}}
}

// sealer makes the seals of one epoch of a node, and knows them again.
type sealer struct {
	node, epoch string
	signer      note.Signer
	verifier    note.Verifier
	vkey        string
}

// newSealer makes a key. What comes back with it is its note.
func newSealer(node, epoch string) (*sealer, []byte, error) {
	skey, vkey, err := note.GenerateKey(rand.Reader, proof.NodeSigner(node, epoch))
	if err != nil {
		return nil, nil, err
	}
	data := []byte(skey + "\n" + vkey)
	k, err := parseSealer(node, epoch, data)
	return k, data, err
}

// parseSealer reads a key's note. One of another node or epoch is refused.
func parseSealer(node, epoch string, data []byte) (*sealer, error) {
	skey, vkey, _ := strings.Cut(string(data), "\n")
	k := &sealer{node: node, epoch: epoch, vkey: vkey}
	var serr, verr error
	k.signer, serr = note.NewSigner(skey)
	k.verifier, verr = note.NewVerifier(vkey)
	if err := errors.Join(serr, verr); err != nil {
		return nil, err
	}
	if name := proof.NodeSigner(node, epoch); k.signer.Name() != name || k.verifier.Name() != name {
		return nil, fmt.Errorf("it is the key of %s, not of %s", k.signer.Name(), name)
	}
	return k, nil
}

func (k *sealer) sequence(class api.Class) proof.Sequence {
	if class == api.Class_CLASS_CRITICAL {
		return proof.Sequence{Node: k.node, Epoch: k.epoch, Class: proof.ClassCritical}
	}
	return proof.Sequence{Node: k.node, Epoch: k.epoch, Class: proof.ClassFlow}
}

// seal makes the seal after another one, over entries that go on above number after.
func (k *sealer) seal(class api.Class, before link, after uint64, entries []entry) (link, error) {
	sealed := make([]proof.Entry, len(entries))
	var lost uint64
	for i, e := range entries {
		sealed[i] = e.Entry
		lost += e.lost
	}
	s := proof.Seal{Sequence: k.sequence(class), Number: before.number + 1, First: after + 1, Last: sealed[len(sealed)-1].Seq,
		Entries: len(sealed), Lost: lost, Root: proof.Root(sealed), Before: proof.Follows(before.signed)}
	signed, err := s.Sign(k.signer)
	if err != nil {
		return link{}, err
	}
	return link{s.Number, s.Last, signed}, nil
}

// open reads a seal of the node's own. It has to be as the node makes it, to the byte: a note stays valid when somebody adds a
// signature to it, but it is not what the next seal follows any more.
func (k *sealer) open(class api.Class, signed []byte) (link, error) {
	s, err := proof.OpenSeal(signed, k.verifier)
	if err != nil {
		return link{}, err
	}
	made, err := s.Sign(k.signer)
	if err != nil {
		return link{}, err
	}
	if s.Sequence != k.sequence(class) || !bytes.Equal(made, signed) {
		return link{}, errors.New("open seal: it is not one of this sequence")
	}
	return link{s.Number, s.Last, made}, nil
}

// judge says from which number and after which seal a class goes on at a collector that has it up to number at, and shows the last
// seal that it has of it. What is wrong with that comes back in words for people. A collector that lies gets its records all the
// same: they must not fill the node, and what it does with them is its own. But it gets all of them: a number that no seal bears out
// is not one up to which anything was sent.
//
// Its seal may be later than the one that the node keeps: an acknowledgement was lost. If it is an earlier one, the chain goes on
// from the node's own, so that no number is used twice, behind the loss that counts what the collector no longer has. Two that reach
// as far, or one that reaches further and is not later, are of two collectors that do not know of each other: what this one
// has is all that can be gone on from.
func (k *sealer) judge(class api.Class, kept link, at uint64, signed []byte) (cursor, string) {
	var theirs link
	if at > 0 || len(signed) > 0 {
		var err error
		if theirs, err = k.open(class, signed); err != nil || theirs.last != at {
			return cursor{sent: min(at, kept.last), seal: kept}, fmt.Sprintf("it claims the %s class up to number %d, and shows no seal of this node for that", k.sequence(class).Class, at)
		}
	}
	switch {
	case bytes.Equal(theirs.signed, kept.signed), theirs.number > kept.number && theirs.last > kept.last:
		return cursor{sent: at, seal: theirs}, ""
	case theirs.last >= kept.last:
		return cursor{sent: at, seal: theirs}, fmt.Sprintf("it shows seal %d of the %s class, up to number %d, which is not the one that was acknowledged: there is another collector",
			theirs.number, k.sequence(class).Class, at)
	}
	after := link{max(kept.number, theirs.number), kept.last, kept.signed}
	return cursor{sent: at, seal: after}, fmt.Sprintf("it was set back: it has the %s class up to number %d, and acknowledged it up to %d", k.sequence(class).Class, at, kept.last)
}

// takeSeals reads the node's key and the seals that the collector has, or makes the key of a new epoch.
func (s *Streamer) takeSeals(ctx context.Context) error {
	if s.sealer != nil {
		return nil
	}
	key, err := readNote(ctx, s.cfg.Store, noteSealKey)
	if err != nil {
		return err
	}
	epoch := s.cfg.Store.Epoch()
	k, err := parseSealer(s.cfg.Node, epoch, key)
	if err != nil { // there is none, or it is that of the store that was here before
		return s.makeSealer(ctx, epoch)
	}
	for class, to := range map[api.Class]*link{api.Class_CLASS_CRITICAL: &s.acked.critical, api.Class_CLASS_FLOW: &s.acked.flow} {
		signed, err := readNote(ctx, s.cfg.Store, ackedNote(class))
		if err != nil {
			return err
		}
		if signed == nil {
			continue
		}
		if *to, err = k.open(class, signed); err != nil {
			return fmt.Errorf("read note %s: %w", ackedNote(class), err)
		}
	}
	s.sealer = k
	return nil
}

// makeSealer has the key durable before anything is sealed by it: the collector takes one for each epoch.
func (s *Streamer) makeSealer(ctx context.Context, epoch string) error {
	k, data, err := newSealer(s.cfg.Node, epoch)
	if err != nil {
		return fmt.Errorf("make key of node %q: %w", s.cfg.Node, err)
	}
	err = s.cfg.Store.KeepUrgent(ctx, []store.Note{{Name: noteSealKey, Data: data}, {Name: noteAckedCritical}, {Name: noteAckedFlow}})
	if err != nil {
		return fmt.Errorf("keep the key that seals records: %w", err)
	}
	s.sealer = k
	return nil
}

func ackedNote(class api.Class) string {
	if class == api.Class_CLASS_CRITICAL {
		return noteAckedCritical
	}
	return noteAckedFlow
}

// readNote returns nil if there is none.
func readNote(ctx context.Context, st *store.Store, name string) ([]byte, error) {
	notes, err := st.Notes(ctx, name)
	for _, n := range notes {
		if n.Name == name {
			return n.Data, err
		}
	}
	return nil, err
}
