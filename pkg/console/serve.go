package console

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"
)

// stopTimeout bounds how long a browser can hold up a stop.
const stopTimeout = 5 * time.Second

// Serve answers browsers until ctx ends; it closes the listener.
func Serve(ctx context.Context, l net.Listener, h http.Handler, log *slog.Logger) error {
	server := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second, WriteTimeout: time.Minute, IdleTimeout: 2 * time.Minute,
		MaxHeaderBytes: 32 << 10, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug)}
	stopped := make(chan struct{})
	defer context.AfterFunc(ctx, func() {
		defer close(stopped)
		patience, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		if server.Shutdown(patience) != nil {
			server.Close()
		}
	})()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	<-stopped
	return nil
}

// door lets in one browser: the first that brings the word.
type door struct {
	host   string
	next   http.Handler
	cookie string // its name: one for each port, because browsers keep them by host alone

	mu      sync.Mutex
	word    string // guarded by mu; empty: somebody came in with it
	session string // guarded by mu; empty: nobody is in
}

// Door stands in front of a console that listens on this machine's loopback at host (address:port), where everybody on the machine can
// connect: the first browser that opens the address that it gives is let in, and no other after it.
func Door(host string, next http.Handler) (h http.Handler, address string) {
	_, port, _ := net.SplitHostPort(host)
	d := &door{host: host, next: next, cookie: "sallyport-" + port, word: rand.Text()}
	return headers(d), (&url.URL{Scheme: "http", Host: host, Path: "/enter", RawQuery: url.Values{"word": {d.word}}.Encode()}).String()
}

// ServeHTTP answers only under its own name: a page from elsewhere whose name was made to lead here has another.
func (d *door) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch {
	case r.Host != d.host:
		http.Error(w, "this is "+d.host, http.StatusMisdirectedRequest)
	case r.Method == http.MethodGet && r.URL.Path == "/enter":
		d.enter(w, r)
	case d.isIn(r):
		d.next.ServeHTTP(w, r)
	default:
		http.Error(w, "open the address that `sallyport console` printed; it can be used once: start the command again for another", http.StatusForbidden)
	}
}

func (d *door) enter(w http.ResponseWriter, r *http.Request) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.word == "" || !same(r.FormValue("word"), d.word) {
		http.Error(w, "this address was used, or is not the one that `sallyport console` printed: start the command again for another", http.StatusForbidden)
		return
	}
	d.word, d.session = "", rand.Text()
	http.SetCookie(w, &http.Cookie{Name: d.cookie, Value: d.session, Path: "/", HttpOnly: true, SameSite: http.SameSiteStrictMode})
	http.Redirect(w, r, "/", http.StatusSeeOther)
}

func (d *door) isIn(r *http.Request) bool {
	c, err := r.Cookie(d.cookie)
	d.mu.Lock()
	defer d.mu.Unlock()
	return err == nil && d.session != "" && same(c.Value, d.session)
}

func same(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }
