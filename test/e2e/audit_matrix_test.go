package e2e_test

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// matrixEnv is how long the cells with load last together; without it they are as short as can be.
const matrixEnv = "SALLYPORT_MATRIX"

const (
	matrixPace = 50 * time.Millisecond // between connections of one kind: 60 a second in all
	matrixGrow = 10                    // connections before, during and after a fault
)

// TestAuditMatrix: whatever happens to agent, collector, what is between them and what they write to, and whether connections are made
// meanwhile or not: every record that was produced is at the collector once, or counted as lost there. What was produced is known by those
// who made it: clients that count their connections, and the kernel's own counter of the path. `make soak-matrix` takes longer.
func TestAuditMatrix(t *testing.T) {
	leak.Check(t)
	m := newAuditor(t)
	for _, f := range faults {
		for _, loaded := range []bool{false, true} {
			name := f.name + "/idle"
			if loaded {
				name = f.name + "/load"
			}
			t.Run(name, func(t *testing.T) { m.cell(t, f, loaded) })
		}
	}
}

// auditor is a world in which one cell comes after the other. Its collector is behind a relay.
type auditor struct {
	*world
	relay                     *relay
	bypass, identified, plain way
	path                      activated
	grows                     int
	short                     time.Duration // a path that ends as soon is replaced before a cell

	load   bool // of this cell
	began  time.Time
	lost   map[string]uint64 // before this cell
	flows  uint64            // of the path, by the kernel, before this cell
	before int               // connections of this cell that bypassed the proxy under another path
	over   made              // before the fault was over: of what came later nothing may be missing

	mu   sync.Mutex
	next int  // number of the next client without an identity; guarded by mu
	made made // of this cell; guarded by mu
}

// made is what clients know of their connections. Each of them is a number of records.
type made struct {
	bypassed, proxied, denied []netip.AddrPort
	turned                    []netip.AddrPort // tried to bypass, and found no path
	wrong                     []outcome
}

func (m *made) count() int { return len(m.bypassed) + len(m.proxied) + len(m.denied) + len(m.turned) }

// carol vouches for the node.
const carolKeyring = `apiVersion: sallyport.dev/v1alpha1
kind: Keyring
metadata: {name: security}
spec:
  version: 1
  people: [{name: carol, keys: [{publicKey: %q, uses: [resources]}]}]
---
`

func newAuditor(t *testing.T) *auditor {
	t.Helper()
	m := &auditor{world: newWorld(t, options{plain: true}), grows: matrixGrow}
	if long := os.Getenv(matrixEnv); long != "" {
		d, err := time.ParseDuration(long)
		must(t, err)
		m.grows = max(m.grows, int(d/matrixPace)/3/len(faults)) // before, during and after each fault
	}
	m.short = 2*time.Minute + 3*time.Duration(m.grows)*matrixPace
	config, err := os.ReadFile(m.files.collector)
	must(t, err)
	write(t, m.files.collector, strings.Replace(string(config), relayAddr.String(), behindAddr.String(), 1))
	m.onOwnDisk(t, m.files.state)
	m.onOwnDisk(t, m.files.records)
	m.cli(t, "keygen", "--out", m.carol())
	m.writeResources(t, "20-security.yaml", fmt.Sprintf(carolKeyring, publicKey(t, m.carol())))
	m.relay = m.world.relay(t)
	for _, d := range []*daemon{m.collector, m.agent, m.guard, m.proxy} {
		d.start(t)
	}
	m.routeCrowd(t)
	m.bypass, m.identified = m.ways("host-echo", lab.IPv4)[0], m.ways("pod-echo", lab.IPv6)[0]
	m.plain = m.bypass
	m.reopen(t)
	return m
}

func (m *auditor) carol() string { return filepath.Join(m.Dir, "carol.key") }

