package flow

import (
	"fmt"
	"maps"
	"slices"
)

// String gives the enum's name as in C, without its prefix: "PROXIED".
func (v Verdict) String() string { return name(v, verdictNames) }

// String gives the enum's name as in C, without its prefix: "NO_TLS".
func (r Reason) String() string { return name(r, reasonNames) }

// String gives the enum's name as in C, without its prefix: "OPEN".
func (e Event) String() string { return name(e, eventNames) }

// Reasons lists every reason, in ascending order of its number.
func Reasons() []Reason { return slices.Sorted(maps.Keys(reasonNames)) }

// ParseVerdict finds a verdict by its name.
func ParseVerdict(s string) (Verdict, error) { return parse("verdict", s, verdictNames) }

// ParseReason finds a reason by its name.
func ParseReason(s string) (Reason, error) { return parse("reason", s, reasonNames) }

// ParseEvent finds an event by its name.
func ParseEvent(s string) (Event, error) { return parse("event", s, eventNames) }

func name[T ~uint32](v T, names map[T]string) string {
	if s, ok := names[v]; ok {
		return s
	}
	return fmt.Sprintf("%d", uint32(v))
}

func parse[T ~uint32](kind, s string, names map[T]string) (T, error) {
	for v, n := range names {
		if n == s {
			return v, nil
		}
	}
	return 0, fmt.Errorf("unknown %s %q", kind, s)
}
