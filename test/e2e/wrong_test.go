package e2e_test

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// effect is everything that wrong input must not change.
type effect struct {
	generation, services, livePaths uint32
	paths                           []path
	grants, table                   string
}

func (w *world) effect(t *testing.T) effect {
	t.Helper()
	s := w.status(t)
	return effect{s.Generation, s.Services, s.LivePaths, w.paths(t), w.cli(t, "grants", "-o", "json"), w.table(t)}
}

// table is the kernel's services table, as bpftool reads it. The map of maps shows the table's number in raw bytes.
func (w *world) table(t *testing.T) string {
	t.Helper()
	var outer []struct{ Value []string }
	bpftool(t, &outer, "map", "dump", "pinned", w.pinned("sp_services"))
	if len(outer) != 1 || len(outer[0].Value) != 4 {
		t.Fatalf("services table: %+v", outer)
	}
	var id uint32
	for i, text := range outer[0].Value {
		b, err := strconv.ParseUint(text, 0, 8)
		must(t, err)
		id |= uint32(b) << (8 * i)
	}
	var rows []struct{ Formatted any }
	bpftool(t, &rows, "map", "dump", "id", fmt.Sprint(id))
	return fmt.Sprint(rows)
}

// unchanged runs one wrong input between two looks.
func (w *world) unchanged(t *testing.T, f func()) {
	t.Helper()
	before := w.effect(t)
	f()
	if after := w.effect(t); !reflect.DeepEqual(before, after) {
		t.Errorf("changed:\n%+v\nwas\n%+v", after, before)
	}
}

// wantTold: the command failed, and its words have all of these and a next step.
func wantTold(t *testing.T, s said, words ...string) {
	t.Helper()
	if s.err == nil {
		t.Errorf("no error: %s", s)
	}
	for _, word := range append(words, "hint: ") {
		if !strings.Contains(s.stderr, word) {
			t.Errorf("%q is not in: %s", word, s.stderr)
		}
	}
}

const extraService = `apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: extra}
spec:
  target: Host
  ports: [9999]
`

// TestWrongResources: a file that is wrong in any way is told of with its line, field and next step, wherever it is
// read, and the node enforces what it did before.
func TestWrongResources(t *testing.T) {
	leak.Check(t)
	w := startWorld(t, options{})
	w.open(t, wanted{"host-echo", w.Client.Addr(lab.IPv4), "5m"})
	for _, c := range []struct{ name, yaml, place, field string }{
		{"bad_YAML", extraService + "  bad: [", ":7", "not valid YAML"},
		{"unknown_key", strings.Replace(extraService, "ports:", "prots:", 1), ":6", "spec.prots"},
		{"port_0", strings.Replace(extraService, "9999", "0", 1), ":6", "spec.ports[0]"},
		{"duration_0", strings.Replace(bypassPolicy("extra", "host-echo"), "10m", "0s", 1), ":9", "spec.maxDuration"},
		{"no_duration", strings.Replace(bypassPolicy("extra", "host-echo"), "  maxDuration: 10m\n", "", 1), ":4", "spec.maxDuration"},
		{"unknown_service", bypassPolicy("extra", "nonesuch"), ":5", "spec.services[0]"},
	} {
		t.Run(c.name, func(t *testing.T) {
			file := filepath.Join(w.files.resources, "20-wrong.yaml")
			w.unchanged(t, func() {
				w.writeResources(t, "20-wrong.yaml", c.yaml)
				wantTold(t, w.try("policy", "check", w.files.resources), file+c.place, c.field)
				out, err := w.run(t, "sallyport-agent", "check", "--config", w.files.agent)
				wantTold(t, said{stderr: out, err: err}, file+c.place, c.field)
				waitUntil(t, "the agent's word", func() bool { // with the next step
					all := strings.Join(w.status(t).Problems, "\n")
					return strings.Contains(all, file+c.place) && strings.Contains(all, c.field)
				})
			})
			must(t, os.Remove(file))
			waitUntil(t, "the problem to be over", func() bool { return len(w.status(t).Problems) == 0 })
		})
	}
}

