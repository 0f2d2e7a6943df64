package console

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/grant"
)

// Bounds of the page of one grant.
const (
	maxSteps       = 1000
	maxCarried     = 200
	maxIDLength    = 200
	maxStatementIn = grant.MaxEnvelope
)

type grantPage struct {
	ID         string
	BreakGlass bool
	Asked      *payload // nil: no envelope of it is stored
	Steps      []*step
	FullSteps  bool
	Nodes      []grantNode
	Flows      []flowRow
	FullFlows  bool
	FlowsAt    string // the address of the page with its flows
	Proof      *proofView
	Review     string // that is open
	Reviewed   bool   // as a node told
}

// payload is what the grant itself says.
type payload struct {
	grant.Payload
	From        string // the node whose record has the envelope
	Clients     []string
	Budget      string
	Made        time.Time
	KeyIDs      []string
	Digest      string
	DurationIs  string
	IdleIs      string
	Unspecified bool // ports: all of them
}

// grantNode is what became of the grant on one node.
type grantNode struct {
	Node     string
	Live     *livePath // nil: it is over there, or never was active
	Ended    *step
	Activity *usage
	Tide     *tideView
}

// tideView compares what the kernel counted with the records.
type tideView struct {
	At                       time.Time
	Kernel, Recorded, Live   uint64 // bytes, both directions
	KernelFlows              uint64
	Cause                    string
	Differs, Ended, Explains bool
}

// step is one event as it is shown.
type step struct {
	Node  string
	Time  time.Time
	Event *api.GrantEvent
	Said  *grant.Statement // where somebody signed it
	InLog int64            // its leaf; -1: it is not proven
	Seal  *sealView        // the batch that its node sealed it in
	key   recordKey
}

func (c *console) grant(r *http.Request) (answer, error) {
	if r.FormValue("id") == "" {
		return answer{name: "find", title: "A grant by its id"}, nil
	}
	id, err := grantID(r)
	if err != nil {
		return answer{}, err
	}
	p := &grantPage{ID: id}
	for _, add := range []func(context.Context, *grantPage) error{c.addSteps, c.addCarried, c.addTides, c.addProof} {
		if err := add(r.Context(), p); err != nil {
			return answer{}, err
		}
	}
	return answer{name: "grant", title: "Grant " + cut(40, id), data: p}, nil
}

func grantID(r *http.Request) (string, error) {
	id := strings.TrimSpace(r.FormValue("id"))
	if id == "" || len(id) > maxIDLength {
		return "", wrongInput("A grant is named by its id.", "Go on from a list: the live paths, the reviews, or a flow.")
	}
	return id, nil
}

func (c *console) addSteps(ctx context.Context, p *grantPage) error {
	q := &api.GrantQuery{Grant: p.ID, Limit: maxSteps}
	stream, err := c.cfg.Audit.GrantEvents(ctx, q)
	events, full, err := collect(q.GetLimit(), stream, err)
	if err != nil {
		return err
	}
	if len(events) == 0 {
		return &problem{http.StatusNotFound, "No such grant", "The collector has no event of the grant " + cut(60, p.ID) + ".", "Check the id. What is older than the collector keeps is gone."}
	}
	p.FullSteps = full
	now := c.cfg.Now()
	live := livePaths(events, now)
	for _, e := range events {
		s := newStep(e)
		p.Steps = append(p.Steps, s)
		p.BreakGlass = p.BreakGlass || isBreakGlass(e.GetEvent())
		if p.Asked == nil && e.GetEvent().GetStep() == activated {
			p.Asked = readPayload(e)
		}
	}
	slices.SortStableFunc(p.Steps, func(a, b *step) int { return a.Time.Compare(b.Time) })
	for _, s := range p.Steps {
		p.note(s, live)
	}
	p.Reviewed = len(only(events, reviewed)) > 0
	if open := openReviews(only(events, activated), only(events, reviewed), now); len(open) > 0 {
		p.Review = "is still live"
		if open[0].Waiting != "" {
			p.Review = "ended " + open[0].Waiting
		}
	}
	return c.addNodes(ctx, live, now)
}

func only(events []*api.StoredGrantEvent, step string) (some []*api.StoredGrantEvent) {
	for _, e := range events {
		if e.GetEvent().GetStep() == step {
			some = append(some, e)
		}
	}
	return some
}

