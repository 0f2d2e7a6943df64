package lab

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// cgroup is the control group (version 2) whose sockets are the lab's. It is a threaded one below that
// of the test process, so that single threads can go in and out: a socket belongs to the control group
// of the thread that makes it, for as long as it lives. Processes of the lab are born in it.
type cgroup struct {
	dir  string // empty: the machine has no control groups of version 2
	home string // of the test process
}

// newCgroup makes the lab's control group.
func (l *Lab) newCgroup() error {
	home, err := homeCgroup()
	if err != nil || home == "" {
		return err
	}
	dir := filepath.Join(home, filepath.Base(l.Dir))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return fmt.Errorf("make control group: %w", err)
	}
	l.onClose(func() error { return removeCgroup(dir) })
	if err := os.WriteFile(filepath.Join(dir, "cgroup.type"), []byte("threaded"), 0); err != nil {
		return fmt.Errorf("make control group threaded: %w", err)
	}
	l.cgroup = cgroup{dir: dir, home: home}
	return nil
}

// Cgroup is the directory of the control group that every socket of the lab is in: those of its
// processes, and those that Do of the lab or of a namespace makes. Empty: this machine has none.
func (l *Lab) Cgroup() string { return l.cgroup.dir }

// Do runs f on a thread of the lab's control group, on the calling goroutine.
func (l *Lab) Do(f func() error) error { return onThread(func() error { return l.cgroup.do(f) }) }

// do runs f in the control group. The thread is locked.
func (c cgroup) do(f func() error) error {
	if c.dir == "" {
		return f()
	}
	if err := c.move(c.dir); err != nil {
		return err
	}
	defer func() {
		if err := c.move(c.home); err != nil {
			panic(fmt.Sprintf("lab: thread cannot return to its control group: %v", err)) // its sockets would be taken for the lab's
		}
	}()
	return f()
}

func (c cgroup) move(to string) error {
	tid := strconv.Itoa(unix.Gettid())
	if err := os.WriteFile(filepath.Join(to, "cgroup.threads"), []byte(tid), 0); err != nil {
		return fmt.Errorf("move thread to control group: %w", err)
	}
	return nil
}

// homeCgroup is where this process was started, or empty without version 2. It is read once, before any
// lab is there: the kernel shows the control group of the main thread, and that one may be in a lab later.
var homeCgroup = sync.OnceValues(readHome)

func readHome() (string, error) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", fmt.Errorf("read own control group: %w", err)
	}
	for line := range bytes.Lines(b) {
		if path, ok := bytes.CutPrefix(bytes.TrimSpace(line), []byte("0::")); ok {
			mount, err := cgroupMount()
			if mount == "" {
				return "", err
			}
			return filepath.Join(mount, string(path)), nil
		}
	}
	return "", nil
}

// cgroupMount is where version 2 is mounted, or empty.
func cgroupMount() (string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("list mounts: %w", err)
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		before, after, _ := strings.Cut(s.Text(), " - ")
		if fields := strings.Fields(before); len(fields) > 4 && strings.HasPrefix(after, "cgroup2 ") {
			return fields[4], nil
		}
	}
	return "", nil
}

// removeCgroup removes a control group, once the last process in it has been reaped.
func removeCgroup(dir string) error {
	for deadline := time.Now().Add(groupGrace); ; {
		err := os.Remove(dir)
		if err == nil || errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return fmt.Errorf("remove control group: %w; in it are %s", err, threadsIn(dir))
		}
		time.Sleep(time.Millisecond) // between two looks at the condition
	}
}

// threadsIn names the threads that keep a control group busy.
func threadsIn(dir string) string {
	ids, err := os.ReadFile(filepath.Join(dir, "cgroup.threads"))
	if err != nil {
		return err.Error()
	}
	var who []string
	for _, id := range strings.Fields(string(ids)) {
		comm, _ := os.ReadFile(filepath.Join("/proc", id, "comm")) // it may have ended by now
		who = append(who, fmt.Sprintf("%s (%s)", id, bytes.TrimSpace(comm)))
	}
	return "threads " + strings.Join(who, ", ")
}
