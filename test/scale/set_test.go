//go:build k8s

package scale

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/kube"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// set is all of a version: services, a policy for grants to the first of them, and the keyring of who may sign both.
func (b *bench) set(version int) string {
	var all strings.Builder
	for i := range b.plan.services {
		port := 5432
		if i == 0 {
			port = changeport + version
		}
		fmt.Fprintf(&all, `apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: service-%03[1]d}
spec:
  target: Pod
  ports: [%[2]d]
  addresses: ["10.%[3]d.%[4]d.2", "fd00:2:%[1]d::2"]
  access:
    - identities: ["spiffe://example.org/app/web-%03[1]d", "spiffe://example.org/ops/*"]
    - identities: ["spiffe://example.org/batch/nightly-%03[1]d"]
---
`, i, port, 100+i/250, i%250)
	}
	fmt.Fprintf(&all, `apiVersion: sallyport.dev/v1alpha1
kind: BypassPolicy
metadata: {name: backup}
spec:
  services: [service-000]
  bindings: [address]
  sources: ["10.0.0.0/8"]
  maxDuration: 15m
  requesters: [alice]
---
apiVersion: sallyport.dev/v1alpha1
kind: Keyring
metadata: {name: operators}
spec:
  version: 1
  people: [{name: alice, keys: [{publicKey: %q}]}]
---
apiVersion: sallyport.dev/v1alpha1
kind: ResourceSet
metadata: {name: all}
spec: {version: %d}
`, b.key.Public(), version)
	return all.String()
}

// signed is the set with its signature, one document each.
func (b *bench) signed(version int) []string {
	b.t.Helper()
	text := b.set(version)
	parsed, err := policy.Parse("set", []byte(text))
	b.must(err)
	envelope, err := grant.SignResources(b.t.Context(), parsed, nil, b.key)
	b.must(err)
	text = strings.Replace(text, "metadata: {name: all}", fmt.Sprintf("metadata: {name: all, annotations: {%s: %q}}", kube.Signatures, envelope), 1)
	return strings.Split(text, "---\n")
}

// change applies what is new in a version, as kubectl apply --server-side does, and tells when it began and when the API server had all of it.
func (b *bench) change(version int) (began, done time.Time) {
	b.t.Helper()
	all := b.signed(version)
	began = time.Now()
	b.applied("protectedservices", all[0])
	b.applied("resourcesets", all[len(all)-1])
	return began, time.Now()
}

func (b *bench) applied(plural, text string) {
	b.t.Helper()
	data, err := yaml.YAMLToJSON([]byte(text))
	b.must(err)
	var u unstructured.Unstructured
	b.must(u.UnmarshalJSON(data))
	force := true
	_, err = b.client.Resource(schema.GroupVersionResource{Group: "sallyport.dev", Version: "v1alpha1", Resource: plural}).
		Patch(b.t.Context(), u.GetName(), types.ApplyPatchType, data, metav1.PatchOptions{FieldManager: "kubectl", Force: &force})
	b.must(err)
}

// envelope is a signed grant for a node.
func (b *bench) envelope(node string) []byte {
	b.t.Helper()
	now := time.Now().UTC()
	p, err := grant.Payload{Requester: "alice", Service: changing, Binding: policy.BindingAddress, Addresses: []netip.Addr{netip.MustParseAddr("10.1.0.2")},
		NotBefore: now, NotAfter: now.Add(time.Hour), Duration: time.Minute, Reason: "the nightly backup, by hand", Ticket: "OPS-4711", Audience: node,
		Begin: grant.BeginApplied}.Named(now)
	b.must(err)
	envelope, err := grant.Sign(b.t.Context(), p, b.key)
	b.must(err)
	return envelope
}

func (b *bench) applyGrant(name, node string) {
	b.t.Helper()
	text, err := json.Marshal(string(b.envelope(node)))
	b.must(err)
	b.applied("bypassgrants", fmt.Sprintf("apiVersion: sallyport.dev/v1alpha1\nkind: BypassGrant\nmetadata: {name: %s}\nspec: {node: %s, envelope: %s}\n", name, node, text))
}

const pod = `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"app-%[1]s-%[2]d","namespace":"default","labels":{"app":"web","tier":"%[2]d"}},
"spec":{"nodeName":"%[1]s","terminationGracePeriodSeconds":0,"containers":[{"name":"app","image":"registry.example.org/app:1","env":[{"name":"ROLE","value":"web"}]}]}}`

// makePods gives each node its pods, of which nothing runs.
func (b *bench) makePods(ctx context.Context, node string) error {
	pods := b.client.Resource(schema.GroupVersionResource{Version: "v1", Resource: "pods"}).Namespace("default")
	for i := range b.plan.pods {
		var u unstructured.Unstructured
		if err := u.UnmarshalJSON(fmt.Appendf(nil, pod, node, i)); err != nil {
			return err
		}
		if _, err := pods.Create(ctx, &u, metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	return nil
}
