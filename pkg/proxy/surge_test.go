package proxy

import (
	"slices"
	"testing"
	"time"
)

// TestSurge: it begins with many, goes on as long as there are not few, and ends when there were few for a while.
func TestSurge(t *testing.T) {
	var told []bool
	s := newSiege(func(on bool) { told = append(told, on) })
	now := time.Now()
	for _, look := range []struct {
		after time.Duration
		n     int
		want  []bool
	}{
		{0, s.begins - 1, nil},
		{0, s.begins, []bool{true}},
		{0, 0, []bool{true}},
		{surgeCalm - 1, s.ends + 1, []bool{true}},
		{surgeCalm - 1, s.ends, []bool{true}},
		{1, s.ends, []bool{true, false}},
		{time.Hour, s.ends + 1, []bool{true, false}},
		{0, s.begins, []bool{true, false, true}},
	} {
		now = now.Add(look.after)
		s.look(look.n, now)
		if !slices.Equal(told, look.want) {
			t.Fatalf("%d of them, %v later: told %v, want %v", look.n, look.after, told, look.want)
		}
	}
}
