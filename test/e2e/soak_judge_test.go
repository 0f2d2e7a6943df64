package e2e_test

import (
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

// maxLeaks is how many leaks are told one by one.
const maxLeaks = 100

// leaked is one packet, or one answer, that should not have been.
type leaked struct {
	Time      time.Time
	Witness   string // who saw it
	Src, Dst  netip.AddrPort
	Flags     uint8
	LastEvent string `json:"last_event"`
}

func (l leaked) String() string {
	return fmt.Sprintf("%s %s: %s -> %s flags %#02x, after %s", l.Time.Format("15:04:05.000000"), l.Witness, l.Src, l.Dst, l.Flags, l.LastEvent)
}

// leakJudge knows nothing of Sallyport: it is told what the services' own sockets were given, and what
// the clients were answered. A client's ports are above those of the proxy.
type leakJudge struct {
	witness *lab.Witness

	mu      sync.Mutex // guards the rest
	event   string
	leaks   []leaked
	count   int // of all leaks
	raw     int // of leaks that were raw probes
	byProxy int
	from    map[string]int // leaks by their two addresses
}

func newJudge(t *testing.T) *leakJudge {
	t.Helper()
	j := &leakJudge{from: map[string]int{}}
	var err error
	j.witness, err = lab.NewWitness(j.given)
	must(t, err)
	t.Cleanup(func() { must(t, j.witness.Close()) })
	return j
}

func (j *leakJudge) given(g lab.Given) {
	if g.Flags&packet.RST != 0 {
		return // asks for no answer: the datapath itself ends a service's half in this way
	}
	if g.Src.Port() >= firstClientPort {
		j.leak(leaked{Time: g.Time, Witness: "service", Src: g.Src, Dst: g.Dst, Flags: g.Flags})
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.byProxy++
}

func (j *leakJudge) leak(l leaked) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.count++
	j.from[fmt.Sprintf("%s: %s -> %s", l.Witness, l.Src.Addr(), l.Dst)]++
	if l.Src.Port() >= firstRawPort {
		j.raw++
	}
	if l.LastEvent = j.event; len(j.leaks) < maxLeaks {
		j.leaks = append(j.leaks, l)
	}
}

// begin notes what is done to the programs.
func (j *leakJudge) begin(event string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.event = fmt.Sprintf("%s at %s", event, time.Now().Format("15:04:05.000000"))
}

// reset ends the control run: from here on nothing may leak. It returns how many raw probes were seen.
func (j *leakJudge) reset() (raw int) {
	j.mu.Lock()
	defer j.mu.Unlock()
	raw = j.raw
	j.count, j.raw, j.byProxy, j.leaks = 0, 0, 0, nil
	clear(j.from)
	return raw
}

// blind fails the test when a service was given packets that the judge did not see.
func (j *leakJudge) blind(t *testing.T) {
	t.Helper()
	if n, err := j.witness.Lost(); n > 0 || err != nil {
		t.Errorf("the witness missed %d packets (%v)", n, err)
	}
}
