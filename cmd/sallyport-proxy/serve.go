package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/build"
	"github.com/sallyport-dev/sallyport/pkg/identity"
	"github.com/sallyport-dev/sallyport/pkg/login"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/proxy"
	"github.com/sallyport-dev/sallyport/pkg/px"
	"github.com/sallyport-dev/sallyport/pkg/token"
)

const (
	watchPx = 2 * time.Second
	// identityTime is how long the start waits for the own identity.
	identityTime = 3 * time.Second
	flushTime    = 2 * time.Second
)

// serve is the second run: inside px, with CAP_NET_RAW alone. It ends in this order: no new
// connections, the live ones drained, their records handed over, then everything else.
func serve(ctx context.Context, cfg policy.AgentConfig, next succession, notify notifier, log *slog.Logger) error {
	if err := settle(cfg.PxPath()); err != nil {
		return err
	}
	source, err := identity.New(identity.Config{Address: cfg.Spec.WorkloadAPI, ID: cfg.ProxyID(), Logger: log})
	if err != nil {
		return err
	}
	file := proxy.NewPolicyFile(cfg.PolicyFile(), log)
	reporter := proxy.NewReporter(proxy.ReporterConfig{Socket: cfg.ProxySocket(), Version: build.Version(), Logger: log})
	helpers, stopHelpers := context.WithCancel(context.WithoutCancel(ctx))
	defer stopHelpers()
	group, broken := errgroup.WithContext(helpers)
	group.Go(func() error { return source.Run(broken) })
	group.Go(func() error { return file.Run(broken) })
	group.Go(func() error { return reporter.Run(broken) })

	group.Go(func() error { return watchNamespace(broken, cfg.PxPath()) })

	forHTTP, err := newHTTPParts(cfg, source, file, log)
	if err != nil {
		stopHelpers()
		return errors.Join(err, group.Wait())
	}
	defer forHTTP.outside.Close()
	group.Go(func() error { return forHTTP.tokens.Run(broken) })
	group.Go(func() error { return forHTTP.certificates.Run(broken) })
	group.Go(func() error { return forHTTP.outside.Tell(broken, forHTTP.certificates, forHTTP.tokens) })

	serving, stop := context.WithCancel(ctx)
	defer stop()
	context.AfterFunc(broken, stop) // a helper that broke ends the rest
	awaitIdentity(serving, source, log)
	listeners, err := next.inherit()
	if err == nil {
		var p *proxy.Proxy
		p, err = newProxy(cfg.Spec.Proxy, parts{source, file, reporter, forHTTP, listeners, func() { notify.send("WATCHDOG=1") }}, log)
		if err == nil {
			context.AfterFunc(serving, func() { notify.send("STOPPING=1") })
			log.Info("listening", "port", cfg.Spec.Proxy.ListenPort, "identity", cfg.ProxyID())
			next.ready(notify)
			group.Go(func() error { return next.await(serving, p, notify) })
			err = p.Run(serving)
		}
	}
	err = errors.Join(err, flush(broken, reporter))
	stopHelpers()
	return errors.Join(err, group.Wait())
}

// awaitIdentity holds the listeners back for a moment: a SYN that finds none is repeated by the
// client, a connection that finds no identity is reset.
func awaitIdentity(ctx context.Context, source *identity.Source, log *slog.Logger) {
	ctx, cancel := context.WithTimeout(ctx, identityTime)
	defer cancel()
	if err := source.Wait(ctx); err != nil {
		log.Warn("listening without an identity: clients are reset until there is one", "error", err)
	}
}

// httpParts are what services that speak HTTP need.
type httpParts struct {
	outside      *proxy.Outside
	tokens       *token.Verifier
	login        *login.Handler
	certificates *proxy.Certificates
}

