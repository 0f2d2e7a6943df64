package userlogin

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/oauth2"
)

// callback is the path that the provider sends the browser back to.
const callback = "/callback"

// Browser logs a person in by a browser on this machine: the code flow with PKCE, and a redirect to a port of the loopback address
// that is open for this one login (RFC 8252). show is told where the browser has to go.
func (p *Provider) Browser(ctx context.Context, show func(address string)) (Kept, error) {
	var config net.ListenConfig
	l, err := config.Listen(ctx, "tcp4", "127.0.0.1:0")
	if err != nil {
		return Kept{}, fmt.Errorf("listen for the browser: %w", err)
	}
	to := p.config
	to.RedirectURL = "http://" + l.Addr().String() + callback
	state, nonce, verifier := rand.Text(), rand.Text(), oauth2.GenerateVerifier()
	back := &redirect{state: state, issuer: p.client.Issuer, named: p.metadata.NamesIssuer, answer: make(chan answer, 1)}
	server := &http.Server{Handler: back, ReadHeaderTimeout: timeout, MaxHeaderBytes: 32 << 10}
	go func() { _ = server.Serve(l) }() // ends with Shutdown
	defer func() {
		ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second) // for the page to be read
		defer cancel()
		if server.Shutdown(ending) != nil {
			server.Close()
		}
	}()
	show(to.AuthCodeURL(state, p.options(oidc.Nonce(nonce), oauth2.S256ChallengeOption(verifier))...))
	select {
	case <-ctx.Done():
		return Kept{}, fmt.Errorf("wait for the browser: %w", context.Cause(ctx))
	case a := <-back.answer:
		if a.err != nil {
			return Kept{}, a.err
		}
		asking, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		token, err := to.Exchange(p.context(asking), a.code, p.redeem(oauth2.VerifierOption(verifier))...)
		if err != nil {
			return Kept{}, judge("redeem the code", err)
		}
		return p.kept(asking, token, nonce)
	}
}

// answer is what the provider sent the browser back with.
type answer struct {
	code string
	err  error
}

// redirect takes the one answer that belongs to the login. Others can reach its port, too: what does not know the state is
// nothing.
type redirect struct {
	state, issuer string
	named         bool // the provider says its name with each answer
	answer        chan answer
}

// ServeHTTP implements http.Handler.
func (b *redirect) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	if r.Method != http.MethodGet || r.URL.Path != callback || subtle.ConstantTimeCompare([]byte(q.Get("state")), []byte(b.state)) != 1 {
		http.Error(w, "this is no answer to the login", http.StatusNotFound)
		return
	}
	a := b.read(q)
	select {
	case b.answer <- a:
	default: // it was answered before
	}
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Referrer-Policy", "no-referrer")
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	if a.err != nil {
		w.WriteHeader(http.StatusForbidden)
		_, _ = io.WriteString(w, "The login has failed: the terminal says why. This page can be closed.\n")
		return
	}
	_, _ = io.WriteString(w, "The terminal has the answer. This page can be closed.\n")
}

func (b *redirect) read(q url.Values) answer {
	switch {
	case (b.named || q.Has("iss")) && q.Get("iss") != b.issuer:
		return answer{err: errors.New("another provider answers, or one that does not say who it is")}
	case q.Has("error"):
		return answer{err: fmt.Errorf("log in: %w: %q", ErrRefused, q.Get("error")[:min(len(q.Get("error")), 100)])}
	case len(q["code"]) != 1 || q.Get("code") == "":
		return answer{err: errors.New("the provider's answer has no code")}
	}
	return answer{code: q.Get("code")}
}
