package main

import (
	"fmt"

	"github.com/sallyport-dev/sallyport/test/lab"
)

// aim is a figure of the design, and what was measured of it.
type aim struct {
	measure string
	values  []float64
	limit   float64
	unit    string
	least   bool    // the limit is a lower one
	tail    float64 // the quantile that counts; 0 is the median
	why     string  // what costs, where it is missed
}

// verdict is an aim held against its values.
type verdict struct {
	Measure string `json:"measure"`
	Aim     string `json:"aim"`
	Got     string `json:"got"`
	Spread  string `json:"spread"`
	Result  string `json:"result"`
	Why     string `json:"why,omitempty"`
}

func (a aim) text() string {
	word := "at most"
	if a.least {
		word = "at least"
	}
	return fmt.Sprintf("%s %s%s", word, figure(a.limit, a.unit), a.of())
}

// of says which value counts.
func (a aim) of() string {
	switch a.tail {
	case 0:
		return ""
	case 1:
		return " (all)"
	}
	return fmt.Sprintf(" (p%.0f)", a.tail*100)
}

// judge compares what counts with the limit. Where the quartiles lie on both sides of it, a miss is within
// the noise of this run.
func (a aim) judge() verdict {
	s := spreadOf(a.values)
	got := s.Median
	if a.tail != 0 {
		got = quantile(a.values, a.tail)
	}
	v := verdict{Measure: a.measure, Aim: a.text(), Got: figure(got, a.unit), Spread: s.String(), Result: "met"}
	if !a.missed(got) {
		return v
	}
	v.Result, v.Why = "missed", a.why
	if a.tail == 0 && (!a.missed(s.Low) || !a.missed(s.High)) {
		v.Result = "missed, within the noise"
	}
	return v
}

func (a aim) missed(v float64) bool {
	if a.least {
		return v < a.limit
	}
	return v > a.limit
}

// verdicts judge every aim that the run has measured.
func (r *results) verdicts() []verdict {
	var out []verdict
	for _, list := range [][]aim{r.packetAims(), r.directAims(), r.steerAims(), r.endAims(), r.agentAims()} {
		for _, a := range list {
			if len(a.values) > 0 {
				out = append(out, a.judge())
			}
		}
	}
	return out
}

func (r *results) packetAims() []aim {
	var all []aim
	for _, f := range lab.Families() {
		of := func(name string) *series { return r.find(groupPackets, fmt.Sprintf("%s/%v", name, f)) }
		for _, way := range []string{"in from the uplink", "out to a pod"} {
			all = append(all, aim{measure: fmt.Sprintf("unprotected packet, %s, %v: hook / empty tcx program", way, f),
				values: ratios(of("unprotected, "+way), of("empty program")), limit: 1.5,
				why: "the parse and the port bits are all that runs"})
		}
	}
	for _, f := range lab.Families() {
		net := func(n int) *series {
			paths := counted(n, "path") + " at random"
			return less(r.find(groupPackets, fmt.Sprintf("bypassed, %s/%v", paths, f)),
				r.find(groupPackets, fmt.Sprintf("empty program, %s/%v", paths, f)))
		}
		all = append(all, aim{measure: fmt.Sprintf("bypassed packet, each of another of 65,536 paths and flows / of one, %v", f),
			values: ratios(net(65536), net(1)), limit: 1.5, why: r.whyManyPaths(f)})
	}
	return all
}

// whyManyPaths sets what more paths cost beside what a single look-up costs more in a hash of as many entries.
func (r *results) whyManyPaths(f lab.Family) string {
	more := func(format string) float64 {
		many, one := r.find(groupPackets, fmt.Sprintf(format, "65,536", "s", f)), r.find(groupPackets, fmt.Sprintf(format, "1", "", f))
		if many == nil || one == nil {
			return 0
		}
		return spreadOf(many.Values).Median - spreadOf(one.Values).Median
	}
	return fmt.Sprintf("%s ns more, for each packet finds its flow, its path and the path's state outside the caches; one look-up in a hash of as many flows, and no more, costs %s ns more",
		number(more("bypassed, %s path%s at random/%v")), number(more("one look-up, %s flow%s at random/%v")))
}

