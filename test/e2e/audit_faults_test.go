package e2e_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
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
	const noticed = "the wall clock moved by -20m0s against boot time: every path ends"
	before := strings.Count(m.agent.proc.Output(), noticed)
	setClock(t, m.agent.proc, 0)
	setClock(t, m.collector.proc, 0)
	waitUntil(t, "the agent to see its clock go back", func() bool { return strings.Count(m.agent.proc.Output(), noticed) > before })
	m.vouch(t)
	m.reopen(t)
	return losses{}
}
