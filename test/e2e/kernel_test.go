package e2e_test

import (
	"encoding/json"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// pinned is the path of a pinned map.
func (w *world) pinned(name string) string {
	return filepath.Join(w.bpffs, "sallyport", "v4", "maps", name)
}

// bpftool asks the kernel without any code of ours, whether or not an agent lives.
func bpftool(t *testing.T, into any, args ...string) {
	t.Helper()
	s := capture(exec.Command("bpftool", append([]string{"--json"}, args...)...))
	if s.err != nil {
		t.Fatalf("bpftool %v: %s", args, s)
	}
	if into == nil {
		return
	}
	if err := json.Unmarshal([]byte(s.stdout), into); err != nil {
		t.Fatalf("bpftool %v: %v", args, err)
	}
}

// counters are packets by reason.
type counters map[string]uint64

func (w *world) counters(t *testing.T) counters {
	t.Helper()
	var rows []struct {
		Formatted struct {
			Key    flow.Reason
			Values []struct{ Value struct{ Packets uint64 } }
		}
	}
	bpftool(t, &rows, "map", "dump", "pinned", w.pinned("sp_counters"))
	out := counters{}
	for _, r := range rows {
		for _, v := range r.Formatted.Values {
			out[r.Formatted.Key.String()] += v.Value.Packets
		}
	}
	return out
}

// firstPacket are the reasons that a SYN can get, one each.
var firstPacket = []string{
	"NO_PATH", "PATH_EXPIRED", "PATH_REVOKED", "PATH_SPENT", "PATH_STALE", "LEASE_LAPSED", "RING_FULL", "FLOWS_FULL", "TUPLE_HELD", "PATH_OPEN",
}

// since lists the reasons of first packets that were given since before.
func (c counters) since(before counters) (given []string) {
	for _, r := range firstPacket {
		if c[r] > before[r] {
			given = append(given, r)
		}
	}
	return given
}

// wantReason has f cause first packets of one reason and no other.
func (w *world) wantReason(t *testing.T, reason string, f func()) {
	t.Helper()
	before := w.counters(t)
	f()
	if got := w.counters(t).since(before); !slices.Equal(got, []string{reason}) {
		t.Errorf("kernel gave the reasons %v, want %s alone", got, reason)
	}
}
