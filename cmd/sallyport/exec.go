package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffegrpc/grpccredentials"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

const (
	// agentPath is what the path of every agent's identity begins with.
	agentPath = "/sallyport/agent/"
	// agentPort is where agents take requests, unless somebody says otherwise.
	agentPort = "9470"
)

// Exit codes of exec, as of env(1) and shells, where it is not the command's own.
const (
	exitNotRun   = 126
	exitNotFound = 127
	exitSignal   = 128 // and the number of the signal that ended it
)

// execution is one run of `exec`.
type execution struct {
	agents   []string
	service  string
	ports    []uint
	duration time.Duration
	reason   string
	ticket   string
	binding  string
	ingress  string
	maxBytes string
	by       families
}

func (c *cli) exec() *cobra.Command {
	var e execution
	cmd := &cobra.Command{
		Use:   "exec [flags] -- COMMAND [ARGUMENT...]",
		Short: "Run a command with paths around the proxy that end with it",
		Long: `Ask the agent of each node that serves a service for a path, with our own identity, run the
command, and give the paths back when it ends, or when this process does. Signals go on to the command,
and its exit code is ours. A path ends at its time also while the command runs: its connections are
reset, and new ones go to the proxy.

The command is run when every address has its path that it will connect to, and else it is said which has
none, and why. For each --agent these are the address that the resolver puts first and that can be reached,
and others of its family. What fails beside them is only told. An address where nobody answers at all
takes as long as --timeout. With --ipv4 or --ipv6 the other family is left out.`,
		Example: `  sallyport exec --agent db-1.example.org --service postgres --for 15m --reason "nightly backup" -- \
      pg_dump -h db-1.example.org -f backup.sql shop`,
		Args: between(0, -1),
		RunE: func(cmd *cobra.Command, args []string) error { return c.execute(cmd.Context(), &e, args) },
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.SetInterspersed(false)
	f.StringSliceVar(&e.agents, "agent", c.defaultAgents(), "`HOST[:PORT]` of the agent of each node, or of all of them by one name; may be repeated\n(or SALLYPORT_AGENTS, with commas; default port: "+agentPort+")")
	f.StringVar(&e.service, "service", "", "protected `SERVICE` to reach")
	f.UintSliceVar(&e.ports, "port", nil, "only this `PORT` of the service; may be repeated (default: every port)")
	f.DurationVar(&e.duration, "for", time.Hour, "no longer than this `DURATION`")
	f.StringVar(&e.reason, "reason", "", "`TEXT` that says why, for the record")
	f.StringVar(&e.ticket, "ticket", "", "`TICKET` that asks for it")
	f.StringVar(&e.binding, "binding", policy.BindingAddress, "what a path serves: our `address`, or, on the service's own node, the control group that we\nare in: workload")
	f.StringVar(&e.ingress, "from", "", "only as a client behind this `KIND` of device: uplink, pod or local (default: any)")
	f.StringVar(&e.maxBytes, "max-bytes", "", "no more than this `SIZE`, like 10GiB, for each path and both directions together")
	f.BoolVarP(&e.by.only4, "ipv4", "4", false, "only the IPv4 addresses of --agent: the command connects by no others")
	f.BoolVarP(&e.by.only6, "ipv6", "6", false, "only the IPv6 addresses of --agent: the command connects by no others")
	cmd.MarkFlagsMutuallyExclusive("ipv4", "ipv6")
	f.Lookup("port").DefValue = "" // else the help says: default []
	fixed(cmd, "binding", []string{policy.BindingAddress, policy.BindingWorkload})
	return cmd
}

func (c *cli) defaultAgents() []string {
	return slices.DeleteFunc(strings.Split(c.getenv("SALLYPORT_AGENTS"), ","), func(s string) bool { return s == "" })
}

// execute opens, runs and closes, in this order.
func (c *cli) execute(ctx context.Context, e *execution, command []string) error {
	request, err := e.request(command)
	if err != nil {
		return err
	}
	path, err := exec.LookPath(command[0])
	if err != nil {
		return withHint(notRun(err), "nothing was asked for; name a program that is there")
	}
	agents, err := resolveAgents(ctx, e.agents, e.by)
	if err != nil {
		return err
	}
	me, err := c.identity(ctx)
	if err != nil {
		return err
	}
	defer me.Close()
	holds, err := c.openHolds(ctx, me, agents, request)
	if err != nil {
		return errors.Join(execHint(err), c.closeHolds(ctx, holds))
	}
	stop := c.tellEnds(holds)
	ended := c.runHeld(path, command)
	stop()
	if err := c.closeHolds(ctx, holds); err != nil {
		c.note("%v", err) // what became of the command is what counts
		return ended
	}
	if _, never := errors.AsType[*exitError](ended); never {
		return withHint(ended, "its paths were given back; see whether the program's interpreter is there, and for which machine it was built")
	}
	return ended
}

// request reads the flags.
func (e *execution) request(command []string) (*api.PathRequest, error) {
	switch {
	case len(command) == 0:
		return nil, withHint(usagef("run command: there is none"), "write it behind --: sallyport exec --agent HOST --service postgres --reason backup -- pg_dump shop")
	case e.service == "":
		return nil, withHint(usagef("ask for path: no service is named"), "name it with --service")
	case len(e.agents) == 0:
		return nil, withHint(usagef("ask for path: no agent is named"), "name the nodes of the service with --agent, or in SALLYPORT_AGENTS")
	case e.binding == policy.BindingTuple:
		return nil, withHint(usagef("ask for path: a command does not say from which port it connects"), "write --binding address or --binding workload")
	}
	r := &api.PathRequest{Service: e.service, Duration: durationpb.New(e.duration), Reason: e.reason, Ticket: e.ticket, Binding: e.binding, Ingress: e.ingress}
	for _, port := range e.ports {
		r.Ports = append(r.Ports, uint32(min(port, 1<<16))) // the agent refuses what is none
	}
	if e.maxBytes != "" {
		var size policy.Size
		if err := size.UnmarshalText([]byte(e.maxBytes)); err != nil {
			return nil, explained("read --max-bytes", err)
		}
		r.Budget = &api.Budget{Bytes: uint64(size)}
	}
	return r, nil
}

// openHolds asks every agent at the same time. On an error it gives those that were opened all the same.
func (c *cli) openHolds(ctx context.Context, me *self, agents []agentAddress, request *api.PathRequest) ([]*client.Hold, error) {
	own, err := me.GetX509SVID()
	if err != nil {
		return nil, fmt.Errorf("read own identity: %w", err)
	}
	creds := grpccredentials.MTLSClientCredentials(me, me, anyAgent(own.ID.TrustDomain()))
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	holds := make([]*client.Hold, len(agents))
	answers := make([]asked, len(agents))
	var group errgroup.Group
	for i, agent := range agents {
		group.Go(func() (err error) {
			holds[i], err = client.OpenHold(ctx, agent.at.String(), creds, request)
			answers[i] = asked{agent, err}
			return nil
		})
	}
	_ = group.Wait() // the errors are in the answers
	holds = slices.DeleteFunc(holds, func(h *client.Hold) bool { return h == nil })
	for _, h := range holds {
		o := h.Opened()
		c.note("path to %s on %s for %s until %s, by grant %s", request.GetService(), o.GetNode(), o.GetClient(), o.GetDeadline().AsTime().Format(time.RFC3339), o.GetGrant())
	}
	notes, err := missingPaths(answers)
	for _, n := range notes {
		c.note("%s", n)
	}
	return holds, err
}

func anyAgent(domain spiffeid.TrustDomain) tlsconfig.Authorizer {
	return tlsconfig.AdaptMatcher(func(id spiffeid.ID) error {
		if id.TrustDomain() == domain && strings.HasPrefix(id.Path(), agentPath) {
			return nil
		}
		return fmt.Errorf("%s is no agent of %s", id, domain)
	})
}

// execHint adds the next step to what kept paths from being opened.
func execHint(err error) error {
	switch {
	case hinted(err):
		return err
	case errors.Is(err, client.ErrUnreachable) && !errors.Is(err, client.ErrNotReached):
		return withHint(err, "look at spec.automation in the agent's configuration, and at `sallyport status` on the node; check --agent; with --ipv4 or --ipv6 the other family is left out")
	case errors.Is(err, client.ErrUnreachable):
		return withHint(err, "check --agent: nobody is there, or no way leads there from here")
	}
	return err
}

// tellEnds says so when a path ends before the command, until stop is called.
func (c *cli) tellEnds(holds []*client.Hold) (stop func()) {
	stopped := make(chan struct{})
	var group errgroup.Group
	for _, h := range holds {
		group.Go(func() error {
			select {
			case <-h.Done():
				c.note("path on %s ended: %s; its connections go to the proxy now", h.Opened().GetNode(), h.Why())
			case <-stopped:
			}
			return nil
		})
	}
	return func() { close(stopped); _ = group.Wait() }
}

// closeHolds gives all paths back, also when ctx is over.
func (c *cli) closeHolds(ctx context.Context, holds []*client.Hold) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.timeout)
	defer cancel()
	errs := make([]error, len(holds))
	var group errgroup.Group
	for i, h := range holds {
		group.Go(func() error {
			if err := h.Close(ctx); err != nil {
				errs[i] = fmt.Errorf("path on %s: %w", h.Opened().GetNode(), err)
			}
			return nil
		})
	}
	_ = group.Wait() // the errors are in the list
	return errors.Join(errs...)
}

