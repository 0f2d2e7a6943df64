package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

const (
	// drillLongest bounds a path that is opened for nothing but to see it close.
	drillLongest = 5 * time.Minute
	// drillMargin is how long after the deadline it is tried.
	drillMargin = time.Second
	// drillPatience bounds one connection.
	drillPatience = 2 * time.Second
	// drillLook is how often it is looked whether the agent answers.
	drillLook = 100 * time.Millisecond
)

func (c *cli) drill() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "drill",
		Short: "Prove that a path ends without the agent",
		Args:  cobra.ArbitraryArgs,
		RunE:  group,

		SuggestionsMinimumDistance: suggestWithin,
	}
	cmd.AddCommand(c.drillRun(), c.drillVerify())
	return cmd
}

// drill is one run of `drill run`.
type drill struct {
	*cli
	key, out   string
	stopsAgent bool
	yes        bool

	envelope []byte
	payload  grant.Payload
	signer   grant.SigningKey
	from     netip.Addr
	to       netip.AddrPort
	record   grant.Drill
}

func (c *cli) drillRun() *cobra.Command {
	d := &drill{cli: c}
	cmd := &cobra.Command{
		Use:   "run FILE",
		Short: "Open a short grant, stop the agent, and see the path close on its deadline",
		Long: `Prove on this node that the kernel ends a path with nobody's help. FILE is a signed grant of at most 5 minutes to one address of this
node, which its policy has to allow (nodeAddresses: true). Its path is opened and used, by a connection that stays. Then the agent is
stopped: by somebody, whom the command asks, or with --stop-agent through systemd. After the deadline the connection and a new one
have to be reset. When the agent is back, what was seen is signed with --key and written to --out. The service sees one
connection, and one byte of it only if the path did not close.`,
		Example: `  sallyport grant issue --service postgres --client 127.83.80.2 --for 20s --node node-1 --reason drill \
    --key alice.key --policy resources.d --out drill.grant
  sudo sallyport drill run drill.grant --key alice.key --stop-agent --out july.drill`,
		Args: exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error { return d.run(cmd.Context(), args[0]) },
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&d.key, "key", "", "`FILE` of the requester's key, to begin the grant and to sign the record with")
	f.StringVar(&d.out, "out", "", "new `FILE` for the record (default: standard output)")
	f.BoolVar(&d.stopsAgent, "stop-agent", false, "stop and start the agent with systemctl")
	f.BoolVarP(&d.yes, "yes", "y", false, "do not ask")
	return cmd
}

func (d *drill) run(ctx context.Context, file string) error {
	if err := d.prepare(ctx, file); err != nil {
		return err
	}
	d.record.Before = d.knock(ctx).String()
	live, err := d.open(ctx)
	if err != nil {
		return err
	}
	defer live.Close()
	if err := d.alone(ctx, live); err != nil {
		return errors.Join(err, d.undo(ctx))
	}
	if err := d.back(ctx); err != nil {
		return err
	}
	return d.write(ctx)
}

// alone has the agent stopped, and tries the path after its deadline.
func (d *drill) alone(ctx context.Context, live net.Conn) error {
	if err := d.stopped(ctx); err != nil {
		return err
	}
	if err := d.waitUntil(ctx, d.record.Deadline.Add(drillMargin)); err != nil {
		return err
	}
	d.record.Tried = d.now()
	used, fresh := peep(live), d.knock(ctx)
	d.record.Live, d.record.New = used.String(), fresh.String()
	d.record.Closed = used == knockReset && fresh.closed()
	return nil
}

// undo has the agent started after a drill that was broken off, also by a signal: a node without one soon admits nothing new.
func (d *drill) undo(ctx context.Context) error {
	if !d.stopsAgent && d.record.Stopped.IsZero() {
		return nil // nobody has stopped it
	}
	return d.systemctl(context.WithoutCancel(ctx), "start")
}

// prepare reads what is needed, before anything is opened.
func (d *drill) prepare(ctx context.Context, file string) (err error) {
	if d.key == "" {
		return withHint(usagef("drill: nobody signs the record"), "name the requester's key with --key")
	}
	if d.envelope, err = d.readEnvelope(file); err != nil {
		return err
	}
	if d.payload, err = grant.Peek(d.envelope); err != nil {
		return explained("read grant", err)
	}
	p := d.payload
	if len(p.Addresses) != 1 || p.Duration > drillLongest {
		return withHint(usagef("drill: the grant is for %s, and lives for %s", plural(len(p.Addresses), "address"), p.Duration),
			"issue one for a single address of this node, and for at most %s", drillLongest)
	}
	if d.signer, err = d.readKey(d.key); err != nil {
		return err
	}
	digest, err := grant.Digest(d.envelope)
	if err != nil {
		return explained("read grant", err)
	}
	d.from = p.Addresses[0]
	id, err := grant.NewID(d.now())
	d.record = grant.Drill{ID: id, By: p.Requester, Node: p.Audience, Service: p.Service, Grant: p.ID, Digest: digest, Client: d.from}
	return errors.Join(err, d.findService(ctx))
}

