package agent

import (
	"errors"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// TestOwnIDs: nobody uses up another's grant by making one with its id, before or after it began.
func TestOwnIDs(t *testing.T) {
	b, c := crewed(t)
	l := b.begin()
	defer func() { l.kill() }()
	good := b.asked(c, "alice bob", nil)
	p, err := grant.Peek(good)
	must(t, err)
	burn := func(when string) {
		t.Helper()
		same := b.asked(c, "alice bob", func(q *grant.Payload) { q.ID, q.Reason = p.ID, "another" })
		if _, err := l.Activate(t.Context(), same, "uid:0"); !errors.Is(err, grant.ErrInvalid) || !contains(err.Error(), "id", p.ID) {
			t.Errorf("%s: another grant with its id: %v", when, err)
		}
	}
	burn("before")
	_, err = l.Activate(t.Context(), good, "uid:0")
	must(t, err)
	burn("while it is active")
	l.kill()
	l = b.begin()
	must(t, l.adopt(t.Context()))
	burn("after a restart")
	if _, err := l.Activate(t.Context(), good, "uid:0"); !errors.Is(err, store.ErrReplayed) {
		t.Errorf("the same once more: %v", err)
	}
}
