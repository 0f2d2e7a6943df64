package collector

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

const (
	defaultLimit = 1000
	pageRows     = 500
)

// query is the Audit service.
type query struct {
	api.UnimplementedAuditServer
	stop      context.Context
	engine    engine
	key       logKey
	connected func(node, epoch string) bool
	admit     func(context.Context) error
	proof     time.Duration // how long a caller's identity is good for; 0: for ever
	acts      func(context.Context, *api.ActRequest) (*api.ActReply, error)
}

// feed is one table as a sequence of messages.
type feed[M any] struct {
	table   string
	columns string // after id
	scan    func(rows *sql.Rows, id *int64) (M, error)
	stamp   func(M, string) // with its cursor
	limit   uint32          // rows that are yet to be sent; with follow it is where to begin
	follow  bool
	after   string // a cursor
	filter
	cursors cursors
}

// filter is what rows have to fit.
type filter struct {
	where   []string
	args    []any
	indexed bool // where names what an index is for
}

// add takes a condition with one parameter, written as ?.
func (f *filter) add(condition string, arg any) {
	f.args = append(f.args, arg)
	f.where = append(f.where, strings.Replace(condition, "?", fmt.Sprintf("$%d", len(f.args)), 1))
}

func (f *filter) equals(column, value string) {
	if value != "" {
		f.add(column+" = ?", word(value))
	}
}

// rarely is equals, of a column with an index that leaves out its common values. The first that is asked for is the one that is used:
// SQLite does not know which of them finds less.
func (f *filter) rarely(column, value string) {
	f.equals(column, value)
	if value == "" || f.indexed || slices.Contains(common[column], value) {
		return
	}
	f.indexed = true
	for _, c := range common[column] {
		f.where = append(f.where, fmt.Sprintf("%s <> '%s'", column, c))
	}
}

// node is not cut: it is the one in a certificate.
func (f *filter) node(name string) {
	if name != "" {
		f.add("node = ?", clean(name))
	}
}

func (f *filter) condition() string {
	return strings.Join(append([]string{"TRUE"}, f.where...), " AND ")
}

// Flows sends the newest records that fit, oldest first, and with follow those that come.
func (q *query) Flows(r *api.FlowQuery, stream api.Audit_FlowsServer) error {
	f, err := flowFeed(r)
	if err != nil {
		return err
	}
	return serve(q, stream.Context(), f, stream.Send)
}

func flowFeed(r *api.FlowQuery) (feed[*api.StoredFlow], error) {
	f := feed[*api.StoredFlow]{table: "flows", columns: "node, epoch, class, seq, received, data", scan: scanFlow,
		stamp: func(m *api.StoredFlow, cursor string) { m.Cursor = cursor }, limit: r.GetLimit(), follow: r.GetFollow(), after: r.GetAfter()}
	f.node(r.GetNode())
	f.equals("service", r.GetService())
	f.rarely("grant_id", r.GetGrant())
	f.rarely("identity", r.GetIdentity())
	f.rarely("reason", strings.ToUpper(r.GetReason()))
	f.rarely("verdict", strings.ToUpper(r.GetVerdict()))
	f.equals("event", strings.ToUpper(r.GetEvent()))
	if r.GetVerdict() != "" && r.GetEvent() == "" {
		f.add("event <> ?", flow.EventWatched.String()) // nobody decided that: it is what Enforce would say
	}
	if c := r.GetClient(); c != "" {
		addr, err := netip.ParseAddr(c)
		if err != nil {
			return f, status.Errorf(codes.InvalidArgument, "client: %v", err)
		}
		f.equals("client", addr.Unmap().String()) // as splitAddr has it
	}
	return f, f.times(r.GetSince(), r.GetUntil())
}

// GrantEvents sends the newest grant events that fit, oldest first, and with follow those that come.
func (q *query) GrantEvents(r *api.GrantQuery, stream api.Audit_GrantEventsServer) error {
	f := feed[*api.StoredGrantEvent]{table: "grant_events", columns: "node, epoch, class, seq, received, data", scan: scanGrantEvent,
		stamp: func(m *api.StoredGrantEvent, cursor string) { m.Cursor = cursor }, limit: r.GetLimit(), follow: r.GetFollow(), after: r.GetAfter()}
	f.node(r.GetNode())
	f.equals("grant_id", r.GetGrant())
	f.equals("step", strings.ToUpper(r.GetStep()))
	if err := f.times(r.GetSince(), r.GetUntil()); err != nil {
		return err
	}
	return serve(q, stream.Context(), f, stream.Send)
}

// Losses sends the newest counted losses that fit, oldest first.
func (q *query) Losses(r *api.LossQuery, stream api.Audit_LossesServer) error {
	f := feed[*api.StoredLoss]{table: "losses", columns: "node, epoch, class, seq, received, data", scan: scanLoss,
		stamp: func(m *api.StoredLoss, cursor string) { m.Cursor = cursor }, limit: r.GetLimit(), after: r.GetAfter()}
	f.node(r.GetNode())
	if err := f.time("since", "received >= ?", r.GetSince()); err != nil {
		return err
	}
	return serve(q, stream.Context(), f, stream.Send)
}

