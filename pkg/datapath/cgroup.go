package datapath

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrCgroup says that there is no control group (version 2) to attach the backstop to.
var ErrCgroup = errors.New("no cgroup v2")

// rootCgroupID is the number of the root of the hierarchy, whatever is mounted where.
const rootCgroupID = 1

// FindCgroup finds where the root of the cgroup v2 hierarchy is mounted: /sys/fs/cgroup, or
// /sys/fs/cgroup/unified on hosts that mount version 1 too. The error wraps ErrCgroup.
func FindCgroup() (string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("%w: read mounts: %w", ErrCgroup, err)
	}
	defer f.Close()
	var inner []string
	for _, point := range cgroupMounts(f) {
		if id, err := cgroupID(point); err == nil && id == rootCgroupID {
			return point, nil
		}
		inner = append(inner, point)
	}
	if len(inner) > 0 {
		return "", fmt.Errorf("%w: what is mounted at %s is a part of the hierarchy, not its root", ErrCgroup, strings.Join(inner, ", "))
	}
	return "", fmt.Errorf("%w is mounted", ErrCgroup)
}

// CheckCgroup tells whether a directory is a control group that the backstop can be attached to. The
// error wraps ErrCgroup.
func CheckCgroup(dir string) error {
	_, err := cgroupID(dir)
	return err
}

// OwnCgroup is the directory of this process's control group.
func OwnCgroup() (string, error) {
	root, err := FindCgroup()
	if err != nil {
		return "", err
	}
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", fmt.Errorf("%w: read own control group: %w", ErrCgroup, err)
	}
	for line := range strings.Lines(string(b)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			return filepath.Join(root, path), nil
		}
	}
	return "", fmt.Errorf("%w: this process is in none", ErrCgroup)
}

// cgroupMounts lists the mount points of cgroup v2 in a mountinfo file (proc(5)).
func cgroupMounts(mountinfo io.Reader) []string {
	var points []string
	for s := bufio.NewScanner(mountinfo); s.Scan(); {
		before, after, ok := strings.Cut(s.Text(), " - ")
		fields := strings.Fields(before)
		if ok && len(fields) > 4 && strings.HasPrefix(after, "cgroup2 ") {
			points = append(points, fields[4])
		}
	}
	return points
}

// cgroupID is the kernel's number of a control group: the inode of its directory.
func cgroupID(dir string) (uint64, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return 0, fmt.Errorf("%w at %s: %w", ErrCgroup, dir, err)
	}
	if fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return 0, fmt.Errorf("%w at %s: another file system is there", ErrCgroup, dir)
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return 0, fmt.Errorf("%w at %s: %w", ErrCgroup, dir, err)
	}
	return st.Ino, nil
}
