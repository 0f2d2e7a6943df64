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

// ErrBPFFS says that the pin directory is not on a bpffs that the host sees.
var ErrBPFFS = errors.New("no host-visible bpffs")

// CheckBPFFS refuses (ErrBPFFS) a directory that is not below a bpffs, and a bpffs that only this mount
// namespace has: its pins would be gone with the container that mounted it.
func CheckBPFFS(dir string) error {
	parent := dir
	for {
		if _, err := os.Stat(parent); err == nil || parent == "/" {
			break
		}
		parent = filepath.Dir(parent)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(parent, &fs); err != nil {
		return fmt.Errorf("%w: statfs %s: %s", ErrBPFFS, parent, err)
	}
	if uint32(fs.Type) != unix.BPF_FS_MAGIC {
		return fmt.Errorf("%w: %s is not on one: mount it with `mount -t bpf bpf /sys/fs/bpf`", ErrBPFFS, parent)
	}
	var st unix.Stat_t
	if err := unix.Stat(parent, &st); err != nil {
		return fmt.Errorf("%w: stat %s: %s", ErrBPFFS, parent, err)
	}
	f, err := os.Open("/proc/1/mountinfo")
	if err != nil {
		return fmt.Errorf("%w: read the host's mounts: %w: share the host's PID namespace", ErrBPFFS, err)
	}
	defer f.Close()
	device := fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	if !mounted(f, device) {
		return fmt.Errorf("%w: the bpffs at %s is private to this mount namespace: mount the host's /sys/fs/bpf instead",
			ErrBPFFS, parent)
	}
	return nil
}

// mounted looks for a bpf mount of the device (major:minor) in a mountinfo file (proc(5)).
func mounted(mountinfo io.Reader, device string) bool {
	for s := bufio.NewScanner(mountinfo); s.Scan(); {
		before, after, ok := strings.Cut(s.Text(), " - ")
		fields := strings.Fields(before)
		if ok && len(fields) > 2 && fields[2] == device && strings.HasPrefix(after, "bpf ") {
			return true
		}
	}
	return false
}
