package agent

import (
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestWatchdogIsFedByProgress: the service manager hears of the agent while its loops move, and not while one of them stands, though
// the lease ticks on.
func TestWatchdogIsFedByProgress(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	must(t, err)
	defer conn.Close()
	now := time.Hour
	k := &keeper{notify: notifier{socket: path}, pulse: newPulse(), clock: clock{boot: func() time.Duration { return now }}}
	fed := func() bool {
		must(t, conn.SetReadDeadline(time.Now().Add(50*time.Millisecond)))
		buf := make([]byte, 64)
		n, err := conn.Read(buf)
		return err == nil && string(buf[:n]) == "WATCHDOG=1"
	}
	must(t, k.alive())
	if !fed() {
		t.Error("not fed before a loop has begun: a long start has a bound of its own")
	}
	k.pulse.beat("device watch", now)
	now += stallAfter
	must(t, k.alive())
	if !fed() {
		t.Error("not fed while the loop moves")
	}
	now++
	if err := k.alive(); !errors.Is(err, errStalled) || !strings.Contains(err.Error(), "device watch") || fed() {
		t.Errorf("a loop that stands: %v", err)
	}
	k.pulse.beat("device watch", now)
	must(t, k.alive())
	if !fed() {
		t.Error("not fed when it moves again")
	}
}
