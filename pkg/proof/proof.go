// Package proof is how anybody convinces himself, from files and a public key, that records are the ones that a node sealed and that
// a collector's log has, with none of them changed, taken out or put in between. It is pure.
//
// A node seals each batch: the root of a Merkle tree over its entries, its place in the sequence, and the hash of the seal before, in a
// note (C2SP signed-note) under the node's key. A collector appends each seal, each grant event and each node's key as a leaf to one
// log (RFC 6962 hashes, by golang.org/x/mod/sumdb/tlog) and signs its size and root (C2SP tlog-checkpoint). An entry is proven by its
// place in a seal, and the seal by its place in the log.
package proof

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"strings"
	"unicode"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// Classes of a sequence, as seals name them.
const (
	ClassCritical = "critical"
	ClassFlow     = "flow"
)

// ErrFormat says that bytes are not what they were taken for.
var ErrFormat = errors.New("proof is malformed")

// Sequence is one run of numbers.
type Sequence struct{ Node, Epoch, Class string }

// Entry is one record or loss of a sequence, in the bytes that were sealed.
type Entry struct {
	Seq  uint64
	Data []byte // api.Entry without its seq
}

// Hash is the leaf of an entry in the tree of its batch: tlog.RecordHash over the number (8 bytes, big-endian) and the data.
func (e Entry) Hash() tlog.Hash {
	return tlog.RecordHash(append(binary.BigEndian.AppendUint64(nil, e.Seq), e.Data...))
}

// Root is the root of the tree over the entries of a batch, in their order.
func Root(entries []Entry) tlog.Hash {
	root, _ := tlog.TreeHash(int64(len(entries)), treeOf(entries)) // it fails where its reader does
	return root
}

// Path is the way from an entry of a batch, at its place from 0 on, to the root.
func Path(entries []Entry, at int) (tlog.RecordProof, error) {
	return tlog.ProveRecord(int64(len(entries)), int64(at), treeOf(entries))
}

// treeOf reads the hashes that tlog keeps of a tree over entries.
func treeOf(entries []Entry) tlog.HashReader {
	var stored []tlog.Hash
	read := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(indexes))
		for i, x := range indexes {
			out[i] = stored[x]
		}
		return out, nil
	})
	for i, e := range entries {
		more, _ := tlog.StoredHashesForRecordHash(int64(i), e.Hash(), read)
		stored = append(stored, more...)
	}
	return read
}

// NodeSigner is the name of the key that signs the seals of a node's epoch.
func NodeSigner(node, epoch string) string { return "sallyport-node/" + node + "/" + epoch }

// LogSigner is the name of the key that signs a collector's checkpoints, and the origin in them: instance is new with each log.
func LogSigner(trustDomain, instance string) string {
	return trustDomain + "/sallyport/log/" + instance
}

// linkHash is what the next seal says of a signed one.
func linkHash(signed []byte) tlog.Hash { return sha256.Sum256(signed) }

// sign puts a note's signature below a text.
func sign(text string, signer note.Signer) ([]byte, error) {
	return note.Sign(&note.Note{Text: text}, signer)
}

// isWord tells whether s can stand on a line of its own, and no other be taken for it.
func isWord(s string) bool {
	return s != "" && len(s) <= 512 && !strings.ContainsFunc(s, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) || r == unicode.ReplacementChar })
}
