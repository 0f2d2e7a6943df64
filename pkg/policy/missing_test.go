package policy_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestMissingApprovals: who is missing is said by groups and by people, and only of those whose approval would count.
func TestMissingApprovals(t *testing.T) {
	for _, c := range []struct{ approvals, signers, want string }{
		{"[]", "a", ""},
		{`[{from: ["group:dba"]}]`, "a", "1 of group:dba: b c"}, // not whoever asks
		{`[{from: ["group:dba"], min: 2}]`, "a", "2 of group:dba: b c"},
		{`[{from: ["group:dba"], min: 2}]`, "a b", "1 of group:dba: c"}, // nor who agreed
		{`[{from: ["group:dba", e], min: 2}]`, "a b c", ""},
		{`[{from: ["group:dba"]}, {from: ["group:sec"]}]`, "a", "1 of group:dba: b c; 1 of group:sec: c d"},
		{`[{from: ["group:dba"]}, {from: ["group:sec"]}]`, "a c", "1 of group:sec: d"}, // c sits where b could: d is of sec alone
	} {
		signers := strings.Fields(c.signers)
		facts := goodFacts()
		facts.Addresses, facts.Requester, facts.Signers = addrs("10.1.0.2"), signers[0], signed(signers...)
		var got []string
		for _, m := range quorum(t, c.approvals).MissingApprovals(facts, time.Now()) {
			got = append(got, fmt.Sprintf("%d of %s: %s", m.Count, strings.Join(m.From, ","), strings.Join(m.People, " ")))
		}
		if text := strings.Join(got, "; "); text != c.want {
			t.Errorf("%s signed by %s: %q, want %q", c.approvals, c.signers, text, c.want)
		}
	}
	facts := goodFacts()
	facts.Addresses, facts.Requester, facts.Signers, facts.Duration = addrs("10.1.0.2"), "a", signed("a"), 24*time.Hour
	if got := quorum(t, `[{from: [b]}]`).MissingApprovals(facts, time.Now()); got != nil {
		t.Errorf("what is refused for its duration misses the approvals %v", got)
	}
}

// TestMissingApprovalsOfKeysThatCount: who has only keys that count for nothing is not asked.
func TestMissingApprovalsOfKeysThatCount(t *testing.T) {
	text := string(quorum(t, `[{from: ["group:dba", d]}]`).YAML())
	b := numberedKey(t, 1)
	line := func(i int) string { return fmt.Sprintf("publicKey: %s\n", numberedKey(t, i)) }
	indent := strings.Repeat(" ", 10)
	for what, edit := range map[string]*strings.Replacer{
		"b, revoked": strings.NewReplacer("  groups:", "  revokedKeys: ["+b.ID()+"]\n  groups:"),
		"b, expired": strings.NewReplacer(line(1), line(1)+indent+"notAfter: 2020-01-01T00:00:00Z\n"),
		"b, no use":  strings.NewReplacer(line(1), line(1)+indent+"uses: [request]\n"),
		"b, denied":  strings.NewReplacer("apiVersion: sallyport.dev/v1alpha1\nkind: Keyring", "apiVersion: sallyport.dev/v1alpha1\nkind: DenyList\nmetadata: {name: d}\nspec: {reason: left, people: [b]}\n---\napiVersion: sallyport.dev/v1alpha1\nkind: Keyring"),
	} {
		edited := edit.Replace(text)
		if edited == text {
			t.Fatalf("%s: nothing was changed in\n%s", what, text)
		}
		facts := goodFacts()
		facts.Addresses, facts.Requester, facts.Signers = addrs("10.1.0.2"), "a", signed("a")
		missing := mustParse(t, edited).MissingApprovals(facts, time.Date(2026, 7, 1, 0, 0, 0, 0, time.UTC))
		if len(missing) != 1 || !slices.Equal(missing[0].People, []string{"c", "d"}) {
			t.Errorf("%s: %+v", what, missing)
		}
	}
}
