package agent

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/policy"
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

// warn gives the warnings that are due: to the record, the log, the metrics, and to whoever watches. g.mu is held.
func (g *grants) warn(ctx context.Context, h *held, before []time.Duration, paths []datapath.PathStatus, now time.Duration) error {
	left, life := h.ends()-now, h.row.Deadline.Sub(h.row.Activated)
	for _, w := range warnings(left, life, before, paths) {
		if slices.ContainsFunc(h.warned, func(old warning) bool { return old.key == w.key }) {
			continue
		}
		if err := g.giveWarning(ctx, h, w); err != nil {
			return err
		}
	}
	return nil
}

func (g *grants) giveWarning(ctx context.Context, h *held, w warning) error {
	event := newEvent(stepWarned, "agent", w.text, g.clock)
	describe(event, h)
	data, err := encodeEvent(event)
	if err == nil {
		_, err = g.store.Append(ctx, data)
	}
	if err != nil {
		return fmt.Errorf("record warning: %w", err)
	}
	w.at = event.GetTime().AsTime()
	h.warned = append(h.warned, w)
	g.events.count(stepWarned)
	g.log.Warn("grant", "grant", h.row.ID, "service", h.payload.Service, "warning", w.text)
	g.kick()
	return nil
}
