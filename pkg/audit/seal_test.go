package audit_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/pkg/collector"
	"github.com/sallyport-dev/sallyport/pkg/proof"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

const (
	critical = api.Class_CLASS_CRITICAL
	flows    = api.Class_CLASS_FLOW
)

// noted is a note of the node's store.
func (n *node) noted(t *testing.T, name string) []byte {
	t.Helper()
	for _, have := range must(n.store.Notes(t.Context(), name))(t) {
		if have.Name == name {
			return have.Data
		}
	}
	return nil
}

// event puts a critical record into the store, as the agent does.
func (n *node) event(t *testing.T, id string) {
	t.Helper()
	must(n.store.Append(t.Context(), must(audit.GrantEntry(&api.GrantEvent{Grant: id, Step: "ACTIVATED"}))(t)))(t)
	n.Kick()
}

func (n *node) problem(t *testing.T, part string) {
	t.Helper()
	waitFor(t, func() bool { return strings.Contains(must(n.Status(t.Context()))(t).Problem, part) },
		func() string { return fmt.Sprintf("%+v", must(n.Status(t.Context()))(t)) })
}

// TestAckAndSealAreOneWrite: what is acknowledged is removed, and the seal over it kept. Stopped in order, the node has the seal of
// both classes, and goes on after it.
func TestAckAndSealAreOneWrite(t *testing.T) {
	s := newSite(t)
	h := s.newHands(t)
	for round := range 3 {
		n := s.startNode(100)
		n.event(t, fmt.Sprint(round))
		n.Flow(proxied(fmt.Sprint(round)))
		n.drained(t)
		n.stop()
		st := must(store.Open(filepath.Join(s.dir, "state", "node.db")))(t)
		n.store = st
		_, acked, err := st.Seqs(t.Context())
		if c := h.have(critical); err != nil || acked != c.seq || !bytes.Equal(n.noted(t, "acked/critical"), c.last()) {
			t.Errorf("removed is up to %d, %v; the collector has %d", acked, err, c.seq)
		}
		if c := h.have(flows); must(st.Flow(t.Context()))(t).Acked != c.seq || !bytes.Equal(n.noted(t, "acked/flow"), c.last()) {
			t.Errorf("the flow class is acknowledged up to %d; the collector has %d", must(st.Flow(t.Context()))(t).Acked, c.seq)
		}
		st.Close()
	}
	for _, class := range []api.Class{critical, flows} {
		c := h.have(class)
		if c.breaks != 0 || c.seq != 3 || s.alarmed() != nil {
			t.Errorf("%s: %d breaks up to %d, alarms %v", class, c.breaks, c.seq, s.alarmed())
		}
	}
}

// TestKilledBeforeAck: the collector has a batch, the node is killed before it hears of it. The Welcome shows the seal; nothing is sent
// again, and the chain goes on from there.
func TestKilledBeforeAck(t *testing.T) {
	s := newSite(t)
	h := s.newHands(t)
	h.answer = func(*api.Ack) []*api.Ack { return nil }
	writeIdentity(t, s.dir, "agent", s.agent)
	p := s.startProcess(t, "agent", "killed", paceEnv+"=1")
	waitFor(t, func() bool { return len(h.have(critical).seals) >= 2 && len(h.have(flows).seals) >= 2 }, func() string { return "no batches came" })
	p.kill(t)
	stored := h.have(critical)
	h.with(func() { h.answer = nil })
	n := s.startNode(100)
	waitFor(t, func() bool { return must(n.Status(t.Context()))(t).Connected }, func() string { return "no connection" })
	if _, acked, err := n.store.Seqs(t.Context()); err != nil || acked < stored.seq {
		t.Errorf("acknowledged is up to %d, %v; the collector had %d", acked, err, stored.seq)
	}
	n.event(t, "after")
	n.drained(t)
	for _, class := range []api.Class{critical, flows} {
		if c := h.have(class); c.breaks != 0 {
			t.Errorf("%s: the chain breaks %d times", class, c.breaks)
		}
	}
	if s.alarmed() != nil {
		t.Errorf("alarms %v", s.alarmed())
	}
}