func newStep(e *api.StoredGrantEvent) *step {
	s := &step{Node: e.GetNode(), Time: at(e.GetEvent().GetTime()), Event: e.GetEvent(), InLog: -1, key: recordKey{e.GetNode(), e.GetEpoch(), e.GetSeq()}}
	if said, err := grant.PeekStatement(e.GetEvent().GetEnvelope()); err == nil {
		s.Said = &said
	}
	return s
}

// note keeps what a step says of its node.
func (p *grantPage) note(s *step, live []*livePath) {
	i := slices.IndexFunc(p.Nodes, func(n grantNode) bool { return n.Node == s.Node })
	if i < 0 {
		p.Nodes = append(p.Nodes, grantNode{Node: s.Node})
		i = len(p.Nodes) - 1
		if l := slices.IndexFunc(live, func(l *livePath) bool { return l.Node == s.Node }); l >= 0 {
			p.Nodes[i].Live = live[l]
		}
	}
	if slices.Contains(ends, s.Event.GetStep()) {
		p.Nodes[i].Ended = s
	}
}

// readPayload takes the envelope apart that the node verified before it activated the grant. Nothing is decided by it here.
func readPayload(e *api.StoredGrantEvent) *payload {
	envelope := e.GetEvent().GetEnvelope()
	asked, err := grant.Peek(envelope)
	if err != nil {
		return nil
	}
	p := &payload{Payload: asked, From: e.GetNode(), Budget: asked.Budget.String(), Made: asked.Made(), DurationIs: span(asked.Duration), Clients: addressTexts(asked.Addresses)}
	if asked.IdleTimeout > 0 {
		p.IdleIs = span(asked.IdleTimeout)
	}
	p.Digest, _ = grant.Digest(envelope) // it was read just now
	var signed dsse.Envelope
	if json.Unmarshal(envelope, &signed) == nil {
		for _, s := range signed.Signatures {
			if _, err := base64.StdEncoding.DecodeString(s.Sig); err == nil {
				p.KeyIDs = append(p.KeyIDs, s.KeyID)
			}
		}
	}
	return p
}

func addressTexts(all []netip.Addr) (texts []string) {
	for _, a := range all {
		texts = append(texts, a.String())
	}
	return texts
}

func (c *console) addCarried(ctx context.Context, p *grantPage) error {
	q := &api.FlowQuery{Grant: p.ID, Limit: maxCarried}
	stream, err := c.cfg.Audit.Flows(ctx, q)
	stored, full, err := collect(q.GetLimit(), stream, err)
	if err != nil {
		return err
	}
	p.Flows, p.FullFlows = rowsOf(stored), full
	p.FlowsAt = with(map[string][]string{"last": {"all"}}, "grant", p.ID)
	return nil
}

// addTides takes the latest comparison of the kernel's counters on each node.
func (c *console) addTides(ctx context.Context, p *grantPage) error {
	for i := range p.Nodes {
		q := &api.TideQuery{Node: p.Nodes[i].Node, Grant: p.ID, Limit: 1}
		stream, err := c.cfg.Audit.Tides(ctx, q)
		tides, _, err := collect(q.GetLimit(), stream, err)
		if err != nil {
			return err
		}
		p.Nodes[i].Activity = usages(tides)[p.ID]
		for _, t := range tides {
			p.Nodes[i].Tide = compared(t.GetTide(), p.ID)
		}
	}
	return nil
}

func compared(t *api.Tide, id string) *tideView {
	v := &tideView{At: at(t.GetTime())}
	both := func(v *api.Volume) uint64 { return v.GetBytesToServer() + v.GetBytesToClient() }
	for _, p := range t.GetPaths() {
		if p.GetGrant() != id {
			continue
		}
		v.Kernel, v.Recorded, v.Live = v.Kernel+both(p.GetKernel()), v.Recorded+both(p.GetRecorded()), v.Live+both(p.GetLive())
		v.KernelFlows += p.GetKernel().GetFlows()
		v.Ended = v.Ended || p.GetEnded()
		if p.GetCause() != "" {
			v.Differs, v.Cause = true, p.GetCause()
		}
	}
	return v
}
