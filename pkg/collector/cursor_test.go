package collector

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"reflect"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

// Whoever comes back with the cursor of a record gets the oldest of those that follow it, each once, over days, with whatever filter.
func TestCursors(t *testing.T) { onEngines(t, testCursors) }

func testCursors(t *testing.T, i ids) {
	at := &clock{t: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)}
	r := start(t, i, func(c *Config) { c.Now, c.Boot, c.Retain = at.now, at.boot, 48*time.Hour })
	n, _ := r.connect(t, "node-1", epoch1)
	odd := func(f *api.FlowRecord) { f.Service = "redis" }
	for day := range uint64(3) {
		for k := range uint64(7) {
			seq := day*7 + k + 1
			n.store(flows, flowEntry(seq, map[bool]func(*api.FlowRecord){true: odd}[seq%2 == 1]))
		}
		at.pass(24 * time.Hour)
	}
	all := r.flows(t, &api.FlowQuery{})
	for k := range all {
		var got []uint64
		for after := all[k].GetCursor(); ; {
			page := r.flows(t, &api.FlowQuery{After: after, Limit: 4})
			if got = append(got, seqs(page)...); len(page) < 4 {
				break
			}
			after = page[3].GetCursor()
		}
		if !reflect.DeepEqual(got, seqs(all[k+1:])) {
			t.Errorf("after %d are %v", all[k].GetSeq(), got)
		}
	}
	if got := seqs(r.flows(t, &api.FlowQuery{After: all[4].GetCursor(), Service: "redis", Limit: 3})); !reflect.DeepEqual(got, []uint64{7, 9, 11}) {
		t.Errorf("of redis are %v", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	follower := must(r.reader(t).Flows(ctx, &api.FlowQuery{After: all[19].GetCursor(), Follow: true}))(t)
	for seq := uint64(21); seq <= 23; seq++ {
		if seq > 21 {
			n.store(flows, flowEntry(seq, nil))
		}
		if f := must(follower.Recv())(t); f.GetSeq() != seq {
			t.Fatalf("have %d, want %d", f.GetSeq(), seq)
		}
	}
	at.pass(48 * time.Hour) // the first days go: what followed their records is what is left
	n.store(flows, flowEntry(24, nil))
	if left := r.flows(t, &api.FlowQuery{}); len(left) == 24 || !reflect.DeepEqual(seqs(r.flows(t, &api.FlowQuery{After: all[2].GetCursor()})), seqs(left)) {
		t.Errorf("left are %v", seqs(left))
	}
}

// A cursor of another collector or of other records is told from one of this, and from what is none.
func TestCursorRefused(t *testing.T) { onEngines(t, testCursorRefused) }

func testCursorRefused(t *testing.T, i ids) {
	r, other := start(t, i, nil), start(t, newIDs(t), nil)
	var cursors []string
	for _, r := range []*running{r, other} {
		n, _ := r.connect(t, "node-1", epoch1)
		n.store(flows, flowEntry(1, nil), lossEntry(3, 2))
		cursors = append(cursors, r.flows(t, &api.FlowQuery{})[0].GetCursor())
	}
	losses, err := r.reader(t).Losses(t.Context(), &api.LossQuery{})
	loss := must(drain(losses, err))(t)[0].GetCursor()
	raw := must(base64.RawURLEncoding.DecodeString(cursors[0]))(t)
	raw[15] ^= 1
	for name, cursor := range map[string]string{"garbage": "x", "long": cursors[0] + "AAAA", "cut off": cursors[0][:20], "changed": base64.RawURLEncoding.EncodeToString(raw),
		"another collector": cursors[1], "other records": loss} {
		stream, err := r.reader(t).Flows(t.Context(), &api.FlowQuery{After: cursor})
		if _, err := drain(stream, err); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	engine := byte('s')
	if r.engine.kind() == engine {
		engine = 'p'
	}
	foreign := cursorsOf(r, engine).of(position{"2026-03-01", 1})
	if _, err := cursorsOf(r, r.engine.kind()).read(foreign); err == nil {
		t.Error("a cursor of the other engine was taken")
	}
	if got := seqs(r.flows(t, &api.FlowQuery{After: cursors[0]})); got != nil {
		t.Errorf("after the last one are %v", got)
	}
}

func cursorsOf(r *running, engine byte) cursors {
	return cursors{engine, r.write.key.KeyHash(), "flows"}
}

// What is asked of grant events, losses and tides, and their cursors.
func TestQueries(t *testing.T) { onEngines(t, testQueries) }

func testQueries(t *testing.T, i ids) {
	at := &clock{t: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)}
	r := start(t, i, func(c *Config) { c.Now, c.Boot = at.now, at.boot })
	n, _ := r.connect(t, "node-1", epoch1)
	long := "g\x00"
	for k := range byte(200) { // of which no index makes less
		long += fmt.Sprintf("%x", sha256.Sum256([]byte{k}))
	}
	event := func(seq uint64, step string) *api.Entry {
		e := grantEntry(seq, long, step) // no column takes that
		e.GetGrant().Time = timestamppb.New(time.Unix(1700000000+int64(seq), 0))
		return e
	}
	tide := func(seq uint64) *api.Entry {
		return &api.Entry{Seq: seq, Record: &api.Entry_Tide{Tide: &api.Tide{Paths: []*api.PathTide{{Grant: "g\x00"}}}}}
	}
	for k := range uint64(3) {
		n.store(critical, event(k*6+1, "ACTIVATED"), event(k*6+2, "ENDED"), lossEntry(k*6+5, 3), tide(k*6+6))
		at.pass(time.Hour)
	}
	client := r.reader(t)
	events := func(q *api.GrantQuery) (out []uint64, cursors []string) {
		t.Helper()
		stream, err := client.GrantEvents(t.Context(), q)
		for _, m := range must(drain(stream, err))(t) {
			out, cursors = append(out, m.GetSeq()), append(cursors, m.GetCursor())
		}
		return out, cursors
	}
	losses := func(q *api.LossQuery) (out []uint64, cursors []string) {
		t.Helper()
		stream, err := client.Losses(t.Context(), q)
		for _, m := range must(drain(stream, err))(t) {
			out, cursors = append(out, m.GetSeq()), append(cursors, m.GetCursor())
		}
		return out, cursors
	}
	tides := func(q *api.TideQuery) (out []uint64, cursors []string) {
		t.Helper()
		stream, err := client.Tides(t.Context(), q)
		for _, m := range must(drain(stream, err))(t) {
			out, cursors = append(out, m.GetSeq()), append(cursors, m.GetCursor())
		}
		return out, cursors
	}
	_, ofEvents := events(&api.GrantQuery{})
	_, ofLosses := losses(&api.LossQuery{})
	_, ofTides := tides(&api.TideQuery{})
	hour := func(n int) *timestamppb.Timestamp {
		return timestamppb.New(time.Date(2026, 3, 1, 12+n, 0, 0, 0, time.UTC))
	}
	for name, c := range map[string]struct {
		got  func() ([]uint64, []string)
		want []uint64
	}{
		"step": {func() ([]uint64, []string) { return events(&api.GrantQuery{Step: "ended"}) }, []uint64{2, 8, 14}},
		"until": {func() ([]uint64, []string) {
			return events(&api.GrantQuery{Until: timestamppb.New(time.Unix(1700000008, 0))})
		}, []uint64{1, 2, 7}},
		"grant": {func() ([]uint64, []string) {
			return events(&api.GrantQuery{Grant: event(1, "").GetGrant().GetGrant(), Limit: 1})
		}, []uint64{14}},
		"after event":  {func() ([]uint64, []string) { return events(&api.GrantQuery{After: ofEvents[1], Limit: 2}) }, []uint64{7, 8}},
		"since":        {func() ([]uint64, []string) { return losses(&api.LossQuery{Since: hour(1)}) }, []uint64{11, 17}},
		"after loss":   {func() ([]uint64, []string) { return losses(&api.LossQuery{After: ofLosses[0], Limit: 1}) }, []uint64{11}},
		"after tide":   {func() ([]uint64, []string) { return tides(&api.TideQuery{After: ofTides[1]}) }, []uint64{18}},
		"tide's grant": {func() ([]uint64, []string) { return tides(&api.TideQuery{Grant: "g\x00", Limit: 1}) }, []uint64{18}},
	} {
		if got, _ := c.got(); !slices.Equal(got, c.want) {
			t.Errorf("%s: have %v, want %v", name, got, c.want)
		}
	}
	stream, err := client.Losses(t.Context(), &api.LossQuery{Since: &timestamppb.Timestamp{Nanos: -1}})
	if _, err := drain(stream, err); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a time that is none: %v", err)
	}
}
