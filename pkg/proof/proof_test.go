package proof

import (
	"bytes"
	"crypto/rand"
	"errors"
	"strings"
	"testing"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

const (
	testNode  = "node-a"
	testEpoch = "01HZZZZZZZZZZZZZZZZZZZZZZ1"
)

func keys(t *testing.T, name string) (note.Signer, note.Verifier) {
	t.Helper()
	skey, vkey, err := note.GenerateKey(rand.Reader, name)
	if err != nil {
		t.Fatal(err)
	}
	signer, serr := note.NewSigner(skey)
	verifier, verr := note.NewVerifier(vkey)
	if err := errors.Join(serr, verr); err != nil {
		t.Fatal(err)
	}
	return signer, verifier
}

func sealed(entries []Entry) Seal {
	return Seal{Sequence: Sequence{testNode, testEpoch, ClassFlow}, Number: 2, First: 7, Last: 10, Entries: len(entries), Lost: 2,
		Root: Root(entries), Before: Follows([]byte("the first"))}
}

var entries = []Entry{{7, []byte("a")}, {9, []byte("two lost")}, {10, []byte("b")}}

// TestSealText fixes the bytes that are signed: a change of them is a new version.
func TestSealText(t *testing.T) {
	want := "sallyport seal v1\nnode-a\n01HZZZZZZZZZZZZZZZZZZZZZZ1\nflow\n2\n7\n10\n3\n2\n" +
		Root(entries).String() + "\n" + Follows([]byte("the first")).String() + "\n"
	if got := sealed(entries).Text(); got != want {
		t.Errorf("have\n%s\nwant\n%s", got, want)
	}
	if got := Root(entries).String(); got != "o/cBGnYFBmnEhF++wu2fAtM65VBDUSiZBzEvy96JASA=" {
		t.Errorf("root is %s", got)
	}
}

func TestSealRoundTrip(t *testing.T) {
	signer, key := keys(t, NodeSigner(testNode, testEpoch))
	signed, err := sealed(entries).Sign(signer)
	if err != nil {
		t.Fatal(err)
	}
	s, err := OpenSeal(signed, key)
	if err != nil || s != sealed(entries) {
		t.Fatalf("have %+v, %v", s, err)
	}
	if err := s.Check(entries); err != nil {
		t.Error(err)
	}
	for i := range signed {
		changed := bytes.Clone(signed)
		changed[i] ^= 1
		if s, err := OpenSeal(changed, key); err == nil && s != sealed(entries) {
			t.Fatalf("byte %d was changed, and the seal is %+v", i, s)
		}
	}
}

// TestSealIsOfItsKey: a node cannot seal for another one.
func TestSealIsOfItsKey(t *testing.T) {
	signer, key := keys(t, NodeSigner("node-b", testEpoch))
	signed, err := sealed(entries).Sign(signer)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenSeal(signed, key); !errors.Is(err, ErrFormat) {
		t.Errorf("error is %v", err)
	}
}

func TestCheckFindsEveryChange(t *testing.T) {
	for name, changed := range map[string][]Entry{
		"changed":  {{7, []byte("x")}, entries[1], entries[2]},
		"number":   {{8, []byte("a")}, entries[1], entries[2]},
		"swapped":  {entries[1], entries[0], entries[2]},
		"deleted":  {entries[0], entries[2]},
		"doubled":  {entries[0], entries[0], entries[1], entries[2]},
		"none":     {},
		"moved on": {entries[0], entries[1], {11, []byte("b")}},
	} {
		if sealed(entries).Check(changed) == nil {
			t.Errorf("%s: not found", name)
		}
	}
}

func TestLeavesRoundTrip(t *testing.T) {
	want := Sequence{testNode, testEpoch, ClassCritical}
	s, e, err := ParseEventLeaf(EventLeaf(want, Entry{5, []byte("data\nwith lines\n")}))
	if err != nil || s != want || e.Seq != 5 || string(e.Data) != "data\nwith lines\n" {
		t.Errorf("have %v, %v, %v", s, e, err)
	}
	node, epoch, vkey, err := ParseKeyLeaf(KeyLeaf(testNode, testEpoch, "name+hash+key"))
	if err != nil || node != testNode || epoch != testEpoch || vkey != "name+hash+key" {
		t.Errorf("have %s, %s, %s, %v", node, epoch, vkey, err)
	}
}

func TestCheckpointGrew(t *testing.T) {
	signer, key := keys(t, LogSigner("example.org", testEpoch))
	tree := treeOf(entries)
	at := func(n int64) Checkpoint {
		root, err := tlog.TreeHash(n, tree)
		if err != nil {
			t.Fatal(err)
		}
		return Checkpoint{key.Name(), n, root}
	}
	signed, err := at(3).Sign(signer)
	if err != nil {
		t.Fatal(err)
	}
	c, err := OpenCheckpoint(signed, key)
	if err != nil || c != at(3) {
		t.Fatalf("have %+v, %v", c, err)
	}
	_, foreign := keys(t, LogSigner("example.org", testEpoch))
	if _, err := OpenCheckpoint(signed, foreign); err == nil || !strings.Contains(err.Error(), "signed by "+keyName(key.Name(), key.KeyHash())+", and the key is "+keyName(foreign.Name(), foreign.KeyHash())) {
		t.Errorf("with another key: %v", err)
	}
	grown, err := tlog.ProveTree(3, 2, tree)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Grew(at(2), grown); err != nil {
		t.Error(err)
	}
	other := at(2)
	other.Root[0] ^= 1
	if c.Grew(other, grown) == nil || at(2).Grew(c, grown) == nil {
		t.Error("another history was taken for the same")
	}
}
