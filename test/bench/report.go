package main

import (
	"fmt"
)

func (r *results) write(p plan) error {
	for _, s := range r.Series {
		sp := spreadOf(s.Values)
		fmt.Printf("%-40s %-45s %10.2f [%.2f %.2f] %s n=%d\n", s.Group, s.Name, sp.Median, sp.Low, sp.High, s.Unit, sp.N)
	}
	return nil
}
