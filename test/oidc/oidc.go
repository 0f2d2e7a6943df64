// Package oidc runs a real OpenID provider for tests: npm's oidc-provider, in a process of the test.
package oidc

import (
	"bufio"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	_ "embed"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

//go:embed provider.mjs
var program string

// Client of the provider, in the words of OpenID Connect's registration.
type Client struct {
	ID              string   `json:"client_id"`
	Secret          string   `json:"client_secret,omitempty"`
	GrantTypes      []string `json:"grant_types"`
	RedirectURIs    []string `json:"redirect_uris"`
	ResponseTypes   []string `json:"response_types"`
	LogoutURIs      []string `json:"post_logout_redirect_uris,omitempty"`
	Application     string   `json:"application_type,omitempty"` // native: any port of a loopback address will do
	IDTokenAlg      string   `json:"id_token_signed_response_alg,omitempty"`
	TokenAuthMethod string   `json:"token_endpoint_auth_method,omitempty"`
}

// Options of a provider.
type Options struct {
	// Clients are who may ask for tokens. Empty: the client "robot" with the secret "secret" for client credentials.
	Clients []Client
	// Accounts are claims besides sub, of tokens of a subject: of a person who logs in, or of a client. Whoever logs in
	// by the provider's own pages is let in by any password.
	Accounts map[string]map[string]any
	// Resource is the audience of access tokens that name no other. Empty: "https://api.example.org".
	Resource string
	// Address that it listens on, and is reached at. Zero: 127.0.0.1. Do runs what starts it where that is; nil: here.
	Address netip.Addr
	Do      func(func() error) error
	// Dial reaches it, and what it sends browsers to; nil: from here.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// TTL of all tokens, in whole seconds. Zero: a minute.
	TTL time.Duration
}

// Provider is a process that the test's end ends.
type Provider struct {
	// Issuer is its URL, Endpoint the host:port of it, and CA the certificate in PEM that its own is signed with.
	Issuer, Endpoint, CA string

	t       testing.TB
	options Options
	port    int
	cert    string // PEM
	certKey string // PEM
	client  *http.Client

	mu   sync.Mutex
	keys []jose.JSONWebKey // guarded by mu; the first one signs
	stop func()            // guarded by mu; nil: it does not run
}

// Start runs a provider on a free port of the loopback address.
func Start(t testing.TB, o Options) *Provider {
	t.Helper()
	if len(o.Clients) == 0 {
		o.Clients = []Client{{ID: "robot", Secret: "secret", GrantTypes: []string{"client_credentials"}, RedirectURIs: []string{}, ResponseTypes: []string{}}}
	}
	if o.Resource == "" {
		o.Resource = "https://api.example.org"
	}
	if o.TTL == 0 {
		o.TTL = time.Minute
	}
	if !o.Address.IsValid() {
		o.Address = netip.MustParseAddr("127.0.0.1")
	}
	if o.Do == nil {
		o.Do = func(f func() error) error { return f() }
	}
	p := &Provider{t: t, options: o}
	p.makeCertificate()
	p.keys = []jose.JSONWebKey{newKey(t, "first")}
	t.Cleanup(p.Stop)
	p.run()
	return p
}

// Stop ends the process. Its port stays its own for Restart.
func (p *Provider) Stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stop != nil {
		p.stop()
		p.stop = nil
	}
}

// Restart runs it again, at the same address and with the same keys.
func (p *Provider) Restart() {
	p.t.Helper()
	p.Stop()
	p.run()
}

// Rotate restarts it with a new key of that name, and with none of those before.
func (p *Provider) Rotate(name string) {
	p.t.Helper()
	p.mu.Lock()
	p.keys = []jose.JSONWebKey{newKey(p.t, name)}
	p.mu.Unlock()
	p.Restart()
}

// Client trusts the provider, and keeps no connections.
func (p *Provider) Client() *http.Client { return p.client }

