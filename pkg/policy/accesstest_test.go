package policy_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// tested is the set with tests in its service.
func tested(t *testing.T, tests string) (*policy.Set, error) {
	t.Helper()
	return policy.Parse("resources.yaml", []byte(strings.Replace(web, "  access:\n", "  tests:\n"+tests+"  access:\n", 1)))
}

const admin = `subject: corp/carol, groups: [corp/admins], claims: {mfa: "true"}, from: 10.1.0.9, at: 2026-11-23T09:00:00Z, signals: {posture: ok}, path: /admin/x`

// TestAccessTests: a test asks the evaluator, with everything that a rule can look at.
func TestAccessTests(t *testing.T) {
	for test, want := range map[string]string{
		`{name: n, expect: Allow, ` + admin + `}`:                                                                    "",
		`{name: n, expect: Refuse, ` + admin + `}`:                                                                   "access[1]: group corp/admins allows it",
		`{name: n, expect: Allow, ` + strings.Replace(admin, "ok", "against", 1) + `}`:                               "posture speaks against corp/carol",
		`{name: n, expect: Allow, ` + strings.Replace(admin, ", signals: {posture: ok}", "", 1) + `}`:                "nothing was heard of posture",
		`{name: n, expect: Allow, ` + strings.Replace(admin, `"true"`, `"yes"`, 1) + `}`:                             "when: it is not met",
		`{name: n, expect: Allow, ` + strings.Replace(admin, "10.1.0.9", "10.2.0.9", 1) + `}`:                        "from: 10.2.0.9",
		`{name: n, expect: Allow, identity: "` + appWeb + `", path: /health}`:                                        "",
		`{name: n, expect: Allow, identity: "` + appWeb + `"}`:                                                       "",
		`{name: n, expect: Refuse, identity: "` + appWeb + `", method: PUT, path: /health}`:                          "",
		`{name: n, expect: Allow, identity: "` + appWeb + `", method: POST, path: /orders}`:                          "header x-team",
		`{name: n, expect: Allow, identity: "` + appWeb + `", method: POST, path: /orders, headers: {x-team: blue}}`: "",
		`{name: n, expect: Allow, identity: "` + appWeb + `", path: /health, host: x.example.org}`:                   "not served as",
		`{name: n, expect: Allow, identity: "` + appWeb + `", path: /health, proof: oidc}`:                           "has not such names",
	} {
		set, err := tested(t, "    - "+test+"\n")
		if err != nil {
			t.Errorf("%s: %v", test, err)
			continue
		}
		err = set.Test()
		if (err == nil) != (want == "") || err != nil && (!errors.Is(err, policy.ErrTestFailed) || !strings.Contains(err.Error(), want) || policy.Errors(err)[0].Field != "spec.tests[0]") {
			t.Errorf("%s: %v, want %q", test, err, want)
		}
		if set.Tests() != 1 {
			t.Errorf("%s: %d tests", test, set.Tests())
		}
		checkRoundTrip(t, set)
	}
	plain := mustParse(t, web)
	with, err := tested(t, "    - {name: n, expect: Allow, "+admin+"}\n")
	if got := policy.Changes(plain, with); err != nil || len(got) != 1 || got[0].Effect != policy.Neither {
		t.Errorf("%v, %v", got, err)
	}
}

