package policy_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

const selected = head + `ProtectedService
metadata: {name: db}
spec: {target: Pod, ports: [5432], podSelector: %s}
`

func ofSelector(t testing.TB, selector string) *policy.Set {
	t.Helper()
	return mustParse(t, fmt.Sprintf(selected, selector))
}

func selectorOf(t testing.TB, text string) policy.PodSelector {
	t.Helper()
	s, _ := ofSelector(t, text).Service("db")
	return *s.Spec.PodSelector
}

func TestPodSelectorMatches(t *testing.T) {
	pod := policy.Pod{UID: "u", Namespace: "shop", Name: "db-0", ServiceAccount: "db", Labels: map[string]string{"app": "db", "tier": "back", "empty": ""}}
	for selector, want := range map[string]bool{
		`{namespace: shop}`:                                                                       true,
		`{namespace: other}`:                                                                      false,
		`{namespace: shop, serviceAccount: db}`:                                                   true,
		`{namespace: shop, serviceAccount: web}`:                                                  false,
		`{namespace: shop, matchLabels: {app: db}}`:                                               true,
		`{namespace: shop, matchLabels: {app: web}}`:                                              false,
		`{namespace: shop, matchLabels: {app: db, x: "1"}}`:                                       false,
		`{namespace: shop, matchLabels: {empty: ""}}`:                                             true,
		`{namespace: shop, matchLabels: {missing: ""}}`:                                           false,
		`{namespace: shop, matchExpressions: [{key: tier, operator: In, values: [front, back]}]}`: true,
		`{namespace: shop, matchExpressions: [{key: tier, operator: In, values: [front]}]}`:       false,
		`{namespace: shop, matchExpressions: [{key: tier, operator: NotIn, values: [front]}]}`:    true,
		`{namespace: shop, matchExpressions: [{key: tier, operator: NotIn, values: [back]}]}`:     false,
		`{namespace: shop, matchExpressions: [{key: missing, operator: NotIn, values: [a]}]}`:     true,
		`{namespace: shop, matchExpressions: [{key: tier, operator: Exists}]}`:                    true,
		`{namespace: shop, matchExpressions: [{key: missing, operator: Exists}]}`:                 false,
		`{namespace: shop, matchExpressions: [{key: missing, operator: DoesNotExist}]}`:           true,
		`{namespace: shop, matchExpressions: [{key: app, operator: DoesNotExist}]}`:               false,
		`{namespace: shop, matchLabels: {app: db}, matchExpressions: [{key: tier, operator: Exists}, {key: app, operator: NotIn, values: [db]}]}`: false,
	} {
		s := selectorOf(t, selector)
		if s.Matches(pod) != want {
			t.Errorf("%s (%s) matches %v: %v, want %v", selector, s, pod.Labels, !want, want)
		}
	}
}