// findService finds an address of the service in the family of the client's.
func (d *drill) findService(ctx context.Context) error {
	return d.withAgent(ctx, func(ctx context.Context, a *client.Agent) error {
		reply, err := a.Services(ctx)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(reply.GetServices(), func(s *api.Service) bool { return s.GetName() == d.payload.Service })
		if i < 0 || reply.GetServices()[i].GetMode() != string(policy.ModeEnforce) || len(reply.GetServices()[i].GetPorts()) == 0 {
			return withHint(fmt.Errorf("drill: %s is not enforced on this node: nothing would close", d.payload.Service), "`sallyport services` lists what is")
		}
		s := reply.GetServices()[i]
		port := uint16(s.GetPorts()[0])
		if len(d.payload.Ports) > 0 {
			port = d.payload.Ports[0]
		}
		at := s.GetAddresses()
		if s.GetTarget() == string(policy.TargetHost) {
			at = []string{"127.0.0.1", "::1"}
		}
		for _, text := range at {
			if to, err := netip.ParseAddr(text); err == nil && to.Is4() == d.from.Is4() {
				d.to = netip.AddrPortFrom(to, port)
				d.record.Server = d.to
				return nil
			}
		}
		return withHint(fmt.Errorf("drill: %s has no address of the family of %s", s.GetName(), d.from), "issue a grant for an address of the other family")
	})
}

// open activates the grant and uses its path. The kernel's count of the path's flows says that it is used, not that the connection came about.
func (d *drill) open(ctx context.Context) (net.Conn, error) {
	answer, err := d.answerFor(ctx, activate{key: d.key, yes: d.yes}, d.envelope)
	if err != nil {
		return nil, err
	}
	var conn net.Conn
	err = d.withAgent(ctx, func(ctx context.Context, a *client.Agent) error {
		g, err := a.Activate(ctx, d.envelope, answer)
		if err != nil {
			return refusalHint(err)
		}
		d.record.Activated, d.record.Deadline = g.GetActivated().AsTime(), g.GetDeadline().AsTime()
		if conn, err = d.dial(ctx); err != nil {
			return withHint(fmt.Errorf("drill: the path does not open: %w", err), "see that the service runs; the grant ends by itself")
		}
		paths, err := a.Paths(ctx)
		if err == nil && !slices.ContainsFunc(paths.GetPaths(), func(p *api.Path) bool { return p.GetGrant() == g.GetId() && p.GetFlows() > 0 }) {
			err = withHint(errors.New("drill: the connection did not take the path"), "`sallyport explain %s %s` says where it goes", d.from, d.payload.Service)
		}
		return err
	})
	if err != nil && conn != nil {
		conn.Close()
	}
	return conn, err
}

// stopped waits until the agent does not answer. A path whose agent lives at its deadline proves nothing.
func (d *drill) stopped(ctx context.Context) error {
	ctx, cancel := context.WithDeadline(ctx, d.record.Deadline)
	defer cancel()
	if err := d.systemctl(ctx, "stop"); err != nil {
		return err
	}
	if err := d.await(ctx, false); err != nil {
		return withHint(fmt.Errorf("drill: the agent still answered when the path ended at %s", stampOf(d.record.Deadline)),
			"%s", choose(d.stopsAgent, "issue the grant for longer than systemd takes to stop the agent", "stop it as soon as the command asks, or give --stop-agent"))
	}
	d.record.Stopped = d.now()
	return nil
}

// back waits until the agent answers again, for as long as it takes.
func (d *drill) back(ctx context.Context) error {
	if err := d.systemctl(ctx, "start"); err != nil {
		return err
	}
	if err := d.await(ctx, true); err != nil {
		return err
	}
	d.record.Back = d.now()
	return nil
}

// systemctl does it, or asks somebody to.
func (d *drill) systemctl(ctx context.Context, verb string) error {
	if !d.stopsAgent {
		d.note("%s the agent of this node now", verb)
		return nil
	}
	if out, err := exec.CommandContext(ctx, "systemctl", verb, "sallyport-agent").CombinedOutput(); err != nil {
		return withHint(fmt.Errorf("drill: systemctl %s sallyport-agent: %w: %s", verb, err, out),
			"%s it by hand; `journalctl -u sallyport-agent` says more", verb)
	}
	return nil
}

