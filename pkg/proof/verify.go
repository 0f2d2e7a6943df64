package proof

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// Bounds of what is read before anything of it is proven.
const (
	maxLine    = 24 << 20 // the largest message of a node fits, with its bytes in base64
	maxEntries = 4096     // of a batch: a collector takes no more
)

// Report is what a verification came to.
type Report struct {
	Verdict    Verdict          `json:"verdict"`
	Why        string           `json:"why,omitempty"` // what does not fit, or what is missing, with its line; empty where all is proven
	Checkpoint Checkpoint       `json:"checkpoint"`    // the latest one that the log's key signed
	Records    uint64           `json:"records"`       // that nodes sealed
	Events     uint64           `json:"events"`        // grant events that stand in the log by themselves
	Lost       uint64           `json:"lost"`          // records that the nodes themselves count as lost
	Sequences  []SequenceReport `json:"sequences,omitempty"`
}

// SequenceReport is what a bundle has of one sequence.
type SequenceReport struct {
	Sequence
	Seals   uint64 `json:"seals"`            // batches that are there whole
	First   uint64 `json:"first,omitempty"`  // every number from First to Last is a record or is counted as lost; 0: no batch is there whole
	Last    uint64 `json:"last,omitempty"`   //
	Whole   bool   `json:"whole"`            // from the sequence's first number on
	Records uint64 `json:"records"`          //
	Events  uint64 `json:"events"`           //
	Lost    uint64 `json:"lost"`             //
	Breaks  uint64 `json:"breaks"`           // seals that do not follow the one before, where the node says that the collector forgot
	Losses  []Loss `json:"losses,omitempty"` // by stage and cause, in the order in which they came
}

// Loss is what a loss record says.
type Loss struct {
	Stage string `json:"stage"`
	Cause string `json:"cause"`
	Count uint64 `json:"count"`
}

// Where a node says that the collector lost what it had acknowledged.
const (
	stageCollector = "collector"
	causeForgotten = "forgotten"
)

// unclear is an error that neither proves nor disproves.
type unclear struct{ error }

func unclearf(format string, args ...any) error { return unclear{fmt.Errorf(format, args...)} }

func isUnclear(err error) bool {
	_, ok := errors.AsType[unclear](err)
	return ok
}

// Verify reads a bundle and holds it against the key of the log: every line's place in the log, every seal, every entry's place in its
// seal, and within each sequence that numbers and seals go on without a gap. It stops at the first thing that does not fit. The error
// is that of the reader; the report then cannot tell either.
//
// What is Proven is proven of what the bundle has: what came before its first batch of a sequence, or after its last, is not in it, and
// of events and single records nothing tells whether they are all.
func Verify(r io.Reader, logKey note.Verifier) (Report, error) {
	v := &verifier{key: logKey, nodes: map[nodeEpoch]nodeKey{}, sequences: map[Sequence]*sequence{}, seen: map[place]bool{}, shown: map[int64]string{}}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxLine)
	var err error
	for err == nil && lines.Scan() {
		if err = v.line(lines.Bytes()); err != nil {
			err = fmt.Errorf("line %d: %w", v.lines+1, err)
		}
		v.lines++
	}
	broken := lines.Err()
	if errors.Is(broken, bufio.ErrTooLong) {
		err, broken = unclearf("line %d: longer than any that is ours", v.lines+1), nil
	}
	switch {
	case broken != nil && (err == nil || isUnclear(err)):
		err = unclear{broken}
	case err == nil && !v.ended:
		err = unclearf("the file was cut off: its last line is not there")
	}
	return v.conclude(err), broken
}

// verifier is the state of one verification.
type verifier struct {
	key       note.Verifier
	lines     int64
	started   bool // there was a checkpoint
	ended     bool
	head      Checkpoint
	nodes     map[nodeEpoch]nodeKey
	sequences map[Sequence]*sequence
	order     []*sequence
	seen      map[place]bool   // events and single records
	shown     map[int64]string // by the leaf of a seal: kind of its lines
}

