package grant_test

import (
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
)

// The id is of everything that a grant says, and of when it was made; it survives the envelope.
func TestOwnID(t *testing.T) {
	p, err := goodPayload().Named(now)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.CheckID(); err != nil || !p.Made().Equal(now.Truncate(time.Millisecond)) {
		t.Errorf("its own id: %v, made at %s", err, p.Made())
	}
	seen := map[string]bool{p.ID: true}
	for name, change := range map[string]func(*grant.Payload){
		"requester": func(p *grant.Payload) { p.Requester = "mallory" }, "addresses": func(p *grant.Payload) { p.Addresses = p.Addresses[:1] },
		"duration": func(p *grant.Payload) { p.Duration++ }, "reason": func(p *grant.Payload) { p.Reason += "." },
		"audience": func(p *grant.Payload) { p.Audience = "node-2" }, "budget": func(p *grant.Payload) { p.Budget.Bytes = 0 },
		"notAfter": func(p *grant.Payload) { p.NotAfter = p.NotAfter.Add(time.Second) },
	} {
		other := p
		change(&other)
		checkError(t, other.CheckID(), grant.ErrInvalid, "id")
		own, err := other.Named(now)
		if err != nil || own.CheckID() != nil || seen[own.ID] {
			t.Errorf("with another %s: id %s, %v", name, own.ID, err)
		}
		seen[own.ID] = true
	}
	k := newKey(t)
	envelope, err := grant.Sign(t.Context(), p, k)
	if err != nil {
		t.Fatal(err)
	}
	if read, err := grant.Peek(envelope); err != nil || read.CheckID() != nil {
		t.Errorf("as it is read: %v, %v", err, read.CheckID())
	}
	if _, err := p.Named(time.Unix(-1, 0)); err == nil {
		t.Error("a time before 1970 has an id")
	}
}
