package leak

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// turn is this process's part of the machine: any number of checks within it share it. Processes have it side by side, or one has it
// alone. Two locks make sure that who wants it alone comes to it: new ones wait at the gate meanwhile.
var turn struct {
	sync.Mutex
	holders       int
	gate, machine *os.File
}

// share waits while another test process has the machine alone. The kernel ends the turn of a process that dies.
func share(dir string) (release func(), err error) {
	turn.Lock()
	defer turn.Unlock()
	if turn.holders == 0 {
		if err := open(dir); err != nil {
			return nil, err
		}
		if err := errors.Join(flock(turn.gate, unix.LOCK_SH), flock(turn.machine, unix.LOCK_SH), flock(turn.gate, unix.LOCK_UN)); err != nil {
			return nil, errors.Join(err, turn.gate.Close(), turn.machine.Close())
		}
	}
	turn.holders++
	return unshare, nil
}

// alone runs f when no other test process has a part of the machine. The caller has one, and loses it for a moment.
func alone(f func()) error {
	turn.Lock()
	defer turn.Unlock()
	for _, step := range []struct {
		file *os.File
		how  int
	}{{turn.machine, unix.LOCK_UN}, {turn.gate, unix.LOCK_EX}, {turn.machine, unix.LOCK_EX}} {
		if err := flock(step.file, step.how); err != nil {
			return err
		}
	}
	f()
	return errors.Join(flock(turn.machine, unix.LOCK_SH), flock(turn.gate, unix.LOCK_UN))
}

func open(dir string) (err error) {
	for name, file := range map[string]**os.File{"sallyport-test.gate": &turn.gate, "sallyport-test.lock": &turn.machine} {
		if *file, err = os.OpenFile(filepath.Join(dir, name), os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600); err != nil {
			return fmt.Errorf("open lock: %w", err)
		}
	}
	return nil
}

func flock(f *os.File, how int) error {
	for {
		err := unix.Flock(int(f.Fd()), how)
		switch err {
		case nil:
			return nil
		case unix.EINTR:
			continue
		}
		return fmt.Errorf("lock %s: %w", f.Name(), err)
	}
}

func unshare() {
	turn.Lock()
	defer turn.Unlock()
	if turn.holders--; turn.holders == 0 {
		_ = turn.machine.Close() // ends the lock
		_ = turn.gate.Close()
	}
}