// TestSentAgain: what the collector has not, as far as it says, is sent again with the same seal, so that a collector which has it
// after all can tell.
func TestSentAgain(t *testing.T) {
	s := newSite(t)
	h := s.newHands(t)
	h.answer = func(*api.Ack) []*api.Ack { return nil }
	n := s.startNode(100)
	n.event(t, "a")
	waitFor(t, func() bool { return len(h.have(critical).seals) == 1 }, func() string { return "no batch came" })
	n.stop()
	h.with(func() { h.classes[critical], h.answer = &taken{}, nil })
	n = s.startNode(100)
	n.drained(t)
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.batches) != 2 || !bytes.Equal(h.batches[0].GetSeal(), h.batches[1].GetSeal()) || !bytes.Equal(h.batches[0].GetRaw()[0].GetData(), h.batches[1].GetRaw()[0].GetData()) {
		t.Errorf("%d batches, not the same one twice", len(h.batches))
	}
}

// TestLyingAcks: an acknowledgement of what is not on the way removes nothing, and ends the connection.
func TestLyingAcks(t *testing.T) {
	for name, lie := range map[string]func(*api.Ack){
		"higher":        func(a *api.Ack) { a.Seq++ },
		"lower":         func(a *api.Ack) { a.Seq-- },
		"another seal":  func(a *api.Ack) { a.Number++ },
		"no seal":       func(a *api.Ack) { a.Number = 0 },
		"another epoch": func(a *api.Ack) { a.Epoch = "01HZZZZZZZZZZZZZZZZZZZZZZ1" },
		"no class":      func(a *api.Ack) { a.Class = 0 },
		"another class": func(a *api.Ack) { a.Class = critical + flows - a.Class; a.Seq += 7 },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			h := s.newHands(t)
			h.answer = func(a *api.Ack) []*api.Ack { lie(a); return []*api.Ack{a} }
			h.welcome = func(w *api.Welcome) {
				h.classes = map[api.Class]*taken{critical: {}, flows: {}}
				*w = api.Welcome{Version: 2, LogKey: w.LogKey, Grown: w.Grown}
			}
			n := s.startNode(100)
			n.event(t, "a")
			n.event(t, "b")
			n.Flow(proxied("c"))
			n.problem(t, "collector acknowledges")
			if st := must(n.Status(t.Context()))(t); st.CriticalPending != 2 || st.FlowPending != 1 {
				t.Errorf("status is %+v", st)
			}
			if n.noted(t, "acked/critical") != nil || n.noted(t, "acked/flow") != nil {
				t.Error("a seal was kept as acknowledged")
			}
		})
	}
}

// TestCollectorSetBack: a collector of ours, restored from a backup, gets what it has no more as a loss, and what is new after it, in a
// chain that says so.
func TestCollectorSetBack(t *testing.T) {
	s := newSite(t)
	days := s.collectorConfig().Dir
	stop := s.startCollector()
	n := s.startNode(100)
	send := func(ids ...string) {
		for _, id := range ids {
			n.event(t, id)
			n.Flow(proxied(id))
		}
		n.drained(t)
	}
	send("a", "b")
	stop()
	if err := os.CopyFS(days+".old", os.DirFS(days)); err != nil {
		t.Fatal(err)
	}
	stop = s.startCollector()
	send("c", "d", "e")
	n.stop()
	n = s.startNode(100) // it is told at once what the log has come to
	send()
	before := must(n.Status(t.Context()))(t).LogSize
	stop()
	n.stop()
	if err := errors.Join(os.RemoveAll(days), os.Rename(days+".old", days)); err != nil {
		t.Fatal(err)
	}
	s.startCollector()
	n = s.startNode(100)
	send("f")
	for class, h := range s.held() {
		h.check(t, 6)
		if h.causes["collector/forgotten"] != 3 || h.lost != 3 {
			t.Errorf("%s: losses are %v", class, h.causes)
		}
	}
	for _, st := range s.states() {
		if st.GetChainBreaks() != 1 {
			t.Errorf("the collector says %v", st)
		}
	}
	told := strings.Join(s.alarmed(), "\n")
	for _, part := range []string{"log example.org/sallyport/log/", "was set back from", "it has the critical class up to number 2, and acknowledged it up to 5", "it has the flow class up to number 2, and acknowledged it up to 5"} {
		if strings.Count(told, part) != 1 {
			t.Errorf("alarms are\n%s", told)
		}
	}
	if st := must(n.Status(t.Context()))(t); st.LogSize < before || !strings.Contains(st.LogProblem, "was set back from") {
		t.Errorf("log of %d leaves before; status is %+v", before, st)
	}
}

