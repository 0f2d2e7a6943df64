package datapath

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
)

// checkLayout compares what a pinned map holds with what this version reads and writes: the size and
// every field of key and value. Two versions that differ in padding alone understand each other.
func checkLayout(name string, pinned *ebpf.Map, want *ebpf.MapSpec) error {
	if pinned.KeySize() != want.KeySize || pinned.ValueSize() != want.ValueSize {
		return layoutError(name, "", fmt.Sprintf("key and value have %d and %d bytes, this version has %d and %d",
			pinned.KeySize(), pinned.ValueSize(), want.KeySize, want.ValueSize))
	}
	handle, err := pinned.Handle()
	if errors.Is(err, ebpf.ErrNotSupported) {
		if isStruct(want.Key) || isStruct(want.Value) {
			return layoutError(name, "", "it does not say what it holds")
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("read types of map %s: %w", name, err)
	}
	defer handle.Close()
	types, err := handle.Spec(nil)
	if err != nil {
		return fmt.Errorf("read types of map %s: %w", name, err)
	}
	for _, t := range []btf.Type{want.Key, want.Value} {
		if !isStruct(t) {
			continue
		}
		have, err := types.AnyTypeByName(btf.UnderlyingType(t).TypeName())
		if err != nil {
			return layoutError(name, "", "it has no "+btf.UnderlyingType(t).TypeName())
		}
		if field, why := differ(t.TypeName(), have, t); why != "" {
			return layoutError(name, field, why)
		}
	}
	return nil
}

// checkTable compares the table of services that is in force.
func checkTable(services *ebpf.Map, want *ebpf.MapSpec) error {
	var id ebpf.MapID
	if err := services.Lookup(uint32(0), &id); isMissing(err) {
		return nil
	} else if err != nil {
		return fmt.Errorf("read services: %w", err)
	}
	table, err := ebpf.NewMapFromID(id)
	if errors.Is(err, os.ErrNotExist) { // replaced since
		return nil
	}
	if err != nil {
		return fmt.Errorf("open table of services: %w", err)
	}
	defer table.Close()
	return checkLayout("sp_table", table, want)
}

func isStruct(t btf.Type) bool {
	if t == nil {
		return false
	}
	_, ok := btf.UnderlyingType(t).(*btf.Struct)
	return ok
}

func layoutError(name, field, why string) error {
	if field != "" {
		why = field + " " + why
	}
	return fmt.Errorf("%w: map %s: %s: uninstall with the version that made it", ErrLayout, name, why)
}

// differ names the first field in which two types differ, and how; why is empty if there is none.
func differ(path string, have, want btf.Type) (field, why string) {
	have, want = btf.UnderlyingType(have), btf.UnderlyingType(want)
	switch w := want.(type) {
	case *btf.Struct:
		if h, ok := have.(*btf.Struct); ok && h.Size == w.Size {
			return differFields(path, h, w)
		}
	case *btf.Int:
		if h, ok := have.(*btf.Int); ok && h.Size == w.Size {
			return "", ""
		}
	case *btf.Enum:
		if h, ok := have.(*btf.Enum); ok && h.Size == w.Size {
			return differNumbers(path, h, w)
		}
	case *btf.Array:
		if h, ok := have.(*btf.Array); ok && h.Nelems == w.Nelems {
			return differ(path, h.Type, w.Type)
		}
	default:
		return path, "is of a kind that no map has"
	}
	return path, "is " + describeType(have) + ", this version has " + describeType(want)
}

func differFields(path string, have, want *btf.Struct) (field, why string) {
	for _, pair := range []struct{ of, in *btf.Struct }{{want, have}, {have, want}} {
		for _, m := range pair.of.Members {
			other, ok := member(pair.in, m)
			switch {
			case isPadding(m.Name) || !ok && padded(pair.in, m):
			case !ok && pair.of == want:
				return path + "." + m.Name, "is not in it"
			case !ok:
				return path + "." + m.Name, "is not in this version"
			case other.Offset != m.Offset:
				return path + "." + m.Name, "has moved"
			default:
				if field, why = differ(path+"."+m.Name, other.Type, m.Type); why != "" {
					return field, why
				}
			}
		}
	}
	return "", ""
}

func member(s *btf.Struct, like btf.Member) (btf.Member, bool) {
	for _, m := range s.Members {
		if m.Name == like.Name {
			return m, true
		}
	}
	return btf.Member{}, false
}

func isPadding(name string) bool { return strings.HasPrefix(name, "pad") }

// padded says whether the struct has nothing but padding where the field is.
func padded(s *btf.Struct, f btf.Member) bool {
	size, err := btf.Sizeof(f.Type)
	if err != nil {
		return false
	}
	for _, m := range s.Members {
		if own, err := btf.Sizeof(m.Type); err == nil && isPadding(m.Name) &&
			m.Offset.Bytes() <= f.Offset.Bytes() && f.Offset.Bytes()+uint32(size) <= m.Offset.Bytes()+uint32(own) {
			return true
		}
	}
	return false
}

// differNumbers finds a number that was given away: new ones may come.
func differNumbers(path string, have, want *btf.Enum) (field, why string) {
	for _, w := range want.Values {
		for _, h := range have.Values {
			if h.Name == w.Name && h.Value != w.Value {
				return path + "." + w.Name, fmt.Sprintf("is %d, this version has %d", h.Value, w.Value)
			}
		}
	}
	return "", ""
}

func describeType(t btf.Type) string {
	size, _ := btf.Sizeof(t)
	return fmt.Sprintf("%s %s of %d bytes", strings.ToLower(strings.TrimPrefix(fmt.Sprintf("%T", t), "*btf.")), t.TypeName(), size)
}
