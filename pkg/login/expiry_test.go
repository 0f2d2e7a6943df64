package login

import (
	"log/slog"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// TestProviderEndsTheSession: what the provider says of the session's end counts, and one that is over is not begun, or a browser
// would go to and fro.
func TestProviderEndsTheSession(t *testing.T) {
	t.Parallel()
	p := policy.IdentityProvider{Metadata: policy.Metadata{Name: "corp"}, Spec: policy.IdentityProviderSpec{Login: &policy.LoginSpec{
		ClientID: "app", Session: policy.Duration{Duration: 8 * time.Hour}, Idle: policy.Duration{Duration: time.Hour}}}}
	h := New(Config{Keys: NewKeys(), Log: slog.New(slog.DiscardHandler)})
	now := time.Unix(1_800_000_000, 0)
	for name, c := range map[string]struct {
		claim any
		ends  time.Duration // 0: it does not begin
	}{
		"nothing said": {nil, 8 * time.Hour},
		"no time":      {"soon", 8 * time.Hour},
		"sooner":       {float64(now.Add(time.Hour).Unix()), time.Hour},
		"later":        {float64(now.Add(9 * time.Hour).Unix()), 8 * time.Hour},
		"over":         {float64(now.Add(-time.Second).Unix()), 0},
	} {
		answer := httptest.NewRecorder()
		v := visit{h, policy.ProtectedService{Metadata: policy.Metadata{Name: "app"}}, p, answer, httptest.NewRequest("GET", "https://app.example.org/", nil), now}
		err := v.enter(policy.Caller{Provider: "corp", Subject: "ann", Claims: map[string]any{"session_expiry": c.claim}})
		if cookies := answer.Result().Cookies(); (err == nil) != (c.ends > 0) || (len(cookies) > 0) != (c.ends > 0) {
			t.Errorf("%s: begins with %v, %d cookies", name, err, len(cookies))
			continue
		}
		if c.ends == 0 {
			continue
		}
		back := httptest.NewRequest("GET", "https://app.example.org/", nil)
		for _, k := range answer.Result().Cookies() {
			back.AddCookie(k)
		}
		if s, ok := h.read(v.service, back); !ok || !s.end(p).Equal(now.Add(c.ends)) {
			t.Errorf("%s: ends at %s, want %s", name, s.end(p), now.Add(c.ends))
		}
	}
}
