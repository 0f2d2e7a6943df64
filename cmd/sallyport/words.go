package main

import (
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// clock is how times are shown to people: UTC, to the millisecond.
const clock = "2006-01-02T15:04:05.000Z"

func stamp(t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	return t.AsTime().Format(clock)
}

func span(d *durationpb.Duration) string {
	if d == nil {
		return ""
	}
	return d.AsDuration().Round(time.Millisecond).String()
}

// volume shows bytes and, where they are counted, packets.
func volume(bytes, packets uint64) string {
	if packets == 0 {
		return fmt.Sprintf("%d B", bytes)
	}
	return fmt.Sprintf("%d B/%d", bytes, packets)
}

func plural[T ~int | ~uint64](n T, noun string) string {
	if n == 1 {
		return fmt.Sprintf("%d %s", n, noun)
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

func choose(is bool, yes, no string) string {
	if is {
		return yes
	}
	return no
}

func number[T ~uint32 | ~uint64](n T) string { return fmt.Sprint(n) }

func either(first, second string) string {
	if first != "" {
		return first
	}
	return second
}