// TestLyingWelcome: a claim without a seal of the node's is an alarm, and no reason to keep records back. Numbers that were never
// given out end the connection.
func TestLyingWelcome(t *testing.T) {
	forged := func(w *api.Welcome) []byte { // with a signature more, which leaves it valid
		return append(bytes.Clone(w.CriticalSeal), "— other.example.org/key AAAAAAAA\n"...)
	}
	for name, c := range map[string]struct {
		lie   func(*hands, *api.Welcome)
		alarm string
		end   string
	}{
		"no seal":        {func(_ *hands, w *api.Welcome) { w.CriticalSeal = nil }, "shows no seal of this node", ""},
		"other class":    {func(_ *hands, w *api.Welcome) { w.CriticalSeal = w.FlowSeal }, "shows no seal of this node", ""},
		"signed by more": {func(_ *hands, w *api.Welcome) { w.CriticalSeal = forged(w) }, "shows no seal of this node", ""},
		"higher":         {func(_ *hands, w *api.Welcome) { w.CriticalSeq = 2 }, "shows no seal of this node", ""},
		"never given":    {func(_ *hands, w *api.Welcome) { w.CriticalSeq = 100 }, "", "the store was set back"},
		"old version":    {func(_ *hands, w *api.Welcome) { w.Version = 1 }, "", "it speaks version 1"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			h := s.newHands(t)
			n := s.startNode(100)
			n.event(t, "a")
			n.Flow(proxied("a"))
			n.drained(t)
			n.stop()
			h.with(func() { h.welcome = func(w *api.Welcome) { c.lie(h, w) } })
			n = s.startNode(100)
			n.event(t, "b")
			n.event(t, "c")
			if c.end != "" {
				n.problem(t, c.end)
				if st := must(n.Status(t.Context()))(t); st.CriticalPending != 2 || s.alarmed() != nil {
					t.Errorf("alarms %v, status %+v", s.alarmed(), st)
				}
				return
			}
			n.drained(t)
			if told := s.alarmed(); len(told) == 0 || !strings.Contains(told[0], c.alarm) {
				t.Errorf("alarms are %v", told)
			}
		})
	}
}

// TestClaimWithoutSeal: a collector that claims what it never got is not believed: every record is sent, and none is given up.
func TestClaimWithoutSeal(t *testing.T) {
	s := newSite(t)
	n := s.startNode(100)
	for i := range 5 {
		n.event(t, fmt.Sprint(i))
		n.Flow(proxied(fmt.Sprint(i)))
	}
	h := s.newHands(t)
	h.with(func() {
		h.welcome = func(w *api.Welcome) {
			if h.hellos == 1 { // it was found out, and has it all by the next
				w.CriticalSeq, w.FlowSeq = 5, 4
			}
		}
	})
	n.drained(t)
	for _, class := range []api.Class{critical, flows} {
		if c := h.have(class); c.seq != 5 || c.breaks != 0 || len(c.losses) != 0 {
			t.Errorf("%s: the collector got up to number %d, in %d batches, losses %v", class, c.seq, len(c.seals), c.losses)
		}
	}
	if told := s.alarmed(); len(told) != 2 || !strings.Contains(told[0], "shows no seal of this node") {
		t.Errorf("alarms are %v", told)
	}
}

// TestGreetsAndHangsUp: a collector that welcomes the node with a lie and hangs up is met ever less often, and told of once.
func TestGreetsAndHangsUp(t *testing.T) {
	s := newSite(t)
	h := s.newHands(t)
	h.with(func() { h.hangUp, h.welcome = true, func(w *api.Welcome) { w.CriticalSeq = 1 } })
	began := time.Now()
	n := s.startNode(100)
	n.event(t, "a")
	waitFor(t, func() bool { return h.greeted() >= 7 }, func() string { return fmt.Sprintf("greeted %d times", h.greeted()) })
	if took := time.Since(began); took < 3*time.Second { // the least that six waits take, each twice as long: 50 ms to 1.6 s
		t.Errorf("it was met 7 times within %s", took)
	}
	h.with(func() { h.hangUp = false })
	n.drained(t)
	if told := s.alarmed(); len(told) != 1 {
		t.Errorf("alarms are %v", told)
	}
}

