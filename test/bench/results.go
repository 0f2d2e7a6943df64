package main

import (
	"fmt"
	"slices"
)

// series is one measured quantity: a value for each round, or for each event.
type series struct {
	Group  string    `json:"group"`
	Name   string    `json:"name"`
	Unit   string    `json:"unit"`
	Values []float64 `json:"values"`
}

// results are all series of a run, in the order in which they were first measured, and what was left out.
type results struct {
	Machine machine   `json:"machine"`
	Rounds  int       `json:"rounds"`
	Series  []*series `json:"series"`
	Notes   []string  `json:"notes"`
}

func newResults(p plan) *results {
	return &results{Machine: thisMachine(), Rounds: p.rounds}
}

// add appends values to a series.
func (r *results) add(group, name, unit string, values ...float64) {
	s := r.find(group, name)
	if s == nil {
		s = &series{Group: group, Name: name, Unit: unit}
		r.Series = append(r.Series, s)
	}
	s.Values = append(s.Values, values...)
}

// note tells, once, what could not be measured and why.
func (r *results) note(format string, args ...any) {
	if line := fmt.Sprintf(format, args...); !slices.Contains(r.Notes, line) {
		fmt.Println("bench: note:", line)
		r.Notes = append(r.Notes, line)
	}
}

// find gives the series, or nil.
func (r *results) find(group, name string) *series {
	i := slices.IndexFunc(r.Series, func(s *series) bool { return s.Group == group && s.Name == name })
	if i < 0 {
		return nil
	}
	return r.Series[i]
}

// spread is a median with the quartiles around it, and the ends.
type spread struct {
	Median, Low, High, Min, Max float64
	N                           int
}

func spreadOf(values []float64) spread {
	return spread{Median: quantile(values, 0.5), Low: quantile(values, 0.25), High: quantile(values, 0.75),
		Min: quantile(values, 0), Max: quantile(values, 1), N: len(values)}
}

// quantile interpolates between the two values that are nearest. No values give 0.
func quantile(values []float64, q float64) float64 {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	at := q * float64(len(sorted)-1)
	low := int(at)
	if low+1 == len(sorted) {
		return sorted[low]
	}
	return sorted[low] + (at-float64(low))*(sorted[low+1]-sorted[low])
}

// ratios divides round by round: what disturbed the machine in a round disturbed both.
func ratios(a, b *series) []float64 {
	if a == nil || b == nil {
		return nil
	}
	var out []float64
	for i := range min(len(a.Values), len(b.Values)) {
		if b.Values[i] != 0 {
			out = append(out, a.Values[i]/b.Values[i])
		}
	}
	return out
}

// less subtracts round by round.
func less(a, b *series) *series {
	if a == nil || b == nil {
		return nil
	}
	out := &series{Group: a.Group, Name: a.Name, Unit: a.Unit}
	for i := range min(len(a.Values), len(b.Values)) {
		out.Values = append(out.Values, a.Values[i]-b.Values[i])
	}
	return out
}
