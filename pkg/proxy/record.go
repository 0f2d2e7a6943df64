package proxy

import (
	"strings"
	"time"
	"unicode"

	"golang.org/x/sys/unix"
)

const maxDetail = 300 // bytes

// oneLine takes control characters out of a text, which may quote the client, and cuts it.
func oneLine(s string) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case unicode.IsControl(r), r == unicode.ReplacementChar:
			return -1
		}
		return r
	}, s)
	if len(s) > maxDetail {
		s = strings.ToValidUTF8(s[:maxDetail], "")
	}
	return s
}

// bootTime reads CLOCK_BOOTTIME.
func bootTime() time.Duration {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) != nil {
		return 0 // only on a kernel without the clock
	}
	return time.Duration(ts.Nano())
}