func TestWrongAccessTests(t *testing.T) {
	for test, field := range map[string]string{
		`{expect: Allow, identity: "` + appWeb + `"}`:                               "spec.tests[0].name",
		`{name: n, identity: "` + appWeb + `"}`:                                     "spec.tests[0].expect",
		`{name: n, expect: Allow}`:                                                  "spec.tests[0].identity",
		`{name: n, expect: Allow, identity: "` + appWeb + `", subject: corp/alice}`: "spec.tests[0].identity",
		`{name: n, expect: Allow, identity: web}`:                                   "spec.tests[0].identity",
		`{name: n, expect: Allow, subject: alice}`:                                  "spec.tests[0].subject",
		`{name: n, expect: Allow, subject: corp/alice, groups: [other/a]}`:          "spec.tests[0].groups",
		`{name: n, expect: Allow, subject: corp/alice, proof: word}`:                "spec.tests[0].proof",
		`{name: n, expect: Allow, subject: corp/alice, signals: {a: maybe}}`:        "spec.tests[0].signals",
		`{name: n, expect: Allow, subject: corp/alice, path: /a/../b}`:              "spec.tests[0].path",
		`{name: n, expect: Allow, subject: corp/alice, method: GET}`:                "spec.tests[0].path",
		`{name: n, expect: Allow, subject: corp/alice, path: /, headers: {A: b}}`:   "spec.tests[0].headers",
	} {
		_, err := tested(t, "    - "+test+"\n")
		if errs := policy.Errors(err); len(errs) != 1 || errs[0].Field != field || errs[0].Hint == "" || errs[0].Line != 17 {
			t.Errorf("%s: %v", test, err)
		}
	}
	if _, err := mustParse(t, good).Ask("postgres", policy.AccessQuestion{Identity: appWeb, Path: "/"}); err == nil {
		t.Error("a request of a service without http is judged")
	}
	if _, err := mustParse(t, good).Ask("postgers", policy.AccessQuestion{Identity: appWeb}); err == nil || policy.Errors(err)[0].Hint != "did you mean postgres?" {
		t.Error(err)
	}
}

// TestCheckNode: a node takes no service that nobody could ever come in at, and none whose certificate it does not have.
func TestCheckNode(t *testing.T) {
	node := func(more ...string) policy.AgentConfig {
		c := policy.AgentConfig{Spec: policy.AgentConfigSpec{TrustDomain: "node.org", FederatesWith: more}}
		c.Spec.Proxy.Certificates = []policy.WebCertificate{{Name: "web"}}
		return c
	}
	attesting := func(c policy.AgentConfig) policy.AgentConfig {
		c.Spec.Workloads.API = policy.WorkloadsBroker
		return c
	}
	onlyTokens := strings.Replace(good, `identities: ["spiffe://example.org/app/web", "spiffe://example.org/ops/*"]`, `identities: ["spiffe://partner.org/*"]`, 1)
	for name, c := range map[string]struct {
		text  string
		node  policy.AgentConfig
		field string
	}{
		"another trust domain":    {good, node(), "spec.access"},
		"federated":               {good, node("example.org"), ""},
		"federated with others":   {good, node("partner.org"), "spec.access"},
		"own":                     {strings.ReplaceAll(good, "example.org", "node.org"), node(), ""},
		"one of them":             {strings.Replace(good, "spiffe://example.org/ops/*", "spiffe://node.org/*", 1), node(), ""},
		"below everything":        {onlyTokens, node(), "spec.access"},
		"only watched":            {strings.Replace(good, "target: Host\n", "target: Host\n  mode: Shadow\n", 1), node(), ""},
		"nobody on purpose":       {head + "ProtectedService\nmetadata: {name: a}\nspec: {target: Host, ports: [1]}\n", node(), ""},
		"people":                  {web, node(), ""},
		"remote, nobody attests":  {strings.ReplaceAll(remote, "example.org/shop", "node.org/shop"), node("example.org"), ""},
		"remote, others' callers": {remote, attesting(node("example.org")), "spec.callers"},
		"remote, nobody answers":  {strings.ReplaceAll(remote, "example.org/shop", "node.org/shop"), attesting(node()), "spec.callers"},
		"remote":                  {strings.ReplaceAll(remote, "example.org/shop", "node.org/shop"), attesting(node("example.org")), ""},
		"no certificate":          {strings.Replace(web, "certificate: web", "certificate: other", 1), node(), "spec.http.certificate"},
	} {
		err := mustParse(t, c.text).CheckNode(c.node)
		if errs := policy.Errors(err); len(errs) != map[bool]int{true: 1}[c.field != ""] || c.field != "" && (errs[0].Field != c.field || errs[0].Hint == "" || errs[0].Line == 0) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for api, closed := range map[string]bool{"": true, policy.WorkloadsNone: true, policy.WorkloadsBroker: false, policy.WorkloadsDelegated: false} {
		c := node()
		c.Spec.Workloads.API = api
		err := mustParse(t, remote).RemoteServices()[0].Closed(c)
		if (err != nil) != closed || closed && (err.Line == 0 || err.Hint == "" || !strings.Contains(err.Error(), "is closed on this node")) {
			t.Errorf("workloads by %q: %v", api, err)
		}
	}
}
