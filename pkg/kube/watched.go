package kube

import (
	"context"
	"sync"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/cache"
)

// watched is one kind of our group, and how it stands with its watch.
type watched struct {
	client   dynamic.ResourceInterface
	informer cache.SharedIndexInformer

	mu    sync.Mutex
	wrong error // guarded by mu; why the last list or watch was refused
}

func (w *watched) trouble() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.wrong
}

// went notes how a request went, and tells whether it went otherwise than the last.
func (w *watched) went(err error) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	other := (w.wrong == nil) != (err == nil)
	w.wrong = err
	return other
}

// watch makes the informer of a kind.
func (s *Source) watch(kind, plural string, only fields.Selector) {
	w := &watched{client: s.own.Resource(resourceOf(plural))}
	note := func(ctx context.Context, err error) {
		if ctx.Err() == nil && w.went(err) {
			s.change()
		}
	}
	w.informer = s.informer(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector = only.String()
			list, err := w.client.List(ctx, o)
			note(ctx, err)
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = only.String()
			events, err := w.client.Watch(ctx, o)
			note(ctx, err)
			return events, err
		},
	}, &unstructured.Unstructured{})
	_, _ = w.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{ // refused only once it is stopped
		AddFunc: func(any) { s.change() },
		UpdateFunc: func(old, next any) {
			before, ok := old.(metav1.Object)
			now, ok2 := next.(metav1.Object)
			if !ok || !ok2 || differs(before, now) {
				s.change()
			}
		},
		DeleteFunc: func(any) { s.change() },
	})
	s.kinds[kind] = w
}
