package leak

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
)

// mount is one row of mountinfo.
type mount struct{ point, kind string }

func mountTable() ([]mount, error) {
	b, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	var all []mount
	for line := range strings.Lines(string(b)) {
		left, right, ok := strings.Cut(line, " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if ok && len(l) >= 5 && len(r) >= 1 {
			all = append(all, mount{l[4], r[0]})
		}
	}
	return all, nil
}

// mounts lists namespace files, bpffs mounts, and the pins in them.
func (v *view) mounts() (snapshot, error) {
	all, err := mountTable()
	s := snapshot{}
	for _, m := range all {
		if m.kind != "nsfs" && m.kind != "bpf" {
			continue
		}
		v.add(s, object{"mount", m.point}, m.kind)
		if m.kind == "bpf" {
			err = errors.Join(err, v.pins(s, m.point))
		}
	}
	return s, err
}

// add takes down what is at a path.
func (v *view) add(s snapshot, o object, line string) {
	s[o] = line
	if v.isForeign(o.id) {
		v.foreign[o] = true
	}
}

func (v *view) pins(s snapshot, dir string) error {
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // unpinned since
		}
		if err != nil {
			return err
		}
		if path == dir || strings.HasSuffix(path, ".debug") { // the kernel's own two files
			return nil
		}
		o := object{"pin", path}
		v.add(s, o, "on bpffs")
		if !d.IsDir() && v.foreign[o] {
			v.notePin(path)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("list pins: %w", err)
	}
	return nil
}

// controlGroups lists control groups with Sallyport in their name.
func (v *view) controlGroups() (snapshot, error) {
	all, err := mountTable()
	s := snapshot{}
	for _, m := range all {
		if m.kind != "cgroup" && m.kind != "cgroup2" {
			continue
		}
		werr := filepath.WalkDir(m.point, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return nil // removed since
			}
			if d.IsDir() && strings.Contains(d.Name(), "sallyport") {
				v.add(s, object{"control group", path}, m.kind)
			}
			return nil
		})
		err = errors.Join(err, werr)
	}
	return s, err
}

// devices lists network devices of the test's own namespace that are named as ours.
func (v *view) devices() (snapshot, error) {
	all, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	s := snapshot{}
	for _, d := range all {
		if strings.HasPrefix(d.Name, "px") || strings.HasPrefix(d.Name, "sp") {
			s[object{"device", d.Name}] = "in the test's own namespace"
		}
	}
	return s, nil
}

// namespaces lists network namespaces that this process still holds open or has a thread in.
func (v *view) namespaces() (snapshot, error) {
	home, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("read own namespace: %w", err)
	}
	s := snapshot{}
	for _, pattern := range []string{"/proc/self/fd/*", "/proc/self/task/*/ns/net"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			return nil, fmt.Errorf("list descriptors: %w", err)
		}
		for _, f := range files {
			to, err := os.Readlink(f)
			if err == nil && to != home && strings.HasPrefix(to, "net:[") {
				s[object{"namespace", to}] = "held by " + f
			}
		}
	}
	return s, nil
}
