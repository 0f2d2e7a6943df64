package datapath_test

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

const goldenFile = "testdata/layout.golden"

var update = flag.Bool("update", false, "write "+goldenFile+" anew; a change of a type needs a new SP_SCHEMA")

func loadSpec(t *testing.T) *ebpf.CollectionSpec {
	t.Helper()
	spec, err := bpf.LoadSallyport()
	check(t, err)
	return spec
}

// TestLayout shows a change of what the kernel, Go and operators share as a change of a file.
func TestLayout(t *testing.T) {
	have := layout(t, loadSpec(t))
	if *update {
		check(t, os.WriteFile(goldenFile, []byte(have), 0o644))
	}
	golden, err := os.ReadFile(goldenFile)
	check(t, err)
	if have == string(golden) {
		return
	}
	wantLines := strings.Split(string(golden), "\n")
	for _, line := range strings.Split(have, "\n") {
		if !slices.Contains(wantLines, line) {
			t.Errorf("new: %s", line)
		}
	}
	for _, line := range wantLines {
		if !slices.Contains(strings.Split(have, "\n"), line) {
			t.Errorf("gone: %s", line)
		}
	}
	t.Errorf("layout differs from %s: if it is meant, raise SP_SCHEMA and run go test ./pkg/datapath -run TestLayout -update", goldenFile)
}

// TestNumbersStay holds that no number of an append-only enum of the golden file was given away.
func TestNumbersStay(t *testing.T) {
	golden, err := os.ReadFile(goldenFile)
	check(t, err)
	have := layout(t, loadSpec(t))
	enum := ""
	for line := range strings.Lines(string(golden)) {
		if strings.HasPrefix(line, "enum ") {
			enum = line
		} else if !strings.HasPrefix(line, "  ") {
			enum = ""
		} else if enum != "" && !strings.Contains(have, line) {
			t.Errorf("%s:%s is no more: append, never change", strings.TrimSpace(enum), strings.TrimRight(line, "\n"))
		}
	}
}

// layout describes every type that a map or a ring shows, and the maps.
func layout(t *testing.T, spec *ebpf.CollectionSpec) string {
	t.Helper()
	types := map[string]btf.Type{}
	var out strings.Builder
	fmt.Fprintf(&out, "schema %d\n\n", datapath.Schema)
	for _, name := range slices.Sorted(maps.Keys(spec.Maps)) {
		m := spec.Maps[name]
		if !strings.HasPrefix(name, "sp_") {
			continue // the section that keeps types in the BTF
		}
		collect(types, m.Key)
		collect(types, m.Value)
		fmt.Fprintf(&out, "map %s %s key %s value %s entries %d flags %d\n", name, m.Type, named(m.Key), named(m.Value), m.MaxEntries, m.Flags)
	}
	for _, name := range []string{"sp_event", "sp_flags"} { // in no map
		typ, err := spec.Types.AnyTypeByName(name)
		check(t, err)
		collect(types, typ)
	}
	for _, name := range slices.Sorted(maps.Keys(types)) {
		out.WriteString("\n" + describe(t, types[name]))
	}
	return out.String()
}

// collect gathers the named types below one.
func collect(into map[string]btf.Type, typ btf.Type) {
	switch v := btf.UnderlyingType(typ).(type) {
	case *btf.Struct:
		into["struct "+v.Name] = v
		for _, m := range v.Members {
			collect(into, m.Type)
		}
	case *btf.Enum:
		into["enum "+v.Name] = v
	case *btf.Array:
		collect(into, v.Type)
	}
}

func describe(t *testing.T, typ btf.Type) string {
	t.Helper()
	var out strings.Builder
	switch v := typ.(type) {
	case *btf.Struct:
		fmt.Fprintf(&out, "struct %s, %d bytes\n", v.Name, v.Size)
		for _, m := range v.Members {
			size, err := btf.Sizeof(m.Type)
			check(t, err)
			fmt.Fprintf(&out, "  %3d +%-3d %s %s\n", m.Offset.Bytes(), size, m.Name, named(m.Type))
		}
	case *btf.Enum:
		fmt.Fprintf(&out, "enum %s, %d bytes\n", v.Name, v.Size)
		for _, e := range v.Values {
			fmt.Fprintf(&out, "  %3d %s\n", e.Value, e.Name)
		}
	}
	return out.String()
}

