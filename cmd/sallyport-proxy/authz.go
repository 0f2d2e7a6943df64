package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/build"
	"github.com/sallyport-dev/sallyport/pkg/extauthz"
	"github.com/sallyport-dev/sallyport/pkg/identity"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/proxy"
	"github.com/sallyport-dev/sallyport/pkg/token"
)

// authzCommand is the first argument by which another proxy is told what this one would decide.
const authzCommand = "authz"

const authzUsage = `usage: sallyport-proxy authz [--config FILE]

Answers other proxies by Envoy's ext_authz protocol (gRPC), as spec.proxy.authz of the AgentConfig says: the decisions of
sallyport-proxy, for connections and requests that another one carries. It runs as the user of spec.proxy, without any
capability, in the host's network namespace. docs/other-proxies.md has a configuration of Envoy.

`

// runAuthz serves until ctx ends.
func runAuthz(ctx context.Context, env environment) error {
	cfg, err := authzConfig(env)
	if err != nil {
		return err
	}
	if err := errors.Join(checkPlain(cfg.Spec.Proxy.UID), unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)); err != nil {
		return err
	}
	return serveAuthz(ctx, cfg, notifier{env.getenv("NOTIFY_SOCKET")}, slog.New(slog.NewTextHandler(env.stderr, nil)))
}

func authzConfig(env environment) (cfg policy.AgentConfig, err error) {
	flags := flag.NewFlagSet("sallyport-proxy authz", flag.ContinueOnError)
	flags.SetOutput(env.stderr)
	file := flags.String("config", "/etc/sallyport/agent.yaml", "`FILE` with the node's AgentConfig, which the proxy's user can read")
	flags.Usage = func() {
		fmt.Fprint(env.stderr, authzUsage)
		flags.PrintDefaults()
	}
	if err := flags.Parse(env.args[2:]); err != nil {
		return cfg, err
	}
	if flags.NArg() > 0 {
		return cfg, fmt.Errorf("authz: unexpected argument %q", flags.Arg(0))
	}
	data, err := os.ReadFile(*file)
	if err != nil {
		return cfg, err
	}
	if cfg, err = policy.ParseAgentConfig(*file, data); err != nil {
		return cfg, err
	}
	if cfg.Spec.Proxy.Authz == nil {
		return cfg, fmt.Errorf("authz: %s has no spec.proxy.authz\nhint: write who may ask there: docs/other-proxies.md", *file)
	}
	return cfg, nil
}

// checkPlain refuses to parse what others send with more power than that takes, and as a user whom the agent would not hear.
func checkPlain(uid uint32) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&header, &caps[0]); err != nil {
		return fmt.Errorf("read own capabilities: %w", err)
	}
	if os.Geteuid() != int(uid) {
		return fmt.Errorf("authz: runs as uid %d, and spec.proxy.uid is %d: the agent takes records of that one alone\nhint: User=%d in its unit", os.Geteuid(), uid, uid)
	}
	if caps[0].Permitted|caps[1].Permitted != 0 {
		return errors.New("authz: has capabilities, and needs none\nhint: CapabilityBoundingSet= in its unit")
	}
	return nil
}

// serveAuthz ends in this order: no new questions, the records handed over, then everything else.
func serveAuthz(ctx context.Context, cfg policy.AgentConfig, notify notifier, log *slog.Logger) error {
	source, err := identity.New(identity.Config{Address: cfg.Spec.WorkloadAPI, ID: cfg.ProxyID(), Logger: log})
	if err != nil {
		return err
	}
	file := proxy.NewPolicyFile(cfg.PolicyFile(), log)
	reporter := proxy.NewReporter(proxy.ReporterConfig{Socket: cfg.ProxySocket(), Version: build.Version() + " authz", Logger: log})
	outside, err := proxy.NewOutside(cfg.ProxySocket())
	if err != nil {
		return err
	}
	defer outside.Close()
	tokens, err := token.New(token.Config{Policy: file.Set, Bundles: source, Dial: outside.Dial, Logger: log})
	if err != nil {
		return err
	}
	judge, err := proxy.NewJudge(proxy.JudgeConfig{Trust: source, Policy: file, Report: reporter.Report, Tokens: tokens, Live: outside.Live})
	if err != nil {
		return err
	}
	helpers, stopHelpers := context.WithCancel(context.WithoutCancel(ctx))
	defer stopHelpers()
	group, broken := errgroup.WithContext(helpers)
	tell := func(ctx context.Context) error { return outside.Tell(ctx, nil, tokens) }
	for _, run := range []func(context.Context) error{source.Run, file.Run, reporter.Run, tokens.Run, tell} {
		group.Go(func() error { return run(broken) })
	}
	serving, stop := context.WithCancel(ctx)
	defer stop()
	context.AfterFunc(broken, stop) // a helper that broke ends the rest
	awaitIdentity(serving, source, log)
	err = answer(serving, cfg.Spec.Proxy.Authz, judge, source, notify, log)
	err = errors.Join(err, flush(broken, reporter))
	stopHelpers()
	return errors.Join(err, group.Wait())
}

// answer serves questions until ctx ends, and has the denials reported that were counted.
func answer(ctx context.Context, c *policy.AuthzConfig, judge *proxy.Judge, source *identity.Source, notify notifier, log *slog.Logger) error {
	var gateways []spiffeid.ID
	for _, g := range c.Gateways {
		gateways = append(gateways, spiffeid.RequireFromString(g)) // the configuration was checked
	}
	server, err := extauthz.New(extauthz.Config{Judge: judge, Socket: c.Socket, GID: int(c.GID), Listen: c.Listen, Gateways: gateways,
		Identity: source, BelievePrincipal: c.BelievePrincipal})
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { notify.send("STOPPING=1") })
	log.Info("answering other proxies", "at", server.Addrs())
	notify.send("READY=1")
	judging, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	counted := make(chan error, 1)
	go func() { counted <- judge.Run(judging) }()
	err = server.Run(ctx)
	stop()
	return errors.Join(err, <-counted)
}
