// Package proxy is the identity proxy: it proves who a client is, asks policy, and carries the
// connection to the protected service in the client's name.
package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/login"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/token"
)

// Identity is the proxy's own identity and what it verifies clients with.
type Identity interface {
	x509svid.Source
	x509bundle.Source
	// Changed gives a channel that is closed at the next change of either.
	Changed() <-chan struct{}
}

// Config of a proxy. Every field but ExpiryGrace, DrainTimeout, Besieged, Tokens, Login, Certificates, Outside, Listeners, Moves and
// Logger must be set.
type Config struct {
	// ListenPort is the port of the transparent listeners, on every address of both families.
	ListenPort uint16
	// MaxConnections it serves at a time. The next one takes the place of one that has not proven an
	// identity; if all have, it is reset. One in 8 is for those alone who have not proven an identity yet; who proves one when
	// the others are taken gets the place of a caller that has more connections, or is reset.
	MaxConnections int
	// HandshakeTimeout is how long a client has at most, from its connect, to prove an identity. Chance takes up to a quarter off.
	HandshakeTimeout time.Duration
	// IdleTimeout ends a connection on which nothing moved in either direction.
	IdleTimeout time.Duration
	// ExpiryGrace is how long a connection goes on after the certificate that it was let in by has expired.
	ExpiryGrace time.Duration
	// DialTimeout is how long a service has to accept, all attempts together.
	DialTimeout time.Duration
	// DrainTimeout is how long live connections have after Run's context ended; 0: they are reset at once.
	DrainTimeout time.Duration
	Identity     Identity
	Policy       *PolicyFile
	// Report takes flow records. It must not block, and is called from many goroutines.
	Report func(flow.Record)
	// Besieged is told when many clients at a time have not proven an identity, and when that is over. nil: nobody is.
	Besieged func(bool)
	// Tokens verifies bearer tokens. nil: they prove nobody.
	Tokens *token.Verifier
	// Login logs browsers in, to services that have it. nil: none has.
	Login *login.Handler
	// Certificates are for clients without SPIFFE. nil: there are none.
	Certificates *Certificates
	// Outside is the way to the agent, which tells the workloads of this node. nil: none can ask for a remote service.
	Outside *Outside
	// Listeners are those of a proxy that this one takes the place of. nil: New opens them.
	Listeners []*net.TCPListener
	// Moves is called every few seconds while every listener is looked after, and not while one is not.
	Moves  func()
	Logger *slog.Logger
}

func (c Config) validate() error {
	var errs []error
	positive := func(name string, v int64) {
		if v <= 0 {
			errs = append(errs, fmt.Errorf("%s is %d, must be above 0", name, v))
		}
	}
	positive("ListenPort", int64(c.ListenPort))
	positive("MaxConnections", int64(c.MaxConnections))
	positive("HandshakeTimeout", int64(c.HandshakeTimeout))
	positive("IdleTimeout", int64(c.IdleTimeout))
	positive("DialTimeout", int64(c.DialTimeout))
	if c.Identity == nil || c.Policy == nil || c.Report == nil {
		errs = append(errs, errors.New("Identity, Policy and Report must be set"))
	}
	return errors.Join(errs...)
}

// Proxy serves the connections that the datapath steers into its network namespace.
type Proxy struct {
	cfg       Config
	instance  string // prefix of flow ids
	listeners []*net.TCPListener
	denials   *denials
	buffers   *buffers
	pace      *pace
	now       func() time.Time // by which policy is asked
	flows     atomic.Uint64
	upstreams atomic.Int64   // connections to services that speak HTTP
	room      *room          // of sessions, from accept to end
	turns     *turns         // of handshakes
	looked    []atomic.Int64 // of each listener: when it was last looked after, in nanoseconds since started
	started   time.Time
	left      chan struct{} // closed: another proxy has the listeners
	leave     sync.Once
	siege     siege // used by expire alone
}

// New opens the listeners in the network namespace of the calling thread. It needs CAP_NET_RAW
// there. Run closes what New opened.
func New(cfg Config) (*Proxy, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("configure proxy: %w", err)
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Listeners != nil {
		return newProxy(cfg, cfg.Listeners), nil
	}
	listeners, err := listenBoth(cfg.ListenPort)
	if err != nil {
		return nil, err
	}
	return newProxy(cfg, listeners), nil
}

