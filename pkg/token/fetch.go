package token

import (
	"context"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// Bounds of what a provider may answer.
const (
	maxAnswer  = 1 << 20
	maxHeaders = 64 << 10
	maxKeys    = 64
	minRSA     = 2048 // bits
	maxRSA     = 8192 // bits: larger ones take long to verify
)

// Dialer reaches providers: net.Dialer.DialContext, or the proxy's way out.
type Dialer = func(ctx context.Context, network, addr string) (net.Conn, error)

// origin is where keys come from. Keys of another origin are not taken over.
type origin struct {
	name, issuer, ca string
	endpoints        []string
}

func originOf(p policy.IdentityProvider) origin {
	return origin{name: p.Name, issuer: p.Spec.Issuer, ca: p.Spec.CA, endpoints: p.Spec.Endpoints}
}

func (o origin) equal(other origin) bool {
	return o.name == other.name && o.issuer == other.issuer && o.ca == other.ca && slices.Equal(o.endpoints, other.endpoints)
}

// Client speaks with a provider, and with nobody else: only with its endpoints, by TLS that its CA has signed for, without
// following redirects, and with a bound on what an answer may have. It keeps no connections.
func Client(p policy.IdentityProvider, dial Dialer) (*http.Client, error) {
	return originOf(p).client(dial)
}

func (o origin) client(dial Dialer) (*http.Client, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if o.ca != "" {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM([]byte(o.ca)) {
			return nil, fmt.Errorf("read CA of %s: no certificate in it", o.name)
		}
	}
	transport := &http.Transport{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			if !slices.Contains(o.endpoints, addr) {
				return nil, fmt.Errorf("%s is not among the endpoints of %s", quote(addr), o.name)
			}
			return dial(ctx, network, addr)
		},
		TLSClientConfig: config, DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: maxHeaders,
	}
	return &http.Client{
		Transport:     bounded{transport},
		Timeout:       30 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, nil
}

// bounded asks by https alone and cuts answers that are too long.
type bounded struct{ http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme != "https" {
		return nil, fmt.Errorf("%s is no https address", quote(r.URL.String()))
	}
	response, err := b.RoundTripper.RoundTrip(r)
	if err == nil {
		response.Body = http.MaxBytesReader(nil, response.Body, maxAnswer)
	}
	return response, err
}

// fetch asks for the discovery document and then for the keys.
func (o origin) fetch(ctx context.Context, dial Dialer) ([]jose.JSONWebKey, error) {
	client, err := o.client(dial)
	if err != nil {
		return nil, err
	}
	provider, err := oidc.NewProvider(oidc.ClientContext(ctx, client), o.issuer)
	if err != nil {
		return nil, fmt.Errorf("discover %s: %w", o.issuer, err)
	}
	var document struct {
		Keys string `json:"jwks_uri"`
	}
	if err := provider.Claims(&document); err != nil {
		return nil, fmt.Errorf("discover %s: %w", o.issuer, err)
	}
	if u, err := url.Parse(document.Keys); err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil {
		return nil, fmt.Errorf("discover %s: jwks_uri %s is no https address", o.issuer, quote(document.Keys))
	}
	data, err := read(ctx, client, document.Keys)
	if err != nil {
		return nil, fmt.Errorf("fetch keys: %w", err)
	}
	return parseKeys(data)
}

func read(ctx context.Context, client *http.Client, from string) (data []byte, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, from, nil)
	if err != nil {
		return nil, err
	}
	response, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answers %s", from, response.Status)
	}
	return io.ReadAll(response.Body)
}

// parseKeys takes the keys that can verify a signature. Others are passed over: a provider may have them for other uses.
// A set without any is a fault of the provider, and not a reason to forget those that it had.
func parseKeys(data []byte) (keys []jose.JSONWebKey, err error) {
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(data, &set); err != nil {
		return nil, fmt.Errorf("read keys: %w", err)
	}
	if len(set.Keys) > maxKeys {
		return nil, fmt.Errorf("read keys: more than %d", maxKeys)
	}
	for _, raw := range set.Keys {
		var key jose.JSONWebKey
		if key.UnmarshalJSON(raw) == nil && verifies(key) {
			keys = append(keys, key)
		}
	}
	if len(keys) == 0 {
		return nil, errors.New("read keys: none that can verify a signature")
	}
	return keys, nil
}

func verifies(key jose.JSONWebKey) bool {
	if !key.IsPublic() || !key.Valid() || key.Use != "" && key.Use != "sig" {
		return false
	}
	if public, ok := key.Key.(*rsa.PublicKey); ok {
		bits := public.N.BitLen()
		return bits >= minRSA && bits <= maxRSA
	}
	return true
}
