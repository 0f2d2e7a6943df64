package collector

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

// TestQuestionsUseIndexes: none of the usual questions looks at every record of a day.
func TestQuestionsUseIndexes(t *testing.T) {
	r := start(t, newIDs(t), nil)
	n, _ := r.connect(t, "node-1", epoch1)
	n.store(flows, flowEntry(1, nil))
	since, until := timestamppb.New(r.cfg.Now()), timestamppb.Now()
	for index, q := range map[string]*api.FlowQuery{
		"flows_grant":    {Grant: "g", Identity: "i", Verdict: "bypassed"},
		"flows_identity": {Identity: "i", Verdict: "denied", Reason: "no_tls"},
		"flows_reason":   {Verdict: "denied", Reason: "no_tls", Service: "postgres"},
		"flows_verdict":  {Verdict: "denied", Service: "postgres"},
		"flows_time":     {Service: "postgres", Since: since, Until: until},
	} {
		f, err := flowFeed(q)
		if err != nil {
			t.Fatal(err)
		}
		for _, direction := range []string{"DESC", "ASC"} {
			if plan := r.plan(t, `SELECT id FROM flows WHERE `+f.condition()+` ORDER BY id `+direction+` LIMIT 100`, f.args); !strings.Contains(plan, index+" (") {
				t.Errorf("%v %s: %s, want %s", q, direction, plan, index)
			}
		}
	}
}

// plan is what SQLite does for a query on the newest day.
func (r *running) plan(t *testing.T, q string, args []any) (plan string) {
	t.Helper()
	days := must(r.engine.days(t.Context()))(t)
	_, err := days[len(days)-1].read(func(db tables) error {
		rows, err := db.QueryContext(t.Context(), `EXPLAIN QUERY PLAN `+q, args...)
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			var step string
			if err := rows.Scan(new(int), new(int), new(int), &step); err != nil {
				return err
			}
			plan += step + "; "
		}
		return rows.Err()
	})
	if err != nil {
		t.Fatal(err)
	}
	return plan
}

// TestLimit: as many as asked for, the newest of them, whatever pages they are read in.
func TestLimit(t *testing.T) { onEngines(t, testLimit) }

func testLimit(t *testing.T, i ids) {
	r := start(t, i, nil)
	n, _ := r.connect(t, "node-1", epoch1)
	for first := uint64(1); first <= 3*pageRows; first += pageRows {
		n.store(flows, flowEntries(first, first+pageRows-1)...)
	}
	for _, c := range []struct{ limit, from, to uint64 }{{100, 1401, 1500}, {pageRows, 1001, 1500}, {pageRows + 1, 1000, 1500}, {2 * pageRows, 501, 1500}, {5000, 1, 1500}} {
		got := seqs(r.flows(t, &api.FlowQuery{Service: "postgres", Limit: uint32(c.limit)}))
		if uint64(len(got)) != c.to-c.from+1 || got[0] != c.from || got[len(got)-1] != c.to {
			t.Errorf("limit %d: %d records from %d to %d, want %d to %d", c.limit, len(got), got[0], got[len(got)-1], c.from, c.to)
		}
	}
	if got := r.flows(t, &api.FlowQuery{Service: "other"}); len(got) != 0 {
		t.Errorf("%d records of a service that there is not", len(got))
	}
}
