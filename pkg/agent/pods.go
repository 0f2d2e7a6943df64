package agent

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// podsSoon is how long a pod that is not there yet is looked for often: a node begins one within seconds.
const podsSoon = 30 * time.Second

// keptLabels is how many earlier states of a pod's labels are kept, where what a pod was goes on to count. One that had more is closed.
const keptLabels = 16

var (
	errTwice = errors.New("is told of twice, in different ways: its protected ports are closed; look for another pod that says it is this one " +
		"(kubectl get pods -A -o wide, the annotation kubernetes.io/config.mirror)")
	errManyLabels = fmt.Errorf("had more than %d states of labels, and what it was counts: its protected ports are closed; make it anew", keptLabels)
)

// pods are the pods of this node: what the cluster says of them, and what the node itself knows, which is the network namespace that each
// is in. Safe for concurrent use.
type pods struct {
	groups *cgroups
	file   string // what the cluster said last, for a start without it
	// sticky: a pod stays with a service that has chosen it, whatever becomes of its labels, for nobody has signed these.
	sticky  bool
	changed func() // something was said that was not known

	mu    sync.Mutex
	told  bool                 // guarded by mu: the cluster has told of pods, now or before this start
	known map[string]*knownPod // guarded by mu; by UID
}

// knownPod is a pod of the node.
type knownPod struct {
	Now policy.Pod   `json:"now"`
	Was []policy.Pod `json:"was,omitempty"` // by which it was chosen otherwise
	// More says that it was more than there is room for.
	More bool `json:"more,omitempty"`
	// Gone says that the cluster does not tell of it any more, and that it runs.
	Gone bool `json:"gone,omitempty"`

	twice      bool                    // told of in different ways at once
	since      time.Time               // when it was first told of; zero: before this start
	looked     map[uint64]bool         // control groups whose namespace is known
	namespaces map[uint64]podNamespace // by their cookies
}

// podNamespace is a network namespace of a pod, by how devices of the node name it.
type podNamespace = int

func newPods(groups *cgroups, file string, sticky bool) *pods {
	return &pods{groups: groups, file: file, sticky: sticky, changed: func() {}, known: make(map[string]*knownPod)}
}

