package policy_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// TestReplay: what was recorded, under a candidate that lets others in, asks for less time, and leaves a service out.
func TestReplay(t *testing.T) {
	candidate := mustParse(t, strings.NewReplacer(
		`"spiffe://example.org/app/web", "spiffe://example.org/ops/*"`, `"spiffe://example.org/app/*"`, "maxDuration: 15m", "maxDuration: 10m",
		"ports: [6379, 6380]", "ports: [6379]").Replace(good))
	web, ops, batch := spiffeid.RequireFromString("spiffe://example.org/app/web"), spiffeid.RequireFromString("spiffe://example.org/ops/a"), spiffeid.RequireFromString("spiffe://example.org/app/batch")
	db, cache := netip.MustParseAddrPort("10.1.0.1:5432"), netip.MustParseAddrPort("10.2.0.2:6380")
	long, short := goodFacts(), goodFacts()
	short.Duration /= 3
	shadowed := mustParse(t, strings.Replace(good, "protocol: TCP", "mode: Shadow", 1))
	if got, why := shadowed.Replay(policy.Seen{Protocol: "tcp", Server: cache}); got != policy.FatePasses || !strings.Contains(why, "cache is not enforced (mode: Shadow)") {
		t.Errorf("a service that is let go: %s, because %s", got, why)
	}
	for _, c := range []struct {
		name string
		seen policy.Seen
		want policy.Fate
		says string
	}{
		{"let in before and now", policy.Seen{Server: db, Passed: true, Identity: web}, policy.FateSame, "access[0]"},
		{"let in before", policy.Seen{Server: db, Passed: true, Identity: ops}, policy.FateBreaks, `has "app" where the identity has "ops"`},
		{"let in now", policy.Seen{Server: db, Identity: batch, Unauthorised: true}, policy.FatePasses, "access[0]"},
		{"shut out before and now", policy.Seen{Server: db, Identity: ops, Unauthorised: true}, policy.FateSame, ""},
		{"refused for something else", policy.Seen{Server: db, Identity: web}, policy.FateSame, "something else"},
		{"without an identity", policy.Seen{Server: db}, policy.FateSame, "something else"},
		{"not protected any more", policy.Seen{Server: cache}, policy.FatePasses, "no protected service"},
		{"passed and not protected any more", policy.Seen{Server: cache, Passed: true, Identity: web}, policy.FateSame, "no protected service"},
		{"around, for too long", policy.Seen{Server: db, Passed: true, Bypassed: true, Grant: &long}, policy.FateBreaks, "15m is over the cap of 10m"},
		{"around", policy.Seen{Server: db, Passed: true, Bypassed: true, Grant: &short}, policy.FateSame, `policy "nightly-backup"`},
		{"around, nobody knows how", policy.Seen{Server: db, Passed: true, Bypassed: true}, policy.FateUnknown, "not at hand"},
		{"passed what nobody protected", policy.Seen{Server: db, Passed: true}, policy.FateBreaks, "postgres asks for an identity"},
	} {
		c.seen.Protocol = "tcp"
		if got, why := candidate.Replay(c.seen); got != c.want || !strings.Contains(why, c.says) {
			t.Errorf("%s: %s, because %s; want %s", c.name, got, why, c.want)
		}
	}
}

// TestReplayOfWatched: what passed at services that are not enforced, under a candidate that enforces them, and one where a pod has the
// port of the node's.
func TestReplayOfWatched(t *testing.T) {
	enforces := mustParse(t, good+"---\n"+head+"ProtectedService\nmetadata: {name: datagrams}\nspec: {target: Host, protocol: UDP, ports: [53]}\n")
	shadows := mustParse(t, strings.Replace(good, "target: Host", "target: Host\n  mode: Shadow", 1))
	beside := mustParse(t, strings.NewReplacer("ports: [5432]", "ports: [5432, 6380]", "target: Pod", "target: Pod\n  mode: Observe").Replace(good))
	db, dns, cache := netip.MustParseAddrPort("10.1.0.1:5432"), netip.MustParseAddrPort("10.1.0.1:53"), netip.MustParseAddrPort("10.2.0.2:6380")
	for _, c := range []struct {
		name string
		set  *policy.Set
		seen policy.Seen
		want policy.Fate
		says string
	}{
		{"without an identity", enforces, policy.Seen{Server: db, Passed: true}, policy.FateBreaks, "postgres asks for an identity"},
		{"not enforced there either", shadows, policy.Seen{Server: db, Passed: true}, policy.FateSame, "not enforced (mode: Shadow)"},
		{"under a path", enforces, policy.Seen{Server: db, Passed: true, Bypassed: true}, policy.FateUnknown, "not at hand"},
		{"what nobody may send", enforces, policy.Seen{Server: db, Passed: true, Refusal: "BAD_FLAGS"}, policy.FateBreaks, "postgres refuses it (BAD_FLAGS)"},
		{"what nobody may send, not enforced", shadows, policy.Seen{Server: db, Passed: true, Refusal: "BAD_FLAGS"}, policy.FateSame, "not enforced"},
		{"UDP to a TCP service", enforces, policy.Seen{Protocol: "udp", Server: db, Passed: true}, policy.FateBreaks, "postgres refuses UDP"},
		{"UDP that was refused", enforces, policy.Seen{Protocol: "udp", Server: db}, policy.FateSame, "postgres refuses UDP"},
		{"UDP to a TCP service that is not enforced", shadows, policy.Seen{Protocol: "udp", Server: db, Passed: true}, policy.FateSame, "not enforced"},
		{"UDP", enforces, policy.Seen{Protocol: "udp", Server: dns, Passed: true}, policy.FateBreaks, "datagrams asks for a grant"},
		{"at a pod with a port of the node's", beside, policy.Seen{Server: cache, Passed: true, Service: "cache"}, policy.FateSame, "cache is not enforced"},
		{"at the node with a port of a pod's", beside, policy.Seen{Server: cache, Passed: true, Service: "postgres"}, policy.FateBreaks, "postgres asks for an identity"},
	} {
		if got, why := c.set.Replay(c.seen); got != c.want || !strings.Contains(why, c.says) {
			t.Errorf("%s: %s, because %s; want %s", c.name, got, why, c.want)
		}
	}
}
