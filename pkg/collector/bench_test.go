package collector

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

// TestRate tells how many records a second go from streams of several nodes to the disk. It fails at a tenth of what a small machine does.
func TestRate(t *testing.T) { onEngines(t, testRate) }

func testRate(t *testing.T, i ids) {
	const nodes, batches, size = 4, 20, 500
	r := start(t, i, nil)
	var sent [nodes][]*api.Batch
	var streams [nodes]*node
	for i := range nodes {
		streams[i], _ = r.connect(t, fmt.Sprint("node-", i), epoch1)
		for b := range uint64(batches) {
			sent[i] = append(sent[i], streams[i].sealed(flows, flowEntries(b*size+1, (b+1)*size), nil))
		}
	}
	began := time.Now()
	var wg sync.WaitGroup
	for i := range nodes {
		wg.Go(func() {
			for _, b := range sent[i] {
				streams[i].sendBatch(b)
			}
			for streams[i].ack().GetSeq() < batches*size {
			}
		})
	}
	wg.Wait()
	rate := nodes * batches * size / time.Since(began).Seconds()
	t.Logf("%.0f records a second", rate)
	if rate < 1000 {
		t.Errorf("%.0f records a second", rate)
	}
}
