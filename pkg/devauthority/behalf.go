package devauthority

import (
	"context"
	"crypto/x509"
	"fmt"
	"os"
	"strings"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffegrpc/grpccredentials"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/sallyport-dev/sallyport/pkg/identity/delegated"
)

// Entry gives an identity to the workloads that match it, which is by one of PID, Cgroup and PodUID. A process
// is looked at once, when it is asked for, as SPIRE does.
type Entry struct {
	ID     spiffeid.ID
	PID    int32
	Cgroup string // of the process, or one above it: "/system.slice/db.service"
	PodUID string
	// Federates names what its workloads trust beside their own trust domain, of those that Federate told.
	Federates []spiffeid.TrustDomain
}

// SetEntries replaces all entries.
func (a *Authority) SetEntries(entries ...Entry) { a.change(func() { a.entries = entries }) }

// ServeBroker serves the SPIFFE Broker API at a Unix socket, as the agent of SPIRE named own, to the brokers
// that are listed. Otherwise it is as Serve.
func (a *Authority) ServeBroker(ctx context.Context, socketPath string, own spiffeid.ID, brokers ...spiffeid.ID) error {
	self := issuer{a, own}
	s := grpc.NewServer(grpc.Creds(grpccredentials.MTLSServerCredentials(self, self, tlsconfig.AuthorizeOneOf(brokers...))))
	return serveSocket(ctx, socketPath, s, func(s *grpc.Server) { broker.RegisterAPIServer(s, &brokerEndpoint{authority: a}) })
}

// ServeDelegated serves SPIRE's Delegated Identity API at a Unix socket. Whoever may open it is taken for the
// delegate, who is denied everything while his own identity is withdrawn.
func (a *Authority) ServeDelegated(ctx context.Context, socketPath string, delegate spiffeid.ID) error {
	return serveSocket(ctx, socketPath, grpc.NewServer(), func(s *grpc.Server) {
		delegated.RegisterDelegatedIdentityServer(s, &delegatedEndpoint{authority: a, delegate: delegate})
	})
}

// issuer is an identity of the authority itself, new for every connection.
type issuer struct {
	*Authority
	id spiffeid.ID
}

// GetX509SVID implements x509svid.Source.
func (i issuer) GetX509SVID() (*x509svid.SVID, error) { return i.Issue(i.id) }

// GetX509BundleForTrustDomain implements x509bundle.Source.
func (i issuer) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	return i.Bundle().GetX509BundleForTrustDomain(td)
}

// attested is what attestation found out about one.
type attested struct {
	pid    int32
	cgroup string
	podUID string
}

func attestProcess(pid int32) (attested, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return attested{}, err
	}
	for line := range strings.Lines(string(raw)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			return attested{pid: pid, cgroup: path}, nil
		}
	}
	return attested{pid: pid}, nil
}

func (e Entry) matches(w attested) bool {
	switch {
	case e.PID != 0:
		return e.PID == w.pid
	case e.PodUID != "":
		return e.PodUID == w.podUID
	default:
		return e.Cgroup != "" && (w.cgroup == e.Cgroup || strings.HasPrefix(w.cgroup, strings.TrimSuffix(e.Cgroup, "/")+"/"))
	}
}

// of are the entries of a workload that are in force.
func (m moment) of(w attested) []Entry {
	var found []Entry
	for _, e := range m.entries {
		if e.matches(w) && !m.withdrawn[e.ID] {
			found = append(found, e)
		}
	}
	return found
}

// document is an identity as it goes over the wire.
func (a *Authority) document(m moment, id spiffeid.ID) (certificate, key []byte, err error) {
	svid, err := m.root.issue(id, a.ttl)
	if err != nil {
		return nil, nil, err
	}
	key, err = x509.MarshalPKCS8PrivateKey(svid.PrivateKey)
	return svid.Certificates[0].Raw, key, err
}

type brokerEndpoint struct {
	broker.UnimplementedAPIServer
	authority *Authority
}

