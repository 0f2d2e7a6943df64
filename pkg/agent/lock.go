package agent

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrRunning says that another agent holds the node's lock.
var ErrRunning = errors.New("another sallyport-agent is running")

// lock is the node's lock file: its holder alone writes tables and grants. The kernel lets go of it when the holder
// dies; the file stays, for a file that is removed could be locked twice.
type lock struct{ file *os.File }

// takeLock takes the lock at path and writes the holder's pid into it. The error wraps ErrRunning if it is held.
func takeLock(path string) (*lock, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w (pid %s, lock %s)", ErrRunning, holder(path), path)
		}
		return nil, fmt.Errorf("take lock %s: %w", path, err)
	}
	if err := writePid(f); err != nil {
		f.Close()
		return nil, fmt.Errorf("write lock %s: %w", path, err)
	}
	return &lock{file: f}, nil
}

func (l *lock) release() error { return l.file.Close() }

func writePid(f *os.File) error {
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err := f.WriteAt(fmt.Appendf(nil, "%d\n", os.Getpid()), 0)
	return err
}

func holder(path string) string {
	data, err := os.ReadFile(path)
	if pid := strings.TrimSpace(string(data)); err == nil && pid != "" {
		return pid
	}
	return "unknown"
}
