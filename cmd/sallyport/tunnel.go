package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/sallyport-dev/sallyport/pkg/client"
)

// proxyPath is what the path of every proxy's identity begins with.
const proxyPath = "/sallyport/proxy/"

// tunnelFlags say where a tunnel leads and who may answer there.
type tunnelFlags struct {
	to          string
	serverIDs   []string
	trustDomain string
}

func (f *tunnelFlags) add(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringVar(&f.to, "to", "", "`ADDRESS:PORT` of the protected service")
	flags.StringSliceVar(&f.serverIDs, "server-id", nil, "SPIFFE `ID` that may answer; may be repeated\n(default: any proxy of our own trust domain)")
	flags.StringVar(&f.trustDomain, "trust-domain", "", "accept any proxy of this trust `DOMAIN` instead of our own")
	cmd.MarkFlagsMutuallyExclusive("server-id", "trust-domain")
}

// open makes a tunnel with our identity. The caller closes that.
func (c *cli) open(ctx context.Context, f *tunnelFlags) (*client.Tunnel, *self, error) {
	if f.to == "" {
		return nil, nil, withHint(usagef("open tunnel: no service"), "name its address and port: --to 10.2.0.2:5432")
	}
	me, err := c.identity(ctx)
	if err != nil {
		return nil, nil, err
	}
	tunnel, err := c.newTunnel(f, me)
	if err != nil {
		me.Close()
		return nil, nil, err
	}
	return tunnel, me, nil
}

func (c *cli) newTunnel(f *tunnelFlags, me *self) (*client.Tunnel, error) {
	authorizer, err := f.authorizer(me)
	if err != nil {
		return nil, err
	}
	tunnel, err := client.NewTunnel(client.TunnelConfig{
		Server: f.to, TLS: tlsconfig.MTLSClientConfig(me, me, authorizer), DialTimeout: c.timeout,
		Logger: slog.New(slog.NewTextHandler(c.stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
	})
	if err != nil {
		return nil, withHint(&exitError{exitUsage, err}, "write --to 10.2.0.2:5432 or --to [fd00:2::2]:5432")
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
func tunnelHint(err error) error {
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
	case ok && op.Op == "remote error": // crypto/tls: an alert
		return withHint(refused(fmt.Errorf("the proxy refused us: %w", err)), "`sallyport flows --verdict denied` on the node says why")
	}
	return err
}
