package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// guardGrace is how long no guard may be seen before that is a problem: one that is started anew is no news.
const guardGrace = 5 * time.Second

var errNoGuard = errors.New("no guard runs: should this agent die, the hooks hold by their pins alone (`systemctl start sallyport-guard`)")

// guardMark is how a guard is seen: it holds a lock on a file of the agent's for as long as it lives. The file is only
// read, so that the guard needs to write nothing.
type guardMark struct {
	path string
	file *os.File // nil: not held
}

// Run takes the lock as soon as there is the file, and again should somebody have made the file anew, until ctx ends. What
// goes wrong is told: the links are held all the same.
func (m *guardMark) Run(ctx context.Context, log *slog.Logger) {
	look := time.NewTicker(time.Second)
	defer look.Stop()
	defer m.release()
	var told string
	for {
		if err := m.take(); err != nil && err.Error() != told {
			told = err.Error()
			log.Warn("the agent cannot see this guard", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-look.C:
		}
	}
}

// take holds the file that has the name now. One that is not there is no error: no agent has run yet.
func (m *guardMark) take() error {
	if m.isHeld() {
		return nil
	}
	m.release()
	f, err := os.OpenFile(m.path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open guard's mark: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil // the agent looks, right now
		}
		return fmt.Errorf("lock guard's mark: %w", err)
	}
	m.file = f
	return nil
}

func (m *guardMark) isHeld() bool {
	if m.file == nil {
		return false
	}
	ours, err := m.file.Stat()
	if err != nil {
		return false
	}
	named, err := os.Lstat(m.path)
	return err == nil && os.SameFile(ours, named)
}

func (m *guardMark) release() {
	if m.file != nil {
		m.file.Close()
		m.file = nil
	}
}

// guardWatch looks whether a guard lives.
type guardWatch struct {
	path     string
	problems *problems
	boot     func() time.Duration
	seen     time.Duration // boot time; owned by Run
}

// Run looks every resyncEvery until ctx ends.
func (w *guardWatch) Run(ctx context.Context) error {
	w.seen = w.boot()
	look := time.NewTicker(resyncEvery)
	defer look.Stop()
	for {
		w.look()
		select {
		case <-ctx.Done():
			return nil
		case <-look.C:
		}
	}
}

func (w *guardWatch) look() {
	err := guarded(w.path)
	switch {
	case err == nil:
		w.seen = w.boot()
	case errors.Is(err, errNoGuard) && w.boot()-w.seen < guardGrace:
		return
	}
	w.problems.report(problemGuard, "", err)
}

// guarded gives errNoGuard where nobody holds the mark. It makes the mark where there is none.
func guarded(path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("open guard's mark: %w", err)
	}
	defer f.Close() // and the lock, if we got it
	switch err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); {
	case errors.Is(err, unix.EWOULDBLOCK):
		return nil
	case err != nil:
		return fmt.Errorf("look at guard's mark: %w", err)
	}
	return errNoGuard
}
