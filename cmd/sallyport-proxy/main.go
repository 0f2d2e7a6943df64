// Command sallyport-proxy is the identity proxy of a node.
//
// Started as root it waits for the px namespace, enters it, drops to its own user with CAP_NET_RAW
// alone and executes itself again; that second run serves. It needs no agent.
//
// With `exec -- PROGRAM` it becomes another program there, in the same way: another proxy in its place.
// With `authz` it carries nothing, and tells other proxies what it would decide.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/sallyport-dev/sallyport/pkg/build"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// environment is what a run has of the outside.
type environment struct {
	args   []string
	vars   []string // NAME=value
	getenv func(string) string
	stdout io.Writer
	stderr io.Writer
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	env := environment{args: os.Args, vars: os.Environ(), getenv: os.Getenv, stdout: os.Stdout, stderr: os.Stderr}
	err := run(ctx, env)
	switch {
	case errors.Is(err, flag.ErrHelp): // asked for, and given
	case err != nil:
		fmt.Fprintln(os.Stderr, "sallyport-proxy:", err)
		os.Exit(1)
	}
}

// options of the command line.
type options struct {
	config   string
	node     string // of many that have this configuration; empty: the one in it
	insideFD int    // of the second run: descriptor with the configuration; -1: first run
	after    int    // of a run that takes the place of another: how many listeners it gets; 0: it takes nobody's
	version  bool
}

func run(ctx context.Context, env environment) error {
	if len(env.args) > 1 && env.args[1] == execCommand {
		return runExec(ctx, env)
	}
	if len(env.args) > 1 && env.args[1] == authzCommand {
		return runAuthz(ctx, env)
	}
	opts, err := parseOptions(env)
	if err != nil {
		return err
	}
	if opts.version {
		_, err := fmt.Fprint(env.stdout, build.Read().Describe("sallyport-proxy"))
		return err
	}
	log := slog.New(slog.NewTextHandler(env.stderr, nil))
	data, err := readConfig(opts)
	if err != nil {
		return err
	}
	cfg, err := policy.ParseAgentConfig(opts.config, data)
	if err == nil {
		cfg, err = cfg.For(opts.node)
	}
	if err != nil {
		return err
	}
	if opts.insideFD >= 0 {
		return serve(ctx, cfg, succession{env: env, path: opts.config, data: data, after: opts.after, log: log}, notifier{env.getenv("NOTIFY_SOCKET")}, log)
	}
	return launch(ctx, launcher{config: cfg, path: opts.config, node: opts.node, data: data, env: env, log: log})
}

func parseOptions(env environment) (options, error) {
	var o options
	flags := flag.NewFlagSet("sallyport-proxy", flag.ContinueOnError)
	flags.SetOutput(env.stderr)
	flags.StringVar(&o.config, "config", "/etc/sallyport/agent.yaml", "`FILE` with the node's AgentConfig")
	flags.StringVar(&o.node, "node", "", "`NAME` of this node, where one configuration is that of many; default: the one in the configuration")
	flags.IntVar(&o.insideFD, "inside-fd", -1, "used by the launcher only: descriptor `NUMBER` with the configuration")
	flags.IntVar(&o.after, "after", 0, "used by a proxy whose place is taken only: `NUMBER` of listeners that are handed over")
	flags.BoolVar(&o.version, "version", false, "print the version and exit")
	if err := flags.Parse(env.args[1:]); err != nil {
		return o, err
	}
	if flags.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	return o, nil
}

// readConfig reads the file, or in the second run, whose user need not be able to, the descriptor.
func readConfig(o options) ([]byte, error) {
	if o.insideFD < 0 {
		return os.ReadFile(o.config)
	}
	f := os.NewFile(uintptr(o.insideFD), o.config)
	if f == nil {
		return nil, fmt.Errorf("read configuration from descriptor %d: not open", o.insideFD)
	}
	defer f.Close()
	data, err := io.ReadAll(f)
	if err != nil {
		return nil, fmt.Errorf("read configuration from descriptor %d: %w", o.insideFD, err)
	}
	return data, nil
}
