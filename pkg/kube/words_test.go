package kube

import (
	"slices"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/json"
)

// told is the resource with the status that was written, as an API server has it then.
func told(t *testing.T, u *unstructured.Unstructured, status map[string]any) *unstructured.Unstructured {
	t.Helper()
	data, err := json.Marshal(map[string]any{"metadata": u.Object["metadata"], "spec": u.Object["spec"], "status": status})
	if err != nil {
		t.Fatal(err)
	}
	next := &unstructured.Unstructured{}
	if err := json.Unmarshal(data, &next.Object); err != nil {
		t.Fatal(err)
	}
	return next
}

func resource(generation int64) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: map[string]any{"metadata": map[string]any{"name": "db", "generation": generation}}}
}

func accepted(t *testing.T, u *unstructured.Unstructured) metav1.Condition {
	t.Helper()
	c := find(conditionsOf(u), conditionAccepted)
	if c == nil {
		t.Fatalf("no condition: %v", u.Object)
	}
	return *c
}

// TestOneWordIsEnough: nodes of one mind write one status among them; a refusal stands until its own node takes it back, or the resource
// changes.
func TestOneWordIsEnough(t *testing.T) {
	now := time.Now()
	yes, no := Verdict{Generation: 2, Accepted: true, Reason: "Valid"}, Verdict{Generation: 2, Reason: "Invalid", Message: "spec.ports[0]: is wrong"}
	u := resource(2)
	if (Verdict{Generation: 1, Accepted: true, Reason: "Valid"}).status(u, "a", now) != nil {
		t.Error("an old generation was judged")
	}
	u = told(t, u, yes.status(u, "a", now))
	if c := accepted(t, u); c.Status != metav1.ConditionTrue || c.ObservedGeneration != 2 || c.LastTransitionTime.IsZero() {
		t.Errorf("%+v", c)
	}
	if yes.status(u, "b", now) != nil || yes.status(u, "a", now) != nil {
		t.Error("said twice")
	}
	u = told(t, u, no.status(u, "b", now))
	if c := accepted(t, u); c.Status != metav1.ConditionFalse || c.Reason != "Invalid" || c.Message != "b: spec.ports[0]: is wrong" {
		t.Errorf("%+v", c)
	}
	if no.status(u, "a", now) != nil || yes.status(u, "a", now) != nil {
		t.Error("another node had something to say of a refusal")
	}
	if yes.status(u, "b", now) == nil {
		t.Error("the node cannot take its refusal back")
	}
	u.SetGeneration(3)
	yes.Generation = 3
	if c := accepted(t, told(t, u, yes.status(u, "a", now))); c.Status != metav1.ConditionTrue || c.ObservedGeneration != 3 || c.Message != "" {
		t.Errorf("of the next generation: %+v", c)
	}
}

func TestGrantWords(t *testing.T) {
	now := time.Now()
	w := GrantWord{Generation: 1, ID: "01", Service: "db", Requester: "alice", Approvers: []string{"bob"}, Until: now.Add(time.Minute),
		Verified: Answer{true, "Signed", ""}, Active: Answer{true, "Open", "until then"}}
	u := resource(1)
	u = told(t, u, w.status(u, now))
	if got := w.status(u, now.Add(time.Hour)); got != nil {
		t.Errorf("said twice: %v", got)
	}
	w.Active, w.Ended = Answer{false, "Ended", ""}, &Answer{true, "Expired", "deadline"}
	next := told(t, u, w.status(u, now.Add(time.Hour)))
	list := conditionsOf(next)
	before, after := find(conditionsOf(u), conditionVerified), find(list, conditionVerified)
	if len(list) != 3 || find(list, conditionEnded).Reason != "Expired" || !after.LastTransitionTime.Equal(&before.LastTransitionTime) {
		t.Errorf("%+v", list)
	}
	if id, _, _ := unstructured.NestedString(next.Object, "status", "id"); id != "01" {
		t.Errorf("id %q", id)
	}
}

// TestOnlySpecAndSignaturesMatter: a word in a status wakes nobody up.
func TestOnlySpecAndSignaturesMatter(t *testing.T) {
	a, b := resource(1), resource(1)
	b.SetResourceVersion("7")
	if differs(a, b) {
		t.Error("a status differs")
	}
	b.SetAnnotations(map[string]string{Signatures: "{}"})
	if !differs(a, b) || !differs(a, resource(2)) {
		t.Error("a change does not differ")
	}
}

// TestFewSpeakBeforeTheyHear: of nodes that have the same to say, few would say it within the time that the first word takes to reach them.
func TestFewSpeakBeforeTheyHear(t *testing.T) {
	const heard = 300 * time.Millisecond
	for _, nodes := range []int{1, 100, 1000, 10_000} {
		lots := make([]time.Duration, nodes)
		for i := range lots {
			lots[i] = lot(defaultSpread)
		}
		slices.Sort(lots)
		if lots[0] < 0 || lots[nodes-1] > defaultSpread {
			t.Errorf("%d nodes wait from %s to %s", nodes, lots[0], lots[nodes-1])
		}
		early, _ := slices.BinarySearch(lots, lots[0]+heard)
		if t.Logf("%d nodes: the first after %s, %d by then", nodes, lots[0], early); early > 20 {
			t.Errorf("%d of %d nodes speak within %s", early, nodes, heard)
		}
	}
}
