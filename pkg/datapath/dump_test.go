package datapath_test

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
)

func (n *node) bpftool(t *testing.T, args ...string) string {
	t.Helper()
	out, err := n.Node.Run(within(t), "bpftool", args...)
	must(t, err)
	return out
}

func (n *node) pin(name string) string { return filepath.Join(n.cf.Dir, "v4/maps", name) }

// dump is what an operator reads, entry by entry.
func (n *node) dump(t *testing.T, name string) []dumped {
	t.Helper()
	return entriesOf(t, n.bpftool(t, "map", "dump", "pinned", n.pin(name)))
}

type dumped struct{ Key, Value any }

// entriesOf reads bpftool's list of entries, which is nearly JSON.
func entriesOf(t *testing.T, out string) []dumped {
	t.Helper()
	var all []dumped
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		t.Fatalf("read dump: %v\n%s", err, out)
	}
	return all
}

// field reads a field of a dumped struct.
func field(t *testing.T, v any, name string) any {
	t.Helper()
	m, ok := v.(map[string]any)
	if !ok {
		t.Fatalf("%v is no struct", v)
	}
	f, ok := m[name]
	if !ok {
		t.Fatalf("%v has no %s", v, name)
	}
	return f
}

func wantField(t *testing.T, v any, name string, want any) {
	t.Helper()
	if have := fmt.Sprint(field(t, v, name)); have != fmt.Sprint(want) {
		t.Errorf("%s is %s, want %v", name, have, want)
	}
}

// TestDumpServices: the table behind the outer map has names, kinds and ports to read.
func TestDumpServices(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	outer := n.bpftool(t, "map", "dump", "pinned", n.pin("sp_services"))
	_, value, _ := strings.Cut(outer, "value:")
	var id [4]byte
	if _, err := fmt.Sscanf(value, "%x %x %x %x", &id[0], &id[1], &id[2], &id[3]); err != nil {
		t.Fatalf("no id of an inner map (%v) in\n%s", err, outer)
	}
	table := fmt.Sprint(binary.NativeEndian.Uint32(id[:]))
	if shown := n.bpftool(t, "map", "show", "id", table); !strings.Contains(shown, "name sp_table") {
		t.Errorf("inner map is shown as %s", shown)
	}
	seen := map[string]int{}
	for _, e := range entriesOf(t, n.bpftool(t, "map", "dump", "id", table)) {
		name := field(t, e.Value, "name").(string)
		seen[name]++
		switch name {
		case "host-echo":
			wantField(t, e.Key, "port", hostPort)
			wantField(t, e.Value, "target", "SP_TARGET_HOST")
		case "pod-echo":
			wantField(t, e.Key, "port", podPort)
			wantField(t, e.Value, "target", "SP_TARGET_POD")
		}
		wantField(t, e.Key, "protocol", 6)
	}
	if seen["host-echo"] != 1 || seen["pod-echo"] != 3 { // two addresses, and the device
		t.Errorf("services in the dump: %v", seen)
	}
}

