package policy_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

const remote = head + `RemoteService
metadata: {name: orders}
spec:
  addresses: ["10.0.0.5", "fd00::5"]
  ports: [5432]
  identities: ["spiffe://example.org/sallyport/proxy/node-b"]
  callers: ["spiffe://example.org/shop/*"]
`

func TestRemoteService(t *testing.T) {
	set := mustParse(t, remote)
	s, ok := set.RemoteServiceAt(netip.MustParseAddrPort("[::ffff:10.0.0.5]:5432"))
	if !ok || s.Name != "orders" || s.Spec.Without != policy.WithoutRefuse {
		t.Errorf("%+v, %v", s, ok)
	}
	for _, at := range []string{"10.0.0.5:5433", "10.0.0.6:5432"} {
		if s, ok := set.RemoteServiceAt(netip.MustParseAddrPort(at)); ok {
			t.Errorf("%s is %s", at, s.Name)
		}
	}
	if again := mustParse(t, string(set.YAML())); again.Digest() != set.Digest() || !strings.Contains(string(set.YAML()), "RemoteService") {
		t.Errorf("another digest of %s", set.YAML())
	}
	if _, ok := set.ServiceAt(policy.ProtocolTCP, netip.MustParseAddrPort("10.0.0.5:5432")); ok {
		t.Error("it is protected here")
	}
	if !s.Answers("spiffe://example.org/sallyport/proxy/node-b") || s.Answers("spiffe://example.org/sallyport/proxy/node-bb") {
		t.Error("others may answer, or the one may not")
	}
}

func TestCallersOfARemoteService(t *testing.T) {
	denied := mustParse(t, remote+"---\n"+head+"DenyList\nmetadata: {name: stop}\nspec: {reason: theft, identities: [\"spiffe://example.org/shop/old\"]}\n")
	for _, c := range []struct{ id, says string }{
		{"spiffe://example.org/shop/web", ""},
		{"spiffe://example.org/shop", "covers what is below it"},
		{"spiffe://example.org/shopping/web", `has "shop" where`},
		{"spiffe://other.org/shop/web", "trust domain example.org"},
		{"spiffe://example.org/shop/old", `denied by the list "stop": theft`},
	} {
		d := denied.AuthoriseCaller("orders", policy.Caller{ID: spiffeid.RequireFromString(c.id)}, time.Now())
		if d.Allowed != (c.says == "") || !strings.Contains(strings.Join(d.Near, "; "), c.says) {
			t.Errorf("%s: %+v", c.id, d)
		}
		if asked, err := denied.Ask("orders", policy.AccessQuestion{Identity: c.id}); err != nil || asked.Allowed != d.Allowed {
			t.Errorf("%s is asked: %+v, %v", c.id, asked, err)
		}
	}
	if d := denied.AuthoriseCaller("orders", policy.Caller{Provider: "corp", Subject: "x"}, time.Now()); d.Allowed {
		t.Error("a token may ask")
	}
	if d := denied.AuthoriseCaller("other", policy.Caller{ID: spiffeid.RequireFromString("spiffe://example.org/shop/web")}, time.Now()); d.Allowed {
		t.Error("of a service that is not there")
	}
}

func TestRemoteServiceProblems(t *testing.T) {
	other := "---\n" + head + "RemoteService\nmetadata: {name: other}\nspec: {addresses: [10.0.0.5], ports: [5432], identities: [\"spiffe://a.org/b\"], callers: [\"spiffe://a.org/*\"]}\n"
	for _, c := range []struct{ from, to, field string }{
		{`["10.0.0.5", "fd00::5"]`, "[]", "spec.addresses"},
		{`"fd00::5"`, `"::1"`, "spec.addresses[1]"},
		{`"fd00::5"`, `"0.0.0.0"`, "spec.addresses[1]"},
		{`"fd00::5"`, `"ff02::1"`, "spec.addresses[1]"},
		{`"fd00::5"`, `"10.0.0.5"`, "spec.addresses[1]"},
		{"[5432]", "[]", "spec.ports"},
		{"[5432]", "[0]", "spec.ports[0]"},
		{`identities: ["spiffe://example.org/sallyport/proxy/node-b"]`, "identities: []", "spec.identities"},
		{"proxy/node-b", "proxy/*/b", "spec.identities[0]"},
		{`callers: ["spiffe://example.org/shop/*"]`, "", "spec.callers"},
		{"spiffe://example.org/shop/*", "web", "spec.callers[0]"},
		{"  ports", "  without: clear\n  ports", "spec.without"},
		{"  ports", "  protocol: UDP\n  ports", "spec.protocol"},
		{"callers: [\"spiffe://example.org/shop/*\"]\n", "callers: [\"spiffe://example.org/shop/*\"]\n" + other, "spec.addresses"},
		{"callers: [\"spiffe://example.org/shop/*\"]\n", "callers: [\"spiffe://example.org/shop/*\"]\n---\n" + head + "ProtectedService\nmetadata: {name: orders}\nspec: {target: Host, ports: [1]}\n", "metadata.name"},
	} {
		_, err := policy.Parse("remote.yaml", []byte(strings.Replace(remote, c.from, c.to, 1)))
		if errs := policy.Errors(err); !slices.ContainsFunc(errs, func(e *policy.Error) bool { return e.Field == c.field && e.Hint != "" && e.Line > 0 }) {
			t.Errorf("%q: %v, want a problem of %s", c.to, err, c.field)
		}
	}
}

// TestLeaveOut: what is left out of a set is out of its digest, and nothing else is.
func TestLeaveOut(t *testing.T) {
	set := mustParse(t, good+"---\n"+remote)
	less := set.LeaveOut(func(_ string, a netip.Addr) bool { return a.Is6() })
	if _, ok := less.RemoteServiceAt(netip.MustParseAddrPort("[fd00::5]:5432")); ok || less.Digest() == set.Digest() {
		t.Error("it is still there")
	}
	if _, ok := less.RemoteServiceAt(netip.MustParseAddrPort("10.0.0.5:5432")); !ok || len(less.Services()) != len(set.Services()) {
		t.Error("more is gone")
	}
	if _, ok := set.RemoteServiceAt(netip.MustParseAddrPort("[fd00::5]:5432")); !ok {
		t.Error("the set itself has changed")
	}
	none := set.LeaveOut(func(string, netip.Addr) bool { return true })
	if none.Digest() != mustParse(t, good).Digest() || len(none.RemoteServices()) != 0 {
		t.Errorf("%v are left", none.RemoteServices())
	}
	if same := set.LeaveOut(func(string, netip.Addr) bool { return false }); same != set {
		t.Error("nothing was left out, and it is another set")
	}
}
