package policy_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// conditioned is the good set with more in its policy.
func conditioned(t *testing.T, more string) *policy.Set {
	t.Helper()
	return mustParse(t, strings.Replace(good, "  ticket: {required: false}\n", more+"\n", 1))
}

func at(t *testing.T, text string) time.Time {
	t.Helper()
	v, err := time.Parse(time.RFC3339, text)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// TestWindows: a grant is activated in a window, and ends with it.
func TestWindows(t *testing.T) {
	const (
		night  = `  windows: [{from: "22:00", to: "06:00"}]`
		monday = `  windows: [{days: [Mon], from: "22:00", to: "06:00"}]`
		day    = `  windows: [{days: [Mon, Tue], from: "00:00", to: "24:00"}]`
		berlin = `  windows: [{from: "09:00", to: "17:00", timezone: Europe/Berlin}]`
		two    = `  windows: [{from: "08:00", to: "10:00"}, {from: "09:00", to: "12:00"}]`
		ends   = `  notAfter: 2026-11-23T09:30:00Z`
		spring = `  windows: [{from: "01:00", to: "04:00", timezone: Europe/Berlin}]`
	)
	for _, c := range []struct {
		rule, now string
		until     string // empty: refused
	}{
		{night, "2026-11-23T21:59:59Z", ""}, {night, "2026-11-23T22:00:00Z", "2026-11-24T06:00:00Z"},
		{night, "2026-11-23T05:59:59Z", "2026-11-23T06:00:00Z"}, {night, "2026-11-23T06:00:00Z", ""},
		{monday, "2026-11-23T23:00:00Z", "2026-11-24T06:00:00Z"}, // a Monday
		{monday, "2026-11-24T05:00:00Z", "2026-11-24T06:00:00Z"}, // begun on it
		{monday, "2026-11-23T05:00:00Z", ""}, {monday, "2026-11-24T23:00:00Z", ""},
		{day, "2026-11-23T00:00:00Z", "2026-11-24T00:00:00Z"}, {day, "2026-11-24T23:59:59Z", "2026-11-25T00:00:00Z"},
		{day, "2026-11-25T00:00:00Z", ""}, {day, "2026-11-22T23:59:59Z", ""},
		{berlin, "2026-11-23T08:00:00Z", "2026-11-23T16:00:00Z"}, {berlin, "2026-07-23T07:00:00Z", "2026-07-23T15:00:00Z"},
		{berlin, "2026-11-23T07:59:59Z", ""}, {berlin, "2026-07-23T15:00:00Z", ""},
		{two, "2026-11-23T09:30:00Z", "2026-11-23T12:00:00Z"}, {two, "2026-11-23T08:30:00Z", "2026-11-23T10:00:00Z"},
		{ends, "2026-11-23T09:29:59Z", "2026-11-23T09:30:00Z"}, {ends, "2026-11-23T09:30:00Z", ""},
		{ends + "\n" + two, "2026-11-23T09:00:00Z", "2026-11-23T09:30:00Z"},
		{spring, "2026-03-29T00:30:00Z", "2026-03-29T02:00:00Z"}, // two hours long that night
	} {
		facts := goodFacts()
		facts.Now = at(t, c.now)
		got, err := conditioned(t, c.rule).CheckGrant(facts)
		switch {
		case c.until == "" && !errors.Is(err, policy.ErrRefused):
			t.Errorf("%s at %s: %+v, %v, want a refusal", c.rule, c.now, got, err)
		case c.until != "" && (err != nil || !got.Until.Equal(at(t, c.until))):
			t.Errorf("%s at %s: until %v, %v, want %s", c.rule, c.now, got.Until, err, c.until)
		}
		facts.Now = time.Time{}
		if got, err := conditioned(t, c.rule).CheckGrant(facts); err != nil || !got.Until.IsZero() {
			t.Errorf("%s at a time that nobody knows: %+v, %v", c.rule, got, err)
		}
	}
}

// TestLongestPolicyCounts: of several that allow a grant, the one that lets it last.
func TestLongestPolicyCounts(t *testing.T) {
	second := func(rule string) string {
		_, doc, _ := strings.Cut(good, "kind: BypassPolicy")
		doc, _, _ = strings.Cut(doc, "---")
		return good + "---\napiVersion: sallyport.dev/v1alpha1\nkind: BypassPolicy" + strings.NewReplacer("name: nightly-backup", "name: second",
			"  requesters: [alice]\n", "  requesters: [alice]\n"+rule+"\n").Replace(doc)
	}
	first := strings.Replace(good, "  requesters: [alice]\n", "  requesters: [alice]\n  notAfter: 2026-11-23T12:00:00Z\n", 1)
	for rule, want := range map[string]string{
		"  notAfter: 2026-11-23T11:00:00Z": "nightly-backup", "  notAfter: 2026-11-23T13:00:00Z": "second", "": "second", "  notAfter: 2026-11-22T13:00:00Z": "nightly-backup",
	} {
		text := strings.Replace(second(rule), good, first, 1)
		facts := goodFacts()
		facts.Now = at(t, "2026-11-23T09:00:00Z")
		if got, err := mustParse(t, text).CheckGrant(facts); err != nil || got.Policy != want {
			t.Errorf("beside one with %q: %+v, %v, want %s", rule, got, err, want)
		}
	}
}

func TestTicketPattern(t *testing.T) {
	s := conditioned(t, `  ticket: {pattern: "OPS-[0-9]+|INC[0-9]"}`)
	for ticket, allowed := range map[string]bool{"": true, "OPS-12": true, "INC7": true, "xOPS-12": false, "OPS-12x": false, "INC7\nINC8": false} {
		facts := goodFacts()
		facts.Ticket = ticket
		if _, err := s.CheckGrant(facts); (err == nil) != allowed {
			t.Errorf("ticket %q: %v", ticket, err)
		}
	}
}

// TestWhen: a condition is a refusal of its own, and one that cannot be worked out is none that is met.
func TestWhen(t *testing.T) {
	for when, allowed := range map[string]bool{
		`duration <= duration("15m")`:                        true,
		`duration < duration("15m")`:                         false,
		`service == "postgres" && 5432 in ports`:             true,
		`addresses.all(a, cidr("10.0.0.0/8").containsIP(a))`: false, // one is IPv6
		`addresses.exists(a, ip(a).family() == 6)`:           true,
		`requester == "alice" && size(approvers) == 0`:       true,
		`now.getHours("Europe/Berlin") == 10`:                true,
		`bytes == 0u`:                                        true,
		`reason.contains("backup") && ticket == ""`:          true,
		`ports[7] == 1`:                                      false,
		`[1, 2, 3, 4, 5, 6, 7, 8, 9].all(a, [1, 2, 3, 4, 5, 6, 7, 8, 9].all(b, [1, 2, 3, 4, 5, 6, 7, 8, 9].all(c, [1, 2, 3, 4, 5, 6, 7, 8, 9].all(d, a + b + c + d > 0))))`: false, // too dear
	} {
		facts := goodFacts()
		facts.Now = at(t, "2026-11-23T09:00:00Z")
		_, err := conditioned(t, "  when: '"+when+"'").CheckGrant(facts)
		if (err == nil) != allowed {
			t.Errorf("%s: %v", when, err)
		}
		if e := policy.Errors(err); !allowed && (len(e) != 1 || e[0].Field != "when" || e[0].Hint == "") {
			t.Errorf("%s: refused with %v", when, err)
		}
	}
}
