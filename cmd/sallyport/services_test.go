package main

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

// TestWatchedTable: what was judged while a service was shadowed is still told when it is observed; where nothing was, there is a dash.
func TestWatchedTable(t *testing.T) {
	seen := func(n uint64) *api.Seen { return &api.Seen{Opens: n, Packets: n, Bytes: n} }
	var out bytes.Buffer
	table := newTable(&out)
	watchedTable(table, []*api.Service{
		{Name: "once-shadowed", Mode: "Observe", Watched: &api.Watched{Seen: seen(9), Proxied: seen(2), Bypassed: seen(3), Denied: seen(4)}},
		{Name: "observed", Mode: "Observe", Watched: &api.Watched{Seen: seen(9)}},
		{Name: "shadowed", Mode: "Shadow", Watched: &api.Watched{Seen: seen(9)}},
		{Name: "enforced", Mode: "Enforce"},
	})
	if err := table.Flush(); err != nil {
		t.Fatal(err)
	}
	var lines []string
	for line := range strings.Lines(out.String()) {
		lines = append(lines, strings.Join(strings.Fields(line), " "))
	}
	nine, none := "9 SYNs, 9 packets, 9 bytes", "0 SYNs, 0 packets, 0 bytes"
	want := []string{
		"", "NOT ENFORCED MODE SEEN WOULD BE PROXIED BYPASSED DENIED",
		"once-shadowed Observe " + nine + " 2 SYNs, 2 packets, 2 bytes 3 SYNs, 3 packets, 3 bytes 4 SYNs, 4 packets, 4 bytes",
		"observed Observe " + nine + " - - -",
		"shadowed Shadow " + nine + " " + none + " " + none + " " + none,
	}
	if strings.Join(lines, "\n") != strings.Join(want, "\n") {
		t.Errorf("have\n%s", out.String())
	}
}

// TestServicesWithoutAddresses: of a service of the node that is every local one, and of one that chooses its pods that there is none here.
func TestServicesWithoutAddresses(t *testing.T) {
	var out bytes.Buffer
	table := newTable(&out)
	servicesTable(table, []*api.Service{{Name: "ssh", Target: "Host", Mode: "Enforce"}, {Name: "db", Target: "Pod", Mode: "Enforce"}})
	if err := table.Flush(); err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(out.String(), "\n")[1:3] {
		if everywhere := strings.Contains(line, "every local"); everywhere != strings.HasPrefix(line, "ssh") || !everywhere && !strings.Contains(line, "none yet") {
			t.Errorf("%s", line)
		}
	}
}

// TestHaltSaysWhomItDidNotReach: who stops everything is not told that a node stands still that did not hear it.
func TestHaltSaysWhomItDidNotReach(t *testing.T) {
	away := t.TempDir()
	r := command(t.Context(), nil, "rollout", "halt", "--agents", away, "--why", "test")
	if r.code == exitDone || !strings.Contains(r.stdout, "NOT HALTED") || strings.Contains(r.stdout, "nothing that was running") || !strings.Contains(r.stderr, away) {
		t.Errorf("%+v", r)
	}
}

// TestRolloutStatusOfNobody: with no node that answers, nothing is known, whatever was shown: scripts see that, and people each reason.
func TestRolloutStatusOfNobody(t *testing.T) {
	one, two := t.TempDir(), t.TempDir()
	for _, args := range [][]string{{"--agents", one + "," + two}, {"--agents", one + "," + two, "-o", "json"}, {"--agents", one}} {
		r := command(t.Context(), nil, append([]string{"rollout", "status"}, args...)...)
		if r.code != exitUnreachable || !strings.Contains(r.stderr, one+"/agent.sock") || strings.Contains(args[1], two) && !strings.Contains(r.stderr, two+": ") {
			t.Errorf("%v: %+v", args, r)
		}
	}
}

// TestRolloutStatusOfSome: the others are shown, and the one that is away is named.
func TestRolloutStatusOfSome(t *testing.T) {
	here, away := t.TempDir(), t.TempDir()
	text := strings.ReplaceAll(resources, "KEY", storyKey(t, filepath.Join(here, "alice.key")))
	t.Cleanup(newNode(t, text).serve(t, filepath.Join(here, "agent.sock")))
	r := command(t.Context(), nil, "rollout", "status", "--agents", here+","+away)
	if r.code != exitDone || !strings.Contains(r.stdout, away) {
		t.Errorf("%+v", r)
	}
}
