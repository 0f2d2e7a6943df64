package agent

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/test/leak"
)

// TestMetricsAddressTaken: an address that another process has is a problem, and is served as soon as it can be had.
func TestMetricsAddressTaken(t *testing.T) {
	leak.Check(t)
	other, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	address := other.Addr().String()
	p := newProblems(slog.New(slog.DiscardHandler))
	m, err := newMetricsServer(address, p)
	must(t, err)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	await(t, "the problem", func() bool {
		return strings.Contains(strings.Join(p.lines(), "\n"), "metrics "+address+": no metrics are served: ")
	})
	must(t, other.Close())
	await(t, "metrics", func() bool { return scrapes(t, address) })
	if lines := p.lines(); len(lines) != 0 {
		t.Errorf("still a problem: %q", lines)
	}
	stop()
	must(t, <-done)
}

func scrapes(t *testing.T, address string) bool {
	t.Helper()
	transport := &http.Transport{DisableKeepAlives: true}
	reply, err := (&http.Client{Transport: transport, Timeout: time.Second}).Get("http://" + address + "/metrics")
	if err != nil {
		return false
	}
	defer reply.Body.Close()
	text, err := io.ReadAll(reply.Body)
	must(t, err)
	return strings.Contains(string(text), "go_goroutines")
}

// await looks again and again until ok, for a few seconds.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
	}
}
