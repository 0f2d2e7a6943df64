package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"golang.org/x/sys/unix"
)

// makeCgroup gives the demo a control group of its own, so that its agent watches the demo's sockets and
// no others of the machine. It is a threaded one: the threads of the demo's namespaces go in, and the
// processes and sockets that they make are born there.
func (w *demoWorld) makeCgroup() error {
	home, err := datapath.OwnCgroup()
	if err != nil {
		return fmt.Errorf("make control group: %w", err)
	}
	dir := filepath.Join(home, filepath.Base(w.dir))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return fmt.Errorf("make control group: %w", err)
	}
	w.cgroup = dir
	if err := os.WriteFile(filepath.Join(dir, "cgroup.type"), []byte("threaded"), 0); err != nil {
		return fmt.Errorf("make control group threaded: %w", err)
	}
	return nil
}

// joinCgroup moves the calling thread.
func joinCgroup(dir string) error {
	tid := strconv.Itoa(unix.Gettid())
	if err := os.WriteFile(filepath.Join(dir, "cgroup.threads"), []byte(tid), 0); err != nil {
		return fmt.Errorf("move thread to control group: %w", err)
	}
	return nil
}

// leaveCgroup moves the calling thread out again: the main thread lasts as long as the process. What
// fails here is told by removeCgroup.
func leaveCgroup(dir string) { _ = joinCgroup(filepath.Dir(dir)) }

// removeCgroup waits for the last thread and process to be gone.
func (w *demoWorld) removeCgroup() error {
	if w.cgroup == "" {
		return nil
	}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		err := os.Remove(w.cgroup)
		if err == nil || errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return fmt.Errorf("remove control group: %w", err)
		}
	}
}