type nodeEpoch struct{ node, epoch string }

type nodeKey struct {
	index int64
	vkey  string
	note.Verifier
}

// place is that of a leaf, and within a seal that of a single entry.
type place struct{ index, at int64 }

// sequence is what was read of one.
type sequence struct {
	SequenceReport
	seal   Seal // the last one, of a whole batch
	signed []byte
	index  int64
	grants map[uint64]tlog.Hash // entries of grant events, which may stand in the log and below a seal
}

func (v *verifier) conclude(err error) Report {
	r := Report{Checkpoint: v.head}
	for _, s := range v.order {
		r.Records, r.Events, r.Lost = r.Records+s.Records, r.Events+s.Events, r.Lost+s.Lost
		r.Sequences = append(r.Sequences, s.SequenceReport)
	}
	if err != nil {
		r.Why, r.Verdict = err.Error(), Disproved
		if isUnclear(err) {
			r.Verdict = CannotTell
		}
	}
	return r
}

func (v *verifier) line(data []byte) error {
	l, err := readLine(data)
	if err != nil {
		return err
	}
	if v.ended {
		return unclearf("there is more after the end")
	}
	switch l.Kind {
	case LineCheckpoint:
		return v.checkpoint(l)
	case LineEnd:
		v.ended = true
		if !v.started {
			return unclearf("the bundle has no checkpoint")
		}
		if l.Count != v.lines {
			return fmt.Errorf("the bundle was made with %d lines before its end, and has %d", l.Count, v.lines)
		}
		return nil
	}
	read := map[string]func(line) error{LineKey: v.nodeKey, LineEvent: v.event, LineBatch: v.batch, LineRecord: v.record}[l.Kind]
	switch {
	case read == nil:
		return unclearf("lines of the kind %q are not known here", l.Kind)
	case !v.started:
		return unclearf("there is no checkpoint before it")
	}
	if err := tlog.CheckRecord(l.Proof, v.head.Size, v.head.Root, l.Index, tlog.RecordHash(l.Leaf)); err != nil {
		return fmt.Errorf("what stands here as leaf %d is not what the log has there: %w", l.Index, err)
	}
	return read(l)
}

func (v *verifier) checkpoint(l line) error {
	c, err := OpenCheckpoint([]byte(l.Note), v.key)
	if err != nil {
		return err
	}
	if v.started {
		if err := c.Grew(v.head, l.Proof); err != nil {
			return err
		}
	}
	v.started, v.head = true, c
	return nil
}

// nodeKey takes the key that a node seals with. The log has one for each epoch, or somebody else could seal for the node.
func (v *verifier) nodeKey(l line) error {
	node, epoch, vkey, err := ParseKeyLeaf(l.Leaf)
	if err != nil {
		return err
	}
	id := nodeEpoch{node, epoch}
	if old, ok := v.nodes[id]; ok {
		if old.vkey != vkey || old.index != l.Index {
			return fmt.Errorf("the log has two keys of node %s in epoch %s, at leaves %d and %d", node, epoch, old.index, l.Index)
		}
		return nil
	}
	key, err := note.NewVerifier(vkey)
	if err != nil {
		return fmt.Errorf("key of node %s in epoch %s: %w", node, epoch, err)
	}
	v.nodes[id] = nodeKey{l.Index, vkey, key}
	return nil
}

func (v *verifier) event(l line) error {
	id, e, err := ParseEventLeaf(l.Leaf)
	if err != nil {
		return err
	}
	if err := v.once(place{l.Index, 0}); err != nil {
		return err
	}
	s := v.sequence(id)
	s.Events++
	return s.same(e)
}

