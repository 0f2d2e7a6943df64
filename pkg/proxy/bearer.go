package proxy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/token"
)

// tokenTLS is how clients are met that will show a token before the first byte: they say so by ALPN, and know no SPIFFE. All others
// are met as if there were no tokens.
func (s *session) tokenTLS(spec policy.TokensSpec) func(*tls.ClientHelloInfo) (*tls.Config, error) {
	return func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if !slices.Contains(hello.SupportedProtos, api.ConnectProtocol) {
			return nil, nil
		}
		cert, err := s.p.cfg.Certificates.Get(spec.Certificate)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errOwnCertificate, err)
		}
		return &tls.Config{
			MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true,
			Certificates: []tls.Certificate{*cert}, NextProtos: []string{api.ConnectProtocol},
		}, nil
	}
}

// proveByToken reads what a client has to show, and asks policy. Nothing is answered before the service has accepted.
func (s *session) proveByToken(conn *client, service policy.ProtectedService) error {
	bearer, err := readConnect(conn)
	if err == nil {
		err = s.down.SetDeadline(time.Time{})
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return &refusal{reason: flow.ReasonHandshakeTimeout, err: errors.New("client showed no token")}
	case errors.Is(err, io.EOF), errors.Is(err, errTruncated), isConnectionError(err):
		return &refusal{reason: flow.ReasonHandshakeFailed, err: fmt.Errorf("client left before it showed a token: %w", err)}
	case err != nil:
		return turnAway(http.StatusBadRequest, flow.ReasonBadRequest, "this is no request to connect with a token", err)
	case bearer == "":
		return turnAway(http.StatusUnauthorized, flow.ReasonLoginNeeded, "the service has to know who you are", errors.New("client showed no bearer token"))
	}
	verified, err := s.p.verify(s.ctx, service, bearer)
	if errors.Is(err, token.ErrNoKeys) { // another token would be no better
		return turnAway(http.StatusServiceUnavailable, flow.ReasonTokenRefused, "the keys of the token's provider are not known here now", err)
	}
	if err != nil {
		return turnAway(http.StatusUnauthorized, flow.ReasonTokenRefused, "the token proves nobody here", err)
	}
	who := s.identity()
	who.caller, who.token, who.expires = verified.Caller, bearer, verified.Expires
	who.caller.Address = s.client.Addr()
	s.setIdentity(who)
	if d := s.p.cfg.Policy.Set().Authorise(who.service, who.caller, nil, s.p.now()); !d.Allowed {
		return turnAway(http.StatusForbidden, flow.ReasonNotAuthorised, "this is not allowed to you", fmt.Errorf("%w: %s", errNotAuthorised, strings.Join(d.Near, "; ")))
	}
	return nil
}

func (p *Proxy) verify(ctx context.Context, service policy.ProtectedService, bearer string) (token.Verified, error) {
	if p.cfg.Tokens == nil {
		return token.Verified{}, fmt.Errorf("%w: this proxy verifies none", token.ErrNotTaken)
	}
	return p.cfg.Tokens.Verify(ctx, service, bearer)
}

// turnAway is a refusal with the answer that the client gets; err is for the record.
func turnAway(status int, reason flow.Reason, why string, err error) *refusal {
	return &refusal{reason: reason, how: alerted, err: err, answer: &badRequest{status, reason, why}}
}

func isConnectionError(err error) bool {
	_, ok := errors.AsType[*net.OpError](err)
	return ok
}

// maxConnectHeader bounds what a client shows before it has proven anything.
const maxConnectHeader = 32 << 10

// readConnect reads a CONNECT request, and gives its bearer token. What it wants to connect to is not looked at: the connection goes
// where its packets were for, and nowhere else.
func readConnect(conn io.Reader) (bearer string, err error) {
	limited := &io.LimitedReader{R: conn, N: maxConnectHeader}
	buffered := bufio.NewReader(limited)
	r, err := http.ReadRequest(buffered)
	switch {
	case limited.N == 0:
		return "", fmt.Errorf("its header is larger than %d bytes", maxConnectHeader)
	case err != nil:
		return "", err
	case r.Method != http.MethodConnect:
		return "", fmt.Errorf("its method is %q", r.Method)
	case r.ContentLength > 0 || len(r.TransferEncoding) > 0 || buffered.Buffered() > 0:
		return "", errors.New("something comes behind its header before it is answered")
	case len(r.Header["Authorization"]) > 1:
		return "", errors.New("it has more than one Authorization")
	}
	if token, shown := bearerToken(r.Header); shown {
		bearer = token
	}
	return bearer, nil
}

// answer tells a client that waits for it whether it is let in. err is why not.
func (s *session) answer(conn *client, err error) error {
	if conn == nil || !conn.waits {
		return err
	}
	_ = s.down.SetWriteDeadline(time.Now().Add(s.p.cfg.HandshakeTimeout)) // without it, a write tells
	if err == nil {
		if _, err = io.WriteString(conn, "HTTP/1.1 200 OK\r\n\r\n"); err == nil {
			err = s.down.SetWriteDeadline(time.Time{})
		}
		if err != nil {
			resetClose(s.up)
			err = &refusal{reason: flow.ReasonHandshakeFailed, how: reset, err: fmt.Errorf("answer client: %w", err)}
		}
		return err
	}
	if r, ok := errors.AsType[*refusal](err); ok && r.answer != nil && s.say(conn, *r.answer) == nil {
		r.how = alerted
	}
	return err
}

// say sends a refusal in the words that HTTP has for it.
func (s *session) say(conn *client, bad badRequest) error {
	text := fmt.Sprintf("%sflow: %s\n", page(bad.status, bad.reason, bad.why), s.id)
	answer := http.Response{
		StatusCode: bad.status, ProtoMajor: 1, ProtoMinor: 1, Close: true,
		Header:        http.Header{"Content-Type": {"text/plain; charset=utf-8"}, api.ReasonHeader: {bad.reason.String()}, api.FlowHeader: {s.id}},
		ContentLength: int64(len(text)), Body: io.NopCloser(strings.NewReader(text)),
	}
	if bad.status == http.StatusUnauthorized {
		answer.Header.Set("Www-Authenticate", "Bearer")
	}
	var whole bytes.Buffer
	if err := answer.Write(&whole); err != nil {
		return err
	}
	if _, err := conn.Write(whole.Bytes()); err != nil {
		return err
	}
	return conn.CloseWrite()
}

// tokenObjection tells why the token that let a connection in would not be taken now, or gives nil. When it ends, expire cuts.
func (p *Proxy) tokenObjection(s *session) error {
	who := s.identity()
	service, ok := p.cfg.Policy.Set().Service(who.service)
	if who.token == "" || !ok {
		return nil // or objection has said so
	}
	ctx, cancel := context.WithTimeout(s.ctx, recheckToken)
	defer cancel()
	_, err := p.verify(ctx, service, who.token)
	if s.doubt.objects(err, p.now()) {
		return fmt.Errorf("its token is not taken any more: %w", err)
	}
	return nil
}
