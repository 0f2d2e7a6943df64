package proxy

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// session is one client connection, from accept to end.
type session struct {
	p              *Proxy
	down           *net.TCPConn
	client, server netip.AddrPort // server: where the client wanted to go
	id             string         // of the flow
	accepted       time.Time
	proveBy        time.Time // when it must have proven an identity
	standing       standing  // of its neighbourhood when it came; for the room
	ctx            context.Context
	cancel         context.CancelFunc

	mu   sync.Mutex
	who  proven       // guarded by mu
	open bool         // guarded by mu; identity proven, being carried
	up   *net.TCPConn // guarded by mu; nil until dialled
	web  *web         // guarded by mu; nil: bytes are carried, or nothing yet

	origin *origination // guarded by mu; nil: the client speaks for itself, or nothing is carried yet

	end *ending // guarded by mu; why it was cut, nil if it was not
	app string  // guarded by mu; what is spoken, where that is known

	doubt doubt // of the token that was shown before the first byte
}

// proven is what the client proved, and for which service.
type proven struct {
	service string
	caller  policy.Caller       // of an HTTP service, the first one on the connection
	chain   []*x509.Certificate // that proved it, leaf first; none: a token did
	trusted <-chan struct{}     // open as long as nothing has changed in what chain was verified with
	at      time.Time           // when that was verified
	token   string              // that proved it before the first byte; "" if none did
	expires time.Time           // of token
}

// ending says why a connection was cut.
type ending struct {
	reason flow.Reason
	detail string
}

// refusal is why a client is not let in.
type refusal struct {
	reason flow.Reason
	how    closing
	err    error
	answer *badRequest // for a client that waits for one; nil: there is nothing to say
}

// Error implements error.
func (r *refusal) Error() string { return fmt.Sprintf("%s: %v", r.reason, r.err) }

// Unwrap implements errors.
func (r *refusal) Unwrap() error { return r.err }

// closing is how a refused client is left.
type closing int

const (
	reset   closing = iota // at once, by RST
	alerted                // it was sent a TLS alert or an answer, which an RST could overtake
)

// spread takes up to a quarter off a time limit, by chance: clients that came together, and come again when they are ended, would otherwise do
// both together each time, and whoever comes just then would wait behind all of them.
func spread(limit time.Duration) time.Duration { return limit - rand.N(limit/4+1) }

func newSession(p *Proxy, c *net.TCPConn) *session {
	ctx, cancel := context.WithCancel(context.Background())
	s := &session{
		p: p, down: c, client: addrPort(c.RemoteAddr()), server: addrPort(c.LocalAddr()),
		id:       fmt.Sprintf("%s-%x", p.instance, p.flows.Add(1)),
		accepted: time.Now(), ctx: ctx, cancel: cancel,
	}
	s.proveBy = s.accepted.Add(spread(p.cfg.HandshakeTimeout))
	s.standing = p.turns.standing(s.neighbourhood())
	return s
}

// run takes the connection through its life.
func (s *session) run() {
	defer s.cancel()
	if remote, ok := s.p.cfg.Policy.Set().RemoteServiceAt(bare(s.server)); ok {
		s.originate(remote)
		return
	}
	conn, spec, err := s.prove()
	if err == nil && spec != nil {
		s.serveWeb(conn, *spec)
		return
	}
	if err == nil {
		s.settle()
		err = s.dial()
	}
	if err = s.answer(conn, err); err != nil {
		s.deny(err)
		return
	}
	s.p.cfg.Report(s.record(flow.EventOpen, flow.VerdictProxied, flow.ReasonIdentity, ""))
	r := &relay{client: conn, down: s.down, up: s.up, names: [2]string{"client", "service"}, buffers: s.p.buffers, activity: activity{began: s.accepted}}
	s.carry(r, &r.toServer, &r.toClient)
}

// dial connects to the service in the client's name. From here on the connection is live, and a
// policy that changed meanwhile has its say.
func (s *session) dial() error {
	up, err := dial(s.ctx, s.client.Addr(), s.server, s.p.cfg.DialTimeout)
	if err != nil {
		return &refusal{reason: flow.ReasonUpstreamFailed, how: reset, err: fmt.Errorf("dial service: %w", err),
			answer: &badRequest{http.StatusBadGateway, flow.ReasonUpstreamFailed, "the service did not answer"}}
	}
	s.mu.Lock()
	s.up, s.open = up, true
	s.mu.Unlock()
	s.recheck()
	if s.wasCut() != nil {
		resetClose(up) // a cut from before could not see it
		return net.ErrClosed
	}
	return nil
}

// deny records why the client was not let in, and leaves it. A cut goes before what it caused.
func (s *session) deny(err error) {
	r := &refusal{reason: flow.ReasonHandshakeFailed, how: reset, err: err}
	errors.As(err, &r)
	detail := r.err.Error()
	if end := s.wasCut(); end != nil {
		r, detail = &refusal{reason: end.reason, how: reset}, end.detail
	}
	s.p.denials.add(s.record(flow.EventDeny, flow.VerdictDenied, r.reason, detail))
	if r.how == alerted {
		s.linger()
	}
	resetClose(s.down)
}

// Bounds of the wait for a client to take in an alert.
const (
	lingerTime  = 500 * time.Millisecond
	lingerBytes = 256 << 10
)