func newProxy(cfg Config, listeners []*net.TCPListener) *Proxy {
	return &Proxy{
		cfg: cfg, instance: ulid.Make().String(), listeners: listeners,
		denials: newDenials(cfg.Report), buffers: newBuffers(), pace: newPace(), now: time.Now,
		room: newRoom(cfg.MaxConnections), turns: newTurns(runtime.GOMAXPROCS(0)), siege: siege{tell: cfg.Besieged},
		looked: make([]atomic.Int64, len(listeners)), started: time.Now(), left: make(chan struct{}),
	}
}

// Run serves until ctx ends, then drains: no new connections, live ones go on for DrainTimeout and
// are then reset. After Leave live ones go on for as long as they would have, until ctx ends. It returns when the last one is
// over, with nil unless a listener broke.
func (p *Proxy) Run(ctx context.Context) error {
	accepting, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	draining, stopHelpers := context.WithCancel(context.WithoutCancel(ctx))
	defer stopHelpers()
	var acceptors, helpers sync.WaitGroup
	helpers.Go(func() { p.denials.run(draining) })
	helpers.Go(func() { p.recheck(draining) })
	helpers.Go(func() { p.expire(draining) })
	helpers.Go(func() { p.attestAgain(draining) })
	for i, l := range p.listeners {
		for range acceptorsEach {
			acceptors.Go(func() { stop(p.accept(accepting, l, &p.looked[i])) })
		}
	}
	helpers.Go(func() { p.watch(accepting) })
	select {
	case <-accepting.Done():
	case <-p.left:
	}
	broke := context.Cause(accepting)
	stop(nil)
	for _, l := range p.listeners {
		l.Close()
	}
	acceptors.Wait()
	p.drain(ctx)
	stopHelpers()
	helpers.Wait()
	if ctx.Err() == nil {
		return broke
	}
	return nil
}

// acceptorsEach is how many goroutines accept at each listener. Under thousands of connections a second those that run before one have it wait
// longer than the kernel's queue takes to fill, and a good client waits in that queue.
const acceptorsEach = 4

// retryAccept is how long to wait when the process is out of descriptors or memory.
const retryAccept = 50 * time.Millisecond

func (p *Proxy) accept(ctx context.Context, l *net.TCPListener, looked *atomic.Int64) error {
	for {
		looked.Store(int64(time.Since(p.started)))
		err := l.SetDeadline(time.Now().Add(lookAgain))
		var c *net.TCPConn
		if err == nil {
			c, err = l.AcceptTCP()
		}
		switch {
		case err == nil:
			_ = c.SetKeepAliveConfig(keepAlive()) // a listener that was handed over does not know of it
			p.begin(newSession(p, c))
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, os.ErrDeadlineExceeded): // nobody came
		case errors.Is(err, net.ErrClosed), errors.Is(err, unix.EINVAL):
			return fmt.Errorf("accept on %s: %w", l.Addr(), err)
		default:
			p.cfg.Logger.Error("accept", "listener", l.Addr(), "error", err)
			select {
			case <-time.After(retryAccept):
			case <-ctx.Done():
			}
		}
	}
}

// lookAgain is how often a listener is looked after to which nobody comes; one that is not for three times as long stands.
const lookAgain = 2 * time.Second

// watch tells that every listener is looked after, for as long as that is so.
func (p *Proxy) watch(ctx context.Context) {
	if p.cfg.Moves == nil {
		return
	}
	tick := time.NewTicker(lookAgain)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if p.moves(time.Since(p.started)) {
				p.cfg.Moves()
			}
		case <-ctx.Done():
			return
		}
	}
}

func (p *Proxy) moves(now time.Duration) bool {
	for i := range p.looked {
		if now-time.Duration(p.looked[i].Load()) > 3*lookAgain {
			return false
		}
	}
	return true
}

// begin runs a session, or resets its connection when there is no room.
func (p *Proxy) begin(s *session) {
	if reason := p.room.enter(s); reason != flow.ReasonNone {
		s.deny(&refusal{reason: reason, how: reset, err: errors.New("no room for another connection")})
		return
	}
	go func() {
		defer p.room.inside.Done()
		defer p.room.leave(s)
		s.run()
	}()
}

