package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"

	"github.com/cilium/ebpf"
)

// pinned is a map or a link: what can be pinned, and pinned again.
type pinned interface {
	Pin(path string) error
	Unpin() error
}

// Repin puts back pins that somebody removed, and says how many: by them the next agent finds the
// datapath, and people find it with bpftool. It goes on after an error and returns all of them. The
// error wraps ErrBPFFS when the bpffs is gone.
func (d *Datapath) Repin() (n int, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := CheckBPFFS(d.cfg.Dir); err != nil {
		return 0, err
	}
	if err := makePinDirs(d.cfg.Dir); err != nil {
		return 0, err
	}
	var errs []error
	for path, p := range d.pins() {
		again, err := repin(p, path)
		errs = append(errs, err)
		if again {
			n++
		}
	}
	return n, errors.Join(errs...)
}

// pins are what should be pinned, by path.
func (d *Datapath) pins() map[string]pinned {
	all := make(map[string]pinned)
	for name, m := range d.objs.maps() {
		all[filepath.Join(mapsDir(d.cfg.Dir), name)] = m
	}
	all[filepath.Join(mapsDir(d.cfg.Dir), recordedMap)] = d.tallies.m
	all[filepath.Join(mapsDir(d.cfg.Dir), receivedMap)] = d.received.m
	for name, p := range d.objs.programs() {
		all[filepath.Join(currentDir(d.cfg.Dir), name)] = p
	}
	for key, a := range d.devices {
		if l, ok := a.hold.(pinned); ok {
			all[filepath.Join(linksDir(d.cfg.Dir), key)] = l
		}
	}
	for ifindex, x := range d.xdp {
		if x.link != nil {
			all[filepath.Join(linksDir(d.cfg.Dir), xdpKey(ifindex))] = x.link
		}
	}
	for name, l := range d.backstop {
		all[filepath.Join(linksDir(d.cfg.Dir), name)] = l
	}
	return all
}

// maps are the pinned maps by their names.
func (o *objects) maps() map[string]*ebpf.Map {
	all := make(map[string]*ebpf.Map)
	fields := reflect.ValueOf(o.SallyportMaps)
	for i := range fields.NumField() {
		if name := fields.Type().Field(i).Tag.Get("ebpf"); !unpinned(name) {
			all[name] = fields.Field(i).Interface().(*ebpf.Map)
		}
	}
	return all
}

// repin forgets the removed pin first: the library takes a known one for there.
func repin(p pinned, path string) (again bool, err error) {
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	if err := errors.Join(p.Unpin(), p.Pin(path)); err != nil {
		return false, fmt.Errorf("pin %s again: %w", filepath.Base(path), err)
	}
	return true, nil
}

func makePinDirs(dir string) error {
	for _, d := range []string{mapsDir(dir), linksDir(dir), currentDir(dir)} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return fmt.Errorf("make pin directory: %w", err)
		}
	}
	return nil
}

// unpinned names the maps that outlive nothing: sp_table is only the form of what sp_services holds,
// and sp_scratch means nothing to the next packet.
func unpinned(name string) bool { return name == "sp_table" || name == "sp_scratch" }
