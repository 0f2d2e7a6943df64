package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"
)

// plan is what one run measures, and how long.
type plan struct {
	rounds  int
	parts   []string
	bin     string
	out     string
	publish string
}

// short says whether the run is only to show that everything works.
func (p plan) short() bool { return p.rounds == 1 }

// pick takes the first value in a full run, the second in a short one.
func pick[T any](p plan, full, short T) T {
	if p.short() {
		return short
	}
	return full
}

func (p plan) check(rest []string) error {
	if len(rest) > 0 {
		return fmt.Errorf("read arguments: %q is none", rest[0])
	}
	if p.rounds < 1 {
		return fmt.Errorf("read arguments: %d rounds, want at least 1", p.rounds)
	}
	for _, name := range p.parts {
		if !slices.Contains(partNames(), name) {
			return fmt.Errorf("read arguments: no part %q; there are %v", name, partNames())
		}
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("needs root: network namespaces and BPF programs")
	}
	return nil
}

// part is one section of the run, in a world of its own.
type part struct {
	name string
	do   func(context.Context, plan, *results) error
}

func allParts() []part {
	return []part{
		{"packets", measurePackets},
		{"traffic", measureTraffic},
		{"scale", measureScale},
		{"ends", measureEnds},
		{"agent", measureAgent},
	}
}

func partNames() []string {
	var names []string
	for _, p := range allParts() {
		names = append(names, p.name)
	}
	return names
}

// measure runs the parts of the plan, one after the other. What was measured counts although a part failed.
func measure(ctx context.Context, p plan) (*results, error) {
	r := newResults(p)
	var errs []error
	for _, part := range allParts() {
		if !slices.Contains(p.parts, part.name) {
			continue
		}
		began := time.Now()
		fmt.Printf("bench: %s\n", part.name)
		if err := part.do(ctx, p, r); err != nil {
			r.note("%s is not complete: %v", part.name, err)
			errs = append(errs, fmt.Errorf("measure %s: %w", part.name, err))
		}
		fmt.Printf("bench: %s took %v\n", part.name, time.Since(began).Round(100*time.Millisecond))
	}
	return r, errors.Join(errs...)
}
