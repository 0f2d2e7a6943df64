package agent

import (
	"net/netip"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
)

// TestHistoryIsBounded: whoever asks from ever new addresses does not fill the agent's memory, and the last of them are known.
func TestHistoryIsBounded(t *testing.T) {
	h := newHistory()
	client := func(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}) }
	const asked = 5 * maxSeen / 2
	for n := range asked {
		h.note(grant.Payload{Requester: "spiffe://a/b", Service: "db", Addresses: []netip.Addr{client(n)}}, time.Time{})
		if all := len(h.seen) + len(h.seenBefore); all > 2*maxSeen {
			t.Fatalf("%d are remembered", all)
		}
	}
	for n := range asked {
		if known := h.has("db", client(n)); known != (n >= maxSeen) {
			t.Fatalf("client %d of %d: known %v", n, asked, known)
		}
	}
	if h.has("web", client(asked-1)) {
		t.Error("a client of one service is known to another")
	}
}
