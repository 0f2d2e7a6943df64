package extauthz

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/net/http/httpguts"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/sallyport-dev/sallyport/pkg/proxy"
)

// extensionService is the context extension by which the other proxy's configuration names a service.
const extensionService = "sallyport.service"

// question reads what is asked. What cannot be read is in Wrong, so that it is recorded like other refusals.
func (s *Server) question(ctx context.Context, in *authv3.CheckRequest) proxy.Question {
	a := in.GetAttributes()
	q := proxy.Question{Service: a.GetContextExtensions()[extensionService]}
	q.Asker, q.Elsewhere = asker(ctx)
	var errs [4]error
	q.Client, errs[0] = address("source", a.GetSource())
	q.Server, errs[1] = address("destination", a.GetDestination())
	errs[2] = s.identity(&q, a.GetSource())
	if h := a.GetRequest().GetHttp(); h != nil {
		q.Request, errs[3] = request(h)
	}
	q.Wrong = errors.Join(errs[:]...)
	return q
}

// asker is who asks, and whether it need not be on this node.
func asker(ctx context.Context) (who string, elsewhere bool) {
	p, _ := peer.FromContext(ctx)
	if p == nil {
		return "nobody", true
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return "who may use the socket", false
	}
	id, err := x509svid.IDFromCert(info.State.PeerCertificates[0])
	if err != nil {
		return "nobody", true // the handshake lets in no such one
	}
	return id.String(), true
}

func address(what string, p *authv3.AttributeContext_Peer) (netip.AddrPort, error) {
	s := p.GetAddress().GetSocketAddress()
	if s == nil || s.GetProtocol() != corev3.SocketAddress_TCP {
		return netip.AddrPort{}, fmt.Errorf("%s is not an address of TCP", what)
	}
	ip, err := netip.ParseAddr(s.GetAddress())
	if err != nil || s.GetPortValue() == 0 || s.GetPortValue() > 65535 {
		return netip.AddrPort{}, fmt.Errorf("%s is %q port %d, not an IP address and a port", what, short(s.GetAddress()), s.GetPortValue())
	}
	return netip.AddrPortFrom(ip.Unmap().WithZone(""), uint16(s.GetPortValue())), nil
}

// identity takes in what the client has proven to the other proxy. A principal that is no SPIFFE ID is nobody here, and so is one
// without a certificate unless the configuration says otherwise.
func (s *Server) identity(q *proxy.Question, p *authv3.AttributeContext_Peer) error {
	if p.GetCertificate() == "" && !s.cfg.BelievePrincipal {
		return nil
	}
	if strings.HasPrefix(p.GetPrincipal(), "spiffe://") {
		id, err := spiffeid.FromString(p.GetPrincipal())
		if err != nil || id.Path() == "" {
			return fmt.Errorf("principal %q is not the SPIFFE ID of a workload", short(p.GetPrincipal()))
		}
		q.Principal = id
	}
	if p.GetCertificate() == "" {
		return nil
	}
	cert, err := certificate(p.GetCertificate())
	q.Certificate = cert
	return err
}

// certificate reads one in PEM, as it is written in a URL.
func certificate(escaped string) (*x509.Certificate, error) {
	text, err := url.PathUnescape(escaped)
	if err != nil {
		return nil, errors.New("the certificate is not escaped as in a URL")
	}
	block, rest := pem.Decode([]byte(text))
	if block == nil || block.Type != "CERTIFICATE" || strings.TrimSpace(string(rest)) != "" {
		return nil, errors.New("the certificate is not one certificate in PEM")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("read certificate: %w", err)
	}
	return cert, nil
}

// request makes of the attributes the request that they tell of. What they say twice has to be the same.
func request(h *authv3.AttributeContext_HttpRequest) (*http.Request, error) {
	r := &http.Request{Method: h.GetMethod(), Host: h.GetHost(), RequestURI: h.GetPath(), Header: http.Header{}, ContentLength: -1}
	fields, err := fields(h)
	if err != nil {
		return r, err
	}
	pseudo := map[string]string{":method": r.Method, ":path": r.RequestURI, ":authority": r.Host}
	for _, f := range fields {
		said, known := pseudo[f.name]
		switch {
		case known && said != f.value:
			return r, fmt.Errorf("%s is said twice, and differs", f.name)
		case strings.HasPrefix(f.name, ":"): // of HTTP/2, and no header
		case !httpguts.ValidHeaderFieldName(f.name) || !httpguts.ValidHeaderFieldValue(f.value):
			return r, fmt.Errorf("header %q is none of HTTP", short(f.name))
		default:
			r.Header.Add(f.name, f.value)
		}
	}
	if !httpguts.ValidHeaderFieldName(r.Method) { // the same letters
		return r, fmt.Errorf("method %q is none of HTTP", short(r.Method))
	}
	if h.GetQuery() != "" || h.GetFragment() != "" {
		return r, errors.New("query and fragment are in the path, or nowhere")
	}
	return r, length(r)
}

// field is one header field.
type field struct{ name, value string }

// fields are in one of two places: as they came, or joined by name.
func fields(h *authv3.AttributeContext_HttpRequest) (all []field, err error) {
	raw := h.GetHeaderMap().GetHeaders()
	if len(raw) > 0 && len(h.GetHeaders()) > 0 {
		return nil, errors.New("the header is told in two ways")
	}
	for name, value := range h.GetHeaders() {
		all = append(all, field{name, value})
	}
	for _, f := range raw {
		if f.GetValue() != "" && len(f.GetRawValue()) > 0 {
			return nil, fmt.Errorf("header %q has two values", short(f.GetKey()))
		}
		all = append(all, field{f.GetKey(), f.GetValue() + string(f.GetRawValue())})
	}
	return all, nil
}

// length reads how much follows the header; -1 where only its end will tell. A request that switches protocols has no body unless its
// header says so: Upgrade is of HTTP/1.1 (RFC 9112, 6.3).
func length(r *http.Request) error {
	switch lengths := r.Header["Content-Length"]; {
	case len(lengths) > 1:
		return nil // they are refused with all other headers
	case len(lengths) == 0:
		if r.Header.Get("Upgrade") != "" && len(r.Header["Transfer-Encoding"]) == 0 {
			r.ContentLength = 0
		}
		return nil
	}
	n, err := strconv.ParseUint(r.Header.Get("Content-Length"), 10, 63)
	if err != nil {
		return fmt.Errorf("Content-Length is %q", short(r.Header.Get("Content-Length")))
	}
	r.ContentLength = int64(n)
	return nil
}

func short(s string) string { return s[:min(len(s), 80)] }
