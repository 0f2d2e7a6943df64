// Command kernels boots kernels that Debian ships under QEMU, in software emulation, and runs the
// suites in each that depend on what a kernel does. It prints a line for each kernel and suite, and
// fails when one of them does.
//
// The program is its own guest: as process 1 of the machine it boots it mounts, loads modules, runs
// the suite and writes the report to the second serial port.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// options are what the command line says.
type options struct {
	kernels, suites string
	run             string // replaces the suite's own choice of tests
	cache           string
	refresh, long   bool
	console         bool
}

func main() {
	if os.Getpid() == 1 {
		boot() // does not return
	}
	if len(os.Args) > 1 && os.Args[1] == suiteCommand {
		os.Exit(runSuite())
	}
	var o options
	flag.StringVar(&o.kernels, "kernels", "", "comma-separated names; empty means "+names(kernels))
	flag.StringVar(&o.suites, "suites", "", "comma-separated names; empty means "+names(suites))
	flag.StringVar(&o.run, "run", "", "run the tests that match, instead of the suite's own choice")
	flag.StringVar(&o.cache, "cache", "", "folder of the kernels; empty means one in the user's cache")
	flag.BoolVar(&o.refresh, "refresh", false, "ask Debian for newer kernels than the cached ones")
	flag.BoolVar(&o.long, "long", false, "run the suites whole, without the cut that fits in the time of a change")
	flag.BoolVar(&o.console, "console", false, "show the console of the guests")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "kernels:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) error {
	chosen, err := choose(kernels, o.kernels)
	if err != nil {
		return err
	}
	which, err := choose(suites, o.suites)
	if err != nil {
		return err
	}
	if o.cache == "" {
		base, err := os.UserCacheDir()
		if err != nil {
			return fmt.Errorf("find cache: %w (say -cache)", err)
		}
		o.cache = filepath.Join(base, "sallyport", "kernels")
	}
	work, err := os.MkdirTemp("", "sallyport-kernels-")
	if err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	defer os.RemoveAll(work)
	began := time.Now()
	builds, err := buildAll(ctx, work, which)
	if err != nil {
		return err
	}
	failed := 0
	for _, k := range chosen {
		n, err := runKernel(ctx, o, k, builds)
		if err != nil {
			return fmt.Errorf("kernel %s: %w", k.Name(), err)
		}
		failed += n
	}
	fmt.Printf("%d kernels, %d suites each, in %v\n", len(chosen), len(which), time.Since(began).Round(time.Second))
	if failed > 0 {
		return fmt.Errorf("%d failed", failed)
	}
	return nil
}

// runKernel runs the suites in one kernel and returns how many failed.
func runKernel(ctx context.Context, o options, k kernel, builds []build) (failed int, err error) {
	tree, err := k.fetch(ctx, o.cache, o.refresh)
	if err != nil {
		return 0, err
	}
	mods, err := tree.modules(ctx)
	if err != nil {
		return 0, err
	}
	for _, b := range builds {
		if ctx.Err() != nil {
			return failed, ctx.Err()
		}
		r := b.boot(ctx, o, tree, mods)
		r.print(tree.version, b.suite)
		if !r.passed() {
			failed++
		}
	}
	return failed, nil
}

// named is a kernel or a suite.
type named interface{ Name() string }

func names[T named](all []T) string {
	var s []string
	for _, v := range all {
		s = append(s, v.Name())
	}
	return strings.Join(s, ",")
}

// choose picks by name, in the order of all.
func choose[T named](all []T, list string) ([]T, error) {
	if list == "" {
		return all, nil
	}
	wanted := strings.Split(list, ",")
	var chosen []T
	for _, v := range all {
		if i := slices.Index(wanted, v.Name()); i >= 0 {
			chosen, wanted = append(chosen, v), slices.Delete(wanted, i, i+1)
		}
	}
	if len(wanted) > 0 {
		return nil, errors.New("unknown: " + strings.Join(wanted, ", ") + "; there are " + names(all))
	}
	return chosen, nil
}
