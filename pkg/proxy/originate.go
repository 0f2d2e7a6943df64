package proxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// origination is a session in which we speak to a remote service as the workload that asks for it.
type origination struct {
	service policy.RemoteService
	opened  time.Time
	peer    []*x509.Certificate // of who answered, leaf first; none: it is carried in the clear
}

// originate takes a connection to a remote service through its life. The client says nothing to us: it speaks to the service.
func (s *session) originate(service policy.RemoteService) {
	s.setIdentity(proven{service: service.Name})
	far, err := s.speakFor(service)
	if err != nil {
		s.deny(err)
		return
	}
	reason, detail := flow.ReasonOriginated, ""
	if o := s.originated(); len(o.peer) > 0 {
		detail = "answered by " + nameOf(o.peer)
	} else {
		reason, detail = flow.ReasonInClear, "who answered speaks no TLS"
	}
	s.p.cfg.Report(s.record(flow.EventOpen, flow.VerdictProxied, reason, detail))
	r := &relay{client: far, down: s.up, up: s.down, names: [2]string{"service", "client"}, buffers: s.p.buffers, activity: activity{began: s.accepted}}
	s.carry(r, &r.toClient, &r.toServer)
}

// speakFor connects to the service as the client's workload, and gives the way to it.
func (s *session) speakFor(service policy.RemoteService) (secured, error) {
	ctx, cancel := context.WithDeadline(s.ctx, s.accepted.Add(s.p.cfg.HandshakeTimeout))
	defer cancel()
	svid, err := s.attest(ctx, service)
	if err != nil {
		return nil, err
	}
	s.settle()
	o := &origination{service: service}
	up, err := s.dialUp()
	if err != nil {
		return nil, err
	}
	far, err := s.greet(up, svid, o)
	if _, plain := errors.AsType[*noTLS](err); plain && service.Spec.Without == policy.WithoutPass {
		resetClose(up)
		if up, err = s.dialUp(); err != nil {
			return nil, err
		}
		far = up
	}
	if err != nil {
		resetClose(up)
		return nil, err
	}
	return far, s.begins(up, o)
}

// attest finds out whose the client's end is, and whether policy lets that workload ask.
func (s *session) attest(ctx context.Context, service policy.RemoteService) (*x509svid.SVID, error) {
	if s.p.cfg.Outside == nil {
		return nil, &refusal{reason: flow.ReasonUnattested, err: errors.New("nobody tells whose connections are")}
	}
	w, err := s.p.cfg.Outside.workload(ctx, s.client, s.server, spiffeid.ID{})
	switch {
	case err != nil:
		return nil, &refusal{reason: flow.ReasonUnattested, err: err}
	case w.id.IsZero():
		return nil, &refusal{reason: flow.ReasonUnattested, err: errors.New(w.why)}
	}
	who := proven{service: service.Name, caller: policy.Caller{ID: w.id, Proof: policy.ProofLocal, Address: s.client.Addr()}}
	if w.svid != nil {
		who.chain = w.svid.Certificates
	}
	s.setIdentity(who)
	if d := s.p.cfg.Policy.Set().AuthoriseCaller(service.Name, who.caller, s.p.now()); !d.Allowed {
		return nil, &refusal{reason: flow.ReasonNotAuthorised, err: fmt.Errorf("%w: %s", errNotAuthorised, strings.Join(d.Near, "; "))}
	}
	if w.svid == nil {
		return nil, &refusal{reason: flow.ReasonUnattested, err: errors.New("the agent gives no certificate of it for this server")}
	}
	return w.svid, nil
}

// dialUp connects in the client's name. Who cuts the session finds the connection from then on.
func (s *session) dialUp() (*net.TCPConn, error) {
	up, err := dial(s.ctx, s.client.Addr(), s.server, s.p.cfg.DialTimeout)
	if err != nil {
		return nil, &refusal{reason: flow.ReasonUpstreamFailed, err: fmt.Errorf("dial remote service: %w", err)}
	}
	s.mu.Lock()
	s.up = up
	s.mu.Unlock()
	if s.wasCut() != nil {
		resetClose(up)
		return nil, net.ErrClosed
	}
	return up, nil
}

// begins makes the connection live: a policy that changed meanwhile has its say.
func (s *session) begins(up *net.TCPConn, o *origination) error {
	o.opened = s.p.now()
	s.mu.Lock()
	s.origin, s.open = o, true
	s.mu.Unlock()
	s.recheck()
	if s.wasCut() != nil {
		resetClose(up)
		return net.ErrClosed
	}
	return nil
}

func (s *session) originated() *origination {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.origin
}

// noTLS says that who answered does not speak TLS.
type noTLS struct{ err error }

// Error implements error.
func (e *noTLS) Error() string { return e.err.Error() }

// Unwrap implements errors.
func (e *noTLS) Unwrap() error { return e.err }

var (
	errPeer = errors.New("who answered is not who has to")
	errLoop = errors.New("this node's own proxy has answered")
)

// greet has the handshake done, within the same time that clients have for theirs.
func (s *session) greet(up *net.TCPConn, svid *x509svid.SVID, o *origination) (secured, error) {
	if err := up.SetDeadline(time.Now().Add(s.p.cfg.HandshakeTimeout)); err != nil {
		return nil, &refusal{reason: flow.ReasonUpstreamFailed, err: err}
	}
	answer := &heard{peeked: &peeked{TCPConn: up}}
	conn := tls.Client(answer, s.speakingAs(svid, o))
	if err := conn.HandshakeContext(s.ctx); err != nil {
		return nil, greetingRefusal(answer, err)
	}
	if err := up.SetDeadline(time.Time{}); err != nil {
		return nil, &refusal{reason: flow.ReasonUpstreamFailed, err: err}
	}
	return &client{Conn: conn, raw: answer.peeked}, nil
}

