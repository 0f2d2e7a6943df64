package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf/link"
)

// Report is what Uninstall removed.
type Report struct {
	Links int // detached
	Maps  int // unpinned
}

// Uninstall detaches every link under dir, whoever else holds it, and removes all pins. It goes on
// after an error and returns all of them. It can be repeated.
func Uninstall(dir string) (Report, error) {
	var r Report
	var errs []error
	pins, err := readPins(linksDir(dir))
	errs = append(errs, err)
	for _, pin := range pins {
		if err := detachPinned(pin); err != nil {
			errs = append(errs, err)
			continue
		}
		r.Links++
	}
	pins, err = readPins(mapsDir(dir))
	errs = append(errs, err)
	for _, pin := range pins {
		if err := os.Remove(pin); err != nil {
			errs = append(errs, fmt.Errorf("unpin map: %w", err))
			continue
		}
		r.Maps++
	}
	for _, d := range []string{linksDir(dir), mapsDir(dir), version(dir), dir} {
		if err := os.Remove(d); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove pin directory: %w", err))
		}
	}
	return r, errors.Join(errs...)
}

func readPins(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read pins: %w", err)
	}
	var pins []string
	for _, e := range entries {
		pins = append(pins, filepath.Join(dir, e.Name()))
	}
	return pins, nil
}

// detachPinned detaches before it unpins: the guard may hold the link too. A link whose place is gone
// cannot be detached any more (ENOLINK) and need not be.
func detachPinned(pin string) error {
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return fmt.Errorf("open link %s: %w", filepath.Base(pin), err)
	}
	defer closeLink(l)
	if attachedSomewhere(l) {
		if err := l.Detach(); err != nil {
			return fmt.Errorf("detach %s: %w", filepath.Base(pin), err)
		}
	}
	if err := os.Remove(pin); err != nil {
		return fmt.Errorf("unpin link: %w", err)
	}
	return nil
}