func (f *filter) times(since, until *timestamppb.Timestamp) error {
	if err := f.time("since", "time >= ?", since); err != nil {
		return err
	}
	return f.time("until", "time < ?", until)
}

func (f *filter) time(name, condition string, at *timestamppb.Timestamp) error {
	if at == nil {
		return nil
	}
	if err := at.CheckValid(); err != nil {
		return status.Errorf(codes.InvalidArgument, "%s: %v", name, err)
	}
	f.add(condition, unixNano(at))
	return nil
}

// unixNano is the time as columns have it. What lies beyond them is before all of them, or after.
func unixNano(at *timestamppb.Timestamp) int64 {
	switch first, last := time.Unix(0, math.MinInt64), time.Unix(0, math.MaxInt64); {
	case at.AsTime().Before(first):
		return math.MinInt64
	case at.AsTime().After(last):
		return math.MaxInt64
	}
	return at.AsTime().UnixNano()
}

// Tides sends the newest tides that fit, oldest first.
func (q *query) Tides(r *api.TideQuery, stream api.Audit_TidesServer) error {
	f := feed[*api.StoredTide]{table: "tides", columns: "node, epoch, class, seq, received, data", scan: scanTide,
		stamp: func(m *api.StoredTide, cursor string) { m.Cursor = cursor }, limit: r.GetLimit(), after: r.GetAfter()}
	f.node(r.GetNode())
	if r.GetGrant() != "" {
		f.add("replace(grants, ?, '') <> grants", " "+word(r.GetGrant())+" ") // which every engine has
	}
	if r.GetDiffering() {
		f.where = append(f.where, "differing")
	}
	return serve(q, stream.Context(), f, stream.Send)
}

// serve runs a feed for one caller.
func serve[M any](q *query, ctx context.Context, f feed[M], send func(M) error) error {
	if f.limit == 0 {
		f.limit = defaultLimit
	}
	return q.guard(ctx, func(ctx context.Context) error {
		f.cursors = cursors{q.engine.kind(), q.key.KeyHash(), f.table}
		return f.run(ctx, q, send)
	})
}

