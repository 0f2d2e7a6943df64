package proxy

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/token"
)

// recordHandshake is the first byte of a TLS connection: the type of a handshake record.
const recordHandshake = 0x16

var errNotAuthorised = errors.New("not authorised")

// prove takes the client to a proven and authorised identity; of a service that speaks HTTP, for which spec is given, the client
// may have left that to its requests. Errors are refusals.
func (s *session) prove() (conn *client, spec *policy.HTTPSpec, err error) {
	if err := s.down.SetDeadline(s.proveBy); err != nil {
		return nil, nil, &refusal{reason: flow.ReasonHandshakeFailed, err: err}
	}
	set := s.p.cfg.Policy.Set()
	service, ok := set.ServiceAt(policy.ProtocolTCP, s.server)
	if !ok {
		return nil, nil, &refusal{reason: flow.ReasonUnknownService, err: unknownService(set, s.server)}
	}
	s.setIdentity(proven{service: service.Name, trusted: s.p.cfg.Identity.Changed()})
	first, err := s.firstByte()
	if err != nil {
		return nil, nil, err
	}
	spec = service.Spec.HTTP
	if err := s.ready(spec); err != nil {
		return nil, nil, &refusal{reason: flow.ReasonNoOwnIdentity, err: err}
	}
	raw := &peeked{TCPConn: s.down, first: first, pending: true}
	tlsConn := tls.Server(raw, s.tlsConfig(service.Spec))
	if err := s.handshake(tlsConn, raw); err != nil {
		r := s.handshakeRefusal(err, spec)
		if !errors.Is(err, errNoTurn) && r.reason != flow.ReasonNoOwnIdentity {
			s.rememberRefusal()
		}
		return nil, nil, r
	}
	if tlsConn.ConnectionState().NegotiatedProtocol == api.ConnectProtocol {
		conn = &client{Conn: tlsConn, raw: raw, waits: true}
		if err = s.proveByToken(conn, service); err != nil && !errors.Is(err, token.ErrNoKeys) {
			s.rememberRefusal()
		}
		return conn, nil, err
	}
	if err := s.down.SetDeadline(time.Time{}); err != nil {
		return nil, nil, &refusal{reason: flow.ReasonHandshakeFailed, err: err}
	}
	return &client{Conn: tlsConn, raw: raw}, spec, nil
}

// handshake computes when it is the session's turn, and leaves turns to others while it waits for the client.
func (s *session) handshake(conn *tls.Conn, raw *peeked) error {
	raw.turn = &turn{s: s}
	defer func() { raw.turn = nil }()
	if err := raw.turn.take(); err != nil {
		return err
	}
	defer raw.turn.give()
	return conn.HandshakeContext(s.ctx)
}

// rememberRefusal has others go before who comes from there, unless it was us who ended it: to make room, or to stop.
func (s *session) rememberRefusal() {
	if s.wasCut() == nil {
		s.p.turns.remember(s.neighbourhood(), refused, "", time.Now())
	}
}

func unknownService(set *policy.Set, server netip.AddrPort) error {
	if set == nil {
		return errors.New("no policy was read yet")
	}
	return fmt.Errorf("no protected service at %s", bare(server))
}

// firstByte waits for the client to speak. Most protocols that are no TLS show it here.
func (s *session) firstByte() (byte, error) {
	var b [1]byte
	_, err := io.ReadFull(s.down, b[:])
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return 0, &refusal{reason: flow.ReasonHandshakeTimeout, err: errors.New("client said nothing")}
	case err != nil:
		return 0, &refusal{reason: flow.ReasonHandshakeFailed, err: fmt.Errorf(flow.DetailLeft+": %w", err)}
	case b[0] != recordHandshake:
		return 0, &refusal{reason: flow.ReasonNoTLS, err: fmt.Errorf("first byte is 0x%02x: put `sallyport forward` or a SPIFFE-aware client in front", b[0])}
	}
	return b[0], nil
}

// peeked gives back the byte that was read to look at it, and sees the end of the stream.
type peeked struct {
	*net.TCPConn
	first   byte
	pending bool // used by the one reader only, like ended
	ended   bool
	moved   func() // is told of bytes; nil: nobody is
	turn    *turn  // of the handshake; nil: it is over
}

// Read implements net.Conn.
func (c *peeked) Read(b []byte) (int, error) {
	if c.pending && len(b) > 0 {
		b[0], c.pending = c.first, false
		return 1, nil
	}
	n, err := c.read(b)
	c.ended = c.ended || errors.Is(err, io.EOF)
	if n > 0 && c.moved != nil {
		c.moved()
	}
	return n, err
}

// read has no turn while it waits.
func (c *peeked) read(b []byte) (int, error) {
	if c.turn == nil {
		return c.TCPConn.Read(b)
	}
	c.turn.give()
	n, err := c.TCPConn.Read(b)
	if err == nil {
		err = c.turn.take()
	}
	return n, err
}

