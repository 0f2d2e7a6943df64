package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
)

func TestLossesAreReportedOnceOverRestarts(t *testing.T) {
	path := filepath.Join(t.TempDir(), "losses.json")
	for i, c := range []struct {
		boot string
		now  datapath.Losses
		want []string
	}{
		{"a", datapath.Losses{}, nil},
		{"a", datapath.Losses{BestEffort: 5}, []string{"best_effort_full 5"}},
		{"a", datapath.Losses{BestEffort: 5}, nil},
		{"a", datapath.Losses{MustDeliver: 1, BestEffort: 7}, []string{"must_deliver_full 1", "best_effort_full 2"}},
		{"a", datapath.Losses{BestEffort: 3}, []string{"best_effort_full 3"}}, // new maps after an uninstall
		{"b", datapath.Losses{BestEffort: 3}, []string{"best_effort_full 3"}}, // another boot
	} {
		l, err := openLossLedger(path, c.boot) // each time a new agent
		must(t, err)
		var got []string
		must(t, l.settle(c.now, func(cause string, n uint64) { got = append(got, fmt.Sprint(cause, " ", n)) }))
		if !slices.Equal(got, c.want) {
			t.Errorf("%d: %v, want %v", i, got, c.want)
		}
	}
}

// TestDamagedLossesAreReportedAgain: a file that cannot be read holds nobody up, and stays for people to look at.
func TestDamagedLossesAreReportedAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "losses.json")
	for _, content := range []string{"", `{"bootID":"a","bestEff`} {
		must(t, os.WriteFile(path, []byte(content), 0o600))
		l, err := openLossLedger(path, "a")
		must(t, err)
		var got []string
		must(t, l.settle(datapath.Losses{BestEffort: 5}, func(cause string, n uint64) { got = append(got, fmt.Sprint(cause, " ", n)) }))
		if kept, err := os.ReadFile(path + ".damaged"); err != nil || string(kept) != content || !slices.Equal(got, []string{"best_effort_full 5"}) {
			t.Errorf("kept %q, %v; told %v", kept, err, got)
		}
	}
}
