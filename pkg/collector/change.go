package collector

import (
	"bytes"
	"database/sql"
	"errors"
	"fmt"

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

// change is what a transaction adds to the state.
type change struct {
	state // marks and keys that are new, and the log as it will be
	tx    *transaction
}

// newChange goes on from the log as the engine has it, if that is what its key signed: who can write to a database cannot have another log signed.
func newChange(tx *transaction, key logKey) (*change, error) {
	h, err := tx.head()
	if err == nil {
		err = h.check(key)
	}
	return &change{state: state{marks: marks{}, keys: nodeKeys{}, log: h}, tx: tx}, err
}

func (c *change) mark(s sequence) (mark, error) {
	if m, ok := c.marks[s]; ok {
		return m, nil
	}
	return c.tx.mark(s)
}

func (c *change) nodeKey(of nodeEpoch) (nodeKey, bool, error) {
	if k, ok := c.keys[of]; ok {
		return k, true, nil
	}
	return c.tx.nodeKey(of)
}

// put checks the whole batch before it writes any of it. Its error is the disk's, the one in the result is the batch's.
func (c *change) put(b batch) (result, error) {
	turn, err := c.tx.turn(b.node)
	if err != nil || turn != b.turn {
		return result{err: errTakenOver}, err
	}
	m, err := c.mark(b.sequence)
	if err != nil {
		return result{}, err
	}
	k, known, err := c.nodeKey(nodeEpoch{b.node, b.epoch})
	if err != nil {
		return result{}, err
	}
	if b.seal.Last <= m.seq {
		return c.again(b, m)
	}
	breaks, err := follows(b, m)
	if known && k.vkey != b.vkey {
		err = errOtherKey(b.node, b.epoch)
	}
	if err != nil {
		return result{err: err}, nil
	}
	if !known {
		if full, err := c.epochsFull(b.node); full || err != nil {
			return result{err: fmt.Errorf("%w: node %q has begun %d epochs today, at most that many are taken", errGap, b.node, maxNewEpochs)}, err
		}
		if err := c.register(b); err != nil {
			return result{}, err
		}
	}
	before := m.seq
	if breaks {
		m.breaks++
	}
	m.seq, m.lost, m.received, m.number, m.seal = b.seal.Last, m.lost+b.seal.Lost, c.tx.received, b.seal.Number, b.signed
	c.marks[b.sequence] = m
	return result{mark: m, before: before}, c.store(b)
}

// follows tells whether a sealed batch goes on where its sequence is. A chain may break only where the node says, as the first of
// the batch, that this collector has lost what came before.
func follows(b batch, m mark) (breaks bool, err error) {
	switch s := b.seal; {
	case s.First != m.seq+1:
		return false, fmt.Errorf("%w: seal %d is over %d to %d, stored is up to %d", errGap, s.Number, s.First, s.Last, m.seq)
	case s.Number == m.number+1 && s.Before == proof.Follows(m.seal):
		return false, nil
	case s.Number > m.number && s.Number > 1 && isForgotten(b.entries[0]): // what is before seal 1 cannot be forgotten: no proof takes that
		return true, nil
	default:
		return false, fmt.Errorf("%w: seal %d does not follow on the one that is stored, %d", errGap, s.Number, m.number)
	}
}

// epochsFull tells whether a batch that begins an epoch would begin one too many.
func (c *change) epochsFull(node string) (bool, error) {
	if err := c.tx.flush(); err != nil {
		return false, err
	}
	var today int
	err := c.tx.QueryRowContext(c.tx.ctx, `SELECT count(*) FROM keys WHERE node = $1 AND leaf >= (SELECT base FROM head)`, node).Scan(&today)
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
	return result{mark: m, before: m.seq}, nil
}

// sealOf reads an older seal of a sequence: of today, as a node that sends again has the last one from the Welcome.
func (c *change) sealOf(b batch) (signed []byte, err error) {
	if err := c.tx.flush(); err != nil {
		return nil, err
	}
	err = c.tx.QueryRowContext(c.tx.ctx, fmt.Sprintf(`SELECT data FROM batches%[1]s JOIN leaves%[1]s ON idx = leaf
		WHERE node = $1 AND epoch = $2 AND class = $3 AND number = $4`, c.tx.suffix), b.node, b.epoch, int64(b.class), b.seal.Number).Scan(&signed)
	if errors.Is(err, sql.ErrNoRows) {
		err = nil
	}
	return signed, err
}

// store writes the entries of a batch, and its leaves.
func (c *change) store(b batch) error {
	for i, e := range b.entries {
		r := row{sequence: b.sequence, entry: e, data: b.data[i], received: c.tx.received}
		if r.entry.GetGrant() != nil {
			leaf, err := c.leaf(proof.EventLeaf(b.proofSequence(), proof.Entry{Seq: r.entry.GetSeq(), Data: r.data}))
			if err != nil {
				return err
			}
			r.leaf = sql.NullInt64{Int64: leaf, Valid: true}
		}
		if err := r.insert(c.tx); err != nil {
			return err
		}
	}
	leaf, err := c.leaf(b.signed)
	if err != nil {
		return err
	}
	return c.tx.add("batches", leaf, b.node, b.epoch, int64(b.class), b.seal.Number, b.seal.First, b.seal.Last, c.tx.received.UnixNano())
}

// register puts a node's key into the log, before the first seal of its epoch.
func (c *change) register(b batch) error {
	leaf, err := c.leaf(proof.KeyLeaf(b.node, b.epoch, b.vkey))
	if err != nil {
		return err
	}
	c.keys[nodeEpoch{b.node, b.epoch}] = nodeKey{vkey: b.vkey, leaf: leaf}
	return c.tx.add("keys", b.node, b.epoch, b.vkey, leaf)
}

// leaf appends to the log.
func (c *change) leaf(data []byte) (at int64, err error) {
	grown, first, hashes, err := c.log.grow(data)
	if err != nil {
		return 0, err
	}
	at, c.log = c.log.size, grown
	if err := c.tx.add("leaves", at, data); err != nil {
		return 0, err
	}
	for i, h := range hashes {
		if err := c.tx.add("hashes", first+int64(i), h[:]); err != nil {
			return 0, err
		}
	}
	return at, nil
}

// finish writes the marks, and signs the log if it grew.
func (c *change) finish(key logKey) error {
	for s, m := range c.marks {
		if err := c.tx.put(s, m); err != nil {
			return err
		}
	}
	if c.log.checkpoint == nil {
		if err := c.log.sign(key); err != nil {
			return err
		}
		if _, err := c.tx.ExecContext(c.tx.ctx, `UPDATE head SET size = $1, checkpoint = $2`, c.log.size, c.log.checkpoint); err != nil {
			return err
		}
	}
	return c.tx.flush()
}
