package policy

import (
	"maps"
	"slices"
	"strings"
)

// suggest names the known key that is nearest to a wrong one, or all of them.
func suggest[V any](wrong string, known map[string]V) string {
	keys := slices.Sorted(maps.Keys(known))
	best, distance := "", 3
	for _, k := range keys {
		if n := editDistance(strings.ToLower(wrong), strings.ToLower(k)); n < distance {
			best, distance = k, n
		}
	}
	if best != "" {
		return "did you mean " + best + "?"
	}
	return "known here: " + strings.Join(keys, ", ")
}

// editDistance counts the single-character edits between a and b. It gives up on long input.
func editDistance(a, b string) int {
	const long = 64
	if len(a) > long || len(b) > long {
		return long
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(row[j]+1, row[j+1]+1, diagonal+cost)
		}
	}
	return row[len(b)]
}