// linger ends our half and takes in what the client has still under way: closing with unread data
// would send an RST, which overtakes the alert.
func (s *session) linger() {
	_ = s.down.SetDeadline(time.Now().Add(lingerTime))
	if s.down.CloseWrite() == nil {
		_, _ = io.CopyN(io.Discard, s.down, lingerBytes)
	}
}

// cut ends the session from outside: both halves are reset. The first reason stands.
func (s *session) cut(reason flow.Reason, detail string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.end != nil {
		return
	}
	s.end = &ending{reason, detail}
	s.cancel()
	resetClose(s.down)
	if s.up != nil {
		resetClose(s.up)
	}
}

func (s *session) wasCut() *ending {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.end
}

func (s *session) isOpen() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.open
}

// setWeb makes the connection live: from here on a policy that changed meanwhile has its say.
func (s *session) setWeb(w *web) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.web, s.open, s.app = w, true, w.application()
}

// served is how requests on the connection are judged; nil: it carries bytes, or nothing yet.
func (s *session) served() *web {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.web
}

func (s *session) identity() proven {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.who
}

func (s *session) setIdentity(who proven) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.who = who
}

// neighbourhood is whom the client's address belongs to: one of IPv6 is easily changed within its network.
func (s *session) neighbourhood() netip.Prefix {
	a := s.client.Addr().WithZone("")
	bits := 64
	if a.Is4() {
		bits = 32
	}
	p, _ := a.Prefix(bits) // there are as many
	return p
}

// settle takes a place among those who have proven an identity, which others cannot take away so easily.
func (s *session) settle() {
	caller := s.identity().caller.String()
	s.p.turns.remember(s.neighbourhood(), welcome, caller, time.Now())
	if !s.p.room.settle(s, caller) {
		s.p.turns.remember(s.neighbourhood(), refused, "", time.Now())
		s.cut(flow.ReasonLimit, "its caller has as many connections as any, and there is no room for more")
	}
}

// recheck cuts a live connection that would not be let in now.
func (s *session) recheck() {
	if !s.isOpen() {
		return // asks for itself before it opens
	}
	if w := s.served(); w != nil {
		w.recheck()
	} else if o := s.originated(); o != nil {
		if why := o.objection(s); why != nil {
			s.cut(flow.ReasonPolicyChanged, why.Error())
		}
	} else if why := s.p.objection(s); why != nil {
		s.cut(flow.ReasonPolicyChanged, why.Error())
	} else if why := s.p.tokenObjection(s); why != nil {
		s.cut(flow.ReasonSessionEnded, why.Error())
	}
}

// rejudge judges what a recheck left open: the token of the connection, or of requests on it.
func (s *session) rejudge() {
	if w := s.served(); w != nil {
		w.settle()
		return
	}
	s.recheck()
}

func (s *session) isSettled() bool {
	if w := s.served(); w != nil {
		return len(w.unsettled()) == 0
	}
	return s.doubt.isOver()
}

// expire cuts a live connection when what its client proved is too long over. A client that has a newer
// certificate shows it with its next connection: on this one it cannot. Of a workload that we speak for the agent tells the newest.
func (s *session) expire(now time.Time) {
	who := s.identity()
	if w := s.served(); w != nil {
		w.expire(now)
	}
	if s.isOpen() && who.token != "" && !now.Before(who.expires) {
		s.cut(flow.ReasonSessionEnded, "its token was valid until "+who.expires.UTC().Format(time.RFC3339))
	}
	if !s.isOpen() || len(who.chain) == 0 {
		return
	}
	notAfter := who.chain[0].NotAfter
	if now.Before(notAfter.Add(s.p.cfg.ExpiryGrace)) {
		return
	}
	s.cut(flow.ReasonIdentityExpired, fmt.Sprintf("its certificate was valid until %s", notAfter.UTC().Format(time.RFC3339)))
}

// carry copies both ways until both are done, or one fails, or the session is cut. The counters are those of r.
func (s *session) carry(r *relay, toServer, toClient *uint64) {
	stop := r.watch(s.p.cfg.IdleTimeout, func() { s.cut(flow.ReasonIdleTimeout, "nothing moved for "+s.p.cfg.IdleTimeout.String()) })
	err := r.run()
	stop()
	if r.isSSH.Load() {
		s.setApplication("ssh")
	}
	reason, detail := flow.ReasonClosed, ""
	if err != nil {
		detail = err.Error()
	}
	if end := s.wasCut(); end != nil {
		reason, detail = end.reason, end.detail
	}
	rec := s.record(flow.EventClose, flow.VerdictProxied, reason, detail)
	rec.BytesToServer, rec.BytesToClient = *toServer, *toClient
	s.p.cfg.Report(rec)
}

func (s *session) setApplication(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.app = name
}

func (s *session) application() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.app
}

func (s *session) record(event flow.Event, verdict flow.Verdict, reason flow.Reason, detail string) flow.Record {
	who := s.identity()
	return flow.Record{
		Event: event, Time: time.Now(), Boot: bootTime(), CPU: -1, FlowID: s.id,
		Verdict: verdict, Reason: reason, Protocol: "tcp",
		Client: bare(s.client), Server: bare(s.server), Service: who.service,
		Count: 1, Detail: oneLine(detail), Application: s.application(),
		Identity: who.caller.String(), Proof: who.caller.Proof,
	}
}
