package kube

import (
	"context"
	"encoding/json"
	"math"
	"math/rand/v2"
	"reflect"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
)

// Types of conditions that nodes write.
const (
	conditionAccepted = "Accepted"
	conditionVerified = "Verified"
	conditionActive   = "Active"
	conditionEnded    = "Ended"
)

// sayAgain is the pause before a word is said again that the API server did not take.
const sayAgain = 10 * time.Second

// maxMessage bounds a message, in bytes.
const maxMessage = 1024

// Verdict is what a node makes of one generation of a resource.
type Verdict struct {
	Generation int64
	Accepted   bool
	Reason     string // one word, like Invalid
	Message    string
}

// GrantWord is what a node says of one generation of a BypassGrant: from the envelope that it verified, where it did.
type GrantWord struct {
	Generation             int64
	ID, Service, Requester string
	Approvers              []string
	Until                  time.Time
	Verified, Active       Answer
	Ended                  *Answer // nil: its paths were never open, or are
}

// Answer is a condition's status with its reason.
type Answer struct {
	Is              bool
	Reason, Message string
}

// Judge has the verdict written into the status of a resource, if nobody has said it: of 10,000 nodes with the same verdict one is
// enough. A refusal stands until its own node takes it back or the resource changes.
func (s *Source) Judge(kind, name string, v Verdict) {
	s.words.add(ref{kind, name}, lot(s.cfg.Spread), func(u *unstructured.Unstructured) map[string]any {
		return v.status(u, s.cfg.Audience, time.Now())
	})
}

// lot draws how long a node waits, the longer the likelier: of many nodes few draw little, so that one has spoken, and all others have seen it,
// before most would. With even chances, all those would try whose time comes while the first word is on its way, and 1,000 nodes made 32 attempts for each word.
func lot(most time.Duration) time.Duration {
	const nodes = 10_000 // of so many, the first speaks at once
	short := rand.ExpFloat64() / math.Log(nodes)
	return time.Duration(float64(most) * max(1-short, 0))
}

// Tell has the word written into the status of a BypassGrant, which is this node's alone.
func (s *Source) Tell(name string, w GrantWord) {
	s.words.add(ref{kindBypassGrant, name}, 0, func(u *unstructured.Unstructured) map[string]any { return w.status(u, time.Now()) })
}

type ref struct{ kind, name string }

// word is what is to be said of a resource. status gives the status to write; nil: there is nothing to say.
type word struct {
	at     time.Time
	status func(*unstructured.Unstructured) map[string]any
}

// words are what the node has still to say. A later word takes the place of the one before.
type words struct {
	source *Source
	more   chan struct{}
	mu     sync.Mutex
	due    map[ref]word // guarded by mu
}

func newWords(s *Source) *words {
	return &words{source: s, more: make(chan struct{}, 1), due: make(map[ref]word)}
}

// add keeps a word for later, or lets go of it where it is said already. A word that waits keeps its time.
func (w *words) add(of ref, wait time.Duration, status func(*unstructured.Unstructured) map[string]any) {
	u := w.source.kept(of)
	w.mu.Lock()
	defer w.mu.Unlock()
	if u == nil || status(u) == nil {
		delete(w.due, of)
		return
	}
	at := time.Now().Add(wait)
	if before, waits := w.due[of]; waits {
		at = before.at
	}
	w.due[of] = word{at, status}
	select {
	case w.more <- struct{}{}:
	default:
	}
}

// kept is the resource as it was last seen; nil: there is none.
func (s *Source) kept(of ref) *unstructured.Unstructured {
	obj, there, err := s.kinds[of.kind].informer.GetStore().GetByKey(of.name)
	if err != nil || !there {
		return nil
	}
	u, _ := obj.(*unstructured.Unstructured)
	return u
}

// run says one word after the other until ctx ends.
func (w *words) run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.more:
		case <-timer.C:
		}
		for of, next := range w.takeDue(time.Now()) {
			w.say(ctx, of, next)
		}
		timer.Reset(w.wait(time.Now()))
	}
}

// takeDue takes the words whose time has come.
func (w *words) takeDue(now time.Time) map[ref]word {
	w.mu.Lock()
	defer w.mu.Unlock()
	due := make(map[ref]word)
	for of, next := range w.due {
		if !next.at.After(now) {
			due[of] = next
			delete(w.due, of)
		}
	}
	return due
}

// wait is the time until the next word.
func (w *words) wait(now time.Time) time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	least := time.Hour
	for _, next := range w.due {
		least = min(least, max(next.at.Sub(now), 0))
	}
	return least
}

