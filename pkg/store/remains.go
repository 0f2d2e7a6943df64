package store

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
)

const (
	pageSize   = 4096
	leastEntry = 64              // bytes that an entry takes in the file, at the least
	mostGone   = uint64(1 << 40) // keeps a damaged number from using up the numbers
)

// remains are a damaged store, to be read and nothing else.
type remains struct {
	file  *Store // open for reading, and no store
	head  *head  // nil: it does not hold
	count []byte // page of the count file; nil: there is none of this store
	exact bool   // it is of this boot: no write came after it
}

func openRemains(ctx context.Context, path, boot string) *remains {
	o := &remains{file: &Store{path: path}}
	o.file.readOnly.Store(true)
	o.file.db = sql.OpenDB(connector{o.file})
	o.file.db.SetMaxOpenConns(1)
	_ = o.read(ctx, func(tx *sql.Tx) error {
		h, err := loadHead(ctx, tx)
		if err == nil {
			o.head = &h
		}
		return err
	})
	page, err := os.ReadFile(path + "-count")
	if err != nil || len(page) != countSize || !bytes.HasPrefix(page, []byte(countMagic)) ||
		o.head != nil && !bytes.Equal(page[:offBoot], countHeader(o.head.epoch, "")[:offBoot]) {
		return o
	}
	o.count, o.exact = page, bytes.Equal(page[offBoot:offWrites], countHeader("", boot)[offBoot:offWrites])
	return o
}

// close leaves the log where it is, also one in which SQLite finds nothing.
func (o *remains) close() {
	o.file.keepLog()
	_ = o.file.closeFiles()
}

// read runs f on the damaged file, in a transaction of its own: a part that breaks takes no other with it.
func (o *remains) read(ctx context.Context, f func(*sql.Tx) error) error {
	tx, err := o.file.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	return f(tx)
}

// counted is a number of the count file; 0 without one.
func (o *remains) counted(off int) uint64 {
	if o.count == nil {
		return 0
	}
	return binary.NativeEndian.Uint64(o.count[off:])
}

// epoch is what either file says; empty: nobody can tell.
func (o *remains) epoch() string {
	switch {
	case o.head != nil:
		return o.head.epoch
	case o.count != nil:
		return string(bytes.TrimRight(o.count[offEpoch:offBoot], "\x00"))
	}
	return ""
}

// known is the head as far as anybody can tell: the count file may have seen later ones.
func (o *remains) known() head {
	var h head
	if o.head != nil {
		h = *o.head
	}
	h.seq, h.baseSeq = max(h.seq, o.counted(offSeq)), max(h.baseSeq, o.counted(offBase))
	h.queued, h.flowAcked = max(h.queued, o.counted(offSettled)), max(h.flowAcked, o.counted(offFlowAcked))
	return h
}

// cutOff tells whether writes were acknowledged that the file does not have.
func (o *remains) cutOff() bool { return o.head == nil || o.counted(offWrites) > o.head.writes }

// endKnown tells whether it is certain where the numbers ended.
func (o *remains) endKnown() bool {
	return !o.cutOff() || o.exact && o.counted(offSeq) > 0
}

// taker carries what holds of a damaged store into a new one.
type taker struct {
	*remains
	tx   *sql.Tx
	h    *head  // of the new one
	room uint64 // for entries in a store
	r    Recovered

	last uint64 // number of the last entry that holds
	kept uint64 // numbers of those that were taken over
}

func (t *taker) take(ctx context.Context, damaged string) (Recovered, error) {
	t.r = Recovered{File: damaged + sufDamaged + t.h.epoch, Epoch: t.h.epoch, Before: t.epoch()}
	if t.head == nil {
		t.r.Broken = append(t.r.Broken, "head")
	} else {
		t.h.node, t.h.machine = t.head.node, t.head.machine
		t.h.latest, t.h.floor, t.h.forgotten = t.head.latest, t.head.floor, t.head.forgotten
	}
	t.flowNumbers()
	for _, part := range []struct {
		name string
		take func(context.Context, *sql.Tx) error
	}{{"entries", t.entries}, {"grants", t.grants}, {"used ids", t.usedIDs}, {"statements", t.statements}, {"notes", t.notes}, {"flow records", t.flows}} {
		err := t.read(ctx, func(old *sql.Tx) error { return part.take(ctx, old) })
		if w, ok := errors.AsType[*newStoreError](err); ok {
			return t.r, w.error
		}
		if err != nil {
			t.r.Broken = append(t.r.Broken, part.name)
		}
	}
	if err := t.useUpAll(ctx); err != nil {
		return t.r, err
	}
	t.settle()
	t.h.doubt = t.doubt()
	return t.r, nil
}

