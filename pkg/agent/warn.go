package agent

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// nearBudget is the part of a budget, in per cent, whose use is warned of.
const nearBudget = 80

// warning is something about an active grant that people should know before it ends. Each is given once.
type warning struct {
	key  string // what it is about
	text string
	at   time.Time // wall clock; when it was given
}

// warnings are what there is to warn of, for a grant that lives so long in all and has so long left.
func warnings(left, life time.Duration, before []time.Duration, paths []datapath.PathStatus) (out []warning) {
	if due, ok := dueOf(left, life, before); ok {
		out = append(out, warning{key: "end " + due.String(),
			text: fmt.Sprintf("ends in %s", policy.Duration{Duration: left.Round(time.Second)})})
	}
	for _, p := range paths {
		for _, l := range limitsOf(p) {
			if percent(l.used, l.most) >= nearBudget {
				out = append(out, warning{key: l.of + " " + p.Client.String(),
					text: fmt.Sprintf("%s has used %d of %d %s (%d %%)", p.Client, l.used, l.most, l.of, percent(l.used, l.most))})
			}
		}
	}
	return out
}

// dueOf is the last of the times before the end that has come. One that a grant began with is none.
func dueOf(left, life time.Duration, before []time.Duration) (due time.Duration, ok bool) {
	for _, b := range before {
		if left <= b && b < life && (!ok || b < due) {
			due, ok = b, true
		}
	}
	return due, ok
}

// limit is one limit of a path's budget.
type limit struct {
	of         string
	used, most uint64
}

// limitsOf are the limits that a path has.
func limitsOf(p datapath.PathStatus) []limit {
	if p.Budget == (datapath.Budget{}) {
		return nil
	}
	all := []limit{
		{"bytes", p.BytesToServer + p.BytesToClient, p.Budget.Bytes},
		{"packets", p.PacketsToServer + p.PacketsToClient, p.Budget.Packets},
		{"connections", p.Flows, p.Budget.Connections},
	}
	return slices.DeleteFunc(all, func(l limit) bool { return l.most == 0 })
}

// percent takes care of numbers that a hundredfold would not fit.
func percent(used, most uint64) uint64 {
	if most >= 1<<57 {
		used, most = used>>7, most>>7
	}
	return used * 100 / most
}

// dueWarning is a warning that is to be given of a grant.
type dueWarning struct {
	*held
	warning
}

// due are the warnings that were not given yet. g.mu is held.
func (h *held) due(before []time.Duration, paths []datapath.PathStatus, now time.Duration) (due []dueWarning) {
	left, life := h.ends()-now, h.row.Deadline.Sub(h.row.Activated)
	for _, w := range warnings(left, life, before, paths) {
		if !slices.ContainsFunc(h.warned, func(old warning) bool { return old.key == w.key }) {
			due = append(due, dueWarning{h, w})
		}
	}
	return due
}

// warn gives warnings: to the record, many in one transaction, to the log, the metrics, and to whoever watches.
func (g *grants) warn(ctx context.Context, due []dueWarning) error {
	for batch := range slices.Chunk(due, endBatch) {
		if err := g.warnSome(ctx, batch); err != nil {
			return fmt.Errorf("record warning: %w", err)
		}
	}
	return nil
}

func (g *grants) warnSome(ctx context.Context, batch []dueWarning) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	batch = slices.DeleteFunc(batch, func(d dueWarning) bool { return !g.holds(d.held) || d.over != nil })
	if len(batch) == 0 {
		return nil
	}
	items := make([]store.Item, len(batch))
	for i, d := range batch {
		event := newEvent(stepWarned, "agent", d.text, g.clock)
		describe(event, d.held)
		batch[i].at = event.GetTime().AsTime()
		var err error
		if items[i].Data, err = encodeEvent(event); err != nil {
			return err
		}
	}
	if _, err := g.store.AppendAll(ctx, items); err != nil {
		return err
	}
	for _, d := range batch {
		d.warned = append(d.warned, d.warning)
		g.events.count(stepWarned)
		g.log.Warn("grant", "grant", d.row.ID, "service", d.payload.Service, "warning", d.text)
	}
	g.kick()
	return nil
}
