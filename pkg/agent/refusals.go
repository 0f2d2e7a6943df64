package agent

import (
	"context"
	"fmt"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/store"
	"google.golang.org/protobuf/proto"
)

// refusalsTold is how often a refusal of the same is recorded: one at once, and those that follow in one record, with their number
// and the last of them. Otherwise whoever asks for what is wrong all day would fill the store.
const refusalsTold = time.Minute

// maxRefused bounds what is told apart; the rest is told together.
const maxRefused = 4096

// refusedApart is how many grants of one person that break the glass of one service are counted for themselves.
const refusedApart = 16

// refusedWhat is what refusals are counted for: the caller, who asked for the grant, and the service, if the node has it. A grant that
// breaks the glass is counted for itself.
type refusedWhat struct{ actor, requester, service, grant string }

// refused is what was refused and is not recorded yet.
type refused struct {
	what  refusedWhat
	since time.Duration // boot time of the record before
	more  uint64        // refused since
	last  *api.GrantEvent
}

// whatWasRefused is what a refusal is counted for. Of what was not verified it says nothing but who called.
func (g *grants) whatWasRefused(event *api.GrantEvent) refusedWhat {
	what := refusedWhat{actor: event.Actor, requester: event.Requester}
	if e := g.enforced(); e != nil {
		if _, has := e.service(event.Service); has {
			what.service = event.Service
		}
	}
	if event.Kind == string(grant.BreakGlass) && g.refusedOf(what) < refusedApart {
		what.grant = event.Grant
	}
	if _, known := g.refused[what]; !known && len(g.refused) >= maxRefused {
		return refusedWhat{}
	}
	return what
}

// refusedOf is how many grants are counted for themselves that are otherwise counted as this.
func (g *grants) refusedOf(what refusedWhat) (n int) {
	for other := range g.refused {
		if other.grant != "" && other == (refusedWhat{what.actor, what.requester, what.service, other.grant}) {
			n++
		}
	}
	return n
}

// refuse records a refusal, or counts it. What is counted is recorded by tellRefusals; it is lost with an agent that is
// killed before. g.mu is held.
func (g *grants) refuse(ctx context.Context, a *activation, why string) error {
	event := refusedEvent(a, why, g.clock)
	what := g.whatWasRefused(event)
	if r := g.refused[what]; r != nil {
		r.more, r.last = r.more+1, event
		return nil
	}
	if g.refused == nil {
		g.refused = make(map[refusedWhat]*refused)
	}
	r := &refused{what: what, since: g.clock.boot()}
	g.refused[what] = r
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

// tellRefusals records what was counted since a record that is so old, or older.
func (g *grants) tellRefusals(ctx context.Context, old time.Duration) error {
	due := g.dueRefusals(old)
	for told := 0; told < len(due); {
		batch := due[told:min(told+endBatch, len(due))]
		if err := g.tellSome(ctx, batch); err != nil {
			g.notTold(due[told:])
			return fmt.Errorf("record refusals: %w", err)
		}
		told += len(batch)
		g.recorded()
	}
	return nil
}

func (g *grants) tellSome(ctx context.Context, batch []refused) error {
	items := make([]store.Item, len(batch))
	for i, r := range batch {
		event := proto.CloneOf(r.last)
		event.Why = inShort(fmt.Sprintf("%d more within %s, the last: %s", r.more, short(refusalsTold), event.Why))
		data, err := encodeEvent(event)
		if err != nil {
			return err
		}
		items[i] = store.Item{Data: data}
	}
	_, err := g.store.AppendAll(ctx, items)
	return err
}

// notTold counts again what could not be recorded.
func (g *grants) notTold(all []refused) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, r := range all {
		if now := g.refused[r.what]; now != nil {
			now.since, now.more = r.since, now.more+r.more
		}
	}
}

// dueRefusals takes out what is to be recorded now; who was not refused again begins anew.
func (g *grants) dueRefusals(old time.Duration) (due []refused) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := g.clock.boot()
	for what, r := range g.refused {
		if now-r.since < old {
			continue
		}
		if r.more == 0 {
			delete(g.refused, what)
			continue
		}
		due = append(due, *r)
		r.since, r.more = now, 0
	}
	return due
}
