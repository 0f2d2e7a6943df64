package e2e_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"net/netip"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
)

// stored is a flow record as the collector keeps it.
type stored struct {
	Node  string
	Epoch string
	Seq   uint64
	Class string
	Flow  record
}

type record struct {
	Event, Verdict, Reason  string
	FlowID                  string `json:"flow_id"`
	Client, Server, Service string
	Identity, Grant, Detail string
	Application, Proof      string
	BytesToServer           uint64 `json:"bytes_to_server"`
	BytesToClient           uint64 `json:"bytes_to_client"`
	PacketsToServer         uint64 `json:"packets_to_server"`
	PacketsToClient         uint64 `json:"packets_to_client"`
	Count                   uint64
	Caller                  struct{ Identity, Why string }
}

func (r record) String() string {
	return fmt.Sprintf("%s %s %s %s→%s %s%s x%d", r.Event, r.Verdict, r.Reason, r.Client, r.Server, r.Identity, r.Grant, r.Count)
}

// followed is the collector's log, as `sallyport flows --follow` shows it to whoever looks on.
type followed struct {
	mu      sync.Mutex
	partial []byte   // guarded by mu; a line that has not ended
	records []stored // guarded by mu
	bad     error    // guarded by mu
}

// follow begins with what the collector has already.
func (w *world) follow(t *testing.T) *followed {
	t.Helper()
	f := &followed{}
	cmd := exec.Command(filepath.Join(w.bin, "sallyport"), "flows", "--follow", "-o", "json", "--collector", "unix:"+w.files.recordsSocket)
	cmd.Stdout = f
	_, err := w.Node.Start(cmd)
	must(t, err)
	return f
}

// Write takes the command's output.
func (f *followed) Write(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.partial = append(f.partial, b...)
	for {
		line, rest, ended := bytes.Cut(f.partial, []byte("\n"))
		if !ended {
			return len(b), nil
		}
		var s stored
		if err := json.Unmarshal(line, &s); err != nil {
			f.bad = fmt.Errorf("read record %q: %w", line, err)
		}
		f.records = append(f.records, s)
		f.partial = rest
	}
}

// all are the records so far.
func (f *followed) all(t *testing.T) []record {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	must(t, f.bad)
	var out []record
	for _, s := range f.records {
		out = append(out, s.Flow)
	}
	return out
}

// find waits for a record.
func (f *followed) find(t *testing.T, what string, match func(record) bool) (found record) {
	t.Helper()
	waitUntil(t, "the record of "+what, func() bool {
		for _, r := range f.all(t) {
			if match(r) {
				found = r
				return true
			}
		}
		return false
	})
	return found
}

// of matches the records of one connection.
func of(client netip.AddrPort, event, verdict, reason string) func(record) bool {
	return func(r record) bool {
		return r.Client == client.String() && r.Event == event && r.Verdict == verdict && r.Reason == reason
	}
}

// denials adds up the denials of a client's address at a server: equal ones share a record.
func (f *followed) denials(t *testing.T, client netip.Addr, server netip.AddrPort, reason string) (n uint64) {
	t.Helper()
	for _, r := range f.all(t) {
		c, err := netip.ParseAddrPort(r.Client)
		if err == nil && c.Addr() == client && r.Server == server.String() && r.Event == "DENY" && r.Reason == reason {
			n += r.Count
		}
	}
	return n
}

// log asks the collector for everything it has.
func (w *world) log(t *testing.T) []stored {
	t.Helper()
	return lines[stored](t, w.cli(t, "flows", "-o", "json", "--limit", "1000000", "--collector", "unix:"+w.files.recordsSocket))
}

// grantEvent is a step of a grant as the collector keeps it.
type grantEvent struct {
	Node  string
	Epoch string
	Seq   uint64
	Event struct{ Grant, Step, Why, Actor string }
}

func (w *world) grantEvents(t *testing.T) []grantEvent {
	t.Helper()
	return lines[grantEvent](t, w.cli(t, "grants", "-o", "json", "--limit", "1000000", "--collector", "unix:"+w.files.recordsSocket))
}

// lines reads one JSON object per line.
func lines[T any](t *testing.T, text string) (out []T) {
	t.Helper()
	d := json.NewDecoder(bytes.NewBufferString(text))
	for d.More() {
		var v T
		must(t, d.Decode(&v))
		out = append(out, v)
	}
	return out
}

// collected is a client of the collector, on its local socket.
func (w *world) collected(t *testing.T) *client.Audit {
	t.Helper()
	c, err := client.NewAudit("unix:"+w.files.recordsSocket, nil)
	must(t, err)
	t.Cleanup(func() { must(t, c.Close()) })
	return c
}

// everything makes a query one for all that there is.
const everything = math.MaxInt32

// flows are the stored flow records that match.
func (w *world) flows(t *testing.T, q *api.FlowQuery) (all []*api.StoredFlow) {
	t.Helper()
	q.Limit = everything
	for s, err := range w.collected(t).Flows(t.Context(), q) {
		must(t, err)
		all = append(all, s)
	}
	return all
}

// lostRecords counts what the collector knows to be missing, by class, stage and cause.
func (w *world) lostRecords(t *testing.T) map[string]uint64 {
	t.Helper()
	all := map[string]uint64{}
	for l, err := range w.collected(t).Losses(t.Context(), &api.LossQuery{Limit: everything}) {
		must(t, err)
		all[fmt.Sprintf("%s %s/%s", l.Class, l.Loss.Stage, l.Loss.Cause)] += l.Loss.Count
	}
	return all
}

// settled waits until the agent has no live flow, and nothing that the collector does not have.
func (w *world) settled(t *testing.T) {
	t.Helper()
	agent, err := client.NewAgent(filepath.Join(w.files.run, "agent.sock"))
	must(t, err)
	defer func() { must(t, agent.Close()) }()
	var s *api.StatusReply
	for end := time.Now().Add(3 * patience); ; time.Sleep(20 * time.Millisecond) {
		s, err = agent.Status(t.Context())
		if err == nil && s.LiveFlows == 0 && s.SpoolCritical == 0 && s.SpoolFlow == 0 && s.LostFlow == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the collector does not have everything: %v, %v", s, err)
		}
	}
}
