package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// demoProcess is a program, running in the node's namespace.
type demoProcess struct {
	name   string
	cmd    *exec.Cmd
	output *os.File
	done   chan struct{} // closed when it has ended
}

// start runs a binary next to this one, and returns when it says READY=1 (sd_notify(3)). Its
// notifications are read as long as it lives.
func (w *demoWorld) start(ctx context.Context, name string, args ...string) (*demoProcess, error) {
	socket := filepath.Join(w.dir, fmt.Sprintf("notify-%d", len(w.processes)))
	notifications, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return nil, fmt.Errorf("listen for readiness: %w", err)
	}
	if err := os.Chmod(socket, 0o666); err != nil { // the proxy is not root
		return nil, errors.Join(fmt.Errorf("open socket to users: %w", err), notifications.Close())
	}
	p, err := w.spawn(name, socket, exec.Command(filepath.Join(w.bin, name), args...))
	if err != nil {
		return nil, errors.Join(err, notifications.Close())
	}
	ready := make(chan struct{})
	go p.listen(notifications, sync.OnceFunc(func() { close(ready) }))
	select {
	case <-ready:
		return p, nil
	case <-p.done:
		return p, fmt.Errorf("%s ended before it was ready: %s", name, p.cmd.ProcessState)
	case <-ctx.Done():
		return p, fmt.Errorf("%s did not become ready: %w", name, ctx.Err())
	}
}

// listen reads notifications until the process ends.
func (p *demoProcess) listen(notifications *net.UnixConn, ready func()) {
	go func() {
		<-p.done
		_ = notifications.Close() // ends the reading
	}()
	buf := make([]byte, 4096)
	for {
		n, err := notifications.Read(buf)
		if err != nil {
			return
		}
		if slices.Contains(strings.Fields(string(buf[:n])), "READY=1") {
			ready()
		}
	}
}

// spawn starts a program in the node's namespace.
func (w *demoWorld) spawn(name, notify string, cmd *exec.Cmd) (*demoProcess, error) {
	output, err := os.Create(filepath.Join(w.dir, fmt.Sprintf("%s-%d.log", name, len(w.processes))))
	if err != nil {
		return nil, fmt.Errorf("make log: %w", err)
	}
	p := &demoProcess{name: name, cmd: cmd, output: output, done: make(chan struct{})}
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
