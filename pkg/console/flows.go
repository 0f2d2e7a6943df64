package console

import (
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// shown are how many records a page of flows can have; more are a narrower question.
var shown = []uint32{100, 500, 2000}

// periods are the times to choose from.
var periods = []struct {
	Value, Name string
	Back        time.Duration
}{{"15m", "15 minutes", 15 * time.Minute}, {"1h", "hour", time.Hour}, {"6h", "6 hours", 6 * time.Hour}, {"24h", "24 hours", 24 * time.Hour}, {"168h", "7 days", 7 * 24 * time.Hour}}

const defaultPeriod = "1h"

// formTime is how browsers write a time that was picked.
const formTime = "2006-01-02T15:04"

type option struct {
	Value, Name string
	Chosen      bool
}

type field struct{ Name, Label, Value, Hint string }

type flowsPage struct {
	Fields                             []field
	Verdicts, Reasons, Events, Periods []option
	From, Until                        string // as they were given
	Flows                              []flowRow
	Full                               bool
	More                               string // the address of a page with more of them; empty: there are no more, or too many
	Newer                              string // the address of what came after these
	Active                             int    // filters
}

// flowRow is one record as it is shown.
type flowRow struct {
	Node  string
	Time  time.Time
	Class string
	*api.FlowRecord
	Late    bool // it came a while after it happened
	Watched bool // it was let by, and its verdict is what Enforce would say
}

// late is how long after its time a record counts as handed in later.
const late = time.Minute

func (c *console) flows(r *http.Request) (answer, error) {
	form := r.URL.Query()
	q, err := c.flowQuery(form)
	if err != nil {
		return answer{}, err
	}
	stream, err := c.cfg.Audit.Flows(r.Context(), q)
	stored, full, err := collect(q.GetLimit(), stream, err)
	if err != nil {
		return answer{}, err
	}
	p := flowsPage{Full: full, Flows: rowsOf(stored), From: form.Get("from"), Until: form.Get("until")}
	p.ask(form, q)
	if full && form.Get("after") == "" {
		if i := slices.Index(shown, q.GetLimit()); i >= 0 && i+1 < len(shown) {
			p.More = with(form, "show", strconv.Itoa(int(shown[i+1])))
		}
	}
	if n := len(stored); n > 0 && stored[n-1].GetCursor() != "" {
		p.Newer = with(form, "after", stored[n-1].GetCursor())
	}
	return answer{name: "flows", title: "Flows", data: p}, nil
}

// with is the page's address with one thing changed.
func with(form url.Values, name, value string) string {
	changed := url.Values{}
	for k, v := range form {
		changed[k] = v
	}
	changed.Set(name, value)
	return "/flows?" + changed.Encode()
}

func rowsOf(stored []*api.StoredFlow) []flowRow {
	rows := make([]flowRow, 0, len(stored))
	for _, s := range stored {
		t := at(s.GetFlow().GetTime())
		rows = append(rows, flowRow{s.GetNode(), t, className(s.GetClass()), s.GetFlow(), at(s.GetReceived()).Sub(t) > late, s.GetFlow().GetEvent() == flow.EventWatched.String()})
	}
	slices.Reverse(rows)
	slices.SortStableFunc(rows, func(a, b flowRow) int { return b.Time.Compare(a.Time) })
	return rows
}

func (c *console) flowQuery(form url.Values) (*api.FlowQuery, error) {
	get := func(name string) string { return strings.TrimSpace(form.Get(name)) }
	q := &api.FlowQuery{Node: get("node"), Service: get("service"), Identity: get("identity"), Grant: get("grant"), Verdict: get("verdict"),
		Reason: get("reason"), Event: get("event"), Client: get("client"), After: get("after"), Limit: shown[0]}
	if q.GetClient() != "" {
		if _, err := netip.ParseAddr(q.GetClient()); err != nil {
			return nil, wrongInput("The client is an address, without a port.", "Write it like 10.0.0.7 or fd00::7.")
		}
	}
	if s := get("show"); s != "" {
		n, err := strconv.ParseUint(s, 10, 32)
		if err != nil || !slices.Contains(shown, uint32(n)) {
			return nil, wrongInput("A page has 100, 500 or 2000 records.", "Choose one of these.")
		}
		q.Limit = uint32(n)
	}
	var err error
	if q.Since, q.Until, err = c.times(get("last"), get("from"), get("until")); err != nil {
		return nil, err
	}
	return q, nil
}

// times reads what part of the log is asked for. Dates stand above a period; "all" is from the first record on.
func (c *console) times(last, from, until string) (since, to *timestamppb.Timestamp, err error) {
	read := func(s string) (*timestamppb.Timestamp, error) {
		if s == "" {
			return nil, nil
		}
		t, err := time.Parse(formTime, s)
		if err != nil {
			t, err = time.Parse(formTime+":05", s)
		}
		if err != nil {
			return nil, wrongInput("A time is a date and a time of day, in UTC.", "Write it like 2026-11-23T03:15.")
		}
		return timestamppb.New(t), nil
	}
	if since, err = read(from); err != nil {
		return nil, nil, err
	}
	if to, err = read(until); err != nil || since != nil || to != nil || last == "all" {
		return since, to, err
	}
	if last == "" {
		last = defaultPeriod
	}
	for _, p := range periods {
		if p.Value == last {
			return timestamppb.New(c.cfg.Now().Add(-p.Back)), nil, nil
		}
	}
	return nil, nil, wrongInput("That is no period of this page.", "Choose one from the list, or give dates.")
}

// ask fills the form with what was asked.
func (p *flowsPage) ask(form url.Values, q *api.FlowQuery) {
	p.Fields = []field{
		{"service", "Service", q.GetService(), "postgres"}, {"node", "Node", q.GetNode(), "node-1"}, {"client", "Client address", q.GetClient(), "10.0.0.7"},
		{"identity", "Identity", q.GetIdentity(), "spiffe://…"}, {"grant", "Grant", q.GetGrant(), "01J8…"},
	}
	for _, f := range p.Fields {
		if f.Value != "" {
			p.Active++
		}
	}
	names := func(chosen string, all ...string) (o []option) {
		for _, v := range all {
			o = append(o, option{v, v, strings.EqualFold(v, chosen)})
		}
		return o
	}
	p.Verdicts = names(q.GetVerdict(), flow.VerdictProxied.String(), flow.VerdictBypassed.String(), flow.VerdictDenied.String())
	var reasons []string
	for _, r := range flow.Reasons() {
		reasons = append(reasons, r.String())
	}
	slices.Sort(reasons)
	p.Reasons = names(q.GetReason(), reasons...)
	p.Events = names(q.GetEvent(), "OPEN", "CLOSE", "END", "DENY", "UPDATE", flow.EventWatched.String())
	last := form.Get("last")
	if last == "" {
		last = defaultPeriod
	}
	for _, o := range periods {
		p.Periods = append(p.Periods, option{o.Value, o.Name, o.Value == last})
	}
	p.Periods = append(p.Periods, option{"all", "everything kept", last == "all"})
}