// say writes a status over the resource that it is about and no other: whoever was faster is looked at first.
func (w *words) say(ctx context.Context, of ref, next word) {
	u := w.source.kept(of)
	if u == nil {
		return
	}
	status := next.status(u)
	if status == nil {
		return
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"uid": u.GetUID(), "resourceVersion": u.GetResourceVersion()}, "status": status})
	if err == nil {
		_, err = w.source.kinds[of.kind].client.Patch(ctx, of.name, types.MergePatchType, patch, metav1.PatchOptions{}, "status")
	}
	if err == nil || apierrors.IsNotFound(err) || apierrors.IsInvalid(err) {
		return
	}
	pause := sayAgain
	if apierrors.IsConflict(err) {
		pause = time.Second // what was seen is old; the watch brings the newer one
	} else {
		w.source.cfg.Logger.WarnContext(ctx, "status not written", "kind", of.kind, "name", of.name, "err", err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, newer := w.due[of]; !newer {
		next.at = time.Now().Add(pause)
		w.due[of] = next
	}
}

// status is what the verdict makes of the resource's status.
func (v Verdict) status(u *unstructured.Unstructured, node string, now time.Time) map[string]any {
	if u.GetGeneration() != v.Generation {
		return nil
	}
	have := conditionsOf(u)
	message := ""
	if !v.Accepted {
		message = cut(node + ": " + v.Message)
	}
	next := condition(have, conditionAccepted, Answer{v.Accepted, v.Reason, message}, v.Generation, now)
	if before := find(have, conditionAccepted); before != nil && before.ObservedGeneration == v.Generation {
		mine := strings.HasPrefix(before.Message, node+": ")
		switch {
		case before.Status == metav1.ConditionTrue && v.Accepted, before.Status == metav1.ConditionFalse && !mine, same(*before, next):
			return nil
		}
	}
	return map[string]any{"observedGeneration": v.Generation, "conditions": replaced(have, next)}
}

// status is what the word makes of the grant's status.
func (w GrantWord) status(u *unstructured.Unstructured, now time.Time) map[string]any {
	if u.GetGeneration() != w.Generation {
		return nil
	}
	have := conditionsOf(u)
	conditions := []metav1.Condition{condition(have, conditionVerified, w.Verified, w.Generation, now), condition(have, conditionActive, w.Active, w.Generation, now)}
	if w.Ended != nil {
		conditions = append(conditions, condition(have, conditionEnded, *w.Ended, w.Generation, now))
	}
	status := map[string]any{"observedGeneration": w.Generation, "id": w.ID, "service": w.Service, "requester": w.Requester, "approvers": w.Approvers, "conditions": conditions}
	if !w.Until.IsZero() {
		status["until"] = w.Until.UTC().Format(time.RFC3339)
	}
	if covers(u.Object["status"], status) {
		return nil
	}
	return status
}

// covers tells whether a status is there already, in all that is in it.
func covers(have any, want map[string]any) bool {
	data, err := json.Marshal(want)
	var plain map[string]any
	if err != nil || json.Unmarshal(data, &plain) != nil {
		return false
	}
	data, err = json.Marshal(have)
	var there map[string]any
	if err != nil || json.Unmarshal(data, &there) != nil {
		return false
	}
	for k, v := range plain {
		if empty(v) && empty(there[k]) {
			continue
		}
		if !reflect.DeepEqual(v, there[k]) {
			return false
		}
	}
	return true
}

func empty(v any) bool { return v == nil || reflect.DeepEqual(v, "") }

func conditionsOf(u *unstructured.Unstructured) (list []metav1.Condition) {
	raw, _, _ := unstructured.NestedSlice(u.Object, "status", "conditions")
	if data, err := json.Marshal(raw); err == nil {
		_ = json.Unmarshal(data, &list) // what cannot be read is written anew
	}
	return list
}

func find(list []metav1.Condition, of string) *metav1.Condition {
	for i := range list {
		if list[i].Type == of {
			return &list[i]
		}
	}
	return nil
}

// condition is an answer in the form of the API. It changed now, unless it was the same before.
func condition(have []metav1.Condition, of string, a Answer, generation int64, now time.Time) metav1.Condition {
	c := metav1.Condition{Type: of, Status: metav1.ConditionFalse, ObservedGeneration: generation, Reason: a.Reason, Message: cut(a.Message),
		LastTransitionTime: metav1.NewTime(now.UTC().Truncate(time.Second))}
	if a.Is {
		c.Status = metav1.ConditionTrue
	}
	if before := find(have, of); before != nil && before.Status == c.Status {
		c.LastTransitionTime = before.LastTransitionTime
	}
	return c
}

func same(a, b metav1.Condition) bool {
	return a.Status == b.Status && a.ObservedGeneration == b.ObservedGeneration && a.Reason == b.Reason && a.Message == b.Message
}

func replaced(list []metav1.Condition, c metav1.Condition) []metav1.Condition {
	if before := find(list, c.Type); before != nil {
		*before = c
		return list
	}
	return append(list, c)
}

func cut(s string) string {
	if len(s) <= maxMessage {
		return s
	}
	return strings.ToValidUTF8(s[:maxMessage-len("…")], "") + "…"
}
