package datapath_test

import (
	"fmt"
	"os"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
)

// TestTake: what was judged is taken; what came by its key since then is not, whenever it came.
func TestTake(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("needs root: BPF maps (CAP_BPF)")
	}
	const key, judged, newer = uint32(7), uint64(1), uint64(2)
	for name, c := range map[string]struct {
		comes int  // the new one: 0 never, 1 before the first look, 2 after it
		gone  bool // the judged one, before the first look
		last  uint64
		taken bool
		left  uint64 // 0: nothing
	}{
		"still there":             {last: judged, taken: true},
		"gone":                    {gone: true},
		"replaced before":         {comes: 1, last: newer, left: newer},
		"replaced between":        {comes: 2, last: newer, left: newer},
		"gone and a new one came": {gone: true, comes: 1, last: newer, left: newer},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := numbers(t, 0)
			put := func(v uint64) {
				if err := m.Put(key, v); err != nil {
					t.Error(err)
				}
			}
			if !c.gone {
				put(judged)
			}
			if c.comes == 1 {
				put(newer)
			}
			looks := 0
			last, taken, err := datapath.TakeNumber(m, key, func(v *uint64) bool {
				was := *v == judged
				if looks++; looks == 1 && c.comes == 2 {
					put(newer)
				}
				return was
			})
			if err != nil || last != c.last || taken != c.taken {
				t.Errorf("took %d, %v, %v; want %d, %v", last, taken, err, c.last, c.taken)
			}
			var left uint64
			if _ = m.Lookup(key, &left); left != c.left { // missing is 0
				t.Errorf("left is %d, want %d", left, c.left)
			}
		})
	}
}

// TestEntries: a walk gives each entry once, of maps with fewer and with more than a batch.
func TestEntries(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("needs root: BPF maps (CAP_BPF)")
	}
	for _, n := range []uint32{0, 1, 512, 20_000} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			t.Parallel()
			m := numbers(t, n)
			keys, values, err := datapath.Numbers(m)
			if err != nil {
				t.Fatal(err)
			}
			seen := map[uint32]bool{}
			for i, k := range keys {
				seen[k] = true
				if values[i] != 2*uint64(k) {
					t.Fatalf("%d has the value %d", k, values[i])
				}
			}
			if len(keys) != int(n) || len(seen) != int(n) || len(values) != int(n) {
				t.Errorf("%d keys, %d different ones and %d values, want %d", len(keys), len(seen), len(values), n)
			}
		})
	}
}

// numbers makes a map of the numbers below n to their doubles.
func numbers(t testing.TB, n uint32) *ebpf.Map {
	t.Helper()
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 4, ValueSize: 8, MaxEntries: max(n, 4)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	for k := range n {
		if err := m.Put(k, 2*uint64(k)); err != nil {
			t.Fatal(err)
		}
	}
	return m
}