// await looks until the agent answers, or does not.
func (d *drill) await(ctx context.Context, answers bool) error {
	look := time.NewTicker(drillLook)
	defer look.Stop()
	for {
		err := d.withAgent(ctx, func(ctx context.Context, a *client.Agent) error {
			_, err := a.Status(ctx)
			return err
		})
		gone := errors.Is(err, client.ErrUnreachable) || errors.Is(err, fs.ErrNotExist)
		if ctx.Err() == nil && (answers && err == nil || !answers && gone) {
			return nil
		}
		select {
		case <-look.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (d *drill) waitUntil(ctx context.Context, at time.Time) error {
	timer := time.NewTimer(at.Sub(d.now()))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (d *drill) dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, drillPatience)
	defer cancel()
	dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(d.from, 0))}
	dialer.SetMultipathTCP(false)
	return dialer.DialContext(ctx, "tcp", d.to.String())
}

// knocked is what a connection met.
type knocked string

const (
	knockReset   knocked = "reset"
	knockSilent  knocked = "nobody answered the connection"
	knockOpen    knocked = "bytes were answered"
	knockUnclear knocked = "neither reset nor answered"
)

func (k knocked) String() string { return string(k) }

func (k knocked) closed() bool { return k == knockReset || k == knockSilent }

// knock connects and sends a byte that is no TLS.
func (d *drill) knock(ctx context.Context) knocked {
	conn, err := d.dial(ctx)
	switch {
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ECONNRESET):
		return knockReset
	case err != nil:
		return knockSilent
	}
	defer conn.Close()
	return peep(conn)
}

// peep sends a byte and reads to the end: what the service said before is there to be read, after a reset too.
func peep(conn net.Conn) knocked {
	_ = conn.SetDeadline(time.Now().Add(drillPatience)) // else the read would tell
	_, werr := conn.Write([]byte{'\n'})
	n, err := io.Copy(io.Discard, conn)
	switch {
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE), errors.Is(werr, syscall.ECONNRESET), errors.Is(werr, syscall.EPIPE):
		return knockReset
	case n > 0:
		return knockOpen
	}
	return knockUnclear
}

// write signs what was seen, whatever it was.
func (d *drill) write(ctx context.Context) error {
	signed, err := grant.SignDrill(ctx, d.record, d.signer)
	if err != nil {
		return explained("sign record", err)
	}
	if err := d.writeSigned(d.out, signed, commandLine("drill", "verify", d.out, "--policy", "RESOURCES")); err != nil {
		return err
	}
	return drillVerdict(d.record)
}

func drillVerdict(r grant.Drill) error {
	if r.Closed {
		return nil
	}
	return withHint(refused(fmt.Errorf("the path of %s was not seen to close: its connection: %s; a new one: %s", r.Grant, r.Live, r.New)),
		"`sallyport canary` and `sallyport status` say what is wrong with enforcement")
}

func (c *cli) drillVerify() *cobra.Command {
	var resources []string
	cmd := &cobra.Command{
		Use:   "verify FILE",
		Short: "Verify the record of a drill, and show what was seen",
		Long: `Verify that the record of a drill is signed by the person whom it names, with a key that the resources of --policy know, and show it.
It fails unless the path was seen to close. It needs no node and no network.`,
		Example: `  sallyport drill verify july.drill --policy resources.d`,
		Args:    exactly(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if len(resources) == 0 {
				return withHint(usagef("drill verify: nobody knows whose keys count"), "name the resources with --policy")
			}
			set, err := loadPolicy(resources)
			if err != nil {
				return err
			}
			data, err := readSmall(args[0], grant.MaxEnvelope, "read record", "name a file that `sallyport drill run` wrote")
			if err != nil {
				return err
			}
			r, signers, err := grant.VerifyDrill(data, set.Keyrings(), c.now())
			if err != nil {
				return explained("verify drill", err)
			}
			if err := c.show(r, func(t *table) { drillTable(t, r, signers) }); err != nil {
				return err
			}
			return drillVerdict(r)
		},
	}
	cmd.Flags().StringSliceVar(&resources, "policy", nil, "resources with the Keyring: `FILES` or a directory")
	return cmd
}

func stampOf(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func drillTable(t *table, r grant.Drill, signers []policy.Signer) {
	t.row("verdict", choose(r.Closed, "closed with the agent stopped", "not seen to close"))
	t.row("signed by", people(signers))
	t.row("node", r.Node)
	t.row("path", fmt.Sprintf("%s to %s (%s)", r.Client, r.Service, r.Server))
	t.row("grant", r.Grant)
	t.row("before it opened", r.Before)
	t.row("opened", stampOf(r.Activated))
	t.row("agent stopped", stampOf(r.Stopped))
	t.row("deadline", stampOf(r.Deadline))
	t.row("tried", stampOf(r.Tried))
	t.row("its connection", r.Live)
	t.row("a new one", r.New)
	t.row("agent back", stampOf(r.Back))
}
