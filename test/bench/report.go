package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// published is the name of the files in the documents' folder.
const published = "bench-datapath"

// write puts tables, plot and data into the plan's folder, and the first two where they are published.
func (r *results) write(p plan) error {
	data, err := json.MarshalIndent(struct {
		*results
		Verdicts []verdict `json:"verdicts"`
	}{r, r.verdicts()}, "", "\t")
	if err != nil {
		return fmt.Errorf("encode data: %w", err)
	}
	text, plot := r.markdown(), r.plot()
	if err := os.MkdirAll(p.out, 0o755); err != nil {
		return fmt.Errorf("make folder: %w", err)
	}
	err = errors.Join(os.WriteFile(filepath.Join(p.out, published+".json"), data, 0o644), save(p.out, text, plot))
	if p.publish != "" {
		err = errors.Join(err, save(p.publish, text, plot))
	}
	if err == nil {
		fmt.Print(text)
	}
	return err
}

func save(folder, text, plot string) error {
	return errors.Join(os.WriteFile(filepath.Join(folder, published+".md"), []byte(text), 0o644),
		os.WriteFile(filepath.Join(folder, published+".svg"), []byte(plot), 0o644))
}

const introduction = `# Figures of the datapath

Taken by ` + "`make bench-datapath`" + ` with %s, on %s.

Compare ratios, not machines. What is compared took turns in every round; a ratio is the median over the rounds of what
was measured in the same round, and its spread is the quartiles, with the least and the greatest value behind them.
Everything ran in network namespaces on this one machine: its cores are shared by client, service, proxy and kernel.

![The figures as plots](bench-datapath.svg)

`

func (r *results) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, introduction, counted(r.Rounds, "round"), r.Machine)
	b.WriteString("## What was aimed at\n\n" + r.verdictTable())
	for _, s := range r.sections() {
		fmt.Fprintf(&b, "\n## %s\n\n%s\n\n%s", s.title, s.text, s.table)
	}
	if len(r.Notes) > 0 {
		b.WriteString("\n## Notes\n\n")
		for _, n := range r.Notes {
			fmt.Fprintf(&b, "- %s\n", n)
		}
	}
	return b.String()
}

func (r *results) verdictTable() string {
	out := "| measure | aim | got | spread | result |\n| --- | --- | ---: | --- | --- |\n"
	for _, v := range r.verdicts() {
		result := v.Result
		if v.Why != "" {
			result += ": " + v.Why
		}
		out += row(v.Measure, v.Aim, v.Got, v.Spread, result)
	}
	return out
}

type section struct{ title, text, table string }

// sections are the tables behind the verdicts, of what was measured in this run.
func (r *results) sections() []section {
	all := []section{
		{"Packets", packetText, r.packetTable()},
		{"Traffic", trafficText, r.wayTable([]string{bulk.group, connects.group, concurrent.group, pingPong.group + ", p50", pingPong.group + ", p99"})},
		{"More services", servicesText, r.scaleTable([]string{bulk.group + overServices, connects.group + overServices})},
		{"More exceptions", exceptionsText, r.scaleTable([]string{bulk.group + overExceptions, connects.group + overExceptions, pingPong.group + overExceptions + ", p50"})},
		{"Ends of paths", endsText, r.eventTable(groupEnds)},
		{"The agent", agentText, r.eventTable(groupAgent)},
	}
	return slices.DeleteFunc(all, func(s section) bool { return s.table == "" })
}

const (
	packetText = `Nanoseconds of one packet by BPF_PROG_TEST_RUN, medians of short batches, in the very programs that are attached to a
device. The cost of the test run itself is in every figure; the empty program of each place shows it. "At random" means
that each packet is of another flow (or service) than the one before, by a driver whose cost the empty program shows, too.
The socket of a test run has no port, which the backstop looks at twice; a real one's packet is cheaper. "One look-up" is a program that finds an entry of the size of a flow in a hash of so many, adds to it, and does nothing else.`
	trafficText = `A remote client and a service in a pod of the node, IPv4, as separate processes; a connection is made, served one byte
and closed in order. Direct: a node without any program. Bypassed: under a path. Steered, and each TPROXY: to the same plain
copy proxy. The rules of iptables (legacy) and nftables mean the same: the proxy's own connections by a socket match, then the
protected service. "/ direct" is the ratio of the same round.`
	servicesText = `Steering to the same copy proxy with more protected services; the one that is measured stands in the middle, which is the
mean of a list that is searched in order. Rules and sets of nftables are both here: one rule for each, and one rule with a set.`
	exceptionsText = `Going around the proxy with more exceptions, a client each; the one that is measured stands in the middle. For Sallyport an
exception is a path with a deadline, counted and recorded; for the others it is a rule, or an element of a set, that accepts.`
	endsText = `The tap is a packet socket in the service's namespace. Times are of the client, from its system call on, in one process with the
tap. Packets "after" an end are those with a later time stamp; negative times are before it.`
	agentText = `The agent as it is built, in the node's namespace, with its state on this machine's disk, no proxy and no collector. Grants are signed,
sent, verified, recorded (fsync) and open when the reply comes.`
)

