package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/test/loosen"
)

// office is those who may sign: carol, by the keyring, and a key of the node's configuration.
type office struct{ carol, pinned, stranger signer }

func newOffice(t *testing.T) office {
	t.Helper()
	return office{newSigner(t), newSigner(t), newSigner(t)}
}

// node is a directory whose sets have to be signed; the first is in force.
func (o office) node(t *testing.T) *directory {
	t.Helper()
	d := newDirectory(t)
	d.signed = &signedSets{name: "all", pinned: []policy.PublicKey{o.pinned.key.Public()}, now: time.Now}
	d.write("a.yaml", loosen.InForce(o.carol.key.Public().String()))
	d.sign(o.pinned)
	must(t, d.load())
	return d
}

// sign has the directory's set signed by these, and by nobody else.
func (d *directory) sign(by ...signer) {
	d.t.Helper()
	set, err := policy.LoadDir(d.dir)
	must(d.t, err)
	var envelope []byte
	for _, s := range by {
		envelope, err = grant.SignResources(d.t.Context(), set, envelope, s.key)
		must(d.t, err)
	}
	d.write(policy.SignatureFile, string(envelope))
}

// next is another agent on the same files, which asks for signatures as well.
func (d *directory) next() *directory {
	d.t.Helper()
	n := d.restart()
	n.signed = d.signed
	must(d.t, n.load())
	return n
}

// keeps checks that the set of that digest is in force, before and after a restart, and that the problem says why.
func (d *directory) keeps(digest string, says ...string) {
	d.t.Helper()
	d.reload()
	for _, now := range []*directory{d, d.next()} {
		if now.current().set.Digest() != digest {
			d.t.Errorf("in force: %s, want %s", now.current().set.Digest(), digest)
		}
		if problems := strings.Join(now.problems.lines(), "\n"); !contains(problems, says...) {
			d.t.Errorf("problems: %s\nwant %q", problems, says)
		}
	}
}

// TestNoKeyNoLoosening: whoever writes the directory and holds no key loosens nothing, whichever kind it is of; two people
// who may sign it do.
func TestNoKeyNoLoosening(t *testing.T) {
	o := newOffice(t)
	for _, kind := range loosen.Kinds() {
		t.Run(kind.Name, func(t *testing.T) {
			d := o.node(t)
			digest := d.current().set.Digest()
			text := kind.Change(loosen.InForce(o.carol.key.Public().String()))
			d.write("a.yaml", text)
			must(t, os.Remove(filepath.Join(d.dir, policy.SignatureFile)))
			d.keeps(digest, "looser than what is in force", kind.Says, "sallyport policy sign")
			newer := strings.Replace(text, "version: 4", "version: 5", 1)
			if !strings.Contains(newer, "version: 5") || strings.Contains(newer, "{name: other}") {
				return // no version that could be higher, or not this node's: nobody can sign it
			}
			d.write("a.yaml", newer)
			d.sign(o.stranger)
			d.keeps(digest, "no Keyring has the key")
			d.sign(o.carol)
			d.keeps(digest, "1 of the 2 people who have to sign it did")
			d.sign(o.carol, o.pinned)
			d.reload()
			if lines := d.problems.lines(); d.current().set.Digest() == digest || len(lines) != 0 {
				t.Errorf("signed by two: %v", lines)
			}
		})
	}
}

// TestSignedSetsDoNotComeBack: what was signed once is no licence to return to it, over a restart neither.
func TestSignedSetsDoNotComeBack(t *testing.T) {
	o := newOffice(t)
	d := o.node(t)
	first := loosen.InForce(o.carol.key.Public().String())
	signatures, err := os.ReadFile(filepath.Join(d.dir, policy.SignatureFile))
	must(t, err)
	tighter := strings.Replace(first, "maxDuration: 15m", "maxDuration: 5m", 1)
	d.write("a.yaml", tighter) // the signatures beside it are for another set, and not asked for
	d.reload()
	digest := d.current().set.Digest()
	if lines := d.problems.lines(); len(lines) != 0 || d.current().set.BypassPolicies()[0].Spec.MaxDuration.String() != "5m" {
		t.Fatalf("tighter, unsigned: %v", lines)
	}
	d.write("a.yaml", first)
	d.write(policy.SignatureFile, string(signatures))
	d.keeps(digest, "the version 4 is not higher than 4", "spec.maxDuration: 5m became 15m")
	d = d.next()
	d.keeps(digest, "the version 4 is not higher than 4")
	d.write("a.yaml", strings.Replace(first, "version: 4", "version: 3", 1))
	d.sign(o.carol, o.pinned)
	d.keeps(digest, "the version 3 is not higher than 4")
	d.write("a.yaml", strings.Replace(first, "version: 4", "version: 5", 1))
	d.sign(o.carol, o.pinned)
	d.reload()
	if lines := d.problems.lines(); len(lines) != 0 || d.next().current().set.Version() != 5 {
		t.Errorf("signed anew: %v", lines)
	}
}

