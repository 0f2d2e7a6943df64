//go:build k8s

package v1alpha1_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/kube/v1alpha1"
	"github.com/sallyport-dev/sallyport/test/apiserver"
	"github.com/sallyport-dev/sallyport/test/lab"
)

const examples = "../../../deploy/examples/resources.d"

// TestServer: what people do by kubectl, with a real API server.
func TestServer(t *testing.T) {
	l := lab.New(t, lab.Options{})
	s := apiserver.Start(t, l.Node, filepath.Join(l.Dir, "apiserver"))
	ok := s.Kubectl
	ok("", "apply", "-f", definitions)
	ok("", "wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
	ok("", "apply", "-f", examples)
	ok("", "diff", "-f", examples) // says by its exit code that nothing differs
	if out := ok("", "apply", "-f", examples); strings.Contains(out, "configured") {
		t.Errorf("applied again, something changed:\n%s", out)
	}
	wrongOnes(t, s)
	asShown(t, s)
	columns(t, ok)
	if out := ok("", "explain", "psvc.spec.access.identities"); !strings.Contains(out, "ending in /*") {
		t.Errorf("explain says nothing:\n%s", out)
	}
	grantOf(t, s, ok)
	ok("", "delete", "-f", examples)
	if out := ok("", "get", "sallyport", "-o", "name"); strings.Contains(out, "protectedservice") {
		t.Errorf("left:\n%s", out)
	}
}

const head = "apiVersion: sallyport.dev/v1alpha1\nkind: "

// wrongOnes are refused, each at its field and with the reason.
func wrongOnes(t *testing.T, s *apiserver.Server) {
	service := func(spec string) string {
		return head + "ProtectedService\nmetadata: {name: wrong}\nspec: {" + spec + "}\n"
	}
	policy := func(more string) string {
		return head + "BypassPolicy\nmetadata: {name: wrong}\nspec: {services: [postgres], bindings: [address], requesters: [alice], " + more + "}\n"
	}
	for _, c := range []struct{ name, text, field, says string }{
		{"unknown field", service("target: Host, ports: [1], prots: [2]"), "spec.prots", "unknown field"},
		{"no target", service("ports: [1]"), "spec.target", "Required value"},
		{"unknown target", service("target: Node, ports: [1]"), "spec.target", "supported values"},
		{"unknown mode", service("target: Host, ports: [1], mode: shadow"), "spec.mode", "supported values"},
		{"no ports", service("target: Host, ports: []"), "spec.ports", "at least 1"},
		{"port 0", service("target: Host, ports: [0]"), "spec.ports[0]", "greater than or equal to 1"},
		{"port 65536", service("target: Host, ports: [65536]"), "spec.ports[0]", "less than or equal to 65535"},
		{"port in words", service("target: Host, ports: [redis]"), "spec.ports[0]", "must be of type integer"},
		{"port twice", service("target: Host, ports: [1, 1]"), "spec.ports[1]", "Duplicate value"},
		{"host with addresses", service("target: Host, ports: [1], addresses: [10.0.0.1]"), "spec.addresses", "names none"},
		{"pod without", service("target: Pod, ports: [1]"), "spec.addresses", "at least one address"},
		{"loopback", service("target: Pod, ports: [1], addresses: [127.0.0.1]"), "spec.addresses[0]", "loopback"},
		{"no address", service("target: Pod, ports: [1], addresses: [a]"), "spec.addresses[0]", "not an IP address"},
		{"UDP with access", service("target: Host, protocol: UDP, ports: [1], access: [{identities: ['spiffe://a/b']}]"), "spec.access", "nothing proves who sent a datagram"},
		{"no SPIFFE ID", service("target: Host, ports: [1], access: [{identities: ['a/b']}]"), "spec.access[0].identities[0]", "should match"},
		{"nobody", service("target: Host, ports: [1], access: [{when: 'true'}]"), "spec.access[0].identities", "lets nobody in"},
		{"routes without http", service("target: Host, ports: [1], access: [{identities: ['spiffe://a/b'], routes: [{methods: [GET]}]}]"), "spec.access", "only a service with http"},
		{"provider that is not listed", service("target: Host, ports: [1], http: {authenticate: [oidc], providers: [corp]}, access: [{subjects: [other/a]}]"), "spec.access", "does not list"},
		{"name in capitals", strings.Replace(service("target: Host, ports: [1]"), "wrong", "Wrong", 1), "metadata.name", "lowercase"},
		{"long name", strings.Replace(service("target: Host, ports: [1]"), "wrong", strings.Repeat("a", 32), 1), "metadata.name", "may not be more than 31"},
		{"host bits", policy("sources: [10.0.0.1/8], maxDuration: 1m"), "spec.sources[0]", "bits set beyond"},
		{"every address", policy("sources: ['0.0.0.0/0'], maxDuration: 1m"), "spec.sources[0]", "means every address"},
		{"for ever", policy("sources: [10.0.0.1], maxDuration: 25h"), "spec.maxDuration", "every grant ends"},
		{"no duration", policy("sources: [10.0.0.1]"), "spec.maxDuration", "Required value"},
		{"window of no time", policy("sources: [10.0.0.1], maxDuration: 1m, windows: [{from: '22:00', to: '22:00'}]"), "spec.windows[0].to", "is none"},
		{"no regular expression", policy("sources: [10.0.0.1], maxDuration: 1m, ticket: {pattern: 'a['}"), "spec.ticket.pattern", "parsing regexp"},
		{"critical without approval", policy("sources: [10.0.0.1], maxDuration: 1m, class: Critical, ticket: {required: true}"), "spec.approvals", "at least 2"},
		{"break-glass without reviewers", policy("sources: [10.0.0.1], maxDuration: 1m, breakGlass: true, approvals: [{from: [bob], min: 2}]"), "spec.reviewers", "needs reviewers"},
		{"size", policy("sources: [10.0.0.1], maxDuration: 1m, maxBudget: {bytes: 10GB}"), "spec.maxBudget.bytes", "should match"},
		{"keyring of nobody", head + "Keyring\nmetadata: {name: wrong}\nspec: {version: 1, people: []}\n", "spec.people", "at least 1"},
		{"person twice", head + "Keyring\nmetadata: {name: wrong}\nspec: {version: 1, people: [{name: a, keys: []}, {name: a, keys: []}]}\n", "spec.people[1]", "Duplicate value"},
		{"list of nothing", head + "DenyList\nmetadata: {name: wrong}\nspec: {reason: r}\n", "spec", "denies nothing"},
		{"issuer without TLS", head + "IdentityProvider\nmetadata: {name: wrong}\nspec: {issuer: 'http://a', audiences: [a]}\n", "spec.issuer", "should match"},
		{"remote service of nobody", head + "RemoteService\nmetadata: {name: wrong}\nspec: {addresses: [10.0.0.1], ports: [1], identities: ['spiffe://a/b'], callers: []}\n", "spec.callers", "at least 1"},
		{"set without a version", head + "ResourceSet\nmetadata: {name: wrong}\nspec: {signers: 1}\n", "spec.version", "Required value"},
		{"template for ever", head + "GrantTemplate\nmetadata: {name: wrong}\nspec: {service: a, maxDuration: 25h}\n", "spec.maxDuration", "every grant ends"},
		{"grant that is none", head + "BypassGrant\nmetadata: {name: wrong}\nspec: {node: a, envelope: x}\n", "spec.envelope", "is not the envelope of a grant"},
	} {
		out, err := s.Try(c.text, "apply", "-f", "-")
		if err == nil || !strings.Contains(out, c.field) || !strings.Contains(out, c.says) {
			t.Errorf("%s: %v, want %q at %s:\n%s", c.name, err, c.says, c.field, out)
		}
	}
}

// asShown holds what kubectl says to what the document shows of it.
func asShown(t *testing.T, s *apiserver.Server) {
	t.Helper()
	doc, err := os.ReadFile("../../../docs/kubernetes.md")
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(doc), "\n```\nThe ProtectedService")
	shown, _, _ := strings.Cut(after, "\n```\n")
	out, err := s.Try(head+"ProtectedService\nmetadata: {name: db}\nspec: {target: Host, ports: [5432, 5432], addresses: [10.0.0.1]}\n", "apply", "-f", "-")
	t.Logf("kubectl apply of a wrong resource: %v\n%s", err, out)
	lines := func(text string) []string {
		return strings.FieldsFunc(text, func(r rune) bool { return r == '\n' })
	}
	said, want := lines(out), lines("The ProtectedService"+shown)
	for i := range want {
		if err == nil || i >= len(said) || strings.TrimSpace(said[i]) != want[i] {
			t.Errorf("kubectl says %q, docs/kubernetes.md %q", said, want)
			return
		}
	}
}

