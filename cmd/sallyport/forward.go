package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/client"
)

// forwarding is what a forward says when it listens, for machines.
type forwarding struct {
	Listen   string `json:"listen"`
	Server   string `json:"server"`
	Identity string `json:"identity"`
}

func (c *cli) forward() *cobra.Command {
	var flags tunnelFlags
	var listen string
	var expose, web bool
	cmd := &cobra.Command{
		Use:   "forward",
		Short: "Carry plain local clients to a protected service, with our identity",
		Long: `Listen on a local address and carry every connection to a protected service inside mTLS, with
the identity that the Workload API gives us. psql and friends connect to the local address.
Whoever can connect there acts as us: only loopback addresses are taken without --expose.
With --login the token of a login proves us instead, to services that take tokens. A service with
http takes a token with each request: --http speaks HTTP with the local clients and adds it.`,
		Example: `  sallyport forward --to 10.2.0.2:5432 --listen 127.0.0.1:5432
  psql -h 127.0.0.1
  sallyport forward --to wiki.example.org:443 --listen 127.0.0.1:8080 --login default --http`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			address, err := listenAddress(listen, flags.to, expose)
			if err != nil {
				return err
			}
			if web && flags.login == "" {
				return withHint(usagef("forward: --http is for --login"), "leave it out: with our identity the bytes of HTTP are carried as they are")
			}
			if web {
				return c.runWebForward(cmd, &flags, address)
			}
			return c.runForward(cmd, &flags, address)
		},
	}
	flags.add(cmd)
	cmd.Flags().StringVar(&listen, "listen", "", "local `ADDRESS:PORT` (default: 127.0.0.1 and the port of --to)")
	cmd.Flags().BoolVar(&expose, "expose", false, "listen on an address that others than this host can reach")
	cmd.Flags().BoolVar(&web, "http", false, "add the token of --login to each request, for a service with http")
	return cmd
}

// listenAddress checks where to listen. By default that is loopback and the service's port.
func listenAddress(listen, to string, expose bool) (string, error) {
	if listen == "" {
		_, port, err := net.SplitHostPort(to)
		if err != nil {
			return "", withHint(usagef("read --to %q: no address and port", to), "write --to 10.2.0.2:5432 or --to [fd00:2::2]:5432")
		}
		return net.JoinHostPort("127.0.0.1", port), nil
	}
	address, err := netip.ParseAddrPort(listen)
	if err != nil {
		return "", withHint(usagef("read --listen %q: no address and port", listen), "write --listen 127.0.0.1:5432 or --listen [::1]:5432")
	}
	if !address.Addr().IsLoopback() && !expose {
		return "", withHint(refused(fmt.Errorf("listen on %s: whoever can connect there would act as us", address)),
			"listen on 127.0.0.1 or [::1], or give --expose if that is meant")
	}
	return listen, nil
}

func (c *cli) runForward(cmd *cobra.Command, flags *tunnelFlags, address string) error {
	ctx := cmd.Context()
	tunnel, err := c.open(ctx, flags)
	if err != nil {
		return err
	}
	defer tunnel.close()
	return c.listen(ctx, address, forwarding{Server: flags.to, Identity: tunnel.as}, tunnel.Serve)
}

func (c *cli) runWebForward(cmd *cobra.Command, flags *tunnelFlags, address string) error {
	ctx := cmd.Context()
	cfg, as, err := c.asPerson(ctx, flags)
	if err != nil {
		return err
	}
	web, err := client.NewWeb(cfg)
	if err != nil {
		return toHint(err)
	}
	return c.listen(ctx, address, forwarding{Server: flags.to, Identity: as}, web.Serve)
}

// listen says where, and serves.
func (c *cli) listen(ctx context.Context, address string, ready forwarding, serve func(context.Context, net.Listener) error) error {
	var config net.ListenConfig
	l, err := config.Listen(ctx, "tcp", address)
	if err != nil {
		return withHint(fmt.Errorf("listen: %w", err), "choose another address with --listen")
	}
	defer l.Close()
	ready.Listen = l.Addr().String()
	if err := c.show(ready, func(t *table) {
		t.line("listening on %s for %s as %s", ready.Listen, ready.Server, ready.Identity)
	}); err != nil {
		return err
	}
	return serve(ctx, l)
}
