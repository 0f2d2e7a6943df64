package agent

import (
	"reflect"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/sallyport-dev/sallyport/pkg/flow"
)

func TestFromProxyCannotClaimAPath(t *testing.T) {
	got := fromProxy(flow.Record{CPU: 3, Grant: "g", Slot: 7, Device: "eth0", Verdict: flow.VerdictBypassed,
		Reason: flow.ReasonPathOpen, Detail: "a\x1b[31m\nb",
		Caller: &flow.Workload{Identity: "spiffe://example.org/somebody"}, Request: &flow.Request{Path: "/\x1b[2J"}})
	want := flow.Record{CPU: -1, Verdict: flow.VerdictDenied, Reason: flow.ReasonPathOpen, Detail: "a[31mb", Count: 1, Request: &flow.Request{Path: "/[2J"}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
	if got := fromProxy(flow.Record{Verdict: flow.VerdictProxied, Reason: flow.ReasonIdentity, Count: 4}); got.Verdict != flow.VerdictProxied || got.Count != 4 {
		t.Errorf("a proxied record is kept: %+v", got)
	}
}

func FuzzPlain(f *testing.F) {
	f.Add("spiffe://example.org/a")
	f.Add("\x1b]0;x\x07\u202e\u2028" + strings.Repeat("é", maxText))
	f.Fuzz(func(t *testing.T, s string) {
		got := plain(s)
		if len(got) > maxText || !utf8.ValidString(got) || strings.ContainsFunc(got, unicode.IsControl) {
			t.Errorf("%q", got)
		}
		if plain(got) != got {
			t.Errorf("not stable: %q", got)
		}
	})
}
