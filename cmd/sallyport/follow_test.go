package main

import (
	"bufio"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

// TestFollowShowsNewRecords reads records as they happen, until it is interrupted, which is no
// error.
func TestFollowShowsNewRecords(t *testing.T) {
	dir, err := os.MkdirTemp("", "sp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	n := newNode(t, strings.ReplaceAll(resources, "KEY", storyKey(t, filepath.Join(dir, "key"))))
	t.Cleanup(n.serve(t, filepath.Join(dir, "agent.sock")))
	n.record(someFlows()[0])

	ctx, interrupt := context.WithCancel(t.Context())
	out, stdout := io.Pipe()
	e := env{stdout: stdout, stderr: io.Discard, now: time.Now, getenv: func(string) string { return "" }}
	done := make(chan error, 1)
	go func() {
		done <- run(ctx, e, []string{"flows", "--follow", "-o", "json", "--timeout", "1ms", "--run-dir", dir})
		stdout.Close()
	}()
	lines := bufio.NewScanner(out)
	for _, id := range []string{"f1", "later"} {
		if !lines.Scan() || !strings.Contains(lines.Text(), `"flow_id":"`+id+`"`) {
			t.Fatalf("want flow %s, got %q", id, lines.Text())
		}
		n.record(&api.FlowRecord{FlowId: "later"})
	}
	interrupt()
	for lines.Scan() { // what was on its way
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}
