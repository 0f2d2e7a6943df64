// Command sallyport-agent enforces on one node: it loads, attaches and pins the programs, programs their tables from resources
// and grants, and hands on what the kernel tells.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"syscall"

	"github.com/sallyport-dev/sallyport/pkg/agent"
	"github.com/sallyport-dev/sallyport/pkg/build"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/privilege"
)

func main() {
	// Work in px is done on threads that end afterwards. The main thread cannot end, so it takes no part.
	runtime.LockOSThread()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if os.Getenv("GOGC") == "" {
		go collect(ctx)
	}
	p := process{stdout: os.Stdout, stderr: os.Stderr, notifySocket: os.Getenv("NOTIFY_SOCKET"), uid: os.Getuid()}
	if err := p.command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, agent.Describe(err))
		os.Exit(1)
	}
}

// process is what the command has of its surroundings.
type process struct {
	stdout, stderr io.Writer
	notifySocket   string
	uid            int
	config, node   string
	level          slog.Level
}

func (p *process) options() agent.Options {
	return agent.Options{
		ConfigFile: p.config, Node: p.node, Version: build.Version(), NotifySocket: p.notifySocket,
		Logger: slog.New(slog.NewTextHandler(p.stderr, &slog.HandlerOptions{Level: p.level})),
	}
}

// errNotRoot refuses what cannot work without the kernel's privileges.
var errNotRoot = errors.New("needs root")

// asRoot runs f with the privileges that it needs, or says which of them are missing.
func (p *process) asRoot(needs privilege.Set, f func() error) error {
	if p.uid != 0 {
		return &policy.Error{Msg: errNotRoot.Error(), Hint: "run it as root, or as the unit " + needs.Unit, Err: errNotRoot}
	}
	if err := needs.Check(); err != nil {
		return &policy.Error{Msg: err.Error(), Hint: needs.Hint(), Err: err}
	}
	return f()
}