// reopen opens a path for the connections that bypass the proxy. A node whose store was damaged takes no grant that begins in the second
// of that.
func (m *auditor) reopen(t *testing.T) {
	t.Helper()
	m.flows, m.before = 0, len(m.all().bypassed)
	var last said
	for end := time.Now().Add(patience); time.Now().Before(end); {
		file := m.issue(t, wanted{m.bypass.service, m.bypass.from, "10m"}, "--not-before", time.Now().UTC().Format(time.RFC3339))
		last = m.try("grant", "activate", file, "--key", m.key, "--yes", "-o", "json")
		if last.err == nil {
			must(t, json.Unmarshal([]byte(last.stdout), &m.path))
			return
		}
	}
	t.Fatalf("no path can be opened: %s", last)
}

// cell has one fault happen, and then looks at the books.
func (m *auditor) cell(t *testing.T, f fault, loaded bool) {
	if f.first != nil {
		f.first(m, t)
	}
	m.begin(t, loaded)
	stop := func() {}
	if loaded {
		stop = m.keepConnecting(t)
	} else {
		m.each(t)
	}
	m.grow(t)
	lost := f.do(m, t)
	m.grow(t)
	m.over = m.all()
	m.grow(t)
	stop()
	lasted := time.Since(m.began)
	if !loaded {
		m.each(t)
	}
	made := m.all()
	t.Logf("%d bypassed, %d proxied, %d denied, %d turned away in %v: %.1f connections per second", len(made.bypassed), len(made.proxied),
		len(made.denied), len(made.turned), lasted.Round(time.Millisecond), float64(made.count())/lasted.Seconds())
	m.account(t, lost)
	t.Logf("lost: %v; the books were right after %v", m.lostNow(t), (time.Since(m.began) - lasted).Round(time.Millisecond))
}

func (m *auditor) begin(t *testing.T, loaded bool) {
	t.Helper()
	m.mu.Lock()
	m.made = made{}
	m.mu.Unlock()
	p := m.kernelPath(t)
	if p != nil && time.Until(m.path.Deadline) < m.short {
		m.revoke(t, m.path)
		p = nil
	}
	if p == nil {
		m.reopen(t)
		p = m.kernelPath(t)
	}
	m.flows, m.before = p.Flows, 0
	m.load, m.began, m.lost, m.over = loaded, time.Now(), m.lostRecords(t), made{}
}

// kernelPath is the cell's path, or nil where it is over.
func (m *auditor) kernelPath(t *testing.T) *path {
	t.Helper()
	paths := m.paths(t)
	i := slices.IndexFunc(paths, func(p path) bool { return p.Grant == m.path.ID && p.State == "active" })
	if i < 0 {
		return nil
	}
	return &paths[i]
}

// keepConnecting makes connections of each kind at a steady rate, until stop is called.
func (m *auditor) keepConnecting(t *testing.T) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	for _, one := range m.kinds() {
		all.Go(func() {
			tick := time.NewTicker(matrixPace)
			defer tick.Stop()
			for {
				one()
				select {
				case <-tick.C:
				case <-ctx.Done():
					return
				}
			}
		})
	}
	return func() { cancel(); all.Wait() }
}

// each makes one connection of each kind.
func (m *auditor) each(t *testing.T) {
	t.Helper()
	for _, one := range m.kinds() {
		one()
	}
}

func (m *auditor) kinds() []func() { return []func(){m.bypassing, m.proving, m.denied} }

func (m *auditor) bypassing() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	o := m.bypass.plain(ctx)
	m.note(o, map[answerer]*[]netip.AddrPort{direct: &m.made.bypassed, cut: &m.made.turned})
}

func (m *auditor) proving() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	m.note(m.identified.identified(ctx, m.world, web), map[answerer]*[]netip.AddrPort{proxied: &m.made.proxied})
}

// denied is a client that was never there before: its denial has a record of its own.
func (m *auditor) denied() {
	m.mu.Lock()
	way := m.plain
	way.from = memberAt(m.next).Addr()
	m.next++
	m.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	o := way.plain(ctx)
	o.own = netip.AddrPortFrom(way.from, o.own.Port())
	m.note(o, map[answerer]*[]netip.AddrPort{cut: &m.made.denied})
}

