package policy_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

const grantID = "01J8ZQ4X5M3T9V0Y2B7C6D1E4F"

// denying is the good set with a deny list.
func denying(t *testing.T, entries string) *policy.Set {
	t.Helper()
	return mustParse(t, good+"---\napiVersion: sallyport.dev/v1alpha1\nkind: DenyList\nmetadata: {name: incident}\nspec: {reason: stolen laptop, "+entries+"}\n")
}

// TestDenyWins: whatever else allows a grant, a list that names any part of it does not.
func TestDenyWins(t *testing.T) {
	now := at(t, "2026-11-23T09:00:00Z")
	for entries, field := range map[string]string{
		"people: [alice]":                                 "requester",
		"people: [carol]":                                 "signatures",
		"services: [postgres]":                            "service",
		"addresses: [10.1.0.2]":                           "addresses[0]",
		`addresses: ["fd00:1::/64"]`:                      "addresses[1]",
		"grants: [" + grantID + "]":                       "id",
		"people: [bob]":                                   "",
		"services: [cache]":                               "",
		"addresses: [10.1.0.3]":                           "",
		"people: [alice], notAfter: 2026-11-23T09:00:00Z": "", // ended
		"people: [alice], notAfter: 2026-11-23T09:00:01Z": "requester",
	} {
		facts := goodFacts()
		facts.ID, facts.Now, facts.Signers = grantID, now, signed("alice", "carol")
		_, err := denying(t, entries).CheckGrant(facts)
		e := policy.Errors(err)
		switch {
		case field == "" && err != nil:
			t.Errorf("%s: %v", entries, err)
		case field != "" && (len(e) != 1 || e[0].Field != field || !errors.Is(err, policy.ErrRefused) || !strings.Contains(e[0].Msg, "stolen laptop")):
			t.Errorf("%s: %v, want a refusal of %s", entries, err, field)
		}
	}
	facts := goodFacts()
	if _, err := denying(t, "people: [alice], notAfter: 2026-11-23T09:00:00Z").CheckGrant(facts); err == nil {
		t.Error("at a time that nobody knows, a list that may have ended does not count")
	}
}

// TestDeniedIdentity: access rules do not help.
func TestDeniedIdentity(t *testing.T) {
	id, now := spiffeid.RequireFromString("spiffe://example.org/app/web"), at(t, "2026-11-23T09:00:00Z")
	for entries, allowed := range map[string]bool{
		`identities: ["spiffe://example.org/app/web"]`:                                 false,
		`identities: ["spiffe://example.org/*"]`:                                       false,
		`identities: ["spiffe://example.org/app/web/*"]`:                               true,
		`identities: ["spiffe://example.org/app/web"], notAfter: 2026-11-23T08:00:00Z`: true,
	} {
		d := denying(t, entries).Authorise("postgres", policy.Caller{ID: id}, nil, now)
		if d.Allowed != allowed || !allowed && !strings.Contains(strings.Join(d.Near, ""), "stolen laptop") {
			t.Errorf("%s: %+v", entries, d)
		}
	}
	if d := denying(t, `identities: ["spiffe://example.org/app/web"]`).Authorise("postgres", policy.Caller{ID: id}, nil, time.Time{}); d.Allowed {
		t.Error("at a time that nobody knows")
	}
}
