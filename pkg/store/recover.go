package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Names beside the store's file. The epoch that follows is part of them, so that file and epoch tell of each other.
const (
	sufBegun   = "-begun"    // a new store that is not whole yet
	sufNext    = "-next-"    // one that is: it only waits for its place
	sufDamaged = ".damaged-" // what was in that place
)

// besideFiles are what belongs to the file, the file last.
var besideFiles = []string{"-wal", "-shm", "-journal", "-count", ""}

// Recovered is what Recover made of a damaged store.
type Recovered struct {
	File   string // the damaged file as it is kept for people; log and count file are beside it
	Epoch  string // of the store that took its place
	Before string // of the damaged one; empty: nobody can tell

	// What held, and was taken over.
	Entries, Grants, Statements, Notes, Flows int
	// Broken are the parts of which something does not hold, or cannot be read.
	Broken []string
	// Lost is how many numbers of the critical class are gone that the collector is not known to have. With Unsure nobody
	// knows where they ended, and it is the most there can have been.
	Lost   uint64
	Unsure bool
}

// Recover puts a new store in the place of one that Open called damaged: with an epoch of its own, with what holds of the
// old one, and in doubt, as ids of used grants may be gone. It sets the damaged files aside and changes nothing in them.
// tell gives the critical entries that tell of it; they are in the new store before it is the store.
//
// Entries keep their bytes and take new numbers, and so do flow numbers that the collector is not known to have: what is not
// there of them is lost in the new epoch, and counted there. The collector may get again what it had not acknowledged.
//
// A kill at any moment leaves a damaged store, or one that Open calls damaged until Recover goes on. Nobody else may have the store open.
func Recover(path string, tell func(Recovered) ([]Item, error)) (Recovered, error) {
	return recoverSized(path, pages{most: maxPages, kept: keptPages, disk: keptBytes}, tell)
}

func recoverSized(path string, p pages, tell func(Recovered) ([]Item, error)) (r Recovered, err error) {
	abs, err := filepath.Abs(path)
	if err == nil {
		r, err = recoverAt(abs, p, tell)
	}
	if err != nil {
		return Recovered{}, fmt.Errorf("recover store %s: %w", abs, ofFile(classify(err)))
	}
	return r, nil
}

func recoverAt(path string, p pages, tell func(Recovered) ([]Item, error)) (Recovered, error) {
	epoch, err := nextEpoch(path)
	if err != nil {
		return Recovered{}, err
	}
	r := Recovered{File: path + sufDamaged + epoch, Epoch: epoch}
	if epoch == "" {
		kept := ballast{path: path + "-kept", size: p.disk}
		r, err = begin(path, p, tell)
		for Unwritable(ofFile(classify(err))) && kept.throw() {
			r, err = begin(path, p, tell)
		}
		if err != nil {
			return Recovered{}, err
		}
	}
	for _, step := range replaceSteps(path, r.Epoch) {
		if err := step(); err != nil {
			return Recovered{}, err
		}
	}
	return r, nil
}

// nextEpoch finds a whole new store that waits for its place, by its epoch. Empty: there is none.
func nextEpoch(path string) (string, error) {
	files, err := os.ReadDir(filepath.Dir(path))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	for _, f := range files {
		if epoch, ok := strings.CutPrefix(f.Name(), filepath.Base(path)+sufNext); ok {
			return epoch, nil
		}
	}
	return "", err
}

// replaceSteps take the damaged files out of the way and put the new store in their place. Each can be done again.
func replaceSteps(path, epoch string) (steps []func() error) {
	for _, suffix := range besideFiles {
		steps = append(steps, func() error {
			err := os.Rename(path+suffix, path+sufDamaged+epoch+suffix)
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		})
	}
	return append(steps,
		func() error { return syncDir(filepath.Dir(path)) },
		func() error { return os.Rename(path+sufNext+epoch, path) },
		func() error { return syncDir(filepath.Dir(path)) })
}

// begin makes the new store beside the damaged one, whole, and names it as such.
func begin(path string, p pages, tell func(Recovered) ([]Item, error)) (Recovered, error) {
	ctx := context.Background()
	beside := path + sufBegun
	for _, suffix := range besideFiles { // of one that never was whole
		if err := os.Remove(beside + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return Recovered{}, err
		}
	}
	boot, err := bootID()
	if err != nil {
		return Recovered{}, err
	}
	if err := makePrivate(beside); err != nil {
		return Recovered{}, err
	}
	s := &Store{path: beside, boot: boot, pages: p}
	s.db = sql.OpenDB(connector{s})
	s.db.SetMaxOpenConns(1)
	r, err := s.takeFrom(ctx, path, tell)
	if err = errors.Join(err, s.closeFiles()); err != nil {
		return Recovered{}, err
	}
	if _, err := os.Stat(beside + "-wal"); !errors.Is(err, fs.ErrNotExist) {
		return Recovered{}, fmt.Errorf("%w: the log of the new store is still there", ErrUnwritable)
	}
	if err := os.Rename(beside, path+sufNext+r.Epoch); err != nil {
		return Recovered{}, err
	}
	return r, syncDir(filepath.Dir(path))
}

// takeFrom fills a new store with what holds of a damaged one.
func (s *Store) takeFrom(ctx context.Context, damaged string, tell func(Recovered) ([]Item, error)) (r Recovered, err error) {
	if err := s.migrate(ctx); err != nil {
		return r, err
	}
	old := openRemains(ctx, damaged, s.boot)
	defer old.close()
	if _, err := s.update(ctx, urgent, func(tx *sql.Tx, h *head) error {
		t := taker{remains: old, tx: tx, h: h, room: uint64(s.pages.most) * pageSize / leastEntry}
		if r, err = t.take(ctx, damaged); err != nil {
			return err
		}
		items, err := tell(r)
		for _, it := range items {
			err = errors.Join(err, appendEntry(ctx, tx, h, it))
		}
		return err
	}); err != nil {
		return r, err
	}
	_, err = s.verify(ctx)
	return r, err
}