// TestFirstSignedSet: a node takes its first set from the keys of its configuration, not from what the set says of itself,
// and does not begin anew when it has forgotten what was signed.
func TestFirstSignedSet(t *testing.T) {
	o := newOffice(t)
	d := newDirectory(t)
	d.signed = &signedSets{name: "all", pinned: []policy.PublicKey{o.pinned.key.Public()}, now: time.Now}
	text := loosen.InForce(o.carol.key.Public().String())
	d.write("a.yaml", text)
	for name, by := range map[string][]signer{"nobody": nil, "its own keyring": {o.carol}, "a stranger": {o.stranger}} {
		if by != nil {
			d.sign(by...)
		}
		if err := d.load(); err == nil || d.current() != nil || !contains(err.Error(), "first one of this node") {
			t.Errorf("signed by %s: %v", name, err)
		}
	}
	d.write("a.yaml", strings.Replace(text, "spec: {version: 4, signers: 2}", "spec: {version: 0, signers: 2}", 1))
	if err := d.load(); err == nil {
		t.Error("without a version")
	}
	d.write("a.yaml", text)
	d.sign(o.pinned)
	must(t, d.load())
	must(t, os.WriteFile(d.verified, []byte("nonsense"), 0o600))
	n := d.restart()
	n.signed = d.signed
	if err := n.load(); err == nil || n.current() != nil || !contains(err.Error(), "verified.yaml") {
		t.Errorf("what was verified is damaged: %v", err)
	}
}

// TestSetsOfOtherNodes: what was signed for other nodes, by the same people and with a higher version, is no set of this one: not
// in the place of its own, and not as its first. Nodes whose configurations say the same name share a set.
func TestSetsOfOtherNodes(t *testing.T) {
	o := newOffice(t)
	first := loosen.InForce(o.carol.key.Public().String())
	looser := strings.NewReplacer("version: 4", "version: 9", "maxDuration: 15m", "maxDuration: 4h").Replace(first)
	theirs := strings.Replace(looser, "{name: all}", "{name: lab}", 1)
	const says = `they are the set "lab", this node takes "all"`

	d := o.node(t)
	digest := d.current().set.Digest()
	d.write("a.yaml", theirs)
	d.sign(o.carol, o.pinned)
	d.keeps(digest, says, "policySet")
	d.write("a.yaml", strings.Replace(looser, "{name: all}", "{}", 1))
	d.reload()
	if d.current().set.Digest() != digest {
		t.Error("a set without a name is in force")
	}

	fresh := newDirectory(t)
	fresh.signed = &signedSets{name: "all", pinned: d.signed.pinned, now: time.Now}
	fresh.write("a.yaml", theirs)
	fresh.sign(o.pinned)
	if err := fresh.load(); err == nil || fresh.current() != nil || !contains(err.Error(), says) {
		t.Errorf("the first set is that of other nodes: %v", err)
	}

	// Moved to the others by its configuration, it takes their set, and keeps its own until that is there.
	d.write("a.yaml", first)
	moved := d.restart()
	moved.signed = &signedSets{name: "lab", pinned: d.signed.pinned, now: time.Now}
	must(t, moved.load())
	if lines := moved.problems.lines(); moved.current().set.Digest() != digest || len(lines) > 0 {
		t.Errorf("before the move: %v", lines)
	}
	moved.write("a.yaml", theirs)
	moved.sign(o.carol, o.pinned)
	moved.reload()
	if lines := moved.problems.lines(); moved.current().set.Name() != "lab" || len(lines) > 0 {
		t.Errorf("moved: %v", lines)
	}
}

