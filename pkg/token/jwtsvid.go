package token

import (
	"context"
	"fmt"
	"time"

	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// jwtSVID verifies JWT-SVIDs of every trust domain whose bundle is there; rules say which identities count.
type jwtSVID struct {
	bundles   jwtbundle.Source
	audiences []string
}

// Verify implements Provider.
func (j jwtSVID) Verify(_ context.Context, raw string, now time.Time) (Verified, error) {
	t, err := examine(raw)
	if err != nil {
		return Verified{}, err
	}
	// go-spiffe takes every audience when it is given none.
	if err := claims(t.claims).audience(j.audiences); err != nil {
		return Verified{}, err
	}
	end, err := claims(t.claims).period(now, jwt.DefaultLeeway)
	if err != nil {
		return Verified{}, err
	}
	svid, err := jwtsvid.ParseAndValidate(raw, j.bundles, j.audiences)
	if err != nil {
		return Verified{}, fmt.Errorf("%w: %s", ErrSignature, quote(err.Error()))
	}
	if svid.ID.Path() == "" {
		return Verified{}, fmt.Errorf("%w: %s is a trust domain, not a workload", ErrMalformed, svid.ID)
	}
	return Verified{Caller: policy.Caller{ID: svid.ID, Claims: svid.Claims, Proof: policy.ProofJWT}, Expires: end}, nil
}
