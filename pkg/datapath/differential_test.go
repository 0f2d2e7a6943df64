package datapath_test

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/packet"
	"github.com/sallyport-dev/sallyport/test/reference"
)

// outcome of one case.
type outcome struct {
	verdict   int32
	judgement reference.Judgement
	refused   bool // a test run does not take such a frame
}

// passed says whether the place let the packet go on.
func (o outcome) passed(at *place) bool {
	if at.pass != 0 {
		return o.verdict == at.pass
	}
	return o.verdict == actNext || o.verdict == 0
}

// leak says that the packet passed although it must not, with no live path that explains it.
func (d *differential) leak(c drawn, o outcome) bool {
	if o.refused || !o.passed(c.place) || o.judgement.Verdict == reference.Free {
		return false
	}
	t := o.judgement.Tuple
	switch {
	case o.judgement.Shape == reference.LaterFragment && t.Protocol == packet.UDP:
		return !d.follows(o.judgement)
	case !o.judgement.Readable, t.Protocol != packet.TCP, t.Dst.Port() != hostPort && t.Dst.Port() != podPort:
		return true
	}
	return !d.granted[t.Src.Addr()]
}

// unknown is the identification of a first fragment that every receiver refuses for another reason, so that
// the reference did not read as far.
const unknown = 1 << 31

// follows says that the first fragment of the datagram was free, and has passed: or that it was refused, so
// that the datagram is never complete.
func (d *differential) follows(j reference.Judgement) bool {
	f := datagramID{j.Tuple.Src.Addr(), j.Tuple.Dst.Addr(), j.Fragment}
	if d.firsts[f] {
		return true
	}
	f.id = unknown
	return d.firsts[f]
}

// remember keeps what follows asks for.
func (d *differential) remember(c drawn, o outcome) {
	j := o.judgement
	if o.refused || !o.passed(c.place) || j.Verdict != reference.Free {
		return
	}
	f := datagramID{j.Tuple.Src.Addr(), j.Tuple.Dst.Addr(), j.Fragment}
	switch j.Shape {
	case reference.IPv4Length, reference.IPv6Length, reference.FragmentLength, reference.ChainCut, reference.TransportCut, reference.TransportRefused, reference.HopByHopLate:
		f.id = unknown
	default:
		if !j.First {
			return
		}
	}
	d.firsts[f] = true
}

func (d *differential) try(c drawn) outcome {
	run := c.place.plain
	if c.frame.Tagged {
		run = c.place.tagged
		run.context.CB[0], run.context.CB[1] = uint32(c.frame.TCI)+1, uint32(c.tagType)
	}
	run.context.Ifindex, run.context.Mark = uint32(c.place.device), c.mark
	run.context.GSOSegs, run.context.GSOSize = 0, 0
	if c.frame.Segmented {
		run.context.GSOSegs, run.context.GSOSize = 2, 1000
	}
	verdict, err := run.run(c.frame.Data)
	return outcome{verdict: verdict, judgement: d.world.Judge(c.frame), refused: err != nil}
}

// tally counts what a run has met.
type tally struct {
	packets, protect, steered, dropped, refused uint64
	leaks                                       map[string]int    // by place and shape
	examples                                    map[string]string // one of each
	closed                                      map[closing]uint64
}

// closing is a packet that was free and did not pass.
type closing struct {
	shape  reference.Shape
	reason flow.Reason
	owned  bool
}

func newTally() *tally {
	return &tally{leaks: map[string]int{}, examples: map[string]string{}, closed: map[closing]uint64{}}
}

func (y *tally) add(c drawn, o outcome) {
	y.packets++
	switch {
	case o.refused:
		y.refused++
	case o.judgement.Verdict == reference.Protect:
		y.protect++
	}
	switch o.verdict {
	case actRedirect:
		y.steered++
	case actDrop:
		y.dropped++
	}
}

