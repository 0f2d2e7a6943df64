//go:build k8s

package k8s

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
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

const (
	roleEnv = "SALLYPORT_K8S_NODE"
	cgroups = "/sys/fs/cgroup"
	// prefix of all names that outlive a test that is killed: the next one removes them.
	prefix = "sallyport-k8s-"
)

// node is a machine of the cluster: a process with mounts, processes, network and control groups of its own, in whose place everything of
// the node runs. When it ends, the kernel ends all of it.
type node struct {
	t    *testing.T
	name string
	dir  string // with the node's own /run, /var/lib and the rest
	ip   string
	ip6  string
	pods string // prefix of pods' addresses: 10.96.1
	net6 string // and of those of version 6: fd96:0:0:1
	pid  int
}

// TestMain is also the first process of a node.
func TestMain(m *testing.M) {
	if text := os.Getenv(roleEnv); text != "" {
		fmt.Fprintln(os.Stderr, beNode(text))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// podGroups is where a node has the version 2 control groups of its own: kubelet's, by the names that they have on a machine.
const podGroups = "/run/cgroup"

// place is where a node has what machines have one of.
type place struct{ Name, Dir, Cgroup string }

// beNode runs as the first process of the node's namespaces, and reaps.
func beNode(text string) error {
	var p place
	if err := json.Unmarshal([]byte(text), &p); err != nil {
		return err
	}
	if err := p.mount(); err != nil {
		return err
	}
	if err := errors.Join(unix.Sethostname([]byte(p.Name)), os.WriteFile(filepath.Join(p.Dir, "up"), nil, 0o644)); err != nil {
		return err
	}
	for {
		if _, err := syscall.Wait4(-1, nil, 0, nil); errors.Is(err, syscall.ECHILD) {
			time.Sleep(50 * time.Millisecond) // nothing to reap
		}
	}
}

// mount gives the node what it must not share with the machine, and shares mounts with its own containers.
func (p place) mount() error {
	type step struct {
		source, target, kind string
		flags                uintptr
	}
	steps := []step{
		{"", "/", "", unix.MS_REC | unix.MS_PRIVATE},
		{"proc", "/proc", "proc", 0},
		{"bpf", "/sys/fs/bpf", "bpf", 0},
		{filepath.Join(p.Dir, "machine-id"), "/etc/machine-id", "", unix.MS_BIND},
		{filepath.Join(p.Dir, "log"), "/var/log", "", unix.MS_BIND},
		{filepath.Join(p.Dir, "lib"), "/var/lib", "", unix.MS_BIND},
		{filepath.Join(p.Dir, "run"), "/run", "", unix.MS_BIND},
		{p.Cgroup, podGroups, "", unix.MS_BIND},
		{"", "/", "", unix.MS_REC | unix.MS_SHARED},
	}
	for _, s := range steps {
		if err := unix.Mount(s.source, s.target, s.kind, s.flags, ""); err != nil {
			return fmt.Errorf("mount %s at %s: %w", s.source, s.target, err)
		}
	}
	return nil
}

func startNode(t *testing.T, dir string, number int) *node {
	name := fmt.Sprintf("node-%d", number)
	n := &node{t: t, name: name, dir: filepath.Join(dir, name), ip: fmt.Sprintf("10.98.0.%d", number), ip6: fmt.Sprintf("fd98::%d", number),
		pods: fmt.Sprintf("10.96.%d", number), net6: fmt.Sprintf("fd96:0:0:%d", number)}
	for _, d := range []string{"run/netns", "run/cgroup", "lib/kubelet", "log/pods", "cni"} {
		must(t, os.MkdirAll(filepath.Join(n.dir, d), 0o755))
	}
	must(t, os.WriteFile(filepath.Join(n.dir, "machine-id"), []byte(fmt.Sprintf("%032x\n", []byte(name))[:33]), 0o444))
	n.makeCgroups()
	text, err := json.Marshal(place{Name: name, Dir: n.dir, Cgroup: filepath.Join(cgroups, "unified", prefix+name)})
	must(t, err)
	self, err := os.Executable()
	must(t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), roleEnv+"="+string(text))
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWUTS}
	n.start("node", cmd)
	n.pid = cmd.Process.Pid
	eventually(t, 10*time.Second, name+" is up", func() error { _, err := os.Stat(filepath.Join(n.dir, "up")); return err })
	return n
}

// start has a thread of its own start the command and wait for it: the command dies with that thread, and so with the test.
func (n *node) start(name string, cmd *exec.Cmd) (ended <-chan struct{}) {
	n.t.Helper()
	log, err := os.Create(filepath.Join(n.dir, name+".log"))
	must(n.t, err)
	cmd.Stdout, cmd.Stderr = log, log
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	started, done := make(chan error, 1), make(chan struct{})
	go func() {
		runtime.LockOSThread()
		defer close(done)
		defer log.Close()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // whoever misses it says so
		}
	}()
	must(n.t, <-started)
	return done
}

// inside is a command of the node.
func (n *node) inside(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "nsenter", append([]string{"--target", strconv.Itoa(n.pid), "--mount", "--net", "--pid", "--uts", "--"}, args...)...)
}

// daemon runs until the node ends.
func (n *node) daemon(name string, args ...string) {
	n.t.Helper()
	n.start(name, n.inside(context.Background(), args...))
}

// run runs a command of the node to its end.
func (n *node) run(args ...string) string {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := n.inside(ctx, args...).CombinedOutput()
	if err != nil {
		n.t.Fatalf("%s: %s: %v\n%s", n.name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// kill ends the processes of the node, and of its pods, whose command lines begin so, and waits until they are gone.
func (n *node) kill(command string) {
	n.t.Helper()
	pattern := "^" + command
	n.run("sh", "-c", `kill -9 $(pgrep -f "$1")`, "sh", pattern)
	eventually(n.t, 20*time.Second, command+" is gone", func() error {
		out, err := n.inside(context.Background(), "pgrep", "-f", pattern).Output()
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.ExitCode() == 1 {
			return nil
		}
		return fmt.Errorf("it runs: %s (%v)", out, err)
	})
}

// log is the end of what a daemon wrote.
func (n *node) log(name string) string {
	data, _ := os.ReadFile(filepath.Join(n.dir, name+".log"))
	return string(data[max(0, len(data)-4000):])
}

// makeCgroups makes the node's root in each hierarchy of version 1, and in version 2.
func (n *node) makeCgroups() {
	all, err := filepath.Glob(cgroups + "/*")
	must(n.t, err)
	for _, h := range all {
		if info, err := os.Lstat(h); err != nil || !info.IsDir() {
			continue
		}
		dir := filepath.Join(h, prefix+n.name)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			n.t.Fatal(err)
		}
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			if data, err := os.ReadFile(filepath.Join(h, file)); err == nil {
				must(n.t, os.WriteFile(filepath.Join(dir, file), data, 0o644))
			}
		}
	}
}

// end kills the node's first process, with which all others end, and removes what is not theirs.
func (n *node) end() error {
	if err := syscall.Kill(n.pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	return removeCgroups(prefix + n.name)
}

// removeCgroups waits for the kernel to be done with the processes in them.
func removeCgroups(name string) error {
	var last error
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		roots, _ := filepath.Glob(filepath.Join(cgroups, "*", name)) // the pattern is right
		if last = nil; len(roots) == 0 {
			return nil
		}
		for _, root := range roots {
			last = errors.Join(last, removeTree(root))
		}
	}
	return last
}

func removeTree(dir string) error {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil // what goes meanwhile is gone
	})
	for i := len(dirs) - 1; i >= 0; i-- {
		if e := os.Remove(dirs[i]); !errors.Is(e, fs.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}
	return err
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually asks until the answer is nil.
func eventually(t *testing.T, within time.Duration, what string, ask func() error) {
	t.Helper()
	if err := patiently(within, ask); err != nil {
		t.Fatalf("not in %s: %s: %v", within, what, err)
	}
}

// patiently gives the last answer where none was nil.
func patiently(within time.Duration, ask func() error) (err error) {
	for deadline := time.Now().Add(within); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if err = ask(); err == nil {
			return nil
		}
	}
	return err
}
