package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// replay is one run of `policy replay`.
type replay struct{ flows, grants string }

func (c *cli) policyReplay() *cobra.Command {
	var r replay
	cmd := &cobra.Command{
		Use:   "replay FILE... | DIR",
		Short: "Say what recorded flows would meet under other resources",
		Long: `Ask a candidate set of resources about flows that were recorded: how many would pass that were refused, how many would break
that passed, and why. The flows are those in the agent's memory, or a FILE of --flows as ` + "`sallyport flows -o json`" + ` writes it (from
the collector, say); - is standard input. What came to a service that is not enforced (WATCHED) counts as passed, from
somebody without an identity, and so often as it was seen: each SYN and datagram. What a flow's grant says is asked of the agent, or read from --grants as
` + "`sallyport grants -o json`" + ` writes it. Nothing is changed.`,
		Example: `  sallyport policy replay candidate.d
  sallyport flows --collector 10.9.0.1:9443 --since 24h --limit 1000000 -o json | sallyport policy replay candidate.d --flows -`,
		Args: between(1, -1),
		RunE: func(cmd *cobra.Command, args []string) error {
			set, err := loadPolicy(args)
			if err != nil {
				return err
			}
			seen, err := c.recorded(cmd.Context(), &r)
			if err != nil {
				return err
			}
			return c.showReplay(replayed(set, seen))
		},
	}
	cmd.Flags().StringVar(&r.flows, "flows", "", "replay the flows in this `FILE`, not those in the agent's memory")
	cmd.Flags().StringVar(&r.grants, "grants", "", "take what grants say from this `FILE` (with --flows)")
	return cmd
}

// seenFlow is what a replay reads of a flow's record.
type seenFlow struct {
	Flow struct {
		Event, Verdict, Reason, Protocol, Server, Service, Identity, Grant string
		Time                                                               time.Time
		Count                                                              uint64
	}
}

// seenGrant is what a replay reads of a grant.
type seenGrant struct {
	ID, Requester, Reason, Ticket, Service string
	Clients                                []netip.Addr
	Signers                                []string
	Activated, Deadline                    time.Time
	Budget                                 struct {
		Bytes, Packets, Connections uint64
		PerSecond                   uint32 `json:"connections_per_second"`
	}
}

// recording is what was read.
type recording struct {
	flows  []seenFlow
	grants map[string]seenGrant
}

func (c *cli) recorded(ctx context.Context, r *replay) (recording, error) {
	if r.flows == "" {
		return c.recordedByAgent(ctx)
	}
	out := recording{grants: map[string]seenGrant{}}
	var err error
	if out.flows, err = readObjects[seenFlow](c, r.flows); err != nil || r.grants == "" {
		return out, err
	}
	list, err := readObjects[struct{ Grants []seenGrant }](c, r.grants)
	for _, l := range list {
		out.keep(l.Grants)
	}
	return out, err
}

func (r *recording) keep(grants []seenGrant) {
	for _, g := range grants {
		r.grants[g.ID] = g
	}
}

// recordedByAgent reads the agent's memory in the form that files have.
func (c *cli) recordedByAgent(ctx context.Context) (out recording, err error) {
	out.grants = map[string]seenGrant{}
	return out, c.withAgent(ctx, func(ctx context.Context, a *client.Agent) error {
		for f, err := range a.Flows(ctx, &api.FlowQuery{Limit: math.MaxUint32}) {
			if err != nil {
				return err
			}
			one, err := throughJSON[seenFlow](f)
			if err != nil {
				return err
			}
			out.flows = append(out.flows, one)
		}
		reply, err := a.Grants(ctx)
		if err != nil {
			return err
		}
		all, err := throughJSON[struct{ Grants []seenGrant }](reply)
		out.keep(all.Grants)
		return err
	})
}

func throughJSON[T any](value any) (out T, err error) {
	data, err := encodeJSON(value)
	if err != nil {
		return out, err
	}
	return out, json.Unmarshal(data, &out)
}

// maxObject bounds one line of a file that is replayed.
const maxObject = 1 << 20

// readObjects reads one object after another from a file, or standard input for "-".
func readObjects[T any](c *cli, path string) (all []T, err error) {
	in := c.stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, fmt.Errorf("read recorded: %w", err)
		}
		defer f.Close()
		in = f
	}
	for d := json.NewDecoder(in); ; {
		var raw json.RawMessage
		err := d.Decode(&raw)
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		var one T
		if err == nil && len(raw) > maxObject {
			err = fmt.Errorf("an object has %d bytes, the most is %d", len(raw), maxObject)
		}
		if err == nil {
			err = json.NewDecoder(bytes.NewReader(raw)).Decode(&one)
		}
		if err != nil {
			return nil, withHint(fmt.Errorf("read recorded: %s: object %d: %w", path, len(all)+1, err), "write the file with -o json")
		}
		all = append(all, one)
	}
}