// newHTTPParts asks nobody for anything: identity providers are reached when there is a policy that names them.
func newHTTPParts(cfg policy.AgentConfig, source *identity.Source, file *proxy.PolicyFile, log *slog.Logger) (httpParts, error) {
	keys, err := login.KeysOf(cfg.Spec.Proxy.LoginKeys)
	if err != nil {
		return httpParts{}, err
	}
	outside, err := proxy.NewOutside(cfg.ProxySocket())
	if err != nil {
		return httpParts{}, err
	}
	tokens, err := token.New(token.Config{Policy: file.Set, Bundles: source, Dial: outside.Dial, Logger: log})
	if err != nil {
		return httpParts{}, errors.Join(err, outside.Close())
	}
	return httpParts{
		outside: outside, tokens: tokens,
		login:        login.New(login.Config{Policy: file.Set, Tokens: tokens, Dial: outside.Dial, Keys: keys, Log: log}),
		certificates: proxy.NewCertificates(cfg.Spec.Proxy.Certificates, log),
	}, nil
}

// parts are what a proxy works with.
type parts struct {
	source   *identity.Source
	file     *proxy.PolicyFile
	reporter *proxy.Reporter
	http     httpParts

	listeners []*net.TCPListener // of the proxy before; nil: there was none
	moves     func()
}

// threadsInSiege is how many threads run Go code for each core while many strangers are there. With one each, whoever is carried waits for
// all that can run before it: Go's run queues know no order. With more, the handshakes that compute keep some threads busy, and the kernel
// lets those go first that hardly ran lately. By make bench-slow, beside 8,000 clients that drip headers: the 99th percentile of a request on
// a connection that stands was 138 ms with one, 17 ms with four. In peace they would only cost: threads that look for work.
const threadsInSiege = 4

// whenBesieged says what to do about a siege. GOMAXPROCS in the environment is heeded.
func whenBesieged(log *slog.Logger) func(bool) {
	fixed := os.Getenv("GOMAXPROCS") != ""
	return func(on bool) {
		if on {
			log.Warn("many clients at a time have not proven an identity")
		} else {
			log.Info("few clients at a time have not proven an identity")
		}
		switch {
		case fixed:
		case on:
			runtime.GOMAXPROCS(threadsInSiege * runtime.GOMAXPROCS(0))
		default:
			runtime.SetDefaultGOMAXPROCS() // the cores that our control group has now
		}
	}
}

func newProxy(c policy.ProxyConfig, with parts, log *slog.Logger) (*proxy.Proxy, error) {
	connections, err := fitConnections(c.MaxConnections, log)
	if err != nil {
		return nil, err
	}
	limitMemory(connections, log)
	return proxy.New(proxy.Config{
		ListenPort:       c.ListenPort,
		MaxConnections:   connections,
		Besieged:         whenBesieged(log),
		HandshakeTimeout: c.HandshakeTimeout.Duration,
		IdleTimeout:      c.IdleTimeout.Duration,
		ExpiryGrace:      c.ExpiryGrace.Duration,
		DialTimeout:      c.DialTimeout.Duration,
		DrainTimeout:     c.DrainTimeout.Duration,
		Identity:         with.source,
		Policy:           with.file,
		Report:           with.reporter.Report,
		Tokens:           with.http.tokens,
		Login:            with.http.login,
		Certificates:     with.http.certificates,
		Outside:          with.http.outside,
		Listeners:        with.listeners,
		Moves:            with.moves,
		Logger:           log,
	})
}

// settle refuses to parse untrusted bytes with more power than planned, and keeps others of the
// same user away from the private key in memory.
func settle(path string) error {
	if err := errors.Join(px.CheckConfined(), px.CheckInside(path)); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("close own memory to others: %w", err)
	}
	return nil
}

// watchNamespace ends the process when px was removed or made anew: in the old one nobody comes.
// The service manager starts it again, in the new one.
func watchNamespace(ctx context.Context, path string) error {
	tick := time.NewTicker(watchPx)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if err := px.CheckInside(path); err != nil {
				return err
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// flush gives the agent a moment to take the last records. That it is away is no error here.
func flush(ctx context.Context, r *proxy.Reporter) error {
	ctx, cancel := context.WithTimeout(ctx, flushTime)
	defer cancel()
	if err := r.Flush(ctx); err != nil && !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}