// guard runs do for a caller who may read, for as long as he may.
func (q *query) guard(ctx context.Context, do func(context.Context) error) error {
	if err := q.admit(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(q.stop, func() { cancel(status.Error(codes.Unavailable, errStopping.Error())) })()
	if q.proof > 0 {
		defer time.AfterFunc(q.proof, func() { cancel(status.Error(codes.Unauthenticated, "identity must be proven again")) }).Stop()
	}
	err := do(ctx)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return readError(err)
}

// readError is what a reader is told.
func readError(err error) error {
	var bad *damage
	switch _, isStatus := status.FromError(err); {
	case err == nil || isStatus:
		return err
	case errors.As(err, &bad), errors.Is(err, errDamaged):
		return status.Error(codes.DataLoss, err.Error())
	case errors.Is(err, errAway):
		return status.Error(codes.Unavailable, err.Error())
	}
	return status.Errorf(codes.Internal, "read records: %v", err)
}

func (f *feed[M]) run(ctx context.Context, q *query, send func(M) error) error {
	at, err := f.start(ctx, q.engine)
	if err != nil {
		return err
	}
	for {
		changed := q.engine.changed() // before the look, so that nothing falls in between
		for more := f.follow || f.limit > 0; more; {
			var page []M
			if page, more, err = f.page(ctx, q.engine, &at); err != nil {
				return err
			}
			for _, m := range page {
				if err := send(m); err != nil {
					return err
				}
			}
			if !f.follow {
				f.limit -= uint32(len(page))
				more = more && f.limit > 0
			}
		}
		if !f.follow {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// start is where the caller was, or the position before the newest rows that fit, or the end if none does: then it knows how
// many there are, and behind the last of them nothing is looked at. The end is looked up first: a row that comes meanwhile lies behind it.
func (f *feed[M]) start(ctx context.Context, e engine) (position, error) {
	if f.after != "" {
		at, err := f.cursors.read(f.after)
		if err != nil {
			err = status.Errorf(codes.InvalidArgument, "after: %v", err)
		}
		return at, err
	}
	days, err := e.days(ctx)
	if err != nil || len(days) == 0 {
		return position{}, err
	}
	at := position{day: days[len(days)-1].name()}
	if _, err := days[len(days)-1].read(func(db tables) error { return f.lastID(ctx, db, &at.id) }); err != nil {
		return position{}, err
	}
	left := int64(f.limit)
	for i := len(days) - 1; i >= 0 && left > 0; i-- {
		var first sql.NullInt64
		var n int64
		_, err := days[i].read(func(db tables) error {
			q := fmt.Sprintf(`SELECT min(id), count(*) FROM (SELECT id FROM %s%s WHERE %s ORDER BY id DESC LIMIT %d) AS newest`, f.table, db.suffix, f.condition(), left)
			return db.QueryRowContext(ctx, q, f.args...).Scan(&first, &n)
		})
		if err != nil {
			return position{}, err
		}
		if left -= n; n > 0 {
			at = position{days[i].name(), first.Int64 - 1}
		}
	}
	if !f.follow {
		f.limit -= uint32(left)
	}
	return at, nil
}

func (f *feed[M]) lastID(ctx context.Context, db tables, id *int64) error {
	return db.QueryRowContext(ctx, fmt.Sprintf(`SELECT coalesce(max(id), 0) FROM %s%s`, f.table, db.suffix)).Scan(id)
}

// page reads the next rows behind at and moves it. more says that it is worth asking again now. The
// rows are read whole before they are sent: a slow reader holds up no checkpoint.
func (f *feed[M]) page(ctx context.Context, e engine, at *position) (page []M, more bool, err error) {
	days, err := e.days(ctx)
	if err != nil {
		return nil, false, err
	}
	i := slices.IndexFunc(days, func(d day) bool { return d.name() >= at.day })
	if i < 0 {
		return nil, false, nil
	}
	if name := days[i].name(); name > at.day { // the position's was removed
		*at = position{day: name}
	}
	ok, err := days[i].read(func(db tables) error {
		page, more, err = f.rows(ctx, db, at)
		return err
	})
	if err != nil {
		return nil, false, err
	}
	if i+1 < len(days) && (!ok || !more) { // this day is done
		*at = position{day: days[i+1].name()}
		return page, true, nil
	}
	return page, more, nil
}

func (f *feed[M]) rows(ctx context.Context, db tables, at *position) (page []M, more bool, err error) {
	var last int64
	if err := f.lastID(ctx, db, &last); err != nil {
		return nil, false, err
	}
	size := pageRows
	if !f.follow {
		size = min(size, int(f.limit))
	}
	filter := filter{where: slices.Clone(f.where), args: slices.Clone(f.args)}
	filter.add("id > ?", at.id)
	filter.add("id <= ?", last)
	rows, err := db.QueryContext(ctx, fmt.Sprintf(`SELECT id, %s FROM %s%s WHERE %s ORDER BY id LIMIT %d`,
		f.columns, f.table, db.suffix, filter.condition(), size), filter.args...)
	if err != nil {
		return nil, false, err
	}
	defer rows.Close()
	id := at.id
	for rows.Next() {
		m, err := f.scan(rows, &id)
		if err != nil {
			return nil, false, err
		}
		f.stamp(m, f.cursors.of(position{at.day, id}))
		page = append(page, m)
	}
	if err := rows.Err(); err != nil {
		return nil, false, err
	}
	if more = len(page) == size; !more {
		id = last // what did not fit is not looked at again
	}
	at.id = id
	return page, more, nil
}

func scanFlow(rows *sql.Rows, id *int64) (*api.StoredFlow, error) {
	m := &api.StoredFlow{}
	e, received, err := scanEntry(rows, id, &m.Node, &m.Epoch, &m.Class, &m.Seq)
	m.Received, m.Flow = received, e.GetFlow()
	return m, err
}

func scanGrantEvent(rows *sql.Rows, id *int64) (*api.StoredGrantEvent, error) {
	m := &api.StoredGrantEvent{}
	e, received, err := scanEntry(rows, id, &m.Node, &m.Epoch, new(api.Class), &m.Seq)
	m.Received, m.Event = received, e.GetGrant()
	return m, err
}

func scanLoss(rows *sql.Rows, id *int64) (*api.StoredLoss, error) {
	m := &api.StoredLoss{}
	e, received, err := scanEntry(rows, id, &m.Node, &m.Epoch, &m.Class, &m.Seq)
	m.Received, m.Loss = received, e.GetLoss()
	return m, err
}

func scanTide(rows *sql.Rows, id *int64) (*api.StoredTide, error) {
	m := &api.StoredTide{}
	e, received, err := scanEntry(rows, id, &m.Node, &m.Epoch, new(api.Class), &m.Seq)
	m.Received, m.Tide = received, e.GetTide()
	return m, err
}

// scanEntry reads a row of node, epoch, class, seq, received and data.
func scanEntry(rows *sql.Rows, id *int64, node, epoch *string, class *api.Class, seq *uint64) (*api.Entry, *timestamppb.Timestamp, error) {
	var received int64
	var data []byte
	if err := rows.Scan(id, node, epoch, class, seq, &received, &data); err != nil {
		return nil, nil, err
	}
	e := &api.Entry{}
	return e, timestamppb.New(time.Unix(0, received)), decode(data, e)
}

func decode(data []byte, m proto.Message) error {
	if err := proto.Unmarshal(data, m); err != nil {
		return fmt.Errorf("%w: record cannot be read: %w", errDamaged, err)
	}
	return nil
}