// terms are the flags of a grant that is in order, to be changed.
func (w *world) terms(change map[string]string) []string {
	flags := map[string]string{
		"service": "pod-echo", "client": w.Client.Addr(lab.IPv4).String(), "for": "1m", "node": nodeName, "reason": "test",
		"requester": "alice", "key": w.key,
	}
	for k, v := range change {
		flags[k] = v
	}
	args := []string{"grant", "issue", "--yes"}
	for k, v := range flags {
		args = append(args, "--"+k, v)
	}
	return args
}

// TestWrongGrants: a grant that is wrong in any way is refused with the field and the next step, and opens nothing.
func TestWrongGrants(t *testing.T) {
	leak.Check(t)
	w := startWorld(t, options{})
	w.open(t, wanted{"host-echo", w.Client.Addr(lab.IPv4), "5m"})
	stranger := filepath.Join(w.Dir, "stranger.key")
	w.cli(t, "keygen", "--out", stranger)
	past := time.Now().Add(-2 * time.Hour).UTC()
	// Without --policy, issue does not know what the node will refuse.
	for _, c := range []struct {
		name  string
		terms map[string]string
		words []string
	}{
		{"over_cap", map[string]string{"for": "11m"}, []string{"duration: ", "10m"}},
		{"unknown_key_id", map[string]string{"key": stranger}, []string{"signatures", "sp:"}},
		{"expired", map[string]string{"not-before": past.Format(time.RFC3339), "not-after": "1h"}, []string{"notAfter: "}},
		{"not_yet", map[string]string{"not-before": past.Add(4 * time.Hour).Format(time.RFC3339)}, []string{"notBefore: "}},
		{"other_nodes_audience", map[string]string{"node": "node-2"}, []string{"audience: ", "node-2", nodeName}},
		{"unknown_service", map[string]string{"service": "nonesuch"}, []string{"service: ", "nonesuch"}},
		{"foreign_source", map[string]string{"client": "192.0.2.1"}, []string{"addresses[0]: ", "192.0.2.1"}},
		{"unprotected_port", map[string]string{"port": "22"}, []string{"ports[0]: ", "22"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			file := filepath.Join(w.Dir, c.name+".grant")
			write(t, file, w.cli(t, w.terms(c.terms)...))
			w.unchanged(t, func() { wantTold(t, w.try("grant", "activate", file, "--key", w.key, "--yes"), c.words...) })
		})
	}
	t.Run("duration_0", func(t *testing.T) {
		w.unchanged(t, func() { wantTold(t, w.try(w.terms(map[string]string{"for": "0s"})...), "--for (duration): ") })
	})
	t.Run("key_that_others_can_read", func(t *testing.T) {
		must(t, os.Chmod(stranger, 0o644))
		w.unchanged(t, func() {
			wantTold(t, w.try(w.terms(map[string]string{"key": stranger})...), stranger, "0644", "chmod 600")
		})
	})
	t.Run("tampered", func(t *testing.T) {
		file := filepath.Join(w.Dir, "tampered.grant")
		write(t, file, tampered(t, w.cli(t, w.terms(nil)...)))
		w.unchanged(t, func() { wantTold(t, w.try("grant", "activate", file, "--key", w.key, "--yes"), "signatures") })
	})
	t.Run("used_twice", func(t *testing.T) {
		file := w.issue(t, wanted{"pod-echo", w.Client.Addr(lab.IPv4), "1m"})
		g := read[activated](t, w, "grant", "activate", file, "--key", w.key, "--yes")
		w.unchanged(t, func() { wantTold(t, w.try("grant", "activate", file, "--key", w.key, "--yes"), g.ID) })
		w.revoke(t, g)
		w.unchanged(t, func() { wantTold(t, w.try("grant", "activate", file, "--key", w.key, "--yes"), "used") })
	})
	t.Run("no_envelope", func(t *testing.T) {
		file := filepath.Join(w.Dir, "none.grant")
		write(t, file, "{}")
		w.unchanged(t, func() { wantTold(t, w.try("grant", "activate", file, "--key", w.key, "--yes"), "payload") })
	})
}

