package login

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/oauth2"
	"golang.org/x/sync/singleflight"

	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/token"
)

const (
	// fetchTimeout bounds what one login asks of a provider.
	fetchTimeout = 10 * time.Second
	// fresh is how long what a provider says of itself is not asked again, and retry how long after it did not answer.
	fresh = time.Hour
	retry = 5 * time.Second
)

// metadata is what a provider says of itself.
type metadata struct {
	endpoint oauth2.Endpoint
	http     *http.Client

	Logout      string   `json:"end_session_endpoint"`
	NamesIssuer bool     `json:"authorization_response_iss_parameter_supported"`
	Styles      []string `json:"token_endpoint_auth_methods_supported"`
}

// style is how a client proves itself. What is not said is HTTP's basic authentication, by the standard.
func (m metadata) style(secret string) oauth2.AuthStyle {
	if secret == "" || len(m.Styles) > 0 && !slices.Contains(m.Styles, "client_secret_basic") {
		return oauth2.AuthStyleInParams
	}
	return oauth2.AuthStyleInHeader
}

// providers keeps what providers say of themselves. It asks when a browser logs in, never before.
type providers struct {
	dial  token.Dialer
	calls singleflight.Group

	mu    sync.Mutex
	known map[string]*known // guarded by mu: by the provider's name
}

type known struct {
	spec  policy.IdentityProviderSpec
	meta  metadata
	err   error // why meta is none, or not newer
	asked time.Time
}

// usable says whether it is of the same provider, and need not be asked for again.
func (k *known) usable(p policy.IdentityProvider, now time.Time) bool {
	age := now.Sub(k.asked)
	return reflect.DeepEqual(k.spec, p.Spec) && age >= 0 && (age < retry || k.err == nil && age < fresh)
}

// result prefers what was known before to an error: a provider that stumbles at its discovery may have all the rest.
func (k *known) result() (metadata, error) {
	if k.meta.http == nil {
		return metadata{}, k.err
	}
	return k.meta, nil
}

func (c *providers) metadata(ctx context.Context, p policy.IdentityProvider, now time.Time) (metadata, error) {
	c.mu.Lock()
	k := c.known[p.Name]
	c.mu.Unlock()
	if k != nil && k.usable(p, now) {
		return k.result()
	}
	done := c.calls.DoChan(p.Name, func() (any, error) { return c.ask(p, k, now), nil })
	select {
	case <-ctx.Done():
		return metadata{}, ctx.Err()
	case r := <-done:
		k = r.Val.(*known)
	}
	if !reflect.DeepEqual(k.spec, p.Spec) { // the policy changed while it was asked for another browser
		return metadata{}, errors.New("the provider was changed just now")
	}
	return k.result()
}

// ask is not bound to one browser: others wait for its answer too.
func (c *providers) ask(p policy.IdentityProvider, before *known, now time.Time) *known {
	ctx, cancel := context.WithTimeout(context.Background(), fetchTimeout)
	defer cancel()
	k := &known{spec: p.Spec, asked: now}
	k.meta, k.err = discover(ctx, p, c.dial)
	if k.err != nil && before != nil && reflect.DeepEqual(before.spec, p.Spec) {
		k.meta = before.meta
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.known[p.Name] = k
	return k
}

func discover(ctx context.Context, p policy.IdentityProvider, dial token.Dialer) (metadata, error) {
	client, err := token.Client(p, dial)
	if err != nil {
		return metadata{}, err
	}
	provider, err := oidc.NewProvider(oidc.ClientContext(ctx, client), p.Spec.Issuer)
	if err != nil {
		return metadata{}, fmt.Errorf("ask %s who it is: %w", p.Spec.Issuer, err)
	}
	m := metadata{endpoint: provider.Endpoint(), http: client}
	if err := provider.Claims(&m); err != nil {
		return metadata{}, fmt.Errorf("read what %s says of itself: %w", p.Spec.Issuer, err)
	}
	for _, where := range []string{m.endpoint.AuthURL, m.endpoint.TokenURL} {
		if u, err := url.Parse(where); err != nil || u.Scheme != "https" || u.Host == "" {
			return metadata{}, fmt.Errorf("%s names %q as an endpoint, which is no https address", p.Spec.Issuer, where)
		}
	}
	if u, err := url.Parse(m.Logout); err != nil || u.Scheme != "https" || u.Host == "" {
		m.Logout = ""
	}
	return m, nil
}

// errSecret is a fault of this node, not of the provider.
var errSecret = errors.New("read the client secret")

// secretOf reads the client's secret anew for each login, so that it can be changed in place.
func secretOf(p policy.IdentityProvider) (string, error) {
	file := p.Spec.Login.ClientSecretFile
	if file == "" {
		return "", nil
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("%w: %w: the proxy's user must be able to read the file", errSecret, err)
	}
	secret := strings.TrimSpace(string(text))
	if secret == "" {
		return "", fmt.Errorf("%w: %s is empty: write there what the provider gave out for the client", errSecret, file)
	}
	return secret, nil
}