// load takes what was kept. That it is of this boot or not does not matter: a pod that is no more has no processes.
func (p *pods) load() error {
	data, err := os.ReadFile(p.file)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	var kept []*knownPod
	if err == nil {
		err = checkSum(p.file, data)
	}
	if err == nil {
		if _, after, marked := bytes.Cut(data, []byte("\n")); marked && bytes.HasPrefix(data, []byte(sumMark)) {
			data = after
		}
		err = json.Unmarshal(data, &kept)
	}
	if err != nil {
		return fmt.Errorf("read what is known of pods: %w", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.told = true
	for _, k := range kept {
		if k != nil {
			p.known[k.Now.UID] = k
		}
	}
	return nil
}

// Set says which pods are on the node. It is all that is known of them: who is left out is gone. The error says that it was not kept for
// the next start, and changes nothing else.
func (p *pods) Set(list []policy.Pod) error {
	p.mu.Lock()
	next, moved := make(map[string]*knownPod, len(list)), !p.told
	for _, pod := range list {
		if first, again := next[pod.UID]; again {
			first.twice = first.twice || !first.Now.Equal(pod)
			moved = true
			continue
		}
		k, ok := p.known[pod.UID]
		if !ok {
			k = &knownPod{Now: pod, since: time.Now()}
		}
		moved = moved || !ok || k.Gone || k.twice || !k.Now.Equal(pod)
		next[pod.UID] = k.become(pod, p.sticky)
	}
	moved = p.keepGone(next) || moved
	p.known, p.told = next, true
	p.mu.Unlock()
	if !moved {
		return nil
	}
	err := p.keep()
	p.changed()
	return err
}

// keepGone looks at those that are not among the next ones. What a pod was goes on to count while it runs: who tells of it again, with other
// labels, changes nothing. p.mu is held.
func (p *pods) keepGone(next map[string]*knownPod) (moved bool) {
	var running map[string][]podGroup
	for uid, k := range p.known {
		if next[uid] != nil {
			continue
		}
		moved = moved || !k.Gone
		if running == nil && p.sticky {
			running = p.groups.ofPods()
		}
		if len(running[uid]) > 0 {
			gone := *k
			gone.Gone, gone.twice = true, false
			next[uid] = &gone
		}
	}
	return moved
}

// become takes over what is said of the pod now.
func (k *knownPod) become(now policy.Pod, sticky bool) *knownPod {
	out := *k
	out.Now, out.Gone, out.twice = now, false, false
	is := func(was policy.Pod) bool { return chosenAlike(was, k.Now) }
	if sticky && !chosenAlike(k.Now, now) && !slices.ContainsFunc(k.Was, is) {
		if len(k.Was) >= keptLabels {
			out.More = true
		} else {
			out.Was = append(slices.Clone(k.Was), k.Now)
		}
	}
	return &out
}

// chosenAlike tells whether the same selectors choose both.
func chosenAlike(a, b policy.Pod) bool {
	return a.Namespace == b.Namespace && a.ServiceAccount == b.ServiceAccount && maps.Equal(a.Labels, b.Labels)
}

// doubt is why what the cluster says of the pod decides nothing; nil: it does.
func (k *knownPod) doubt() error {
	switch {
	case k.twice:
		return errTwice
	case k.More:
		return errManyLabels
	}
	return nil
}

// keep makes what is known durable.
func (p *pods) keep() error {
	p.mu.Lock()
	kept := make([]*knownPod, 0, len(p.known))
	for _, k := range p.known {
		kept = append(kept, k)
	}
	p.mu.Unlock()
	slices.SortFunc(kept, func(a, b *knownPod) int { return cmp.Compare(a.Now.UID, b.Now.UID) })
	data, err := json.Marshal(kept)
	if err == nil {
		err = keepFile(p.file, summed(data), 0o600)
	}
	if err != nil {
		return fmt.Errorf("keep what is known of pods: %w", err)
	}
	return nil
}

// isChosen says whether a selector chooses the pod, by what it is or by what it was.
func (k *knownPod) isChosen(s *policy.PodSelector) bool {
	return s != nil && (s.Matches(k.Now) || slices.ContainsFunc(k.Was, s.Matches))
}

// look finds the namespaces of the pods that have new containers, and lists the pods in the order of their UIDs. waits: some have none yet.
func (p *pods) look() (list []*knownPod, waits bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.known) == 0 {
		return nil, false
	}
	groups := p.groups.ofPods()
	for uid, k := range p.known {
		if k.Now.HostNetwork || k.Gone {
			continue
		}
		k.look(p.groups, groups[uid])
		waits = waits || len(k.namespaces) == 0 && time.Since(k.since) < podsSoon
		list = append(list, k)
	}
	slices.SortFunc(list, func(a, b *knownPod) int { return cmp.Compare(a.Now.UID, b.Now.UID) })
	return list, waits
}

// look takes in containers that are new. A pod without any has ended, or not begun.
func (k *knownPod) look(groups *cgroups, of []podGroup) {
	if len(of) == 0 {
		k.looked, k.namespaces = nil, nil
		return
	}
	if k.looked == nil {
		k.looked, k.namespaces = make(map[uint64]bool), make(map[uint64]podNamespace)
	}
	for _, g := range of {
		if k.looked[g.number] {
			continue
		}
		if ns, ok := groups.namespace(g); ok {
			k.namespaces[ns.Cookie] = ns.ID
			k.looked[g.number] = ns.ID >= 0 // else a device may name it later
		}
	}
}

// hostNetwork lists the pods that are on the node's own network, and that a selector chooses.
func (p *pods) hostNetwork(s *policy.PodSelector) (names []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, k := range p.known {
		if k.Now.HostNetwork && !k.Gone && k.isChosen(s) {
			names = append(names, k.Now.String())
		}
	}
	slices.Sort(names)
	return names
}

// isTold says whether anybody has told of pods.
func (p *pods) isTold() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.told
}