func (m *auditor) note(o outcome, may map[answerer]*[]netip.AddrPort) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if into := may[o.who]; into != nil {
		*into = append(*into, o.own)
		return
	}
	m.made.wrong = append(m.made.wrong, o)
}

func (m *auditor) all() made {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.made
}

// grow waits until there are more connections, where there are any.
func (m *auditor) grow(t *testing.T) {
	t.Helper()
	if !m.load {
		return
	}
	made := m.all()
	want := made.count() + 3*m.grows
	for end := time.Now().Add(patience + time.Duration(10*m.grows)*matrixPace); ; time.Sleep(5 * time.Millisecond) {
		made := m.all()
		if made.count() >= want {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%d connections, want %d; wrong are %v", made.count(), want, made.wrong)
		}
	}
}

// account waits for the books to be right.
func (m *auditor) account(t *testing.T, may losses) {
	t.Helper()
	m.settled(t)
	err := m.books(t, may)
	for end := time.Now().Add(patience); err != nil && time.Now().Before(end); err = m.books(t, may) {
		time.Sleep(50 * time.Millisecond) // the proxy's last records may still be on their way
	}
	if err != nil {
		t.Errorf("%v; lost in this cell: %v", err, m.lostNow(t))
	}
	m.complete(t)
	made := m.all()
	if p := m.kernelPath(t); p == nil || p.Flows-m.flows != uint64(len(made.bypassed)-m.before) {
		t.Errorf("%d clients bypassed the proxy, the kernel counted %+v, %d before", len(made.bypassed)-m.before, p, m.flows)
	}
	if len(made.wrong) > 0 {
		t.Errorf("%d connections were answered as they must not be: %v", len(made.wrong), made.wrong[0])
	}
}

// lostNow is what is lost since the cell began.
func (m *auditor) lostNow(t *testing.T) map[string]uint64 {
	t.Helper()
	now := map[string]uint64{}
	for of, n := range m.lostRecords(t) {
		if n > m.lost[of] {
			_, cause, _ := strings.Cut(of, " ")
			now[cause] += n - m.lost[of]
		}
	}
	return now
}

// books compares what clients made with what the collector has of it.
func (m *auditor) books(t *testing.T, may losses) error {
	t.Helper()
	all := m.all()
	want, late := produced(all), produced(all.since(m.over))
	have := map[string]int{}
	for _, s := range m.world.flows(t, &api.FlowQuery{Since: timestamppb.New(m.began.Add(-time.Second))}) {
		have[recordOf(s.Flow)]++
	}
	missing, double, lateMissing := 0, 0, 0
	for r, n := range want {
		missing += max(n-have[r], 0)
		double += max(have[r]-n, 0)
		lateMissing += max(late[r]-have[r], 0)
	}
	lost, total := m.lostNow(t), uint64(0)
	for _, n := range lost {
		total += n
	}
	switch {
	case lateMissing > 0:
		return fmt.Errorf("%d records of connections after the fault are missing", lateMissing)
	case double > 0 && !may.twice:
		return fmt.Errorf("%d records are there twice", double)
	case uint64(missing) > total:
		return fmt.Errorf("%d records are missing, and %d counted as lost", missing, total)
	case may.atMost != nil && total > may.atMost():
		return fmt.Errorf("%d records are missing, and %d counted as lost, of at most %d", missing, total, may.atMost())
	case may.exactly != nil && !maps.Equal(lost, may.exactly):
		return fmt.Errorf("%d records are missing, and exactly %v should be counted as lost", missing, may.exactly)
	}
	for cause := range lost {
		if may.exactly == nil && !slices.Contains(may.only, cause) {
			return fmt.Errorf("%d records are missing, and records are counted as lost by %s", missing, cause)
		}
	}
	return nil
}

// since is what came after an earlier look.
func (m made) since(before made) made {
	return made{bypassed: m.bypassed[len(before.bypassed):], proxied: m.proxied[len(before.proxied):], denied: m.denied[len(before.denied):]}
}

