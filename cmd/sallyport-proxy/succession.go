package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/proxy"
)

// succession is how one run takes the place of another: SIGHUP has a proxy start the program that is on disk now, in px and confined
// as it is itself, and hand its listeners on to it. When the new one is ready, the old one takes no more connections and ends with
// its last. Nobody is reset, and no SYN is lost: the listeners stay what they are.
type succession struct {
	env   environment
	path  string // of the configuration, for messages
	data  []byte // the configuration, which the proxy's user need not be able to read
	after int    // how many listeners this run gets from the one before
	log   *slog.Logger
}

// Descriptors of the new run, as exec numbers what it is given: configuration, the one to say ready by, listeners.
const (
	configFD = 3 + iota
	readyFD
	listenFD
)

// inherit gives the listeners of the run before; nil where there was none.
func (s succession) inherit() (all []*net.TCPListener, err error) {
	for i := range s.after {
		f := os.NewFile(uintptr(listenFD+i), "listener")
		l, err := net.FileListener(f)
		if err = errors.Join(err, f.Close()); err != nil {
			return nil, fmt.Errorf("take over listener %d: %w", i, err)
		}
		tcp, ok := l.(*net.TCPListener)
		if !ok {
			return nil, fmt.Errorf("take over listener %d: it is one of %s", i, l.Addr().Network())
		}
		all = append(all, tcp)
	}
	return all, nil
}

// ready tells who has to know: the run before, which tells the service manager, or the service manager.
func (s succession) ready(notify notifier) {
	if s.after == 0 {
		notify.send("READY=1")
		return
	}
	f := os.NewFile(readyFD, "ready")
	if _, err := f.Write([]byte("ready")); err != nil {
		s.log.Error("tell the proxy before", "error", err)
	}
	f.Close()
}

// await hands over at SIGHUP. A new run that does not come up changes nothing.
func (s succession) await(ctx context.Context, p *proxy.Proxy, notify notifier) error {
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGHUP)
	defer signal.Stop(asked)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-asked:
		}
		pid, err := s.handOn(ctx, p)
		if err != nil {
			s.log.Error("another run was to take over; this one goes on", "error", err)
			continue
		}
		s.log.Info("another run has taken over; this one ends with its last connection", "pid", pid)
		notify.send("MAINPID=" + strconv.Itoa(pid) + "\nREADY=1")
		p.Leave()
	}
}

// handOn starts the new run and waits until it is ready.
func (s succession) handOn(ctx context.Context, p *proxy.Proxy) (pid int, err error) {
	listeners, err := p.Files()
	if err != nil {
		return 0, err
	}
	defer closeAll(listeners)
	fd, err := handOver(s.data)
	if err != nil {
		return 0, err
	}
	unix.CloseOnExec(fd) // the new run gets a descriptor of its own
	config := os.NewFile(uintptr(fd), "sallyport-config")
	defer config.Close()
	heard, told, err := os.Pipe()
	if err != nil {
		return 0, fmt.Errorf("hand over: %w", err)
	}
	defer heard.Close()
	cmd := exec.Command(s.env.args[0], "--config", s.path, "--inside-fd", strconv.Itoa(configFD), "--after", strconv.Itoa(len(listeners)))
	cmd.Args[0] = s.env.args[0]
	cmd.Env, cmd.Stdout, cmd.Stderr = s.env.vars, os.Stdout, os.Stderr
	cmd.ExtraFiles = append([]*os.File{config, told}, listeners...)
	err = cmd.Start()
	told.Close()
	if err != nil {
		return 0, fmt.Errorf("hand over: %w", err)
	}
	go func() { _ = cmd.Wait() }() // nobody else knows this child, and it may end first
	stop := context.AfterFunc(ctx, func() { heard.Close() })
	defer stop()
	if said, err := io.ReadAll(heard); err != nil || string(said) != "ready" {
		return 0, errors.Join(fmt.Errorf("hand over: process %d ended, or was not ready; its log says why", cmd.Process.Pid), cmd.Process.Kill())
	}
	return cmd.Process.Pid, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
