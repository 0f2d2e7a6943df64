package collector

import (
	"bufio"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/mod/sumdb/tlog"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/proof"
)

const (
	chunkBytes  = 256 << 10
	pageBatches = 100
)

// Log returns the log's checkpoint, with the proof that it grew from an older one.
func (q *query) Log(ctx context.Context, r *api.LogRequest) (reply *api.LogReply, err error) {
	err = q.guard(ctx, func(ctx context.Context) error {
		h, err := q.engine.stored(ctx).head()
		if err != nil {
			return err
		}
		if r.GetFrom() > uint64(h.size) {
			return status.Errorf(codes.OutOfRange, "the log has %d leaves, the older checkpoint %d: it is of another log, or this one was set back", h.size, r.GetFrom())
		}
		grown, err := grown(ctx, q.engine, h, int64(r.GetFrom()))
		reply = &api.LogReply{Grown: grown, Key: q.key.vkey}
		return err
	})
	if err != nil {
		return nil, err
	}
	return reply, nil
}

// Nodes returns how far each sequence is stored.
func (q *query) Nodes(ctx context.Context, _ *api.NodesRequest) (reply *api.NodesReply, err error) {
	err = q.guard(ctx, func(ctx context.Context) error {
		reply = &api.NodesReply{}
		all, err := q.engine.stored(ctx).marks()
		if err != nil {
			return err
		}
		for s, m := range all {
			reply.Nodes = append(reply.Nodes, &api.NodeState{Node: s.node, Epoch: s.epoch, Class: s.class, Seq: m.seq, Lost: m.lost, Seals: m.number,
				Received: timestamppb.New(m.received), Connected: q.connected(s.node, s.epoch), ChainBreaks: m.breaks})
		}
		slices.SortFunc(reply.Nodes, func(a, b *api.NodeState) int {
			if c := strings.Compare(a.GetNode()+"\n"+a.GetEpoch(), b.GetNode()+"\n"+b.GetEpoch()); c != 0 {
				return c
			}
			return int(a.GetClass()) - int(b.GetClass())
		})
		return nil
	})
	if err != nil {
		return nil, err
	}
	return reply, nil
}

// Evidence sends a bundle: what was asked for, with what proves it against the log's latest checkpoint.
func (q *query) Evidence(r *api.EvidenceRequest, stream api.Audit_EvidenceServer) error {
	if err := checkEvidence(r); err != nil {
		return err
	}
	return q.guard(stream.Context(), func(ctx context.Context) error {
		out := bufio.NewWriterSize(chunks{stream}, chunkBytes)
		h, err := q.engine.stored(ctx).head()
		if err != nil {
			return err
		}
		days, err := q.engine.days(ctx)
		if err != nil {
			return err
		}
		b := &bundle{ctx: ctx, engine: q.engine, days: days, head: h, hashes: newHashReader(ctx, q.engine), out: json.NewEncoder(out), told: map[nodeEpoch]bool{}}
		if err := b.write(r); err != nil {
			return err
		}
		return out.Flush()
	})
}

func checkEvidence(r *api.EvidenceRequest) error {
	switch one := r.GetSeq() != 0; {
	case one && (r.GetNode() == "" || r.GetEpoch() == "" || r.GetClass() == api.Class_CLASS_UNSPECIFIED):
		return status.Error(codes.InvalidArgument, "one record is named by node, epoch, class and seq")
	case one && (r.GetGrant() != "" || r.GetSince() != nil || r.GetUntil() != nil):
		return status.Error(codes.InvalidArgument, "one record is named without grant and times")
	case !one && (r.GetEpoch() != "" || r.GetClass() != api.Class_CLASS_UNSPECIFIED):
		return status.Error(codes.InvalidArgument, "epoch and class name one record, with node and seq")
	}
	for _, at := range []*timestamppb.Timestamp{r.GetSince(), r.GetUntil()} {
		if err := at.CheckValid(); at != nil && err != nil {
			return status.Errorf(codes.InvalidArgument, "since, until: %v", err)
		}
	}
	return nil
}

// chunks sends what is written.
type chunks struct{ stream api.Audit_EvidenceServer }