// newStoreError is one of the new store: those of the damaged one end a part of it, and no more.
type newStoreError struct{ error }

func ofNew(err error) error {
	if err != nil {
		return &newStoreError{err}
	}
	return nil
}

// errBroken says that something of a part does not hold. The rest of it may have been taken over.
var errBroken = errors.New("it does not hold")

// entries takes over those whose hash fits to the entry before, which must hold too: its number says how many this one takes.
func (t *taker) entries(ctx context.Context, old *sql.Tx) error {
	at := t.known()
	prev, holds := Entry{}, true
	prevHash := startHash(t.epoch())
	if t.head != nil {
		prev.Seq, prevHash = t.head.baseSeq, t.head.baseHash
	}
	rows, err := old.QueryContext(ctx, `SELECT seq, data, hash FROM entries WHERE seq > ? ORDER BY seq`, prev.Seq)
	if err != nil {
		return err
	}
	defer rows.Close()
	var broken error
	for rows.Next() {
		var e Entry
		var hash []byte
		if err := rows.Scan(&e.Seq, &e.Data, &hash); err != nil {
			return err
		}
		fits := e.Seq > prev.Seq && bytes.Equal(hash, entryHash(prevHash, e.Seq, e.Data))
		if !fits || !holds {
			broken = errBroken
		} else if prev.Seq >= at.baseSeq {
			if err := t.entry(ctx, e, e.Seq-prev.Seq); err != nil {
				return err
			}
		}
		prev, prevHash, holds = e, hash, fits
	}
	if err := rows.Err(); err != nil {
		return err
	}
	if !holds || prev.Seq != at.seq {
		broken = errBroken
	}
	return broken
}

func (t *taker) entry(ctx context.Context, e Entry, numbers uint64) error {
	t.last, t.kept = e.Seq, t.kept+numbers
	t.r.Entries++
	return ofNew(appendEntry(ctx, t.tx, t.h, Item{Data: e.Data, Numbers: numbers}))
}

// grants takes over rows whose sum holds. Of two of one id the one that has ended counts.
func (t *taker) grants(ctx context.Context, old *sql.Tx) error {
	rows, err := old.QueryContext(ctx, selectGrants)
	if err != nil {
		return err
	}
	defer rows.Close()
	var broken error
	for rows.Next() {
		g, err := scanGrant(rows)
		if err != nil {
			broken = errBroken
			continue
		}
		known, err := getGrant(ctx, t.tx, g.ID)
		if err == nil {
			broken = errBroken
			if known.State != StateActive {
				continue
			}
		} else if !errors.Is(err, ErrNoGrant) {
			return ofNew(err)
		} else {
			t.r.Grants++
		}
		if err := putGrant(ctx, t.tx, g); err != nil {
			return ofNew(err)
		}
	}
	return errors.Join(broken, rows.Err())
}

// usedIDs only tells whether all of them are known: useUpAll makes the new chain of the grants that there are.
func (t *taker) usedIDs(ctx context.Context, old *sql.Tx) error {
	if t.head == nil {
		return errBroken
	}
	return errors.Join(verifyReplay(ctx, old, *t.head), verifyGrants(ctx, old, *t.head))
}

// useUpAll notes the id of each grant that somebody could hand in again.
func (t *taker) useUpAll(ctx context.Context) error {
	rows, err := t.tx.QueryContext(ctx, `SELECT id, digest, not_after FROM grants WHERE not_after <> 0 ORDER BY activated, id`)
	if err != nil {
		return err
	}
	defer rows.Close()
	var used []GrantRow
	for rows.Next() {
		var g GrantRow
		var notAfter int64
		if err := rows.Scan(&g.ID, &g.Digest, &notAfter); err != nil {
			return err
		}
		g.NotAfter = instant(notAfter)
		used = append(used, g)
	}
	if err := errors.Join(rows.Err(), rows.Close()); err != nil {
		return err
	}
	for _, g := range used {
		if err := t.h.useUp(ctx, t.tx, g); err != nil {
			return err
		}
	}
	return nil
}

