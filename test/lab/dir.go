package lab

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const dirName = "sallyport-lab-"

func dirPrefix(pid int) string { return fmt.Sprintf("%s%d-", dirName, pid) }

// MountBPFFS mounts a fresh bpffs in the lab's directory, visible to the host's mount namespace
// and to every process of the lab. Calls after the first return the same mount.
func (l *Lab) MountBPFFS() (string, error) {
	dir := filepath.Join(l.Dir, "bpf")
	if err := os.Mkdir(dir, 0o700); errors.Is(err, fs.ErrExist) {
		return dir, nil
	} else if err != nil {
		return "", fmt.Errorf("make mount point: %w", err)
	}
	if err := unix.Mount("bpffs", dir, "bpf", 0, ""); err != nil {
		return "", fmt.Errorf("mount bpffs on %s: %w", dir, err)
	}
	return dir, nil
}

// removeDir unmounts everything below dir, the deepest first, and removes dir. Network namespaces that are kept there end.
func removeDir(dir string) error {
	mounts, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	for _, m := range slices.Backward(mounts) {
		if m.kind == "nsfs" {
			if err := unhookKept(m.path); err != nil {
				return fmt.Errorf("unhook %s: %w", m.path, err)
			}
		}
		if err := unix.Unmount(m.path, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", m.path, err)
		}
	}
	return os.RemoveAll(dir)
}

// mount is one mount point.
type mount struct{ path, kind string }

// mountsBelow lists mount points at or below dir in the order in which they were mounted.
func mountsBelow(dir string) ([]mount, error) {
	f, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	defer f.Close()
	var found []mount
	for s := bufio.NewScanner(f); s.Scan(); {
		fields := strings.Fields(s.Text())
		if len(fields) < 5 {
			continue
		}
		kind := slices.Index(fields, "-") + 1 // after the optional fields, see proc_pid_mountinfo(5)
		if p := fields[4]; p == dir || strings.HasPrefix(p, dir+"/") {
			found = append(found, mount{path: p, kind: fields[kind]})
		}
	}
	return found, nil
}

// sweep removes what labs of killed test processes left below tmp, and their control groups. Whatever it
// cannot remove stays.
func sweep(tmp string) {
	for _, d := range ofTheDead(tmp) {
		_ = removeDir(d) // hygiene: another test process may be sweeping as well
	}
	if home, err := homeCgroup(); err == nil && home != "" {
		for _, d := range ofTheDead(home) {
			_ = os.Remove(d)
		}
	}
}

// ofTheDead lists directories of labs whose process is no more.
func ofTheDead(parent string) []string {
	dirs, err := filepath.Glob(filepath.Join(parent, dirName+"*"))
	if err != nil {
		return nil
	}
	return slices.DeleteFunc(dirs, func(d string) bool {
		pid, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(d), dirName), "-")
		n, err := strconv.Atoi(pid)
		return err != nil || unix.Kill(n, 0) != unix.ESRCH
	})
}
