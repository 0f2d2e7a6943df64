package policy_test

import (
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// withTokens is a service whose bytes are carried, and that takes tokens.
const withTokens = head + `ProtectedService
metadata: {name: db}
spec:
  target: Host
  ports: [5432]
  tokens: {providers: [corp], audiences: [db], certificate: db}
  access:
  - {subjects: [corp/alice], when: 'claims.mfa == true'}
  - {groups: [corp/dba]}
  - {identities: ["spiffe://example.org/app/web"]}
---
` + head + `IdentityProvider
metadata: {name: corp}
spec: {issuer: "https://a.example.org", audiences: [db]}
`

func TestWrongTokens(t *testing.T) {
	checkRoundTrip(t, mustParse(t, withTokens))
	for name, c := range map[string]struct{ old, new, field string }{
		"no token":               {"providers: [corp], audiences: [db], ", "", "spec.tokens"},
		"unknown provider":       {"providers: [corp]", "providers: [corp, crop]", "spec.tokens.providers[1]"},
		"provider twice":         {"providers: [corp]", "providers: [corp, corp]", "spec.tokens.providers[1]"},
		"audience of two lines":  {"audiences: [db], c", `audiences: ["a\nb"], c`, "spec.tokens.audiences[0]"},
		"no certificate":         {", certificate: db", "", "spec.tokens.certificate"},
		"with http":              {"  tokens", "  http: {}\n  tokens", "spec.tokens"},
		"over UDP":               {"  tokens", "  protocol: UDP\n  tokens", "spec.tokens"},
		"subject of another one": {"corp/alice", "other/alice", "spec.access[0].subjects[0]"},
		"request":                {"claims.mfa == true", `path == "/"`, "spec.access[0].when"},
	} {
		text := strings.Replace(withTokens, c.old, c.new, 1)
		_, err := policy.Parse("resources.yaml", []byte(text))
		found := false
		for _, e := range policy.Errors(err) {
			found = found || e.Field == c.field && e.Hint != "" && e.Line > 0
		}
		if text == withTokens || !found {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestTokensProveCallers: tokens count beside X.509-SVIDs, and only those that the service names.
func TestTokensProveCallers(t *testing.T) {
	alice := policy.Caller{Provider: "corp", Subject: "alice", Proof: policy.ProofOIDC, Claims: map[string]any{"mfa": true}}
	weak, admin, other, byJWT := alice, alice, alice, workload(appWeb)
	weak.Claims = nil
	admin.Subject, admin.Groups = "bob", []string{"dba"}
	other.Provider = "other"
	byJWT.Proof = policy.ProofJWT
	oidcAlone := strings.Replace(withTokens, "audiences: [db], c", "c", 1)
	none := strings.Replace(strings.Replace(withTokens, "  tokens: {providers: [corp], audiences: [db], certificate: db}\n", "", 1),
		"  - {subjects: [corp/alice], when: 'claims.mfa == true'}\n  - {groups: [corp/dba]}\n", "", 1)
	for name, c := range map[string]struct {
		text string
		who  policy.Caller
		want bool
	}{
		"subject":                 {withTokens, alice, true},
		"subject without a claim": {withTokens, weak, false},
		"group":                   {withTokens, admin, true},
		"another provider":        {withTokens, other, false},
		"SVID":                    {withTokens, workload(appWeb), true},
		"JWT-SVID":                {withTokens, byJWT, true},
		"JWT-SVID where none is":  {oidcAlone, byJWT, false},
		"SVID without tokens":     {none, workload(appWeb), true},
		"token without tokens":    {none, alice, false},
		"JWT-SVID without tokens": {none, byJWT, false},
	} {
		if d := mustParse(t, c.text).Authorise("db", c.who, nil, time.Now()); d.Allowed != c.want {
			t.Errorf("%s: %+v", name, d)
		}
	}
}

// TestLooserTokens: whoever can come in with more kinds of tokens needs a signature.
func TestLooserTokens(t *testing.T) {
	more := "---\n" + head + "IdentityProvider\nmetadata: {name: second}\nspec: {issuer: \"https://b.example.org\", audiences: [db]}\n"
	const all = "  tokens: {providers: [corp], audiences: [db], certificate: db}\n"
	for next, looser := range map[string]bool{
		all: false, "  tokens: {providers: [corp], certificate: db}\n": false,
		"  tokens: {providers: [corp, second], audiences: [db], certificate: db}\n": true,
		"  tokens: {providers: [corp], audiences: [db, b], certificate: db}\n":      true,
		"  tokens: {providers: [corp], audiences: [db], certificate: other}\n":      true, // who answers is another one
	} {
		set := func(tokens string) *policy.Set { return mustParse(t, strings.Replace(withTokens, all, tokens, 1)+more) }
		if got := policy.Loosenings(set(all), set(next)); (len(got) > 0) != looser {
			t.Errorf("became %s: %v", next, got)
		}
	}
	bare := strings.Replace(strings.Replace(withTokens, all, "", 1), "  - {subjects: [corp/alice], when: 'claims.mfa == true'}\n  - {groups: [corp/dba]}\n", "", 1)
	with := strings.Replace(bare, "  access:", all+"  access:", 1)
	if got := policy.Loosenings(mustParse(t, bare), mustParse(t, with)); len(got) != 1 || got[0].Field != "spec.tokens" {
		t.Errorf("tokens were added: %v", got)
	}
	if got := policy.Loosenings(mustParse(t, with), mustParse(t, bare)); len(got) > 0 {
		t.Errorf("tokens were removed: %v", got)
	}
}

// TestNodeHasTheCertificateOfTokens: a node that cannot show it says so before it enforces.
func TestNodeHasTheCertificateOfTokens(t *testing.T) {
	c := policy.AgentConfig{}
	c.Spec.TrustDomain = "example.org"
	err := mustParse(t, withTokens).CheckNode(c)
	if errs := policy.Errors(err); len(errs) != 1 || errs[0].Field != "spec.tokens.certificate" {
		t.Error(err)
	}
	c.Spec.Proxy.Certificates = []policy.WebCertificate{{Name: "db"}}
	if err := mustParse(t, withTokens).CheckNode(c); err != nil {
		t.Error(err)
	}
}
