package store

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
)

const childEnv = "SALLYPORT_STORE_TEST_CHILD"

func TestMain(m *testing.M) {
	if path := os.Getenv(childEnv); path != "" {
		seed, _ := strconv.ParseUint(os.Getenv(childEnv+"_SEED"), 10, 64)
		err := error(nil)
		if os.Getenv(recoverEnv) != "" {
			runtime.LockOSThread() // strace counts the calls of each thread
			err = recoverLoudly(path)
		} else {
			err = work(path, seed)
		}
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// work writes to the store until it is killed, and says on stdout what was acknowledged. A line of
// type "try" goes out before the call, so that the parent knows what may be there besides.
func work(path string, seed uint64) error {
	s, err := Open(path)
	if err != nil {
		return err
	}
	ctx := context.Background()
	rng := rand.New(rand.NewPCG(seed, 0))
	flow, err := s.Flow(ctx)
	if err != nil {
		return err
	}
	produced := flow.Produced
	if err := s.ReserveFlow(ctx, produced+1000, 0); err != nil {
		return err
	}
	for i := 0; ; i++ {
		id := fmt.Sprintf("%d-%d", seed, i)
		switch rng.IntN(8) {
		case 0, 1:
			seq, err := s.Append(ctx, []byte("entry "+id))
			if err != nil {
				return err
			}
			fmt.Println("entry", seq, id)
		case 2:
			row := testGrant(id)
			row.Kind, row.Activated = "", latest(s)
			row.NotAfter, row.Keep = row.Activated.Add(time.Second), row.Activated.Add(4*time.Second)
			if err := s.Activate(ctx, row, []byte("activated "+id)); err != nil {
				return err
			}
			fmt.Println("active", id, row.NotAfter.UnixNano())
			if rng.IntN(2) == 0 {
				break
			}
			if err := s.EndGrant(ctx, id, StateRevoked, "", []byte("revoked "+id)); err != nil {
				return err
			}
			fmt.Println("ended", id)
		case 3:
			last, acked, err := s.Seqs(ctx)
			if err != nil {
				return err
			}
			to := acked + (last-acked)/4
			fmt.Println("try-ack", to)
			if err := s.Ack(ctx, to, Note{"acked", []byte(strconv.FormatUint(to, 10))}); err != nil {
				return err
			}
		case 4:
			produced++
			if produced%1000 == 0 {
				if err := s.ReserveFlow(ctx, produced+1000, 0); err != nil {
					return err
				}
			}
			s.CountFlow(produced)
			fmt.Println("flow", produced)
		case 5:
			fmt.Println("try-said", id) // what is not acknowledged may be there all the same
			if err := s.State(ctx, testStatement(id, StepWithdrawn), []byte("withdrawn "+id)); err != nil {
				return err
			}
			fmt.Println("said", id)
		case 6:
			at := latest(s).Add(time.Second)
			if err := s.See(ctx, at); err != nil {
				return err
			}
			fmt.Println("seen", at.UnixNano())
		case 7:
			active, err := s.ActiveGrants(ctx)
			if err != nil {
				return err
			}
			for _, g := range active { // those who still are keep all later ones from being forgotten
				if err := s.EndGrant(ctx, g.ID, StateRevoked, "", []byte("revoked "+g.ID)); err != nil {
					return err
				}
				fmt.Println("ended", g.ID)
			}
			if _, err := s.Prune(ctx, 3); err != nil {
				return err
			}
		}
	}
}

// latest is a time that is not behind.
func latest(s *Store) time.Time {
	if at := s.Memory().Latest; !at.IsZero() {
		return at
	}
	return testGrant("").Activated
}

// child is this test binary at work on a store.
type child struct {
	cmd   *exec.Cmd
	lines chan string
	seen  []string
}

func startChild(t *testing.T, path string, seed uint64) *child {
	t.Helper()
	return startAs(t, childEnv+"="+path, fmt.Sprintf("%s_SEED=%d", childEnv, seed))
}

func startRecovery(t *testing.T, path string) *child {
	t.Helper()
	return startAs(t, childEnv+"="+path, recoverEnv+"=1")
}

func startAs(t *testing.T, env ...string) *child {
	t.Helper()
	c := &child{cmd: exec.Command(os.Args[0]), lines: make(chan string, 1<<16)}
	c.cmd.Env = append(os.Environ(), env...)
	c.cmd.Stderr = os.Stderr
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.cmd.Process.Kill() })
	go func() {
		defer close(c.lines)
		r := bufio.NewReader(out)
		for {
			line, err := r.ReadString('\n')
			if err != nil { // a line that was cut off says nothing
				return
			}
			c.lines <- strings.TrimSpace(line)
		}
	}()
	return c
}

func (c *child) waitLines(t *testing.T, n int) {
	t.Helper()
	for range n {
		line, ok := <-c.lines
		if !ok {
			t.Fatalf("child ended after %q", c.seen)
		}
		c.seen = append(c.seen, line)
	}
}

// kill ends the child at once and returns all that it said.
func (c *child) kill(t *testing.T) []string {
	t.Helper()
	if err := c.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Fatal(err)
	}
	for line := range c.lines {
		c.seen = append(c.seen, line)
	}
	c.cmd.Wait()
	return c.seen
}

