package agent

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// origin is where a node's set of resources comes from: a directory, or a cluster.
type origin interface {
	// read gives the set as it is there now. An error is everything that is wrong with it.
	read() (offer, error)
	// watch calls changed after each change until ctx ends.
	watch(ctx context.Context, changed func()) error
	// tell says what became of what was read last: the set that is in force, and why what was read is not.
	tell(inForce *policy.Set, err error)
}

// offer is a set that wants to be put to work.
type offer struct {
	set        *policy.Set
	signatures func() ([]byte, error)
	signedAt   string // where the signatures belong
	// piecemeal says that resources come one by one: the ResourceSet may be there before what it speaks of.
	piecemeal bool
}

// files is an origin: those of a directory that root alone can have written.
type files string

func (d files) read() (offer, error) {
	if err := checkTrustedDir(string(d)); err != nil {
		return offer{}, err
	}
	set, err := policy.LoadDir(string(d))
	file := filepath.Join(string(d), policy.SignatureFile)
	return offer{set: set, signatures: func() ([]byte, error) { return readSignatures(file) }, signedAt: file}, err
}

// watch also looks every resyncEvery, for a directory that vanished and came back tells nothing.
func (d files) watch(ctx context.Context, changed func()) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch resources: %w", err)
	}
	defer watcher.Close()
	again := time.NewTicker(resyncEvery)
	defer again.Stop()
	for {
		// The parent tells when the directory comes back. What cannot be watched is told of by read, and adding what is
		// watched already changes nothing.
		_ = watcher.Add(filepath.Dir(string(d)))
		_ = watcher.Add(string(d))
		select {
		case <-ctx.Done():
			return nil
		case <-watcher.Events:
			changed()
		case err := <-watcher.Errors: // an overflow: look at all of it
			if err != nil {
				changed()
			}
		case <-again.C:
			changed()
		}
	}
}

// tell does nothing: whoever writes files looks at the node's status.
func (files) tell(*policy.Set, error) {}
