package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/privilege"
	"github.com/sallyport-dev/sallyport/pkg/px"
)

// pollPx: mounting the namespace raises no event that could be waited for.
const pollPx = 100 * time.Millisecond

// launcher is what the first run knows.
type launcher struct {
	config policy.AgentConfig
	path   string // of the configuration, for messages
	node   string // as the command line names it
	data   []byte
	env    environment
	log    *slog.Logger
}

// launch waits for px and becomes the second run. It returns only with an error or when ctx ends.
func launch(ctx context.Context, l launcher) error {
	if err := l.prepare(); err != nil {
		return err
	}
	fd, err := handOver(l.data)
	if err != nil {
		return err
	}
	return l.enter(ctx, px.Command{
		Args: []string{l.env.args[0], "--config", l.path, "--node", l.node, "--inside-fd", strconv.Itoa(fd)},
		Env:  l.env.vars,
	})
}

// prepare refuses a start that would fail half-way, and makes room for connections.
func (l launcher) prepare() error {
	if needs := privilege.Launcher(); os.Geteuid() != 0 {
		return fmt.Errorf("needs root: start it by %s", needs.Unit)
	} else if err := needs.Check(); err != nil {
		return fmt.Errorf("%w\nhint: %s", err, needs.Hint())
	}
	return raiseFiles(l.config.Spec.Proxy.MaxConnections)
}

// enter waits for px and becomes the command, in px and as the proxy's user. It returns only with an error or when
// ctx ends.
func (l launcher) enter(ctx context.Context, command px.Command) error {
	command.Path = l.config.PxPath()
	command.UID, command.GID = int(l.config.Spec.Proxy.UID), int(l.config.Spec.Proxy.GID)
	for waiting := false; ; waiting = true {
		if err := px.Exec(command); !errors.Is(err, px.ErrNotThere) {
			return err
		}
		if !waiting {
			l.log.Info("waiting for the px namespace, which sallyport-agent makes", "path", command.Path)
		}
		select {
		case <-time.After(pollPx):
		case <-ctx.Done():
			return nil
		}
	}
}

// handOver puts the configuration where the second run can read it: the file may be root's alone.
func handOver(data []byte) (fd int, err error) {
	fd, err = unix.MemfdCreate("sallyport-config", 0) // survives exec
	if err != nil {
		return -1, fmt.Errorf("hand over configuration: %w", err)
	}
	f := os.NewFile(uintptr(fd), "sallyport-config")
	if _, err := f.WriteAt(data, 0); err != nil {
		return -1, fmt.Errorf("hand over configuration: %w", err)
	}
	// The descriptor must outlive f, which is collected some day.
	inherited, err := unix.Dup(fd)
	if err != nil {
		return -1, fmt.Errorf("hand over configuration: %w", err)
	}
	return inherited, f.Close()
}

// filesBesides is how many descriptors the proxy needs besides its connections', each of which takes two.
const filesBesides = 256

// raiseFiles makes room for two sockets for each connection, as far as this process may (CAP_SYS_RESOURCE
// raises the hard limit). A limit that is higher stays.
func raiseFiles(connections uint32) error {
	want := 2*uint64(connections) + filesBesides
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("read limit of open files: %w", err)
	}
	wanted := syscall.Rlimit{Cur: max(limit.Cur, want), Max: max(limit.Max, want)}
	err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &wanted)
	if errors.Is(err, syscall.EPERM) {
		err = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: limit.Max, Max: limit.Max})
	}
	if err != nil {
		return fmt.Errorf("raise limit of open files to %d: %w", want, err)
	}
	return nil
}

// fitConnections lowers the number of connections to what the limit of open files holds.
func fitConnections(want uint32, log *slog.Logger) (int, error) {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 0, fmt.Errorf("read limit of open files: %w", err)
	}
	if limit.Cur >= 2*uint64(want)+filesBesides {
		return int(want), nil
	}
	if limit.Cur < filesBesides+2 {
		return 0, fmt.Errorf("limit of open files is %d: raise it (LimitNOFILE=) to %d", limit.Cur, 2*uint64(want)+filesBesides)
	}
	fits := int(limit.Cur-filesBesides) / 2
	log.Warn("fewer connections than configured: raise the limit of open files (LimitNOFILE=)",
		"connections", fits, "configured", want, "files", limit.Cur)
	return fits, nil
}
