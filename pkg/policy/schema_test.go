package policy_test

import (
	"encoding/json"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/test/schema"
)

const definitions = "../../deploy/crds"

// notInSchema are words of errors about what the definitions for the API server of a cluster do not say, and why. Nodes refuse such a
// resource, and say so in its status.
var notInSchema = map[string]string{
	// what only the set of all resources shows
	"already protected by": "two services at one place", "already taken at": "a name twice", "is already at": "a person, key or group twice",
	"no Keyring has": "references", "no ProtectedService is named": "references", "no GrantTemplate is named": "references",
	"no IdentityProvider is named": "references", "has no login": "references", "has the same issuer as": "references",
	"a set has one ResourceSet": "a second set", "is that of the ProtectedService": "a name twice", "is already one of": "two services at one place",
	// what no rule of a schema can read
	"is no condition": "conditions are compiled with our variables", "not true or false": "conditions", "the most is 4096": "its length in bytes",
	"not base64": "keys", "bytes instead of 32": "keys", "anybody can sign": "keys", "no key of that type": "keys",
	"the key cannot be read": "keys", "is not a time zone": "the API server's zones may be others",
	"has a block": "certificates", "has a certificate that cannot be read": "certificates",
	// what costs more than a rule may
	"is not the name of a header": "names in a map within lists", "is not the name of a host": "addresses of four numbers, and host names by length",
	"has an escape within an escape": "%25 and two digits", "is already spec.": "one address in two spellings",
	"is not allowed": "a part of a second below a millisecond", "is not of the provider": "the provider of a group in a test",
	"has characters that cannot be shown": "characters that Unicode has not given away", "is not a SPIFFE ID": "its length",
	"has 5":                "bytes of a line, not characters",
	"is no key of a label": "keys of a map",
}

// onlyInCluster are words of refusals by the API server of what files may have, and why.
var onlyInCluster = map[string]string{
	"Too many": "lists have bounds, so that rules about them have a cost", "Too long": "texts have bounds", "may not be more than": "bounds of texts",
	"less than or equal to 1000000000000000000": "numbers that JSON has exactly", "is not an IP address": "addresses of tests", "should be at most": "bounds",
	"spec.tests": "what tests ask is looked at before they are run",
}

func known(list map[string]string, words string) bool {
	for w := range list {
		if strings.Contains(words, w) {
			return true
		}
	}
	return false
}

// TestExamplesPassTheSchema: what we show people is taken.
func TestExamplesPassTheSchema(t *testing.T) {
	all := schema.Load(t, definitions)
	files, err := filepath.Glob("../../deploy/examples/resources.d/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no examples: %v", err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		passes(t, all, file, string(text))
	}
	for name, text := range map[string]string{"good": good, "web": web, "remote": remote, "tokens": withTokens} {
		passes(t, all, name, text)
	}
}

func passes(t *testing.T, all schema.Definitions, name, text string) {
	t.Helper()
	objects, err := schema.Objects([]byte(text))
	if err != nil || len(objects) == 0 {
		t.Errorf("%s: %d objects, %v", name, len(objects), err)
	}
	for _, o := range objects {
		if errs := all.Refusals(o, nil); len(errs) > 0 {
			t.Errorf("%s: %s %v: %v", name, o["kind"], o["metadata"], errs.ToAggregate())
		}
	}
}

// yamlOnly are wrongs that are gone when YAML has become JSON: agents never see them.
var yamlOnly = []string{"anchor", "tag", "port in hex", "port in octal", "key without value"}

// TestSchemaRefusesWrongs: what policy refuses of one resource by itself, the API server does, at that field.
func TestSchemaRefusesWrongs(t *testing.T) {
	all := schema.Load(t, definitions)
	refused := 0
	for _, of := range []struct {
		set    string
		wrongs []wrong
	}{{good, wrongs}, {web, wrongWebs}} {
		for _, w := range of.wrongs {
			if slices.Contains(yamlOnly, w.name) {
				continue
			}
			text := strings.Replace(of.set, w.old, w.new, 1)
			_, err := policy.Parse("resources.yaml", []byte(text))
			objects, syntax := schema.Objects([]byte(text))
			var errs field.ErrorList
			for _, o := range objects {
				errs = append(errs, all.Refusals(o, nil)...)
			}
			switch {
			case syntax != nil:
				refused++
			case len(errs) > 0 && atField(errs, w.field):
				refused++
			case len(errs) > 0:
				t.Errorf("%s: refused, but not at %s: %v", w.name, w.field, errs.ToAggregate())
			case err != nil && !known(notInSchema, err.Error()):
				t.Errorf("%s: taken, though it is wrong: %v", w.name, err)
			}
		}
	}
	t.Logf("%d of %d wrongs are refused before a node sees them", refused, len(wrongs)+len(wrongWebs))
	if refused < 150 {
		t.Errorf("only %d", refused)
	}
}

// atField tells whether one of the errors is at the field, at a part of it or at what it is a part of, and says why.
func atField(errs field.ErrorList, at string) bool {
	return slices.ContainsFunc(errs, func(e *field.Error) bool {
		return e.Detail+string(e.Type) != "" && (strings.HasPrefix(at, e.Field) || strings.HasPrefix(e.Field, at) || at == "apiVersion" || strings.HasPrefix(at, `spec."`))
	})
}