// TestPodSelectorIsRead: it is in the canonical form, and what no pod can have is refused where it is written.
func TestPodSelectorIsRead(t *testing.T) {
	set := ofSelector(t, `{namespace: shop, matchLabels: {z: a, example.org/app: db}, matchExpressions: [{key: tier, operator: In, values: [a, b]}, {key: old, operator: DoesNotExist}], serviceAccount: db}`)
	again, err := policy.Parse("again.yaml", set.YAML())
	if err != nil || again.Digest() != set.Digest() || !set.Selects() {
		t.Errorf("%v\n%s", err, set.YAML())
	}
	service, _ := set.Service("db")
	if got, want := service.Spec.PodSelector.String(), "pods of shop with example.org/app=db, z=a, tier in (a, b), !old as db"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	for _, c := range []struct{ spec, field, says string }{
		{`target: Pod, ports: [1], podSelector: {}`, "spec.podSelector.namespace", "is missing"},
		{`target: Pod, ports: [1], podSelector: {namespace: Shop}`, "spec.podSelector.namespace", "no name of a namespace"},
		{`target: Pod, ports: [1], podSelector: {namespace: a.b}`, "spec.podSelector.namespace", "no name of a namespace"},
		{`target: Pod, ports: [1], podSelector: {namespace: shop, serviceAccount: shop/db}`, "spec.podSelector.serviceAccount", "no name of a service account"},
		{`target: Pod, ports: [1], podSelector: {namespace: shop, labels: {a: b}}`, "spec.podSelector.labels", "unknown key"},
		{`target: Pod, ports: [1], podSelector: {namespace: shop, matchLabels: {"a b": c}}`, "spec.podSelector.matchLabels", "no key of a label"},
		{`target: Pod, ports: [1], podSelector: {namespace: shop, matchLabels: {"/a": c}}`, "spec.podSelector.matchLabels", "no key of a label"},
		{`target: Pod, ports: [1], podSelector: {namespace: shop, matchLabels: {a: "b c"}}`, "spec.podSelector.matchLabels.a", "no value of a label"},
		{`target: Pod, ports: [1], podSelector: {namespace: shop, matchLabels: {a: ` + strings.Repeat("x", 64) + `}}`, "spec.podSelector.matchLabels.a", "no value of a label"},
		{`target: Pod, ports: [1], podSelector: {namespace: shop, matchExpressions: [{key: a, operator: in, values: [b]}]}`, "spec.podSelector.matchExpressions[0]", `"in" is not known`},
		{`target: Pod, ports: [1], podSelector: {namespace: shop, matchExpressions: [{key: a, operator: In}]}`, "spec.podSelector.matchExpressions[0]", "at least one value"},
		{`target: Pod, ports: [1], podSelector: {namespace: shop, matchExpressions: [{key: a, operator: Exists, values: [b]}]}`, "spec.podSelector.matchExpressions[0]", "takes no values"},
		{`target: Pod, ports: [1], podSelector: {namespace: shop}, addresses: ["10.2.0.2"]`, "spec.addresses", "addresses follow"},
		{`target: Pod, ports: [1], podSelector: {namespace: shop}, device: veth1`, "spec.device", "devices follow"},
		{`target: Pod, ports: [1]`, "spec.addresses", "at least one address"},
		{`target: Host, ports: [1], podSelector: {namespace: shop}`, "spec.podSelector", "is in no pod"},
	} {
		_, err := policy.Parse("a.yaml", []byte(head+"ProtectedService\nmetadata: {name: db}\nspec: {"+c.spec+"}\n"))
		if err == nil || !strings.Contains(err.Error(), c.field) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %s: %s", c.spec, err, c.field, c.says)
		}
	}
}

// TestPodSelectorLoosening: a change of a selector counts as loosening, unless it surely chooses no less.
func TestPodSelectorLoosening(t *testing.T) {
	base := `{namespace: shop, matchLabels: {app: db}, matchExpressions: [{key: tier, operator: In, values: [a, b]}], serviceAccount: db}`
	listed := mustParse(t, head+"ProtectedService\nmetadata: {name: db}\nspec: {target: Pod, ports: [5432], addresses: [\"10.2.0.2\"]}\n")
	if policy.Loosenings(ofSelector(t, base), listed) == nil || policy.Loosenings(listed, ofSelector(t, base)) == nil {
		t.Error("addresses in the place of a selector, and the other way round, are no loosening")
	}
	for next, loosens := range map[string]bool{
		base: false,
		`{namespace: shop, matchLabels: {app: db}, matchExpressions: [{key: tier, operator: In, values: [b, c, a]}], serviceAccount: db}`: false,
		`{namespace: shop, matchExpressions: [{key: app, operator: Exists}]}`:                                                             false,
		`{namespace: shop}`:                                                         false,
		`{namespace: other}`:                                                        true,
		`{namespace: shop, serviceAccount: web}`:                                    true,
		`{namespace: shop, matchLabels: {app: web}}`:                                true,
		`{namespace: shop, matchLabels: {tier: a}}`:                                 true,
		`{namespace: shop, matchExpressions: [{key: app, operator: DoesNotExist}]}`: true,
	} {
		if got := policy.Loosenings(ofSelector(t, base), ofSelector(t, next)); (len(got) > 0) != loosens {
			t.Errorf("%s: %v, want a loosening: %v", next, got, loosens)
		}
	}
}