// TestKeyOfEpoch: a node has one key in an epoch, over restarts, and another in the next.
func TestKeyOfEpoch(t *testing.T) {
	s := newSite(t)
	h := s.newHands(t)
	var keys []string
	for round := range 3 {
		n := s.startNode(100)
		n.event(t, "a")
		n.drained(t)
		n.stop()
		h.with(func() { keys = append(keys, h.hello.GetNodeKey()) })
		if round == 1 {
			if err := os.RemoveAll(filepath.Join(s.dir, "state")); err != nil {
				t.Fatal(err)
			}
			h.with(func() { h.classes = map[api.Class]*taken{critical: {}, flows: {}} })
		}
	}
	slices.Sort(keys)
	if len(slices.Compact(keys)) != 2 {
		t.Errorf("keys are %v", keys)
	}
}

// TestTwoHistories: two collectors with one key show different logs. The node tells, keeps both checkpoints and stays with the first;
// its records come all the same. When the first log is back, the trouble is over.
func TestTwoHistories(t *testing.T) {
	s := newSite(t)
	h := s.newHands(t)
	h.log.add("a", "b", "c")
	n := s.startNode(100)
	n.event(t, "1")
	n.drained(t)
	again := func() {
		n.stop()
		n = s.startNode(100)
		n.event(t, "more")
		n.drained(t)
	}
	first := n.noted(t, "checkpoint")
	other := &ledger{signer: h.log.signer, vkey: h.log.vkey}
	other.add("a", "b", "X", "d")
	mine := h.log
	h.with(func() { h.log = other })
	again()
	again()
	both := string(n.noted(t, "checkpoint-conflict"))
	if !bytes.Equal(n.noted(t, "checkpoint"), first) || !strings.Contains(both, string(first)) || !strings.Contains(both, string(other.grown(0).GetCheckpoint())) {
		t.Errorf("kept is\n%s\nin conflict\n%s", n.noted(t, "checkpoint"), both)
	}
	if told := s.alarmed(); len(told) != 2 || !strings.Contains(told[0], "does not contain what it had at 3") { // once for each process
		t.Errorf("alarms are %v", told)
	}
	if st := must(n.Status(t.Context()))(t); st.LogSize != 3 || st.LogProblem == "" {
		t.Errorf("status is %+v", st)
	}
	mine.add("d", "e")
	h.with(func() { h.log = mine })
	again()
	if st := must(n.Status(t.Context()))(t); st.LogSize != 5 || st.LogProblem != "" || len(s.alarmed()) != 2 {
		t.Errorf("status is %+v, alarms %v", st, s.alarmed())
	}
	mine.add("f")
	h.push <- mine.grown(5)
	waitFor(t, func() bool { return must(n.Status(t.Context()))(t).LogSize == 6 }, func() string { return "the later checkpoint was not taken" })
	mine.add("g")
	lie := mine.grown(6)
	lie.Proof[0][0] ^= 1
	h.push <- lie
	waitFor(t, func() bool { return len(s.alarmed()) == 3 }, func() string { return "no alarm for a false proof" })
	if st := must(n.Status(t.Context()))(t); st.LogSize != 6 || !st.Connected {
		t.Errorf("status is %+v", st)
	}
}

// keptCheckpoint is what a node that was stopped has on its disk.
func (s *site) keptCheckpoint(t *testing.T, vkey string) proof.Checkpoint {
	t.Helper()
	st := must(store.Open(filepath.Join(s.dir, "state", "node.db")))(t)
	defer st.Close()
	n := node{store: st}
	return must(proof.OpenCheckpoint(n.noted(t, "checkpoint"), must(note.NewVerifier(vkey))(t)))(t)
}

