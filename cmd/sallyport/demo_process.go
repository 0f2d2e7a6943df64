package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// demoProcess is one of the binaries, running in the node's namespace.
type demoProcess struct {
	name   string
	cmd    *exec.Cmd
	output *os.File
	done   chan struct{} // closed when it has ended
}

// start runs a binary next to this one, and returns when it says READY=1 (sd_notify(3)).
func (w *demoWorld) start(ctx context.Context, name string, args ...string) (*demoProcess, error) {
	socket := filepath.Join(w.dir, fmt.Sprintf("notify-%d", len(w.processes)))
	ready, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return nil, fmt.Errorf("listen for readiness: %w", err)
	}
	defer os.Remove(socket)
	defer ready.Close()
	if err := os.Chmod(socket, 0o666); err != nil { // the proxy is not root
		return nil, fmt.Errorf("open socket to users: %w", err)
	}
	p, err := w.spawn(name, socket, args)
	if err != nil {
		return nil, err
	}
	return p, p.awaitReady(ctx, ready)
}

func (w *demoWorld) spawn(name, notify string, args []string) (*demoProcess, error) {
	output, err := os.Create(filepath.Join(w.dir, fmt.Sprintf("%s-%d.log", name, len(w.processes))))
	if err != nil {
		return nil, fmt.Errorf("make log: %w", err)
	}
	p := &demoProcess{name: name, output: output, done: make(chan struct{})}
	p.cmd = exec.Command(filepath.Join(w.bin, name), args...)
	p.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+notify)
	p.cmd.Stdout, p.cmd.Stderr = output, output
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := w.node.do(p.cmd.Start); err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", name, err), output.Close())
	}
	w.processes = append(w.processes, p)
	go func() {
		_ = p.cmd.Wait() // how it ended is seen in its log
		close(p.done)
	}()
	return p, nil
}

// awaitReady reads notifications until one says READY=1, the process ends or ctx does.
func (p *demoProcess) awaitReady(ctx context.Context, ready *net.UnixConn) error {
	stop := context.AfterFunc(ctx, func() { _ = ready.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	go func() {
		<-p.done
		_ = ready.SetReadDeadline(time.Unix(1, 0)) // after Close this does nothing
	}()
	buf := make([]byte, 4096)
	for {
		n, err := ready.Read(buf)
		if err != nil {
			return fmt.Errorf("%s did not become ready: %w", p.name, err)
		}
		for line := range bytes.Lines(buf[:n]) {
			if bytes.Equal(bytes.TrimSpace(line), []byte("READY=1")) {
				return nil
			}
		}
	}
}

// kill ends it at once, as the kernel would under memory pressure.
func (p *demoProcess) kill() error {
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill %s: %w", p.name, err)
	}
	<-p.done
	return nil
}

// stop asks it to end, and kills it when it takes too long.
func (p *demoProcess) stop() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(5 * time.Second):
		return p.kill()
	}
}

// showLogs writes the end of what each process wrote.
func (w *demoWorld) showLogs(out io.Writer) {
	for _, l := range w.logs {
		fmt.Fprintf(out, "--- %s ---\n%s\n", l.name, escapeLines(l.tail))
	}
}

type demoLog struct{ name, tail string }

const logTail = 4096

func (p *demoProcess) log() demoLog {
	data, err := os.ReadFile(p.output.Name())
	if err != nil {
		data = []byte(err.Error())
	}
	return demoLog{filepath.Base(p.output.Name()), string(data[max(0, len(data)-logTail):])}
}
