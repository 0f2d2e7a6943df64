package proof

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"

	"golang.org/x/mod/sumdb/tlog"
)

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

// line is a Line whose entries are not decoded: what a short file says of them can take much memory, and counts only where a seal says
// how many there are.
type line struct {
	Line
	entries json.RawMessage
}

// readLine decodes a line as far as that takes no more memory than the line has.
func readLine(data []byte) (line, error) {
	var raw struct {
		Line
		Entries json.RawMessage `json:"entries"`
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&raw); err != nil {
		return line{}, unclearf("it is no line of a bundle: %v", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return line{}, unclearf("it is more than one line of a bundle")
	}
	l := line{raw.Line, raw.Entries}
	if len(raw.Entries) > 0 && l.Kind != LineBatch && l.Kind != LineRecord {
		return line{}, unclearf("lines of the kind %q have no records", l.Kind)
	}
	return l, nil
}

// readEntries decodes those of a line, of which there are to be at most so many. More are not decoded.
func (l line) readEntries(most int) ([]Entry, error) {
	if len(l.entries) == 0 {
		return nil, nil
	}
	d := json.NewDecoder(bytes.NewReader(l.entries))
	d.DisallowUnknownFields()
	if t, err := d.Token(); err != nil || t != json.Delim('[') {
		return nil, unclearf("it is no line of a bundle: its records are no list")
	}
	var entries []Entry
	for d.More() {
		if len(entries) == most {
			return nil, fmt.Errorf("here are more records than %d", most)
		}
		var e Entry
		if err := d.Decode(&e); err != nil {
			return nil, unclearf("it is no line of a bundle: %v", err)
		}
		entries = append(entries, e)
	}
	return entries, nil
}

// Checkpoints reads the checkpoints of a bundle, as they are said to be: nothing is verified.
func Checkpoints(r io.Reader) iter.Seq2[Line, error] {
	return func(yield func(Line, error) bool) {
		lines := bufio.NewScanner(r)
		lines.Buffer(nil, maxLine)
		for lines.Scan() {
			l, err := readLine(lines.Bytes())
			if (err != nil || l.Kind == LineCheckpoint) && !yield(l.Line, err) || err != nil {
				return
			}
		}
		if err := lines.Err(); err != nil {
			yield(Line{}, err)
		}
	}
}

// Verdict is what a verification came to; as exit codes of commands.
type Verdict int

// Verdicts.
const (
	Proven     Verdict = 0
	Disproved  Verdict = 1
	CannotTell Verdict = 2
)
