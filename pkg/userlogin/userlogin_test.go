package userlogin_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/userlogin"
	"github.com/sallyport-dev/sallyport/test/oidc"
)

const deviceGrant = "urn:ietf:params:oauth:grant-type:device_code"

// terminal is a program as providers know it: without a secret, and with a browser at hand or none.
var terminal = oidc.Client{
	ID: "sallyport", GrantTypes: []string{"authorization_code", "refresh_token", deviceGrant}, ResponseTypes: []string{"code"},
	RedirectURIs: []string{"http://127.0.0.1/callback"}, TokenAuthMethod: "none", Application: "native",
}

func start(t *testing.T, ttl time.Duration) (*oidc.Provider, userlogin.Client) {
	t.Helper()
	p := oidc.Start(t, oidc.Options{Clients: []oidc.Client{terminal}, TTL: ttl, Resource: "https://db.example.org"})
	return p, userlogin.Client{Issuer: p.Issuer, ID: terminal.ID, CA: p.CA, Show: userlogin.ShowAccess}
}

func discover(t *testing.T, c userlogin.Client) *userlogin.Provider {
	t.Helper()
	p, err := userlogin.Discover(t.Context(), c)
	must(t, err)
	return p
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// person answers at the provider, beside the login that waits for it.
func person(t *testing.T, p *oidc.Provider, name string) (visit func(address string)) {
	var visits sync.WaitGroup
	t.Cleanup(visits.Wait)
	return func(address string) {
		visits.Go(func() {
			if _, err := p.Person(name, address); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestLogins: by a browser here and by one elsewhere, with either token, and with what renews it.
func TestLogins(t *testing.T) {
	t.Parallel()
	p, c := start(t, time.Minute)
	byID := c
	byID.Show = userlogin.ShowID
	for name, client := range map[string]userlogin.Client{"access": c, "id": byID} {
		for way, login := range map[string]func(*userlogin.Provider) (userlogin.Kept, error){
			"browser": func(u *userlogin.Provider) (userlogin.Kept, error) {
				return u.Browser(t.Context(), person(t, p, "ann"))
			},
			"device": func(u *userlogin.Provider) (userlogin.Kept, error) {
				visit := person(t, p, "ann")
				return u.Device(t.Context(), func(address, code, whole string) {
					if !strings.HasPrefix(address, p.Issuer) || code == "" {
						t.Errorf("person is sent to %q with %q", address, code)
					}
					visit(whole)
				})
			},
		} {
			k, err := login(discover(t, client))
			must(t, err)
			audience := map[string]string{"access": "https://db.example.org", "id": terminal.ID}[name]
			if k.Subject != "ann" || len(k.Audience) != 1 || k.Audience[0] != audience || k.Refresh == "" || time.Until(k.Expires) > time.Minute {
				t.Errorf("%s %s: %+v", way, name, k)
			}
		}
	}
}

// TestOnlyTheLoginIsAnswered: whoever else reaches the port of the redirect is nobody, and a no is a no.
func TestOnlyTheLoginIsAnswered(t *testing.T) {
	t.Parallel()
	p, c := start(t, time.Minute)
	ask := func(where string, q url.Values) int {
		answer, err := http.Get(where + "?" + q.Encode())
		must(t, err)
		defer answer.Body.Close()
		_, _ = io.Copy(io.Discard, answer.Body)
		return answer.StatusCode
	}
	before := map[string]string{"another provider": "another provider answers", "no name": "another provider answers", "no code": "has no code"}
	for name, give := range map[string]func(q url.Values){
		"refused":          func(q url.Values) { q.Set("error", "access_denied") },
		"another provider": func(q url.Values) { q.Set("code", "x"); q.Set("iss", "https://other.example.org") },
		"no name":          func(q url.Values) { q.Set("code", "x"); q.Del("iss") },
		"no code":          func(url.Values) {},
		"made up":          func(q url.Values) { q.Set("code", "made-up") },
	} {
		_, err := discover(t, c).Browser(t.Context(), func(address string) {
			u, err := url.Parse(address)
			must(t, err)
			q := u.Query()
			if q.Get("code_challenge_method") != "S256" || q.Get("nonce") == "" || len(q.Get("state")) < 20 {
				t.Errorf("login is asked for by %s", address)
			}
			back := q.Get("redirect_uri")
			if s := ask(back, url.Values{"state": {"another"}, "code": {"theirs"}, "iss": {p.Issuer}}); s != http.StatusNotFound {
				t.Errorf("%s: a stranger's answer: %d", name, s)
			}
			if s := ask(strings.TrimSuffix(back, "/callback"), url.Values{"state": {q.Get("state")}}); s != http.StatusNotFound {
				t.Errorf("%s: another path: %d", name, s)
			}
			mine := url.Values{"state": {q.Get("state")}, "iss": {p.Issuer}}
			give(mine)
			ask(back, mine)
		})
		if err == nil || name == "refused" && !errors.Is(err, userlogin.ErrRefused) || name == "made up" && !errors.Is(err, userlogin.ErrRefused) {
			t.Errorf("%s: %v", name, err)
		}
		// A code that is made up is refused whoever answers.
		if why := before[name]; err != nil && !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v, want %q before the code is redeemed", name, err, why)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := discover(t, c).Browser(ctx, func(string) { cancel() }); !errors.Is(err, context.Canceled) {
		t.Errorf("login that was given up: %v", err)
	}
}

// TestKept: in a file for its owner alone, whole, renewed before its end by one of many, and gone after a logout.
func TestKept(t *testing.T) {
	t.Parallel()
	p, c := start(t, 2*time.Minute)
	u := discover(t, c)
	k, err := u.Browser(t.Context(), person(t, p, "ann"))
	must(t, err)
	ahead := time.Duration(0)
	s := userlogin.Store{Dir: filepath.Join(t.TempDir(), "a", "logins"), Now: func() time.Time { return time.Now().Add(ahead) }}
	must(t, s.Save("work", k))
	for path, mode := range map[string]os.FileMode{s.Dir: 0o700, filepath.Join(s.Dir, "work.json"): 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: %v %v", path, info.Mode(), err)
		}
	}
	if got, err := s.Token(t.Context(), "work"); err != nil || got.Token != k.Token {
		t.Errorf("%+v, %v", got, err)
	}
	ahead = 90 * time.Second // less than a minute is left
	renewed := make([]userlogin.Kept, 8)
	var all sync.WaitGroup
	for i := range renewed {
		all.Go(func() {
			var err error
			if renewed[i], err = s.Token(t.Context(), "work"); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	// The provider's clock has not moved, so that the token it gives is as near its end: each renews in turn, with what the one before got.
	for _, got := range renewed {
		if got.Token == k.Token || got.Token == "" || got.Subject != "ann" {
			t.Errorf("%+v", got)
		}
	}
	ahead = 0
	p.Stop()
	if _, err := s.Token(t.Context(), "work"); err != nil {
		t.Errorf("provider away, token good: %v", err)
	}
	ahead = 90 * time.Second
	if _, err := s.Token(t.Context(), "work"); err != nil {
		t.Errorf("provider away, token good for less than a minute: %v", err)
	}
	ahead = time.Hour
	if _, err := s.Token(t.Context(), "work"); !errors.Is(err, userlogin.ErrAway) {
		t.Errorf("provider away, token expired: %v", err)
	}
	last := renewed[len(renewed)-1]
	must(t, s.Save("work", last))
	if was, err := s.Remove("work"); err != nil || was.Refresh != last.Refresh || was.Refresh == "" {
		t.Errorf("what was removed: %+v, %v", was, err)
	}
	if _, err := s.Token(t.Context(), "work"); !errors.Is(err, userlogin.ErrNoLogin) {
		t.Errorf("after the logout: %v", err)
	}
	if left, err := os.ReadDir(s.Dir); err != nil || len(left) > 0 {
		t.Errorf("left over: %v %v", left, err)
	}
}

// TestLoginsThatCannotBeRenewed: revoked, or never renewable.
func TestLoginsThatCannotBeRenewed(t *testing.T) {
	t.Parallel()
	p, c := start(t, time.Minute)
	u := discover(t, c)
	k, err := u.Browser(t.Context(), person(t, p, "ann"))
	must(t, err)
	must(t, u.Revoke(t.Context(), k))
	s := userlogin.Store{Dir: t.TempDir(), Now: func() time.Time { return time.Now().Add(time.Hour) }}
	must(t, s.Save("revoked", k))
	k.Refresh = ""
	must(t, s.Save("short", k))
	for _, name := range []string{"revoked", "short"} {
		if _, err := s.Token(t.Context(), name); !errors.Is(err, userlogin.ErrExpired) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestWrongLogins(t *testing.T) {
	t.Parallel()
	s := userlogin.Store{Dir: t.TempDir()}
	must(t, s.Save("mine", userlogin.Kept{Refresh: "r"}))
	must(t, os.Chmod(filepath.Join(s.Dir, "mine.json"), 0o640))
	if _, err := s.Load("mine"); err == nil || !strings.Contains(err.Error(), "by others") {
		t.Errorf("a file that others can read: %v", err)
	}
	if was, err := s.Remove("mine"); err != nil || was.Refresh != "r" {
		t.Errorf("what others could read is not given to be revoked: %+v, %v", was, err)
	}
	foreign := filepath.Join(s.Dir, "foreign.json")
	for what, spoil := range map[string]func() error{"writable": func() error { return os.Chmod(foreign, 0o620) }, "owned": func() error { return os.Chown(foreign, 1, -1) }} {
		must(t, s.Save("foreign", userlogin.Kept{Refresh: "r"}))
		if err := spoil(); err != nil { // of root alone
			t.Log(err)
			continue
		}
		if _, err := s.Load("foreign"); err == nil || !strings.Contains(err.Error(), "by others") {
			t.Errorf("a file that is %s by others: %v", what, err)
		}
		if was, err := s.Remove("foreign"); err != nil || was.Refresh != "" {
			t.Errorf("what is %s by others is believed: %+v, %v", what, was, err)
		}
	}
	for _, name := range []string{"", "..", "a/b", ".hidden"} {
		if err := s.Save(name, userlogin.Kept{}); err == nil {
			t.Errorf("%q is taken for a name", name)
		}
	}
	p, c := start(t, time.Minute)
	for name, change := range map[string]func(*userlogin.Client){
		"plain address": func(c *userlogin.Client) { c.Issuer = strings.Replace(c.Issuer, "https", "http", 1) },
		"no such CA":    func(c *userlogin.Client) { c.CA = "x" },
		"another CA":    func(c *userlogin.Client) { c.CA = "" },
		"no secret":     func(c *userlogin.Client) { c.SecretFile = filepath.Join(s.Dir, "none") },
		"nobody there":  func(c *userlogin.Client) { c.Issuer = "https://127.0.0.1:1" },
	} {
		wrong := c
		change(&wrong)
		if _, err := userlogin.Discover(t.Context(), wrong); err == nil || errors.Is(err, userlogin.ErrAway) != (name == "nobody there" || name == "another CA") {
			t.Errorf("%s: %v", name, err)
		}
	}
	c.ID = "unknown"
	if _, err := discover(t, c).Device(t.Context(), func(string, string, string) {}); !errors.Is(err, userlogin.ErrRefused) {
		t.Errorf("a client that %s does not know: %v", p.Issuer, err)
	}
}