func (t *taker) statements(ctx context.Context, old *sql.Tx) error {
	rows, err := old.QueryContext(ctx, `SELECT digest, step, cells, hash FROM statements ORDER BY n`)
	if err != nil {
		return err
	}
	defer rows.Close()
	var broken error
	prev := startHash(t.epoch())
	for rows.Next() {
		var of, step, cells string
		var hash []byte
		if err := rows.Scan(&of, &step, &cells, &hash); err != nil {
			return err
		}
		if !bytes.Equal(hash, statementHash(prev, of, step, []byte(cells))) {
			broken = errBroken
		} else if err := t.statement(ctx, of, step, cells); err != nil {
			return err
		}
		prev = hash
	}
	if err := rows.Err(); err != nil {
		return err
	}
	if t.head == nil || !bytes.Equal(prev, t.head.statementHash) {
		broken = errBroken
	}
	return broken
}

func (t *taker) statement(ctx context.Context, of, step, cells string) error {
	t.h.statementHash = statementHash(t.h.statementHash, of, step, []byte(cells))
	t.r.Statements++
	_, err := t.tx.ExecContext(ctx, `INSERT INTO statements (digest, step, cells, hash) VALUES (?, ?, ?, ?)`, of, step, cells, t.h.statementHash)
	return ofNew(err)
}

// ofEpoch are the names of notes that speak of numbers and of the key of an epoch. They end with it.
func ofEpoch(name string) bool { return name == "seal-key" || strings.HasPrefix(name, "acked/") }

func (t *taker) notes(ctx context.Context, old *sql.Tx) error {
	rows, err := old.QueryContext(ctx, `SELECT name, data, sum FROM notes`)
	if err != nil {
		return err
	}
	defer rows.Close()
	var broken error
	for rows.Next() {
		var n Note
		var sum []byte
		if err := rows.Scan(&n.Name, &n.Data, &sum); err != nil {
			return err
		}
		switch {
		case !bytes.Equal(sum, n.sum()):
			broken = errBroken
		case !ofEpoch(n.Name):
			t.r.Notes++
			if err := putNote(ctx, t.tx, n); err != nil {
				return ofNew(err)
			}
		}
	}
	return errors.Join(broken, rows.Err())
}

// flowNumbers goes on, from 1, with those that the collector is not known to have.
func (t *taker) flowNumbers() {
	at := t.known()
	produced := max(at.flowReserved, at.flowAcked)
	switch {
	case t.exact:
		produced = max(t.counted(offFlow), at.flowAcked)
	case t.cutOff():
		produced = max(t.counted(offFlow), produced)
	}
	t.h.flowReserved = min(produced-at.flowAcked, mostGone)
	switch {
	case t.cutOff(), t.head.clean == 0: // the collector may have them
		t.h.flowUnsure = t.h.flowReserved
	case at.flowUnsure > at.flowAcked:
		t.h.flowUnsure = min(at.flowUnsure-at.flowAcked, t.h.flowReserved)
	}
}

// flows takes over the records that an orderly stop left.
func (t *taker) flows(ctx context.Context, old *sql.Tx) error {
	acked := t.known().flowAcked
	rows, err := old.QueryContext(ctx, `SELECT seq, data, sum FROM spool WHERE seq > ? AND seq <= ? ORDER BY seq`, acked, acked+t.h.flowReserved)
	if err != nil {
		return err
	}
	defer rows.Close()
	var broken error
	for rows.Next() {
		var e Entry
		var sum []byte
		if err := rows.Scan(&e.Seq, &e.Data, &sum); err != nil {
			return err
		}
		if !bytes.Equal(sum, spoolSum(e)) {
			broken = errBroken
			continue
		}
		e.Seq -= acked
		t.r.Flows++
		if err := putSpool(ctx, t.tx, e); err != nil {
			return ofNew(err)
		}
	}
	return errors.Join(broken, rows.Err())
}

// settle counts what is gone of the critical class.
func (t *taker) settle() {
	at := t.known()
	end, there := max(at.seq, t.last), at.baseSeq+t.kept
	gone := max(end, there) - there
	if queued := t.counted(offQueued); t.exact && queued > at.queued {
		gone += queued - at.queued // taken into the queue, and never durable
	}
	if t.r.Unsure = !t.endKnown(); t.r.Unsure {
		gone += t.room
	}
	t.r.Lost = min(gone, mostGone)
	if t.head == nil && !t.exact || t.head != nil && (t.head.queueUnsure != 0 || !t.exact && t.head.clean == 0) {
		t.h.queueUnsure = 1
	}
}

// doubt says in words why nothing may be activated before somebody vouches.
func (t *taker) doubt() string {
	broken := "nothing that is in use"
	if len(t.r.Broken) > 0 {
		broken = strings.Join(t.r.Broken, ", ")
	}
	return fmt.Sprintf("the store was damaged (%s), and goes on with what held of it; the damaged file is kept as %s", broken, t.r.File)
}
