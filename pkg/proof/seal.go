package proof

import (
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

const sealTitle = "sallyport seal v1"

// Seal is what a node says of one batch of a sequence. Its text has one field on each line, in this order.
type Seal struct {
	Sequence           // node, epoch and class
	Number      uint64 // of the seals of its sequence, in the order in which they were made; from 1 on
	First, Last uint64 // numbers that the batch takes, those that losses count included
	Entries     int    // in it
	Lost        uint64 // numbers of First to Last that are counted as lost
	Root        tlog.Hash
	Before      tlog.Hash // SHA-256 of the signed seal before this one; of no bytes, if this is the first
}

// Text is what is signed.
func (s Seal) Text() string {
	return strings.Join([]string{sealTitle, s.Node, s.Epoch, s.Class, number(s.Number), number(s.First), number(s.Last),
		number(uint64(s.Entries)), number(s.Lost), s.Root.String(), s.Before.String(), ""}, "\n")
}

// Sign makes the signed seal, as it travels and as it stands in the log.
func (s Seal) Sign(signer note.Signer) ([]byte, error) {
	if !isWord(s.Node) || !isWord(s.Epoch) {
		return nil, fmt.Errorf("sign seal of node %q in epoch %q: %w", s.Node, s.Epoch, ErrFormat)
	}
	return sign(s.Text(), signer)
}

// Follows is the hash that the seal after a signed one names. Nothing signed is what the first one follows.
func Follows(signed []byte) tlog.Hash { return linkHash(signed) }

// OpenSeal reads a signed seal, whose signature has to be that of the key, and the key's name that of its node and epoch.
func OpenSeal(signed []byte, key note.Verifier) (Seal, error) {
	n, err := note.Open(signed, note.VerifierList(key))
	if err != nil {
		return Seal{}, fmt.Errorf("open seal: %w", err)
	}
	s, err := parseSeal(n.Text)
	if err == nil && key.Name() != NodeSigner(s.Node, s.Epoch) {
		err = fmt.Errorf("%w: key %s is not that of node %s in epoch %s", ErrFormat, key.Name(), s.Node, s.Epoch)
	}
	if err != nil {
		return Seal{}, fmt.Errorf("open seal: %w", err)
	}
	return s, nil
}

// parseSeal takes what Text makes, and nothing else.
func parseSeal(text string) (Seal, error) {
	l := strings.Split(text, "\n")
	if len(l) != 12 || l[0] != sealTitle {
		return Seal{}, fmt.Errorf("%w: it is no seal", ErrFormat)
	}
	s := Seal{Sequence: Sequence{Node: l[1], Epoch: l[2], Class: l[3]}}
	var entries uint64
	for i, to := range []*uint64{&s.Number, &s.First, &s.Last, &entries, &s.Lost} {
		*to, _ = strconv.ParseUint(l[4+i], 10, 63) // what is no number is not what Text makes of it
	}
	s.Entries = int(entries)
	s.Root, _ = tlog.ParseHash(l[9])
	s.Before, _ = tlog.ParseHash(l[10])
	if s.Text() != text || s.Number == 0 || s.First == 0 || s.Last < s.First || s.Lost > s.Last-s.First+1 || s.Entries < 1 {
		return Seal{}, fmt.Errorf("%w: it is no seal", ErrFormat)
	}
	return s, nil
}

// Check holds entries against the seal over them. It does not know what a loss counts: who reads the records does.
func (s Seal) Check(entries []Entry) error {
	switch {
	case len(entries) != s.Entries:
		return fmt.Errorf("seal %d was made over %d records, and here are %d", s.Number, s.Entries, len(entries))
	case entries[len(entries)-1].Seq != s.Last || entries[0].Seq < s.First:
		return fmt.Errorf("seal %d was made over numbers %d to %d, and here are others", s.Number, s.First, s.Last)
	case Root(entries) != s.Root:
		return fmt.Errorf("seal %d was made over other records than are here", s.Number)
	}
	return nil
}

func number(n uint64) string { return strconv.FormatUint(n, 10) }