// TestGrowsFast: each checkpoint counts at once, and is not written at once: a collector must not keep the node's disk busy. The last
// one is on the disk when the node has stopped.
func TestGrowsFast(t *testing.T) {
	s := newSite(t)
	h := s.newHands(t)
	h.log.add("0")
	began := time.Now()
	n := s.startNode(100)
	n.event(t, "1")
	n.drained(t)
	written := map[string]bool{}
	for size := int64(1); size <= 50; size++ {
		waitFor(t, func() bool { return must(n.Status(t.Context()))(t).LogSize == size }, func() string { return fmt.Sprintf("the log has not grown to %d", size) })
		written[string(n.noted(t, "checkpoint"))] = true
		if size < 50 {
			h.log.add(fmt.Sprint(size))
			h.push <- h.log.grown(size)
		}
	}
	if most := 2 + int(time.Since(began)/(5*time.Second)); len(written) > most {
		t.Errorf("%d checkpoints were written within %s", len(written), time.Since(began))
	}
	n.stop()
	if c := s.keptCheckpoint(t, h.log.vkey); c.Size != 50 {
		t.Errorf("kept is %+v", c)
	}
}

// TestLogKey: the key that is seen first is the log's, and what is configured goes before.
func TestLogKey(t *testing.T) {
	s := newSite(t)
	h := s.newHands(t)
	h.log.add("a")
	n := s.startNode(100)
	n.event(t, "1")
	n.drained(t)
	if n.noted(t, "log-key") == nil || n.noted(t, "checkpoint") == nil {
		t.Fatal("the key that was seen first is not kept")
	}
	n.stop()
	old := h.log
	h.with(func() { h.log = newLedger(t); h.log.add("z") })

	n = s.startNode(100)
	n.event(t, "2")
	n.drained(t) // not told which one, it only tells
	if told := s.alarmed(); len(told) != 1 || !strings.Contains(told[0], "another key") || string(n.noted(t, "log-key")) != old.vkey {
		t.Errorf("alarms are %v", told)
	}
	n.stop()

	s.logKey = old.vkey
	n = s.startNode(100)
	n.event(t, "3")
	n.problem(t, "another key than collector.logKey")
	waitFor(t, func() bool { return h.greeted() >= 5 }, func() string { return "it does not try again" })
	if st := must(n.Status(t.Context()))(t); st.CriticalPending != 1 || h.have(critical).seq != 2 || len(s.alarmed()) != 2 || st.LogProblem == "" {
		t.Errorf("status is %+v, alarms %v", st, s.alarmed())
	}
	n.stop()

	s.logKey = h.log.vkey
	n = s.startNode(100)
	n.drained(t)
	if st := must(n.Status(t.Context()))(t); st.LogProblem != "" || st.LogSize != 1 || len(s.alarmed()) != 2 || string(n.noted(t, "log-key")) != h.log.vkey {
		t.Errorf("status is %+v, alarms %v", st, s.alarmed())
	}
	n.stop()

	st := must(store.Open(filepath.Join(s.dir, "state", "node.db")))(t)
	defer st.Close()
	if _, err := audit.New(audit.Config{Store: st, Node: "node-1", LogKey: "no key"}); err == nil || !strings.Contains(err.Error(), "key of the collector's log") {
		t.Errorf("a key that is none: %v", err)
	}
}

func (h *hands) greeted() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.hellos
}

// TestLogOfCollector: a collector of ours with its own key in the node's configuration; the node sees its log grow, over restarts.
func TestLogOfCollector(t *testing.T) {
	s := newSite(t)
	stop := s.startCollector()
	pub := must(os.ReadFile(filepath.Join(s.collectorConfig().Dir, "log.pub")))(t)
	s.logKey = strings.TrimSpace(string(pub))
	var size int64
	for round := range 3 {
		n := s.startNode(100)
		n.event(t, fmt.Sprint(round))
		n.drained(t)
		n.stop()
		n = s.startNode(100)
		now := must(n.Status(t.Context()))(t)
		waitFor(t, func() bool { now = must(n.Status(t.Context()))(t); return now.LogSize > size }, func() string { return fmt.Sprintf("%+v", now) })
		size = now.LogSize
		n.stop()
		if c := s.keptCheckpoint(t, s.logKey); c.Size < size { // it may have grown since
			t.Errorf("kept is %+v; status has %d", c, size)
		}
		stop()
		stop = s.running(must(collector.New(s.collectorConfig()))(t).Run)
	}
	if s.alarmed() != nil {
		t.Errorf("alarms %v", s.alarmed())
	}
}
