package collector

import (
	"database/sql"
	"fmt"
	"math"
	"net/netip"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

// row is an entry on its way into its table.
type row struct {
	sequence
	entry    *api.Entry
	data     []byte
	leaf     sql.NullInt64 // of a grant event
	received time.Time
}

// insert writes one entry into its table.
func (r row) insert(to sink) error {
	class, seq, received := int64(r.class), r.entry.GetSeq(), r.received.UnixNano()
	switch e := r.entry.GetRecord().(type) {
	case *api.Entry_Flow:
		f := e.Flow
		client, clientPort := splitAddr(f.GetClient())
		server, serverPort := splitAddr(f.GetServer())
		return to.add("flows", r.node, r.epoch, class, seq, received, nanos(f.GetTime(), r.received), word(f.GetEvent()), word(f.GetVerdict()), word(f.GetReason()),
			word(f.GetService()), word(f.GetIdentity()), word(f.GetGrant()), client, int64(clientPort), server, int64(serverPort), r.data)
	case *api.Entry_Grant:
		g := e.Grant
		return to.add("grant_events", r.node, r.epoch, class, seq, received, nanos(g.GetTime(), r.received), word(g.GetGrant()), word(g.GetStep()), r.leaf, r.data)
	case *api.Entry_Loss:
		l := e.Loss
		return to.add("losses", r.node, r.epoch, class, seq, received, word(l.GetStage()), word(l.GetCause()), l.GetCount(), l.GetAtMost(), r.data)
	case *api.Entry_Tide:
		grants, differing := summary(e.Tide)
		return to.add("tides", r.node, r.epoch, class, seq, received, nanos(e.Tide.GetTime(), r.received), grants, differing, r.data)
	}
	return fmt.Errorf("entry %d has no record", seq)
}

// maxWord bounds what a column has of a text: an index takes no more of it than that.
const maxWord = 512

// word is a node's text as columns have it and queries look for it. The record keeps what was said.
func word(s string) string {
	s = clean(s)
	if len(s) <= maxWord {
		return s
	}
	cut := maxWord
	for !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut]
}

// clean takes out what PostgreSQL has not in a text.
func clean(s string) string {
	return strings.ReplaceAll(s, "\x00", string(utf8.RuneError))
}

// summary is what queries look for in a tide: the grants that it names, each between blanks, and whether any path differs.
func summary(t *api.Tide) (grants string, differing bool) {
	for _, p := range t.GetPaths() {
		grants += " " + word(p.GetGrant())
		differing = differing || p.GetCause() != ""
	}
	return grants + " ", differing
}

// splitAddr takes address and port apart, so that one address has one spelling. What is no address is
// kept as it is.
func splitAddr(s string) (addr string, port uint16) {
	if ap, err := netip.ParseAddrPort(s); err == nil {
		return word(ap.Addr().Unmap().String()), ap.Port() // a zone is a text of the node's
	}
	return word(s), 0
}

// nanos is the time for the index. A node's clock may say anything; the record keeps what it said.
func nanos(ts *timestamppb.Timestamp, received time.Time) int64 {
	if ts == nil || ts.CheckValid() != nil || ts.GetSeconds() < 0 || ts.GetSeconds() > math.MaxInt64/int64(time.Second)-1 {
		return received.UnixNano()
	}
	return ts.AsTime().UnixNano()
}