func (y *tally) leak(seed uint64, c drawn, o outcome) {
	key := fmt.Sprintf("%s, %s to %v", c.place.name, o.judgement.Shape, o.judgement.Tuple.Dst.Addr())
	if y.leaks[key]++; y.leaks[key] == 1 {
		y.examples[key] = fmt.Sprintf("seed %d, %v\nreference: %+v, verdict %d", seed, c, o.judgement, o.verdict)
	}
}

func (y *tally) close(k closing, c drawn) {
	if y.closed[k]++; y.closed[k] == 1 {
		y.examples[fmt.Sprint(k)] = c.String()
	}
}

// report fails the test for every leak, and for every closing that nobody has agreed to.
func (y *tally) report(t *testing.T) {
	t.Helper()
	for key, n := range y.leaks {
		t.Errorf("passed, but must not: %d times at %s\n%s", n, key, y.examples[key])
	}
	var lines []string
	for c, n := range y.closed {
		lines = append(lines, fmt.Sprintf("%9d  %s: %s, owned %v", n, c.shape, c.reason, c.owned))
		if !c.agreed() {
			t.Errorf("closed, but free: %s, owned %v, with %s, %d times\n%s", c.shape, c.owned, c.reason, n, y.examples[fmt.Sprint(c)])
		}
	}
	slices.Sort(lines)
	t.Logf("%d to protect, %d steered, %d dropped, %d not taken by a test run; free but closed, one of %d:\n%s",
		y.protect, y.steered, y.dropped, y.refused, sampled, strings.Join(lines, "\n"))
}

// sampled is how often a closing is asked for its reason, which costs a second run.
const sampled = 64

// overClosing are the reasons that may close what no part of could reach a protected port, and why. The
// rule is that a doubt towards an address that owns a protected port closes. Elsewhere nothing is in doubt, but
// for what stands in anywhere.
var overClosing = map[flow.Reason]string{
	flow.ReasonMalformed:   "refused by every receiver, or read no further than it must be",
	flow.ReasonFragment:    "TCP is not fragmented: none is let through to look at the first",
	flow.ReasonExtHeaders:  "a chain beyond the bound, or one that ends in what cannot be read",
	flow.ReasonNoPath:      "lengths are left to the proxy's namespace, which refuses them",
	flow.ReasonStray:       "the same; and answers of a service without a flow",
	flow.ReasonLeg:         "the same; and answers of a service to the proxy",
	flow.ReasonReverseOpen: "a service opens no connection from its protected port",
	flow.ReasonPathLive:    "the same",
	flow.ReasonPathExpired: "the same, in a run of more than ten minutes",
	flow.ReasonPathStale:   "the same, as of a flow whose path is another's",
	flow.ReasonSocketEnded: "the same, at the socket",
	flow.ReasonLegsFull:    "what steers, in a run of many packets",
	flow.ReasonSourceRoute: "no sender chooses the way of its packets",
	flow.ReasonBadFlags:    "a receiver makes nothing of them either",
	flow.ReasonICMPLeg:     "about a packet of the proxy",
	flow.ReasonICMPStray:   "about a packet of a protected port, but of no flow",
	flow.ReasonUDPNoPath:   "lengths are not looked at where the port says enough",
	flow.ReasonUDPNoFlow:   "an answer to nobody",
	flow.ReasonUDPDenied:   "lengths are not looked at where the port says enough; and groups",
	flow.ReasonLinkLocal:   "an address of the link: any pod may have it",
	flow.ReasonUnlisted:    "lengths are not looked at where the port says enough; and groups, which TCP does not have",
	flow.ReasonOrphan:      "a fragment whose first one has not passed here",
	flow.ReasonBackstop:    "a socket refuses what does not fit, whoever asks",
}

var anywhere = map[flow.Reason]string{
	flow.ReasonMalformed:   "more than one tag of id 0, or tags inside a packet that leaves for a pod",
	flow.ReasonLeg:         "the tuple was seen on lo, where every address is the node's",
	flow.ReasonPathLive:    "the same",
	flow.ReasonPathExpired: "the same",
	flow.ReasonICMPLeg:     "by the packet that it quotes",
	flow.ReasonICMPStray:   "the same",
}

