package e2e_test

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

const (
	bulkSize = 200 << 20
	bulkTime = 2 * time.Minute // of one transfer, on a busy machine
)

// dropInvalid is what many nodes have: whatever conntrack cannot explain is dropped, at each hook.
const dropInvalid = `table inet strict {
	counter invalid { }
	counter passed { }
	chain atprerouting { type filter hook prerouting priority 0; ct state invalid counter name invalid drop; counter name passed; }
	chain atinput { type filter hook input priority 0; ct state invalid counter name invalid drop; }
	chain atforward { type filter hook forward priority 0; ct state invalid counter name invalid drop; }
	chain atoutput { type filter hook output priority 0; ct state invalid counter name invalid drop; }
}`

// TestBulk: 200 MB arrive as they were sent, in each direction and family, through the proxy and around it, to both
// services, although the node drops what conntrack finds invalid.
func TestBulk(t *testing.T) {
	leak.Check(t)
	w := startWorld(t, options{plain: true})
	rules := w.Dir + "/strict.nft"
	write(t, rules, dropInvalid)
	_, err := w.Node.Run(within(t, patience), "nft", "-f", rules)
	must(t, err)
	for _, service := range services() {
		for _, f := range lab.Families() {
			way := w.ways(service, f)[0]
			way.to = w.bulkService(t, way).Addr
			t.Run(fmt.Sprintf("%s/%s/proxy", service, f), func(t *testing.T) { w.bulk(t, way, true) })
			g := w.open(t, wanted{service, way.from, "10m"})
			t.Run(fmt.Sprintf("%s/%s/path", service, f), func(t *testing.T) { w.bulk(t, way, false) })
			w.revoke(t, g)
		}
	}
	invalid, passed := w.counted(t, "strict", "invalid"), w.counted(t, "strict", "passed")
	t.Logf("the firewall passed %d packets and dropped %d", passed, invalid)
	if passed == 0 || invalid > passed/1000 {
		t.Errorf("the firewall passed %d packets and dropped %d", passed, invalid)
	}
}

// stream is the same pseudo-random text every time.
func stream() io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte([]byte("what is sent in bulk, both ways."))), bulkSize)
}

func sum(h hash.Hash) string { return hex.EncodeToString(h.Sum(nil)) }

// bulkService takes a stream to its end and answers with its sum and the stream itself.
func (w *world) bulkService(t *testing.T, way way) *lab.Service {
	t.Helper()
	s, err := w.home(way).Serve(netip.AddrPortFrom(way.to.Addr(), sinkPort), func(c net.Conn) {
		h := sha256.New()
		if _, err := io.Copy(h, c); err != nil {
			return // the client sees the cut
		}
		_, _ = io.Copy(c, io.MultiReader(strings.NewReader(sum(h)), stream()))
	})
	must(t, err)
	return s
}

// bulk sends the stream, and takes it back.
func (w *world) bulk(t *testing.T, way way, secured bool) {
	ctx := within(t, bulkTime)
	conn, err := way.dial(ctx)
	must(t, err)
	defer conn.Close()
	must(t, conn.SetDeadline(time.Now().Add(bulkTime)))
	c := conn.(halfCloser)
	if secured {
		c, err = w.secure(ctx, conn, web)
		must(t, err)
	}
	began := time.Now()
	sent := sha256.New()
	_, err = io.Copy(c, io.TeeReader(stream(), sent))
	must(t, err)
	must(t, c.CloseWrite())
	arrived := make([]byte, 2*sha256.Size)
	_, err = io.ReadFull(c, arrived)
	must(t, err)
	if string(arrived) != sum(sent) {
		t.Errorf("sent %s, arrived %s", sum(sent), arrived)
	}
	up := time.Since(began)
	began = time.Now()
	back := sha256.New()
	n, err := io.Copy(back, c)
	if err != nil || n != bulkSize || sum(back) != sum(sent) {
		t.Errorf("came back: %d bytes, %v, %s; want %d, %s", n, err, sum(back), bulkSize, sum(sent))
	}
	t.Logf("up %v, down %v", up.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
}

// home is where a way's service lives.
func (w *world) home(way way) *lab.Namespace {
	if way.service == "pod-echo" {
		return w.Pod
	}
	return w.Node
}
