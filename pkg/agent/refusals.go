package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"google.golang.org/protobuf/proto"
)

// refusalsTold is how often a refusal of the same identity is recorded: one at once, and those that follow in one record, with
// their number and the last of them. Otherwise whoever asks for what is wrong all day would fill the store.
const refusalsTold = time.Minute

// maxRefused bounds the identities that are told apart; the others are told together.
const maxRefused = 4096

// refused is what was refused to one identity and is not recorded yet.
type refused struct {
	who   string
	since time.Duration // boot time of the record before
	more  uint64        // refused since
	last  *api.GrantEvent
}

// refuse records a refusal, or counts it. What is counted is recorded by tellRefusals; it is lost with an agent that is
// killed before. g.mu is held.
func (g *grants) refuse(ctx context.Context, a *activation, why string) error {
	event := refusedEvent(a, why, g.clock)
	who := a.actor + " " + event.Requester
	if _, known := g.refused[who]; !known && len(g.refused) >= maxRefused {
		who = ""
	}
	if r := g.refused[who]; r != nil {
		r.more, r.last = r.more+1, event
		return nil
	}
	if g.refused == nil {
		g.refused = make(map[string]*refused)
	}
	r := &refused{who: who, since: g.clock.boot()}
	g.refused[who] = r
	err := g.appendEvent(ctx, event)
	if err != nil { // then the next tick tells of it
		r.since, r.more, r.last = r.since-refusalsTold, 1, event
	}
	return err
}

func (g *grants) appendEvent(ctx context.Context, event *api.GrantEvent) error {
	data, err := encodeEvent(event)
	if err == nil {
		_, err = g.store.Append(ctx, data)
	}
	return err
}

// tellRefusals records what was counted, when it is time.
func (g *grants) tellRefusals(ctx context.Context) error {
	var errs []error
	for _, r := range g.dueRefusals() {
		event := proto.CloneOf(r.last)
		event.Why = inShort(fmt.Sprintf("%d more within %s, the last: %s", r.more, short(refusalsTold), event.Why))
		if err := g.appendEvent(ctx, event); err != nil {
			g.notTold(r)
			errs = append(errs, fmt.Errorf("record %d refusals of %s: %w", r.more, event.Actor, err))
			continue
		}
		g.recorded()
	}
	return errors.Join(errs...)
}

// notTold counts again what could not be recorded.
func (g *grants) notTold(r refused) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if now := g.refused[r.who]; now != nil {
		now.since, now.more = r.since, now.more+r.more
	}
}

// dueRefusals takes out what is to be recorded now; who was not refused again begins anew.
func (g *grants) dueRefusals() (due []refused) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := g.clock.boot()
	for who, r := range g.refused {
		if now-r.since < refusalsTold {
			continue
		}
		if r.more == 0 {
			delete(g.refused, who)
			continue
		}
		due = append(due, *r)
		r.since, r.more = now, 0
	}
	return due
}
