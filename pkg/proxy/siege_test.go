package proxy

import (
	"slices"
	"testing"
	"time"
)

// TestSiege: it begins with many strangers, goes on as long as there are not few, and ends when there were few for a while.
func TestSiege(t *testing.T) {
	var told []bool
	s := siege{tell: func(on bool) { told = append(told, on) }}
	now := time.Now()
	for _, look := range []struct {
		after     time.Duration
		strangers int
		want      []bool
	}{
		{0, siegeBegins - 1, nil},
		{0, siegeBegins, []bool{true}},
		{0, 0, []bool{true}},
		{siegeCalm - 1, siegeEnds + 1, []bool{true}},
		{siegeCalm - 1, siegeEnds, []bool{true}},
		{1, siegeEnds, []bool{true, false}},
		{time.Hour, siegeEnds + 1, []bool{true, false}},
		{0, siegeBegins, []bool{true, false, true}},
	} {
		now = now.Add(look.after)
		s.look(look.strangers, now)
		if !slices.Equal(told, look.want) {
			t.Fatalf("%d strangers, %v later: told %v, want %v", look.strangers, look.after, told, look.want)
		}
	}
}