// cases are how many resources are changed: SCHEMA_CASES of them, where it is given.
func cases(t *testing.T) int {
	text := os.Getenv("SCHEMA_CASES")
	if text == "" {
		return 600
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestSchemaAgreesWithPolicy changes resources at random, and holds the API server's answer against that of nodes.
func TestSchemaAgreesWithPolicy(t *testing.T) {
	all := schema.Load(t, definitions)
	r := rand.New(rand.NewPCG(7, 1))
	sets := [][]map[string]any{objectsOf(t, good), objectsOf(t, web), objectsOf(t, remote), objectsOf(t, withTokens), objectsOf(t, examples(t))}
	pool := poolOf(sets)
	both, neither, first, second := 0, 0, 0, 0
	for range cases(t) {
		set := clone(t, sets[r.IntN(len(sets))])
		changed := set[r.IntN(len(set))]
		for range 1 + r.IntN(2) {
			mutate(r, changed, pool)
		}
		_, err := policy.Parse("r.yaml", []byte(documentsOf(t, set)))
		errs := all.Refusals(clone(t, []map[string]any{changed})[0], nil)
		switch {
		case err == nil && len(errs) == 0:
			both++
		case err != nil && len(errs) > 0:
			neither++
		case err == nil:
			first++
			for _, e := range errs {
				if !known(onlyInCluster, e.Error()) {
					t.Errorf("nodes take what the API server refuses: %v\n%s", errs.ToAggregate(), documentsOf(t, []map[string]any{changed}))
					break
				}
			}
		default:
			second++
			for _, e := range policy.Errors(err) {
				if !known(notInSchema, e.Error()) {
					t.Errorf("the API server takes what nodes refuse: %v\n%s", e, documentsOf(t, []map[string]any{changed}))
					break
				}
			}
		}
	}
	t.Logf("taken by both %d, refused by both %d, by the API server alone %d, by nodes alone %d", both, neither, first, second)
	if both < 50 || neither < 200 {
		t.Error("that shows little")
	}
}

func examples(t *testing.T) string {
	files, _ := filepath.Glob("../../deploy/examples/resources.d/*.yaml")
	var b strings.Builder
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		b.WriteString(string(text) + "\n---\n")
	}
	return b.String()
}

func objectsOf(t *testing.T, text string) []map[string]any {
	t.Helper()
	all, err := schema.Objects([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// documentsOf gives the objects as an agent hands those of a cluster to policy.
func documentsOf(t *testing.T, objects []map[string]any) string {
	t.Helper()
	var b strings.Builder
	for _, o := range objects {
		text, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		b.WriteString("---\n" + string(text) + "\n")
	}
	return b.String()
}

func clone(t *testing.T, objects []map[string]any) []map[string]any {
	t.Helper()
	return objectsOf(t, documentsOf(t, objects))
}

// poolOf is all that is in the sets, and odd ones.
func poolOf(sets [][]map[string]any) []any {
	pool := []any{"", "a", "A", "*", "/*", "0s", "1s", "25h", "24h", "-1m", "1h30m", "10.0.0.0/8", "10.0.0.1/8", "127.0.0.1", "::1", "::ffff:1.2.3.4", "fe80::1", "224.0.0.1", "0.0.0.0/0",
		"fd00::1", "1.2.3.4", "group:dba", "spiffe://a/*", "spiffe://a", "spiffe://a/./b", "corp/*", "corp/a", "x/", "22:00", "24:00", "7:00", "Mon", "UTC", "é", "a\nb", "1EiB", "1PiB", "0B", "10GiB",
		"2027-01-01T00:00:00Z", "2027-02-30T00:00:00Z", "1969-01-01T00:00:00Z", "UDP", "TCP", "Pod", "Host", "Allow", "Refuse", "Shadow", "Sensitive", "Critical", "tuple", "pass",
		int64(0), int64(1), int64(15), int64(16), int64(65535), int64(65536), int64(-1), int64(1) << 40, 1.5, true, false, []any{}, map[string]any{}, []any{"a", "a"}, []any{"10.0.0.1"}}
	for _, set := range sets {
		for _, o := range set {
			walk(o, func(v any) { pool = append(pool, v) })
		}
	}
	return pool
}

func walk(v any, see func(any)) {
	see(v)
	switch v := v.(type) {
	case map[string]any:
		for _, k := range slices.Sorted(maps.Keys(v)) {
			walk(v[k], see)
		}
	case []any:
		for _, item := range v {
			walk(item, see)
		}
	}
}

// mutate changes one place at random: another value, none, one more, or a key that is not known.
func mutate(r *rand.Rand, object map[string]any, pool []any) {
	drawn := func() any { return runtime.DeepCopyJSONValue(pool[r.IntN(len(pool))]) }
	var places []func()
	var visit func(v any)
	visit = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			for _, k := range slices.Sorted(maps.Keys(v)) {
				places = append(places, func() { v[k] = drawn() }, func() { v[k] = drawn() }, func() { delete(v, k) })
				visit(v[k])
			}
		case []any:
			for i := range v {
				places = append(places, func() { v[i] = drawn() }, func() { v[i] = runtime.DeepCopyJSONValue(v[r.IntN(len(v))]) })
				visit(v[i])
			}
		}
	}
	if spec, ok := object["spec"]; ok {
		visit(spec)
	}
	if len(places) > 0 {
		places[r.IntN(len(places))]()
	}
}
