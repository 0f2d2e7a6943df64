package kube

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// TestSelectorsMeanWhatTheyMeanInKubernetes holds our matching against that of Kubernetes, of selectors and labels from few words.
func TestSelectorsMeanWhatTheyMeanInKubernetes(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	keys, values := []string{"a", "b", "example.org/c"}, []string{"", "1", "2", "3"}
	pick := func(list []string) string { return list[r.IntN(len(list))] }
	matched := 0
	for range 20000 {
		ours := policy.PodSelector{Namespace: "n"}
		var theirs metav1.LabelSelector
		for range r.IntN(2) {
			ours.MatchLabels = map[string]string{pick(keys): pick(values)}
			theirs.MatchLabels = ours.MatchLabels
		}
		for range r.IntN(3) {
			q := policy.LabelRequirement{Key: pick(keys),
				Operator: []policy.LabelOperator{policy.LabelIn, policy.LabelNotIn, policy.LabelExists, policy.LabelDoesNotExist}[r.IntN(4)]}
			if q.Operator == policy.LabelIn || q.Operator == policy.LabelNotIn {
				for range 1 + r.IntN(2) {
					q.Values = append(q.Values, pick(values))
				}
			}
			ours.MatchExpressions = append(ours.MatchExpressions, q)
			theirs.MatchExpressions = append(theirs.MatchExpressions,
				metav1.LabelSelectorRequirement{Key: q.Key, Operator: metav1.LabelSelectorOperator(q.Operator), Values: q.Values})
		}
		selector, err := metav1.LabelSelectorAsSelector(&theirs)
		if err != nil {
			t.Fatalf("%+v: %v", theirs, err)
		}
		pod := policy.Pod{Namespace: "n", Labels: map[string]string{}}
		for range r.IntN(4) {
			pod.Labels[pick(keys)] = pick(values)
		}
		got, want := ours.Matches(pod), selector.Matches(labels.Set(pod.Labels))
		if got != want {
			t.Fatalf("%s and labels %v: %v, in Kubernetes %v", ours, pod.Labels, got, want)
		}
		if got {
			matched++
		}
	}
	if matched < 1000 {
		t.Errorf("only %d of the pairs matched: little is shown", matched)
	}
}

func TestFactsOfPods(t *testing.T) {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{UID: "u-1", Namespace: "shop", Name: "db-0", Labels: map[string]string{"app": "db"}},
		Spec:       corev1.PodSpec{ServiceAccountName: "db", HostNetwork: true},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: "fd00::7"}, {IP: "10.2.0.7"}, {IP: "nonsense"}}},
	}
	want := policy.Pod{UID: "u-1", Namespace: "shop", Name: "db-0", ServiceAccount: "db", Labels: map[string]string{"app": "db"}, HostNetwork: true,
		Addresses: []netip.Addr{netip.MustParseAddr("10.2.0.7"), netip.MustParseAddr("fd00::7")}}
	if got := factsOf(pod); !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
	pod.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "0123456789abcdef0123456789abcdef"}
	if got := factsOf(pod).UID; got != "0123456789abcdef0123456789abcdef" {
		t.Errorf("a static pod has the UID %s", got)
	}
	for _, another := range []string{"7e7c1f0a-3b1d-4f0e-9a50-0d6c1d2f3a4b", "0123456789abcdef", "../0123456789abcdef0123456789abcde"} {
		pod.Annotations[corev1.MirrorPodAnnotationKey] = another
		if got := factsOf(pod).UID; got != "u-1" {
			t.Errorf("a pod whose author says that it is the mirror of %q has the UID %s", another, got)
		}
	}
	for phase, want := range map[corev1.PodPhase]bool{corev1.PodPending: true, corev1.PodRunning: true, corev1.PodUnknown: true,
		corev1.PodSucceeded: false, corev1.PodFailed: false} {
		pod.Status.Phase = phase
		if got := runs(pod); got != want {
			t.Errorf("%s: %v, want %v", fmt.Sprint(phase), got, want)
		}
	}
}
