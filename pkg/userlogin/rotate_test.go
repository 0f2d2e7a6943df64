package userlogin_test

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/sallyport-dev/sallyport/pkg/userlogin"
)

// rotating is a provider that takes a refresh token once, and gives another one with the access tokens that it is told to give.
type rotating struct {
	*httptest.Server
	t      *testing.T
	access []string // the next ones
	good   int      // of the refresh token that it takes
}

func newRotating(t *testing.T, access ...string) *rotating {
	r := &rotating{t: t, access: access, good: 1}
	r.Server = httptest.NewTLSServer(r)
	t.Cleanup(r.Close)
	return r
}

func (r *rotating) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	answer := map[string]any{"issuer": r.URL, "authorization_endpoint": r.URL + "/auth", "token_endpoint": r.URL + "/token", "jwks_uri": r.URL + "/keys"}
	if q.URL.Path == "/token" {
		if q.FormValue("refresh_token") != fmt.Sprint("refresh-", r.good) {
			w.WriteHeader(http.StatusBadRequest)
			answer = map[string]any{"error": "invalid_grant"}
		} else {
			r.good++
			answer = map[string]any{"access_token": r.access[0], "token_type": "Bearer", "refresh_token": fmt.Sprint("refresh-", r.good)}
			r.access = r.access[1:]
		}
	}
	if err := json.NewEncoder(w).Encode(answer); err != nil {
		r.t.Error(err)
	}
}

func (r *rotating) client() userlogin.Client {
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.Certificate().Raw})
	return userlogin.Client{Issuer: r.URL, ID: "sallyport", CA: string(ca), Show: userlogin.ShowAccess}
}

func signed(t *testing.T, until time.Time) string {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.EdDSA, Key: key}, nil)
	must(t, err)
	text, err := jwt.Signed(signer).Claims(jwt.Claims{Subject: "ann", Expiry: jwt.NewNumericDate(until)}).Serialize()
	must(t, err)
	return text
}

// TestRefreshTokensAreNotLost: a provider that takes a refresh token once has taken it also where the token that came for it is of no use.
func TestRefreshTokensAreNotLost(t *testing.T) {
	t.Parallel()
	p := newRotating(t, "opaque", "more of that", signed(t, time.Now().Add(time.Hour)))
	s := userlogin.Store{Dir: t.TempDir()}
	first := userlogin.Kept{Client: p.client(), Subject: "ann", Token: "old", Expires: time.Now().Add(30 * time.Second), Refresh: "refresh-1"}
	must(t, s.Save("work", first))
	for range 2 {
		if k, err := s.Token(t.Context(), "work"); err == nil && k.Token != "old" {
			t.Errorf("%+v", k)
		}
	}
	k, err := s.Token(t.Context(), "work")
	if err != nil || k.Subject != "ann" || k.Token == "old" || k.Refresh != "refresh-4" {
		t.Errorf("%+v, %v", k, err)
	}
	s.Now = func() time.Time { return time.Now().Add(2 * time.Hour) }
	p.access = []string{"opaque"}
	if _, err := s.Token(t.Context(), "work"); !errors.Is(err, userlogin.ErrOpaque) {
		t.Errorf("expired, and nothing of use comes: %v", err)
	}
	if k, err := s.Load("work"); err != nil || k.Refresh != "refresh-5" || k.Subject != "ann" {
		t.Errorf("kept: %+v, %v", k, err)
	}
}