// directAims are of the bypassed traffic against that of a node without any program.
func (r *results) directAims() []aim {
	of := func(group string) []float64 { return ratios(r.find(group, "bypassed"), r.find(group, "direct")) }
	return []aim{
		{measure: "bypassed / direct, throughput", values: of(bulk.group), limit: 0.98, least: true},
		{measure: "bypassed / direct, p50 of a ping-pong", values: of(pingPong.group + ", p50"), limit: 1.05, why: whyPingPong},
		{measure: "bypassed / direct, connections per second, one after the other", values: of(connects.group), limit: 0.95, least: true, why: whyConnects},
		{measure: "bypassed / direct, connections per second, eight at a time", values: of(concurrent.group), limit: 0.95, least: true, why: whyConnects},
	}
}

// steerAims are of steered traffic against that of TPROXY to the same proxy.
func (r *results) steerAims() []aim {
	var all []aim
	for _, k := range []kind{bulk, connects, concurrent} {
		all = append(all, aim{measure: "steering / iptables TPROXY, " + k.group, limit: 1, least: true, why: whySteer,
			values: ratios(r.find(k.group, "steered"), r.find(k.group, "iptables"))})
	}
	all = append(all, aim{measure: "steering / iptables TPROXY, p50 of a ping-pong", limit: 1, why: whySteer,
		values: ratios(r.find(pingPong.group+", p50", "steered"), r.find(pingPong.group+", p50", "iptables"))})
	for _, k := range []kind{bulk, connects} {
		group := k.group + overServices
		all = append(all, aim{measure: "steering, 10,000 services / 1, " + k.group, limit: 0.95, least: true,
			values: ratios(r.find(group, scaleName("steered", 10000)), r.find(group, scaleName("steered", 1)))})
	}
	return all
}

func (r *results) endAims() []aim {
	of := func(name string) []float64 {
		if s := r.find(groupEnds, name); s != nil {
			return s.Values
		}
		return nil
	}
	return []aim{
		{measure: "expiry, agent dead: last packet after the deadline, by an outside tap", values: of(endOvershoot), limit: 1000, unit: " µs", tail: 0.99},
		{measure: "expiry to RST on the client's next packet", values: of(endExpiryReset), limit: 100, unit: " µs", why: whyReset},
		{measure: "revoke to RST on the client's next packet", values: of(endRevokeReset), limit: 100, unit: " µs", why: whyReset},
		{measure: "expiry to service through the proxy", values: of(endExpiryServed), limit: 5, unit: " ms"},
		{measure: "revoke to service through the proxy", values: of(endRevokeServed), limit: 5, unit: " ms"},
		{measure: "path opened, in the datapath", values: of(endOpen), limit: 10000, unit: " µs", tail: 0.99},
		{measure: "revoke returned, in the datapath: packets after it", values: of(endRevokeLate), unit: " packets", tail: 1, why: whyLate},
	}
}

func (r *results) agentAims() []aim {
	of := func(name string) []float64 {
		if s := r.find(groupAgent, name); s != nil {
			return s.Values
		}
		return nil
	}
	return []aim{
		{measure: "grant accepted to path open, by the agent, on disk before", values: of(agentActivate), limit: 10, unit: " ms", tail: 0.99, why: whyActivate},
		{measure: "revoke returned by the agent: packets after the reply", values: of(agentLate), unit: " packets", tail: 1},
		{measure: "agent's resident memory with 10,000 active paths", values: of(agentFull), limit: 64, unit: " MiB", why: whyMemory},
	}
}

// What costs, where an aim is missed: found by profiles, and kept beside the figure.
const (
	whyPingPong = "a round trip crosses four hooks, at the uplink and at the pod in each direction, some 100 ns each, and the backstop at the service's socket"
	whyConnects = "a SYN opens a flow and writes a record, which somebody reads, and the flow is swept when it is over"
	whySteer    = "each packet crosses the px pair and is seen again where it is put back, on either side of the proxy; TPROXY hands it to a socket at once"
	whyReset    = "two passes through px and a wake-up of the client"
	whyLate     = "a packet that passed the hook before the end was still on its way to the tap"
	whyActivate = "the grant is on this machine's disk before its path is open, and the agent reads all paths each second meanwhile"
	whyMemory   = "half of it is the text of the program and the rings; the rest is a kilobyte a grant, and the database"
)
