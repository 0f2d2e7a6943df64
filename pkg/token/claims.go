package token

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Bounds of what claims may say.
const (
	maxName      = 255 // bytes of a subject or a group, as OpenID Connect has it
	maxGroups    = 1024
	maxAudiences = 64
	endOfTime    = 253402300799 // of the year 9999
)

// claims of a token whose signature was verified.
type claims map[string]any

// audience holds that the token is for one of those wanted.
func (c claims) audience(wanted []string) error {
	list, err := c.list("aud", maxAudiences)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(list, func(a string) bool { return a != "" && slices.Contains(wanted, a) }) {
		return fmt.Errorf("%w: audience %s is none of %q", ErrNotTaken, quote(strings.Join(list, " ")), wanted)
	}
	return nil
}

// period holds that now is within the token's time, and gives the end of it, both with skew. A token that does not end
// never counts.
func (c claims) period(now time.Time, skew time.Duration) (end time.Time, err error) {
	end, there, err := c.time("exp")
	if err != nil {
		return end, err
	}
	if !there {
		return end, fmt.Errorf("%w: has no exp", ErrMalformed)
	}
	if end = end.Add(skew); !now.Before(end) {
		return end, fmt.Errorf("%w: expired at %s, and here it is %s", ErrTime, clock(end.Add(-skew)), clock(now))
	}
	for _, name := range []string{"nbf", "iat"} {
		from, there, err := c.time(name)
		if err != nil {
			return end, err
		}
		if there && now.Before(from.Add(-skew)) {
			return end, fmt.Errorf("%w: does not count before %s (%s), and here it is %s", ErrTime, clock(from), name, clock(now))
		}
	}
	return end, nil
}

// clock is a time as people compare it: the node's own may be wrong.
func clock(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func (c claims) time(name string) (at time.Time, there bool, err error) {
	value, there := c[name]
	if !there {
		return at, false, nil
	}
	seconds, ok := value.(float64)
	if !ok || seconds < 0 || seconds > endOfTime {
		return at, true, fmt.Errorf("%w: %s is no time", ErrMalformed, name)
	}
	whole, part := math.Modf(seconds)
	return time.Unix(int64(whole), int64(part*1e9)), true, nil
}

// name is a claim that names somebody.
func (c claims) name(claim string) (string, error) {
	s, ok := c[claim].(string)
	if !ok {
		return "", fmt.Errorf("%w: %s is no text", ErrMalformed, claim)
	}
	return s, checkName(claim, s)
}

// groups is one name or a list of them. None is no error.
func (c claims) groups(claim string) ([]string, error) {
	if c[claim] == nil {
		return nil, nil
	}
	list, err := c.list(claim, maxGroups)
	if err != nil {
		return nil, err
	}
	for _, g := range list {
		if err := checkName(claim, g); err != nil {
			return nil, err
		}
	}
	return list, nil
}

// list is a claim that may be one text or several.
func (c claims) list(name string, most int) ([]string, error) {
	switch value := c[name].(type) {
	case string:
		return []string{value}, nil
	case []any:
		if len(value) > most {
			return nil, fmt.Errorf("%w: %s has more than %d entries", ErrMalformed, name, most)
		}
		list := make([]string, len(value))
		for i, v := range value {
			var ok bool
			if list[i], ok = v.(string); !ok {
				return nil, fmt.Errorf("%w: %s[%d] is no text", ErrMalformed, name, i)
			}
		}
		return list, nil
	}
	return nil, fmt.Errorf("%w: %s is neither text nor a list of it", ErrMalformed, name)
}

// checkName refuses what could not be told apart, or would change the line that it is shown in. A lone half of a surrogate
// pair reads as U+FFFD, like every other.
func checkName(claim, s string) error {
	if s == "" || len(s) > maxName {
		return fmt.Errorf("%w: %s has %d bytes, must have 1 to %d", ErrMalformed, claim, len(s), maxName)
	}
	odd := func(r rune) bool { return r == utf8.RuneError || !unicode.IsPrint(r) }
	if strings.IndexFunc(s, odd) >= 0 {
		return fmt.Errorf("%w: %s has characters that cannot be printed", ErrMalformed, claim)
	}
	return nil
}
