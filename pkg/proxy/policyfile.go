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

// PolicyFile is the last good policy of a file that the agent writes by rename, heeding what was said in the file of signals
// beside it. The agent need not live. A file that cannot be read or is not valid changes nothing.
type PolicyFile struct {
	path    string
	signals string
	log     *slog.Logger

	data  []byte          // owned by the reader; what was read last, good or bad
	said  []byte          // owned by the reader; the same of the signals
	good  *policy.Set     // owned by the reader; without signals
	heard *policy.Signals // owned by the reader

	mu      sync.Mutex
	set     *policy.Set   // guarded by mu; nil: none was good yet
	trouble string        // guarded by mu; what was logged last
	changed chan struct{} // guarded by mu; closed and replaced with set
}

// NewPolicyFile reads the file once. That there is none yet is no error: nobody is let in until then.
func NewPolicyFile(path string, log *slog.Logger) *PolicyFile {
	f := &PolicyFile{path: path, signals: filepath.Join(filepath.Dir(path), policy.SignalsFile), log: log, changed: make(chan struct{})}
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
			if base := filepath.Base(e.Name); base == filepath.Base(f.path) || base == filepath.Base(f.signals) {
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
	changed, heard := f.readPolicy(), f.readSignals()
	if f.good == nil || !changed && !heard {
		return
	}
	f.swap(f.good.Heeding(f.heard))
	if changed {
		f.log.Info("policy in force", "digest", f.good.Digest(), "remote", len(f.good.RemoteServices()), "services", len(f.good.Services()))
	}
}

// readPolicy tells whether there is another good one than before.
func (f *PolicyFile) readPolicy() (changed bool) {
	data, err := os.ReadFile(f.path)
	if errors.Is(err, fs.ErrNotExist) && f.good == nil {
		return false // not written yet
	}
	if err != nil {
		f.complain(err)
		return false
	}
	if f.data != nil && bytes.Equal(f.data, data) {
		return false
	}
	f.data = data
	set, err := policy.Parse(f.path, data)
	if err != nil {
		f.complain(fmt.Errorf("keep last good policy: %w", err))
		return false
	}
	f.good = set
	return true
}

// readSignals tells whether something else was said than before. What cannot be read changes nothing, and neither does a file that is
// gone: what was said counts until its end.
func (f *PolicyFile) readSignals() (changed bool) {
	data, err := os.ReadFile(f.signals)
	if errors.Is(err, fs.ErrNotExist) || err == nil && f.said != nil && bytes.Equal(f.said, data) {
		return false
	}
	var heard *policy.Signals
	if err == nil {
		f.said = data
		heard, err = policy.ParseSignals(data)
	}
	if err != nil {
		f.complain(fmt.Errorf("keep last good signals: %w", err))
		return false
	}
	f.heard = heard
	return true
}

func (f *PolicyFile) swap(set *policy.Set) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.set, f.trouble = set, ""
	close(f.changed)
	f.changed = make(chan struct{})
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