// SubscribeToX509SVID sends the identities of a workload, and again at every change.
func (b *brokerEndpoint) SubscribeToX509SVID(r *broker.SubscribeToX509SVIDRequest, stream grpc.ServerStreamingServer[broker.SubscribeToX509SVIDResponse]) error {
	if err := checkHeader(stream.Context(), "broker.spiffe.io"); err != nil {
		return err
	}
	who, ok := grpccredentials.PeerIDFromContext(stream.Context())
	if !ok {
		return status.Error(codes.Unauthenticated, "unable to determine caller identity")
	}
	w, err := attestReference(r.GetReference().GetReference())
	if err != nil {
		return err
	}
	return b.authority.follow(stream.Context(), func(m moment) error {
		if m.withdrawn[who] {
			return errNoIdentity
		}
		answer := &broker.SubscribeToX509SVIDResponse{FederatedBundles: map[string][]byte{}}
		for _, e := range m.of(w) {
			certificate, key, err := b.authority.document(m, e.ID)
			if err != nil {
				return err
			}
			answer.Svids = append(answer.Svids, &broker.X509SVID{
				SpiffeId: e.ID.String(), X509Svid: certificate, X509SvidKey: key, Bundle: m.root.cert.Raw,
			})
			for _, td := range e.Federates {
				if f := m.federated[td]; f != nil {
					answer.FederatedBundles[td.IDString()] = der(f)
				}
			}
		}
		return stream.Send(answer)
	})
}

func attestReference(reference *anypb.Any) (attested, error) {
	if reference == nil {
		return attested{}, status.Error(codes.InvalidArgument, "workload reference must be provided")
	}
	m, err := reference.UnmarshalNew()
	if err != nil {
		return attested{}, status.Errorf(codes.InvalidArgument, "read reference: %v", err)
	}
	switch m := m.(type) {
	case *broker.WorkloadPIDReference:
		w, err := attestProcess(m.Pid)
		if err != nil {
			return w, status.Errorf(codes.Unauthenticated, "workload attestation failed: %v", err)
		}
		return w, nil
	case *broker.KubernetesObjectReference:
		if m.GetType().GetPlural() == "pods" && m.GetType().GetGroup() == "core" && m.Uid != "" {
			return attested{podUID: m.Uid}, nil
		}
	}
	return attested{}, status.Errorf(codes.InvalidArgument, "no attestor knows references of type %s", reference.TypeUrl)
}

type delegatedEndpoint struct {
	delegated.UnimplementedDelegatedIdentityServer
	authority *Authority
	delegate  spiffeid.ID
}

// SubscribeToX509SVIDs sends the identities of a process, and again at every change.
func (d *delegatedEndpoint) SubscribeToX509SVIDs(r *delegated.SubscribeToX509SVIDsRequest, stream grpc.ServerStreamingServer[delegated.SubscribeToX509SVIDsResponse]) error {
	if r.Pid == 0 {
		return status.Error(codes.InvalidArgument, "must provide either selectors or non-zero PID, but not both")
	}
	w, err := attestProcess(r.Pid)
	if err != nil {
		return status.Error(codes.Unavailable, "workload attestation failed")
	}
	return d.authority.follow(stream.Context(), func(m moment) error {
		if m.withdrawn[d.delegate] {
			return errNoIdentity
		}
		answer := &delegated.SubscribeToX509SVIDsResponse{}
		for _, e := range m.of(w) {
			certificate, key, err := d.authority.document(m, e.ID)
			if err != nil {
				return err
			}
			answer.X509Svids = append(answer.X509Svids, &delegated.X509SVIDWithKey{X509SvidKey: key, X509Svid: &delegated.X509SVID{
				CertChain: [][]byte{certificate}, Id: &delegated.SPIFFEID{TrustDomain: e.ID.TrustDomain().Name(), Path: e.ID.Path()},
			}})
			for _, td := range e.Federates {
				if m.federated[td] != nil {
					answer.FederatesWith = append(answer.FederatesWith, td.IDString())
				}
			}
		}
		return stream.Send(answer)
	})
}

// SubscribeToX509Bundles sends all bundles, and again at every change.
func (d *delegatedEndpoint) SubscribeToX509Bundles(_ *delegated.SubscribeToX509BundlesRequest, stream grpc.ServerStreamingServer[delegated.SubscribeToX509BundlesResponse]) error {
	return d.authority.follow(stream.Context(), func(m moment) error {
		if m.withdrawn[d.delegate] {
			return errNoIdentity
		}
		bundles := m.foreign()
		bundles[d.authority.trustDomain.IDString()] = m.root.cert.Raw
		return stream.Send(&delegated.SubscribeToX509BundlesResponse{CaCertificates: bundles})
	})
}
