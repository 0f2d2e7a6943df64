// Command tests runs the tests through gotestsum and fails when one was skipped although the machine
// has what the tests need.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/features"
)

func main() {
	runner := flag.String("runner", "", "gotestsum, as package@version")
	flag.Parse()
	if err := run(*runner, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "tests:", err)
		os.Exit(1)
	}
}

func run(runner string, args []string) error {
	log, err := os.CreateTemp("", "sallyport-tests-*.json")
	if err != nil {
		return fmt.Errorf("create log: %w", err)
	}
	defer os.Remove(log.Name())
	defer log.Close()
	cmd := exec.Command("go", append([]string{"run", runner, "--format", "pkgname-and-test-fails", "--jsonfile", log.Name(), "--"}, args...)...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), atOnce(os.Getenv("GORACE")))
	if err := cmd.Run(); err != nil {
		return errors.New("the run failed")
	}
	skipped, err := skips(log)
	if err != nil || len(skipped) == 0 {
		return err
	}
	if why := lacking(); why != "" {
		fmt.Printf("tests: %d were skipped: this machine has no %s\n", len(skipped), why)
		return nil
	}
	return fmt.Errorf("skipped although root and BPF are at hand:\n  %s", strings.Join(skipped, "\n  "))
}

// atOnce is GORACE with one option more. A program with the race detector sleeps for a second before it ends, and the tests start
// thousands: each command of a story, each client of a benchmark, each agent that is stopped.
func atOnce(options string) string {
	return "GORACE=" + options + " atexit_sleep_ms=0"
}

// noKernel begins the reason of a skip that is allowed: the kernel at hand was built without what the test
// is about, and make test-kernels boots one that was not.
const noKernel = "this kernel has no "

// skips reads the tests that were skipped from go test's event stream, but for those that say noKernel.
func skips(log io.Reader) ([]string, error) {
	var found []string
	excused := map[string]bool{}
	for d := json.NewDecoder(log); ; {
		var e struct{ Action, Package, Test, Output string }
		if err := d.Decode(&e); errors.Is(err, io.EOF) {
			return found, nil
		} else if err != nil {
			return nil, fmt.Errorf("read log: %w", err)
		}
		name := e.Package + " " + e.Test
		switch {
		case strings.Contains(e.Output, noKernel):
			excused[name] = true
		case e.Action == "skip" && e.Test != "" && !excused[name]:
			found = append(found, name)
		}
	}
}

// tcx is the first kernel with tcx links, as features.LinuxVersionCode counts.
const tcx = 6<<16 | 6<<8

// lacking says what the machine has not got that tests need, or nothing.
func lacking() string {
	if os.Geteuid() != 0 {
		return "root"
	}
	if err := features.HaveProgramType(ebpf.SchedCLS); err != nil {
		return fmt.Sprintf("BPF: %v", err)
	}
	if v, err := features.LinuxVersionCode(); err != nil || v < tcx {
		return "a kernel with tcx links (6.6)"
	}
	return ""
}
