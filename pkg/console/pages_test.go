package console_test

import (
	"context"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/console"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/proof"
)

var tags = regexp.MustCompile(`(?s)<[^>]*>|\n\s*`)

// words are what is left of a page without its tags, for messages.
func words(page string) string { return tags.ReplaceAllString(page, " ") }

func get(t testing.TB, address string) string {
	t.Helper()
	resp := must(http.Get(address))(t)
	defer resp.Body.Close()
	return string(must(io.ReadAll(resp.Body))(t))
}

// TestPages: what each page and filter has, and what it refuses in words.
func TestPages(t *testing.T) {
	t.Parallel()
	n := newNight(t)
	s := n.serve()
	for _, c := range []struct {
		path      string
		code      int
		has, lack []string
	}{
		{"/", 200, []string{n.backup.ID, n.broke.ID, "46.6 MiB in, 1.4 GiB out", "may be over", `http-equiv="refresh"`, "pager: incident"}, []string{n.earlier.ID, n.reviewed.ID}},
		{"/?refresh=off", 200, []string{"Standing still"}, []string{`http-equiv="refresh"`}},
		{"/reviews", 200, []string{n.broke.ID, "may still be live"}, []string{n.reviewed.ID, n.backup.ID}},
		{"/reviews?days=8", 400, []string{"7, 30 or 90"}, nil},
		{"/nodes", 200, []string{"not connected", "watched only", "reports", "1 204"}, nil},
		{"/losses?node=node-2", 200, []string{"Nothing of this node was lost"}, nil},
		{"/losses", 200, []string{"kernel_ring: best_effort_full"}, nil},
		{"/flows?verdict=DENIED", 200, []string{"no TLS record"}, []string{"IDENTITY</span>", "reports"}},
		{"/flows?reason=NO_TLS&event=WATCHED", 200, []string{"reports", "let by; enforced it would be DENIED"}, nil},
		{"/flows?identity=spiffe://example.org/ns/shop/sa/checkout&client=10.1.3.4", 200, []string{"newest first: 1<", "10.1.3.4:50004"}, nil},
		{"/flows?grant=" + n.broke.ID, 200, []string{"orders-db", "node-2"}, []string{"10.1.3.4"}},
		{"/flows?until=2020-01-01T00:00", 200, []string{"No record fits"}, nil},
		{"/flows?client=10.0.0.1:80", 400, []string{"without a port"}, nil},
		{"/flows?from=yesterday", 400, []string{"2026-11-23T03:15"}, nil},
		{"/flows?last=ever", 400, []string{"no period"}, nil},
		{"/flows?show=1000000", 400, []string{"100, 500 or 2000"}, nil},
		{"/grant?id=" + n.reviewed.ID, 200, []string{"It has been reviewed", "signed by dave", "restarted the primary", "3 of 3", "Proof verified", "--key KEY --by NAME --why TEXT --out FILE"}, nil},
		{"/grant?id=" + n.earlier.ID, 200, []string{"EXPIRED", "its time was over"}, []string{"Revoke it on"}},
		{"/grant?id=01J8ZQ4X5M3T9V0Y2B7C6D1E4F", 404, []string{"No such grant"}, nil},
		{"/grant?id=", 200, []string{"The grant's id", `action="/grant"`}, nil},
		{"/grant?id=" + strings.Repeat("x", 201), 400, []string{"named by its id"}, nil},
		{"/nowhere", 404, []string{"no such page"}, nil},
	} {
		resp := must(http.Get(s.URL + c.path))(t)
		body := string(must(io.ReadAll(resp.Body))(t))
		resp.Body.Close()
		if resp.StatusCode != c.code {
			t.Errorf("%s: %s", c.path, resp.Status)
		}
		for _, want := range c.has {
			if !strings.Contains(body, want) {
				t.Errorf("%s lacks %q: %s", c.path, want, words(body))
			}
		}
		for _, not := range c.lack {
			if strings.Contains(body, not) {
				t.Errorf("%s has %q", c.path, not)
			}
		}
		for name, want := range map[string]string{"Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; script-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
			"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"} {
			if have := resp.Header.Get(name); have != want {
				t.Errorf("%s: %s is %q", c.path, name, have)
			}
		}
	}
}

