package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/pkg/console"
)

func (c *cli) console() *cobra.Command {
	var listen, key string
	cmd := &cobra.Command{
		Use:   "console",
		Short: "Look at the collector in a browser",
		Long: `Serve pages for a browser on this machine: what goes around the proxy now, flows with filters, each grant's life with its
proof, open reviews, and what the nodes delivered. It asks the collector as this command does: what you may read there you see, and
what you do there is done as you.

It prints an address that one browser can open, once, and ends with the command. Where the browser is on another machine, carry the port
there: "ssh -t -L 8080:127.0.0.1:8080 HOST sallyport console --listen 127.0.0.1:8080 --collector ADDRESS".`,
		Example: `  sallyport console --collector unix:/run/sallyport-collector/collector.sock
  sallyport console --collector 10.9.0.1:9443 --key log.pub --listen 127.0.0.1:8080`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error { return c.serveConsole(cmd.Context(), listen, key) },
	}
	cmd.Flags().StringVar(&listen, "listen", "127.0.0.1:0", "`ADDRESS:PORT` of this machine alone; port 0 is a free one")
	cmd.Flags().StringVar(&key, "key", "", "public `KEY` of the log, or a file with it, to verify with (default: what the collector tells)")
	return cmd
}

func (c *cli) serveConsole(ctx context.Context, listen, keyFlag string) error {
	if err := c.wantsCollector("console"); err != nil {
		return err
	}
	if at, err := netip.ParseAddrPort(listen); err != nil || !at.Addr().IsLoopback() {
		return withHint(usagef("console --listen: %q is no address of this machine alone", listen), "write 127.0.0.1:PORT; the collector's spec.console serves other machines")
	}
	var key string
	if keyFlag != "" {
		verifier, text, err := readVerifierKey(keyFlag)
		if err != nil {
			return err
		}
		key = text
		c.note("the log is verified with the key of %s", verifier.Name())
	}
	return c.withAudit(ctx, true, func(ctx context.Context, a *client.Audit) error {
		asked, cancel := context.WithTimeout(ctx, c.timeout)
		defer cancel()
		if _, err := a.Nodes(asked); err != nil { // who may not read is told here, and not by each page
			return err
		}
		pages, err := console.New(console.Config{Audit: a.Service(), LogKey: key, Now: c.now,
			Who:    func(*http.Request) string { return "who started this console, from " + c.collector },
			MayAct: func(*http.Request) bool { return true }}) // the collector says
		if err != nil {
			return err
		}
		l, err := net.Listen("tcp", listen)
		if err != nil {
			return withHint(fmt.Errorf("serve console: %w", err), "choose another port with --listen")
		}
		h, address := console.Door(l.Addr().String(), pages)
		c.note("open this once in a browser on this machine; interrupt the command to end it")
		fmt.Fprintln(c.stdout, address)
		return console.Serve(ctx, l, h, slog.New(slog.DiscardHandler))
	})
}
