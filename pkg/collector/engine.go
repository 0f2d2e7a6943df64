package collector

import (
	"context"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

// Engine keeps what nodes send, and the log over it. What it does is held by one suite of tests, whichever it is.
type Engine interface {
	// Mark says how far a sequence is durable.
	Mark(ctx context.Context, s Sequence) (Mark, error)
	// Store writes what is new in batches: records, marks, leaves and checkpoint in one durable transaction. A batch that is refused
	// (errGap or errEntry in its result) touches no other; the error is the engine's, and nothing was written then.
	Store(ctx context.Context, batches []Batch) ([]Stored, error)
	// Changed is closed after the next commit.
	Changed() <-chan struct{}

	// Rows reads rows that fit, in the order of their receipt, from behind the cursor on, and no more than the limit.
	Rows(ctx context.Context, s Select) ([]Row, error)
	// Newest is the cursor before the newest rows that fit, as many as the limit says.
	Newest(ctx context.Context, s Select) (Cursor, error)

	// Checkpoint is the signed one of the last commit.
	Checkpoint(ctx context.Context) ([]byte, error)
	// Hashes are those of the log, at tlog's stored indexes.
	Hashes(ctx context.Context) tlog.HashReader
	// Leaves reads leaves of the log that it still has: those of days that are gone are not among them.
	Leaves(ctx context.Context, from int64, limit int) ([]Leaf, error)
	Close() error
}

// Sequence is one run of numbers of one node.
type Sequence struct {
	Node, Epoch string
	Class       api.Class
}

// Mark is how far a sequence is stored.
type Mark struct {
	Seq    uint64
	Number uint64 // of the last seal
	Seal   []byte // the last one, signed
}

// Batch is one batch of one sequence, as it was sealed.
type Batch struct {
	Sequence
	NodeKey string // that verifies the seal
	Raw     []*api.Raw
	Seal    []byte
}

// Stored is what became of a batch.
type Stored struct {
	Mark Mark
	Err  error
}

// Table names what is read.
type Table string

// Tables.
const (
	TableFlows  Table = "flows"
	TableGrants Table = "grant_events"
	TableLosses Table = "losses"
	TableTides  Table = "tides"
)

// Select says which rows are wanted.
type Select struct {
	Table Table
	Where []Condition
	After Cursor // empty: from the first on
	Limit int
}

// Condition is one column compared with a value. Columns and operators are names of the program, never of a caller.
type Condition struct {
	Column, Operator string // =, <>, <, >=
	Value            any
}

// Cursor is the place of a row in the order of receipt. Only the engine that made it can read it.
type Cursor string

// Row is one record as it is kept.
type Row struct {
	Sequence
	Seq      uint64
	Received time.Time
	Data     []byte // the entry, as it was sealed
	Cursor   Cursor
}

// Leaf is one of the log's.
type Leaf struct {
	Index int64
	Data  []byte
}