// TestWhichKeysSignNothing: a key of the keyrings that one of them revokes, or that ended, counts no more. Keys of the
// configuration count whatever the keyrings say: whoever holds no key can revoke, and would lock out everybody.
func TestWhichKeysSignNothing(t *testing.T) {
	o := newOffice(t)
	revoke := func(s signer) func(string) string {
		return loosen.Swap(`revokedKeys: [`, fmt.Sprintf("revokedKeys: [%q, ", s.key.Public().ID()))
	}
	for _, c := range []struct {
		name   string
		change func(string) string
		taken  bool
	}{
		{"revoked", revoke(o.carol), false},
		{"ended", loosen.Swap("uses: [resources]", "uses: [resources], notAfter: 2020-01-01T00:00:00Z"), false},
		{"pinned, revoked", revoke(o.pinned), true},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := o.node(t)
			text := c.change(loosen.InForce(o.carol.key.Public().String()))
			d.write("a.yaml", text) // tighter
			d.reload()
			digest := d.current().set.Digest()
			d.write("a.yaml", strings.NewReplacer("version: 4", "version: 5", "maxDuration: 15m", "maxDuration: 16m").Replace(text))
			d.sign(o.carol, o.pinned)
			if !c.taken {
				d.keeps(digest, "1 of the 2 people")
				return
			}
			d.reload()
			if lines := d.problems.lines(); d.current().set.Version() != 5 || len(lines) > 0 {
				t.Errorf("kept out: %v", lines)
			}
		})
	}
}

// TestCheckAsksForSignatures: what the agent would keep out, `check` says before.
func TestCheckAsksForSignatures(t *testing.T) {
	o := newOffice(t)
	d := o.node(t)
	cfg := policy.DefaultAgentConfig()
	cfg.Spec.StateDir, cfg.Spec.Resources = filepath.Dir(d.verified), d.dir
	cfg.Spec.PolicySignatures, cfg.Spec.PolicyKeys, cfg.Spec.PolicySet = policy.SignaturesRequired, d.signed.pinned, d.signed.name
	must(t, os.Rename(d.verified, verifiedFile(cfg)))
	check := func() error {
		offered, err := d.from.read()
		must(t, err)
		return checkSigned(cfg, offered)
	}
	must(t, check())
	d.write("a.yaml", strings.Replace(loosen.InForce(o.carol.key.Public().String()), "maxDuration: 15m", "maxDuration: 16m", 1))
	if err := check(); err == nil || !contains(err.Error(), "spec.maxDuration: 15m became 16m") {
		t.Errorf("looser: %v", err)
	}
	cfg.Spec.PolicySignatures = policy.SignaturesOff
	must(t, check())
}

// TestSignedSetsAreRememberedFirst: a node that cannot remember a signed set does not put it to work; what is tighter it does.
func TestSignedSetsAreRememberedFirst(t *testing.T) {
	o := newOffice(t)
	d := o.node(t)
	d.verified = filepath.Join(filepath.Dir(d.verified), "gone", "verified.yaml")
	first := loosen.InForce(o.carol.key.Public().String())
	most := func() string { return d.current().set.BypassPolicies()[0].Spec.MaxDuration.String() }
	d.write("a.yaml", strings.NewReplacer("version: 4", "version: 5", "maxDuration: 15m", "maxDuration: 16m").Replace(first))
	d.sign(o.carol, o.pinned)
	d.reload()
	if lines := strings.Join(d.problems.lines(), "\n"); most() != "15m" || !contains(lines, "keep verified resources") {
		t.Errorf("looser: %s in force, problems %s", most(), lines)
	}
	d.write("a.yaml", strings.Replace(first, "maxDuration: 15m", "maxDuration: 14m", 1))
	d.reload()
	if lines := strings.Join(d.problems.lines(), "\n"); most() != "14m" || !contains(lines, "keep verified resources") {
		t.Errorf("tighter: %s in force, problems %s", most(), lines)
	}
}
