package v1alpha1_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sallyport-dev/sallyport/pkg/kube/v1alpha1"
	"github.com/sallyport-dev/sallyport/test/schema"
)

const definitions = "../../../deploy/crds"

const envelope = `{"payloadType":"application/vnd.sallyport.grant.v1+json","payload":"e30=","signatures":[{"keyid":"sp:0123456789abcdef","sig":"AA=="}]}`

func object(t *testing.T, g any) map[string]any {
	t.Helper()
	text, err := json.Marshal(g)
	if err != nil {
		t.Fatal(err)
	}
	all, err := schema.Objects(text)
	if err != nil || len(all) != 1 {
		t.Fatalf("%d objects, %v", len(all), err)
	}
	delete(all[0]["metadata"].(map[string]any), "creationTimestamp")
	return all[0]
}

func grant() v1alpha1.BypassGrant {
	return v1alpha1.BypassGrant{
		TypeMeta: metav1.TypeMeta{APIVersion: "sallyport.dev/v1alpha1", Kind: v1alpha1.KindBypassGrant}, ObjectMeta: metav1.ObjectMeta{Name: "backup-2026-11-23"},
		Spec: v1alpha1.BypassGrantSpec{Envelope: envelope, Node: "node-1.example.org"},
	}
}

// TestBypassGrant: a grant is taken as it was signed, cannot be changed, and what nodes say of it has bounds.
func TestBypassGrant(t *testing.T) {
	all := schema.Load(t, definitions)
	for name, c := range map[string]struct {
		change func(*v1alpha1.BypassGrant)
		field  string
	}{
		"as it is":      {func(*v1alpha1.BypassGrant) {}, ""},
		"no envelope":   {func(g *v1alpha1.BypassGrant) { g.Spec.Envelope = "" }, "spec.envelope"},
		"another file":  {func(g *v1alpha1.BypassGrant) { g.Spec.Envelope = "kind: Keyring" }, "spec.envelope"},
		"a large one":   {func(g *v1alpha1.BypassGrant) { g.Spec.Envelope += strings.Repeat(" ", 65536) }, "spec.envelope"},
		"no node":       {func(g *v1alpha1.BypassGrant) { g.Spec.Node = "" }, "spec.node"},
		"no such node":  {func(g *v1alpha1.BypassGrant) { g.Spec.Node = "Node 1" }, "spec.node"},
		"told":          {func(g *v1alpha1.BypassGrant) { g.Status = status(2) }, ""},
		"told too much": {func(g *v1alpha1.BypassGrant) { g.Status = status(9) }, "status.conditions"},
		"told twice": {func(g *v1alpha1.BypassGrant) {
			g.Status = status(1)
			g.Status.Conditions = append(g.Status.Conditions, g.Status.Conditions[0])
		}, "status.conditions[1]"},
	} {
		g := grant()
		c.change(&g)
		errs := all.Refusals(object(t, g), nil)
		if (len(errs) > 0) != (c.field != "") || c.field != "" && errs[0].Field != c.field {
			t.Errorf("%s: %v", name, errs.ToAggregate())
		}
	}
	next := grant()
	next.Spec.Node = "node-2"
	if errs := all.Refusals(object(t, next), object(t, grant())); len(errs) != 1 || errs[0].Field != "spec" || !strings.Contains(errs[0].Detail, "cannot be changed") {
		t.Errorf("changed: %v", errs)
	}
	if errs := all.Refusals(object(t, grant()), object(t, grant())); len(errs) > 0 {
		t.Errorf("applied again: %v", errs)
	}
}

func status(conditions int) v1alpha1.BypassGrantStatus {
	s := v1alpha1.BypassGrantStatus{ObservedGeneration: 1, ID: "01ARZ3NDEKTSV4RRFFQ69G5FAV", Service: "postgres", Requester: "alice", Until: metav1.NewTime(time.Unix(1800000000, 0))}
	for i := range conditions {
		s.Conditions = append(s.Conditions, metav1.Condition{Type: v1alpha1.ConditionActive + strings.Repeat("x", i), Status: metav1.ConditionTrue, Reason: "Opened", LastTransitionTime: s.Until})
	}
	return s
}