// drawSelector draws from few words, so that selectors meet.
func drawSelector(r *rand.Rand) string {
	pick := func(list ...string) string { return list[r.IntN(len(list))] }
	values := func() string {
		all := []string{"1", "2", "3"}
		r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		return `["` + strings.Join(all[:1+r.IntN(3)], `", "`) + `"]`
	}
	text := "{namespace: " + pick("n", "n", "m")
	if r.IntN(2) == 0 {
		text += ", serviceAccount: " + pick("s", "t")
	}
	if r.IntN(2) == 0 {
		text += fmt.Sprintf(`, matchLabels: {%s: "%s"}`, pick("a", "b"), pick("1", "2"))
	}
	var exprs []string
	for range r.IntN(3) {
		e := "{key: " + pick("a", "b") + ", operator: "
		switch op := pick("In", "NotIn", "Exists", "DoesNotExist"); op {
		case "In", "NotIn":
			e += op + ", values: " + values() + "}"
		default:
			e += op + "}"
		}
		exprs = append(exprs, e)
	}
	return text + ", matchExpressions: [" + strings.Join(exprs, ", ") + "]}"
}

// TestNoSelectorChoosesLessUnnoticed: where a change is not told as a loosening, each pod that was chosen still is.
func TestNoSelectorChoosesLessUnnoticed(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 7))
	var pods []policy.Pod
	for _, ns := range []string{"n", "m"} {
		for _, sa := range []string{"s", "t"} {
			for _, a := range []string{"", "1", "2", "3", "4"} {
				for _, b := range []string{"", "1", "2", "3"} {
					labels := map[string]string{}
					if a != "" {
						labels["a"] = a
					}
					if b != "" {
						labels["b"] = b
					}
					pods = append(pods, policy.Pod{Namespace: ns, ServiceAccount: sa, Labels: labels})
				}
			}
		}
	}
	silent := 0
	for range 3000 {
		from, to := drawSelector(r), drawSelector(r)
		if len(policy.Loosenings(ofSelector(t, from), ofSelector(t, to))) > 0 {
			continue
		}
		silent++
		old, next := selectorOf(t, from), selectorOf(t, to)
		if i := slices.IndexFunc(pods, func(p policy.Pod) bool { return old.Matches(p) && !next.Matches(p) }); i >= 0 {
			t.Fatalf("%s to %s is told as no loosening, and lets go of %+v", from, to, pods[i])
		}
	}
	if silent < 50 {
		t.Errorf("only %d of the changes were none: nothing is shown", silent)
	}
}

func TestWithPods(t *testing.T) {
	set := mustParse(t, fmt.Sprintf(selected, "{namespace: shop}")+"---\n"+strings.Replace(fmt.Sprintf(selected, "{namespace: web}"), "name: db", "name: none", 1))
	at := netip.MustParseAddr("10.2.0.7")
	got := set.WithPods(func(service string) []netip.Addr {
		if service == "db" {
			return []netip.Addr{at}
		}
		return nil
	})
	if s, ok := got.PodServiceAt(policy.ProtocolTCP, netip.AddrPortFrom(at, 5432)); !ok || s.Name != "db" || s.Spec.PodSelector != nil {
		t.Errorf("at the pod: %+v", s)
	}
	if s, _ := got.Service("none"); s.Spec.PodSelector == nil || len(s.Spec.Addresses) != 0 {
		t.Errorf("a service without pods: %+v", s)
	}
	if again, err := policy.Parse("a.yaml", got.YAML()); err != nil || again.Digest() != got.Digest() || got.Digest() == set.Digest() {
		t.Errorf("%v\n%s", err, got.YAML())
	}
	if _, ok := set.PodServiceAt(policy.ProtocolTCP, netip.AddrPortFrom(at, 5432)); ok {
		t.Error("the set itself has changed")
	}
	if set.WithPods(func(string) []netip.Addr { return nil }) != set {
		t.Error("no pods: another set")
	}
}
