package e2e_test

import (
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"time"
)

const loadText = `# The proxy under slow clients and floods

Taken by ` + "`make bench-slow`" + ` with %s connections, on a machine with %d cores (%s), Linux %s, load %s at the start.

A good client makes a connection each %v (mTLS, a request of %d bytes, its answer) and asks each %v on one that stands, both through Sallyport with all that
belongs to it. Attackers come from %s addresses beside it, and from the same machine: what they need of its cores is missing to everybody. Attackers whose
connection ends make another one at once. The proxy has %s places, of which those who proved an identity have 7 in 8, and waits %v for a handshake and for a header.

What the good client gets is held against two things. "There": the same load without Sallyport, which is a good client of a bare listener beside the same attackers,
with Go's own TLS and HTTP, as many places and as much patience, no px, policy or records. The aim is at most twice of that at the 99th percentile, where no limit of
the proxy's is passed. "Beside": it comes through Sallyport while the attack goes to that other listener, so that the cores are as busy and the proxy is idle.

`

func (l *siege) markdown() string {
	var out strings.Builder
	fmt.Fprintf(&out, loadText, thousands(l.n), runtime.NumCPU(), processor(), kernelRelease(), l.load, goodNew, requestSize, goodLive,
		thousands(l.sources), thousands(l.places), l.patience())
	out.WriteString("## What the good client gets\n\nMedian and 99th percentile, ms, and the 99th percentile at Sallyport to that there, and beside.\n")
	for _, of := range []struct {
		what string
		take func(loadSaid) taken
	}{
		{"a new connection with a request", func(s loadSaid) taken { return s.New }},
		{"a request on the connection that stands", func(s loadSaid) taken { return s.Live }},
	} {
		fmt.Fprintf(&out, "\n| attackers: %s | there | beside | at Sallyport | to there | to beside | aim | failed |\n| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: |\n", of.what)
		goodRow(&out, "none (quiet)", taken{}, taken{}, of.take(l.quiet))
		for _, f := range l.faced {
			goodRow(&out, f.name, of.take(f.bare), of.take(f.beside), of.take(f.during))
		}
		goodRow(&out, "none any more", taken{}, taken{}, of.take(l.after))
	}
	fmt.Fprintf(&out, "\n## What attackers get\n\nThe proxy has %.0f MiB in memory (Pss) before the first attack, and %d descriptors; after each attack it has those descriptors again, and after the last one\n"+
		"the goroutines of a fresh one. Counted are connections; REQUEST_LIMIT and BAD_REQUEST count requests.\n\n", l.rest/1024, l.restFiles)
	out.WriteString("| attackers | connections | a second | MiB at the end | KiB each | MiB after | by reason |\n| --- | ---: | ---: | ---: | ---: | ---: | --- |\n")
	for _, f := range l.faced {
		fmt.Fprintf(&out, "| %s | %s | %s | %.0f | %s | %.0f | %s |\n", f.name, thousands(int(f.attack.Connected)),
			digits(float64(f.attack.Connected)/f.took.Seconds()), f.memory/1024, digits((f.memory-l.rest)/float64(f.n)), f.left/1024, reasonsText(f.reasons))
	}
	return out.String()
}

func goodRow(out *strings.Builder, name string, bare, beside, during taken) {
	fmt.Fprintf(out, "| %s | %s | %s | %s | %s | %s | %s | %d |\n", name, takenText(bare), takenText(beside), takenText(during),
		tailRatio(bare, during), tailRatio(beside, during), aimText(name, bare, during), during.Failed)
}

func aimText(name string, bare, during taken) string {
	switch {
	case bare.P99 == 0:
		return "-"
	case name == pastPlaces:
		return "none: past a limit"
	case during.P99 > 2*bare.P99:
		return "missed"
	}
	return "met"
}

func takenText(t taken) string {
	if t.Done == 0 {
		return "-"
	}
	ms := func(d time.Duration) string { return digits(float64(d) / 1e6) }
	return ms(t.P50) + ", " + ms(t.P99)
}

func tailRatio(beside, during taken) string {
	if beside.P99 == 0 {
		return "-"
	}
	return fmt.Sprintf("%.2f", float64(during.P99)/float64(beside.P99))
}

func reasonsText(reasons map[string]uint64) string {
	var all []string
	for _, reason := range slices.Sorted(maps.Keys(reasons)) {
		all = append(all, fmt.Sprintf("%s %s", reason, thousands(int(reasons[reason]))))
	}
	return strings.Join(all, ", ")
}