// runHeld runs the command to its end, with our files, and passes signals on. The command is told to end when this process
// is killed: it has no path any more.
func (c *cli) runHeld(path string, command []string) error {
	runtime.LockOSThread() // whose end is what the command would be told of
	defer runtime.UnlockOSThread()
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2)
	defer signal.Stop(signals)
	cmd := &exec.Cmd{Path: path, Args: command, Stdin: c.stdin, Stdout: c.stdout, Stderr: c.stderr,
		SysProcAttr: &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}}
	if err := cmd.Start(); err != nil {
		return notRun(err)
	}
	done := make(chan struct{})
	passed := make(chan struct{})
	go func() {
		defer close(passed)
		passSignals(cmd.Process, signals, done)
	}()
	err := cmd.Wait()
	close(done)
	<-passed
	return commandEnd(err)
}

func passSignals(p *os.Process, signals <-chan os.Signal, done <-chan struct{}) {
	for {
		select {
		case s := <-signals:
			if !typed(s) {
				_ = p.Signal(s) // it may have ended
			}
		case <-done:
			return
		}
	}
}

// typed tells whether a signal is one that our terminal has sent the command, too.
func typed(s os.Signal) bool {
	if s != unix.SIGINT && s != unix.SIGQUIT {
		return false
	}
	tty, err := os.Open("/dev/tty")
	if err != nil {
		return false
	}
	defer tty.Close()
	foreground, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	return err == nil && foreground == unix.Getpgrp()
}

// commandError is the end of a command that said itself what was wrong.
type commandError struct{ code int }

func (e *commandError) Error() string { return fmt.Sprintf("command ended with code %d", e.code) }

func commandEnd(err error) error {
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok {
		return err
	}
	if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return &commandError{exitSignal + int(status.Signal())}
	}
	return &commandError{exit.ExitCode()}
}

// notRun says that a command never began.
func notRun(err error) error {
	code := exitNotRun
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrNotExist) {
		code = exitNotFound
	}
	return &exitError{code, fmt.Errorf("run command: %w", err)}
}
