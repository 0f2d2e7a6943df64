package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// resync covers what a watch cannot tell: a folder that was removed and made again.
const resync = 5 * time.Second

// PolicyFile is the last good policy of a file that the agent writes by rename. The agent need not
// live. A file that cannot be read or is not valid changes nothing.
type PolicyFile struct {
	path string
	log  *slog.Logger

	mu      sync.Mutex
	data    []byte        // guarded by mu; what was read last, good or bad
	set     *policy.Set   // guarded by mu; nil: none was good yet
	trouble string        // guarded by mu; what was logged last
	changed chan struct{} // guarded by mu; closed and replaced with set
}

// NewPolicyFile reads the file once. That there is none yet is no error: nobody is let in until then.
func NewPolicyFile(path string, log *slog.Logger) *PolicyFile {
	f := &PolicyFile{path: path, log: log, changed: make(chan struct{})}
	f.read()
	return f
}

// Set is the policy of this moment. It may be nil, which protects nothing and allows nobody.
func (f *PolicyFile) Set() *policy.Set {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.set
}

// Changed gives a channel that is closed when Set gives another policy.
func (f *PolicyFile) Changed() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}

// Run follows the file until ctx ends, and returns nil then.
func (f *PolicyFile) Run(ctx context.Context) error {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch policy: %w", err)
	}
	defer w.Close()
	tick := time.NewTicker(resync)
	defer tick.Stop()
	for {
		// The folder is watched, not the file: a rename brings a new one. Adding again is harmless.
		if err := w.Add(filepath.Dir(f.path)); err != nil {
			f.complain(fmt.Errorf("watch folder of policy: %w", err))
		}
		f.read()
		if !f.await(ctx, w, tick.C) {
			return nil
		}
	}
}

// await returns true when it is time to read again.
func (f *PolicyFile) await(ctx context.Context, w *fsnotify.Watcher, tick <-chan time.Time) bool {
	for {
		select {
		case e := <-w.Events:
			if filepath.Base(e.Name) == filepath.Base(f.path) {
				return true
			}
		case err := <-w.Errors: // the queue of events ran over: some were missed
			if err != nil {
				return true
			}
		case <-tick:
			return true
		case <-ctx.Done():
			return false
		}
	}
}

func (f *PolicyFile) read() {
	data, err := os.ReadFile(f.path)
	if errors.Is(err, fs.ErrNotExist) && f.Set() == nil {
		return // not written yet
	}
	if err != nil {
		f.complain(err)
		return
	}
	f.mu.Lock()
	same := f.data != nil && bytes.Equal(f.data, data)
	f.data = data
	f.mu.Unlock()
	if same {
		return
	}
	set, err := policy.Parse(f.path, data)
	if err != nil {
		f.complain(fmt.Errorf("keep last good policy: %w", err))
		return
	}
	f.swap(set)
}

func (f *PolicyFile) swap(set *policy.Set) {
	f.mu.Lock()
	f.set, f.trouble = set, ""
	close(f.changed)
	f.changed = make(chan struct{})
	f.mu.Unlock()
	f.log.Info("policy in force", "digest", set.Digest(), "services", len(set.Services()))
}

// complain logs one trouble once.
func (f *PolicyFile) complain(err error) {
	f.mu.Lock()
	same := f.trouble == err.Error()
	f.trouble = err.Error()
	f.mu.Unlock()
	if !same {
		f.log.Error("read policy", "error", err)
	}
}
