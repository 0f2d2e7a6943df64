package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/login"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// Names of what is spoken inside of TLS, as ALPN has them.
const (
	alpnHTTP2 = "h2"
	alpnHTTP1 = "http/1.1"
)

// web is a session with a service that speaks HTTP: every request on it is judged for itself.
type web struct {
	s        *session
	spec     policy.HTTPSpec // as the connection began
	http2    bool
	guard    *http1 // nil with HTTP/2
	server   *http.Server
	upstream *upstream
	reverse  *httputil.ReverseProxy
	resets   *rate.Limiter // of requests that the client gives up
	handlers sync.WaitGroup
	requests atomic.Uint64
	open     sync.Once // reports OPEN

	mu      sync.Mutex
	live    map[*exchange]struct{} // guarded by mu
	opened  bool                   // guarded by mu
	refused bool                   // guarded by mu; a refusal was recorded
}

// What a client may give up before it is taken for a flood of resets: a good deal at once, as a browser that leaves a page does,
// and then some each second.
const (
	resetBurst = 200
	resetRate  = 20
)

// serveWeb speaks HTTP with a client until one of them ends it.
func (s *session) serveWeb(conn *client, spec policy.HTTPSpec) {
	w := &web{
		s: s, spec: spec, http2: conn.ConnectionState().NegotiatedProtocol == alpnHTTP2,
		resets: rate.NewLimiter(resetRate, resetBurst), live: map[*exchange]struct{}{},
	}
	up, err := newUpstream(s, spec.Upstream, spec.Limits.Streams)
	if err != nil {
		s.deny(&refusal{reason: flow.ReasonUpstreamFailed, how: reset, err: err})
		return
	}
	w.upstream = up
	w.reverse = w.newReverse()
	moves := &activity{began: s.accepted}
	conn.raw.moved = moves.moved
	s.setWeb(w)
	if s.recheck(); s.wasCut() == nil {
		w.noteOpen(s.identity().caller)
		stop := moves.watch(s.p.cfg.IdleTimeout, func() { s.cut(flow.ReasonIdleTimeout, "nothing moved for "+s.p.cfg.IdleTimeout.String()) })
		w.serve(conn)
		stop()
	}
	w.end()
}

// newReverse is what carries requests. Its own rules about headers come before ours, so that a client's Connection field cannot
// name away what is set here.
func (w *web) newReverse() *httputil.ReverseProxy {
	return &httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { exchangeOf(r.In.Context()).rewrite(r.Out) },
		Transport: w.upstream,
		ModifyResponse: func(r *http.Response) error {
			login.StripAnswer(r.Header)
			return nil
		},
		ErrorHandler: func(rw http.ResponseWriter, r *http.Request, err error) { exchangeOf(r.Context()).failed(rw, err) },
		ErrorLog:     slog.NewLogLogger(w.s.p.cfg.Logger.Handler(), slog.LevelDebug),
		BufferPool:   copyBuffers{&w.s.p.buffers.chunks},
	}
}

// serve runs a server of its own for the one connection, until that has ended and each request on it.
func (w *web) serve(conn *client) {
	l := &oneConn{conn: conn.Conn, ended: make(chan struct{}), stopped: make(chan struct{})}
	spec := w.spec.Limits
	w.setServer(&http.Server{
		Handler:           w,
		ReadHeaderTimeout: spec.HeaderTimeout.Duration,
		IdleTimeout:       w.s.p.cfg.IdleTimeout,
		MaxHeaderBytes:    int(spec.HeaderBytes),
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: int(spec.Streams), CountError: w.trouble},
		BaseContext:       func(net.Listener) context.Context { return w.s.ctx },
		ErrorLog:          slog.NewLogLogger(w.s.p.cfg.Logger.Handler(), slog.LevelDebug),

		DisableGeneralOptionsHandler: true,
	})
	if !w.http2 {
		guard := &http1{client: conn, limit: int(spec.HeaderBytes), timeout: spec.HeaderTimeout.Duration,
			refuse: w.refuse, linger: w.s.linger}
		l.conn, w.guard = guard, guard
		w.server.ConnState = func(_ net.Conn, state http.ConnState) {
			if state == http.StateIdle {
				guard.answered()
			}
			l.follow(state)
		}
	} else {
		w.server.ConnState = func(_ net.Conn, state http.ConnState) { l.follow(state) }
	}
	_ = w.server.Serve(l) // ends with the connection, or when it drains
	if l.given {
		<-l.ended
	}
	w.handlers.Wait()
}

func (w *web) setServer(s *http.Server) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.server = s
}

// drain lets requests that are being answered end, and takes no others.
func (w *web) drain() {
	w.mu.Lock()
	server := w.server
	w.mu.Unlock()
	if server != nil {
		_ = server.Shutdown(w.s.ctx)
	}
}

// oneConn is a listener of one connection, which it gives out once.
type oneConn struct {
	conn           net.Conn
	given          bool
	ended          chan struct{} // the connection, or it speaks another protocol now
	stopped        chan struct{} // the listener
	endOnce, close sync.Once
}

// Accept implements net.Listener: after the first call it waits for the end.
func (l *oneConn) Accept() (net.Conn, error) {
	if !l.given {
		l.given = true
		return l.conn, nil
	}
	select {
	case <-l.ended:
	case <-l.stopped:
	}
	return nil, net.ErrClosed
}

// Close implements net.Listener. It leaves the connection alone: a server that drains closes its listeners first.
func (l *oneConn) Close() error {
	l.close.Do(func() { close(l.stopped) })
	return nil
}

// Addr implements net.Listener.
func (l *oneConn) Addr() net.Addr { return l.conn.LocalAddr() }

