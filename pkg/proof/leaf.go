package proof

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
)

// Titles of leaves: the first line of each. A signed seal is a leaf as it is.
const (
	eventTitle = "sallyport event v1"
	keyTitle   = "sallyport node key v1"
)

// EventLeaf is the leaf of a grant event: title, node, epoch, class and number on a line each, and then the entry's data.
func EventLeaf(s Sequence, e Entry) []byte {
	return append([]byte(strings.Join([]string{eventTitle, s.Node, s.Epoch, s.Class, number(e.Seq), ""}, "\n")), e.Data...)
}

// ParseEventLeaf is the reverse of EventLeaf.
func ParseEventLeaf(leaf []byte) (Sequence, Entry, error) {
	l := bytes.SplitN(leaf, []byte("\n"), 6)
	if len(l) != 6 {
		return Sequence{}, Entry{}, fmt.Errorf("%w: leaf is no grant event", ErrFormat)
	}
	s, e := Sequence{string(l[1]), string(l[2]), string(l[3])}, Entry{Data: l[5]}
	e.Seq, _ = strconv.ParseUint(string(l[4]), 10, 63)
	if e.Seq == 0 || !bytes.Equal(EventLeaf(s, e), leaf) {
		return Sequence{}, Entry{}, fmt.Errorf("%w: leaf is no grant event", ErrFormat)
	}
	return s, e, nil
}

// KeyLeaf is the leaf that tells by which key a node seals in an epoch: title, node, epoch and verifier key on a line each. It
// comes before the node's first seal.
func KeyLeaf(node, epoch, vkey string) []byte {
	return []byte(strings.Join([]string{keyTitle, node, epoch, vkey, ""}, "\n"))
}

// ParseKeyLeaf is the reverse of KeyLeaf.
func ParseKeyLeaf(leaf []byte) (node, epoch, vkey string, err error) {
	l := strings.Split(string(leaf), "\n")
	if len(l) != 5 || !bytes.Equal(KeyLeaf(l[1], l[2], l[3]), leaf) {
		return "", "", "", fmt.Errorf("%w: leaf is no node's key", ErrFormat)
	}
	return l[1], l[2], l[3], nil
}
