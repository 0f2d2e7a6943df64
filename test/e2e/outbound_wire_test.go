package e2e_test

import (
	"bytes"
	"cmp"
	"net/netip"
	"slices"
	"testing"

	"github.com/sallyport-dev/sallyport/test/lab"
)

// passed are the packets that have passed between the nodes since there were so many, each once.
func (p *pair) passed(t *testing.T, since int) []lab.Packet {
	t.Helper()
	all, err := p.wire.Packets()
	must(t, err)
	if lost, err := p.wire.Lost(); lost > 0 || err != nil {
		t.Fatalf("the capture lost %d packets (%v)", lost, err)
	}
	return slices.DeleteFunc(slices.Clone(all[since:]), func(q lab.Packet) bool { return q.Outgoing })
}

// now is how many packets there have been.
func (p *pair) now(t *testing.T) int {
	t.Helper()
	all, err := p.wire.Packets()
	must(t, err)
	return len(all)
}

// begun are who has begun a connection to a place since then.
func (p *pair) begun(t *testing.T, since int, to netip.AddrPort) (all []netip.AddrPort) {
	t.Helper()
	for _, q := range p.passed(t, since) {
		if q.SYN && !q.ACK && q.Dst == to && !slices.Contains(all, q.Src) {
			all = append(all, q.Src)
		}
	}
	return all
}

// direction is one direction of one connection.
type direction struct{ from, to netip.AddrPort }

// said is what every end of a connection has said since then.
func (p *pair) said(t *testing.T, since int) map[direction]spoken {
	t.Helper()
	packets, all := map[direction][]lab.Packet{}, map[direction]spoken{}
	for _, q := range p.passed(t, since) {
		if q.Payload != len(q.Head) {
			t.Fatalf("of %d bytes %d were captured", q.Payload, len(q.Head))
		}
		packets[direction{q.Src, q.Dst}] = append(packets[direction{q.Src, q.Dst}], q)
	}
	for d, of := range packets {
		all[d] = assemble(of)
	}
	return all
}

// spoken are the bytes of one direction.
type spoken struct {
	bytes []byte
	begun bool // from the first one on
}

// told tells whether a word has passed in the clear since then.
func (p *pair) told(t *testing.T, since int, word string) bool {
	t.Helper()
	for _, s := range p.said(t, since) {
		if bytes.Contains(s.bytes, []byte(word)) {
			return true
		}
	}
	return false
}

// untold: what has passed since then to services with Sallyport, and back, is TLS from the first byte to the last.
func (p *pair) untold(t *testing.T, since int) {
	t.Helper()
	checked := 0
	for d, s := range p.said(t, since) {
		if port := min(d.from.Port(), d.to.Port()); port != hostPort && port != podPort && port != sinkPort {
			continue
		}
		if s.begun {
			checked++
		}
		if s.begun && !isTLS(s.bytes) {
			t.Errorf("in the clear from %s to %s: %q", d.from, d.to, s.bytes)
		}
		for _, word := range []string{"HTTP/1.1", "seen from", "who answers?", "service saw", "SSH-2.0"} {
			if bytes.Contains(s.bytes, []byte(word)) {
				t.Errorf("%q passed in the clear from %s to %s", word, d.from, d.to)
			}
		}
	}
	t.Logf("%d directions of connections are TLS alone", checked)
}

// assemble puts together what one end has said. Without the SYN it begins in the midst of a record.
func assemble(all []lab.Packet) (s spoken) {
	first := all[0].Seq
	if i := slices.IndexFunc(all, func(q lab.Packet) bool { return q.SYN }); i >= 0 {
		first, s.begun = all[i].Seq+1, true
	}
	all = slices.DeleteFunc(all, func(q lab.Packet) bool { return q.Payload == 0 || int32(q.Seq-first) < 0 })
	slices.SortStableFunc(all, func(a, b lab.Packet) int { return cmp.Compare(a.Seq-first, b.Seq-first) })
	for _, q := range all {
		at := int(q.Seq - first)
		if at+len(q.Head) > len(s.bytes) && at <= len(s.bytes) { // not what was sent again
			s.bytes = append(s.bytes, q.Head[len(s.bytes)-at:]...)
		}
	}
	return s
}

// isTLS tells whether bytes are records of TLS 1.3 and nothing else (RFC 8446, 5.1): hellos, and what is encrypted. The last one may not
// be there to its end.
func isTLS(b []byte) bool {
	const changeCipherSpec, applicationData, most = 20, 23, 1<<14 + 256
	for len(b) >= 5 {
		kind, size := b[0], int(b[3])<<8|int(b[4])
		if kind < changeCipherSpec || kind > applicationData || b[1] != 3 || size > most {
			return false
		}
		b = b[min(5+size, len(b)):]
	}
	return true
}