// agreed says whether the closing is one of those.
func (c closing) agreed() bool {
	if c.owned {
		return overClosing[c.reason] != ""
	}
	return anywhere[c.reason] != ""
}

// reasonOf runs the case again and looks which reason counts it.
func (d *differential) reasonOf(t *testing.T, c drawn) flow.Reason {
	before := d.counters(t)
	d.try(c)
	for reason, n := range d.counters(t) {
		if n.Packets != before[reason].Packets {
			return reason
		}
	}
	return flow.ReasonNone
}

// explained says that a socket may have the packet all the same: it is the reset of a flow that the run itself
// has left behind; or it is one that the program leaves to its socket's port, which a test run has none of.
func (d *differential) explained(t *testing.T, c drawn, o outcome) bool {
	if c.place.hook != reference.SocketIn {
		return false
	}
	switch o.judgement.Shape {
	case reference.Authenticated, reference.TCPChain, reference.UDPChain, reference.TCPOptionsIP, reference.UDPOptionsIP:
		return true
	}
	mapped := o.judgement.Tuple.Src.Addr().Is4In6() || o.judgement.Tuple.Dst.Addr().Is4In6()
	return mapped || d.reasonOf(t, c) == flow.ReasonSocketReset
}

// setting reads a number from the environment.
func setting(t testing.TB, name string, otherwise uint64) uint64 {
	s := os.Getenv(name)
	if s == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(s, 10, 64)
	check(t, err)
	return n
}

// TestNothingPassesThatMustNot holds the programs against the reference: no packet that could reach a
// protected port is passed on. PROVE_PACKETS says how many, PROVE_SEED and PROVE_FROM which: the case that
// a failure names is run again with its seed, its index, and one packet.
func TestNothingPassesThatMustNot(t *testing.T) {
	seed := setting(t, "PROVE_SEED", 1)
	n, from := setting(t, "PROVE_PACKETS", 1_000_000), setting(t, "PROVE_FROM", 0)
	d, y := newDifferential(t, seed), newTally()
	begin := time.Now()
	check(t, d.Node.Do(func() error {
		for i := from; i < from+n; i++ {
			if err := d.prove(t, y, i); err != nil {
				return err
			}
		}
		return nil
	}))
	took := time.Since(begin)
	t.Logf("%d packets of seed %d in %v, %.0f a second", n, seed, took.Round(time.Millisecond), float64(n)/took.Seconds())
	y.report(t)
}

// prove tries one case, in the node's namespace.
func (d *differential) prove(t *testing.T, y *tally, index uint64) error {
	if index%100_000 == 0 {
		d.drain(t)
		if err := d.d.Renew(time.Minute); err != nil {
			return err
		}
	}
	c := d.draw(index)
	o := d.try(c)
	y.add(c, o)
	d.remember(c, o)
	if d.leak(c, o) && !d.explained(t, c, o) {
		y.leak(d.gen.Seed, c, o)
	}
	if !o.refused && !o.passed(c.place) && o.judgement.Verdict == reference.Free && index%sampled == 0 {
		if reason := d.reasonOf(t, c); reason != flow.ReasonNone { // else it passes now: a map was busy for a moment
			y.close(closing{o.judgement.Shape, reason, o.judgement.Owned}, c)
		}
	}
	return nil
}

// TestTheProofFindsAHole: with its ports forgotten by the programs, and known to the reference, a service is
// found open.
func TestTheProofFindsAHole(t *testing.T) {
	d, y := newDifferential(t, 1), newTally()
	check(t, d.m.SpPorts.Put(uint32(hostPort/64), &bpf.Ports{}))
	check(t, d.Node.Do(func() error {
		for i := range uint64(20_000) {
			if err := d.prove(t, y, i); err != nil {
				return err
			}
		}
		return nil
	}))
	if len(y.leaks) == 0 {
		t.Error("no leak was found")
	}
}
