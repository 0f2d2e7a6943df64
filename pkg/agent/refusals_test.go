package agent

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
)

// TestRefusalsAreCounted: one record at once, one for all that follow within a minute, and none once it is quiet. Others who
// are refused have records of their own.
func TestRefusalsAreCounted(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	defer l.kill()
	wrong := func(actor string, n int) {
		t.Helper()
		for i := range n {
			envelope := b.signer.envelope(t, func(p *grant.Payload) { p.Reason = fmt.Sprint("attempt ", i); p.Duration = time.Hour })
			if _, err := l.Activate(t.Context(), envelope, actor); err == nil {
				t.Fatal("activated")
			}
		}
	}
	check := func(when string, want ...string) {
		t.Helper()
		must(t, l.tellRefusals(t.Context(), refusalsTold))
		var got []string
		for _, e := range l.storedEvents() {
			if why := e.GetWhy(); contains(why, " more within 1m, the last: ") {
				got = append(got, fmt.Sprint(e.GetActor(), ": ", why[:2]))
			} else {
				got = append(got, e.GetActor())
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", when, got, want)
		}
	}
	wrong("uid:1000", 30)
	wrong("uid:0", 1)
	check("within the minute", "uid:1000", "uid:0")
	b.clock.boot += refusalsTold
	check("after it", "uid:1000", "uid:0", "uid:1000: 29")
	b.clock.boot += refusalsTold
	check("when it is quiet", "uid:1000", "uid:0", "uid:1000: 29")
	wrong("uid:1000", 1)
	check("again", "uid:1000", "uid:0", "uid:1000: 29", "uid:1000")
	if n := len(l.refused); n != 1 {
		t.Errorf("%d identities are remembered", n)
	}
}

// TestRefusalsApart: a grant that breaks the glass is counted for itself, others for their service, and what was only counted is
// recorded at an orderly stop.
func TestRefusalsApart(t *testing.T) {
	b, c := crewed(t)
	l := b.begin()
	defer l.kill()
	tooLong := func(change func(*grant.Payload)) []byte {
		return b.asked(c, "alice bob carol", func(p *grant.Payload) {
			p.Duration = time.Hour
			change(p)
		})
	}
	first, second := tooLong(breakGlass), tooLong(breakGlass)
	envelopes := [][]byte{first, second, first, second}
	for _, service := range []string{"postgres", "unheard", "of"} {
		envelopes = append(envelopes, tooLong(func(p *grant.Payload) { p.Service = service }))
	}
	envelopes = append(envelopes, second)
	for _, envelope := range envelopes {
		if _, err := l.Activate(t.Context(), envelope, "uid:0"); err == nil {
			t.Fatal("activated")
		}
	}
	must(t, l.tellRefusals(t.Context(), 0))
	have := make(map[string]int)
	for _, e := range l.storedEvents() {
		what, more, _ := strings.Cut(e.GetWhy(), " more within")
		if more == "" {
			what = "at once"
		}
		have[fmt.Sprint(cmp.Or(e.GetKind(), "grant"), " of ", e.GetService(), ": ", what)]++
	}
	want := map[string]int{
		"breakGlass of postgres: at once": 2, "breakGlass of postgres: 1": 1, "breakGlass of postgres: 2": 1,
		"grant of postgres: at once": 1, "grant of unheard: at once": 1, "grant of of: 1": 1,
	}
	if !maps.Equal(have, want) {
		t.Errorf("recorded %v, want %v", have, want)
	}
}