// TestTooMuch: what would take more memory than a page may have is refused in words, and many pages at once come one after the other.
func TestTooMuch(t *testing.T) {
	t.Parallel()
	w, now := newWorld(t), time.Now()
	one := w.node("node-1")
	for range 17 {
		one.entry(&api.Entry{Record: &api.Entry_Flow{Flow: &api.FlowRecord{Event: "DENY", Time: timestamppb.New(now), Service: "big", Detail: strings.Repeat("x", 1<<20)}}})
	}
	one.entry(&api.Entry{Record: &api.Entry_Flow{Flow: &api.FlowRecord{Event: "OPEN", Time: timestamppb.New(now), Service: "small"}}})
	one.delivered()
	s := w.serve()
	if body := get(t, s.URL+"/flows"); !strings.Contains(body, "too large to be shown together") {
		t.Errorf("have %.300s", words(body))
	}
	var all sync.WaitGroup
	for range 60 {
		all.Go(func() {
			if body := get(t, s.URL+"/flows?service=small"); !strings.Contains(body, "newest first: 1<") {
				t.Errorf("have %.300s", words(body))
			}
		})
	}
	all.Wait()
}

// TestReceipt: the file that is downloaded is proven by the log's public key alone.
func TestReceipt(t *testing.T) {
	t.Parallel()
	n := newNight(t)
	resp := must(http.Get(n.serve().URL + "/grant/bundle?id=" + n.backup.ID))(t)
	defer resp.Body.Close()
	if have := resp.Header.Get("Content-Disposition"); have != `attachment; filename="grant-`+n.backup.ID+`.bundle"` {
		t.Errorf("it is sent as %s", have)
	}
	key := must(note.NewVerifier(n.logKey()))(t)
	if r := must(proof.Verify(resp.Body, key))(t); r.Verdict != proof.Proven || r.Events != 2 {
		t.Errorf("have %+v", r)
	}
}

// TestTampered: what was changed behind the collector's back is disproved, by the receipt or by the batch, and so is all under a foreign key.
func TestTampered(t *testing.T) {
	t.Parallel()
	w, now := newWorld(t), time.Now()
	g := newGrant(t, now, nil)
	one := w.node("node-1", &api.Entry{Record: &api.Entry_Grant{Grant: g.activated(now, now.Add(time.Minute))}}, tide(now, &api.PathTide{Grant: g.ID, Service: "postgres"}))
	one.delivered()
	page := func() string { return get(t, w.serve().URL+"/grant?id="+g.ID) }
	w.key = w.logKey()
	expect := func(name string, wants ...string) {
		t.Helper()
		for _, want := range wants {
			if body := page(); !strings.Contains(body, want) {
				t.Errorf("%s: no %q in %s", name, want, words(body))
			}
		}
	}
	expect("before", "Proof verified", "1 of 1", "sealed in batch 1")
	if body := page(); strings.Contains(body, "as the collector itself tells it") {
		t.Error("the key that was given is said to be the collector's word")
	}
	w.tamper(`UPDATE tides SET data = CAST(replace(data, 'postgres', 'mariadb!') AS BLOB)`)
	expect("what is in the same batch was changed", "the records are disproved", "the batch that has the ACTIVATED")
	w.tamper(`UPDATE tides SET data = CAST(replace(data, 'mariadb!', 'postgres') AS BLOB)`)
	expect("put right again", "Proof verified")
	w.tamper(`UPDATE grant_events SET data = CAST(replace(data, 'alice', 'mlice') AS BLOB)`)
	expect("the event was changed", "the records are disproved", "is not what the log has there", "believe nothing on this page")
	w.tamper(`UPDATE grant_events SET data = CAST(replace(data, 'mlice', 'alice') AS BLOB)`)
	w.key = newWorld(t).logKey()
	expect("under a foreign key", "the records are disproved")
}

// liar is a collector that shows other events than it has, or proves others than it was asked for.
type liar struct {
	api.AuditClient
	event    func(*api.StoredGrantEvent)
	evidence func(*api.EvidenceRequest)
}

func (l liar) GrantEvents(ctx context.Context, q *api.GrantQuery, o ...grpc.CallOption) (grpc.ServerStreamingClient[api.StoredGrantEvent], error) {
	stream, err := l.AuditClient.GrantEvents(ctx, q, o...)
	return changed{stream, l.event}, err
}

