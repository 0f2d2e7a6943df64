package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
)

// part is one piece of the agent. Any of its functions may be nil.
type part struct {
	name string
	// start makes it; an error leaves nothing behind.
	start func(context.Context) error
	// run works until its context ends. An error stops the agent.
	run func(context.Context) error
	// stop frees what start made. run has returned by then.
	stop func() error
}

// running is a part that was started.
type running struct {
	part
	cancel context.CancelFunc
	done   chan error
}

// runParts starts the parts in their order, waits for ctx to end or a part to fail, and stops them in the reverse order,
// each one after all that build on it.
func runParts(ctx context.Context, parts []part, log *slog.Logger) (err error) {
	failed := make(chan error, len(parts))
	var up []running
	defer func() { err = errors.Join(err, stopParts(up, log)) }()
	for _, p := range parts {
		if ctx.Err() != nil {
			return nil
		}
		if p.start != nil {
			if err := p.start(ctx); err != nil {
				return fmt.Errorf("%s: %w", p.name, err)
			}
		}
		log.Debug("part started", "part", p.name)
		up = append(up, launch(ctx, p, failed))
	}
	select {
	case <-ctx.Done():
		return nil
	case err := <-failed:
		return err
	}
}

// launch begins a part's run in a context of its own: parts stop one after the other, not all with ctx.
func launch(ctx context.Context, p part, failed chan<- error) running {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	r := running{part: p, cancel: cancel, done: make(chan error, 1)}
	if p.run == nil {
		r.done <- nil
		return r
	}
	go func() {
		err := p.run(ctx)
		switch {
		case err != nil:
			err = fmt.Errorf("%s: %w", p.name, err)
		case ctx.Err() == nil:
			err = fmt.Errorf("%s: ended by itself", p.name)
		}
		if ctx.Err() == nil {
			failed <- err
			err = nil
		}
		r.done <- err
	}()
	return r
}

func stopParts(up []running, log *slog.Logger) error {
	var errs []error
	for i := len(up) - 1; i >= 0; i-- {
		up[i].cancel()
		errs = append(errs, <-up[i].done)
		if up[i].stop != nil {
			if err := up[i].stop(); err != nil {
				errs = append(errs, fmt.Errorf("stop %s: %w", up[i].name, err))
			}
		}
		log.Debug("part stopped", "part", up[i].name)
	}
	return errors.Join(errs...)
}
