package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"golang.org/x/sys/unix"
)

// lossLedger remembers how many of the kernel's lost records were reported. The kernel's counters live as long as its
// maps, longer than an agent, so what was reported must too; it is written when it changes, which is seldom.
type lossLedger struct {
	path string
	seen lossFile
}

// Causes of losses in the kernel, by the ring that was full.
const (
	causeMustDeliver = "must_deliver_full"
	causeBestEffort  = "best_effort_full"
)

// told tells whether these losses were reported.
func (l *lossLedger) told(now datapath.Losses) bool {
	return now.MustDeliver == l.seen.MustDeliver && now.BestEffort == l.seen.BestEffort
}

// lossFile is the form on disk. Another boot begins at zero.
type lossFile struct {
	BootID      string `json:"bootID"`
	MustDeliver uint64 `json:"mustDeliver"`
	BestEffort  uint64 `json:"bestEffort"`
}

func openLossLedger(path, bootID string) (*lossLedger, error) {
	l := &lossLedger{path: path}
	data, err := os.ReadFile(path)
	if err == nil && json.Unmarshal(data, &l.seen) != nil {
		l.seen = lossFile{} // what was reported is reported again, and nobody waits for a file to be mended
		err = os.Rename(path, path+".damaged")
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.EROFS) {
		return nil, fmt.Errorf("read reported losses: %w", err)
	}
	if l.seen.BootID != bootID {
		l.seen = lossFile{BootID: bootID}
	}
	return l, nil
}

// settle reports what was lost since the last time. Counters that went back belong to new maps. What is reported and then
// not written down is reported again after a crash: a loss is told twice rather than never.
func (l *lossLedger) settle(now datapath.Losses, report func(cause string, n uint64)) error {
	next := lossFile{BootID: l.seen.BootID, MustDeliver: now.MustDeliver, BestEffort: now.BestEffort}
	if next == l.seen {
		return nil
	}
	for _, c := range []struct {
		cause    string
		was, now uint64
	}{
		{causeMustDeliver, l.seen.MustDeliver, now.MustDeliver},
		{causeBestEffort, l.seen.BestEffort, now.BestEffort},
	} {
		if c.now < c.was {
			c.was = 0
		}
		if c.now > c.was {
			report(c.cause, c.now-c.was)
		}
	}
	l.seen = next
	data, err := json.Marshal(next)
	if err == nil {
		err = replaceFile(l.path, append(data, '\n'), 0o600)
	}
	if err != nil {
		return fmt.Errorf("keep reported losses: %w", err)
	}
	return nil
}