// openSeal reads a signed seal whose node's key came before it, in the file and in the log. Its records are shown once: all of them by one
// line, or single ones, or they would be counted twice.
func (v *verifier) openSeal(l line) (Seal, error) {
	claimed, err := sealOf(l.Leaf)
	if err != nil {
		return Seal{}, err
	}
	key, ok := v.nodes[nodeEpoch{claimed.Node, claimed.Epoch}]
	if !ok {
		return Seal{}, unclearf("the bundle does not have the key of node %s in epoch %s", claimed.Node, claimed.Epoch)
	}
	if key.index >= l.Index {
		return Seal{}, fmt.Errorf("the log has a seal of node %s at leaf %d, before the node's key at %d", claimed.Node, l.Index, key.index)
	}
	seal, err := OpenSeal(l.Leaf, key)
	if err != nil {
		return Seal{}, err
	}
	if kind, ok := v.shown[l.Index]; ok && (kind != l.Kind || kind == LineBatch) {
		return Seal{}, fmt.Errorf("%s: records of seal %d stand in the bundle twice", seal.name(), seal.Number)
	}
	v.shown[l.Index] = l.Kind
	return seal, nil
}

// sealOf reads a seal before its key is known. Nothing that it says counts before OpenSeal.
func sealOf(signed []byte) (Seal, error) {
	text, _, ok := bytes.Cut(signed, []byte("\n\n"))
	if !ok {
		return Seal{}, fmt.Errorf("%w: leaf is no signed seal", ErrFormat)
	}
	return parseSeal(string(text) + "\n")
}

func (v *verifier) batch(l line) error {
	seal, err := v.openSeal(l)
	if err != nil {
		return err
	}
	if seal.Entries > maxEntries {
		return unclearf("%s: seal %d was made over %d records: more than %d are not read", seal.name(), seal.Number, seal.Entries, maxEntries)
	}
	if l.Entries, err = l.readEntries(seal.Entries); err == nil {
		err = seal.Check(l.Entries)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", seal.name(), err)
	}
	s := v.sequence(seal.Sequence)
	losses, err := s.read(seal, l.Entries)
	if err == nil {
		err = s.follow(seal, l.Line, losses)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", seal.name(), err)
	}
	return nil
}

func (v *verifier) record(l line) error {
	seal, err := v.openSeal(l)
	if err != nil {
		return err
	}
	if l.Entries, err = l.readEntries(1); err != nil || len(l.Entries) != 1 {
		return unclearf("it is to have one record, and has none, or more")
	}
	e := l.Entries[0]
	if err := tlog.CheckRecord(l.Path, int64(seal.Entries), seal.Root, l.At, e.Hash()); err != nil {
		return fmt.Errorf("%s: record %d is not what the node sealed: %w", seal.name(), e.Seq, err)
	}
	if err := v.once(place{l.Index, l.At}); err != nil {
		return err
	}
	s := v.sequence(seal.Sequence)
	loss, isGrant, err := readEntry(e.Data)
	switch {
	case err != nil:
		return fmt.Errorf("%s: record %d: %w", seal.name(), e.Seq, err)
	case e.Seq < seal.First || e.Seq > seal.Last || loss != nil && (loss.Count == 0 || loss.Count > seal.Lost):
		return fmt.Errorf("%s: record %d is none that seal %d can have", seal.name(), e.Seq, seal.Number)
	case loss != nil:
		s.lose(*loss)
		return nil
	case isGrant:
		err = s.same(e)
	}
	s.Records++
	return err
}

// once refuses what is there twice: it would be counted twice.
func (v *verifier) once(p place) error {
	if v.seen[p] {
		return fmt.Errorf("leaf %d stands in the bundle twice", p.index)
	}
	v.seen[p] = true
	return nil
}

func (v *verifier) sequence(id Sequence) *sequence {
	s, ok := v.sequences[id]
	if !ok {
		s = &sequence{SequenceReport: SequenceReport{Sequence: id}, grants: map[uint64]tlog.Hash{}}
		v.sequences[id] = s
		v.order = append(v.order, s)
	}
	return s
}

// read holds the numbers of a batch: each is a record's, or one that a loss counts.
func (s *sequence) read(seal Seal, entries []Entry) ([]Loss, error) {
	var losses []Loss
	next, lost, records := seal.First, uint64(0), uint64(0)
	for _, e := range entries {
		loss, isGrant, err := readEntry(e.Data)
		if err != nil {
			return nil, fmt.Errorf("record %d: %w", e.Seq, err)
		}
		takes := uint64(1)
		if loss != nil {
			losses, takes = append(losses, *loss), loss.Count
			lost += loss.Count
		} else {
			records++
		}
		if takes == 0 || takes > seal.Last || e.Seq > seal.Last || e.Seq != next+takes-1 { // in this order: numbers do not wrap
			return nil, fmt.Errorf("seal %d: number %d does not follow %d", seal.Number, e.Seq, next-1)
		}
		next = e.Seq + 1
		if isGrant {
			if err := s.same(e); err != nil {
				return nil, err
			}
		}
	}
	if lost != seal.Lost {
		return nil, fmt.Errorf("seal %d says that %d records are lost, and its losses count %d", seal.Number, seal.Lost, lost)
	}
	s.Records += records
	return losses, nil
}

// follow holds a batch against the one before. A chain goes on over what its collector forgot only if the node itself says so, in the
// record that comes first.
func (s *sequence) follow(seal Seal, l Line, losses []Loss) error {
	if s.Seals == 0 {
		s.First, s.Whole = seal.First, seal.Number == 1 && seal.First == 1
		if seal.Number == 1 && seal.Before != Follows(nil) {
			return fmt.Errorf("seal 1 follows another one")
		}
	} else if err := s.continues(seal, l, losses); err != nil {
		return err
	}
	for _, loss := range losses {
		s.lose(loss)
	}
	s.Seals++
	s.Last, s.seal, s.signed, s.index = seal.Last, seal, l.Leaf, l.Index
	return nil
}

func (s *sequence) continues(seal Seal, l Line, losses []Loss) error {
	switch {
	case seal.First != s.seal.Last+1:
		return fmt.Errorf("after number %d comes %d", s.seal.Last, seal.First)
	case l.Index <= s.index:
		return fmt.Errorf("seal %d stands in the log before seal %d", seal.Number, s.seal.Number)
	case seal.Number == s.seal.Number+1 && seal.Before == Follows(s.signed):
		return nil
	case seal.Number <= s.seal.Number || len(losses) == 0 || losses[0].Stage != stageCollector || losses[0].Cause != causeForgotten || l.Entries[0].Seq != seal.First+losses[0].Count-1:
		return fmt.Errorf("seal %d does not follow seal %d", seal.Number, s.seal.Number)
	}
	s.Breaks++
	return nil
}

// lose counts a loss with the others of its stage and cause.
func (s *sequence) lose(loss Loss) {
	s.Lost += loss.Count
	for i := range s.Losses {
		if s.Losses[i].Stage == loss.Stage && s.Losses[i].Cause == loss.Cause {
			s.Losses[i].Count += loss.Count
			return
		}
	}
	s.Losses = append(s.Losses, loss)
}

// same holds that a grant event is the same one in the log and below the node's seal, where the bundle has both.
func (s *sequence) same(e Entry) error {
	if have, ok := s.grants[e.Seq]; ok && have != e.Hash() {
		return fmt.Errorf("%s: the log has another grant event %d than the node sealed", s.name(), e.Seq)
	}
	s.grants[e.Seq] = e.Hash()
	return nil
}

// name is of a sequence, for people; no String, which a Seal would have too.
func (s Sequence) name() string { return s.Node + "/" + s.Epoch + "/" + s.Class }

// String gives the verdict in words.
func (v Verdict) String() string {
	switch v {
	case Proven:
		return "proven"
	case Disproved:
		return "disproved"
	}
	return "cannot tell"
}

// MarshalText is String, for JSON.
func (v Verdict) MarshalText() ([]byte, error) { return []byte(v.String()), nil }
