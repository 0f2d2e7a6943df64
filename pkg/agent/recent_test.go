package agent

import (
	"slices"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/flow"
)

func seqs(records []flow.Record) (out []uint64) {
	for _, r := range records {
		out = append(out, r.Seq)
	}
	return out
}

func TestRecentKeepsTheLatest(t *testing.T) {
	r := newRecent(3)
	for _, want := range [][]uint64{nil, {1}, {1, 2}, {1, 2, 3}, {2, 3, 4}, {3, 4, 5}, {4, 5, 6}, {5, 6, 7}} {
		if got := seqs(r.last(0)); !slices.Equal(got, want) {
			t.Fatalf("got %v, want %v", got, want)
		}
		next := uint64(1)
		if len(want) > 0 {
			next = want[len(want)-1] + 1
		}
		r.add(flow.Record{Seq: next})
	}
	if got := seqs(r.last(2)); !slices.Equal(got, []uint64{7, 8}) {
		t.Errorf("last two: %v", got)
	}
}

func TestFollowHasNoGap(t *testing.T) {
	r := newRecent(8)
	r.add(flow.Record{Seq: 1})
	before, f, leave := r.follow(0)
	r.add(flow.Record{Seq: 2})
	if got := seqs(before); !slices.Equal(got, []uint64{1}) {
		t.Errorf("before: %v", got)
	}
	if got := <-f.records; got.Seq != 2 {
		t.Errorf("followed: %d", got.Seq)
	}
	leave()
	r.add(flow.Record{Seq: 3})
	if len(f.records) != 0 {
		t.Error("a follower that left still gets records")
	}
}

func TestFollowerThatFallsBehindIsEnded(t *testing.T) {
	r := newRecent(8)
	_, f, leave := r.follow(0)
	defer leave()
	for i := range followerRoom + 1 {
		r.add(flow.Record{Seq: uint64(i)})
	}
	n := 0
	for range f.records {
		n++
	}
	if n != followerRoom {
		t.Errorf("got %d records before the end, want %d", n, followerRoom)
	}
}
