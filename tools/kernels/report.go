package main

import (
	"fmt"
	"regexp"
	"strings"
	"time"
)

// report is what came of one suite in one kernel.
type report struct {
	Passed  int
	Failed  []test
	Skipped []test
	Took    time.Duration // in the guest
	Error   string        // of the run as a whole
	Tail    string        // the last words, when there is an error
}

// test is one that did not pass, with what it said.
type test struct{ Name, Said string }

// tailLines is how much of a run is shown that ended before its tests did.
const tailLines = 30

var verdict = regexp.MustCompile(`^\s*--- (PASS|FAIL|SKIP): (\S+) `)

// parse reads the output of a test program with -test.v. A test that only failed because of a part
// of it is not counted on top of that part.
func parse(text string) (r report) {
	lines := strings.Split(text, "\n")
	said := map[string][]string{}
	current := ""
	for _, line := range lines {
		if name, ok := running(line); ok {
			current = name
			continue
		}
		m := verdict.FindStringSubmatch(line)
		if m == nil {
			said[current] = append(said[current], line)
			continue
		}
		current = "" // tests speak before their verdict
		switch m[1] {
		case "PASS":
			r.Passed++
		case "FAIL":
			r.Failed = append(r.Failed, test{Name: m[2]})
		case "SKIP":
			r.Skipped = append(r.Skipped, test{Name: m[2]})
		}
	}
	for _, list := range [][]test{r.Failed, r.Skipped} {
		for i := range list {
			list[i].Said = strings.TrimSpace(strings.Join(said[list[i].Name], "\n"))
		}
	}
	if !strings.HasSuffix(strings.TrimSpace(text), "PASS") {
		r.Tail = strings.Join(lines[max(0, len(lines)-tailLines):], "\n")
	}
	return r
}

// running recognises the lines that say which test speaks next.
func running(line string) (name string, ok bool) {
	for _, p := range []string{"=== RUN ", "=== CONT ", "=== NAME ", "=== PAUSE "} {
		if rest, ok := strings.CutPrefix(line, p); ok {
			return strings.TrimSpace(rest), true
		}
	}
	return "", false
}

func (r report) passed() bool { return r.Error == "" && len(r.Failed) == 0 }

// print writes the one line, and what explains it.
func (r report) print(kernel string, s suite) {
	word := "ok  "
	if !r.passed() {
		word = "FAIL"
	}
	fmt.Printf("%s %-28s %-14s %4d passed %3d failed %3d skipped %8v\n",
		word, kernel, s.pkg, r.Passed, len(r.Failed), len(r.Skipped), r.Took.Round(100*time.Millisecond))
	for _, t := range r.Skipped {
		fmt.Printf("     skipped %s: %s\n", t.Name, oneLine(t.Said))
	}
	for _, t := range r.Failed {
		fmt.Printf("     failed %s\n%s\n", t.Name, indent(t.Said))
	}
	if r.Error != "" && len(r.Failed) == 0 {
		fmt.Printf("     %s\n%s\n", r.Error, indent(r.Tail))
	}
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

func indent(s string) string { return "       " + strings.ReplaceAll(s, "\n", "\n       ") }
