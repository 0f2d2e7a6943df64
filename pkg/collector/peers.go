package collector

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffegrpc/grpccredentials"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const agentPath = "/sallyport/agent/"

// proofTTL is how long a proven identity is good for one stream, and for new calls on its connection. A certificate is looked at in the
// handshake only, and streams have no end.
const proofTTL = time.Hour

// peers says who may do what, by SPIFFE ID.
type peers struct {
	trustDomain     spiffeid.TrustDomain
	readers, actors people
}

// people are SPIFFE IDs that may do one thing.
type people struct {
	exact    map[spiffeid.ID]bool
	prefixes []string // ending in "/"
}

func newPeers(td spiffeid.TrustDomain, readers, actors []string) (peers, error) {
	may, err := newPeople("reader", readers)
	act, actErr := newPeople("actor", actors)
	return peers{trustDomain: td, readers: may, actors: act}, errors.Join(err, actErr)
}

func newPeople(what string, ids []string) (people, error) {
	p := people{exact: map[spiffeid.ID]bool{}}
	var errs []error
	for _, one := range ids {
		base, isPrefix := strings.CutSuffix(one, "/*")
		id, err := spiffeid.FromString(base)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s %q: %w", what, one, err))
			continue
		}
		if isPrefix {
			p.prefixes = append(p.prefixes, id.String()+"/")
		} else {
			p.exact[id] = true
		}
	}
	return p, errors.Join(errs...)
}

// CheckReaders says what is wrong with a list of readers, as New would.
func CheckReaders(readers []string) error {
	_, err := newPeople("reader", readers)
	return err
}

// CheckActors says what is wrong with a list of actors, as New would.
func CheckActors(actors []string) error {
	_, err := newPeople("actor", actors)
	return err
}

// nodeOf returns the node whose agent has this identity.
func (p peers) nodeOf(id spiffeid.ID) (string, bool) {
	node, ok := strings.CutPrefix(id.Path(), agentPath)
	if !ok || !id.MemberOf(p.trustDomain) || node == "" || strings.Contains(node, "/") {
		return "", false
	}
	return node, true
}

func (p people) has(id spiffeid.ID) bool {
	if p.exact[id] {
		return true
	}
	for _, prefix := range p.prefixes {
		if strings.HasPrefix(id.String(), prefix) {
			return true
		}
	}
	return false
}

// handshake lets in whoever may do anything at all.
func (p peers) handshake(id spiffeid.ID) error {
	if _, ok := p.nodeOf(id); ok || p.readers.has(id) || p.actors.has(id) {
		return nil
	}
	return fmt.Errorf("%s is neither an agent of %s nor a reader nor an actor", id, p.trustDomain)
}

// browser lets in whoever may read: what is acted on has to be read first.
func (p peers) browser(id spiffeid.ID) error {
	if !p.readers.has(id) {
		return fmt.Errorf("%s is not among the collector's readers", id)
	}
	return nil
}

// node returns the node that the caller proved to be.
func (p peers) node(ctx context.Context) (string, error) {
	id, ok := grpccredentials.PeerIDFromContext(ctx)
	if !ok {
		return "", status.Error(codes.Unauthenticated, "no SPIFFE ID proven")
	}
	node, ok := p.nodeOf(id)
	if !ok {
		return "", status.Errorf(codes.PermissionDenied, "%s is no agent of %s", id, p.trustDomain)
	}
	return node, nil
}

// reader refuses a caller who may not read.
func (p peers) reader(ctx context.Context) error {
	id, ok := grpccredentials.PeerIDFromContext(ctx)
	if !ok {
		return status.Error(codes.Unauthenticated, "no SPIFFE ID proven")
	}
	if !p.readers.has(id) {
		return status.Errorf(codes.PermissionDenied, "%s is not among the collector's readers", id)
	}
	return nil
}