func (r *results) inGroup(group string) []*series {
	return slices.DeleteFunc(slices.Clone(r.Series), func(s *series) bool { return s.Group != group })
}

// packetTable has a row for each packet and both families beside each other.
func (r *results) packetTable() string {
	var out strings.Builder
	for _, s := range r.inGroup(groupPackets) {
		name, four := strings.CutSuffix(s.Name, "/IPv4")
		if !four {
			continue
		}
		cells := []string{name}
		for _, f := range []string{"/IPv4", "/IPv6"} {
			if s := r.find(groupPackets, name+f); s != nil {
				v := spreadOf(s.Values)
				cells = append(cells, number(v.Median), fmt.Sprintf("%s to %s", number(v.Low), number(v.High)))
			}
		}
		out.WriteString(row(cells...))
	}
	if out.Len() == 0 {
		return ""
	}
	return head("packet", "IPv4, ns", "quartiles", "IPv6, ns", "quartiles") + out.String()
}

// wayTable has a row for each way and a column for each group, with the ratio to the direct way.
func (r *results) wayTable(groups []string) string {
	var out strings.Builder
	columns := []string{}
	for _, g := range groups {
		if s := r.inGroup(g); len(s) > 0 {
			columns = append(columns, g+", "+s[0].Unit, "/ direct")
		}
	}
	for _, s := range r.inGroup(groups[0]) {
		cells := []string{s.Name}
		for _, g := range groups {
			cells = append(cells, median(r.find(g, s.Name)), ratioText(r.find(g, s.Name), r.find(g, "direct")))
		}
		out.WriteString(row(cells...))
	}
	if out.Len() == 0 {
		return ""
	}
	return head("way", columns...) + out.String()
}

func median(s *series) string {
	if s == nil {
		return "-"
	}
	return number(spreadOf(s.Values).Median)
}

func ratioText(a, b *series) string {
	all := ratios(a, b)
	if len(all) == 0 {
		return "-"
	}
	s := spreadOf(all)
	return fmt.Sprintf("%s (%s to %s)", number(s.Median), number(s.Low), number(s.High))
}

// scaleTable has a row for each way and number, and a column for each group.
func (r *results) scaleTable(groups []string) string {
	var out strings.Builder
	columns := []string{}
	for _, g := range groups {
		if s := r.inGroup(g); len(s) > 0 {
			title, _, _ := strings.Cut(g, ", over")
			columns = append(columns, title+", "+s[0].Unit, "quartiles")
		}
	}
	for _, s := range r.inGroup(groups[0]) {
		cells := []string{s.Name}
		for _, g := range groups {
			if s := r.find(g, s.Name); s != nil {
				v := spreadOf(s.Values)
				cells = append(cells, number(v.Median), fmt.Sprintf("%s to %s", number(v.Low), number(v.High)))
			}
		}
		out.WriteString(row(cells...))
	}
	if out.Len() == 0 {
		return ""
	}
	return head("way and number", columns...) + out.String()
}

// eventTable has a row for each series, with its tail.
func (r *results) eventTable(group string) string {
	var out strings.Builder
	for _, s := range r.inGroup(group) {
		out.WriteString(row(s.Name, number(quantile(s.Values, 0.5)), number(quantile(s.Values, 0.99)), number(quantile(s.Values, 1)), s.Unit, thousands(len(s.Values))))
	}
	if out.Len() == 0 {
		return ""
	}
	return head("what", "median", "p99", "most", "unit", "values") + out.String()
}
