package proof

import "golang.org/x/mod/sumdb/tlog"

// A bundle is a file of lines, each a Line in JSON: evidence for one record, for a grant (a receipt), or for all of a time. The first
// line is a checkpoint, and every other one is proven against the latest checkpoint before it. A node's key comes before its first
// batch or record.

// Kinds of lines.
const (
	LineCheckpoint = "checkpoint" // Note; From and Proof (of a tree) where an older one came before it
	LineKey        = "key"        // Index, Leaf, Proof
	LineEvent      = "event"      // Index, Leaf, Proof
	LineBatch      = "batch"      // Index, Leaf (the signed seal), Proof, Entries: all of them
	LineRecord     = "record"     // Index, Leaf (the signed seal), Proof, Entries: one of them, At, Path
	LineEnd        = "end"        // Count: lines before it. A bundle without it was cut off, and proves nothing of what is missing
)

// Line is one line of a bundle.
type Line struct {
	Kind    string      `json:"kind"`
	Note    string      `json:"note,omitempty"`
	From    int64       `json:"from,omitempty"`
	Index   int64       `json:"index,omitempty"` // of the leaf in the log
	Leaf    []byte      `json:"leaf,omitempty"`
	Proof   []tlog.Hash `json:"proof,omitempty"`
	Entries []Entry     `json:"entries,omitempty"`
	At      int64       `json:"at,omitempty"`   // place of the entry in its batch, from 0 on
	Path    []tlog.Hash `json:"path,omitempty"` // from the entry to the seal's root: a tlog.RecordProof
	Count   int64       `json:"count,omitempty"`
}

// Verdict is what a verification came to; as exit codes of commands.
type Verdict int

// Verdicts.
const (
	Proven     Verdict = 0
	Disproved  Verdict = 1
	CannotTell Verdict = 2
)