// tampered makes the grant last longer than what was signed, and is in form otherwise.
func tampered(t *testing.T, envelope string) string {
	t.Helper()
	var e struct{ Payload string }
	must(t, json.Unmarshal([]byte(envelope), &e))
	payload, err := base64.StdEncoding.DecodeString(e.Payload)
	must(t, err)
	longer := strings.Replace(string(payload), `"1m`, `"5m`, 1)
	if longer == string(payload) {
		t.Fatalf("no duration to change in %s", payload)
	}
	return strings.Replace(envelope, e.Payload, base64.StdEncoding.EncodeToString([]byte(longer)), 1)
}

// TestWrongConfig: a configuration that is wrong starts nothing and leaves nothing.
func TestWrongConfig(t *testing.T) {
	leak.Check(t)
	w := newWorld(t, options{})
	good, err := os.ReadFile(w.files.agent)
	must(t, err)
	for _, c := range []struct{ name, old, new, place, field string }{
		{"bad_YAML", "spec:", "spec: [", "agent.yaml:", ""},
		{"unknown_key", "  lease:", "  leese:", ":13", "spec.leese"},
		{"lease_0", "lease: 15s", "lease: 0s", ":13", "spec.lease"},
		{"no_bpffs", "bpffs: " + w.bpffs, "bpffs: " + w.Dir, "", w.Dir},
	} {
		t.Run(c.name, func(t *testing.T) {
			text := strings.Replace(string(good), c.old, c.new, 1)
			if text == string(good) {
				t.Fatalf("%q is not in the configuration", c.old)
			}
			write(t, w.files.agent, text)
			out, err := w.run(t, "sallyport-agent", "run", "--config", w.files.agent)
			wantTold(t, said{stderr: out, err: err}, c.place, c.field)
			w.nothingStarted(t)
		})
	}
	write(t, w.files.agent, string(good))
	t.Run("private_bpffs", func(t *testing.T) {
		private := filepath.Join(w.Dir, "private")
		must(t, os.Mkdir(private, 0o700))
		write(t, w.files.agent, strings.Replace(string(good), "bpffs: "+w.bpffs, "bpffs: "+private, 1))
		script := fmt.Sprintf("mount -t bpf bpf %s && exec %s/sallyport-agent run --config %s", private, w.bin, w.files.agent)
		out, err := w.Node.Run(within(t, patience), "unshare", "--mount", "sh", "-c", script)
		wantTold(t, said{stderr: out, err: err}, private, "bpffs")
		w.nothingStarted(t)
	})
	t.Run("collector", func(t *testing.T) {
		write(t, w.files.collector, "apiVersion: sallyport.dev/v1alpha1\nkind: CollectorConfig\nmetadata: {name: c}\nspec:\n  trustDomain: example.org\n  retane: 24h\n")
		s := capture(exec.Command(filepath.Join(w.bin, "sallyport-collector"), "--config", w.files.collector))
		wantTold(t, s, w.files.collector+":6", "retane")
	})
}

func (w *world) nothingStarted(t *testing.T) {
	t.Helper()
	if _, err := w.Node.Netlink.LinkByName("px0"); err == nil {
		t.Error("px0 is there")
	}
	for _, path := range []string{filepath.Join(w.bpffs, "sallyport"), filepath.Join(w.files.run, "px"), filepath.Join(w.files.run, "agent.sock")} {
		if exists(path) {
			t.Errorf("%s is there", path)
		}
	}
}
