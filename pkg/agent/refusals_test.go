package agent

import (
	"fmt"
	"slices"
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
		must(t, l.tellRefusals(t.Context()))
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
