package login

import (
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

const (
	// clockSlack is how far ahead the clock of another proxy with the same keys may be.
	clockSlack = time.Minute
	// maxEnded bounds the sessions that are remembered as ended.
	maxEnded = 1 << 16
)

// session is what a browser keeps sealed: who logged in, with whose word, and when.
type session struct {
	ID       string         `json:"id"`
	Provider string         `json:"provider"`
	Issuer   string         `json:"issuer"` // with Client: what the provider's name stood for
	Client   string         `json:"client"`
	Subject  string         `json:"subject"`
	Groups   []string       `json:"groups,omitempty"`
	Claims   map[string]any `json:"claims,omitempty"`
	Begun    time.Time      `json:"begun"`
	Seen     time.Time      `json:"seen"`          // when the cookie was last renewed
	Ends     time.Time      `json:"ends,omitzero"` // what the provider said of it
}

// Session is a login that counts.
type Session struct {
	// Caller that logged in, without an address.
	Caller policy.Caller
	// Expires is when it ends, whatever is done with it.
	Expires time.Time

	kept session
}

// Session finds the login that a request comes with. What it allows is for policy to say, at each request anew. It renews
// the browser's cookie in the answer when that is due, so w must not be written to yet.
func (h *Handler) Session(service policy.ProtectedService, w http.ResponseWriter, r *http.Request, now time.Time) (Session, bool) {
	p, ok := h.provider(service)
	if !ok {
		return Session{}, false
	}
	s, ok := h.read(service, r)
	if !ok || !s.counts(p, now) || h.ended.has(s.ID, s.runsOut()) {
		return Session{}, false
	}
	if now.Sub(s.Seen) > p.Spec.Login.Idle.Duration/10 {
		s.Seen = now
		if err := h.write(service, w, r, s); err != nil {
			return Session{}, false
		}
	}
	return Session{Caller: s.caller(p), Expires: s.end(p), kept: s}, true
}

// Lives says whether what was begun under a session may go on: the session was not logged out, is not over, and is still
// one by the policy in force. Silence does not end what is open.
func (h *Handler) Lives(service policy.ProtectedService, s Session, now time.Time) bool {
	p, ok := h.provider(service)
	return ok && s.kept.lasts(p, now) && !h.ended.has(s.kept.ID, s.kept.runsOut())
}

// caller is as the ID token told of it. A list of groups is kept once, and is among the claims again.
func (s session) caller(p policy.IdentityProvider) policy.Caller {
	if _, there := s.Claims[p.Spec.GroupsClaim]; !there && len(s.Groups) > 0 && s.Claims != nil {
		list := make([]any, len(s.Groups))
		for i, g := range s.Groups {
			list[i] = g
		}
		s.Claims[p.Spec.GroupsClaim] = list
	}
	return policy.Caller{Provider: s.Provider, Subject: s.Subject, Groups: s.Groups, Claims: s.Claims, Proof: policy.ProofOIDC}
}

// counts says whether it lasts and was used of late.
func (s session) counts(p policy.IdentityProvider, now time.Time) bool {
	return s.lasts(p, now) && now.Before(s.Seen.Add(p.Spec.Login.Idle.Duration))
}

// lasts compares it with what the policy in force says of its provider, so that a change of policy ends it as well.
func (s session) lasts(p policy.IdentityProvider, now time.Time) bool {
	return s.Provider == p.Name && s.Issuer == p.Spec.Issuer && s.Client == p.Spec.Login.ClientID &&
		!s.Begun.After(now.Add(clockSlack)) && now.Before(s.end(p))
}

// end is the earlier of what policy and the provider allow.
func (s session) end(p policy.IdentityProvider) time.Time {
	end := s.Begun.Add(p.Spec.Login.Session.Duration)
	if !s.Ends.IsZero() && s.Ends.Before(end) {
		return s.Ends
	}
	return end
}

// runsOut is when it is over under any policy.
func (s session) runsOut() time.Time { return s.Begun.Add(maxSession) }

func (h *Handler) read(service policy.ProtectedService, r *http.Request) (session, bool) {
	text, ok := parts(r, sessionCookie(service.Name))
	if !ok {
		return session{}, false
	}
	var s session
	if err := h.keys.unseal(use{what: "session", service: service.Name, host: hostOf(r)}, text, &s); err != nil {
		return session{}, false
	}
	return s, true
}

func (h *Handler) write(service policy.ProtectedService, w http.ResponseWriter, r *http.Request, s session) error {
	text, err := h.keys.seal(use{what: "session", service: service.Name, host: hostOf(r)}, s)
	if err != nil {
		return err
	}
	if len(text) > maxPart*maxParts {
		return errTooLarge
	}
	setParts(w, r, sessionCookie(service.Name), text)
	return nil
}

// endings are the sessions that were logged out and have not run out: their cookies may have been copied.
type endings struct {
	mu     sync.Mutex
	at     map[string]time.Time // guarded by mu: by a session's id, when its cookie runs out by itself
	forgot time.Time            // guarded by mu: of what runs out until then it is not known any more whether it was ended
}

// has says whether the session was ended that runs out then, or may have been: of two evils, a person logs in once more.
func (e *endings) has(id string, until time.Time) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	_, ended := e.at[id]
	return ended || !until.After(e.forgot)
}

// add forgets those that ran out, and when there are too many still, the one that will first, with all that run out before it.
func (e *endings) add(id string, until, now time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.at) >= maxEnded {
		maps.DeleteFunc(e.at, func(_ string, t time.Time) bool { return !now.Before(t) })
	}
	e.at[id] = until
	if len(e.at) > maxEnded {
		soonest := slices.MinFunc(slices.Collect(maps.Keys(e.at)), func(a, b string) int { return e.at[a].Compare(e.at[b]) })
		e.forgot = e.at[soonest]
		delete(e.at, soonest)
	}
}
