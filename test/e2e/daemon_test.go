package e2e_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/sallyport-dev/sallyport/test/lab"
)

// startTime bounds the start of a program that was built with the race detector, on a busy machine.
var startTime = bound(30 * time.Second)

// daemon is one of the programs, which the test looks after as a service manager does. Its methods are called by one
// goroutine at a time.
type daemon struct {
	dir  string // of notify sockets
	ns   *lab.Namespace
	name string
	args []string

	runs   []*lab.Process
	proc   *lab.Process // the last of them
	notify *notify
}

// launch starts the program and does not wait.
func (d *daemon) launch() error {
	n, err := listenNotify(filepath.Join(d.dir, "notify-"+ulid.Make().String()))
	if err != nil {
		return err
	}
	cmd := exec.Command(d.name, d.args...)
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+n.path)
	if d.proc, err = d.ns.Start(cmd); err != nil {
		return errors.Join(err, n.close())
	}
	d.runs, d.notify = append(d.runs, d.proc), n
	go func(p *lab.Process) { // the socket lasts as long as the program
		<-p.Exited()
		n.close()
	}(d.proc)
	return nil
}

// wait returns when the program has said that it is ready.
func (d *daemon) wait() error { return d.waitFor(startTime) }

func (d *daemon) waitFor(bound time.Duration) error {
	select {
	case <-d.notify.ready:
		return nil
	case <-d.proc.Exited():
		return fmt.Errorf("%s ended before it was ready:\n%s", filepath.Base(d.name), d.proc.Output())
	case <-time.After(bound):
		return fmt.Errorf("%s is not ready after %v:\n%s", filepath.Base(d.name), bound, d.proc.Output())
	}
}

func (d *daemon) start(t *testing.T) {
	t.Helper()
	must(t, d.launch())
	must(t, d.wait())
}

// kill is SIGKILL.
func (d *daemon) kill(t *testing.T) {
	t.Helper()
	must(t, d.proc.Kill())
}

// stop is SIGTERM. The program must end by itself, without an error.
func (d *daemon) stop(t *testing.T) {
	t.Helper()
	if err := d.proc.Stop(startTime); err != nil {
		t.Fatalf("stop %s: %v\n%s", filepath.Base(d.name), err, d.proc.Output())
	}
}

// notify is the service manager's end of sd_notify(3), for one run of a program.
type notify struct {
	path  string
	conn  *net.UnixConn
	ready chan struct{} // closed by READY=1
	once  sync.Once
}

// listenNotify opens the socket to the proxy's user, too.
func listenNotify(path string) (*notify, error) {
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return nil, fmt.Errorf("listen for readiness: %w", err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	n := &notify{path: path, conn: conn, ready: make(chan struct{})}
	go n.read()
	return n, nil
}

func (n *notify) read() {
	buf := make([]byte, 4096)
	for {
		size, err := n.conn.Read(buf)
		if err != nil {
			return // closed
		}
		for line := range strings.Lines(string(buf[:size])) {
			if strings.TrimSpace(line) == "READY=1" {
				n.once.Do(func() { close(n.ready) })
			}
		}
	}
}

func (n *notify) close() error { return n.conn.Close() }

// isReady says whether READY=1 has come.
func (n *notify) isReady() bool {
	select {
	case <-n.ready:
		return true
	default:
		return false
	}
}
