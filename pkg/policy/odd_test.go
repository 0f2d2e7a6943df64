package policy_test

import (
	"bytes"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/test/loosen"
)

// odd are inputs that somebody might want to be read in two ways, or not at all.
func odd() []struct{ name, text, says string } {
	const service = head + "ProtectedService\nmetadata: {name: a}\nspec: {target: Host, ports: [1]}\n"
	deny := func(reason string) string {
		return service + doc + "DenyList\nmetadata: {name: d}\nspec: {people: [mallory], reason: " + reason + "}\n"
	}
	return []struct{ name, text, says string }{
		{"key twice", strings.Replace(service, "ports: [1]", "ports: [1], ports: [2]", 1), "is given twice"},
		{"key twice in JSON", `{"apiVersion":"sallyport.dev/v1alpha1","kind":"ProtectedService","metadata":{"name":"a"},"spec":{"target":"Host","ports":[1],"ports":[2]}}`, "is given twice"},
		{"kind twice", strings.Replace(service, "kind: ProtectedService", "kind: ProtectedService\nkind: DenyList", 1), "is given twice"},
		{"key in other letters", strings.Replace(service, "ports:", "Ports:", 1), "unknown key"},
		{"key with a mark", strings.Replace(service, "ports:", `"po\u0301rts":`, 1), "unknown key"},
		{"key in Cyrillic", strings.Replace(service, "ports:", "роrts:", 1), "unknown key"},
		{"name in Cyrillic", strings.Replace(service, "name: a", "name: а", 1), "metadata.name"},
		{"name with a joiner", strings.Replace(service, "name: a", `name: "a\u200d"`, 1), "cannot be shown"},
		{"reason from right to left", deny(`"\u202Enetsel"`), "spec.reason: has characters that cannot be shown"},
		{"reason with an escape", deny(`"\x1b[2J"`), "spec.reason: has characters that cannot be shown"},
		{"reason in two lines", deny(`"a\nb"`), "spec.reason"},
		{"long reason", deny(strings.Repeat("x", 513)), "spec.reason"},
		{"no UTF-8", service + "# \xff\n", "not valid YAML"},
		{"zero bytes", service + "\x00", "not valid YAML"},
		{"number in another base", strings.Replace(service, "[1]", "[0x1]", 1), "want a whole number"},
		{"number in Arabic digits", strings.Replace(service, "[1]", "[١]", 1), "want a whole number"},
		{"huge number", strings.Replace(service, "[1]", "[99999999999999999999]", 1), "want a whole number"},
		{"alias", strings.Replace(service, "[1]", "&x [1]", 1), "anchors and aliases"},
		{"many aliases", service + "---\na: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]\n", "version"},
		{"merge", strings.Replace(service, "spec: {", "spec: {<<: {target: Pod}, ", 1), "unknown key"},
		{"tag", strings.Replace(service, "[1]", "!!python/object [1]", 1), "tag"},
		{"deep", service + "---\n" + strings.Repeat("[", 20000) + "\n", "not valid YAML"},
		{"huge", service + strings.Repeat("#", 17<<20), "more than 16777216 bytes"},
		{"many problems", strings.Repeat(strings.Replace(service, "[1]", "[0]", 1)+"---\n", 1000), "more problems are not shown"},
		{"byte order mark inside", service + "---\n\ufeff" + service, "already taken"},
	}
}

// TestOddInputs: each is refused in words that can be shown, with the next step, and with no more work than its size explains.
func TestOddInputs(t *testing.T) {
	for _, c := range odd() {
		before := allocated()
		set, err := policy.Parse("odd.yaml", []byte(c.text))
		if err == nil || set != nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %.300v, want %q", c.name, err, c.says)
			continue
		}
		checkErrors(t, err)
		if got, bound := allocated()-before, uint64(1<<20+512*len(c.text)); got > bound {
			t.Errorf("%s: %d bytes were allocated to refuse %d, want at most %d", c.name, got, len(c.text), bound)
		}
	}
}

// allocated is how many bytes this process ever allocated: work that does not depend on how busy the machine is.
func allocated() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.TotalAlloc
}

