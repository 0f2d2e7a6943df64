// Package evidence makes bundles in memory, as nodes and a collector make them, for tests of who reads them.
package evidence

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"testing"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
	"google.golang.org/protobuf/proto"

	"github.com/sallyport-dev/sallyport/pkg/api"
	sp "github.com/sallyport-dev/sallyport/pkg/proof"
)

// Epoch is the one of nodes that are made here.
const Epoch = "01HZZZZZZZZZZZZZZZZZZZZZZ1"

// Key is a pair that is the same in each run.
type Key struct {
	note.Signer
	Verifier note.Verifier
	VKey     string
}

// NewKey makes the key of a name. Seeds tell keys of one name apart.
func NewKey(t testing.TB, name, seed string) Key {
	t.Helper()
	sum := sha256.Sum256([]byte(name + "\n" + seed))
	private := ed25519.NewKeyFromSeed(sum[:])
	public := append([]byte{1}, private.Public().(ed25519.PublicKey)...) // 1: Ed25519
	h := sha256.Sum256(append([]byte(name+"\n"), public...))
	id := fmt.Sprintf("%08x", binary.BigEndian.Uint32(h[:]))
	vkey := name + "+" + id + "+" + base64.StdEncoding.EncodeToString(public)
	signer, err := note.NewSigner("PRIVATE+KEY+" + name + "+" + id + "+" + base64.StdEncoding.EncodeToString(append([]byte{1}, sum[:]...)))
	verifier, verr := note.NewVerifier(vkey)
	if err := errors.Join(err, verr); err != nil {
		t.Fatal(err)
	}
	return Key{signer, verifier, vkey}
}

// Log is a collector's log.
type Log struct {
	Key
	t      testing.TB
	leaves [][]byte
	hashes []tlog.Hash
	lines  []sp.Line // without proofs, in order of their leaves
}

// NewLog makes an empty log. Logs of one seed have the same key.
func NewLog(t testing.TB, seed string) *Log {
	return &Log{Key: NewKey(t, sp.LogSigner("example.org", "01HZZZZZZZZZZZZZZZZZZZZZZL"), seed), t: t}
}

// ReadHashes is tlog's way to the hashes that are stored.
func (l *Log) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	var out []tlog.Hash
	for _, i := range indexes {
		out = append(out, l.hashes[i])
	}
	return out, nil
}

// Append makes a line's leaf the next one of the log.
func (l *Log) Append(line sp.Line) int64 {
	l.t.Helper()
	line.Index = int64(len(l.leaves))
	more, err := tlog.StoredHashes(line.Index, line.Leaf, l)
	if err != nil {
		l.t.Fatal(err)
	}
	l.leaves, l.hashes, l.lines = append(l.leaves, line.Leaf), append(l.hashes, more...), append(l.lines, line)
	return line.Index
}

// T is the test that made the log.
func (l *Log) T() testing.TB { return l.t }

// Size is the number of leaves.
func (l *Log) Size() int64 { return int64(len(l.leaves)) }

// Checkpoint signs what the log was at a size.
func (l *Log) Checkpoint(size int64) []byte {
	l.t.Helper()
	root, err := tlog.TreeHash(size, l)
	if err != nil {
		l.t.Fatal(err)
	}
	signed, err := sp.Checkpoint{Origin: l.Name(), Size: size, Root: root}.Sign(l)
	if err != nil {
		l.t.Fatal(err)
	}
	return signed
}

// Grown is the proof that the log of size to has all of the one of size from.
func (l *Log) Grown(to, from int64) []tlog.Hash {
	l.t.Helper()
	if from == 0 || from == to {
		return nil
	}
	p, err := tlog.ProveTree(to, from, l)
	if err != nil {
		l.t.Fatal(err)
	}
	return p
}

// Bundle is the evidence for the lines that are wanted, at the log's size of now; nil wants keys and batches. Events are lines too,
// which a bundle of batches leaves out.
func (l *Log) Bundle(wanted func(sp.Line) bool) []sp.Line {
	l.t.Helper()
	if wanted == nil {
		wanted = func(line sp.Line) bool { return line.Kind == sp.LineKey || line.Kind == sp.LineBatch }
	}
	out := []sp.Line{{Kind: sp.LineCheckpoint, Note: string(l.Checkpoint(l.Size()))}}
	for _, line := range l.lines {
		if wanted(line) {
			out = append(out, l.Prove(line))
		}
	}
	return End(out)
}

// Prove gives a line its place in the log of now.
func (l *Log) Prove(line sp.Line) sp.Line {
	l.t.Helper()
	p, err := tlog.ProveRecord(l.Size(), line.Index, l)
	if err != nil {
		l.t.Fatal(err)
	}
	line.Proof = p
	return line
}

