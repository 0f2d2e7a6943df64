package policy_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

func TestAuthorise(t *testing.T) {
	s := mustParse(t, good)
	for _, c := range []struct {
		service, id string
		rule        string // of the decision, empty: refused
		near        string // in the first near miss
	}{
		{"postgres", "spiffe://example.org/app/web", "access[0]: spiffe://example.org/app/web", ""},
		{"postgres", "spiffe://example.org/ops/alice", "access[0]: spiffe://example.org/ops/*", ""},
		{"postgres", "spiffe://example.org/ops/a/b/c", "access[0]: spiffe://example.org/ops/*", ""},
		{"postgres", "spiffe://example.org/app/web/admin", "", `/app/web: ends before "admin"`},
		{"postgres", "spiffe://example.org/app", "", `/app/web: goes on with "web"`},
		{"postgres", "spiffe://example.org/app/webby", "", `/app/web: has "web" where the identity has "webby"`},
		{"postgres", "spiffe://example.org/ops", "", "/ops/*: covers what is below it, not itself"},
		{"postgres", "spiffe://example.org/opsx/alice", "", "/app/web"},
		{"postgres", "spiffe://other.org/app/web", "", "is of the trust domain example.org, not other.org"},
		{"postgres", "spiffe://example.org", "", "goes on with"},
		{"postgres", "", "", "no identity was proven"},
		{"cache", "spiffe://example.org/app/web", "", "no access rule"},
		{"mysql", "spiffe://example.org/app/web", "", `no ProtectedService is named "mysql"`},
	} {
		t.Run(c.service+" "+c.id, func(t *testing.T) {
			var id spiffeid.ID
			if c.id != "" {
				id = spiffeid.RequireFromString(c.id)
			}
			d := s.Authorise(c.service, policy.Caller{ID: id}, nil, time.Now())
			if d.Allowed != (c.rule != "") || d.Rule != c.rule {
				t.Errorf("got %+v, want rule %q", d, c.rule)
			}
			if d.Allowed != (len(d.Near) == 0) || !strings.Contains(strings.Join(d.Near, "\n"), c.near) {
				t.Errorf("near misses are %q, want %q", d.Near, c.near)
			}
			if len(d.Near) > 0 && c.near != "" && !strings.Contains(d.Near[0], c.near) {
				t.Errorf("%q does not come first in %q", c.near, d.Near)
			}
		})
	}
}

func TestNilSetAllowsNothing(t *testing.T) {
	for _, s := range []*policy.Set{nil, {}} {
		if d := s.Authorise("postgres", policy.Caller{ID: spiffeid.RequireFromString("spiffe://example.org/app/web")}, nil, time.Now()); d.Allowed {
			t.Error("allowed an identity")
		}
		if _, ok := s.ServiceAt(policy.ProtocolTCP, netip.MustParseAddrPort("10.0.0.1:5432")); ok {
			t.Error("found a service")
		}
		if _, err := s.CheckGrant(goodFacts()); err == nil {
			t.Error("allowed a grant")
		}
		if s.Services() != nil || s.BypassPolicies() != nil || s.Keyrings() != nil || s.YAML() != nil || s.Digest() != "" {
			t.Error("has something in it")
		}
	}
}

// TestAuthoriseAgainstSegments holds the matching of texts against one of lists of segments.
func TestAuthoriseAgainstSegments(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	path := func(most int) []string {
		segments := make([]string, r.IntN(most+1))
		for i := range segments {
			segments[i] = strings.Repeat("a", 1+r.IntN(2))
		}
		return segments
	}
	td := []string{"a.org", "aa.org"}
	for range 500 {
		wantTD, wanted, below := td[r.IntN(2)], path(3), r.IntN(2) == 0
		if !below && len(wanted) == 0 {
			continue
		}
		gotTD, given := td[r.IntN(2)], path(4)
		pattern := "spiffe://" + strings.Join(append([]string{wantTD}, wanted...), "/")
		if below {
			pattern += "/*"
		}
		id := spiffeid.RequireFromString("spiffe://" + strings.Join(append([]string{gotTD}, given...), "/"))
		want := wantTD == gotTD && len(given) >= len(wanted) && fmt.Sprint(given[:len(wanted)]) == fmt.Sprint(wanted) &&
			(below == (len(given) > len(wanted)))
		s := mustParse(t, strings.Replace(good, "spiffe://example.org/app/web\", \"spiffe://example.org/ops/*", pattern, 1))
		if d := s.Authorise("postgres", policy.Caller{ID: id}, nil, time.Now()); d.Allowed != want {
			t.Fatalf("pattern %s, identity %s: got %+v, want %t", pattern, id, d, want)
		}
	}
}

func TestServiceAt(t *testing.T) {
	s := mustParse(t, strings.Replace(good, "ports: [5432]", "ports: [5432, 6379]", 1))
	for dst, want := range map[string]string{
		"10.2.0.2:6379":            "cache",
		"[::ffff:10.2.0.2]:6379":   "cache",
		"[fd00:2::2]:6380":         "cache",
		"[fd00:2::2%eth0]:6380":    "cache",
		"10.2.0.3:6379":            "postgres",
		"10.2.0.2:5432":            "postgres",
		"[2001:db8::1]:5432":       "postgres",
		"10.2.0.3:6380":            "",
		"10.2.0.2:1":               "",
		"[::ffff:192.0.2.1]:5432":  "postgres",
		"127.0.0.1:5432":           "postgres",
		"[fd00:2::2]:0":            "",
		"[fd00:2:0:0:0:0:0:2]:443": "",
	} {
		svc, ok := s.ServiceAt(policy.ProtocolTCP, netip.MustParseAddrPort(dst))
		if svc.Name != want || ok != (want != "") {
			t.Errorf("%s belongs to %q, want %q", dst, svc.Name, want)
		}
	}
}

// TestServiceAtOfAProtocol: the same port may be one service of TCP and another of UDP.
func TestServiceAtOfAProtocol(t *testing.T) {
	s := mustParse(t, good+"---\n"+head+"ProtectedService\nmetadata: {name: datagrams}\nspec:\n  target: Host\n  protocol: UDP\n  ports: [5432]\n")
	dst := netip.MustParseAddrPort("127.0.0.1:5432")
	for protocol, want := range map[string]string{policy.ProtocolTCP: "postgres", policy.ProtocolUDP: "datagrams"} {
		if svc, _ := s.ServiceAt(protocol, dst); svc.Name != want {
			t.Errorf("%s belongs to %q, want %q", protocol, svc.Name, want)
		}
	}
	svc, _ := s.Service("datagrams")
	if svc.Spec.Idle == nil || svc.Spec.Idle.Duration != policy.DefaultIdle {
		t.Errorf("idle time is %v, want %v", svc.Spec.Idle, policy.DefaultIdle)
	}
}

func BenchmarkAuthorise(b *testing.B) {
	s := mustParse(b, good)
	id := spiffeid.RequireFromString("spiffe://example.org/ops/alice")
	for b.Loop() {
		if !s.Authorise("postgres", policy.Caller{ID: id}, nil, time.Now()).Allowed {
			b.Fatal("refused")
		}
	}
}
