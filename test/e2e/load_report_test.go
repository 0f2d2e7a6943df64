package e2e_test

import (
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
)

const loadText = `# The proxy under slow clients and floods

Taken by ` + "`make bench-slow`" + ` with %s connections, in %s of %v, on a machine with %d cores (%s), Linux %s, load %s at the start.

A good client makes a connection each %v (mTLS, a request of %d bytes, its answer) and asks each %v on one that stands, both through Sallyport with all that
belongs to it. Attackers come from %s addresses beside it, and from the same machine: what they need of its cores is missing to everybody. Attackers whose
connection ends make another one at once. The proxy has %s places, of which those who proved an identity have 7 in 8, and waits %v for a handshake and for a header.

What the good client gets is held against two things. "There": the same load without Sallyport, which is a good client of a bare listener beside the same attackers,
with Go's own TLS and HTTP, as many places and as much patience, no px, policy or records. The aim is at most twice of that at the 99th percentile, where no limit of
the proxy's is passed. "Beside": it comes through Sallyport while the attack goes to that other listener, so that the cores are as busy and the proxy is idle.

`

func (l *siege) markdown() string {
	var out strings.Builder
	fmt.Fprintf(&out, loadText, thousands(l.n), roundsText(l.rounds), l.time, runtime.NumCPU(), processor(), kernelRelease(), l.load, goodNew, requestSize, goodLive,
		thousands(l.sources), thousands(l.places), l.patience())
	out.WriteString("## What the good client gets\n\nMedian and 99th percentile of all rounds together, ms, and the 99th percentile at Sallyport to that there, and beside (of single rounds: from, to).\n")
	for _, of := range []struct {
		what string
		take func(loadSaid) taken
	}{
		{"a new connection with a request", func(s loadSaid) taken { return s.New }},
		{"a request on the connection that stands", func(s loadSaid) taken { return s.Live }},
	} {
		fmt.Fprintf(&out, "\n| attackers: %s | there | beside | at Sallyport | to there | to beside | aim | failed |\n| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: |\n", of.what)
		each := func(all ...loadSaid) (by []taken) {
			for _, s := range all {
				by = append(by, of.take(s))
			}
			return by
		}
		goodRow(&out, "none (quiet)", nil, nil, each(l.quiet))
		for _, f := range l.faced {
			goodRow(&out, f.name, each(f.bare...), each(f.beside...), each(f.during...))
		}
		goodRow(&out, "none any more", nil, nil, each(l.after))
	}
	fmt.Fprintf(&out, "\n## What attackers get\n\nThe proxy has %.0f MiB in memory (Pss) before the first attack, and %d descriptors; after each attack it has those descriptors again, and after the last one\n"+
		"the goroutines of a fresh one. Counted are connections; REQUEST_LIMIT and BAD_REQUEST count requests.\n\n", l.rest/1024, l.restFiles)
	out.WriteString("| attackers | connections | a second | MiB at most | KiB each | MiB after | by reason |\n| --- | ---: | ---: | ---: | ---: | ---: | --- |\n")
	for _, f := range l.faced {
		fmt.Fprintf(&out, "| %s | %s | %s | %.0f | %s | %.0f | %s |\n", f.name, thousands(int(f.connected)),
			digits(float64(f.connected)/f.took.Seconds()), f.memory/1024, digits((f.memory-l.rest)/float64(f.n)), f.left/1024, reasonsText(f.reasons))
	}
	return out.String()
}

func roundsText(n int) string {
	if n == 1 {
		return "one round"
	}
	return fmt.Sprintf("%d rounds", n)
}

func goodRow(out *strings.Builder, name string, bare, beside, during []taken) {
	fmt.Fprintf(out, "| %s | %s | %s | %s | %s | %s | %s | %d |\n", name, takenText(bare), takenText(beside), takenText(during),
		tailRatio(bare, during), tailRatio(beside, during), aimText(name, bare, during), together(during).Failed)
}

func aimText(name string, bare, during []taken) string {
	switch {
	case bare == nil:
		return "-"
	case name == pastPlaces:
		return "none: past a limit"
	case together(during).at(99) > 2*together(bare).at(99):
		return "missed"
	}
	return "met"
}

func takenText(rounds []taken) string {
	if rounds == nil {
		return "-"
	}
	all := together(rounds)
	ms := func(percent int) string { return digits(float64(all.at(percent)) / 1e6) }
	return ms(50) + ", " + ms(99)
}

// tailRatio is that of all rounds together, and the least and the most of one.
func tailRatio(beside, during []taken) string {
	if beside == nil {
		return "-"
	}
	var each []float64
	for i := range during {
		each = append(each, float64(during[i].at(99))/float64(beside[i].at(99)))
	}
	text := fmt.Sprintf("%.2f", float64(together(during).at(99))/float64(together(beside).at(99)))
	if len(each) > 1 {
		text += fmt.Sprintf(" (%.2f to %.2f)", slices.Min(each), slices.Max(each))
	}
	return text
}

func reasonsText(reasons map[string]uint64) string {
	var all []string
	for _, reason := range slices.Sorted(maps.Keys(reasons)) {
		all = append(all, fmt.Sprintf("%s %s", reason, thousands(int(reasons[reason]))))
	}
	return strings.Join(all, ", ")
}
