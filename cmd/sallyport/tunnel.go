package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// proxyPath is what the path of every proxy's identity begins with.
const proxyPath = "/sallyport/proxy/"

// tunnelFlags say where a tunnel leads and who may answer there.
type tunnelFlags struct {
	to          string
	serverIDs   []string
	trustDomain string

	login, serverName, serverCA string
}

func (f *tunnelFlags) add(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringVar(&f.to, "to", "", "`ADDRESS:PORT` of the protected service")
	flags.StringSliceVar(&f.serverIDs, "server-id", nil, "SPIFFE `ID` that may answer; may be repeated\n(default: any proxy of our own trust domain)")
	flags.StringVar(&f.trustDomain, "trust-domain", "", "accept any proxy of this trust `DOMAIN` instead of our own")
	flags.StringVar(&f.login, "login", "", "`NAME` of a login whose token proves us, in place of our identity (see sallyport login)")
	flags.StringVar(&f.serverName, "server-name", "", "`NAME` that the service's web certificate must be for, with --login\n(default: the host of --to)")
	flags.StringVar(&f.serverCA, "server-ca", "", "`FILE` with the CA of that certificate (default: the system's)")
	cmd.MarkFlagsMutuallyExclusive("login", "server-id", "trust-domain")
}

// opened is a tunnel, and as whom it leads there.
type opened struct {
	*client.Tunnel
	as    string
	close func()
}

// open makes a tunnel with our identity or a login's token. The caller closes it.
func (c *cli) open(ctx context.Context, f *tunnelFlags) (*opened, error) {
	if f.to == "" {
		return nil, withHint(usagef("open tunnel: no service"), "name its address and port: --to 10.2.0.2:5432")
	}
	if f.login != "" {
		return c.openAsPerson(ctx, f)
	}
	if f.serverName != "" || f.serverCA != "" {
		return nil, withHint(usagef("open tunnel: --server-name and --server-ca are for --login"), "add --login NAME, or say who may answer with --server-id")
	}
	me, err := c.identity(ctx)
	if err != nil {
		return nil, err
	}
	tunnel, err := c.newTunnel(f, me)
	if err != nil {
		me.Close()
		return nil, err
	}
	return &opened{tunnel, me.Status().ID.String(), me.Close}, nil
}

// openAsPerson makes a tunnel with the token of a login.
func (c *cli) openAsPerson(ctx context.Context, f *tunnelFlags) (*opened, error) {
	cfg, as, err := c.asPerson(ctx, f)
	if err != nil {
		return nil, err
	}
	tunnel, err := client.NewTunnel(cfg)
	if err != nil {
		return nil, toHint(err)
	}
	return &opened{tunnel, as, func() {}}, nil
}

// asPerson is how the service is met with the token of a login: it proves itself by a web certificate.
func (c *cli) asPerson(ctx context.Context, f *tunnelFlags) (cfg client.TunnelConfig, as string, err error) {
	store, err := c.logins()
	if err != nil {
		return cfg, "", err
	}
	kept, err := store.Token(ctx, f.login)
	if err != nil {
		return cfg, "", loginHint(err, f.login)
	}
	secure := &tls.Config{ServerName: f.serverName}
	if secure.ServerName == "" {
		if secure.ServerName, _, err = net.SplitHostPort(f.to); err != nil {
			return cfg, "", toHint(fmt.Errorf("read server address: %w", err))
		}
	}
	ca, err := readCA(f.serverCA)
	if err != nil {
		return cfg, "", err
	}
	if ca != "" {
		secure.RootCAs = x509.NewCertPool()
		if !secure.RootCAs.AppendCertsFromPEM([]byte(ca)) {
			return cfg, "", usagef("read --server-ca %s: there is no certificate in PEM", f.serverCA)
		}
	}
	bearer := func(ctx context.Context) (string, error) {
		kept, err := store.Token(ctx, f.login)
		return kept.Token, err
	}
	return client.TunnelConfig{Server: f.to, TLS: secure, Bearer: bearer, DialTimeout: c.timeout, Logger: c.warnings(), Hint: f.hint}, personOf(kept), nil
}

// hint is the next step alone.
func (f *tunnelFlags) hint(err error) string {
	if h, ok := errors.AsType[*hintError](tunnelHint(err, f.login)); ok {
		return h.hint
	}
	return "`sallyport flows` on the node says what became of the connection"
}

