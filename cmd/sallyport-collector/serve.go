package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"syscall"

	"golang.org/x/sync/errgroup"

	"github.com/sallyport-dev/sallyport/pkg/collector"
	"github.com/sallyport-dev/sallyport/pkg/identity"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// serve runs until the context ends. It does not wait for an identity: local readers are served
// without one, and handshakes fail until there is one.
func (p *process) serve(ctx context.Context) error {
	cfg, err := p.read()
	if err != nil {
		return err
	}
	database, err := cfg.Spec.Postgres.address()
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(p.stderr, &slog.HandlerOptions{Level: p.level}))
	source, err := identity.New(identity.Config{Address: cfg.Spec.WorkloadAPI, ID: cfg.id(), Logger: log})
	if err != nil {
		return err
	}
	c, err := collector.New(cfg.collector(source, database, log))
	if err != nil {
		return withHint(err)
	}
	if err := cfg.Spec.Console.pair(); err != nil { // records are taken all the same, and the files may come yet
		log.ErrorContext(ctx, "console has no certificate to show", "err", err)
	}
	log.InfoContext(ctx, "collector serves", "address", c.Addr().String(), "socket", cfg.Spec.Socket, "dataDir", cfg.Spec.DataDir, "postgres", database != "")
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return source.Run(ctx) })
	g.Go(func() error { return c.Run(ctx) })
	g.Go(func() error {
		<-ctx.Done()
		return p.notify("STOPPING=1")
	})
	if err := p.notify("READY=1\nSTATUS=serving on " + c.Addr().String()); err != nil {
		log.WarnContext(ctx, "service manager was not told", "err", err)
	}
	return g.Wait()
}

// withHint says what to do about the usual reasons for not starting.
func withHint(err error) error {
	var hint string
	var op *net.OpError
	switch {
	case errors.Is(err, collector.ErrInUse):
		hint = "stop the other collector, or give this one a dataDir of its own"
	case errors.Is(err, collector.ErrDatabase):
		hint = "see that the database of spec.postgres answers and lets its user make tables, and that dataDir has the log.key of its log"
	case errors.As(err, &op):
		hint = "set spec.listen, spec.socket, spec.metrics and spec.console to what is free on this machine"
	case errors.Is(err, syscall.ENOSPC):
		hint = "make room on the disk of dataDir; nodes keep their records meanwhile"
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		hint = "let the collector's user write to dataDir and to the directory of socket, or name others"
	default:
		return err
	}
	return &policy.Error{Msg: err.Error(), Hint: hint, Err: err}
}

// notify tells the service manager (sd_notify(3)), if there is one.
func (p *process) notify(state string) error {
	if p.notifySocket == "" {
		return nil
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: p.notifySocket, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("notify service manager: %w", err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte(state)); err != nil {
		return fmt.Errorf("notify service manager: %w", err)
	}
	return nil
}
