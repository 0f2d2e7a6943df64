package collector

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/net/netutil"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/pkg/console"
)

// Console is where browsers are served.
type Console struct {
	Listen string // host:port; empty: nowhere
	// Certificate and Key are files of a web certificate, which is read anew for each connection. Empty: the collector's own identity,
	// which no browser knows by itself.
	Certificate, Key string
}

// maxBrowsers bounds the connections to the console.
const maxBrowsers = 256

// browserKey is where the context of a request has the identity that its connection proved.
type browserKey struct{}

func browserOf(ctx context.Context) (spiffeid.ID, bool) {
	id, ok := ctx.Value(browserKey{}).(spiffeid.ID)
	return id, ok
}

// browsers makes a service for them of the one for remote readers: the same people may do the same, and only how they prove who they are
// differs.
func (p peers) browsers(remote *query, ingest *ingest) *query {
	q := *remote
	q.proof = 0 // each request is looked at by itself
	q.admit = func(ctx context.Context) error {
		if id, ok := browserOf(ctx); !ok || !p.readers.has(id) {
			return status.Error(codes.PermissionDenied, "your certificate is of nobody among the collector's readers")
		}
		return nil
	}
	q.acts = ingest.actsOf(func(ctx context.Context) (string, error) {
		id, ok := browserOf(ctx)
		if !ok || !p.actors.has(id) {
			return "", status.Errorf(codes.PermissionDenied, "%s is not among the collector's actors", id)
		}
		return id.String(), nil
	})
	return &q
}

// serveConsole answers browsers that prove to be a reader, until ctx ends.
func (c *Collector) serveConsole(ctx context.Context, l net.Listener, service *query) error {
	pages, err := console.New(console.Config{
		Audit:  inside{service}, // with no key: what it says of its own log is its own word, and the pages say so
		Who:    func(r *http.Request) string { id, _ := browserOf(r.Context()); return id.String() },
		MayAct: func(r *http.Request) bool { id, ok := browserOf(r.Context()); return ok && c.peers.actors.has(id) },
		Now:    c.cfg.Now,
	})
	if err != nil {
		return err
	}
	return console.Serve(ctx, tls.NewListener(netutil.LimitListener(l, maxBrowsers), c.consoleTLS()), c.proven(pages), c.log)
}

// consoleTLS wants a certificate of a reader from each connection: none is taken up again without it.
func (c *Collector) consoleTLS() *tls.Config {
	t := tlsconfig.MTLSServerConfig(c.cfg.Source, c.cfg.Source, tlsconfig.AdaptMatcher(c.peers.browser))
	t.MinVersion, t.SessionTicketsDisabled, t.NextProtos = tls.VersionTLS13, true, []string{"h2", "http/1.1"}
	if c.cfg.Console.Certificate != "" {
		t.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(c.cfg.Console.Certificate, c.cfg.Console.Key)
			if err != nil {
				c.log.Error("console has no certificate to show", "err", err)
			}
			return &pair, err
		}
	}
	return t
}

// proven puts the identity of the connection into each request. A certificate that has ended since the handshake counts no more.
func (c *Collector) proven(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 || c.cfg.Now().After(r.TLS.PeerCertificates[0].NotAfter) {
			w.Header().Set("Connection", "close")
			http.Error(w, "your certificate has ended: take a new one, and connect again", http.StatusForbidden)
			return
		}
		id, err := x509svid.IDFromCert(r.TLS.PeerCertificates[0])
		if err != nil { // the handshake took it
			http.Error(w, "your certificate names no SPIFFE ID", http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), browserKey{}, id)))
	})
}
