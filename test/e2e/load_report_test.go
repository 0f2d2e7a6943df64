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
belongs to it. Attackers come from %s addresses beside it, and from the same machine: what they need of its cores is missing to everybody. So what the good
client gets is held against the same attack at a listener that is not Sallyport's (the bare forwarder of ` + "`make bench-proxy`" + `), while the good client itself
comes through Sallyport: "beside". The aim is at most twice of that at the 99th percentile. "Quiet" has no attackers at all. Attackers whose connection ends make
another one at once. The proxy has %s places, and waits %v for a handshake and for a header.

`

func (l *siege) markdown() string {
	var out strings.Builder
	fmt.Fprintf(&out, loadText, thousands(l.n), runtime.NumCPU(), processor(), kernelRelease(), l.load, goodNew, requestSize, goodLive,
		thousands(l.sources), thousands(l.places()), l.patience())
	out.WriteString("## What the good client gets\n\nMedian and 99th percentile, ms, of a new connection with a request, and of a request on the one that stands.\n\n" +
		"| attackers | new: beside | new: at Sallyport | p99, ratio | request: beside | request: at Sallyport | p99, ratio | failed |\n" +
		"| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n")
	l.goodRow(&out, "none (quiet)", loadSaid{}, l.quiet)
	for _, f := range l.faced {
		l.goodRow(&out, f.name, f.beside, f.during)
	}
	l.goodRow(&out, "none any more", loadSaid{}, l.after)
	fmt.Fprintf(&out, "\n## What attackers get\n\nThe proxy has %.0f MiB in memory (Pss) before the first attack, and %d descriptors; after each attack it has those descriptors again, and after the last one\n"+
		"the goroutines of a fresh one. Counted are connections; REQUEST_LIMIT and BAD_REQUEST count requests.\n\n", l.rest/1024, l.restFiles)
	out.WriteString("| attackers | connections | a second | MiB at the end | KiB each | MiB after | by reason |\n| --- | ---: | ---: | ---: | ---: | ---: | --- |\n")
	for _, f := range l.faced {
		fmt.Fprintf(&out, "| %s | %s | %s | %.0f | %s | %.0f | %s |\n", f.name, thousands(int(f.attack.Connected)),
			digits(float64(f.attack.Connected)/f.took.Seconds()), f.memory/1024, digits((f.memory-l.rest)/float64(f.n)), f.left/1024, reasonsText(f.reasons))
	}
	return out.String()
}

func (l *siege) goodRow(out *strings.Builder, name string, beside, during loadSaid) {
	fmt.Fprintf(out, "| %s | %s | %s | %s | %s | %s | %s | %d |\n", name,
		takenText(beside.New), takenText(during.New), tailRatio(beside.New, during.New),
		takenText(beside.Live), takenText(during.Live), tailRatio(beside.Live, during.Live),
		during.New.Failed+during.Live.Failed)
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
