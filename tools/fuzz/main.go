// Command fuzz runs every fuzz target of the module, one after the other, in a given time in all.
package main

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"time"
)

// minimize is how often an input that found something is tried shorter. The default, a minute, takes more than a target has: the
// first long input would be its last.
const minimize = "100x"

// shortest is the least time that one target gets: below it the fuzzer hardly starts.
const shortest = 2 * time.Second

type target struct{ pkg, name string }

func main() {
	total := flag.Duration("total", time.Minute, "time for all targets together")
	flag.Parse()
	if err := run(*total); err != nil {
		fmt.Fprintln(os.Stderr, "fuzz:", err)
		os.Exit(1)
	}
}

func run(total time.Duration) error {
	out, err := output("go", "list", "./...")
	if err != nil {
		return err
	}
	var targets []target
	for pkg := range strings.Lines(out) {
		found, err := list(strings.TrimSpace(pkg))
		if err != nil {
			return err
		}
		targets = append(targets, found...)
	}
	if len(targets) == 0 {
		return fmt.Errorf("no fuzz target found")
	}
	each := max(shortest, total/time.Duration(len(targets)))
	for _, t := range targets {
		fmt.Printf("%s %s for %v\n", t.pkg, t.name, each.Round(time.Millisecond))
		cmd := exec.Command("go", "test", "-run", "^$", "-fuzz", "^"+t.name+"$", "-fuzztime", each.String(), "-fuzzminimizetime", minimize, t.pkg)
		var said bytes.Buffer
		cmd.Stdout, cmd.Stderr = io.MultiWriter(os.Stdout, &said), os.Stderr
		if err := cmd.Run(); err != nil && !isTimeUp(said.String()) {
			return fmt.Errorf("fuzz %s in %s: %w", t.name, t.pkg, err)
		}
	}
	return nil
}

// isTimeUp tells whether a target failed for nothing but the end of its time, which Go before 1.27 now and then takes for a failure (golang/go#75804).
// What fails for an input says so.
func isTimeUp(said string) bool {
	return timeUp.MatchString(said) && !strings.Contains(said, "Failing input written")
}

var timeUp = regexp.MustCompile(`(?m)^--- FAIL: \w+ \([0-9.]+s\)\n +context deadline exceeded\nFAIL$`)

// list finds the fuzz targets of one package.
func list(pkg string) ([]target, error) {
	out, err := output("go", "test", "-list", "^Fuzz", pkg)
	if err != nil {
		return nil, err
	}
	var found []target
	for s := bufio.NewScanner(strings.NewReader(out)); s.Scan(); {
		if strings.HasPrefix(s.Text(), "Fuzz") {
			found = append(found, target{pkg, s.Text()})
		}
	}
	return found, nil
}

func output(name string, args ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("run %s: %w\n%s%s", strings.Join(cmd.Args, " "), err, stdout.String(), stderr.String())
	}
	return stdout.String(), nil
}
