//go:build k8s

package scale

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

// kinds are the watches of one agent: those of our group, and its pods.
const kinds = 10

// figures are what was measured, in the order in which it was.
type figures struct {
	load, storage             string // storage: the version of etcd
	setBytes                  int
	alone                     usage   // without agents
	first                     reached // from the start of all
	starting, settled         usage   // until all have everything, and until they have said what they make of it
	agentsCost                Cost
	changed                   reached // of all changes
	written, lasts            []time.Duration
	changing                  []usage
	granted                   []time.Duration
	granting                  usage
	strayed                   int // times that a grant stirred another node than its own
	resting                   usage
	agentsRest                time.Duration
	agentsMemory              int64
	answers, healed, followed time.Duration // after the start of a new API server
	again                     reached       // after a change that waited for it
	restarting                usage
	peak, restartPeak         int64 // memory of the API server
}

// reached is how long something took to be at all nodes, and at those that verify it.
type reached struct{ had, verified, cost []time.Duration }

const preamble = `# Figures of many nodes

## The API server

Taken by ` + "`make bench-scale NODES=%d`" + ` on a machine with %d cores (%s), Linux %s, load %s at the start. One kube-apiserver (v1.36.3, as it is by itself, RBAC and all), one etcd (%[14]s) and
all %[1]d agents share the cores: what waits here for a core has one of its own elsewhere. The agents are %[6]d processes with %[7]d of them each. An agent is the package that a real one
follows its cluster by, with a connection of its own (mutual trust by TLS, the token of a service account), %[8]d watches, and what it says of resources and grants; it has no datapath.
One in %[9]d verifies each set as a node does: one reader for all of it, and its signatures.

The set is %[10]d services, a policy and a keyring, signed: %[11]s as YAML. There are %[12]d pods on each node, %[13]s in all. Bytes are those on the wire, with headers of TCP and IP.

`

func (b *bench) markdown() string {
	var out strings.Builder
	p := b.plan
	fmt.Fprintf(&out, preamble, p.nodes, runtime.NumCPU(), processor(), line("/proc/sys/kernel/osrelease"), b.load, p.processes, p.nodes/p.processes, kinds, p.witness,
		p.services, kibibytes(float64(b.setBytes)), p.pods, thousands(float64(p.nodes*p.pods)), b.storage)
	b.times(&out)
	b.costs(&out)
	fmt.Fprintf(&out, `Besides: a verification of the set takes %s of CPU time of its node (p50), and an agent %s of memory, its share of the process included, and %s of CPU time in a minute at rest. A grant stirred
%d other nodes. The most that the API server had in memory was %s until its restart and %s after it.

`, round(quantile(b.changed.cost, 50)), kibibytes(float64(b.agentsMemory)/float64(p.nodes)), seconds(b.agentsRest.Minutes()/b.plan.rest.Minutes()/float64(p.nodes)*60).Round(100*time.Microsecond),
		b.strayed, mebibytes(float64(b.peak)), mebibytes(float64(b.restartPeak)))
	return out.String()
}

func (b *bench) times(out *strings.Builder) {
	fmt.Fprintf(out, "| %d nodes: how long | p50 | p99 | last |\n| --- | ---: | ---: | ---: |\n", b.plan.nodes)
	row := func(what string, all []time.Duration) {
		fmt.Fprintf(out, "| %s | %s | %s | %s |\n", what, round(quantile(all, 50)), round(quantile(all, 99)), round(quantile(all, 100)))
	}
	row("a service is changed, the set signed anew: the first of two requests sent → a node has both", b.changed.had)
	row(fmt.Sprintf("the same until the last node has it, of %d changes", b.plan.changes), b.lasts)
	row("of these, the administrator's two requests", b.written)
	row("a node that verifies has verified it", b.changed.verified)
	row(fmt.Sprintf("a grant for one node: request sent → that node has verified it, of %d grants", b.plan.grants), b.granted)
	row("all agents start at once → a node has the set", b.first.had)
	row("a change applied as soon as a restarted API server answered: applied → a node has it", b.again.had)
	fmt.Fprintf(out, "\nAfter its restart the API server answered after %s; the last node had the change %s after the start, and followed all kinds again after %s.\n\n",
		round(b.answers), round(b.healed), round(b.followed))
}

