package e2e_test

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffegrpc/grpccredentials"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/proof"
)

// Where the node looks for its collector, and where that is when somebody stands between.
var (
	relayAddr  = netip.MustParseAddrPort("127.0.0.1:9443")
	behindAddr = netip.MustParseAddrPort("127.0.0.1:9444")
)

// manner is how the relay treats what passes.
type manner struct {
	away    bool          // nobody is there
	delay   time.Duration // of each frame, in both directions
	twice   bool          // each batch is passed on twice; the second answer is kept back
	forge   bool          // after each batch, acknowledgements that are not the collector's come as well
	swallow bool          // batches are acknowledged, and not passed on
}

// relay stands between the node and its collector. It has the identity of either, as the authority that made those is in its hands: what
// it says is believed, and what it does is what a bad network, a bad collector and an attacker can do.
type relay struct {
	api.UnimplementedAuditIngestServer
	world            *world
	agent, collector proven

	mu        sync.Mutex
	manner    manner               // guarded by mu
	end       chan struct{}        // guarded by mu; closed, and replaced, to break what is connected
	swallowed map[api.Class]uint64 // guarded by mu; numbers that were acknowledged and not passed on
	batches   int                  // guarded by mu; that came, ever
}

// proven is an identity with its proof.
type proven struct {
	*x509svid.SVID
	*x509bundle.Bundle
}

func (w *world) prove(t *testing.T, path string) proven {
	t.Helper()
	svid, err := w.authority.Issue(spiffeid.RequireFromPath(domain, path))
	must(t, err)
	return proven{svid, w.authority.Bundle()}
}

// relay begins to stand where the node looks for its collector.
func (w *world) relay(t *testing.T) *relay {
	t.Helper()
	r := &relay{world: w, agent: w.prove(t, "/sallyport/agent/"+nodeName), collector: w.prove(t, "/sallyport/collector"),
		end: make(chan struct{}), swallowed: map[api.Class]uint64{}}
	l, err := w.Node.Listen(relayAddr)
	must(t, err)
	s := grpc.NewServer(grpc.Creds(grpccredentials.MTLSServerCredentials(r.collector, r.collector, tlsconfig.AuthorizeID(r.agent.ID))))
	api.RegisterAuditIngestServer(s, r)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() { s.Stop(); must(t, <-served) })
	return r
}

// be changes the manner. What is connected is broken: the new one is for whole streams.
func (r *relay) be(m manner) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.manner = m
	close(r.end)
	r.end = make(chan struct{})
}

func (r *relay) now() (manner, <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.manner, r.end
}

// took gives the numbers that were swallowed so far, and how many batches came.
func (r *relay) took() (swallowed uint64, batches int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, n := range r.swallowed {
		swallowed += n
	}
	return swallowed, r.batches
}

// Stream has a stream of the collector for that of the node.
func (r *relay) Stream(node api.AuditIngest_StreamServer) error {
	m, end := r.now()
	if m.away {
		return grpcstatus.Error(codes.Unavailable, "nobody is here")
	}
	conn, err := grpc.NewClient("passthrough:///"+behindAddr.String(),
		grpc.WithTransportCredentials(grpccredentials.MTLSClientCredentials(r.agent, r.agent, tlsconfig.AuthorizeID(r.collector.ID))),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return r.world.Node.Dial(ctx, netip.AddrPort{}, behindAddr)
		}))
	if err != nil {
		return err
	}
	defer conn.Close()
	both, ctx := errgroup.WithContext(node.Context())
	collector, err := api.NewAuditIngestClient(conn).Stream(ctx)
	if err != nil {
		return err
	}
	p := &passing{relay: r, manner: m, node: node, collector: collector}
	both.Go(func() error { return p.up(ctx) })
	both.Go(func() error { return p.down(ctx) })
	both.Go(func() error {
		select {
		case <-end:
			return grpcstatus.Error(codes.Unavailable, "the line broke")
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	<-ctx.Done() // the node's side is read until the handler is over
	return context.Cause(ctx)
}

// passing is one stream of the node, and the collector's for it.
type passing struct {
	*relay
	manner    manner
	node      api.AuditIngest_StreamServer
	collector api.AuditIngest_StreamClient

	key     note.Verifier // of the node's seals
	sending sync.Mutex    // to the node
}

func (p *passing) up(ctx context.Context) error {
	for {
		f, err := p.node.Recv()
		if err != nil {
			return err
		}
		if err := p.wait(ctx); err != nil {
			return err
		}
		if h := f.GetHello(); h != nil {
			if p.key, err = note.NewVerifier(h.NodeKey); err != nil {
				return err
			}
		}
		if b := f.GetBatch(); b != nil {
			err = p.batch(b, f)
		} else {
			err = p.collector.Send(f)
		}
		if err != nil {
			return err
		}
	}
}

// batch passes one on, in its manner.
func (p *passing) batch(b *api.Batch, f *api.AgentFrame) error {
	seal, err := proof.OpenSeal(b.Seal, p.key)
	if err != nil {
		return err
	}
	p.mu.Lock()
	p.batches++
	if p.manner.swallow {
		p.swallowed[b.Class] += seal.Last - seal.First + 1
	}
	p.mu.Unlock()
	ack := &api.Ack{Class: b.Class, Epoch: b.Epoch, Seq: seal.Last, Number: seal.Number}
	if p.manner.swallow {
		return p.answer(ack)
	}
	if p.manner.forge {
		return p.forgeries(ack)
	}
	if err := p.collector.Send(f); err != nil {
		return err
	}
	if p.manner.twice {
		return p.collector.Send(f)
	}
	return nil
}

// forgeries are acknowledgements of what was never sent. The batch itself goes nowhere.
func (p *passing) forgeries(a *api.Ack) error {
	for _, forged := range []*api.Ack{
		{Class: a.Class, Epoch: a.Epoch, Seq: a.Seq + 1000, Number: a.Number},
		{Class: a.Class, Epoch: a.Epoch, Seq: a.Seq, Number: a.Number + 1},
	} {
		if err := p.answer(forged); err != nil {
			return err
		}
	}
	return nil
}

func (p *passing) answer(a *api.Ack) error {
	p.sending.Lock()
	defer p.sending.Unlock()
	return p.node.Send(&api.CollectorFrame{Frame: &api.CollectorFrame_Ack{Ack: a}})
}

func answerOf(a *api.Ack) uint64 { return a.GetNumber()<<2 | uint64(a.GetClass()) }

func (p *passing) down(ctx context.Context) error {
	seen := map[uint64]bool{}
	for {
		f, err := p.collector.Recv()
		if err != nil {
			return err
		}
		if err := p.wait(ctx); err != nil {
			return err
		}
		if a := f.GetAck(); a != nil && p.manner.twice {
			if seen[answerOf(a)] {
				continue
			}
			seen[answerOf(a)] = true
		}
		p.sending.Lock()
		err = p.node.Send(f)
		p.sending.Unlock()
		if err != nil {
			return err
		}
	}
}

// wait is the time that a frame takes.
func (p *passing) wait(ctx context.Context) error {
	if p.manner.delay == 0 {
		return nil
	}
	select {
	case <-time.After(p.manner.delay):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