// Write implements net.Conn.
func (c *peeked) Write(b []byte) (int, error) {
	n, err := c.TCPConn.Write(b)
	if n > 0 && c.moved != nil {
		c.moved()
	}
	return n, err
}

// errTruncated is the end of a stream that is not signed by its sender's key: anybody on the way
// can send a FIN.
var errTruncated = errors.New("ended without close_notify: what it sent may be incomplete")

// client is the TLS connection of a proven client, or to a remote service.
type client struct {
	*tls.Conn
	raw   *peeked
	waits bool // for an answer, before the first byte
}

// Read gives io.EOF after close_notify alone. Go's TLS takes a bare FIN between records for as good.
func (c *client) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) && c.raw.ended {
		err = errTruncated
	}
	return n, err
}

// tlsConfig is of this connection alone: policy is asked inside the handshake, so that a client
// that is not let in gets an alert instead of silence.
func (s *session) tlsConfig(spec policy.ProtectedServiceSpec) *tls.Config {
	c := tlsconfig.MTLSServerConfig(s.p.cfg.Identity, s.p.cfg.Identity, s.authorise)
	c.MinVersion = tls.VersionTLS13
	c.SessionTicketsDisabled = true // each connection proves its identity itself
	if spec.HTTP != nil {
		s.webTLS(c, *spec.HTTP)
	} else if spec.Tokens != nil {
		c.GetConfigForClient = s.tokenTLS(*spec.Tokens)
	}
	return c
}

// authorise is called with an identity that was proven.
func (s *session) authorise(id spiffeid.ID, chains [][]*x509.Certificate) error {
	who := s.identity()
	who.caller = policy.Caller{ID: id, Proof: policy.ProofSPIFFE, Address: s.client.Addr()}
	if len(chains) > 0 {
		who.chain, who.at = chains[0], time.Now()
	}
	s.setIdentity(who)
	decision := s.p.cfg.Policy.Set().Authorise(who.service, who.caller, nil, s.p.now())
	if !decision.Allowed {
		return fmt.Errorf("%w: %s", errNotAuthorised, strings.Join(decision.Near, "; "))
	}
	return nil
}

func (s *session) handshakeRefusal(err error, spec *policy.HTTPSpec) *refusal {
	r := &refusal{reason: flow.ReasonHandshakeFailed, how: alerted, err: err}
	own := s.ready(spec)
	switch {
	case errors.Is(err, errNotAuthorised):
		r.reason = flow.ReasonNotAuthorised
	case errors.Is(err, os.ErrDeadlineExceeded):
		r.reason, r.how = flow.ReasonHandshakeTimeout, reset
	case own != nil:
		r.reason, r.err = flow.ReasonNoOwnIdentity, own
	case errors.Is(err, errOwnCertificate):
		r.reason = flow.ReasonNoOwnIdentity
	}
	return r
}

// objection tells why a connection that was let in would not be let in now, or gives nil. That its
// certificate has expired since is none: it was valid when it was shown, and expire looks after that. Requests are asked
// for themselves.
func (p *Proxy) objection(s *session) error {
	who, set := s.identity(), p.cfg.Policy.Set()
	service, ok := set.ServiceAt(policy.ProtocolTCP, s.server)
	if !ok || service.Name != who.service {
		return fmt.Errorf("%s is not service %s any more", bare(s.server), who.service)
	}
	if (service.Spec.HTTP != nil) != (s.served() != nil) {
		return fmt.Errorf("service %s is carried in another way now", who.service)
	}
	if w := s.served(); w != nil && !reflect.DeepEqual(service.Spec.HTTP.Upstream, w.spec.Upstream) {
		return fmt.Errorf("service %s is reached in another way now", who.service)
	}
	if len(who.chain) == 0 && who.token == "" {
		return nil
	}
	if d := set.Authorise(who.service, who.caller, nil, p.now()); !d.Allowed {
		return fmt.Errorf("%w any more: %s", errNotAuthorised, strings.Join(d.Near, "; "))
	}
	if who.token != "" {
		return nil // tokenObjection looks at it
	}
	select {
	case <-who.trusted:
	default:
		return nil // to verify it again would cost a fifth of what a connection costs
	}
	if _, _, err := x509svid.Verify(who.chain, p.cfg.Identity, x509svid.WithTime(who.at)); err != nil {
		return fmt.Errorf("identity is not trusted any more: %w", err)
	}
	return nil
}

// whenShown is for clients that need not have a certificate: one that is shown must be good.
func whenShown(verify func([][]byte, [][]*x509.Certificate) error) func([][]byte, [][]*x509.Certificate) error {
	return func(raw [][]byte, chains [][]*x509.Certificate) error {
		if len(raw) == 0 {
			return nil
		}
		return verify(raw, chains)
	}
}
