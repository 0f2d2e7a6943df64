package audit_test

import (
	"path/filepath"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// What a record costs the one who hands it in.
func BenchmarkFlow(b *testing.B) {
	st := must(store.Open(filepath.Join(b.TempDir(), "node.db")))(b)
	defer st.Close()
	n := must(audit.New(audit.Config{Store: st, Node: "node-1", Logger: silent}))(b)
	r := proxied("f")
	b.ReportAllocs()
	for b.Loop() {
		n.Flow(r)
	}
}

// From memory to the collector's disk, with mTLS and SQLite on both sides.
func BenchmarkDelivery(b *testing.B) {
	s := newSite(b)
	s.startCollector()
	n := s.startNode(1 << 30)
	r := proxied("f")
	r.Identity, r.Service = "spiffe://example.org/app/web", "postgres"
	b.ResetTimer()
	for range b.N {
		n.Flow(r)
	}
	n.drained(b)
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "records/s")
}
