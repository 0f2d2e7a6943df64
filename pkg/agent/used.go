package agent

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/store"
	"google.golang.org/protobuf/types/known/durationpb"
)

// suggestion is how a grant of the same kind could be asked for the next time.
type suggestion struct {
	field              string // of the payload
	granted, suggested string
	words              string
}

// suggest compares what was granted with what was used. A grant that is not over is not told that it was too long.
func suggest(granted time.Duration, over bool, p grant.Payload, u *use) []suggestion {
	all := u.total()
	if all.Packets == 0 {
		return []suggestion{{words: "nothing was sent: is it needed?"}}
	}
	var out []suggestion
	if enough := roomy(u.Last); over && enough < granted {
		out = append(out, suggestion{"duration", short(granted), short(enough),
			fmt.Sprintf("the last packet went %s after its activation", short(u.Last.Round(time.Second)))})
	}
	most := mostOf(u)
	if enough := policy.Size(roundUp(most.Bytes)); p.Budget.Bytes == 0 || enough < p.Budget.Bytes {
		out = append(out, suggestion{"budget.bytes", orNone(p.Budget.Bytes != 0, p.Budget.Bytes), enough.String(),
			fmt.Sprintf("no client carried more than %d B", most.Bytes)})
	}
	if enough := most.Flows + most.Flows/2 + 1; p.Budget.Connections == 0 || enough < p.Budget.Connections {
		out = append(out, suggestion{"budget.connections", orNone(p.Budget.Connections != 0, p.Budget.Connections), fmt.Sprint(enough),
			fmt.Sprintf("no client made more than %d", most.Flows)})
	}
	return append(out, narrower(p, u)...)
}

// narrower suggests to leave out what was never used.
func narrower(p grant.Payload, u *use) (out []suggestion) {
	if came := comers(u); len(came) > 0 && len(came) < len(p.Addresses) {
		out = append(out, suggestion{"addresses", fmt.Sprint(p.Addresses), fmt.Sprint(came),
			fmt.Sprintf("%d of %d clients sent nothing", len(p.Addresses)-len(came), len(p.Addresses))})
	}
	if len(u.Ports) > 0 && len(u.Ports) < len(u.Granted) {
		ports := slices.Sorted(slices.Values(u.Ports))
		out = append(out, suggestion{"ports", fmt.Sprint(u.Granted), fmt.Sprint(ports),
			fmt.Sprintf("%d of %d ports were not used", len(u.Granted)-len(ports), len(u.Granted))})
	}
	return out
}

// comers are the clients that sent something.
func comers(u *use) (came []netip.Addr) {
	for a, s := range u.Clients {
		if s.Packets > 0 {
			came = append(came, a)
		}
	}
	slices.SortFunc(came, netip.Addr.Compare)
	return came
}

// mostOf is the most that any one client carried: budgets are for each.
func mostOf(u *use) (most spent) {
	for _, s := range u.Clients {
		most = spent{max(most.Bytes, s.Bytes), max(most.Packets, s.Packets), max(most.Flows, s.Flows)}
	}
	return most
}

// roomy is a time with a quarter to spare, in whole minutes, and above ten of them in whole steps of five.
func roomy(d time.Duration) time.Duration {
	step := time.Minute
	if d += d / 4; d > 10*time.Minute {
		step = 5 * time.Minute
	}
	return max((d+step-1)/step*step, step)
}

// roundUp is a number of bytes with a half to spare, as a whole number of the unit below it.
func roundUp(n uint64) uint64 {
	n += n / 2
	unit := uint64(1 << 10)
	for n >= unit<<12 {
		unit <<= 10
	}
	return max((n+unit-1)/unit, 1) * unit
}

func orNone(is bool, v any) string {
	if !is {
		return "no limit"
	}
	return fmt.Sprint(v)
}

func short(d time.Duration) string { return policy.Duration{Duration: d}.String() }

// UsedGrants compares, for every grant that the node has activated, what was granted with what was used.
func (o *operators) UsedGrants(ctx context.Context, _ *api.UsedGrantsRequest) (*api.UsedGrantsReply, error) {
	rows, uses, err := o.grants.used(ctx)
	if err != nil {
		return nil, toStatus(err)
	}
	reply := &api.UsedGrantsReply{}
	for _, row := range rows {
		reply.Grants = append(reply.Grants, o.usedGrant(row, uses[row.ID]))
	}
	return reply, nil
}

// used gives all grants, and the use of those of which it is known.
func (g *grants) used(ctx context.Context) ([]store.GrantRow, map[string]*use, error) {
	rows, err := g.all(ctx)
	if err != nil {
		return nil, nil, err
	}
	uses, err := g.uses(ctx)
	if err != nil {
		return nil, nil, err
	}
	err = inTurns(&g.mu, g.every(), func(h *held) error {
		now := h.use.copied()
		uses[h.row.ID] = &now
		return nil
	})
	return rows, uses, err
}

func (o *operators) usedGrant(row store.GrantRow, u *use) *api.UsedGrant {
	p, known := readPayload(row)
	granted := row.Deadline.Sub(row.Activated)
	out := &api.UsedGrant{Grant: o.describe(row), Granted: durationpb.New(granted)}
	if u == nil || !known {
		return out
	}
	all := u.total()
	out.Known, out.Open, out.Busy, out.Last = true, durationpb.New(u.Open), durationpb.New(u.Busy), durationpb.New(u.Last)
	out.Bytes, out.Packets, out.Flows = all.Bytes, all.Packets, all.Flows
	out.Clients, out.Ports, out.GrantedPorts = texts(comers(u)), numbers(u.Ports), numbers(u.Granted)
	for _, s := range suggest(granted, row.State != stateActive, p, u) {
		out.Suggestions = append(out.Suggestions, &api.Suggestion{Field: s.field, Granted: s.granted, Suggested: s.suggested, Words: s.words})
	}
	return out
}

func numbers(ports []uint16) (out []uint32) {
	for _, p := range ports {
		out = append(out, uint32(p))
	}
	return out
}
