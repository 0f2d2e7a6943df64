package store

import (
	"context"
	"database/sql"
	"fmt"
)

// Pages are 4 KiB: the store takes at most 1 GiB, and the last 64 MiB of it are for what must not be kept out by the rest.
const (
	maxPages  = 1 << 18
	keptPages = 1 << 14
	keptBytes = 4 << 20 // on the disk, where others may take the rest

	thrownBytes = 256 << 10 // of those, at a time: more than one write of a person takes
)

// class is what a write is for.
type class int

const (
	common class = iota // workloads' grants, records of flows, refusals and the like: they leave the last part alone
	urgent              // what people begin, and whatever ends, takes away or makes room
)

// pages is how much of the store there is.
type pages struct {
	most int   // of the file
	kept int   // of those, for urgent writes
	disk int64 // bytes that are kept on the disk for urgent writes
}

// check refuses a common write that would leave less than what is kept. Pages that were given back count as free.
func (p pages) check(ctx context.Context, tx *sql.Tx, c class) error {
	if c == urgent {
		return nil
	}
	var used int
	if err := tx.QueryRowContext(ctx, `SELECT (SELECT page_count FROM pragma_page_count) - (SELECT freelist_count FROM pragma_freelist_count)`).Scan(&used); err != nil {
		return err
	}
	if used > p.most-p.kept {
		return fmt.Errorf("%w: the rest of it is kept for people, and for what ends", ErrFull)
	}
	return nil
}