// produced are the records of connections: by client, verdict and event.
func produced(made made) map[string]int {
	out := map[string]int{}
	for verdict, clients := range map[string][]netip.AddrPort{"BYPASSED": made.bypassed, "PROXIED": made.proxied} {
		for _, c := range clients {
			out[fmt.Sprint(c, " ", verdict, " OPEN")]++
			out[fmt.Sprint(c, " ", verdict, " CLOSE")]++
		}
	}
	for _, c := range made.denied {
		out[fmt.Sprint(c.Addr(), " DENIED DENY")]++
	}
	return out
}

// recordOf says which of those a record is. Denials are told apart by their addresses alone.
func recordOf(f *api.FlowRecord) string {
	client := f.Client
	if a, err := netip.ParseAddrPort(client); err == nil && f.Event == "DENY" {
		client = a.Addr().String()
	}
	return fmt.Sprint(client, " ", f.Verdict, " ", f.Event)
}

// entry is what the collector has under the numbers of a sequence from first to last.
type entry struct {
	first, last uint64
	lost        bool
}

// complete: the numbers of each sequence begin at 1 and are there once, each with a record or in a loss, and they end where the collector
// says that they end.
func (m *auditor) complete(t *testing.T) {
	t.Helper()
	reply, err := m.collected(t).Nodes(t.Context())
	must(t, err)
	entries := m.entries(t) // there may be later ones by now
	for _, s := range reply.Nodes {
		name := fmt.Sprint(s.Epoch, " ", s.Class)
		all := slices.DeleteFunc(entries[name], func(e entry) bool { return e.last > s.Seq })
		slices.SortFunc(all, func(a, b entry) int { return cmp.Compare(a.first, b.first) })
		delivered, lost, next := uint64(0), uint64(0), uint64(1)
		for _, e := range all {
			if e.first != next {
				t.Errorf("%s: after number %d comes %d", name, next-1, e.first)
				break
			}
			next = e.last + 1
			if e.lost {
				lost += e.last - e.first + 1
			} else {
				delivered++
			}
		}
		if s.Seq != delivered+lost || s.Lost != lost {
			t.Errorf("%s: produced were %d; delivered are %d, counted as lost %d, or %d as the collector says", name, s.Seq, delivered, lost, s.Lost)
		}
	}
	if len(reply.Nodes) < 2 {
		t.Errorf("sequences: %v", reply.Nodes)
	}
}

// entries are all that the collector has, by epoch and class.
func (m *auditor) entries(t *testing.T) map[string][]entry {
	t.Helper()
	all := map[string][]entry{}
	add := func(epoch string, class api.Class, first, last uint64, lost bool) {
		name := fmt.Sprint(epoch, " ", class)
		all[name] = append(all[name], entry{first, last, lost})
	}
	c := m.collected(t)
	for s, err := range c.Flows(t.Context(), &api.FlowQuery{Limit: everything}) {
		must(t, err)
		add(s.Epoch, s.Class, s.Seq, s.Seq, false)
	}
	for s, err := range c.GrantEvents(t.Context(), &api.GrantQuery{Limit: everything}) {
		must(t, err)
		add(s.Epoch, api.Class_CLASS_CRITICAL, s.Seq, s.Seq, false)
	}
	for s, err := range c.Tides(t.Context(), &api.TideQuery{Limit: everything}) {
		must(t, err)
		add(s.Epoch, api.Class_CLASS_CRITICAL, s.Seq, s.Seq, false)
	}
	for s, err := range c.Losses(t.Context(), &api.LossQuery{Limit: everything}) {
		must(t, err)
		add(s.Epoch, s.Class, s.Seq-s.Loss.Count+1, s.Seq, true)
	}
	return all
}

// numbers is how many the collector has of the node's latest epoch.
func (m *auditor) numbers(t *testing.T) (n uint64) {
	t.Helper()
	reply, err := m.collected(t).Nodes(t.Context())
	must(t, err)
	latest := ""
	for _, s := range reply.Nodes {
		if s.Epoch > latest {
			latest, n = s.Epoch, 0
		}
		if s.Epoch == latest {
			n += s.Seq
		}
	}
	return n
}
