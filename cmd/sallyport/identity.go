package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/identity"
)

// askAgain is the longest time between two attempts to get an identity: whoever waits for a command waits for --timeout at most,
// and an entry that was just made is known to SPIRE's agent after 5 s.
const askAgain = time.Second

// self is our own identity, kept up to date until Close.
type self struct {
	*identity.Source
	stop context.CancelFunc
	done chan struct{}
}

// Close stops following the Workload API.
func (s *self) Close() {
	s.stop()
	<-s.done
}

// identity gets our identity from the Workload API; it gives up after --timeout. The caller
// closes it.
func (c *cli) identity(ctx context.Context) (*self, error) {
	if c.workloadAPI == "" {
		return nil, withHint(usagef("get own identity: no Workload API is named"),
			"name its socket with --workload-api or SPIFFE_ENDPOINT_SOCKET: unix:///run/spire/sockets/agent.sock")
	}
	source, err := identity.New(identity.Config{Address: workloadAddress(c.workloadAPI), MaxRetry: askAgain})
	if err != nil {
		return nil, err
	}
	following, stop := context.WithCancel(ctx)
	me := &self{Source: source, stop: stop, done: make(chan struct{})}
	failed := make(chan error, 1)
	go func() { defer close(me.done); failed <- source.Run(following) }()
	if err := c.await(ctx, me, failed); err != nil {
		me.Close()
		return nil, c.identityHint(err)
	}
	return me, nil
}

// await returns when there is an identity, when there cannot be one, or after --timeout.
func (c *cli) await(ctx context.Context, me *self, failed <-chan error) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	ready := make(chan error, 1)
	go func() { ready <- me.Wait(ctx) }()
	select {
	case err := <-ready:
		return err
	case err := <-failed:
		return errors.Join(err, ctx.Err())
	}
}

func (c *cli) identityHint(err error) error {
	err = fmt.Errorf("get own identity from %s: %w", c.workloadAPI, err)
	switch {
	case errors.Is(err, identity.ErrUnissued):
		return withHint(refused(err), "register an identity for this process with your SPIFFE server, then try again")
	case errors.Is(err, identity.ErrUnreachable):
		return withHint(&exitError{exitUnreachable, err}, "check the socket of --workload-api, and that its server runs")
	}
	return withHint(err, "check the socket of --workload-api: unix:///run/spire/sockets/agent.sock")
}

// workloadAddress takes a bare path, too.
func workloadAddress(s string) string {
	if strings.HasPrefix(s, "/") {
		return "unix://" + s
	}
	return s
}
