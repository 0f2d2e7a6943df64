package collector

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/proof"
)

// head is the log up to its last leaf. A copy of it stays as it is: nothing is changed in place.
type head struct {
	size       int64
	edge       map[int64]tlog.Hash // by tlog's index: what the root and the next leaf are made of
	checkpoint []byte
}

// ReadHashes reads from the edge alone.
func (h head) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for i, x := range indexes {
		hash, ok := h.edge[x]
		if !ok {
			return nil, fmt.Errorf("hash %d of the log is not at its edge, with %d leaves", x, h.size)
		}
		out[i] = hash
	}
	return out, nil
}

// grow returns the log with one leaf more, which needs a new checkpoint, and the hashes that come with the leaf, from index first on.
func (h head) grow(leaf []byte) (grown head, first int64, hashes []tlog.Hash, err error) {
	if hashes, err = tlog.StoredHashes(h.size, leaf, h); err != nil {
		return head{}, 0, nil, err
	}
	first = tlog.StoredHashIndex(0, h.size)
	grown = head{size: h.size + 1, edge: map[int64]tlog.Hash{}}
	for _, x := range edgeIndexes(grown.size) {
		if x >= first {
			grown.edge[x] = hashes[x-first]
		} else {
			grown.edge[x] = h.edge[x]
		}
	}
	return grown, first, hashes, nil
}

// sign makes the checkpoint.
func (h *head) sign(signer note.Signer) error {
	root, err := tlog.TreeHash(h.size, *h)
	if err == nil {
		h.checkpoint, err = proof.Checkpoint{Origin: signer.Name(), Size: h.size, Root: root}.Sign(signer)
	}
	if err != nil {
		return fmt.Errorf("sign checkpoint of %d leaves: %w", h.size, err)
	}
	return nil
}

// check holds what was read against its own checkpoint: the log is not to go on from anything else.
func (h head) check(key note.Verifier) error {
	c, err := proof.OpenCheckpoint(h.checkpoint, key)
	if err != nil && !bytes.Contains(h.checkpoint, []byte(key.Name())) {
		return fmt.Errorf("%w: %s is not the key of these records", err, keyFile)
	}
	root, rootErr := tlog.TreeHash(h.size, h)
	if err != nil || rootErr != nil || c.Size != h.size || c.Root != root {
		return fmt.Errorf("%w: the log has other hashes than its checkpoint says, at %d leaves", errDamaged, h.size)
	}
	return nil
}

// grown is a checkpoint, with the proof that the log has only grown since it had from leaves; 0: no proof.
func grown(ctx context.Context, e engine, h head, from int64) (*api.Grown, error) {
	g := &api.Grown{Checkpoint: h.checkpoint}
	if from == 0 {
		return g, nil
	}
	p, err := tlog.ProveTree(h.size, from, newHashReader(ctx, e))
	if err != nil {
		return nil, err
	}
	g.From = uint64(from)
	for _, hash := range p {
		g.Proof = append(g.Proof, hash[:])
	}
	return g, nil
}

// edgeIndexes are the indexes of the hashes that the root of n leaves is made of. tlog tells them by asking for them.
func edgeIndexes(n int64) (indexes []int64) {
	_, _ = tlog.TreeHash(n, tlog.HashReaderFunc(func(x []int64) ([]tlog.Hash, error) {
		indexes = slices.Clone(x)
		return make([]tlog.Hash, len(x)), nil
	}))
	return indexes
}

func readEdge(ctx context.Context, db *sql.DB, size int64) (map[int64]tlog.Hash, error) {
	edge := map[int64]tlog.Hash{}
	for _, x := range edgeIndexes(size) {
		h, err := readHash(ctx, db, x)
		if errors.Is(err, sql.ErrNoRows) {
			err = fmt.Errorf("%w: it is not there", errDamaged)
		}
		if err != nil {
			return nil, fmt.Errorf("read hash %d of the log: %w", x, err)
		}
		edge[x] = h
	}
	return edge, nil
}

func readHash(ctx context.Context, db *sql.DB, at int64) (h tlog.Hash, err error) {
	var b []byte
	if err := db.QueryRowContext(ctx, `SELECT hash FROM hashes WHERE idx = ?`, at).Scan(&b); err != nil {
		return h, err
	}
	if len(b) != tlog.HashSize {
		return h, fmt.Errorf("%w: it has %d bytes", errDamaged, len(b))
	}
	return tlog.Hash(b), nil
}

// archive has the hashes of days that are gone, so that proofs go on without their records.
type archive struct{ file *dayFile }

func newArchive(dir string) archive {
	return archive{&dayFile{day: "of the log", path: filepath.Join(dir, "log"+daySuffix)}}
}

// keep copies a day's hashes. It has to return before the day is removed.
func (a archive) keep(ctx context.Context, f *dayFile) error {
	_, err := a.file.write(func(db *sql.DB) error {
		conn, err := db.Conn(ctx)
		if err != nil {
			return err
		}
		defer conn.Close()
		if _, err := conn.ExecContext(ctx, `CREATE TABLE IF NOT EXISTS hashes (idx INTEGER PRIMARY KEY, hash BLOB NOT NULL) STRICT`); err != nil {
			return err
		}
		if _, err := conn.ExecContext(ctx, `ATTACH ? AS day`, f.path); err != nil {
			return err
		}
		_, err = conn.ExecContext(ctx, `INSERT OR IGNORE INTO main.hashes SELECT idx, hash FROM day.hashes`)
		_, detached := conn.ExecContext(ctx, `DETACH day`)
		return errors.Join(err, detached)
	})
	if err != nil {
		return fmt.Errorf("keep the hashes of day %s: %w", f.day, err)
	}
	return nil
}
