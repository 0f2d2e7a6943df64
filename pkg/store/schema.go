package store

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/oklog/ulid/v2"
)

// layout is the version of the tables, kept in user_version. A change of a table is a new number.
const layout = 4

// applicationID marks the file as ours: "SPLY".
const applicationID = 0x53504c59

const tables = `
CREATE TABLE head (
	one INTEGER PRIMARY KEY CHECK (one = 1),
	epoch TEXT NOT NULL,
	boot TEXT NOT NULL,
	writes INTEGER NOT NULL,
	seq INTEGER NOT NULL, hash BLOB NOT NULL,
	base_seq INTEGER NOT NULL, base_hash BLOB NOT NULL,
	replay_hash BLOB NOT NULL, replay_base BLOB NOT NULL, forgotten INTEGER NOT NULL, statement_hash BLOB NOT NULL,
	node TEXT NOT NULL, machine TEXT NOT NULL,
	latest INTEGER NOT NULL, floor INTEGER NOT NULL, doubt TEXT NOT NULL,
	queued INTEGER NOT NULL, queue_unsure INTEGER NOT NULL,
	flow_acked INTEGER NOT NULL, flow_reserved INTEGER NOT NULL, flow_unsure INTEGER NOT NULL,
	clean INTEGER NOT NULL,
	sum BLOB NOT NULL
) STRICT;
CREATE TABLE entries (
	seq INTEGER PRIMARY KEY,
	data BLOB NOT NULL,
	hash BLOB NOT NULL
) STRICT;
CREATE TABLE replay (
	n INTEGER PRIMARY KEY,
	id TEXT NOT NULL UNIQUE,
	digest TEXT NOT NULL,
	hash BLOB NOT NULL
) STRICT;
CREATE TABLE statements (
	n INTEGER PRIMARY KEY,
	digest TEXT NOT NULL,
	step TEXT NOT NULL,
	cells TEXT NOT NULL,
	hash BLOB NOT NULL,
	UNIQUE (digest, step)
) STRICT;
CREATE TABLE grants (
	id TEXT PRIMARY KEY,
	state TEXT NOT NULL,
	kind TEXT NOT NULL,
	digest TEXT NOT NULL,
	envelope BLOB NOT NULL,
	payload BLOB NOT NULL,
	activated INTEGER NOT NULL,
	deadline INTEGER NOT NULL,
	deadline_boot INTEGER NOT NULL,
	boot_id TEXT NOT NULL,
	slots TEXT NOT NULL,
	signers TEXT NOT NULL,
	people TEXT NOT NULL,
	ended_why TEXT NOT NULL,
	not_after INTEGER NOT NULL,
	keep INTEGER NOT NULL,
	sum BLOB NOT NULL
) STRICT;
CREATE INDEX grants_active ON grants (activated) WHERE state = 'active';
CREATE INDEX grants_over ON grants (keep) WHERE state <> 'active';
CREATE TABLE notes (
	name TEXT PRIMARY KEY,
	data BLOB NOT NULL,
	sum BLOB NOT NULL
) STRICT;
CREATE TABLE spool (
	seq INTEGER PRIMARY KEY,
	data BLOB NOT NULL,
	sum BLOB NOT NULL
) STRICT;
`

// head is the one row that says where the chains stand.
type head struct {
	epoch string
	boot  string // the boot in which the store was last open
	// writes counts the transactions; the count file remembers how many were acknowledged.
	writes uint64

	seq, baseSeq   uint64 // last entry, and last entry that was acknowledged and removed
	hash, baseHash []byte
	replayHash     []byte
	replayBase     []byte // of the last used id that was forgotten
	forgotten      int64  // wall clock in Unix ns; a grant that was to end by then may have been forgotten
	statementHash  []byte
	node, machine  string // that keep the store; empty: not known
	latest         int64  // wall clock in Unix ns, the latest that was ever seen
	floor          int64  // wall clock in Unix ns; a grant that could be activated before it may have been
	doubt          string // why the store may have forgotten; empty: it has not
	queued         uint64 // entries that went through the queue in memory
	queueUnsure    uint64 // 1: a power loss may have taken queued entries with it
	flowAcked      uint64
	flowReserved   uint64
	flowUnsure     uint64 // numbers up to here were reserved in a boot that ended without warning
	clean          uint64 // 1: flowReserved is the last number that was given out
}

func newHead(boot string) head {
	epoch := ulid.Make().String()
	start := startHash(epoch)
	return head{epoch: epoch, boot: boot, hash: start, baseHash: start, replayHash: start, replayBase: start, statementHash: start, clean: 1}
}

// startHash is where the chains of an epoch begin.
func startHash(epoch string) []byte { return digest([]byte("sallyport epoch"), []byte(epoch)) }