// Record is the line of one entry of a batch.
func (l *Log) Record(batch sp.Line, at int64) sp.Line {
	l.t.Helper()
	var stored []tlog.Hash
	read := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		var out []tlog.Hash
		for _, i := range indexes {
			out = append(out, stored[i])
		}
		return out, nil
	})
	for i, e := range batch.Entries {
		more, err := tlog.StoredHashesForRecordHash(int64(i), e.Hash(), read)
		if err != nil {
			l.t.Fatal(err)
		}
		stored = append(stored, more...)
	}
	path, err := tlog.ProveRecord(int64(len(batch.Entries)), at, read)
	if err != nil {
		l.t.Fatal(err)
	}
	line := l.Prove(batch)
	line.Kind, line.Entries, line.At, line.Path = sp.LineRecord, batch.Entries[at:at+1], at, path
	return line
}

// End puts the last line below others, in the place of one that is there.
func End(lines []sp.Line) []sp.Line {
	if n := len(lines); n > 0 && lines[n-1].Kind == sp.LineEnd {
		lines = lines[:n-1]
	}
	return append(lines[:len(lines):len(lines)], sp.Line{Kind: sp.LineEnd, Count: int64(len(lines))})
}

// Write is the bundle as a file.
func Write(t testing.TB, lines []sp.Line) []byte {
	t.Helper()
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	for _, line := range lines {
		if err := e.Encode(line); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

// Node seals into a log.
type Node struct {
	Key
	node  string
	log   *Log
	after map[string]*sp.Seal // the last of each class
	last  map[string][]byte
}

// Node makes one, with the leaf of its key.
func (l *Log) Node(name string) *Node {
	n := &Node{Key: NewKey(l.t, sp.NodeSigner(name, Epoch), ""), node: name, log: l, after: map[string]*sp.Seal{}, last: map[string][]byte{}}
	l.Append(sp.Line{Kind: sp.LineKey, Leaf: sp.KeyLeaf(name, Epoch, n.VKey)})
	return n
}

// Batch seals entries, whose numbers go on from the batch before, and appends what a collector does: its grant events, and the seal.
func (n *Node) Batch(class string, entries ...*api.Entry) sp.Line {
	return n.Seal(class, nil, entries...)
}

// Seal is Batch with a seal that was changed before it was signed.
func (n *Node) Seal(class string, change func(*sp.Seal), entries ...*api.Entry) sp.Line {
	n.log.t.Helper()
	line := n.Unlogged(class, change, entries...)
	for i, e := range entries {
		if e.GetGrant() != nil {
			n.log.Append(sp.Line{Kind: sp.LineEvent, Leaf: sp.EventLeaf(n.sequence(class), line.Entries[i])})
		}
	}
	line.Index = n.log.Append(line)
	return line
}

func (n *Node) sequence(class string) sp.Sequence {
	return sp.Sequence{Node: n.node, Epoch: Epoch, Class: class}
}

// Skip leaves numbers out.
func (n *Node) Skip(class string, count uint64) { n.after[class].Last += count }

// Unlogged is Seal without the log.
func (n *Node) Unlogged(class string, change func(*sp.Seal), entries ...*api.Entry) sp.Line {
	n.log.t.Helper()
	seal := sp.Seal{Sequence: n.sequence(class), Number: 1, First: 1, Entries: len(entries), Before: sp.Follows(n.last[class])}
	if before := n.after[class]; before != nil {
		seal.Number, seal.First = before.Number+1, before.Last+1
	}
	seal.Last = seal.First - 1
	var sealed []sp.Entry
	for _, e := range entries {
		takes := uint64(1)
		if loss := e.GetLoss(); loss != nil {
			takes, seal.Lost = loss.GetCount(), seal.Lost+loss.GetCount()
		}
		if seal.Last += takes; e.GetSeq() > 0 {
			seal.Last = e.GetSeq() // left out are those before
		}
		sealed = append(sealed, sp.Entry{Seq: seal.Last, Data: Data(n.log.t, e)})
	}
	seal.Root = sp.Root(sealed)
	if change != nil {
		change(&seal)
	}
	signed, err := seal.Sign(n)
	if err != nil {
		n.log.t.Fatal(err)
	}
	n.after[class], n.last[class] = &seal, signed
	return sp.Line{Kind: sp.LineBatch, Leaf: signed, Entries: sealed}
}

// Data are the bytes of an entry that are sealed.
func Data(t testing.TB, e *api.Entry) []byte {
	t.Helper()
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// Flow is the record of a flow that begins.
func Flow(id string) *api.Entry {
	return &api.Entry{Record: &api.Entry_Flow{Flow: &api.FlowRecord{Event: "OPEN", Verdict: "PROXIED", FlowId: id, Count: 1}}}
}

// Grant is a step of a grant.
func Grant(id, step string) *api.Entry {
	return &api.Entry{Record: &api.Entry_Grant{Grant: &api.GrantEvent{Grant: id, Step: step}}}
}

// Loss counts what is gone.
func Loss(stage, cause string, count uint64) *api.Entry {
	return &api.Entry{Record: &api.Entry_Loss{Loss: &api.LossRecord{Stage: stage, Cause: cause, Count: count}}}
}
