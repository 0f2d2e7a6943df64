package audit_test

import (
	"bufio"
	"cmp"
	"context"
	"encoding/pem"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/pkg/collector"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

const (
	roleEnv    = "SALLYPORT_AUDIT_TEST_ROLE" // "collector" or "agent": this process is a child
	dirEnv     = "SALLYPORT_AUDIT_TEST_DIR"
	addressEnv = "SALLYPORT_AUDIT_TEST_ADDRESS"
	nameEnv    = "SALLYPORT_AUDIT_TEST_NAME"
	bufferEnv  = "SALLYPORT_AUDIT_TEST_BUFFER"
	paceEnv    = "SALLYPORT_AUDIT_TEST_PACE" // records per millisecond; 0: as fast as it goes
)

func TestMain(m *testing.M) {
	role := os.Getenv(roleEnv)
	if role == "" {
		os.Exit(m.Run())
	}
	if err := child(role); err != nil {
		fmt.Fprintln(os.Stderr, role, err)
		os.Exit(1)
	}
}

func child(role string) error {
	s := &site{dir: os.Getenv(dirEnv), address: os.Getenv(addressEnv)}
	s.keepFlows()
	id, err := readIdentity(s.dir, role)
	if err != nil {
		return err
	}
	if role == "collector" {
		s.collector = id
		c, err := collector.New(s.collectorConfig())
		if err != nil {
			return err
		}
		fmt.Println("up")
		return c.Run(context.Background())
	}
	s.agent = id
	return produce(s, os.Getenv(nameEnv))
}

// produce hands in records until it is killed, and says before each what it is going to be.
func produce(s *site, name string) error {
	st, err := store.Open(filepath.Join(s.dir, "state", "node.db"))
	if err != nil {
		return err
	}
	buffer, _ := strconv.Atoi(os.Getenv(bufferEnv))
	n, err := audit.New(s.nodeConfig(st, cmp.Or(buffer, 500)))
	if err != nil {
		return err
	}
	go n.Run(context.Background())
	out := bufio.NewWriterSize(os.Stdout, 1) // a write for each line
	fmt.Fprintln(out, "critical", "grant "+name)
	event, err := audit.GrantEntry(&api.GrantEvent{Grant: name, Step: "ACTIVATED"})
	if err != nil {
		return err
	}
	if err := st.Activate(context.Background(), store.GrantRow{ID: name, BootID: st.BootID()}, event); err != nil {
		return err
	}
	n.Kick()
	pace, _ := strconv.Atoi(os.Getenv(paceEnv))
	for i := 0; ; i++ {
		if pace > 0 && i%pace == 0 {
			<-time.After(time.Millisecond)
		}
		id := fmt.Sprintf("%s-%d", name, i)
		if i%4 == 0 {
			fmt.Fprintln(out, "critical", id)
			if err := n.Critical(context.Background(), bypassed(id)); err != nil {
				return err
			}
			continue
		}
		fmt.Fprintln(out, "flow", id)
		n.Flow(proxied(id))
	}
}

// keepFlows gives the node a spool, which is small enough to be full at times.
func (s *site) keepFlows() {
	s.spoolDir, s.spool = filepath.Join(s.dir, "state", "flows"), 4<<20
}

func writeIdentity(t *testing.T, dir, role string, id identity) {
	t.Helper()
	certs, key, err := id.SVID.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	var bundle []byte
	for _, c := range id.X509Authorities() {
		bundle = append(bundle, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	for name, data := range map[string][]byte{"crt": certs, "key": key, "ca": bundle} {
		if err := os.WriteFile(filepath.Join(dir, role+"."+name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func readIdentity(dir, role string) (identity, error) {
	base := filepath.Join(dir, role)
	svid, err := x509svid.Load(base+".crt", base+".key")
	if err != nil {
		return identity{}, err
	}
	bundle, err := x509bundle.Load(domain, base+".ca")
	return identity{svid, bundle}, err
}

// process is a child of the test.
type process struct {
	cmd   *exec.Cmd
	first chan struct{}
	said  atomic.Int64         // lines so far
	lines chan map[string]bool // what it said, by line, when its output ended
}

func (s *site) startProcess(t *testing.T, role, name string, env ...string) *process {
	t.Helper()
	p := &process{cmd: exec.Command(os.Args[0]), first: make(chan struct{}), lines: make(chan map[string]bool, 1)}
	p.cmd.Env = append(os.Environ(), roleEnv+"="+role, dirEnv+"="+s.dir, addressEnv+"="+s.address, nameEnv+"="+name)
	p.cmd.Env = append(p.cmd.Env, env...)
	p.cmd.Stderr = os.Stderr
	out := must(p.cmd.StdoutPipe())(t)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.cmd.Process.Kill() })
	go func() {
		seen := map[string]bool{}
		for r := bufio.NewReader(out); ; {
			line, err := r.ReadString('\n')
			if err != nil {
				break
			}
			if len(seen) == 0 {
				close(p.first)
			}
			seen[strings.TrimSpace(line)] = true
			p.said.Add(1)
		}
		p.lines <- seen
	}()
	return p
}

// up waits until the process has said something.
func (p *process) up(t *testing.T) {
	t.Helper()
	select {
	case <-p.first:
	case <-time.After(30 * time.Second):
		t.Fatal("child says nothing")
	}
}

func (p *process) kill(t *testing.T) map[string]bool {
	t.Helper()
	if err := p.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	seen := <-p.lines
	p.cmd.Wait()
	return seen
}

// Agent and collector are killed at random moments, each with records on the way. Every record is
// delivered once or counted as lost, to the unit, but for the one that each kill interrupted: nobody can
// say whether that was produced.
func TestKilled(t *testing.T) {
	rounds := 15
	if testing.Short() {
		rounds = 4
	}
	s := newSite(t)
	s.keepFlows()
	writeIdentity(t, s.dir, "agent", s.agent)
	writeIdentity(t, s.dir, "collector", s.collector)
	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	said := map[string]bool{}
	var coll *process
	for round := range rounds {
		if coll == nil {
			coll = s.startProcess(t, "collector", "")
			coll.up(t)
		}
		agent := s.startProcess(t, "agent", strconv.Itoa(round))
		agent.up(t)
		<-time.After(time.Duration(rng.IntN(300)) * time.Millisecond) // the random moment
		if rng.IntN(2) == 0 {
			coll.kill(t)
			coll = nil
			<-time.After(time.Duration(rng.IntN(100)) * time.Millisecond)
		}
		for line := range agent.kill(t) {
			said[line] = true
		}
	}
	if coll != nil {
		coll.kill(t)
	}
	s.startCollector()
	n := s.startNode(500)
	n.drained(t)
	for class, word := range map[api.Class]string{api.Class_CLASS_FLOW: "flow", api.Class_CLASS_CRITICAL: "critical"} {
		checkKilled(t, s.held()[class], said, word, uint64(rounds))
	}
}

// A power loss takes the exact counts with it. What is reported then is marked as a bound, no number is
// used twice, and the bound holds.
func TestPowerLost(t *testing.T) {
	s := newSite(t)
	s.keepFlows()
	writeIdentity(t, s.dir, "agent", s.agent)
	said := map[string]bool{}
	stop := s.startCollector()
	for round := range 4 {
		agent := s.startProcess(t, "agent", strconv.Itoa(round), paceEnv+"=10") // the disk can reserve as fast
		agent.up(t)
		<-time.After(100 * time.Millisecond)
		if round%2 == 0 {
			stop()
		} else {
			stop = s.startCollector()
		}
		for line := range agent.kill(t) {
			said[line] = true
		}
		if err := os.Remove(filepath.Join(s.dir, "state", "node.db-count")); err != nil {
			t.Fatal(err)
		}
	}
	n := s.startNode(500)
	n.drained(t)
	for class, word := range map[api.Class]string{api.Class_CLASS_FLOW: "flow", api.Class_CLASS_CRITICAL: "critical"} {
		h := s.held()[class]
		h.check(t, h.last)
		if tried := count(said, word); h.last < tried || h.atMost == 0 {
			t.Errorf("%s: %d handed in, %d accounted for, %d of them as a bound", word, tried, h.last, h.atMost)
		}
		for id := range h.flows {
			if !said[word+" "+id] {
				t.Errorf("%s record %s was never produced", word, id)
			}
		}
	}
}

// A kill takes the records of the last seconds, and no others: what is older is on the disk.
func TestKillTakesSeconds(t *testing.T) {
	s := newSite(t)
	s.keepFlows()
	writeIdentity(t, s.dir, "agent", s.agent)
	agent := s.startProcess(t, "agent", "a", paceEnv+"=1", bufferEnv+"=1000000")
	waitFor(t, func() bool { return agent.said.Load() > 6000 }, func() string { return fmt.Sprint(agent.said.Load()) })
	said := agent.kill(t)
	s.startCollector()
	s.startNode(500).drained(t)
	h := s.held()[api.Class_CLASS_FLOW]
	checkKilled(t, h, said, "flow", 1)
	if lost := h.causes["agent_spool/agent_restart"]; lost > h.last/2 || lost != h.lost {
		t.Errorf("lost are %v", h.causes)
	}
}

func count(said map[string]bool, word string) (n uint64) {
	for line := range said {
		if strings.HasPrefix(line, word+" ") {
			n++
		}
	}
	return n
}

func checkKilled(t *testing.T, h *held, said map[string]bool, word string, kills uint64) {
	t.Helper()
	tried := count(said, word)
	h.check(t, h.last)
	if h.last > tried || h.last+kills < tried {
		t.Errorf("%s: %d records were handed in, accounted for are %d; at most %d calls were interrupted", word, tried, h.last, kills)
	}
	for id := range h.flows {
		if !said[word+" "+id] {
			t.Errorf("%s record %s was never produced", word, id)
		}
	}
	if h.atMost != 0 {
		t.Errorf("%s: %d losses are only bounds, but nobody lost power", word, h.atMost)
	}
	t.Logf("%s: %d handed in, %d delivered, %d lost %v", word, tried, len(h.flows), h.lost, h.causes)
}