// speakingAs is of this connection alone, and keeps no session: each one proves both ends anew.
func (s *session) speakingAs(svid *x509svid.SVID, o *origination) *tls.Config {
	c := tlsconfig.MTLSClientConfig(svid, s.p.cfg.Identity, func(id spiffeid.ID, chains [][]*x509.Certificate) error {
		switch own, err := s.p.cfg.Identity.GetX509SVID(); {
		case err == nil && own.ID == id:
			return errLoop
		case !o.service.Answers(id.String()):
			return fmt.Errorf("it is %s, and not one of %s", id, strings.Join(o.service.Spec.Identities, ", "))
		}
		o.peer = chains[0]
		return nil
	})
	verify := c.VerifyPeerCertificate
	c.VerifyPeerCertificate = func(raw [][]byte, chains [][]*x509.Certificate) error {
		if err := verify(raw, chains); err != nil {
			return fmt.Errorf("%w: %w", errPeer, err)
		}
		return nil
	}
	c.MinVersion = tls.VersionTLS13
	return c
}

func greetingRefusal(answer *heard, err error) error {
	r := &refusal{reason: flow.ReasonHandshakeFailed, err: err}
	switch {
	case errors.Is(err, errLoop):
		r.reason = flow.ReasonLoop
	case errors.Is(err, errPeer):
		r.reason = flow.ReasonPeerRefused
	case errors.Is(err, os.ErrDeadlineExceeded):
		r.reason, r.err = flow.ReasonHandshakeTimeout, errors.New("who answered did not finish a TLS handshake")
	case answer.isPlain(err):
		r.reason, r.err = flow.ReasonPeerRefused, &noTLS{fmt.Errorf("who answered speaks no TLS: %w", err)}
	}
	return r
}

// heard keeps the first bytes of an answer.
type heard struct {
	*peeked
	first []byte
}

// Read implements net.Conn.
func (h *heard) Read(b []byte) (int, error) {
	n, err := h.peeked.Read(b)
	if left := 2 - len(h.first); left > 0 {
		h.first = append(h.first, b[:min(n, left)]...)
	}
	return n, err
}

// isPlain tells whether an answer was none of TLS: its first bytes begin no record (RFC 8446, 5.1), or there were none and the other
// side has ended the connection. A handshake that failed in any other way says nothing of the kind.
func (h *heard) isPlain(err error) bool {
	switch len(h.first) {
	case 0:
		return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE)
	case 1:
		return !isRecord(h.first[0])
	}
	return !isRecord(h.first[0]) || h.first[1] != 3
}

// isRecord says whether a record can begin with that type: change_cipher_spec, alert, handshake, application_data, heartbeat.
func isRecord(kind byte) bool { return kind >= 20 && kind <= 24 }

func nameOf(chain []*x509.Certificate) string {
	id, err := x509svid.IDFromCert(chain[0])
	if err != nil {
		return "?"
	}
	return id.String()
}

// objection tells why a workload that was let out would not be now, or gives nil.
func (o *origination) objection(s *session) error {
	set, who := s.p.cfg.Policy.Set(), s.identity()
	now, ok := set.RemoteServiceAt(bare(s.server))
	if !ok || now.Name != who.service {
		return fmt.Errorf("%s is not remote service %s any more", bare(s.server), who.service)
	}
	if d := set.AuthoriseCaller(who.service, who.caller, s.p.now()); !d.Allowed {
		return fmt.Errorf("%w any more: %s", errNotAuthorised, strings.Join(d.Near, "; "))
	}
	if len(o.peer) == 0 {
		if now.Spec.Without != policy.WithoutPass {
			return fmt.Errorf("remote service %s is not passed on in the clear any more", who.service)
		}
		return nil
	}
	id, _, err := x509svid.Verify(o.peer, s.p.cfg.Identity, x509svid.WithTime(o.opened))
	switch {
	case err != nil:
		return fmt.Errorf("who answered is not trusted any more: %w", err)
	case !now.Answers(id.String()):
		return fmt.Errorf("%s may not answer for remote service %s any more", id, who.service)
	}
	return nil
}

// askAgain is how often the agent is asked whether workloads still are who they were.
const askAgain = 5 * time.Second

// attestAgain follows the identities of workloads that we speak for, until ctx ends.
func (p *Proxy) attestAgain(ctx context.Context) {
	tick := time.NewTicker(askAgain)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			for _, s := range p.room.snapshot() {
				if s.originated() != nil && !s.attestAgain(ctx) {
					break // the agent is away: it is asked later
				}
			}
		case <-ctx.Done():
			return
		}
	}
}

// attestAgain takes a newer certificate of the workload for the one that the connection was begun with, and cuts when the workload has
// no identity any more, or another one. That nobody can say whose it is, for the process has ended or the agent is away, changes nothing: what was
// proven holds until its time is over. It tells whether the agent has answered.
func (s *session) attestAgain(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, askAgain)
	defer cancel()
	who := s.identity()
	w, err := s.p.cfg.Outside.workload(ctx, s.client, s.server, who.caller.ID)
	switch {
	case errors.Is(err, errNoIdentity):
		s.cut(flow.ReasonIdentityExpired, err.Error())
	case err == nil && w.svid != nil && w.id == who.caller.ID:
		who.chain = w.svid.Certificates
		s.setIdentity(who)
	case err == nil && w.svid != nil:
		s.cut(flow.ReasonIdentityExpired, fmt.Sprintf("its workload is %s now", w.id))
	}
	return err == nil || errors.Is(err, errNoIdentity)
}
