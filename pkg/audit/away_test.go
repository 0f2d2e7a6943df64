package audit_test

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

const (
	awayEnv     = "SALLYPORT_AWAY" // how long the collector is away, in real time; left out: as many records as of awayShort, at once
	awayShort   = 20 * time.Second
	awayRate    = 500 // records a second
	awayMemory  = 48 << 20
	awayBuffer  = 4096
	awaySpooled = 512 << 20 // what an AgentConfig has that does not say
)

// The collector is away and the node goes on: no record is lost, memory stays where it is, and when the collector is back it gets
// everything, over a restart of the agent too.
func TestHourAway(t *testing.T) {
	away, err := time.ParseDuration(os.Getenv(awayEnv))
	paced := err == nil
	if !paced {
		away = awayShort
	}
	s := newSite(t)
	s.spoolDir, s.spool = filepath.Join(s.dir, "state", "flows"), awaySpooled
	n := s.startNode(awayBuffer)
	total, before, most := uint64(away.Seconds()*awayRate), heap(), uint64(0)
	tick := time.NewTicker(time.Second / 10)
	defer tick.Stop()
	for i := range total {
		n.Flow(usual(i))
		if i%(awayRate/10) != 0 {
			continue
		}
		if paced {
			<-tick.C
		} else {
			n.halfFree(t, awayBuffer)
		}
		if i%(awayRate*10) == 0 {
			most = max(most, heap())
		}
	}
	n.stop()
	n = s.startNode(awayBuffer)
	st := must(n.Status(t.Context()))(t)
	if st.FlowPending+st.FlowSpooled != total || st.FlowLost != 0 {
		t.Errorf("of %d records the node has %+v", total, st)
	}
	t.Logf("%d records take %d bytes each on the disk, memory grew by %d bytes", total, st.SpoolBytes/total, int64(most)-int64(before))
	if most > before+awayMemory {
		t.Errorf("memory grew from %d to %d bytes", before, most)
	}
	s.startCollector()
	began := time.Now()
	waitFor(t, func() bool { return must(n.Status(t.Context()))(t).FlowSpooled < total }, func() string { return "nothing is sent" })
	for left := total; left > 0; { // each while takes some of it
		waitFor(t, func() bool {
			st = must(n.Status(t.Context()))(t)
			return st.FlowSpooled+st.FlowPending < left || left == 0
		}, func() string { return fmt.Sprintf("%+v", st) })
		left = st.FlowSpooled + st.FlowPending
	}
	n.drained(t)
	t.Logf("delivered at %.0f records a second", float64(total)/time.Since(began).Seconds())
	if h := s.held()[api.Class_CLASS_FLOW]; h.lost != 0 || uint64(len(h.flows)) != total {
		t.Errorf("produced %d, delivered %d, lost %v", total, len(h.flows), h.causes)
	}
}

func heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// A full disk costs what memory has no room for, and no more: what was on it is delivered, a stop takes the rest to the store,
// and when there is room it goes on.
func TestSpoolOnAFullDisk(t *testing.T) {
	s := newSite(t)
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "mode=0700,size=2m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(disk, unix.MNT_DETACH) })
	s.spoolDir, s.spool = filepath.Join(disk, "flows"), 1<<30
	n := s.startNode(1000)
	var st audit.Status
	produced := uint64(0)
	waitFor(t, func() bool {
		if st = must(n.Status(t.Context()))(t); st.SpoolProblem == "" && st.FlowPending > 800 {
			return false // memory has room for all until the disk has none
		}
		for range 100 {
			n.Flow(usual(produced))
			produced++
		}
		st = must(n.Status(t.Context()))(t)
		return st.FlowLost > 500
	}, func() string { return fmt.Sprintf("%+v", st) })
	if st.FlowSpooled == 0 || !strings.Contains(st.SpoolProblem, "full") || st.FlowShed != st.FlowLost {
		t.Errorf("with a full disk: %+v", st)
	}
	n.stop()
	n = s.startNode(1000)
	after := must(n.Status(t.Context()))(t)
	if after.FlowLost != st.FlowLost || after.FlowPending+after.FlowSpooled+after.FlowLost != produced {
		t.Errorf("before the stop %+v, after it %+v", st, after)
	}
	s.startCollector()
	n.drained(t)
	s.held()[api.Class_CLASS_FLOW].check(t, produced)
	waitFor(t, func() bool { return must(n.Status(t.Context()))(t).SpoolProblem == "" }, func() string { return "it is still full" })
}

// Who hands in records waits for no disk: here the spool's file is a pipe that nobody reads.
func TestFlowWaitsForNoDisk(t *testing.T) {
	s := newSite(t)
	s.spoolDir, s.spool = filepath.Join(s.dir, "flows"), 1<<30
	n := s.startNode(100)
	dir := filepath.Join(s.spoolDir, n.store.Epoch())
	pipe := filepath.Join(dir, fmt.Sprintf("%020d.flow", 1))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	const produced = 20000
	handedIn := make(chan struct{})
	go func() {
		defer close(handedIn)
		for i := range uint64(produced) {
			n.Flow(usual(i))
		}
	}()
	select {
	case <-handedIn:
	case <-time.After(30 * time.Second):
		t.Error("it waits")
	}
	r := must(os.OpenFile(pipe, os.O_RDONLY, 0))(t) // lets it go on
	r.Close()
	s.startCollector()
	n.drained(t)
	s.held()[api.Class_CLASS_FLOW].check(t, produced)
}

// What an earlier configuration kept on the disk is delivered under one that keeps nothing there.
func TestSpoolSwitchedOff(t *testing.T) {
	s := newSite(t)
	s.spoolDir, s.spool = filepath.Join(s.dir, "state", "flows"), 1<<20
	n := s.startNode(1000)
	for i := range uint64(500) {
		n.Flow(usual(i))
	}
	n.stop()
	s.spool = 0
	n = s.startNode(1000)
	for i := range uint64(500) {
		n.Flow(usual(500 + i))
	}
	if st := must(n.Status(t.Context()))(t); st.FlowSpooled != 500 || st.FlowPending != 500 {
		t.Errorf("%+v", st)
	}
	s.startCollector()
	n.drained(t)
	if h := s.held()[api.Class_CLASS_FLOW]; len(h.flows) != 1000 || h.lost != 0 {
		t.Errorf("delivered %d, lost %v", len(h.flows), h.causes)
	}
	waitFor(t, func() bool { return must(n.Status(t.Context()))(t).SpoolBytes == 0 }, func() string { return "it is not empty" })
}

// A spool that cannot be opened keeps no agent from starting.
func TestSpoolThatIsNone(t *testing.T) {
	s := newSite(t)
	s.spoolDir, s.spool = filepath.Join(s.dir, "flows"), 1<<20
	if err := os.WriteFile(s.spoolDir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	st := must(store.Open(filepath.Join(s.dir, "state", "node.db")))(t)
	defer st.Close()
	n := must(audit.New(s.nodeConfig(st, 10)))(t)
	if got := must(n.Status(t.Context()))(t); got.SpoolProblem == "" {
		t.Errorf("%+v", got)
	}
}
