package agent

import (
	"context"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"
)

const (
	groupsEvery = 30 * time.Second // whole walks, in case that a notice was lost
	goneGroups  = 16384            // control groups that are no more, of which it is still known what they were
)

// cgroups knows the control groups of the node by the kernel's numbers, which it gives once only (it counts them up with 64 bits).
// What was in a group is still known for a while after its end: records come late. Safe for concurrent use.
type cgroups struct {
	root string

	mu      sync.Mutex
	watcher *fsnotify.Watcher // guarded by mu; nil before Run
	paths   map[uint64]string // guarded by mu; from root on, of groups that are there and that were
	numbers map[string]uint64 // guarded by mu; of groups that are there
	gone    []uint64          // guarded by mu; oldest first
	rested  time.Time         // guarded by mu; when one that is not known may be looked for again
}

func newCgroups(root string) *cgroups {
	return &cgroups{root: filepath.Clean(root), paths: make(map[uint64]string), numbers: make(map[string]uint64)}
}

// Run keeps up with the node until ctx ends.
func (g *cgroups) Run(ctx context.Context) error {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch control groups: %w", err)
	}
	defer w.Close()
	g.mu.Lock()
	g.watcher = w
	g.walk("/")
	g.mu.Unlock()
	tick := time.NewTicker(groupsEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case e := <-w.Events:
			g.follow(e)
		case _, open := <-w.Errors: // its queue was full
			if !open {
				return nil
			}
			g.rewalk()
		case <-tick.C:
			g.rewalk()
		}
	}
}

// path gives where a control group is, or was. One that is not known is looked for at once: its notice may be under way. That takes a tenth
// of the time at most.
func (g *cgroups) path(number uint64) (path string, known bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	begun := time.Now()
	if path, known = g.paths[number]; known || begun.Before(g.rested) {
		return path, known
	}
	g.walk("/")
	g.rested = time.Now().Add(10 * time.Since(begun))
	path, known = g.paths[number]
	return path, known
}

// is tells whether the group at a path is, at this moment, the one with this number.
func (g *cgroups) is(path string, number uint64) bool {
	now, err := groupNumber(filepath.Join(g.root, path))
	return err == nil && now == number
}

// number is that of the group at a path now; 0: there is none.
func (g *cgroups) number(path string) uint64 {
	n, err := groupNumber(filepath.Join(g.root, path))
	if err != nil {
		return 0
	}
	return n
}

func (g *cgroups) follow(e fsnotify.Event) {
	path, ok := strings.CutPrefix(e.Name, g.root)
	if !ok || path == "" {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case e.Has(fsnotify.Create):
		g.walk(path)
	case e.Has(fsnotify.Remove) && !g.is(path, g.numbers[path]): // else another one has its place already
		g.end(path)
	}
}

func (g *cgroups) rewalk() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for path, number := range g.numbers {
		if !g.is(path, number) {
			g.end(path)
		}
	}
	g.walk("/")
}

// walk takes in the group at a path and all below it. A watch comes before the look inside: what is made meanwhile is in one of both.
func (g *cgroups) walk(path string) {
	top := filepath.Join(g.root, path)
	_ = filepath.WalkDir(top, func(dir string, entry fs.DirEntry, err error) error { // errors are groups that have just ended
		if err != nil || !entry.IsDir() {
			return nil
		}
		number, err := groupNumber(dir)
		if err != nil {
			return nil
		}
		at := "/" + strings.TrimPrefix(strings.TrimPrefix(dir, g.root), "/")
		if before := g.numbers[at]; before != 0 && before != number {
			g.end(at)
		}
		if g.watcher != nil && g.numbers[at] == 0 {
			_ = g.watcher.Add(dir) // without it the walks find what is below
		}
		g.paths[number], g.numbers[at] = at, number
		return nil
	})
}

// end notes that a group is no more. g.mu is held.
func (g *cgroups) end(path string) {
	number, ok := g.numbers[path]
	if !ok {
		return
	}
	delete(g.numbers, path)
	if g.gone = append(g.gone, number); len(g.gone) > goneGroups {
		delete(g.paths, g.gone[0])
		g.gone = g.gone[1:]
	}
}

func groupNumber(dir string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return 0, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return 0, fs.ErrNotExist
	}
	return st.Ino, nil
}
