// Package kube brings what the API server of a Kubernetes cluster has for one node.
package kube

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
)

// Config says which cluster, and for which of its nodes.
type Config struct {
	// Node is the node's name in the cluster: the pods that are looked at are those on it.
	Node string
	// Audience is the node's name in grants.
	Audience string
	// Kubeconfig is a file that says how to reach the API server. Empty: by the service account of the pod.
	Kubeconfig string
	// Spread is the time over which nodes that have the same to say of a resource wait for each other: 5s.
	Spread time.Duration
	// Logger takes what client-go says; nil: nobody does.
	Logger *slog.Logger
}

const defaultSpread = 5 * time.Second

// Source watches what concerns one node. What it gives is the API server's word, which proves nothing. Safe for concurrent use.
type Source struct {
	cfg   Config
	own   dynamic.Interface
	core  *corev1client.CoreV1Client
	kinds map[string]*watched // of our own group, by kind
	words *words

	mu        sync.Mutex
	informers []cache.SharedIndexInformer // guarded by mu until Run
	pods      cache.SharedIndexInformer   // guarded by mu; nil: nobody has asked for it
	changed   chan struct{}               // guarded by mu; closed with the next change
}

// New makes a Source, and asks the API server nothing yet.
func New(cfg Config) (*Source, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Spread == 0 {
		cfg.Spread = defaultSpread
	}
	how, err := reach(cfg.Kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("find API server: %w", err)
	}
	s := &Source{cfg: cfg, kinds: make(map[string]*watched), changed: make(chan struct{})}
	if s.own, err = dynamic.NewForConfig(how); err != nil {
		return nil, fmt.Errorf("make client of API server: %w", err)
	}
	if s.core, err = corev1client.NewForConfig(how); err != nil {
		return nil, fmt.Errorf("make client of API server: %w", err)
	}
	for kind, plural := range plurals {
		s.watch(kind, plural, fields.Everything())
	}
	s.watch(kindBypassGrant, pluralOfGrants, fields.OneTermEqualSelector("spec.node", cfg.Audience))
	s.words = newWords(s)
	return s, nil
}

func reach(kubeconfig string) (how *rest.Config, err error) {
	if kubeconfig == "" {
		how, err = rest.InClusterConfig()
	} else {
		how, err = clientcmd.BuildConfigFromFlags("", kubeconfig)
	}
	if err != nil {
		return nil, err
	}
	how.UserAgent = "sallyport-agent"
	return how, nil
}

// Pods gives the informer of the pods on the node, of *corev1.Pod, without managed fields. It is made when it is first asked for,
// before Run, and watches while Run does.
func (s *Source) Pods() cache.SharedIndexInformer {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pods == nil {
		here := fields.OneTermEqualSelector("spec.nodeName", s.cfg.Node)
		watch := cache.NewListWatchFromClient(s.core.RESTClient(), "pods", metav1.NamespaceAll, here)
		s.pods = s.informer(watch, &corev1.Pod{})
	}
	return s.pods
}

// informer makes one that Run runs. It never tells again what has not changed.
func (s *Source) informer(watch cache.ListerWatcher, of runtime.Object) cache.SharedIndexInformer {
	i := cache.NewSharedIndexInformerWithOptions(watch, of, cache.SharedIndexInformerOptions{})
	_ = i.SetTransform(withoutManagedFields) // refused only once it runs
	s.informers = append(s.informers, i)
	return i
}

// withoutManagedFields lets go of what is often most of an object, and only says who wrote which field.
func withoutManagedFields(obj any) (any, error) {
	if o, ok := obj.(metav1.Object); ok {
		o.SetManagedFields(nil)
	}
	return obj, nil
}

// Changed gives what is closed with the next change of anything that Resources, Grants and Trouble tell.
func (s *Source) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

func (s *Source) change() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.changed)
	s.changed = make(chan struct{})
}

// Wait waits until Resources has something to give. When ctx ends before, the error says what is missing.
func (s *Source) Wait(ctx context.Context) error {
	for {
		changed := s.Changed()
		err := s.read(plurals)
		if err == nil {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return err
		}
	}
}

// Run watches until ctx ends, and says what the node has to say. What is broken off is begun again, with pauses that grow.
func (s *Source) Run(ctx context.Context) error {
	ctx = klog.NewContext(ctx, logr.FromSlogHandler(s.cfg.Logger.Handler()))
	s.mu.Lock()
	informers := s.informers
	s.mu.Unlock()
	var all sync.WaitGroup
	for _, i := range informers {
		all.Go(func() { i.RunWithContext(ctx) })
	}
	for _, w := range s.kinds {
		all.Go(func() { // the first list of a kind without a resource changes nothing else
			if cache.WaitForCacheSync(ctx.Done(), w.informer.HasSynced) {
				s.change()
			}
		})
	}
	s.words.run(ctx)
	all.Wait()
	return nil
}
