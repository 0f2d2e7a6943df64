package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/cilium/ebpf/link"
)

// Report is what Uninstall removed.
type Report struct {
	Links int // detached, or filters deleted
	Maps  int // unpinned
}

// Uninstall detaches every link under dir, whoever else holds it, removes each qdisc that we made and
// nobody else uses from the devices of the current network namespace, and removes all pins. It goes
// on after an error and returns all of them. It can be repeated.
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
	filters, err := dropQdiscs(dir)
	errs = append(errs, err)
	r.Links += filters
	pins, err = readPins(mapsDir(dir))
	errs = append(errs, err)
	for _, pin := range pins {
		if err := os.Remove(pin); err != nil {
			errs = append(errs, fmt.Errorf("unpin map: %w", err))
			continue
		}
		r.Maps++
	}
	errs = append(errs, removePins(currentDir(dir)), removePins(previousDir(dir)))
	for _, d := range []string{filepath.Dir(currentDir(dir)), linksDir(dir), qdiscsDir(dir), mapsDir(dir), version(dir), dir} {
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

// dropQdiscs removes the qdiscs that we made.
func dropQdiscs(dir string) (filters int, err error) {
	notes, err := readPins(qdiscsDir(dir))
	errs := []error{err}
	for _, note := range notes {
		ifindex, err := strconv.Atoi(filepath.Base(note))
		if err != nil {
			errs = append(errs, fmt.Errorf("read note of qdisc: %w", err))
			continue
		}
		n, err := dropQdisc(ifindex)
		filters += n
		if err == nil {
			err = forgetQdisc(dir, ifindex)
		}
		errs = append(errs, err)
	}
	return filters, errors.Join(errs...)
}

// forgetQdisc removes the note that a device's qdisc is ours.
func forgetQdisc(dir string, ifindex int) error {
	err := os.Remove(filepath.Join(qdiscsDir(dir), strconv.Itoa(ifindex)))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("forget qdisc: %w", err)
	}
	return nil
}