// TestDumpPathsAndFlows: who may go where until when, and what did, reads alone.
func TestDumpPathsAndFlows(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	c := n.cells()[0]
	slot := c.path(n, t, time.Minute)
	conn := c.dialDirect(t)

	p := n.entry(t, "sp_paths", slot)
	wantField(t, p, "grant", "01TEST")
	wantField(t, p, "service", "test")
	wantField(t, p, "flows", 1)
	left := time.Duration(field(t, p, "deadline_ns").(float64)) - datapath.BootTime()
	if left <= 0 || left > time.Minute {
		t.Errorf("deadline is %v away, want at most a minute", left)
	}
	a := c.from.As16()
	bytes := field(t, field(t, p, "client"), "bytes").([]any)
	for i := range a {
		if fmt.Sprint(bytes[i]) != fmt.Sprint(a[i]) {
			t.Fatalf("client is %v, want %v", bytes, a)
		}
	}
	wantField(t, n.entry(t, "sp_path_state", slot), "state", "SP_PATH_ACTIVE")

	flows := n.dump(t, "sp_flows")
	if len(flows) != 1 {
		t.Fatalf("%d flows in the dump, want 1", len(flows))
	}
	wantField(t, flows[0].Key, "client_port", portOf(conn.LocalAddr()))
	wantField(t, flows[0].Key, "server_port", hostPort)
	wantField(t, flows[0].Value, "slot", slot)
	wantField(t, flows[0].Value, "hook", "SP_HOOK_IN")
	wantField(t, flows[0].Value, "ended", "SP_REASON_NONE")
	index := n.dump(t, "sp_path_index")
	if len(index) != 1 {
		t.Fatalf("%d entries in the index, want 1", len(index))
	}
	wantField(t, index[0].Key, "port", hostPort)
	wantField(t, index[0].Key, "service_id", hostID)
	wantField(t, index[0].Value, "slot", slot)
}

func portOf(a fmt.Stringer) string {
	s := a.String()
	return s[strings.LastIndex(s, ":")+1:]
}

// entry looks one slot of an array up.
func (n *node) entry(t *testing.T, name string, slot uint32) any {
	t.Helper()
	args := append([]string{"map", "lookup", "pinned", n.pin(name), "key", "hex"}, hexSlot(slot)...)
	var e dumped
	out := n.bpftool(t, args...)
	if err := json.Unmarshal([]byte(out), &e); err != nil {
		t.Fatalf("read entry: %v\n%s", err, out)
	}
	return e.Value
}

func hexSlot(slot uint32) []string {
	return strings.Fields(fmt.Sprintf("%02x %02x %02x %02x", byte(slot), byte(slot>>8), byte(slot>>16), byte(slot>>24)))
}

// TestRevokeByHand: one bpftool command closes a path, for its live connection and for new ones.
func TestRevokeByHand(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	n.showPods(t)
	n.copyProxy(t)
	for _, c := range n.cells() {
		t.Run(c.name, func(t *testing.T) {
			slot := c.path(n, t, time.Minute)
			conn := c.dialDirect(t)
			args := append([]string{"map", "update", "pinned", n.pin("sp_path_state"), "key", "hex"}, hexSlot(slot)...)
			n.bpftool(t, append(args, "value", "hex", "03", "00", "00", "00")...)
			wantField(t, n.entry(t, "sp_path_state", slot), "state", "SP_PATH_REVOKED")
			wantReset(t, conn)
			if got, err := c.ask(within(t)); got != "proxy" {
				t.Errorf("answered by %s (%v), want proxy; counters:%s", got, err, n.counters(t))
			}
			paths, err := n.d.Paths()
			must(t, err)
			if len(paths) != 1 || paths[0].State != datapath.PathRevoked {
				t.Errorf("paths are %+v, want one that is revoked", paths)
			}
			ended := false
			for _, f := range n.dump(t, "sp_flows") {
				ended = ended || field(t, f.Value, "ended") == "SP_REASON_PATH_REVOKED"
			}
			if !ended {
				t.Error("no flow reads as ended by SP_REASON_PATH_REVOKED")
			}
			must(t, n.d.EndPath(slot, datapath.PathRevoked))
			n.sweep(t)
			must(t, n.d.FreePath(slot))
		})
	}
}

// TestNamesOfMaps: an operator finds every map and program by its name.
func TestNamesOfMaps(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	for name := range loadSpec(t).Maps {
		if !strings.HasPrefix(name, "sp_") || name == "sp_table" || name == "sp_scratch" {
			continue
		}
		m, err := ebpf.LoadPinnedMap(n.pin(name), nil)
		must(t, err)
		info, err := m.Info()
		must(t, err)
		if info.Name != name {
			t.Errorf("map %s is called %s", name, info.Name)
		}
		must(t, m.Close())
	}
}
