package agent

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Bounds of what is kept of the proxy's words about itself.
const (
	stateStays = 20 * time.Second // the proxy repeats it every 5 s
	keptStates = 4                // processes
	mostParts  = 1024             // of each kind
)

// proxyStates are what the proxy's processes said last of what they work with. Nothing but words is decided by it. Safe for concurrent use.
type proxyStates struct {
	boot func() time.Duration

	mu   sync.Mutex
	told []toldState // guarded by mu; latest last
}

type toldState struct {
	at    time.Duration
	state *api.ProxyState
}

// take keeps it in the place of what the same process said before.
func (p *proxyStates) take(s *api.ProxyState) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.told = slices.DeleteFunc(p.told, func(t toldState) bool { return t.state.Instance == s.Instance || p.isOver(t) })
	if len(p.told) == keptStates {
		p.told = slices.Delete(p.told, 0, 1)
	}
	p.told = append(p.told, toldState{p.boot(), s})
}

func (p *proxyStates) isOver(t toldState) bool { return p.boot()-t.at > stateStays }

// certificates are those that the node's configuration has. The latest word on each counts.
func (p *proxyStates) certificates(known func(name string) bool) []*api.WebCertificate {
	return lastWords(p, (*api.ProxyState).GetCertificates, (*api.WebCertificate).GetName, known)
}

// providers are those that the resources in force have.
func (p *proxyStates) providers(known func(name string) bool) []*api.Provider {
	return lastWords(p, (*api.ProxyState).GetProviders, (*api.Provider).GetName, known)
}

func lastWords[T any](p *proxyStates, of func(*api.ProxyState) []T, name func(T) string, known func(name string) bool) (all []T) {
	p.mu.Lock()
	defer p.mu.Unlock()
	byName := map[string]T{}
	for _, t := range p.told {
		if p.isOver(t) {
			continue
		}
		for _, one := range of(t.state) {
			if known(name(one)) {
				byName[name(one)] = one
			}
		}
	}
	for _, one := range byName {
		all = append(all, one)
	}
	slices.SortFunc(all, func(a, b T) int { return cmp.Compare(name(a), name(b)) })
	return all
}

// State takes what a process of the proxy says of what it works with.
func (r *reports) State(_ context.Context, s *api.ProxyState) (*api.ProxyStateReply, error) {
	if s.GetInstance() == "" || len(s.GetInstance()) > maxInstance || len(s.GetCertificates()) > mostParts || len(s.GetProviders()) > mostParts {
		return nil, status.Errorf(codes.InvalidArgument, "want a state with an instance, and at most %d parts of each kind", mostParts)
	}
	for _, c := range s.GetCertificates() {
		c.Problem = plain(c.GetProblem())
	}
	for _, p := range s.GetProviders() {
		p.Problem = plain(p.GetProblem())
	}
	if r.states != nil {
		r.states.take(s)
	}
	return &api.ProxyStateReply{}, nil
}

// proxyParts tells of the proxy's web certificates and providers, and what is wrong with them.
func (n *node) proxyParts(_ context.Context, reply *api.StatusReply) error {
	reply.WebCertificates, reply.Providers = n.proxyStates.certificates(n.hasCertificate), n.proxyStates.providers(n.hasProvider)
	for _, c := range reply.GetWebCertificates() {
		if c.GetProblem() != "" {
			reply.Problems = append(reply.Problems, fmt.Sprintf("web certificate %s: %s", c.GetName(), c.GetProblem()))
		}
	}
	for _, p := range reply.GetProviders() {
		if p.GetProblem() != "" {
			reply.Problems = append(reply.Problems, fmt.Sprintf("identity provider %s: %s", p.GetName(), p.GetProblem()))
		}
	}
	return nil
}

func (n *node) hasCertificate(name string) bool {
	for _, c := range n.cfg.Spec.Proxy.Certificates {
		if c.Name == name {
			return true
		}
	}
	return false
}

func (n *node) hasProvider(name string) bool {
	e := n.resources.current()
	if e == nil {
		return false
	}
	_, ok := e.set.Provider(name)
	return ok
}
