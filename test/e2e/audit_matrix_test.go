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
	matrixGrow = 15                    // connections before, during and after a fault
)

// fault is one row of the matrix.
type fault struct {
	name  string
	do    func(*auditor, *testing.T) losses
	first func(*auditor, *testing.T) // before the cell; nil: nothing
}

// losses are what a fault may cost, by stage and cause. The zero value is nothing at all.
type losses struct {
	exactly map[string]uint64 // to the unit
	only    []string          // as many as it takes, and nothing by another cause
	atMost  func() uint64     // with only; nil: there is no such bound
	twice   bool              // the proxy hands in again what a killed agent had not acknowledged
}

var faults = []fault{
	{name: "kill -9 agent", do: (*auditor).killAgent},
	{name: "kill -9 collector", do: (*auditor).killCollector},
	{name: "collector away", do: (*auditor).away},
	{name: "collector slow", do: (*auditor).slow},
	{name: "collector forges acks", do: (*auditor).forge},
	{name: "collector acks and drops", do: (*auditor).swallow},
	{name: "duplicate delivery", do: (*auditor).twice},
	{name: "disk full on the node", do: (*auditor).nodeFull, first: (*auditor).restartAgent},
	{name: "disk full at the collector", do: (*auditor).collectorFull, first: (*auditor).restartCollector},
	{name: "torn write at the collector", do: (*auditor).tearDay},
	{name: "flipped bits at the collector", do: (*auditor).flipDay},
	{name: "torn write in the node's spool", do: (*auditor).tearSpool},
	{name: "flipped bits in the node's spool", do: (*auditor).flipSpool},
	{name: "torn write in the node's store", do: (*auditor).tearStore},
	{name: "flipped bits in the node's store", do: (*auditor).flipStore},
	{name: "clock step", do: (*auditor).stepClocks},
}

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
	m.load, m.began, m.lost = loaded, time.Now(), m.lostRecords(t)
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
	want := m.produced()
	have := map[string]int{}
	for _, s := range m.world.flows(t, &api.FlowQuery{Since: timestamppb.New(m.began.Add(-time.Second))}) {
		have[recordOf(s.Flow)]++
	}
	missing, double := 0, 0
	for r, n := range want {
		missing += max(n-have[r], 0)
		double += max(have[r]-n, 0)
	}
	lost, total := m.lostNow(t), uint64(0)
	for _, n := range lost {
		total += n
	}
	switch {
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

// produced are the records of the cell's connections: by client, verdict and event.
func (m *auditor) produced() map[string]int {
	made, out := m.all(), map[string]int{}
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
	entries := m.entries(t)
	reply, err := m.collected(t).Nodes(t.Context())
	must(t, err)
	for _, s := range reply.Nodes {
		name := fmt.Sprint(s.Epoch, " ", s.Class)
		all := entries[name]
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

// ---- faults ----

func (m *auditor) killAgent(t *testing.T) losses {
	m.agent.kill(t)
	m.grow(t)
	m.agent.start(t)
	return losses{only: []string{"agent_spool/agent_restart", "kernel_ring/best_effort_full"}, twice: true}
}

func (m *auditor) killCollector(t *testing.T) losses {
	m.collector.kill(t)
	m.grow(t)
	m.collector.start(t)
	return losses{}
}

// between has the relay be of another manner for a while.
func (m *auditor) between(t *testing.T, as manner) {
	t.Helper()
	m.relay.be(as)
	m.grow(t)
	m.relay.be(manner{})
}

func (m *auditor) away(t *testing.T) losses {
	m.between(t, manner{away: true})
	return losses{}
}

func (m *auditor) slow(t *testing.T) losses {
	m.between(t, manner{delay: 200 * time.Millisecond})
	return losses{}
}

func (m *auditor) twice(t *testing.T) losses {
	m.relay.be(manner{twice: true})
	m.each(t)
	m.batches(t)
	m.grow(t)
	m.relay.be(manner{})
	return losses{}
}

// batches waits until the relay has had some more.
func (m *auditor) batches(t *testing.T) {
	t.Helper()
	_, before := m.relay.took()
	waitUntil(t, "batches", func() bool { _, n := m.relay.took(); return n > before+1 })
}

func (m *auditor) forge(t *testing.T) losses {
	m.relay.be(manner{forge: true})
	m.each(t)
	m.batches(t)
	m.grow(t)
	m.relay.be(manner{})
	return losses{}
}

// swallow: what was acknowledged and is not there is lost, as the next honest word of the collector tells, to the unit. Under load some
// acknowledgements are still on their way when the relay becomes honest: what those are for is sent again.
func (m *auditor) swallow(t *testing.T) losses {
	before, _ := m.relay.took()
	m.relay.be(manner{swallow: true})
	m.each(t)
	m.batches(t)
	m.grow(t)
	swallowed := func() uint64 { after, _ := m.relay.took(); return after - before }
	if !m.load {
		m.settled(t)
	}
	m.relay.be(manner{})
	if m.load {
		return losses{only: []string{"collector/forgotten"}, atMost: swallowed}
	}
	return losses{exactly: map[string]uint64{"collector/forgotten": swallowed()}}
}

// restartAgent and restartCollector leave no write-ahead log behind: one that was longer before has room for a while on a full disk.
func (m *auditor) restartAgent(t *testing.T)     { m.agent.stop(t); m.agent.start(t) }
func (m *auditor) restartCollector(t *testing.T) { m.collector.stop(t); m.collector.start(t) }

func (m *auditor) nodeFull(t *testing.T) losses {
	m.full(t, m.files.state, m.agent, "audit store cannot be written")
	return losses{}
}

func (m *auditor) collectorFull(t *testing.T) losses {
	m.full(t, m.files.records, m.collector, "batch cannot be stored")
	return losses{}
}

// full fills a program's disk for a while. The program says so when it has something to write.
func (m *auditor) full(t *testing.T, dir string, d *daemon, says string) {
	t.Helper()
	filler := fillDisk(t, dir)
	m.grow(t)
	if m.load {
		waitUntil(t, "the disk to be too full", func() bool { return strings.Contains(d.proc.Output(), says) })
	}
	must(t, os.Remove(filler))
}

// pending has records of each kind wait on the node, and gives a client of each.
func (m *auditor) pending(t *testing.T) (bypassed, denied netip.AddrPort) {
	t.Helper()
	m.relay.be(manner{away: true})
	m.each(t)
	m.grow(t)
	made := m.all()
	return made.bypassed[len(made.bypassed)-1], made.denied[len(made.denied)-1]
}

func (m *auditor) storeFiles(t *testing.T) []string { return glob(t, m.files.state, "node.db*") }
func (m *auditor) spoolFiles(t *testing.T) []string {
	return glob(t, m.files.state, "flows", "*", "*.flow")
}
func (m *auditor) dayFiles(t *testing.T, suffix string) []string {
	return glob(t, m.files.records, "2*.db"+suffix)
}

// spooled waits until a denial is on the disk, and gives its client as it stands there.
func (m *auditor) spooled(t *testing.T) string {
	t.Helper()
	_, denied := m.pending(t)
	text := denied.Addr().String() + ":"
	waitUntil(t, "the spool to have a record", func() bool { return has(t, m.spoolFiles(t), text) })
	return text
}

func (m *auditor) flipSpool(t *testing.T) losses {
	text := m.spooled(t)
	m.agent.stop(t)
	flipIn(t, m.spoolFiles(t), text)
	m.agent.start(t)
	m.relay.be(manner{})
	return losses{exactly: map[string]uint64{"flow_spool/damaged": 1}}
}

func (m *auditor) tearSpool(t *testing.T) losses {
	m.spooled(t)
	m.agent.kill(t)
	tearEnd(t, slices.Max(m.spoolFiles(t)))
	m.agent.start(t)
	m.relay.be(manner{})
	return losses{only: []string{"agent_spool/agent_restart", "flow_spool/damaged"}, twice: true}
}

func (m *auditor) flipStore(t *testing.T) losses {
	bypassed, _ := m.pending(t)
	waitUntil(t, "the store to have a record", func() bool { return has(t, m.storeFiles(t), bypassed.String()) })
	m.agent.stop(t)
	flipIn(t, m.storeFiles(t), bypassed.String())
	return m.recovered(t)
}

func (m *auditor) tearStore(t *testing.T) losses {
	bypassed, _ := m.pending(t)
	waitUntil(t, "the store to have a record", func() bool { return has(t, m.storeFiles(t), bypassed.String()) })
	m.agent.kill(t)
	tearLog(t, filepath.Join(m.files.state, "node.db-wal"))
	return m.recovered(t)
}

// recovered starts an agent on a damaged store: it ends every path, and somebody has to vouch for the node before the next is opened.
func (m *auditor) recovered(t *testing.T) losses {
	t.Helper()
	m.agent.start(t)
	m.relay.be(manner{})
	if p := m.kernelPath(t); p != nil {
		t.Errorf("the store was damaged, and a path is open: %+v", p)
	}
	m.vouch(t)
	m.reopen(t)
	return losses{only: []string{"agent_store/damaged", "agent_spool/agent_restart", "flow_spool/damaged"}, twice: true}
}

func (m *auditor) vouch(t *testing.T) {
	t.Helper()
	m.cli(t, "grant", "vouch", "--key", m.carol(), "--by", "carol", "--why", "a test did it", "--yes")
}

// holding breaks the line, and gives how many numbers the collector has then of what the agent goes on with. The node knows of each when no
// connection is made; under load some acknowledgements are lost, and what those are for is sent again.
func (m *auditor) holding(t *testing.T) uint64 {
	t.Helper()
	if !m.load {
		m.settled(t)
	}
	m.relay.be(manner{away: true})
	m.grow(t)
	return m.numbers(t)
}

// forgotten is what a collector has to be told of that has lost as many numbers.
func (m *auditor) forgotten(n uint64) losses {
	if m.load {
		return losses{only: []string{"collector/forgotten"}, atMost: func() uint64 { return n }}
	}
	return losses{exactly: map[string]uint64{"collector/forgotten": n}}
}

// flipDay leaves a collector with nothing, also of what it knew to be lost.
func (m *auditor) flipDay(t *testing.T) losses {
	had := m.holding(t)
	m.collector.stop(t)
	for _, day := range m.dayFiles(t, "") {
		flipAll(t, day)
	}
	m.collector.start(t)
	m.relay.be(manner{})
	m.lost = nil
	return m.forgotten(had)
}

func (m *auditor) tearDay(t *testing.T) losses {
	had := m.holding(t)
	m.collector.kill(t)
	tearLog(t, slices.Max(m.dayFiles(t, "-wal")))
	m.collector.start(t)
	has := m.numbers(t)
	m.relay.be(manner{})
	if has >= had {
		t.Errorf("the collector has %d numbers, and had %d: nothing was torn", has, had)
	}
	return m.forgotten(had - has)
}

// stepClocks sets the clocks of agent and collector ahead and back again. The agent ends every path both times; when its clock is behind
// what it saw, somebody has to vouch for the node.
func (m *auditor) stepClocks(t *testing.T) losses {
	setClock(t, m.agent.proc, 20*time.Minute)
	setClock(t, m.collector.proc, 26*time.Hour)
	waitUntil(t, "the path to end", func() bool { return m.kernelPath(t) == nil })
	m.grow(t)
	setClock(t, m.agent.proc, 0)
	setClock(t, m.collector.proc, 0)
	waitUntil(t, "the agent to doubt its clock", func() bool { return len(m.status(t).Problems) > 0 })
	m.vouch(t)
	m.reopen(t)
	return losses{}
}
