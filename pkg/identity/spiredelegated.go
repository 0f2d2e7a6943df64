package identity

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/sallyport-dev/sallyport/pkg/identity/delegated"
)

// SPIREDelegated is a client of SPIRE's Delegated Identity API, by numbers of processes alone: SPIRE attests
// the process. Who may use the socket is SPIRE's authorized_delegates.
type SPIREDelegated struct {
	cfg  BrokerConfig
	conn *grpc.ClientConn
	api  delegated.DelegatedIdentityClient
}

// NewSPIREDelegated makes a client of SPIRE's admin socket. It connects when it is needed; Close ends all watches.
func NewSPIREDelegated(cfg BrokerConfig) (*SPIREDelegated, error) {
	if err := cfg.complete(); err != nil {
		return nil, fmt.Errorf("make client of SPIRE's Delegated Identity API: %w", err)
	}
	conn, err := grpc.NewClient(cfg.Address, // a Unix socket, whose peers SPIRE attests
		grpc.WithTransportCredentials(insecure.NewCredentials()), retry{cfg.MinRetry, cfg.MaxRetry}.connect())
	if err != nil {
		return nil, fmt.Errorf("open SPIRE's Delegated Identity API %s: %w", cfg.Address, err)
	}
	return &SPIREDelegated{cfg, conn, delegated.NewDelegatedIdentityClient(conn)}, nil
}

// Close ends the connection, after which nothing new is learnt.
func (d *SPIREDelegated) Close() error { return d.conn.Close() }

// Watch implements Broker. Pods cannot be asked for: SPIRE would have to believe us which process is whose.
func (d *SPIREDelegated) Watch(ctx context.Context, w Workload, tell func(Attested)) error {
	if w.PodUID != "" {
		return fmt.Errorf("ask for %s: SPIRE's Delegated Identity API knows processes alone", w)
	}
	return watchWorkload(ctx, d.cfg, d.subscribe, w, tell)
}

// subscribe follows identities and bundles, which come apart.
func (d *SPIREDelegated) subscribe(ctx context.Context, w Workload, take func(workloadSet)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	svids, err := d.api.SubscribeToX509SVIDs(ctx, &delegated.SubscribeToX509SVIDsRequest{Pid: w.PID})
	if err != nil {
		return err
	}
	bundles, err := d.api.SubscribeToX509Bundles(ctx, &delegated.SubscribeToX509BundlesRequest{})
	if err != nil {
		return err
	}
	fromSVIDs, fromBundles := messages(ctx, svids.Recv), messages(ctx, bundles.Recv)
	var (
		who   *delegated.SubscribeToX509SVIDsResponse
		trust *delegated.SubscribeToX509BundlesResponse
	)
	for {
		select {
		case m := <-fromSVIDs:
			who, err = m.message, m.err
		case m := <-fromBundles:
			trust, err = m.message, m.err
		case <-ctx.Done():
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		if who == nil || trust == nil {
			continue
		}
		set, err := readDelegated(who, trust)
		if err != nil {
			return err
		}
		take(set)
	}
}

type message[M any] struct {
	message M
	err     error
}

// messages makes a channel of a stream, until its first error or the end of ctx.
func messages[M any](ctx context.Context, receive func() (M, error)) <-chan message[M] {
	c := make(chan message[M])
	go func() {
		for {
			m, err := receive()
			select {
			case c <- message[M]{m, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	return c
}

func readDelegated(who *delegated.SubscribeToX509SVIDsResponse, trust *delegated.SubscribeToX509BundlesResponse) (workloadSet, error) {
	set := workloadSet{bundles: x509bundle.NewSet()}
	var errs []error
	domains := slices.Clone(who.FederatesWith)
	for _, s := range who.X509Svids {
		id := s.GetX509Svid().GetId()
		svid, err := readSVID("spiffe://"+id.GetTrustDomain()+id.GetPath(), slices.Concat(s.GetX509Svid().GetCertChain()...), s.X509SvidKey)
		set.svids, errs = append(set.svids, svid), append(errs, err)
		domains = append(domains, "spiffe://"+id.GetTrustDomain())
	}
	// The bundles are all that SPIRE's agent has, of which the workload trusts those of its own entries.
	for _, domain := range domains {
		if raw, ok := trust.CaCertificates[domain]; ok {
			errs = append(errs, addBundle(set.bundles, domain, raw))
		}
	}
	return set, errors.Join(errs...)
}
