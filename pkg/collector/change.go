package collector

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/proof"
)

// Where a node says that this collector acknowledged records and has them no more.
const (
	stageCollector = "collector"
	causeForgotten = "forgotten"
)

// maxNewEpochs is how many epochs a node may begin in one day. Each stays in every day from then on; an honest node begins one when its
// store is new.
const maxNewEpochs = 64

// change is a transaction, with what it adds to the state.
type change struct {
	state // marks and keys that are new, and the log as it will be
	w     *writer
	ctx   context.Context
	tx    *sql.Tx

	received time.Time
}

func (c *change) mark(s sequence) mark {
	if m, ok := c.marks[s]; ok {
		return m
	}
	return c.w.mark(s)
}

func (c *change) nodeKey(of nodeEpoch) (nodeKey, bool) {
	if k, ok := c.keys[of]; ok {
		return k, true
	}
	return c.w.nodeKey(of)
}

// put checks the whole batch before it writes any of it. Its error is the disk's, the one in the result is the batch's.
func (c *change) put(b batch) (result, error) {
	m := c.mark(b.sequence)
	if b.seal.Last <= m.seq {
		return c.again(b, m)
	}
	breaks, err := c.follows(b, m)
	if err != nil {
		return result{err: err}, nil
	}
	if full, err := c.epochsFull(b); full || err != nil {
		return result{err: fmt.Errorf("%w: node %q has begun %d epochs today, at most that many are taken", errGap, b.node, maxNewEpochs)}, err
	}
	if breaks {
		m.breaks++
	}
	m.seq, m.lost, m.received, m.number, m.seal = b.seal.Last, m.lost+b.seal.Lost, c.received, b.seal.Number, b.signed
	if err := c.store(b); err != nil {
		return result{}, err
	}
	c.marks[b.sequence] = m
	return result{mark: m}, putMark(c.ctx, c.tx, b.sequence, m)
}

// follows tells whether a sealed batch goes on where its sequence is. A chain may break only where the node says, as the first of
// the batch, that this collector has lost what came before.
func (c *change) follows(b batch, m mark) (breaks bool, err error) {
	k, known := c.nodeKey(nodeEpoch{b.node, b.epoch})
	switch s := b.seal; {
	case known && k.vkey != b.vkey:
		return false, errOtherKey(b.node, b.epoch)
	case s.First != m.seq+1:
		return false, fmt.Errorf("%w: seal %d is over %d to %d, stored is up to %d", errGap, s.Number, s.First, s.Last, m.seq)
	case s.Number == m.number+1 && s.Before == proof.Follows(m.seal):
		return false, nil
	case s.Number > m.number && isForgotten(b.entries[0]):
		return true, nil
	default:
		return false, fmt.Errorf("%w: seal %d does not follow on the one that is stored, %d", errGap, s.Number, m.number)
	}
}

// epochsFull tells whether a batch would begin one epoch too many.
func (c *change) epochsFull(b batch) (bool, error) {
	if _, known := c.nodeKey(nodeEpoch{b.node, b.epoch}); known {
		return false, nil
	}
	var today int
	err := c.tx.QueryRowContext(c.ctx, `SELECT count(*) FROM keys WHERE node = ? AND leaf >= (SELECT base FROM head)`, b.node).Scan(&today)
	return today >= maxNewEpochs, err
}

func errOtherKey(node, epoch string) error {
	return fmt.Errorf("%w: node %q has sealed with another key in epoch %s", errGap, node, epoch)
}

func isForgotten(e *api.Entry) bool {
	return e.GetLoss().GetStage() == stageCollector && e.GetLoss().GetCause() == causeForgotten
}

// again takes a batch that is stored, if it is the very same.
func (c *change) again(b batch, m mark) (result, error) {
	signed := m.seal
	if b.seal.Number != m.number {
		var err error
		if signed, err = c.sealOf(b); err != nil {
			return result{}, err
		}
	}
	if !bytes.Equal(signed, b.signed) {
		return result{err: fmt.Errorf("%w: up to %d is stored, and not with this seal %d over %d to %d",
			errGap, m.seq, b.seal.Number, b.seal.First, b.seal.Last)}, nil
	}
	return result{mark: m}, nil
}

// sealOf reads an older seal of a sequence: of today, as a node that sends again has the last one from the Welcome.
func (c *change) sealOf(b batch) (signed []byte, err error) {
	err = c.tx.QueryRowContext(c.ctx, `SELECT data FROM batches JOIN leaves ON idx = leaf WHERE node = ? AND epoch = ? AND class = ? AND number = ?`,
		b.node, b.epoch, b.class, b.seal.Number).Scan(&signed)
	if errors.Is(err, sql.ErrNoRows) {
		err = nil
	}
	return signed, err
}

// store writes the entries of a batch, and its leaves.
func (c *change) store(b batch) error {
	if err := c.register(b); err != nil {
		return err
	}
	for i, e := range b.entries {
		r := row{sequence: b.sequence, entry: e, data: b.data[i], received: c.received}
		if r.entry.GetGrant() != nil {
			leaf, err := c.leaf(proof.EventLeaf(b.proofSequence(), proof.Entry{Seq: r.entry.GetSeq(), Data: r.data}))
			if err != nil {
				return err
			}
			r.leaf = sql.NullInt64{Int64: leaf, Valid: true}
		}
		if err := insert(c.ctx, c.tx, r); err != nil {
			return err
		}
	}
	leaf, err := c.leaf(b.signed)
	if err != nil {
		return err
	}
	return putBatch(c.ctx, c.tx, b.sequence, b.seal, leaf, c.received)
}

// register puts a node's key into the log, before the first seal of its epoch.
func (c *change) register(b batch) error {
	of := nodeEpoch{b.node, b.epoch}
	if _, known := c.nodeKey(of); known {
		return nil
	}
	leaf, err := c.leaf(proof.KeyLeaf(b.node, b.epoch, b.vkey))
	if err != nil {
		return err
	}
	c.keys[of] = nodeKey{vkey: b.vkey, leaf: leaf}
	return putKey(c.ctx, c.tx, of, c.keys[of])
}

// leaf appends to the log.
func (c *change) leaf(data []byte) (at int64, err error) {
	grown, first, hashes, err := c.log.grow(data)
	if err != nil {
		return 0, err
	}
	at, c.log = c.log.size, grown
	if _, err := c.tx.ExecContext(c.ctx, `INSERT INTO leaves (idx, data) VALUES (?, ?)`, at, data); err != nil {
		return 0, err
	}
	for i, h := range hashes {
		if err := putHash(c.ctx, c.tx, first+int64(i), h); err != nil {
			return 0, err
		}
	}
	return at, nil
}

// putHead signs the log, if it grew.
func (c *change) putHead() error {
	if c.log.checkpoint != nil {
		return nil
	}
	if err := c.log.sign(c.w.key); err != nil {
		return err
	}
	_, err := c.tx.ExecContext(c.ctx, `UPDATE head SET size = ?, checkpoint = ?`, c.log.size, c.log.checkpoint)
	return err
}
