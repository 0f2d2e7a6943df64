package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffegrpc/grpccredentials"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc/credentials"

	"github.com/sallyport-dev/sallyport/pkg/client"
)

// withAudit calls f with a client of the collector: within the time that --timeout allows, or
// when it follows for as long as ctx lives.
func (c *cli) withAudit(ctx context.Context, follow bool, f func(context.Context, *client.Audit) error) error {
	if !follow {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.timeout)
		defer cancel()
	}
	creds, done, err := c.collectorCredentials(ctx)
	if err != nil {
		return err
	}
	defer done()
	audit, err := client.NewAudit(c.collector, creds)
	if err != nil {
		return err
	}
	defer audit.Close()
	return auditHint(f(ctx, audit))
}

// collectorCredentials gives no credentials for a Unix socket, whose collector looks at the
// process, and our SPIFFE identity for the network.
func (c *cli) collectorCredentials(ctx context.Context) (credentials.TransportCredentials, func(), error) {
	if strings.HasPrefix(c.collector, "unix:") {
		return nil, func() {}, nil
	}
	me, err := c.identity(ctx)
	if err != nil {
		return nil, nil, err
	}
	id, err := c.collectorSPIFFEID(me)
	if err != nil {
		me.Close()
		return nil, nil, err
	}
	return grpccredentials.MTLSClientCredentials(me, me, tlsconfig.AuthorizeID(id)), me.Close, nil
}

func (c *cli) collectorSPIFFEID(me *self) (spiffeid.ID, error) {
	if c.collectorID != "" {
		id, err := spiffeid.FromString(c.collectorID)
		if err != nil {
			return spiffeid.ID{}, usagef("read --collector-id: %w", err)
		}
		return id, nil
	}
	own, err := me.GetX509SVID()
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("read own identity: %w", err)
	}
	return spiffeid.FromPath(own.ID.TrustDomain(), "/sallyport/collector")
}

func auditHint(err error) error {
	switch {
	case err == nil, hinted(err):
		return err
	case errors.Is(err, client.ErrUnreachable):
		return withHint(err, "check the address of --collector, that its configuration lets us in (readers; operators for its socket), and `systemctl status sallyport-collector` there")
	case errors.Is(err, client.ErrForbidden):
		return withHint(err, "readers and actors are listed in the collector's configuration; our own identity is the Workload API's")
	case errors.Is(err, client.ErrUnknownCall):
		return withHint(err, "the collector is of an older version: install this one there, too")
	}
	return err
}