// change is flows of one kind whose fate is another.
type change struct {
	Fate  policy.Fate `json:"fate"`
	Who   string      `json:"who"`
	To    string      `json:"to"`
	Why   string      `json:"why"`
	Flows uint64      `json:"flows"`
}

// replayReport is the outcome for machines.
type replayReport struct {
	Flows   map[policy.Fate]uint64 `json:"flows"`
	Changes []change               `json:"changes"`
}

// replayed asks the set about every flow that was begun, refused or only watched.
func replayed(set *policy.Set, r recording) replayReport {
	out := replayReport{Flows: map[policy.Fate]uint64{policy.FateSame: 0, policy.FatePasses: 0, policy.FateBreaks: 0, policy.FateUnknown: 0}, Changes: []change{}}
	keys := policy.KnownKeys(set.Keyrings())
	counts := map[change]uint64{}
	for _, f := range r.flows {
		seen, ok := r.seen(f, keys)
		if !ok {
			continue
		}
		fate, why := set.Replay(seen)
		n := max(f.Flow.Count, 1)
		out.Flows[fate] += n
		if fate != policy.FateSame {
			counts[change{Fate: fate, Who: cmp.Or(f.Flow.Grant, f.Flow.Identity, "nobody"), To: f.Flow.Server, Why: why}] += n
		}
	}
	for k, n := range counts {
		k.Flows = n
		out.Changes = append(out.Changes, k)
	}
	slices.SortFunc(out.Changes, func(a, b change) int {
		return cmp.Or(cmp.Compare(a.Fate, b.Fate), cmp.Compare(b.Flows, a.Flows), cmp.Compare(a.Who, b.Who), cmp.Compare(a.To, b.To))
	})
	return out
}

// seen is the record of a flow in the evaluator's words; ok is false for what decides nothing.
func (r recording) seen(f seenFlow, keys map[string]policy.KnownKey) (s policy.Seen, ok bool) {
	rec := f.Flow
	server, err := netip.ParseAddrPort(rec.Server)
	s, ok = policy.SeenOf(rec.Event, rec.Verdict, rec.Reason)
	if err != nil || !ok {
		return policy.Seen{}, false
	}
	s.Protocol, s.Server, s.Service, s.At = rec.Protocol, server, rec.Service, rec.Time
	if rec.Identity != "" {
		s.Identity, _ = spiffeid.FromString(rec.Identity) // one that is none proves nothing
	}
	if g, known := r.grants[rec.Grant]; known {
		s.Grant = g.facts(server.Port(), keys)
	}
	return s, true
}

// facts are those of the grant at its activation, for the port that was used.
func (g seenGrant) facts(port uint16, keys map[string]policy.KnownKey) *policy.GrantFacts {
	f := &policy.GrantFacts{ID: g.ID, Service: g.Service, Ports: []uint16{port}, Addresses: g.Clients, Duration: g.Deadline.Sub(g.Activated).Round(time.Second),
		Binding: policy.BindingAddress, Ticket: g.Ticket, Reason: g.Reason, Requester: g.Requester, Now: g.Activated,
		Budget: policy.Budget{Bytes: policy.Size(g.Budget.Bytes), Packets: g.Budget.Packets, Connections: g.Budget.Connections, ConnectionsPerSecond: g.Budget.PerSecond}}
	for _, id := range g.Signers {
		if k, ok := keys[id]; ok && !k.Revoked && !k.Ended(g.Activated) {
			f.Signers = append(f.Signers, policy.Signer{Person: k.Person, KeyID: id, Uses: k.Uses})
		}
	}
	return f
}

func (c *cli) showReplay(r replayReport) error {
	return c.show(r, func(t *table) {
		for _, fate := range []policy.Fate{policy.FateSame, policy.FatePasses, policy.FateBreaks, policy.FateUnknown} {
			t.row(fate, plural(r.Flows[fate], "flow"))
		}
		if len(r.Changes) == 0 {
			return
		}
		t.line("")
		t.row("FLOWS", "FATE", "WHO", "TO", "WHY")
		for _, k := range r.Changes {
			t.row(k.Flows, k.Fate, k.Who, k.To, k.Why)
		}
	})
}
