package grant

import (
	"crypto/sha256"
	"fmt"
	"time"

	"github.com/oklog/ulid/v2"
)

// Named gives a payload, whole but for its id, the id that is its own: the time at which it was made, and 80 bits of the
// SHA-256 of all that it says, this time included. So nobody can make another grant with the id of somebody's, and use it up or
// have the two confused.
func (p Payload) Named(made time.Time) (Payload, error) {
	var id ulid.ULID
	if err := id.SetTime(ulid.Timestamp(made)); err != nil {
		return Payload{}, fmt.Errorf("make grant id: %w", err)
	}
	p.ID = id.String()
	body, err := p.canonical()
	if err != nil {
		return Payload{}, fmt.Errorf("make grant id: %w", err)
	}
	sum := sha256.Sum256(body)
	if err := id.SetEntropy(sum[:10]); err != nil {
		return Payload{}, fmt.Errorf("make grant id: %w", err)
	}
	p.ID = id.String()
	return p, nil
}

// CheckID tells whether the id is the payload's own: ErrInvalid if not.
func (p Payload) CheckID() error {
	own, err := p.Named(p.Made())
	if err == nil && own.ID == p.ID {
		return nil
	}
	return refuse("id", ErrInvalid, "let `sallyport grant issue` make the grant, and its id", "%q is not the id of what the grant says", p.ID)
}