// average is a change like the others.
func (b *bench) average() (u usage) {
	n := float64(len(b.changing))
	for _, c := range b.changing {
		u.api, u.etcd = u.api+c.api, u.etcd+c.etcd
		u.events, u.eventBytes, u.begun, u.patches = u.events+c.events/n, u.eventBytes+c.eventBytes/n, u.begun+c.begun/n, u.patches+c.patches/n
		u.conflicts, u.refused = u.conflicts+c.conflicts/n, u.refused+c.refused/n
		u.sent, u.received, u.kept = u.sent+c.sent/n, u.received+c.received/n, u.kept+c.kept/n
		u.apiMemory, u.etcdMemory, u.watches = c.apiMemory, c.etcdMemory, c.watches
	}
	u.api, u.etcd = u.api/time.Duration(n), u.etcd/time.Duration(n)
	return u
}

func (b *bench) costs(out *strings.Builder) {
	columns := []struct {
		name string
		usage
	}{
		{"no agents, " + b.plan.rest.String(), b.alone}, {"all start", b.starting}, {"all have started, and said their word", b.settled},
		{fmt.Sprintf("one change, and %s", b.plan.settle), b.average()}, {fmt.Sprintf("%d grants", b.plan.grants), b.granting},
		{"at rest, " + b.plan.rest.String(), b.resting}, {"restart", b.restarting},
	}
	rows := []struct {
		name string
		of   func(usage) string
	}{
		{"CPU time of the API server", func(u usage) string { return fmt.Sprintf("%.2f s", u.api.Seconds()) }},
		{"CPU time of etcd", func(u usage) string { return fmt.Sprintf("%.2f s", u.etcd.Seconds()) }},
		{"memory of the API server, then", func(u usage) string { return mebibytes(u.apiMemory) }},
		{"memory of etcd, then", func(u usage) string { return mebibytes(u.etcdMemory) }},
		{"watches of agents, then", func(u usage) string { return thousands(u.watches) }},
		{"lists, and watches that ended or were refused", func(u usage) string { return thousands(u.begun) }},
		{"events sent to watches", func(u usage) string { return thousands(u.events) }},
		{"statuses written, or tried to", func(u usage) string { return thousands(u.patches) }},
		{"of these, conflicts", func(u usage) string { return thousands(u.conflicts) }},
		{"requests told to come again (429)", func(u usage) string { return thousands(u.refused) }},
		{"bytes from the API server", func(u usage) string { return mebibytes(u.sent) }},
		{"bytes to the API server", func(u usage) string { return mebibytes(u.received) }},
		{"bytes between it and etcd", func(u usage) string { return mebibytes(u.kept) }},
	}
	fmt.Fprintf(out, "| %d nodes: what it costs |", b.plan.nodes)
	for _, c := range columns {
		out.WriteString(" " + c.name + " |")
	}
	out.WriteString("\n| --- |" + strings.Repeat(" ---: |", len(columns)) + "\n")
	for _, r := range rows {
		out.WriteString("| " + r.name + " |")
		for _, c := range columns {
			out.WriteString(" " + r.of(c.usage) + " |")
		}
		out.WriteString("\n")
	}
	out.WriteString("\n")
}

func round(d time.Duration) string {
	switch {
	case d >= 10*time.Second:
		return d.Round(100 * time.Millisecond).String()
	case d >= time.Second:
		return d.Round(10 * time.Millisecond).String()
	}
	return d.Round(100 * time.Microsecond).String()
}

func quantile(all []time.Duration, percent int) time.Duration {
	sorted := slices.Sorted(slices.Values(all))
	return sorted[min(len(sorted)*percent/100, len(sorted)-1)]
}

func mebibytes(n float64) string {
	if n < 10<<20 {
		return fmt.Sprintf("%.1f MiB", n/(1<<20))
	}
	return fmt.Sprintf("%.0f MiB", n/(1<<20))
}

func kibibytes(n float64) string { return fmt.Sprintf("%.0f KiB", n/(1<<10)) }

// thousands writes a number as people read it.
func thousands(v float64) string {
	s := strconv.Itoa(int(v + 0.5))
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

func line(file string) string {
	text, _ := os.ReadFile(file) // without it nothing is known
	return strings.TrimSpace(string(text))
}

func loadNow() string { return strings.Join(strings.Fields(line("/proc/loadavg"))[:3], " ") }

func processor() string {
	for l := range strings.Lines(line("/proc/cpuinfo")) {
		if key, value, _ := strings.Cut(l, ":"); strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return "unknown processor"
}
