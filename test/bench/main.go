// Command bench measures the datapath: nanoseconds of a packet in the programs, traffic in namespaces beside that of
// iptables and nftables, how paths end, and what the agent weighs. It writes tables, a plot and its data.
//
// It is one binary in several roles: it starts itself again as service, client and copy proxy.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		stop()
		os.Exit(1)
	}
}

// roles are what a process of the benchmark can be, by its first argument.
var roles = map[string]func(context.Context, []string) error{
	"service": serviceRole, "load": loadRole, "proxy": proxyRole,
}

func run(ctx context.Context, args []string) error {
	if len(args) > 0 {
		if role, ok := roles[args[0]]; ok {
			return role(ctx, args[1:])
		}
	}
	p, err := readPlan(args)
	if err != nil {
		return err
	}
	r, err := measure(ctx, p)
	return errors.Join(err, r.write(p))
}

func readPlan(args []string) (plan, error) {
	var p plan
	var parts string
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.IntVar(&p.rounds, "rounds", 9, "rounds of every measurement; 1 is a short run that shows that everything works")
	f.StringVar(&p.bin, "bin", "bin", "where the built programs are")
	f.StringVar(&p.out, "out", "bench-out", "folder for tables, plot and data")
	f.StringVar(&p.publish, "publish", "", "folder to write bench-datapath.md and .svg to, as well")
	f.StringVar(&parts, "parts", strings.Join(partNames(), ","), "what to measure")
	if err := f.Parse(args); err != nil {
		return p, err
	}
	p.parts = strings.Split(parts, ",")
	return p, p.check(f.Args())
}
