package leak

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// turn is this process's turn at the machine: any number of checks within it share one file lock.
var turn struct {
	sync.Mutex
	holders int
	file    *os.File
}

// lock waits until no other test process has its turn. The kernel ends the turn of a process that dies.
func lock(dir string) (release func(), err error) {
	turn.Lock()
	defer turn.Unlock()
	if turn.holders == 0 {
		f, err := os.OpenFile(filepath.Join(dir, "sallyport-test.lock"), os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return nil, fmt.Errorf("open lock: %w", err)
		}
		if err := flock(f); err != nil {
			return nil, err
		}
		turn.file = f
	}
	turn.holders++
	return unlock, nil
}

func flock(f *os.File) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX)
		switch err {
		case nil:
			return nil
		case unix.EINTR:
			continue
		}
		_ = f.Close()
		return fmt.Errorf("lock %s: %w", f.Name(), err)
	}
}

func unlock() {
	turn.Lock()
	defer turn.Unlock()
	if turn.holders--; turn.holders == 0 {
		_ = turn.file.Close() // ends the lock
		turn.file = nil
	}
}
