package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// ErrNoPrevious says that no programs of another version are kept.
var ErrNoPrevious = errors.New("no previous programs are kept")

func currentDir(dir string) string  { return filepath.Join(version(dir), "progs", "current") }
func previousDir(dir string) string { return filepath.Join(version(dir), "progs", "previous") }

// programs are the loaded programs by their names.
func (o *objects) programs() map[string]*ebpf.Program {
	all := make(map[string]*ebpf.Program)
	fields := reflect.ValueOf(o.SallyportPrograms)
	for i := range fields.NumField() {
		all[fields.Type().Field(i).Tag.Get("ebpf")] = fields.Field(i).Interface().(*ebpf.Program)
	}
	return all
}

// keepPrograms pins the programs of this version, and keeps those that ran before, if they differ, as
// the previous ones.
func (d *Datapath) keepPrograms() error {
	current, previous := currentDir(d.cfg.Dir), previousDir(d.cfg.Dir)
	ours := d.objs.programs()
	if same, err := samePrograms(current, ours); same || err != nil {
		return err
	}
	pins, err := readPins(current)
	if err != nil {
		return err
	}
	if len(pins) > 0 {
		if err := errors.Join(removePins(previous), os.Rename(current, previous)); err != nil {
			return fmt.Errorf("keep previous programs: %w", err)
		}
	}
	if err := os.MkdirAll(current, 0o700); err != nil {
		return fmt.Errorf("make pin directory: %w", err)
	}
	for name, p := range ours {
		if err := p.Pin(filepath.Join(current, name)); err != nil {
			return fmt.Errorf("pin program %s: %w", name, err)
		}
	}
	return nil
}

// samePrograms says whether what is pinned below dir has the code of the programs.
func samePrograms(dir string, ours map[string]*ebpf.Program) (bool, error) {
	for name, p := range ours {
		pinned, err := ebpf.LoadPinnedProgram(filepath.Join(dir, name), nil)
		if errors.Is(err, os.ErrNotExist) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("open pinned program %s: %w", name, err)
		}
		have, haveErr := pinned.Info()
		want, wantErr := p.Info()
		if err := errors.Join(haveErr, wantErr, pinned.Close()); err != nil {
			return false, fmt.Errorf("read program %s: %w", name, err)
		}
		if have.Tag != want.Tag {
			return false, nil
		}
	}
	return true, nil
}

// Rollback gives every hook under dir the program of the version before, in place and on the same maps,
// and keeps those that ran as the previous ones. No agent may run: it would put its own back, as the next
// one does. It works on the current network namespace and on px. It goes on after an error and returns
// all of them.
func Rollback(dir, pxNetns string) (hooks int, err error) {
	previous, err := loadPrograms(previousDir(dir))
	if err != nil {
		return 0, err
	}
	defer previous.close()
	pins, err := readPins(linksDir(dir))
	errs := []error{err}
	for _, pin := range pins {
		n, err := previous.intoLink(pin)
		hooks += n
		errs = append(errs, err)
	}
	n, err := previous.intoFilters()
	hooks += n
	errs = append(errs, err, inNetns(pxNetns, func() error {
		n, err := previous.intoFilters()
		hooks += n
		return err
	}))
	if err := errors.Join(errs...); err != nil {
		return hooks, err
	}
	return hooks, swap(currentDir(dir), previousDir(dir))
}

// CanRollback says whether programs of another version are kept: ErrNoPrevious if there are none.
func CanRollback(dir string) error {
	previous, err := loadPrograms(previousDir(dir))
	previous.close()
	return err
}

// programSet are programs by their names.
type programSet map[string]*ebpf.Program

func loadPrograms(dir string) (programSet, error) {
	pins, err := readPins(dir)
	if err != nil {
		return nil, err
	}
	if len(pins) == 0 {
		return nil, ErrNoPrevious
	}
	set := programSet{}
	for _, pin := range pins {
		p, err := ebpf.LoadPinnedProgram(pin, nil)
		if err != nil {
			set.close()
			return nil, fmt.Errorf("open pinned program %s: %w", filepath.Base(pin), err)
		}
		set[filepath.Base(pin)] = p
	}
	return set, nil
}

func (s programSet) close() {
	for _, p := range s {
		_ = p.Close()
	}
}

// intoLink updates one link. A program that the version before did not have stays: it only closes more.
func (s programSet) intoLink(pin string) (n int, err error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return 0, fmt.Errorf("open link %s: %w", filepath.Base(pin), err)
	}
	defer closeLink(l)
	if !attachedSomewhere(l) {
		return 0, nil
	}
	info, err := l.Info()
	if err != nil {
		return 0, fmt.Errorf("read link %s: %w", filepath.Base(pin), err)
	}
	name, err := programName(info.Program)
	if err != nil || s[name] == nil {
		return 0, err
	}
	if err := l.Update(s[name]); err != nil {
		return 0, fmt.Errorf("update link %s: %w", filepath.Base(pin), err)
	}
	return 1, nil
}

// intoFilters updates our filters in the current network namespace.
func (s programSet) intoFilters() (n int, err error) {
	var errs []error
	err = eachPlace(func(p place) error {
		ours, err := findOurs(p)
		if err != nil {
			return err
		}
		for _, f := range ours {
			if f.filter == 0 || s[f.name] == nil {
				continue
			}
			if err := (&filter{place: p, handle: f.filter}).put(s[f.name]); err != nil {
				errs = append(errs, fmt.Errorf("update %s on %s: %w", f.name, p, err))
				continue
			}
			n++
		}
		return nil
	})
	return n, errors.Join(append(errs, err)...)
}

// swap exchanges two directories of pins. Killed in between, the next start finds programs that are not
// its own, or none, and pins its own.
func swap(a, b string) error {
	tmp := a + "-swap"
	err := removePins(tmp)
	for _, move := range [][2]string{{a, tmp}, {b, a}, {tmp, b}} {
		if err == nil {
			err = os.Rename(move[0], move[1])
		}
	}
	if err != nil {
		return fmt.Errorf("exchange kept programs: %w", err)
	}
	return nil
}

// removePins removes a directory of pins; one that is not there is no error.
func removePins(dir string) error {
	pins, err := readPins(dir)
	errs := []error{err}
	for _, pin := range pins {
		errs = append(errs, os.Remove(pin))
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove pins: %w", err)
	}
	return nil
}
