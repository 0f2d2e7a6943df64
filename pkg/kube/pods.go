package kube

import (
	"context"
	"encoding/hex"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// FollowPods tells of the pods of the node until ctx ends: all of them each time, first when the API server has told of all, and from then on
// with each change. Without the API server it tells nothing, and what it told last stands.
func (s *Source) FollowPods(ctx context.Context, tell func([]policy.Pod)) error {
	stirred := make(chan struct{}, 1)
	stir := func() {
		select {
		case stirred <- struct{}{}:
		default: // it has not told yet
		}
	}
	told, err := s.Pods().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { stir() }, UpdateFunc: func(any, any) { stir() }, DeleteFunc: func(any) { stir() },
	})
	if err != nil {
		return err
	}
	defer func() { _ = s.Pods().RemoveEventHandler(told) }() // it fails for handlers of others only
	if !cache.WaitForCacheSync(ctx.Done(), told.HasSynced) {
		return nil
	}
	for {
		tell(s.podFacts())
		select {
		case <-ctx.Done():
			return nil
		case <-stirred:
		}
	}
}

// podFacts are the pods that the informer knows.
func (s *Source) podFacts() []policy.Pod {
	var all []policy.Pod
	for _, obj := range s.Pods().GetStore().List() {
		if pod, ok := obj.(*corev1.Pod); ok && runs(pod) {
			all = append(all, factsOf(pod))
		}
	}
	return all
}

// runs says whether a pod may have processes: the addresses of one that is over may be another's by now.
func runs(p *corev1.Pod) bool {
	return p.Status.Phase != corev1.PodSucceeded && p.Status.Phase != corev1.PodFailed
}

// factsOf is what counts of a pod. A static pod's mirror has another UID than kubelet uses, which an annotation tells. Whoever may make pods
// may write that annotation: it is never the UID that the API server gives a pod, which may be somebody else's.
func factsOf(p *corev1.Pod) policy.Pod {
	facts := policy.Pod{UID: string(p.UID), Namespace: p.Namespace, Name: p.Name, ServiceAccount: p.Spec.ServiceAccountName, Labels: p.Labels,
		HostNetwork: p.Spec.HostNetwork}
	if hash := p.Annotations[corev1.MirrorPodAnnotationKey]; isHash(hash) {
		facts.UID = hash
	}
	for _, ip := range p.Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil {
			facts.Addresses = append(facts.Addresses, a.Unmap())
		}
	}
	slices.SortFunc(facts.Addresses, netip.Addr.Compare)
	return facts
}

// isHash tells whether it is what kubelet makes of a file: 16 bytes in hex, where the API server's UIDs have dashes.
func isHash(uid string) bool {
	sum, err := hex.DecodeString(uid)
	return err == nil && len(sum) == 16
}
