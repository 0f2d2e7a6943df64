package proxy

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/token"
)

// JudgeConfig of a judge. Trust, Policy and Report must be set.
type JudgeConfig struct {
	// Trust verifies the certificates of clients.
	Trust  x509bundle.Source
	Policy *PolicyFile
	// Report takes flow records. It must not block, and is called from many goroutines.
	Report func(flow.Record)
	// Tokens verifies bearer tokens. nil: they prove nobody.
	Tokens *token.Verifier
	// Live gives the id of the grant by whose live path the client could go around every proxy now; empty: there is none. nil: nobody
	// is let in by a grant.
	Live func(ctx context.Context, service string, client netip.AddrPort, port uint16) (grant string, err error)
}

// Judge decides for another proxy what this one would decide of the same connection or request, with the same code, and records
// it. It carries nothing, and so it cuts nothing.
type Judge struct {
	cfg      JudgeConfig
	instance string // prefix of flow ids
	denials  *denials
	pace     *pace
	now      func() time.Time
	asked    atomic.Uint64
}

// Question is a connection that another proxy has taken, or a request on it.
type Question struct {
	// Asker is the other proxy, for the record.
	Asker string
	// Client and Server are the ends of the connection as the other proxy has it: Server is where the client wanted to go.
	Client, Server netip.AddrPort
	// Elsewhere says that the other proxy need not be on this node: an address that no service has is not one of the node's.
	Elsewhere bool
	// Service is its name where Server does not tell. Empty: by Server.
	Service string
	// Certificate is the client's, which has proven in a handshake to have its key. nil: it showed none.
	Certificate *x509.Certificate
	// Principal is who the other proxy says the client is, where that is enough. Zero: nobody.
	Principal spiffeid.ID
	// Request is the request that is to be carried, which must not be used afterwards. nil: the connection as a whole.
	Request *http.Request
	// Wrong says why the question can only be refused; nil: it can be asked.
	Wrong error
}

// Answer is what the other proxy is told.
type Answer struct {
	Allowed bool
	// Status, Text and Header are for the client of a request that is refused.
	Status int
	Text   string
	Header http.Header
	Reason flow.Reason
	Why    string
	// Service and Identity are what was found out; each may be empty.
	Service, Identity string
	// Grant is the id of the one that it is let in by; empty: a rule did.
	Grant string
	// Set and Remove are what has to be changed in the header of a request before it is sent on.
	Set    http.Header
	Remove []string
}

// NewJudge makes a judge whose denials Run reports.
func NewJudge(cfg JudgeConfig) (*Judge, error) {
	if cfg.Trust == nil || cfg.Policy == nil || cfg.Report == nil {
		return nil, errors.New("configure judge: Trust, Policy and Report must be set")
	}
	return &Judge{cfg: cfg, instance: ulid.Make().String(), denials: newDenials(cfg.Report), pace: newPace(), now: time.Now}, nil
}

// Run reports denials that were counted, until ctx ends, and returns nil then.
func (j *Judge) Run(ctx context.Context) error {
	j.denials.run(ctx)
	return nil
}

// Judge answers a question. ctx bounds how long it may wait for keys of providers and for the agent.
func (j *Judge) Judge(ctx context.Context, q Question) Answer {
	c := &judged{j: j, q: q, set: j.cfg.Policy.Set(), began: j.now()}
	d := c.admit(ctx)
	if d != nil && c.mayBypass(d) {
		d = c.underGrant(ctx, d)
	}
	if d != nil {
		return c.refuse(d)
	}
	return c.allow()
}

func (c *judged) refuse(d *rejection) Answer {
	rec := c.record(flow.EventDeny, flow.VerdictDenied, d.reason, cmp.Or(d.detail, d.why))
	if rec.Request != nil {
		rec.Request.Status = d.status
	}
	c.j.denials.add(rec)
	return Answer{
		Status: d.status, Reason: d.reason, Why: d.why, Header: d.header, Service: rec.Service, Identity: rec.Identity,
		Text: fmt.Sprintf("%sflow: %s\n", page(d.status, d.reason, d.why), rec.FlowID),
	}
}

func (c *judged) allow() Answer {
	event, reason := flow.EventRequest, flow.ReasonIdentity
	if c.q.Request == nil {
		event = flow.EventOpen
	}
	if c.grant != "" {
		reason = flow.ReasonPathLive
	}
	rec := c.record(event, flow.VerdictProxied, reason, "")
	if rec.Request != nil {
		rec.Request.Rule, rec.Request.Took = c.rule, c.j.now().Sub(c.began)
	}
	c.j.cfg.Report(rec)
	a := Answer{Allowed: true, Reason: reason, Service: rec.Service, Identity: rec.Identity, Grant: c.grant}
	if c.q.Request != nil {
		a.Set, a.Remove = c.changes()
	}
	return a
}

// changes are what makes the header that came the one that the proxy would send on. Headers between two neighbours are left to
// the other proxy, whose neighbours they are.
func (c *judged) changes() (set http.Header, remove []string) {
	came := c.q.Request.Header
	out := came.Clone()
	c.stripProofs(out)
	removeProxysWord(out)
	if c.caller.String() != "" {
		setIdentity(out, c.caller, c.target)
	}
	setForwarded(out, c.caller, c.target)
	out.Set(headerVia, strings.Join(append(c.via, c.mark()), ", "))
	set = http.Header{}
	for name, values := range out {
		if isProxysWord(name) || !slices.Equal(values, came[name]) {
			set[name] = values
		}
	}
	for name := range came {
		if _, kept := out[name]; !kept {
			remove = append(remove, name)
		}
	}
	slices.Sort(remove)
	return set, remove
}

func (c *judged) record(event flow.Event, verdict flow.Verdict, reason flow.Reason, detail string) flow.Record {
	rec := flow.Record{
		Event: event, Time: c.began, Boot: bootTime(), CPU: -1, FlowID: c.j.instance + "-" + strconv.FormatUint(c.j.asked.Add(1), 16),
		Verdict: verdict, Reason: reason, Protocol: "tcp", Client: bare(c.q.Client), Server: bare(c.q.Server), Service: c.service.Name,
		Count: 1, Identity: c.caller.String(), Proof: c.caller.Proof, Grant: c.grant,
	}
	if detail != "" {
		detail += "; "
	}
	rec.Detail = oneLine(detail + "asked by " + c.q.Asker)
	if r := c.q.Request; r != nil {
		rec.Request = &flow.Request{Number: 1, Method: oneLine(r.Method), Host: c.target.host, Path: c.target.path}
	}
	return rec
}