// columns are what `kubectl get` shows.
func columns(t *testing.T, ok func(string, ...string) string) {
	t.Helper()
	for kind, want := range map[string]string{
		"psvc": "NAME TARGET MODE PORTS ACCEPTED AGE", "bpol": "NAME SERVICES CLASS MAX ACCEPTED AGE", "kring": "NAME VERSION ACCEPTED AGE",
		"dlist": "NAME REASON UNTIL ACCEPTED AGE", "gtpl": "NAME SERVICE MAX ACCEPTED AGE", "rset": "NAME VERSION SIGNERS ACCEPTED AGE", "sidp": "NAME ISSUER ACCEPTED AGE",
	} {
		out := ok("", "get", kind)
		if first, _, _ := strings.Cut(out, "\n"); strings.Join(strings.Fields(first), " ") != want {
			t.Errorf("kubectl get %s: want %s:\n%s", kind, want, out)
		}
	}
	if out := ok("", "get", "psvc", "postgres"); !strings.Contains(out, "Enforce") || !strings.Contains(out, "[5432]") {
		t.Errorf("the service is shown as\n%s", out)
	}
}

// grantOf applies a grant, tells of it as its node does, and finds it by its node.
func grantOf(t *testing.T, s *apiserver.Server, ok func(string, ...string) string) {
	t.Helper()
	text := func(g any) string {
		out, err := json.Marshal(g)
		if err != nil {
			t.Fatal(err)
		}
		return string(out)
	}
	g := grant()
	ok(text(object(t, g)), "apply", "-f", "-")
	ok("", "patch", "bgrant", g.Name, "--subresource", "status", "--type", "merge", "-p", text(map[string]any{"status": object(t, told())["status"]}))
	if out := ok("", "get", "bgrant"); !strings.Contains(out, "postgres") || !strings.Contains(out, "alice") || !strings.Contains(out, "2027-01-15T08:00:00Z") {
		t.Errorf("the grant is shown as\n%s", out)
	}
	for node, found := range map[string]bool{g.Spec.Node: true, "node-2": false} {
		if out := ok("", "get", "bgrant", "--field-selector", "spec.node="+node, "-o", "name"); strings.Contains(out, g.Name) != found {
			t.Errorf("grants of %s: %s", node, out)
		}
	}
	g.Spec.Node = "node-2"
	if out, err := s.Try(text(object(t, g)), "apply", "-f", "-"); err == nil || !strings.Contains(out, "cannot be changed") {
		t.Errorf("changed: %v\n%s", err, out)
	}
	// Who applies a grant does not say what nodes make of it.
	lies := told()
	lies.Status.Requester = "mallory"
	lies.Spec.Node = grant().Spec.Node
	ok(text(object(t, lies)), "apply", "-f", "-")
	if out := ok("", "get", "bgrant", lies.Name, "-o", "yaml"); strings.Contains(out, "requester: mallory") {
		t.Errorf("an applied status counts:\n%s", out)
	}
	ok("", "delete", "bgrant", lies.Name)
}

// told is the grant with what its node says of it.
func told() v1alpha1.BypassGrant {
	g := grant()
	g.Status = status(1)
	return g
}