// Token is an access token of a client's own, for a resource; empty: the default one.
func (p *Provider) Token(client, secret, resource string) string {
	p.t.Helper()
	form := url.Values{"grant_type": {"client_credentials"}, "scope": {"api"}}
	if resource != "" {
		form.Set("resource", resource)
	}
	request, err := http.NewRequestWithContext(p.t.Context(), http.MethodPost, p.Issuer+"/token", strings.NewReader(form.Encode()))
	if err != nil {
		p.t.Fatal(err)
	}
	request.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	request.SetBasicAuth(client, secret)
	response, err := p.client.Do(request)
	if err != nil {
		p.t.Fatal(err)
	}
	defer response.Body.Close()
	var answer struct {
		AccessToken string `json:"access_token"`
	}
	body, err := io.ReadAll(response.Body)
	if err == nil {
		err = json.Unmarshal(body, &answer)
	}
	if err != nil || answer.AccessToken == "" {
		p.t.Fatalf("provider gives no token: %v %s %s", err, response.Status, body)
	}
	return answer.AccessToken
}

// run starts the process and waits until it listens.
func (p *Provider) run() {
	p.t.Helper()
	dir := folder(p.t)
	script := filepath.Join(p.t.TempDir(), "provider.mjs")
	if err := os.WriteFile(script, []byte(program), 0o600); err != nil {
		p.t.Fatal(err)
	}
	cmd := exec.Command("node", script, filepath.Join(dir, "node_modules/oidc-provider/lib/index.js"))
	cmd.Stderr = complaints{p.t}
	in, err := cmd.StdinPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	if err := p.options.Do(cmd.Start); err != nil {
		p.t.Fatalf("start node: %v\nhint: go run ./tools/needs test", err)
	}
	p.mu.Lock()
	p.stop = func() {
		in.Close()
		_ = cmd.Process.Kill() // it holds nothing that could be lost
		_ = cmd.Wait()         // and was killed
	}
	p.mu.Unlock()
	if _, err := in.Write(append(p.configuration(), '\n')); err != nil {
		p.t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err == nil {
		_, err = fmt.Sscan(line, &p.port)
	}
	if err != nil {
		p.t.Fatalf("provider does not listen: %v %q", err, line)
	}
	p.Endpoint = netip.AddrPortFrom(p.options.Address, uint16(p.port)).String()
	p.Issuer = "https://" + p.Endpoint
}

func (p *Provider) configuration() []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	data, err := json.Marshal(map[string]any{
		"port": p.port, "certificate": p.cert, "key": p.certKey, "clients": p.options.Clients,
		"keys": jose.JSONWebKeySet{Keys: p.keys}, "algorithm": p.keys[0].Algorithm, "accounts": p.options.Accounts,
		"resource": p.options.Resource, "address": p.options.Address, "ttl": int(p.options.TTL.Seconds()),
	})
	if err != nil {
		p.t.Fatal(err)
	}
	return data
}

// folder is where tools/needs has put the provider.
func folder(t testing.TB) string {
	t.Helper()
	_, file, _, ok := runtime.Caller(0)
	if !ok || !filepath.IsAbs(file) {
		file, _ = filepath.Abs("../../test/oidc/oidc.go") // built with -trimpath: tests run in their package's folder
	}
	dir := filepath.Join(filepath.Dir(file), "../../.tools/oidc-provider")
	if _, err := os.Stat(filepath.Join(dir, "installed")); err != nil {
		t.Fatalf("find npm's oidc-provider: %v\nhint: go run ./tools/needs test", err)
	}
	return dir
}

// newKey makes a key that ID tokens of every kind of client can be signed with.
func newKey(t testing.TB, name string) jose.JSONWebKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return jose.JSONWebKey{Key: key, KeyID: name, Algorithm: string(jose.ES256), Use: "sig"}
}

func (p *Provider) makeCertificate() {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		p.t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "provider of a test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{p.options.Address.AsSlice()}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, crypto.Signer(key).Public(), key)
	if err != nil {
		p.t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		p.t.Fatal(err)
	}
	p.cert = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	p.certKey = string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw}))
	p.CA = p.cert
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM([]byte(p.cert))
	p.client = &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DialContext: p.options.Dial, DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: pool}}}
}

// complaints puts what the provider complains of into the test's log, but not its advice on how to run it.
type complaints struct{ t testing.TB }

func (c complaints) Write(data []byte) (int, error) {
	if !strings.Contains(string(data), "oidc-provider WARNING") {
		c.t.Logf("provider: %s", data)
	}
	return len(data), nil
}