// ledger is what the children were told is durable.
type ledger struct {
	entries map[uint64]string
	active  map[string]time.Time // until when they could be handed in
	ended   map[string]bool
	said    map[string]bool // withdrawn; false: perhaps
	seen    int64           // wall clock, Unix ns
	tried   uint64          // acknowledgements may have removed entries up to here
	flow    uint64

	forgotten int // of active, at the last check
}

func newLedger() *ledger {
	return &ledger{entries: map[uint64]string{}, active: map[string]time.Time{}, ended: map[string]bool{}, said: map[string]bool{}}
}

func (l *ledger) note(t *testing.T, line string) {
	t.Helper()
	f := strings.Fields(line)
	switch f[0] {
	case "entry":
		l.entries[must(strconv.ParseUint(f[1], 10, 64))(t)] = "entry " + f[2]
	case "active":
		l.active[f[1]] = time.Unix(0, must(strconv.ParseInt(f[2], 10, 64))(t))
	case "ended":
		l.ended[f[1]] = true
	case "try-said":
		l.said[f[1]] = false
	case "said":
		l.said[f[1]] = true
	case "seen":
		l.seen = must(strconv.ParseInt(f[1], 10, 64))(t)
	case "try-ack":
		l.tried = max(l.tried, must(strconv.ParseUint(f[1], 10, 64))(t))
	case "flow":
		l.flow = must(strconv.ParseUint(f[1], 10, 64))(t)
	default:
		t.Fatalf("child says %q", line)
	}
}

func (l *ledger) check(t *testing.T, path string) {
	t.Helper()
	s := openTest(t, path) // verifies the chain
	defer s.Close()
	ctx := t.Context()
	have := map[uint64]string{}
	for _, e := range must(s.Entries(ctx, 0, 1<<20))(t) {
		have[e.Seq] = string(e.Data)
	}
	_, acked, err := s.Seqs(ctx)
	if note := must(s.Notes(ctx, "acked"))(t); err != nil || len(note) == 1 && string(note[0].Data) != strconv.FormatUint(acked, 10) || len(note) == 0 && acked != 0 {
		t.Errorf("removed is up to %d, the note of it says %q: %v", acked, note, err)
	}
	for seq, data := range l.entries {
		if seq > l.tried && have[seq] != data {
			t.Errorf("acknowledged entry %d is %q, want %q", seq, have[seq], data)
		}
	}
	grants := map[string]GrantRow{}
	for _, g := range must(s.Grants(ctx))(t) {
		grants[g.ID] = g
	}
	l.forgotten = 0
	for id, notAfter := range l.active {
		row, want := testGrant(id), ErrReplayed
		if _, ok := grants[id]; !ok {
			want = ErrForgotten
			l.forgotten++
		}
		row.NotAfter = notAfter
		if err := s.Activate(ctx, row, nil); !errors.Is(err, want) {
			t.Errorf("grant %s can be used again: %v, want %v", id, err, want)
		}
	}
	for id, sure := range l.said {
		if !sure {
			continue
		}
		if err := s.Activate(ctx, testGrant(id), nil); !errors.Is(err, ErrFinal) {
			t.Errorf("withdrawn grant %s can be used: %v", id, err)
		}
	}
	for _, said := range must(s.Statements(ctx))(t) {
		if _, asked := l.said[said.Grant]; !asked {
			t.Errorf("a statement about %s, which nobody made", said.Grant)
		}
	}
	if got := s.Memory().Latest; l.seen != 0 && got.UnixNano() < l.seen {
		t.Errorf("the latest time is %s, the child had said %d", got, l.seen)
	}
	for id := range l.ended {
		if g, ok := grants[id]; ok && g.State != StateRevoked { // or it is forgotten
			t.Errorf("ended grant %s is %s", id, g.State)
		}
	}
	if flow := must(s.Flow(ctx))(t); flow.Produced < l.flow || flow.Produced > l.flow+1 {
		t.Errorf("flow numbers stand at %d, the child had said %d", flow.Produced, l.flow)
	}
}

// killsEnv asks for another number of kills than the common run has.
const killsEnv = "SALLYPORT_KILLS"

// Whatever was acknowledged is there after a kill at any moment, and the chains are whole: nothing is lost, and nothing that
// is over begins again.
func TestKilled(t *testing.T) {
	rounds := 25
	if testing.Short() {
		rounds = 5
	}
	if text := os.Getenv(killsEnv); text != "" {
		rounds = must(strconv.Atoi(text))(t)
	}
	var path string
	var l *ledger
	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	for round := range rounds {
		if round%50 == 0 { // what there is takes time to check
			path, l = testPath(t), newLedger()
		}
		c := startChild(t, path, uint64(round+1))
		if rng.IntN(4) > 0 { // some die while they open
			c.waitLines(t, 1)
		}
		<-time.After(time.Duration(rng.IntN(120)) * time.Millisecond) // the random moment
		for _, line := range c.kill(t) {
			l.note(t, line)
		}
		l.check(t, path)
		if t.Failed() {
			t.Fatalf("in round %d", round)
		}
	}
	t.Logf("%d rounds; in the last store %d entries, %d grants (%d forgotten), %d statements, %d flow numbers", rounds, len(l.entries), len(l.active), l.forgotten, len(l.said), l.flow)
}