func (c chunks) Write(p []byte) (int, error) {
	for part := range slices.Chunk(p, chunkBytes) {
		if err := c.stream.Send(&api.EvidenceChunk{Data: part}); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

// bundle is one on its way out. Everything in it is proven against one head of the log.
type bundle struct {
	ctx    context.Context
	engine engine
	days   []day
	head   head
	hashes tlog.HashReader
	out    *json.Encoder
	lines  int64
	told   map[nodeEpoch]bool // nodes whose key is in it
}

func (b *bundle) write(r *api.EvidenceRequest) (err error) {
	if err := b.line(proof.Line{Kind: proof.LineCheckpoint, Note: string(b.head.checkpoint)}); err != nil {
		return err
	}
	switch {
	case r.GetSeq() != 0:
		err = b.record(sequence{r.GetNode(), r.GetEpoch(), r.GetClass()}, r.GetSeq())
	case r.GetGrant() != "":
		err = b.receipt(r)
	default:
		err = b.records(r)
	}
	if err != nil {
		return err
	}
	return b.line(proof.Line{Kind: proof.LineEnd, Count: b.lines})
}

func (b *bundle) line(l proof.Line) error {
	b.lines++
	return b.out.Encode(l)
}

// leaf adds a line that is a leaf of the log.
func (b *bundle) leaf(l proof.Line) error {
	p, err := tlog.ProveRecord(b.head.size, l.Index, b.hashes)
	if err != nil {
		return err
	}
	l.Proof = p
	return b.line(l)
}

// key adds a node's key, before what it is needed for.
func (b *bundle) key(of nodeEpoch) error {
	if b.told[of] {
		return nil
	}
	k, ok, err := b.engine.stored(b.ctx).nodeKey(of)
	if err != nil || !ok {
		return err
	}
	b.told[of] = true
	return b.leaf(proof.Line{Kind: proof.LineKey, Index: k.leaf, Leaf: proof.KeyLeaf(of.node, of.epoch, k.vkey)})
}

// filter says which rows of a day are asked for, after a leaf.
func (b *bundle) filter(r *api.EvidenceRequest, after int64) filter {
	var f filter
	f.add("leaf > ?", after)
	f.add("leaf < ?", b.head.size)
	f.node(r.GetNode())
	f.equals("grant_id", r.GetGrant())
	if r.GetSince() != nil {
		f.add("received >= ?", unixNano(r.GetSince()))
	}
	if r.GetUntil() != nil {
		f.add("received < ?", unixNano(r.GetUntil()))
	}
	return f
}

// read is for a day that has to be there: evidence that leaves out a day without a word is none.
func (b *bundle) read(d day, do func(tables) error) error {
	ok, err := d.read(do)
	if err == nil && !ok {
		err = status.Errorf(codes.Aborted, "day %s is removed just now: ask again", d.name())
	}
	return err
}

// event is a grant event that is a leaf.
type event struct {
	sequence
	leaf  int64
	entry proof.Entry
}

// receipt adds the events of a grant. A leaf is made of the record that is kept, so that a changed one is found.
func (b *bundle) receipt(r *api.EvidenceRequest) error {
	before := b.lines
	for _, d := range b.days {
		events, err := b.events(d, r)
		if err != nil {
			return err
		}
		for _, e := range events {
			if err := b.leaf(proof.Line{Kind: proof.LineEvent, Index: e.leaf, Leaf: proof.EventLeaf(e.proofSequence(), e.entry)}); err != nil {
				return err
			}
		}
	}
	if b.lines == before {
		return status.Errorf(codes.NotFound, "no sealed event of grant %q is stored", r.GetGrant())
	}
	return nil
}

func (b *bundle) events(d day, r *api.EvidenceRequest) (events []event, err error) {
	f := b.filter(r, -1)
	err = b.read(d, func(db tables) error {
		q := fmt.Sprintf(`SELECT node, epoch, class, leaf, seq, data FROM grant_events%s WHERE %s ORDER BY leaf`, db.suffix, f.condition())
		rows, err := db.QueryContext(b.ctx, q, f.args...)
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			var e event
			if err := rows.Scan(&e.node, &e.epoch, &e.class, &e.leaf, &e.entry.Seq, &e.entry.Data); err != nil {
				return err
			}
			events = append(events, e)
		}
		return rows.Err()
	})
	return events, err
}

// storedBatch is a batch as the table of batches has it.
type storedBatch struct {
	sequence
	leaf        int64
	first, last uint64
}

const batchColumns = `leaf, node, epoch, class, first, last`

func (s *storedBatch) fields() []any {
	return []any{&s.leaf, &s.node, &s.epoch, &s.class, &s.first, &s.last}
}

// records adds all batches of a time.
func (b *bundle) records(r *api.EvidenceRequest) error {
	for _, d := range b.days {
		for after, more := int64(-1), true; more; {
			page, err := b.page(d, r, after)
			if err != nil {
				return err
			}
			for _, s := range page {
				if err := b.batch(d, s); err != nil {
					return err
				}
				after = s.leaf
			}
			more = len(page) == pageBatches
		}
	}
	return nil
}

func (b *bundle) page(d day, r *api.EvidenceRequest, after int64) (page []storedBatch, err error) {
	f := b.filter(r, after)
	err = b.read(d, func(db tables) error {
		q := fmt.Sprintf(`SELECT %s FROM batches%s WHERE %s ORDER BY leaf LIMIT %d`, batchColumns, db.suffix, f.condition(), pageBatches)
		rows, err := db.QueryContext(b.ctx, q, f.args...)
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			var s storedBatch
			if err := rows.Scan(s.fields()...); err != nil {
				return err
			}
			page = append(page, s)
		}
		return rows.Err()
	})
	return page, err
}

