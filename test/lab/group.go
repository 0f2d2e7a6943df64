package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Group is a control group below the lab's, as that of one workload on the machine.
type Group struct {
	// Dir is its directory.
	Dir    string
	inside cgroup
}

// NewGroup makes one. Close of the Lab removes it.
func (l *Lab) NewGroup(name string) (*Group, error) {
	if l.cgroup.dir == "" {
		return nil, errors.New("make control group: this machine has none of version 2")
	}
	dir := filepath.Join(l.cgroup.dir, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make control group: %w", err)
	}
	l.onClose(func() error { return removeCgroup(dir) })
	if err := os.WriteFile(filepath.Join(dir, "cgroup.type"), []byte("threaded"), 0); err != nil {
		return nil, fmt.Errorf("make control group threaded: %w", err)
	}
	return &Group{Dir: dir, inside: cgroup{dir: dir, home: l.cgroup.dir}}, nil
}

// ID is the kernel's number of it.
func (g *Group) ID() (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(g.Dir, &st); err != nil {
		return 0, fmt.Errorf("read control group: %w", err)
	}
	return st.Ino, nil
}

// Do runs f inside the namespace and the group, on the calling goroutine. Sockets that f opens are of the group for as long as
// they live, and processes that f starts are born in it.
func (g *Group) Do(n *Namespace, f func() error) error {
	return n.Do(func() error { return g.inside.do(f) })
}

// Start runs cmd inside the namespace and the group, else as Start of the namespace does.
func (g *Group) Start(n *Namespace, cmd *exec.Cmd) (*Process, error) {
	return n.start(cmd, func(f func() error) error { return g.Do(n, f) })
}