// FuzzKeyring: what is taken for a keyring is read again as the same, knows each key once, and is compared with another.
func FuzzKeyring(f *testing.F) {
	base := mustParse(f, loosen.InForce(carolKey))
	const service = head + "ProtectedService\nmetadata: {name: a}\nspec: {target: Host, ports: [1]}\n"
	f.Add([]byte(`spec: {version: 1, people: [{name: alice, keys: [{publicKey: "` + aliceKey + `", notAfter: 2030-01-01T00:00:00Z, uses: [request, approve, resources]}]}]}`))
	f.Add([]byte(`spec: {version: 18446744073709551615, notAfter: 2030-01-01T00:00:00Z, people: [{name: a, keys: [{publicKey: "` + bobKey + `"}]}], groups: [{name: g, members: [a]}], revokedKeys: ["sp:0000000000000000"]}`))
	f.Add([]byte(`spec: {version: 1, people: [{name: b, keys: [{publicKey: "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFzHoGJjVDbS3ovA/TvKdUiaRQ2cmrnsXgAudf5t++Q/"}]}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := policy.Parse("fuzz.yaml", slicesJoin(service, doc, "Keyring\nmetadata: {name: k}\n", string(data)))
		if err != nil {
			checkErrors(t, err)
			return
		}
		checkRoundTrip(t, s)
		people := map[string]bool{}
		for _, k := range s.Keyrings() {
			if k.Spec.Version == 0 || len(k.Spec.People) == 0 {
				t.Fatalf("keyring %+v", k)
			}
			for _, p := range k.Spec.People {
				if people[p.Name] {
					t.Fatalf("%s is there twice", p.Name)
				}
				people[p.Name] = true
			}
		}
		for id, k := range policy.KnownKeys(s.Keyrings()) {
			again, err := policy.ParsePublicKey(k.PublicKey.String())
			if err != nil || again != k.PublicKey || again.ID() != id || !people[k.Person] {
				t.Fatalf("key %s of %s: %v", id, k.Person, err)
			}
		}
		compared(t, base, s)
	})
}

// FuzzPolicy: what is taken for a policy is read again as the same, and answers every grant in words.
func FuzzPolicy(f *testing.F) {
	base := mustParse(f, loosen.InForce(carolKey))
	rest := strings.Replace(good, "metadata: {name: nightly-backup}", "metadata: {name: nightly}", 1)
	for _, says := range []string{
		`spec: {services: [postgres], bindings: [address], sources: ["10.1.0.0/24"], maxDuration: 15m, requesters: [alice]}`,
		`spec: {services: [cache], bindings: [address], sources: ["fd00::/16"], maxDuration: 1h, requesters: [alice], class: Critical, ticket: {required: true, pattern: "OPS-[0-9]+"}, approvals: [{from: [alice], min: 2}]}`,
		`spec: {services: [postgres], bindings: [address], sources: ["0.0.0.0/1"], maxDuration: 24h, requesters: [alice], when: 'duration < duration("5m")', windows: [{from: "22:00", to: "06:00", timezone: Europe/Berlin}], maxBudget: {bytes: 10GiB}, maxReach: 3, notAfter: 2030-01-01T00:00:00Z}`,
	} {
		f.Add([]byte(says))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := policy.Parse("fuzz.yaml", slicesJoin(rest, doc, "BypassPolicy\nmetadata: {name: p}\n", string(data)))
		if err != nil {
			checkErrors(t, err)
			return
		}
		checkRoundTrip(t, s)
		facts := goodFacts()
		facts.Now = time.Date(2026, 11, 23, 9, 0, 0, 0, time.UTC)
		a := s.Evaluate(facts)
		if a.Allowed != (a.Err() == nil) || a.Allowed && strings.ContainsAny(a.Rule, "\r\n\x1b") {
			t.Fatalf("answer %+v", a)
		}
		for _, n := range a.Near {
			for _, e := range n.Missing {
				if e.Msg == "" || e.Hint == "" || strings.ContainsAny(e.Msg, "\r\x1b") {
					t.Fatalf("refused in other than words: %+v", e)
				}
			}
		}
		compared(t, base, s)
	})
}

// compared holds Loosenings to finding nothing in what is the same, and something in what is allowed from nothing.
func compared(t *testing.T, base, s *policy.Set) {
	t.Helper()
	if got := policy.Loosenings(s, s); len(got) != 0 {
		t.Fatalf("looser than itself: %v", got)
	}
	for _, l := range append(policy.Loosenings(base, s), policy.Loosenings(s, base)...) {
		if l.Resource == "" || l.What == "" {
			t.Fatalf("said of nothing: %+v", l)
		}
	}
}

func slicesJoin(parts ...string) []byte {
	var b bytes.Buffer
	for _, p := range parts {
		fmt.Fprint(&b, p)
	}
	return b.Bytes()
}

const doc = "---\n" + head