// warnings go to standard error.
func (c *cli) warnings() *slog.Logger {
	return slog.New(slog.NewTextHandler(c.stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
}

func toHint(err error) error {
	return withHint(&exitError{exitUsage, err}, "write --to 10.2.0.2:5432 or --to [fd00:2::2]:5432")
}

func (c *cli) newTunnel(f *tunnelFlags, me *self) (*client.Tunnel, error) {
	authorizer, err := f.authorizer(me)
	if err != nil {
		return nil, err
	}
	tunnel, err := client.NewTunnel(client.TunnelConfig{
		Server: f.to, TLS: tlsconfig.MTLSClientConfig(me, me, authorizer), DialTimeout: c.timeout,
		Logger: c.warnings(), Hint: f.hint,
	})
	if err != nil {
		return nil, toHint(err)
	}
	return tunnel, nil
}

// authorizer says who may answer: the named identities, or any proxy of one trust domain.
func (f *tunnelFlags) authorizer(me *self) (tlsconfig.Authorizer, error) {
	if len(f.serverIDs) > 0 {
		return f.namedServers()
	}
	own, err := me.GetX509SVID()
	if err != nil {
		return nil, fmt.Errorf("read own identity: %w", err)
	}
	domain := own.ID.TrustDomain()
	if f.trustDomain != "" {
		if domain, err = spiffeid.TrustDomainFromString(f.trustDomain); err != nil {
			return nil, usagef("read --trust-domain: %w", err)
		}
	}
	return tlsconfig.AdaptMatcher(func(id spiffeid.ID) error {
		if id.TrustDomain() == domain && strings.HasPrefix(id.Path(), proxyPath) {
			return nil
		}
		return fmt.Errorf("%s is no proxy of %s", id, domain)
	}), nil
}

func (f *tunnelFlags) namedServers() (tlsconfig.Authorizer, error) {
	var ids []spiffeid.ID
	for _, text := range f.serverIDs {
		id, err := spiffeid.FromString(text)
		if err != nil {
			return nil, withHint(usagef("read --server-id %q: %w", text, err), "write spiffe://example.org/sallyport/proxy/node-1")
		}
		ids = append(ids, id)
	}
	return tlsconfig.AuthorizeOneOf(ids...), nil
}

// tunnelHint adds the next step to what ended a tunnel.
func tunnelHint(err error, login string) error {
	if err == nil {
		return nil
	}
	if login != "" {
		if hinted := personHint(err, login); hinted != nil {
			return hinted
		}
	}
	if errors.Is(err, client.ErrUntrusted) {
		return withHint(refused(err), "name who may answer with --server-id or --trust-domain")
	}
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return withHint(err, "what answers there is no proxy: a path may be open for this client, which then connects directly")
	}
	op, ok := errors.AsType[*net.OpError](err)
	switch {
	case ok && op.Op == "dial":
		return withHint(&exitError{exitUnreachable, err}, "check --to, and on the node `sallyport status`")
	case errors.Is(err, syscall.ECONNRESET):
		return withHint(err, "the connection was cut: `sallyport flows` on the node says for what; who may still come in connects again")
	case ok && op.Op == "remote error": // crypto/tls: an alert
		return withHint(refused(fmt.Errorf("the proxy refused us: %w", err)), "`sallyport flows --verdict denied` on the node says why")
	}
	return err
}

// personHint adds the next step to what ended a tunnel with the token of a login, or gives nil where that is the same for all.
func personHint(err error, login string) error {
	if e, ok := errors.AsType[*client.TurnedAway](err); ok {
		return withHint(err, "%s", turnedAwayHint(e, login))
	}
	const noTokens = "or it takes no tokens there: a service with http takes them with `sallyport forward --http`, others with `tokens` in their policy"
	if e, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return withHint(refused(fmt.Errorf("what answers is not proven to be the service: %w", e.Err)),
			"name its CA with --server-ca, and what its certificate is for with --server-name; %s", noTokens)
	}
	op, remote := errors.AsType[*net.OpError](err)
	if errors.Is(err, client.ErrNoTokens) || remote && op.Op == "remote error" {
		return withHint(refused(fmt.Errorf("the service takes no token there: %w", err)), "check --to; %s", noTokens)
	}
	if personal := loginHint(err, login); hinted(personal) {
		return personal
	}
	return nil
}

func turnedAwayHint(e *client.TurnedAway, login string) string {
	switch {
	case e.Status == http.StatusUnauthorized:
		return "`sallyport whoami` tells for whom the token is and until when: the service has to take that provider and audience; `sallyport login --as " + login + "` brings a new one"
	case e.Status == http.StatusForbidden:
		return "the token is good, and its owner may not come in: ask who runs the service; `sallyport policy explain` tells them why"
	case e.Reason == flow.ReasonTokenRefused.String():
		return "the proxy has not got the keys of the token's provider: try again in a little while, or tell who runs the service"
	case e.Status >= http.StatusInternalServerError:
		return "the proxy let us in, and the service behind it does not answer: ask who runs it"
	}
	return "`sallyport flows --verdict denied` on the node says why"
}
