package kube

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// Signatures is the annotation of a ResourceSet that has the signatures of the set of resources that it is in: what a directory has in
// policy.SignatureFile. It is none of what is signed.
const Signatures = "sallyport.dev/signatures"

// kindBypassGrant is the kind of resource that carries a grant.
const kindBypassGrant = "BypassGrant"

// plurals are the kinds of a set of resources, and their names in the API.
var plurals = map[string]string{
	policy.KindProtectedService: "protectedservices",
	policy.KindBypassPolicy:     "bypasspolicies",
	policy.KindKeyring:          "keyrings",
	policy.KindDenyList:         "denylists",
	policy.KindGrantTemplate:    "granttemplates",
	policy.KindResourceSet:      "resourcesets",
	policy.KindIdentityProvider: "identityproviders",
	policy.KindRemoteService:    "remoteservices",
}

const pluralOfGrants = "bypassgrants"

func resourceOf(plural string) schema.GroupVersionResource {
	group, version, _ := strings.Cut(policy.APIVersion, "/")
	return schema.GroupVersionResource{Group: group, Version: version, Resource: plural}
}

// ErrNotRead says that the API server has not given everything yet, since this Source was made.
var ErrNotRead = errors.New("the API server has not given its resources yet")

// Resource is one resource of a set, as the API server has it.
type Resource struct {
	Kind, Name string
	Generation int64
	Spec       any    // as JSON has it
	Signatures string // of a ResourceSet
}

// Origin is what errors call the resource.
func (r Resource) Origin() string { return Origin(r.Kind, r.Name) }

// Where is what errors call the cluster as a whole.
const Where = "kubernetes"

// Origin is what errors call a resource of the cluster.
func Origin(kind, name string) string { return Where + ": " + kind + "/" + name }

// Document is the resource as the reader of files takes it: without what the cluster has added to it. Nothing is left out of the spec.
func (r Resource) Document() (policy.Document, error) {
	data, err := json.Marshal(map[string]any{
		"apiVersion": policy.APIVersion, "kind": r.Kind, "metadata": map[string]any{"name": r.Name}, "spec": r.Spec,
	})
	return policy.Document{Name: r.Origin(), Data: data}, err
}

func resourceFrom(kind string, u *unstructured.Unstructured) Resource {
	r := Resource{Kind: kind, Name: u.GetName(), Generation: u.GetGeneration(), Spec: u.Object["spec"]}
	if kind == policy.KindResourceSet {
		r.Signatures = u.GetAnnotations()[Signatures]
	}
	return r
}

// Resources lists those of a set, by kind and name. The error wraps ErrNotRead until every kind was read once.
func (s *Source) Resources() ([]Resource, error) {
	if err := s.read(plurals); err != nil {
		return nil, err
	}
	var all []Resource
	for kind := range plurals {
		for _, obj := range s.kinds[kind].informer.GetStore().List() {
			if u, ok := obj.(*unstructured.Unstructured); ok {
				all = append(all, resourceFrom(kind, u))
			}
		}
	}
	slices.SortFunc(all, func(a, b Resource) int { return strings.Compare(a.Origin(), b.Origin()) })
	return all, nil
}

// Grant is a BypassGrant for this node. What it says is not proven.
type Grant struct {
	Name, UID  string
	Generation int64
	Envelope   []byte
}

// Grants lists the BypassGrants for this node, by name. The error wraps ErrNotRead until they were read once.
func (s *Source) Grants() ([]Grant, error) {
	if err := s.read(map[string]string{kindBypassGrant: pluralOfGrants}); err != nil {
		return nil, err
	}
	var all []Grant
	for _, obj := range s.kinds[kindBypassGrant].informer.GetStore().List() {
		if u, ok := obj.(*unstructured.Unstructured); ok {
			envelope, _, _ := unstructured.NestedString(u.Object, "spec", "envelope")
			all = append(all, Grant{Name: u.GetName(), UID: string(u.GetUID()), Generation: u.GetGeneration(), Envelope: []byte(envelope)})
		}
	}
	slices.SortFunc(all, func(a, b Grant) int { return strings.Compare(a.Name, b.Name) })
	return all, nil
}

// read tells whether each of the kinds was read once, and else why not.
func (s *Source) read(kinds map[string]string) error {
	var errs []error
	for kind, plural := range kinds {
		if w := s.kinds[kind]; !w.informer.HasSynced() {
			if err := w.trouble(); err != nil {
				errs = append(errs, fmt.Errorf("%w: %s: %w", ErrNotRead, plural, err))
			} else {
				errs = append(errs, fmt.Errorf("%w: %s", ErrNotRead, plural))
			}
		}
	}
	return inOrder(errs)
}

// Trouble is what keeps the Source from following the API server now; nil: nothing does.
func (s *Source) Trouble() error {
	var errs []error
	for kind, w := range s.kinds {
		if err := w.trouble(); err != nil {
			errs = append(errs, fmt.Errorf("watch %s: %w", kind, err))
		}
	}
	return inOrder(errs)
}

func inOrder(errs []error) error {
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errors.Join(errs...)
}

// differs tells whether what matters of a resource is another: its spec, or its signatures. A word in its status does not.
func differs(old, next metav1.Object) bool {
	return old.GetUID() != next.GetUID() || old.GetGeneration() != next.GetGeneration() ||
		old.GetAnnotations()[Signatures] != next.GetAnnotations()[Signatures]
}
