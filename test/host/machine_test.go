//go:build package

package host

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The main thread cannot end, and would stay in the network that it was sent to: it takes no part.
func init() { runtime.LockOSThread() }

// patience bounds what the machine takes to get somewhere.
const patience = 2 * time.Minute

// machine is a Debian that was booted in namespaces: its PID 1 is systemd, its files are an overlay that goes with it.
type machine struct {
	t      *testing.T
	leader int    // its PID 1, as seen from here
	shared string // folder here; /srv/shared there
}

// debian gives the files of a bare Debian, which are made once (SALLYPORT_DEBIAN names another folder).
func debian(t *testing.T) string {
	t.Helper()
	root := os.Getenv("SALLYPORT_DEBIAN")
	if root == "" {
		root = "../../.tools/debian"
	}
	root, err := filepath.Abs(root)
	must(t, err)
	if _, err := os.Stat(filepath.Join(root, "sbin/init")); err == nil {
		return root
	}
	cmd := exec.Command("debootstrap", "--variant=minbase", "--include=systemd,systemd-sysv,dbus,iproute2", "bookworm", root+".new", "http://deb.debian.org/debian")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("debootstrap: %v\n%s", err, out)
	}
	must(t, os.Rename(root+".new", root))
	return root
}

func boot(t *testing.T) *machine {
	t.Helper()
	m := &machine{t: t, shared: t.TempDir()}
	must(t, os.Chmod(m.shared, 0o755))
	root := debian(t)
	cmd := exec.Command("systemd-nspawn", "--register=no", "--keep-unit", "--quiet", "--directory="+root, "--machine=sallyport-"+strconv.Itoa(os.Getpid()),
		"--volatile=overlay", "--private-network", "--capability=all", "--system-call-filter=bpf", "--bind="+m.shared+":/srv/shared", "--boot")
	cmd.Env = append(os.Environ(), "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1", "SYSTEMD_NSPAWN_API_VFS_WRITABLE=1")
	log, err := os.Create(filepath.Join(t.TempDir(), "console"))
	must(t, err)
	cmd.Stdout, cmd.Stderr = log, log
	must(t, cmd.Start())
	over := make(chan struct{})
	go func() { _ = cmd.Wait(); close(over) }()
	t.Cleanup(func() { m.end(cmd.Process, over, log) })
	m.eventually("PID 1", func() bool {
		m.leader = descendant(cmd.Process.Pid)
		return m.leader != 0
	})
	m.eventually("systemd", func() bool {
		out, _ := m.try("systemctl", "is-system-running")
		return strings.HasPrefix(out, "running") || strings.HasPrefix(out, "degraded")
	})
	return m
}

// end has the machine power off, and takes its plug out if it does not.
func (m *machine) end(nspawn *os.Process, over chan struct{}, log *os.File) {
	_ = nspawn.Signal(syscall.SIGTERM)
	select {
	case <-over:
	case <-time.After(patience):
		m.t.Error("the machine does not power off")
		if m.leader != 0 {
			_ = unix.Kill(m.leader, unix.SIGKILL)
		}
		_ = nspawn.Kill()
		<-over
	}
	if m.t.Failed() {
		said, _ := os.ReadFile(log.Name())
		m.t.Logf("console:\n%s", said)
	}
	log.Close()
}

// descendant finds a process below this one that is PID 1 in a namespace of its own.
func descendant(pid int) int {
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return 0
	}
	for c := range strings.FieldsSeq(string(children)) {
		child, err := strconv.Atoi(c)
		if err != nil {
			continue
		}
		status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", child))
		for line := range strings.Lines(string(status)) {
			if f := strings.Fields(line); len(f) > 2 && f[0] == "NSpid:" && f[len(f)-1] == "1" && strings.HasPrefix(string(status), "Name:\tsystemd\n") {
				return child
			}
		}
		if found := descendant(child); found != 0 {
			return found
		}
	}
	return 0
}

// try runs a command in the machine, as its root.
func (m *machine) try(args ...string) (string, error) {
	cmd := exec.Command("nsenter", append([]string{"-t", strconv.Itoa(m.leader), "-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w"}, args...)...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive"}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (m *machine) run(args ...string) string {
	m.t.Helper()
	out, err := m.try(args...)
	if err != nil {
		m.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func (m *machine) write(path, text string) {
	m.t.Helper()
	must(m.t, os.WriteFile(filepath.Join(m.shared, "file"), []byte(text), 0o644))
	m.run("install", "-D", "-m", "0644", "/srv/shared/file", path)
}

func (m *machine) eventually(what string, holds func() bool) {
	m.t.Helper()
	for end := time.Now().Add(patience); !holds(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			m.t.Fatalf("%s: does not come about", what)
		}
	}
}

// wire gives the machine an uplink, up0, with a client at its other end that has two addresses.
func (m *machine) wire() {
	m.t.Helper()
	m.run("ip", "netns", "add", "client")
	m.run("ip", "link", "add", "up0", "type", "veth", "peer", "name", "c0", "netns", "client")
	m.run("ip", "address", "add", "10.9.0.1/24", "dev", "up0")
	m.run("ip", "link", "set", "up0", "up")
	for _, a := range []string{backup, stranger} {
		m.run("ip", "-n", "client", "address", "add", a+"/24", "dev", "c0")
	}
	m.run("ip", "-n", "client", "link", "set", "c0", "up")
}

// at calls f on a thread that is in the network of the machine, or of its client. Sockets stay where they were made.
func (m *machine) at(where string, f func() error) error {
	path := fmt.Sprintf("/proc/%d/ns/net", m.leader)
	if where == "client" {
		path = fmt.Sprintf("/proc/%d/root/run/netns/client", m.leader)
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		ns, err := os.Open(path)
		if err == nil {
			err = errors.Join(unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET), ns.Close())
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// dial connects from one of the client's addresses to the service.
func (m *machine) dial(from string) (c net.Conn, err error) {
	err = m.at("client", func() error {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: 5 * time.Second}
		c, err = d.Dial("tcp", service)
		return err
	})
	return c, err
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