func (h head) sum() []byte {
	return digest([]byte("sallyport head"), []byte(h.epoch), []byte(h.boot), num(h.writes), num(h.seq), h.hash, num(h.baseSeq), h.baseHash,
		h.replayHash, h.replayBase, num(uint64(h.forgotten)), h.statementHash, []byte(h.node), []byte(h.machine), num(uint64(h.latest)), num(uint64(h.floor)), []byte(h.doubt), num(h.queued), num(h.queueUnsure), num(h.flowAcked), num(h.flowReserved), num(h.flowUnsure), num(h.clean))
}

func loadHead(ctx context.Context, tx *sql.Tx) (head, error) {
	var h head
	var sum []byte
	err := tx.QueryRowContext(ctx, `SELECT epoch, boot, writes, seq, hash, base_seq, base_hash, replay_hash, replay_base, forgotten, statement_hash,
		node, machine, latest, floor, doubt, queued, queue_unsure, flow_acked, flow_reserved, flow_unsure, clean, sum FROM head`).Scan(&h.epoch, &h.boot, &h.writes, &h.seq, &h.hash, &h.baseSeq, &h.baseHash,
		&h.replayHash, &h.replayBase, &h.forgotten, &h.statementHash, &h.node, &h.machine, &h.latest, &h.floor, &h.doubt, &h.queued, &h.queueUnsure, &h.flowAcked, &h.flowReserved, &h.flowUnsure, &h.clean, &sum)
	if err != nil {
		return head{}, fmt.Errorf("read head: %w", err)
	}
	if string(sum) != string(h.sum()) {
		return head{}, fmt.Errorf("%w: checksum of the head does not fit", ErrDamaged)
	}
	return h, nil
}

func saveHead(ctx context.Context, tx *sql.Tx, h head) error {
	_, err := tx.ExecContext(ctx, `INSERT OR REPLACE INTO head (one, epoch, boot, writes, seq, hash, base_seq, base_hash, replay_hash, replay_base, forgotten, statement_hash,
		node, machine, latest, floor, doubt, queued, queue_unsure, flow_acked, flow_reserved, flow_unsure, clean, sum)
		VALUES (1, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		h.epoch, h.boot, h.writes, h.seq, h.hash, h.baseSeq, h.baseHash, h.replayHash, h.replayBase, h.forgotten, h.statementHash,
		h.node, h.machine, h.latest, h.floor, h.doubt, h.queued, h.queueUnsure,
		h.flowAcked, h.flowReserved, h.flowUnsure, h.clean, h.sum())
	if err != nil {
		return fmt.Errorf("write head: %w", err)
	}
	return nil
}

// migrate makes the tables in an empty file and refuses a file that is not ours.
func (s *Store) migrate(ctx context.Context) error {
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	var version, app, objects int
	if err := tx.QueryRowContext(ctx, `SELECT (SELECT user_version FROM pragma_user_version), (SELECT application_id FROM pragma_application_id),
		(SELECT count(*) FROM sqlite_master)`).Scan(&version, &app, &objects); err != nil {
		return err
	}
	if objects > 0 || version != 0 || app != 0 {
		if version == layout && app == applicationID {
			return nil
		}
		if ours, err := ourTables(ctx, tx); err != nil || ours {
			return errors.Join(err, fmt.Errorf("%w: version %d, application %#x, and the tables are those of version %d", ErrDamaged, version, app, layout))
		}
		return fmt.Errorf("%w: version %d, application %#x", ErrVersion, version, app)
	}
	for _, q := range []string{tables, fmt.Sprintf("PRAGMA user_version = %d", layout), fmt.Sprintf("PRAGMA application_id = %d", applicationID)} {
		if _, err := tx.ExecContext(ctx, q); err != nil {
			return fmt.Errorf("create tables: %w", err)
		}
	}
	if err := saveHead(ctx, tx, newHead(s.boot)); err != nil {
		return err
	}
	return tx.Commit()
}

// ourTables tells whether the tables are those of this layout, whatever the file's header says.
func ourTables(ctx context.Context, tx *sql.Tx) (bool, error) {
	rows, err := tx.QueryContext(ctx, `SELECT sql FROM sqlite_master WHERE sql IS NOT NULL`)
	if err != nil {
		return false, err
	}
	defer rows.Close()
	n := 0
	for rows.Next() {
		var made string
		if err := rows.Scan(&made); err != nil {
			return false, err
		}
		if !strings.Contains(tables, made+";") {
			return false, nil
		}
		n++
	}
	return n == strings.Count(tables, "CREATE "), rows.Err()
}

// digest hashes parts with their lengths, so that no two lists of parts give the same bytes.
func digest(parts ...[]byte) []byte {
	h := sha256.New()
	for _, p := range parts {
		h.Write(num(uint64(len(p))))
		h.Write(p)
	}
	return h.Sum(nil)
}

func num(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }
