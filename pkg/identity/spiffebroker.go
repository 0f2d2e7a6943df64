package identity

import (
	"context"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffegrpc/grpccredentials"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// SPIFFEBroker is a client of the SPIFFE Broker API. The broker attests what it is asked about; who may ask it
// for what is the broker's own configuration.
type SPIFFEBroker struct {
	cfg  BrokerConfig
	conn *grpc.ClientConn
	api  broker.APIClient
}

// NewSPIFFEBroker makes a client that proves itself as own does, and takes none for the broker but an agent of
// SPIRE in the trust domain given. It connects when it is needed; Close ends all watches.
func NewSPIFFEBroker(cfg BrokerConfig, own *Source, domain spiffeid.TrustDomain) (*SPIFFEBroker, error) {
	if err := cfg.complete(); err != nil {
		return nil, fmt.Errorf("make client of the SPIFFE Broker API: %w", err)
	}
	agents, err := spiffeid.FromPath(domain, "/spire/agent")
	if err != nil {
		return nil, fmt.Errorf("make client of the SPIFFE Broker API: %w", err)
	}
	credentials := grpccredentials.MTLSClientCredentials(own, own, tlsconfig.AuthorizeIDPrefix(agents))
	conn, err := grpc.NewClient(cfg.Address, grpc.WithTransportCredentials(credentials), retry{cfg.MinRetry, cfg.MaxRetry}.connect())
	if err != nil {
		return nil, fmt.Errorf("open SPIFFE Broker API %s: %w", cfg.Address, err)
	}
	return &SPIFFEBroker{cfg, conn, broker.NewAPIClient(conn)}, nil
}

// Close ends the connection, after which nothing new is learnt.
func (b *SPIFFEBroker) Close() error { return b.conn.Close() }

// Watch implements Broker.
func (b *SPIFFEBroker) Watch(ctx context.Context, w Workload, tell func(Attested)) error {
	return watchWorkload(ctx, b.cfg, b.subscribe, w, tell)
}

func (b *SPIFFEBroker) subscribe(ctx context.Context, w Workload, take func(workloadSet)) error {
	reference, err := anypb.New(reference(w))
	if err != nil {
		return err
	}
	ctx = metadata.AppendToOutgoingContext(ctx, "broker.spiffe.io", "true")
	stream, err := b.api.SubscribeToX509SVID(ctx, &broker.SubscribeToX509SVIDRequest{
		Reference: &broker.WorkloadReference{Reference: reference},
	})
	if err != nil {
		return err
	}
	for {
		answer, err := stream.Recv()
		if err != nil {
			return err
		}
		set, err := readBroker(answer)
		if err != nil {
			return err
		}
		take(set)
	}
}

func reference(w Workload) proto.Message {
	if w.PodUID != "" {
		return &broker.KubernetesObjectReference{
			Type: &broker.KubernetesObjectType{Plural: "pods", Group: "core"}, Uid: w.PodUID,
		}
	}
	return &broker.WorkloadPIDReference{Pid: w.PID}
}

func readBroker(answer *broker.SubscribeToX509SVIDResponse) (workloadSet, error) {
	set := workloadSet{bundles: x509bundle.NewSet()}
	var errs []error
	for _, s := range answer.Svids {
		svid, err := readSVID(s.SpiffeId, s.X509Svid, s.X509SvidKey)
		if err == nil {
			err = addBundle(set.bundles, svid.ID.TrustDomain().Name(), s.Bundle)
		}
		set.svids, errs = append(set.svids, svid), append(errs, err)
	}
	for domain, raw := range answer.FederatedBundles {
		errs = append(errs, addBundle(set.bundles, domain, raw))
	}
	return set, errors.Join(errs...)
}