func (l liar) Evidence(ctx context.Context, r *api.EvidenceRequest, o ...grpc.CallOption) (grpc.ServerStreamingClient[api.EvidenceChunk], error) {
	l.evidence(r)
	return l.AuditClient.Evidence(ctx, r, o...)
}

type changed struct {
	grpc.ServerStreamingClient[api.StoredGrantEvent]
	change func(*api.StoredGrantEvent)
}

func (c changed) Recv() (*api.StoredGrantEvent, error) {
	e, err := c.ServerStreamingClient.Recv()
	if err == nil {
		c.change(e)
	}
	return e, err
}

// TestLyingCollector: what is shown is held to what is proven, so that a true proof of something else proves nothing.
func TestLyingCollector(t *testing.T) {
	t.Parallel()
	n := newNight(t)
	honest := n.audit
	for name, c := range map[string]struct {
		event    func(*api.StoredGrantEvent)
		evidence func(*api.EvidenceRequest)
		want     string
	}{
		"another requester":   {event: func(e *api.StoredGrantEvent) { e.Event.Requester = "mallory" }, want: "is shown otherwise than leaf"},
		"another number":      {event: func(e *api.StoredGrantEvent) { e.Seq += 1000 }, want: "2 of the 2 events below are not in the receipt"},
		"another node":        {event: func(e *api.StoredGrantEvent) { e.Node = "node-2" }, want: "2 of the 2 events below are not in the receipt"},
		"another grant's":     {evidence: func(r *api.EvidenceRequest) { r.Grant = strings.Replace(r.Grant, n.backup.ID, n.earlier.ID, 1) }, want: "2 of the 2 events below are not in the receipt"},
		"no batch":            {evidence: func(r *api.EvidenceRequest) { r.Seq = min(r.Seq, 1) << 40 }, want: "2 of 2 events are in no batch that a node sealed"},
		"another one's batch": {evidence: func(r *api.EvidenceRequest) { r.Seq = min(r.Seq, 1) }, want: "in which its node sealed another record"},
	} {
		l := liar{honest, func(*api.StoredGrantEvent) {}, func(*api.EvidenceRequest) {}}
		if c.event != nil {
			l.event = c.event
		}
		if c.evidence != nil {
			l.evidence = c.evidence
		}
		n.audit = l
		if body := get(t, n.serve().URL+"/grant?id="+n.backup.ID); strings.Contains(body, "Proof verified") || !strings.Contains(body, c.want) {
			t.Errorf("%s: %s", name, words(body))
		}
	}
}

// TestReviewIsNotInferred: that a break-glass grant was reviewed is said if a node told so, and not because its activation is not on the page.
func TestReviewIsNotInferred(t *testing.T) {
	t.Parallel()
	w, now := newWorld(t), time.Now()
	one := w.node("node-1", &api.Entry{Record: &api.Entry_Grant{Grant: &api.GrantEvent{Grant: "g", Step: "REFUSED", Kind: string(grant.BreakGlass), Time: timestamppb.New(now)}}})
	one.delivered()
	if body := get(t, w.serve().URL+"/grant?id=g"); strings.Contains(body, "It has been reviewed") || !strings.Contains(body, "Here is neither its activation nor a review") {
		t.Errorf("have %s", words(body))
	}
}