func (l *oneConn) follow(state http.ConnState) {
	if state == http.StateClosed || state == http.StateHijacked {
		l.endOnce.Do(func() { close(l.ended) })
	}
}

// trouble is told of what net/http ends HTTP/2 streams and connections for.
func (w *web) trouble(kind string) {
	reason := flow.ReasonBadRequest
	if strings.Contains(kind, "over_max_streams") || strings.Contains(kind, "too_many_early_resets") {
		reason = flow.ReasonRequestLimit
	}
	w.refuse(badRequest{reason: reason, why: "HTTP/2: " + kind})
}

// refuse records a request of which not even the header could be read.
func (w *web) refuse(bad badRequest) {
	w.noteRefused()
	rec := w.s.record(flow.EventDeny, flow.VerdictDenied, bad.reason, bad.why)
	if len(w.s.identity().chain) == 0 {
		rec.Identity, rec.Proof = "", "" // that of an earlier request, which proved nothing of this one
	}
	w.s.p.denials.add(rec)
}

func (w *web) noteRefused() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.refused = true
}

// noteOpen reports the connection, once somebody has proven an identity on it that is let in.
func (w *web) noteOpen(who policy.Caller) {
	if who.String() == "" {
		return
	}
	w.open.Do(func() {
		proof := w.s.identity()
		proof.caller = who
		w.s.setIdentity(proof)
		if w.s.settle(); w.s.wasCut() != nil {
			return
		}
		w.mu.Lock()
		w.opened = true
		w.mu.Unlock()
		w.s.p.cfg.Report(w.s.record(flow.EventOpen, flow.VerdictProxied, flow.ReasonIdentity, ""))
	})
}

// end closes both sides and reports.
func (w *web) end() {
	end := w.s.wasCut()
	toServer, toClient := w.upstream.close(end != nil)
	if end == nil {
		_ = w.s.down.Close()
		end = &ending{reason: flow.ReasonClosed}
	}
	w.mu.Lock()
	opened, refused := w.opened, w.refused
	w.mu.Unlock()
	switch {
	case opened:
		rec := w.s.record(flow.EventClose, flow.VerdictProxied, end.reason, end.detail)
		rec.BytesToServer, rec.BytesToClient = toServer, toClient
		w.s.p.cfg.Report(rec)
	case end.reason != flow.ReasonClosed:
		w.s.p.denials.add(w.s.record(flow.EventDeny, flow.VerdictDenied, end.reason, end.detail))
	case !refused:
		w.s.p.denials.add(w.s.record(flow.EventDeny, flow.VerdictDenied, flow.ReasonLoginNeeded, "client left without a request"))
	}
}

// application is what is spoken, for records.
func (w *web) application() string {
	if w.http2 {
		return alpnHTTP2
	}
	return alpnHTTP1
}

func (w *web) enter(e *exchange) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.live[e] = struct{}{}
}

func (w *web) leave(e *exchange) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.live, e)
}

func (w *web) snapshot() []*exchange {
	w.mu.Lock()
	defer w.mu.Unlock()
	all := make([]*exchange, 0, len(w.live))
	for e := range w.live {
		all = append(all, e)
	}
	return all
}

// recheck asks again, of the connection and of each request on it, whether it would still be let in.
func (w *web) recheck() {
	if why := w.s.p.objection(w.s); why != nil {
		w.s.cut(flow.ReasonPolicyChanged, why.Error())
		return
	}
	w.ask(w.snapshot())
}

func (w *web) settle() { w.ask(w.unsettled()) }

// unsettled are the requests of which nobody could tell whether their tokens still count.
func (w *web) unsettled() []*exchange {
	return slices.DeleteFunc(w.snapshot(), func(e *exchange) bool { return e.doubt.isOver() })
}

// ask has requests judged again, some at a time: each may have to wait for the keys of its token.
func (w *web) ask(requests []*exchange) {
	var all errgroup.Group
	all.SetLimit(rechecksEach)
	for _, e := range requests {
		all.Go(func() error {
			if end := e.objection(); end != nil {
				e.cut(end)
			}
			return nil
		})
	}
	_ = all.Wait()
}

// expire cuts requests whose token or login has ended.
func (w *web) expire(now time.Time) {
	for _, e := range w.snapshot() {
		if end := e.over(now); end != nil {
			e.cut(end)
		}
	}
}

// webTLS is how clients of an HTTP service are met. Who has no certificate may have a token.
func (s *session) webTLS(c *tls.Config, spec policy.HTTPSpec) {
	c.NextProtos = []string{alpnHTTP2, alpnHTTP1}
	if spec.Certificate != "" {
		c.MinVersion = tls.VersionTLS12 // browsers and programs of others come here
		c.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return s.p.cfg.Certificates.Get(spec.Certificate)
		}
	}
	switch {
	case !takes(spec, policy.AuthenticateSPIFFE):
		c.ClientAuth, c.VerifyPeerCertificate = tls.NoClientCert, nil
	case len(spec.Authenticate) > 1:
		verify := c.VerifyPeerCertificate
		c.ClientAuth = tls.RequestClientCert
		c.VerifyPeerCertificate = whenShown(verify)
	}
}

// errOwnCertificate says that clients cannot be met.
var errOwnCertificate = errors.New("no certificate to show to clients")

// ready tells why clients of the service cannot be met now, or gives nil.
func (s *session) ready(spec *policy.HTTPSpec) error {
	if spec != nil && spec.Certificate != "" {
		if _, err := s.p.cfg.Certificates.Get(spec.Certificate); err != nil {
			return fmt.Errorf("%w: %w", errOwnCertificate, err)
		}
		return nil
	}
	_, err := s.p.cfg.Identity.GetX509SVID()
	return err
}
