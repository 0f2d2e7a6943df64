package proof

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// Checkpoint is a log's size and root: three lines, as C2SP tlog-checkpoint has them.
type Checkpoint struct {
	Origin string    `json:"origin"`
	Size   int64     `json:"size"`
	Root   tlog.Hash `json:"root"`
}

func (c Checkpoint) text() string {
	return c.Origin + "\n" + strconv.FormatInt(c.Size, 10) + "\n" + c.Root.String() + "\n"
}

// Sign makes the signed checkpoint. The signer's name is the origin.
func (c Checkpoint) Sign(signer note.Signer) ([]byte, error) { return sign(c.text(), signer) }

// OpenCheckpoint reads a checkpoint that the key signed; its origin is the key's name.
func OpenCheckpoint(signed []byte, key note.Verifier) (Checkpoint, error) {
	n, err := note.Open(signed, note.VerifierList(key))
	if other := new(note.UnverifiedNoteError); errors.As(err, &other) {
		return Checkpoint{}, fmt.Errorf("open checkpoint: it is signed by %s, and the key is %s: %w", signers(other.Note), keyName(key.Name(), key.KeyHash()), err)
	}
	if err != nil {
		return Checkpoint{}, fmt.Errorf("open checkpoint: %w", err)
	}
	l := strings.SplitN(n.Text, "\n", 4) // lines after the third are extensions
	if len(l) != 4 || l[0] != key.Name() {
		return Checkpoint{}, fmt.Errorf("open checkpoint: %w: it is not one of %s", ErrFormat, key.Name())
	}
	c := Checkpoint{Origin: l[0]}
	c.Size, _ = strconv.ParseInt(l[1], 10, 64)
	c.Root, _ = tlog.ParseHash(l[2])
	if c.Size < 0 || !strings.HasPrefix(n.Text, c.text()) {
		return Checkpoint{}, fmt.Errorf("open checkpoint: %w", ErrFormat)
	}
	return c, nil
}

// Grew holds a newer checkpoint of a log against an older one. Its error says that they are of different histories: a split view, or a
// log that was set back.
func (c Checkpoint) Grew(older Checkpoint, proof tlog.TreeProof) error {
	switch {
	case c.Origin != older.Origin:
		return fmt.Errorf("checkpoints are of two logs, %s and %s", older.Origin, c.Origin)
	case c.Size < older.Size:
		return fmt.Errorf("log %s was set back from %d to %d leaves", c.Origin, older.Size, c.Size)
	case older.Size == 0:
		return nil
	case c.Size == older.Size && c.Root == older.Root:
		return nil
	case c.Size == older.Size:
		return fmt.Errorf("log %s has two roots at %d leaves", c.Origin, c.Size)
	}
	if err := tlog.CheckTree(proof, c.Size, c.Root, older.Size, older.Root); err != nil {
		return fmt.Errorf("log %s at %d leaves does not contain what it had at %d: %w", c.Origin, c.Size, older.Size, err)
	}
	return nil
}

// signers names who claims to have signed, as verifier keys begin.
func signers(n *note.Note) string {
	var names []string
	for _, s := range n.UnverifiedSigs {
		names = append(names, keyName(s.Name, s.Hash))
	}
	return strings.Join(names, ", ")
}

func keyName(name string, hash uint32) string { return fmt.Sprintf("%s+%08x", name, hash) }
