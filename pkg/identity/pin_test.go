package identity

import (
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/devauthority"
)

func pidText(cmd *exec.Cmd) string { return strconv.Itoa(cmd.Process.Pid) }

func TestPin(t *testing.T) {
	t.Parallel()
	cmd := sleeper(t, "")
	p, err := NewPin(int32(cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if err := p.Check(); err != nil {
		// The shell may have become sleep since; that is all that it may be.
		if !errors.Is(err, ErrBecameAnother) || p.Renew() != nil {
			t.Fatal(err)
		}
	}
	select {
	case <-p.Ended():
		t.Fatal("ended while it lives")
	default:
	}
	cmd.Process.Kill()
	<-p.Ended() // though nobody has waited for it: a zombie keeps its number
	if err := p.Check(); !errors.Is(err, ErrEnded) {
		t.Errorf("check: %v", err)
	}
	cmd.Wait()
	if _, err := NewPin(int32(cmd.Process.Pid)); !errors.Is(err, ErrEnded) {
		t.Errorf("pin of who is gone: %v", err)
	}
	for _, pid := range []int32{0, -1} {
		if _, err := NewPin(pid); err == nil {
			t.Errorf("pinned %d", pid)
		}
	}
}

func TestClosedPinEnds(t *testing.T) {
	t.Parallel()
	p, err := NewPin(int32(os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	p.Close()
	<-p.Ended()
	if p.Check() == nil {
		t.Error("a closed pin checks")
	}
}

func TestStartTime(t *testing.T) {
	t.Parallel()
	stat := "7 (a) b (c) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4242 0 0"
	if got := startTime(stat); got != "4242" {
		t.Errorf("got %q", got)
	}
	if got := startTime("7 (x) S 1"); got != "" {
		t.Errorf("got %q of half a line", got)
	}
}

// inside is set in the process that has a PID namespace of its own.
const inside = "SALLYPORT_TEST_OWN_PIDS"

// TestNumberUsedAgain attacks a watch by the kernel's own reuse of numbers: the process that was asked about ends
// while its broker has not answered, and another, with an identity of its own, gets the number. It runs in a PID
// namespace of its own, where the next number can be chosen and nobody else takes it.
func TestNumberUsedAgain(t *testing.T) {
	if os.Getenv(inside) == "" {
		t.Parallel()
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestNumberUsedAgain$", "-test.v", "-test.parallel=1")
		cmd.Env = append(os.Environ(), inside+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
		out, err := cmd.CombinedOutput()
		if strings.Contains(string(out), "this kernel ") {
			t.Skipf("this kernel cannot choose numbers of processes:\n%s", out)
		}
		if err != nil || strings.Count(string(out), "the number was used again") != 2 {
			t.Fatalf("%v\nhint: run as root\n%s", err, out)
		}
		return
	}
	ownProc(t)
	eachBroker(t, time.Hour, func(t *testing.T, o *office) {
		group := newGroup(t, cgroups(t))
		o.authority.SetEntries(devauthority.Entry{ID: db, Cgroup: "/" + filepath.Base(group)})
		o.until(Fresh)
		victim := sleeper(t, "")
		pid := victim.Process.Pid
		pinned, err := NewPin(int32(pid))
		if err != nil {
			t.Fatal(err)
		}
		defer pinned.Close()

		asked, answer := o.stall(t)
		n := watching(t, o, process(victim))
		<-asked
		victim.Process.Kill()
		victim.Wait()
		thief := startAs(t, pid)
		join(t, group, thief)
		t.Logf("the number was used again: %d", pid)
		answer()
		n.ended()
		if len(n.ever) > 0 {
			t.Errorf("told %v, who came later", n.ever)
		}
		if err := pinned.Check(); !errors.Is(err, ErrEnded) {
			t.Errorf("the pin of the first says %v of the second", err)
		}
		watching(t, o, process(thief)).until(Fresh, db)
	})
}

// ownProc shows the processes of this PID namespace at /proc, in this mount namespace.
func ownProc(t *testing.T) {
	t.Helper()
	err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	if err == nil {
		err = unix.Mount("proc", "/proc", "proc", 0, "")
	}
	if err != nil {
		t.Fatal(err)
	}
}

// stall puts a socket in front of the broker that hands nothing on before answer is called.
func (o *office) stall(t *testing.T) (asked <-chan struct{}, answer func()) {
	t.Helper()
	o.served = o.path + ".real"
	o.start(o.serveBroker)
	l, err := net.Listen("unix", o.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	came, open := make(chan struct{}), make(chan struct{})
	go func() {
		for first := true; ; first = false {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if first {
				close(came)
			}
			go o.pass(c, open)
		}
	}()
	return came, func() { close(open) }
}

func (o *office) pass(c net.Conn, open <-chan struct{}) {
	defer c.Close()
	<-open
	to, err := net.Dial("unix", o.served)
	if err != nil {
		return
	}
	defer to.Close()
	go io.Copy(to, c)
	io.Copy(c, to)
}

// startAs starts a process that gets the number.
func startAs(t *testing.T, pid int) *exec.Cmd {
	t.Helper()
	for {
		err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(pid-1)), 0o600)
		if errors.Is(err, os.ErrNotExist) {
			t.Skip("this kernel does not let the next number of a process be chosen (CONFIG_CHECKPOINT_RESTORE)")
		}
		if err != nil {
			t.Fatal(err)
		}
		cmd := sleeper(t, "")
		if cmd.Process.Pid == pid {
			return cmd
		}
		cmd.Process.Kill() // a thread was faster
		cmd.Wait()
	}
}