func (b *bundle) batch(d day, s storedBatch) error {
	signed, entries, err := b.contents(d, s)
	if err != nil {
		return err
	}
	if err := b.key(nodeEpoch{s.node, s.epoch}); err != nil {
		return err
	}
	return b.leaf(proof.Line{Kind: proof.LineBatch, Index: s.leaf, Leaf: signed, Entries: entries})
}

// record adds one entry with its place in its batch: the record itself, or the loss that counts its number.
func (b *bundle) record(of sequence, seq uint64) error {
	d, s, err := b.find(of, seq)
	if err != nil {
		return err
	}
	signed, entries, err := b.contents(d, s)
	if err != nil {
		return err
	}
	at := slices.IndexFunc(entries, func(e proof.Entry) bool { return e.Seq >= seq })
	if at < 0 {
		return status.Errorf(codes.DataLoss, "day %s has batch %d to %d without its number %d", d.name(), s.first, s.last, seq)
	}
	path, err := proof.Path(entries, at)
	if err != nil {
		return err
	}
	if err := b.key(nodeEpoch{s.node, s.epoch}); err != nil {
		return err
	}
	return b.leaf(proof.Line{Kind: proof.LineRecord, Index: s.leaf, Leaf: signed, Entries: entries[at : at+1], At: int64(at), Path: path})
}

// find looks for the batch that a number is in, in the newest days first.
func (b *bundle) find(of sequence, seq uint64) (day, storedBatch, error) {
	for _, d := range slices.Backward(b.days) {
		var s storedBatch
		err := b.read(d, func(db tables) error {
			return db.QueryRowContext(b.ctx, fmt.Sprintf(`SELECT %s FROM batches%s WHERE node = $1 AND epoch = $2 AND class = $3 AND last >= $4 AND leaf < $5
				ORDER BY last LIMIT 1`, batchColumns, db.suffix), of.node, of.epoch, int64(of.class), seq, b.head.size).Scan(s.fields()...)
		})
		if err == nil && s.first <= seq {
			return d, s, nil
		}
		if err != nil && !errors.Is(err, sql.ErrNoRows) {
			return nil, s, err
		}
	}
	return nil, storedBatch{}, status.Errorf(codes.NotFound, "no seal that is stored is over number %d (%s) of node %q in epoch %s",
		seq, of.proofSequence().Class, of.node, of.epoch)
}

// contents reads a batch's seal and its entries.
func (b *bundle) contents(d day, s storedBatch) (signed []byte, entries []proof.Entry, err error) {
	err = b.read(d, func(db tables) error {
		err := db.QueryRowContext(b.ctx, fmt.Sprintf(`SELECT data FROM leaves%s WHERE idx = $1`, db.suffix), s.leaf).Scan(&signed)
		if errors.Is(err, sql.ErrNoRows) {
			return status.Errorf(codes.DataLoss, "day %s has leaf %d of the log no more", d.name(), s.leaf)
		}
		if err != nil {
			return err
		}
		entries, err = readEntries(b.ctx, db, s)
		return err
	})
	return signed, entries, err
}

// readEntries reads what is stored of a batch, whatever kind of record it is.
func readEntries(ctx context.Context, db tables, s storedBatch) (entries []proof.Entry, err error) {
	var parts []string
	for _, table := range recordTables {
		parts = append(parts, fmt.Sprintf(`SELECT seq, data FROM %s%s WHERE node = $1 AND epoch = $2 AND class = $3 AND seq BETWEEN $4 AND $5`, table, db.suffix))
	}
	rows, err := db.QueryContext(ctx, strings.Join(parts, ` UNION ALL `)+` ORDER BY seq`, s.node, s.epoch, int64(s.class), s.first, s.last)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var e proof.Entry
		if err := rows.Scan(&e.Seq, &e.Data); err != nil {
			return nil, err
		}
		entries = append(entries, e)
	}
	return entries, rows.Err()
}