func named(typ btf.Type) string {
	switch v := typ.(type) {
	case nil:
		return "none"
	case *btf.Array:
		return fmt.Sprintf("%s[%d]", named(v.Type), v.Nelems)
	default:
		return v.TypeName()
	}
}

// TestNoHiddenPadding: padding is a named field, so that no stack byte leaves the kernel and keys
// compare as Go writes them.
func TestNoHiddenPadding(t *testing.T) {
	spec := loadSpec(t)
	types := map[string]btf.Type{}
	for _, m := range spec.Maps {
		collect(types, m.Key)
		collect(types, m.Value)
	}
	for name, typ := range types {
		s, ok := typ.(*btf.Struct)
		if !ok {
			continue
		}
		end := uint32(0)
		for _, m := range s.Members {
			if m.Offset.Bytes() != end {
				t.Errorf("%s has a hole before %s", name, m.Name)
			}
			size, err := btf.Sizeof(m.Type)
			check(t, err)
			end = m.Offset.Bytes() + uint32(size)
		}
		if end != s.Size {
			t.Errorf("%s has a hole at its end", name)
		}
	}
}

// TestEnumsHaveGoNames: every value in C has a name and the same number in Go.
func TestEnumsHaveGoNames(t *testing.T) {
	spec := loadSpec(t)
	parsers := map[string]func(string) (uint32, error){
		"sp_reason":     func(s string) (uint32, error) { v, err := flow.ParseReason(s); return uint32(v), err },
		"sp_verdict":    func(s string) (uint32, error) { v, err := flow.ParseVerdict(s); return uint32(v), err },
		"sp_event_kind": func(s string) (uint32, error) { v, err := flow.ParseEvent(s); return uint32(v), err },
	}
	for name, parse := range parsers {
		values := enumOf(t, spec, name)
		for label, v := range values {
			_, short, _ := strings.Cut(strings.TrimPrefix(label, "SP_"), "_") // VERDICT_, REASON_, EVENT_
			if got, err := parse(short); err != nil || uint64(got) != v {
				t.Errorf("%s is %d in C, %d in Go (%v)", label, v, got, err)
			}
		}
		if name == "sp_reason" && len(values) != len(flow.Reasons()) {
			t.Errorf("C has %d reasons, Go %d", len(values), len(flow.Reasons()))
		}
	}
	same := map[string]map[string]uint64{
		"sp_state": {"SP_PATH_FREE": uint64(datapath.PathFree), "SP_PATH_PENDING": uint64(datapath.PathPending), "SP_PATH_ACTIVE": uint64(datapath.PathActive),
			"SP_PATH_REVOKED": uint64(datapath.PathRevoked), "SP_PATH_EXPIRED": uint64(datapath.PathExpired), "SP_PATH_SPENT": uint64(datapath.PathSpent)},
		"sp_target": {"SP_TARGET_NONE": 0, "SP_TARGET_HOST": uint64(datapath.TargetHost), "SP_TARGET_POD": uint64(datapath.TargetPod),
			"SP_TARGET_REMOTE": uint64(datapath.TargetRemote)},
	}
	for name, want := range same {
		if have := enumOf(t, spec, name); !maps.Equal(have, want) {
			t.Errorf("%s is %v in C, %v in Go", name, have, want)
		}
	}
}

func enumOf(t *testing.T, spec *ebpf.CollectionSpec, name string) map[string]uint64 {
	t.Helper()
	var e *btf.Enum
	check(t, spec.Types.TypeByName(name, &e))
	out := map[string]uint64{}
	for _, v := range e.Values {
		out[v.Name] = v.Value
	}
	return out
}

// TestCountersHoldEveryReason: a reason without a counter would be lost.
func TestCountersHoldEveryReason(t *testing.T) {
	room := loadSpec(t).Maps["sp_counters"].MaxEntries
	for _, r := range flow.Reasons() {
		if uint32(r) >= room {
			t.Errorf("%s is %d, sp_counters has %d entries", r, r, room)
		}
	}
}