// drain waits for the sessions, and cuts those that have not proven an identity at once and all
// that are left after DrainTimeout. Where the listeners were left to another proxy, ctx may go on: until it ends, nobody is cut.
func (p *Proxy) drain(ctx context.Context) {
	p.room.close()
	if p.hasLeft() {
		p.outlive(ctx)
	}
	for _, s := range p.room.snapshot() {
		if !s.isOpen() {
			s.cut(flow.ReasonDrained, "proxy stops")
		} else if w := s.served(); w != nil {
			p.room.inside.Go(w.drain)
		}
	}
	timer := time.AfterFunc(p.cfg.DrainTimeout, func() {
		for _, s := range p.room.snapshot() {
			s.cut(flow.ReasonDrained, "proxy stopped, connection was still in use")
		}
	})
	defer timer.Stop()
	p.room.inside.Wait()
}

// Leave has Run take no more connections, because another proxy has the listeners of Files. It may be called more than once.
func (p *Proxy) Leave() { p.leave.Do(func() { close(p.left) }) }

func (p *Proxy) hasLeft() bool {
	select {
	case <-p.left:
		return true
	default:
		return false
	}
}

// outlive waits for the last session, or for the end of ctx. Connections of HTTP end with the requests that are under way.
func (p *Proxy) outlive(ctx context.Context) {
	for _, s := range p.room.snapshot() {
		if w := s.served(); w != nil && s.isOpen() {
			p.room.inside.Go(w.drain)
		}
	}
	over := make(chan struct{})
	go func() {
		p.room.inside.Wait()
		close(over)
	}()
	select {
	case <-over:
	case <-ctx.Done():
	}
}

// Files are the listeners, for another process. The caller closes them; a connection that nobody has accepted yet waits for whoever
// comes next.
func (p *Proxy) Files() (files []*os.File, err error) {
	for _, l := range p.listeners {
		f, err := l.File()
		if err != nil {
			for _, f := range files {
				f.Close()
			}
			return nil, fmt.Errorf("hand over listener %s: %w", l.Addr(), err)
		}
		files = append(files, f)
	}
	return files, nil
}

// recheck asks again, of every live connection, whether it would still be let in, whenever policy,
// bundles or identities change, and when policy may answer otherwise by the time alone.
func (p *Proxy) recheck(ctx context.Context) {
	tick := time.NewTicker(expiryLook)
	defer tick.Stop()
	var edge edge
	for ctx.Err() == nil {
		changed, identity := p.cfg.Policy.Changed(), p.cfg.Identity.Changed()
		p.ask(p.room.snapshot(), (*session).recheck)
		for again := false; !again; {
			select {
			case <-changed:
				again = true
			case <-identity:
				again = true
			case <-tick.C:
				if again = edge.passed(p.cfg.Policy.Set(), p.now()); !again {
					p.ask(slices.DeleteFunc(p.room.snapshot(), (*session).isSettled), (*session).rejudge)
				}
			case <-ctx.Done():
				return
			}
		}
	}
}

// Bounds of the connections, and of the requests of each, that are judged again at a time: any of them may have to wait for the keys
// of its token, and must not hold up the others.
const (
	rechecksAtOnce = 64
	rechecksEach   = 16
)

// ask has connections judged.
func (p *Proxy) ask(sessions []*session, judge func(*session)) {
	var all errgroup.Group
	all.SetLimit(rechecksAtOnce)
	for _, s := range sessions {
		all.Go(func() error {
			judge(s)
			return nil
		})
	}
	_ = all.Wait()
}

// expiryLook is how often live connections are held against the wall clock: a timer for each would sleep
// through a suspended machine and through a clock that was set.
const expiryLook = time.Second

// expire cuts live connections whose proof of identity is over, and looks who is there.
func (p *Proxy) expire(ctx context.Context) {
	tick := time.NewTicker(expiryLook)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			now := p.now()
			for _, s := range p.room.snapshot() {
				s.expire(now)
			}
			p.siege.look(p.room.unproven(), time.Now())
		case <-ctx.Done():
			return
		}
	}
}

// edge is when a policy may answer otherwise by the time alone.
type edge struct {
	set  *policy.Set
	next time.Time // zero: never
}

// passed also says so of a policy that it has not seen yet: an edge of it may have passed since it came.
func (e *edge) passed(set *policy.Set, now time.Time) bool {
	if set == e.set && (e.next.IsZero() || now.Before(e.next)) {
		return false
	}
	e.set, e.next = set, set.NextChange(now)
	return true
}
