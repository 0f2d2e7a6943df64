package main

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/term"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
)

// looks are other ways to look at the grants of the node.
type looks struct{ watch, used bool }

func (l *looks) add(f *pflag.FlagSet) {
	f.BoolVarP(&l.watch, "watch", "w", false, "go on with what the node's active grants do, until interrupted: in place on a\nterminal, else a line for each thing that happens")
	f.BoolVar(&l.used, "used", false, "what was granted on the node beside what was used of it, and what would have been enough")
}

// watchEvery is how often the view is made anew.
const watchEvery = time.Second

// watchGrants shows the active grants until ctx ends.
func (c *cli) watchGrants(ctx context.Context) error {
	return c.followAgent(ctx, func(ctx context.Context, a *client.Agent) error {
		view := c.watchView()
		for frame, err := range a.WatchGrants(ctx, watchEvery) {
			if err != nil {
				return err
			}
			if err := view(frame); err != nil {
				return err
			}
		}
		return nil
	})
}

// watchView is how a frame is shown: as an object, in place on a terminal, or by what happened since the frame before.
func (c *cli) watchView() func(*api.WatchFrame) error {
	if c.output != formatTable {
		return func(f *api.WatchFrame) error { return c.showObject(f) }
	}
	h := &happenings{seen: map[string]bool{}}
	if file, ok := c.stdout.(*os.File); ok && term.IsTerminal(int(file.Fd())) {
		return func(f *api.WatchFrame) error { return c.inPlace(f, h) }
	}
	return func(f *api.WatchFrame) error {
		for _, line := range h.since(f) {
			if err := writeColumns(c.stdout, happeningColumns, line); err != nil {
				return err
			}
		}
		return nil
	}
}

var happeningColumns = []column{{"TIME", 24}, {"GRANT", 26}, {"WHAT", 7}, {"DETAIL", 0}}

// happenings tell each thing of the frames once.
type happenings struct {
	seen map[string]bool
	last [][]string
}

// shownHappenings is how many of the last stay on a terminal.
const shownHappenings = 10

func (h *happenings) keep(lines [][]string) {
	h.last = append(h.last, lines...)
	h.last = h.last[max(len(h.last)-shownHappenings, 0):]
}

func (h *happenings) once(key string) bool {
	was := h.seen[key]
	h.seen[key] = true
	return !was
}

// since gives a line for each thing that the frame tells for the first time.
func (h *happenings) since(f *api.WatchFrame) (lines [][]string) {
	at := stamp(f.GetTime())
	if p := f.GetPanic(); p != "" && h.once("panic "+p) {
		lines = append(lines, []string{at, "", "PANIC", p})
	}
	for _, w := range f.GetActive() {
		id := w.GetGrant().GetId()
		if h.once(id) {
			lines = append(lines, []string{at, id, "active", fmt.Sprintf("%s for %s, ends in %s", w.GetGrant().GetService(),
				strings.Join(w.GetGrant().GetClients(), ","), inSeconds(w.GetLeft()))})
		}
		for _, one := range w.GetWarnings() {
			if h.once(id + stamp(one.GetTime()) + one.GetText()) {
				lines = append(lines, []string{stamp(one.GetTime()), id, "warning", one.GetText()})
			}
		}
	}
	for _, g := range f.GetEnded() {
		maps.DeleteFunc(h.seen, func(key string, _ bool) bool { return strings.HasPrefix(key, g.GetId()) })
		lines = append(lines, []string{at, g.GetId(), g.GetState(), g.GetEndedWhy()})
	}
	return lines
}

// What a terminal is told: to the upper left, clear the rest of a line, clear what is below.
const (
	home      = "\x1b[H"
	clearLine = "\x1b[K"
	clearDown = "\x1b[J"
)

// inPlace draws the frame over the one before, without flicker.
func (c *cli) inPlace(f *api.WatchFrame, h *happenings) error {
	var b bytes.Buffer
	t := newTable(&b)
	watchTable(t, f)
	if err := t.Flush(); err != nil {
		return err
	}
	h.keep(h.since(f))
	for _, line := range h.last {
		if err := writeColumns(&b, happeningColumns, line); err != nil {
			return err
		}
	}
	_, err := fmt.Fprint(c.stdout, home, strings.ReplaceAll(b.String(), "\n", clearLine+"\n"), clearDown)
	return err
}

func watchTable(t *table, f *api.WatchFrame) {
	t.line("%s  %s", stamp(f.GetTime()), plural(len(f.GetActive()), "active grant"))
	if f.GetPanic() != "" {
		t.line("PANIC %s", f.GetPanic())
	}
	t.row("GRANT", "SERVICE", "LEFT", "SILENT", "USED", "FLOWS", "PEERS")
	for _, w := range f.GetActive() {
		g := w.GetGrant()
		t.row(g.GetId(), g.GetService(), inSeconds(w.GetLeft()), silence(w), usedOf(w.GetPaths()), w.GetLiveFlows(), peers(w))
	}
	t.line("")
}

// silence is shown with the time at which it ends the grant, if it does.
func silence(w *api.WatchedGrant) string {
	if idle := w.GetGrant().GetIdleTimeout(); idle != nil {
		return inSeconds(w.GetSilent()) + " of " + inSeconds(idle)
	}
	return inSeconds(w.GetSilent())
}

// usedOf tells what each path used of its budget, or carried without one.
func usedOf(paths []*api.Path) string {
	var parts []string
	for _, p := range paths {
		part := used(p)
		if part == "" {
			part = volume(p.GetBytesToServer()+p.GetBytesToClient(), p.GetPacketsToServer()+p.GetPacketsToClient())
		}
		if len(paths) > 1 {
			part = p.GetClient() + ": " + part
		}
		parts = append(parts, part)
	}
	return strings.Join(parts, "; ")
}

// shownPeers is how many fit into a line.
const shownPeers = 3

func peers(w *api.WatchedGrant) string {
	list := w.GetPeers()
	if len(list) <= shownPeers {
		return strings.Join(list, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(list[:shownPeers], ", "), int(w.GetLiveFlows())-shownPeers)
}

func inSeconds(d *durationpb.Duration) string { return d.AsDuration().Round(time.Second).String() }
