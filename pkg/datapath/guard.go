package datapath

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf/link"
)

// guardInterval is how soon a new link is held. A link that was never held is still held by its pin
// and by the agent that made it.
const guardInterval = 500 * time.Millisecond

// HoldLinks keeps the descriptors of every pinned link, so that enforcement outlives the agent, its
// pins and the bpffs. It calls held after each look with the number of links, and returns when ctx ends.
// A link that was detached on purpose (uninstall) is let go.
func HoldLinks(ctx context.Context, dir string, log *slog.Logger, held func(n int)) error {
	links := map[string]link.Link{}
	defer func() {
		for _, l := range links {
			closeLink(l)
		}
	}()
	tick := time.NewTicker(guardInterval)
	defer tick.Stop()
	known, wrong := -1, ""
	for {
		wrong = tellChange(log, wrong, holdNew(dir, links, log))
		dropDetached(links, log)
		if len(links) != known {
			known = len(links)
			log.Info("links held", "links", known, "dir", linksDir(dir))
		}
		held(known)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// tellChange logs what is wrong when it changes, not at every look, and gives it back.
func tellChange(log *slog.Logger, before string, err error) string {
	now := ""
	if err != nil {
		now = err.Error()
	}
	if now != "" && now != before {
		log.Error("look for links", "err", err)
	}
	return now
}

// holdNew goes on after a pin that it cannot hold.
func holdNew(dir string, links map[string]link.Link, log *slog.Logger) error {
	entries, err := os.ReadDir(linksDir(dir))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read pins: %w", err)
	}
	var errs []error
	for _, e := range entries {
		errs = append(errs, holdLink(filepath.Join(linksDir(dir), e.Name()), links, log))
	}
	return errors.Join(errs...)
}

func holdLink(pin string, links map[string]link.Link, log *slog.Logger) error {
	name := filepath.Base(pin)
	l, err := link.LoadPinnedLink(pin, nil)
	if errors.Is(err, os.ErrNotExist) { // removed since it was listed
		return nil
	}
	if err != nil {
		return fmt.Errorf("open link %s: %w", name, err)
	}
	info, err := l.Info()
	if err != nil {
		closeLink(l)
		return fmt.Errorf("read link %s: %w", name, err)
	}
	id := fmt.Sprintf("%s#%d", name, info.ID)
	if _, ok := links[id]; ok || !attachedSomewhere(l) {
		closeLink(l)
		return nil
	}
	links[id] = l
	log.Info("holding link", "link", id)
	return nil
}

func dropDetached(links map[string]link.Link, log *slog.Logger) {
	for id, l := range links {
		if attachedSomewhere(l) {
			continue
		}
		closeLink(l)
		delete(links, id)
		log.Info("letting link go", "link", id, "why", "detached")
	}
}