// TestActs: what came of it is told in words, a reason is needed, and nothing is taken from another site.
func TestActs(t *testing.T) {
	t.Parallel()
	n := newNight(t)
	s := n.serve()
	post := func(path string, form url.Values, header ...string) (int, string) {
		t.Helper()
		r := must(http.NewRequest(http.MethodPost, s.URL+path, strings.NewReader(form.Encode())))(t)
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		for i := 0; i < len(header); i += 2 {
			r.Header.Set(header[i], header[i+1])
		}
		resp := must(http.DefaultClient.Do(r))(t)
		defer resp.Body.Close()
		return resp.StatusCode, string(must(io.ReadAll(resp.Body))(t))
	}
	review := string(n.broke.statement(t, grant.StepReviewed, "dave", "fine", n.now))
	revoke := func(node, why string) url.Values {
		return url.Values{"grant": {n.backup.ID}, "node": {node}, "why": {why}}
	}
	for name, c := range map[string]struct {
		path string
		form url.Values
		from []string
		code int
		want []string
	}{
		"no reason":       {"/revoke", revoke("node-1", " "), nil, 400, []string{"The record needs a reason"}},
		"no node":         {"/revoke", revoke("", "x"), nil, 400, []string{"named no grant and node"}},
		"another site":    {"/revoke", revoke("node-1", "x"), []string{"Sec-Fetch-Site", "cross-site"}, 403, []string{"That came from another site"}},
		"another origin":  {"/revoke", revoke("node-1", "x"), []string{"Origin", "http://evil.example"}, 403, []string{"That came from another site"}},
		"away":            {"/revoke", revoke("node-2", "x"), nil, 409, []string{"refused", "node-2", "is not connected", "log in to the node"}},
		"no statement":    {"/statement", url.Values{"node": {"node-1"}, "statement": {"{}"}}, nil, 400, []string{"That is no statement"}},
		"nothing":         {"/statement", url.Values{"node": {"node-1"}}, nil, 400, []string{"from 1 to 65536 bytes"}},
		"too much":        {"/statement", url.Values{"node": {"node-1"}, "statement": {strings.Repeat("x", 1<<20)}}, nil, 400, []string{"too large"}},
		"a stranger's":    {"/statement", url.Values{"node": {"node-1"}, "statement": {review}}, nil, 409, []string{"“reviewed” by dave: refused", "no Keyring has the key", "have it signed by somebody whom policy names"}},
		"it may be done":  {"/revoke", revoke("node-1", "it is enough"), nil, 200, []string{"Revoke: done", "revoked", "it is enough"}},
		"where one looks": {"/flows", url.Values{}, nil, 404, []string{"no such page"}},
	} {
		code, body := post(c.path, c.form, c.from...)
		if code != c.code {
			t.Errorf("%s: %d", name, code)
		}
		for _, want := range c.want {
			if !strings.Contains(body, want) {
				t.Errorf("%s lacks %q: %s", name, want, words(body))
			}
		}
	}
	n.one.delivered()
	if body := get(t, s.URL+"/grant?id="+n.backup.ID); !strings.Contains(body, "REVOKED") || !strings.Contains(body, "it is enough") {
		t.Errorf("the record: %s", words(body))
	}
	n.mayAct = false
	if body := get(t, n.serve().URL+"/grant?id="+n.broke.ID); strings.Contains(body, `method="post"`) {
		t.Errorf("who may not act is shown how: %s", words(body))
	}
}

// TestDoor: one browser comes in, by the word that was printed, and under the console's own name alone.
func TestDoor(t *testing.T) {
	t.Parallel()
	s := httptest.NewUnstartedServer(nil)
	inside := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "inside") })
	var address string
	s.Config.Handler, address = console.Door(s.Listener.Addr().String(), inside)
	s.Start()
	t.Cleanup(s.Close)
	browser := func() *http.Client { return &http.Client{Jar: must(cookiejar.New(nil))(t)} }
	visit := func(c *http.Client, address, host string) string {
		t.Helper()
		r := must(http.NewRequest(http.MethodGet, address, nil))(t)
		r.Host = host
		resp := must(c.Do(r))(t)
		defer resp.Body.Close()
		return resp.Status[:3] + " " + string(must(io.ReadAll(resp.Body))(t))
	}
	mine, theirs := browser(), browser()
	for _, c := range []struct {
		who        *http.Client
		path, host string
		want       string
	}{
		{mine, s.URL, "", "403 open the address"},
		{theirs, s.URL + "/enter?word=", "", "403 this address was used, or is not"},
		{theirs, s.URL + "/enter?word=ABCDEFGHIJKLMNOPQRSTUVWXYZ", "", "403 this address was used, or is not"},
		{theirs, address, "evil.example", "421 this is"},
		{mine, address, "", "200 inside"},
		{mine, s.URL, "", "200 inside"},
		{mine, s.URL, "evil.example:80", "421 this is"},
		{theirs, address, "", "403 this address was used"},
		{theirs, s.URL, "", "403 open the address"},
	} {
		if have := visit(c.who, c.path, c.host); !strings.HasPrefix(have, c.want) {
			t.Errorf("%s as %q: %q, want %q", c.path, c.host, have, c.want)
		}
	}
}
