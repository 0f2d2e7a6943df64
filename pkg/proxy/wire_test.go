package proxy

import (
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// The agent reads with pkg/audit what toWire writes.
func TestWireIsWhatTheAgentReads(t *testing.T) {
	records := map[string]flow.Record{
		"full": {
			Event: flow.EventClose, Time: time.Now().UTC().Round(0), Boot: time.Hour, CPU: -1, Seq: 7, FlowID: "x-1",
			Verdict: flow.VerdictProxied, Reason: flow.ReasonIdleTimeout, Protocol: "tcp",
			Client: netip.MustParseAddrPort("10.1.0.2:40000"), Server: netip.MustParseAddrPort("[fd00:2::2]:5432"),
			Service: "postgres", Identity: "spiffe://example.org/app/web",
			BytesToServer: 1, BytesToClient: 1 << 40, Count: 3, Detail: "why", Proof: "jwt", Application: "h2",
		},
		"request": {
			Event: flow.EventRequest, Time: time.Unix(5, 0).UTC(), CPU: -1, Seq: 9, Count: 1, Verdict: flow.VerdictProxied, Reason: flow.ReasonIdentity,
			Request: &flow.Request{Number: 2, Method: "GET", Host: "web.example.org", Path: "/a b", Status: 200, Rule: "access[0]", Took: time.Second},
		},
		"sparse": {Event: flow.EventDeny, Time: time.Unix(0, 1).UTC(), CPU: -1, Seq: 8, Count: 1},
	}
	for name, want := range records {
		t.Run(name, func(t *testing.T) {
			got, err := audit.FlowFromAPI(toWire(want))
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got  %+v\nwant %+v", got, want)
			}
		})
	}
}
