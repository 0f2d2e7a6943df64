// Package console shows people what a collector holds, as pages of HTML: what goes around the proxy now, the records of flows, each grant's
// life with its proof, what is still to be reviewed, and what the nodes delivered. It asks the collector as everybody does, for whoever
// asks it, and it needs no script in the browser.
package console

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"html/template"
	"io/fs"
	"net/http"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/mod/sumdb/note"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

//go:embed templates static
var files embed.FS

// Config of a console.
type Config struct {
	// Audit is asked with the context of the reader's request: what it may read and do is for the collector to say.
	Audit api.AuditClient
	// LogKey is the verifier key of the collector's log. Empty: the collector's own word, which the pages say.
	LogKey string
	// Who names the reader of a request, for the page.
	Who func(*http.Request) string
	// MayAct tells whether a reader is shown how to act. Whether an act is done is for the collector to say.
	MayAct func(*http.Request) bool
	// Now is the wall clock; nil: time.Now.
	Now func() time.Time
}

// Bounds of what a page takes.
const (
	pageTime     = 20 * time.Second // for the collector's answers to one page
	maxForm      = 256 << 10        // of what is posted; a statement is 64 KiB at most
	refreshEvery = 15               // seconds, of pages that show what is live
	maxPages     = 16               // that are made at once; others wait
)

type console struct {
	cfg   Config
	key   note.Verifier // nil: the collector's own word
	pages map[string]*template.Template
}

// New makes a console. Who reads it has to be known before a request comes here.
func New(cfg Config) (http.Handler, error) {
	if cfg.Audit == nil || cfg.Who == nil || cfg.MayAct == nil {
		return nil, errors.New("create console: the collector, and who reads and acts, are needed")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	c := &console{cfg: cfg}
	var err error
	if cfg.LogKey != "" {
		if c.key, err = note.NewVerifier(cfg.LogKey); err != nil {
			return nil, fmt.Errorf("create console: read key of the log: %w", err)
		}
	}
	if c.pages, err = parsePages(); err != nil {
		return nil, fmt.Errorf("create console: %w", err)
	}
	return c.handler()
}

func (c *console) handler() (http.Handler, error) {
	static, err := fs.Sub(files, "static")
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.Handle("GET /static/", http.StripPrefix("/static/", http.FileServerFS(static)))
	for pattern, page := range map[string]func(*http.Request) (answer, error){
		"GET /{$}":        c.live,
		"GET /flows":      c.flows,
		"GET /grant":      c.grant,
		"GET /reviews":    c.reviews,
		"GET /nodes":      c.nodes,
		"GET /losses":     c.losses,
		"POST /revoke":    c.revoke,
		"POST /statement": c.statement,
		"/":               c.nowhere,
	} {
		mux.Handle(pattern, c.page(page))
	}
	mux.HandleFunc("GET /grant/bundle", c.bundle)
	guard := http.NewCrossOriginProtection()
	guard.SetDenyHandler(c.page(func(*http.Request) (answer, error) {
		return answer{}, &problem{http.StatusForbidden, "That came from another site", "Nothing was done.", "Open the console itself, and act there."}
	}))
	return headers(atMost(maxPages, guard.Handler(mux))), nil
}

// atMost bounds how many requests are worked on at once.
func atMost(n int, next http.Handler) http.Handler {
	room := make(chan struct{}, n)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case room <- struct{}{}:
			defer func() { <-room }()
			next.ServeHTTP(w, r)
		case <-r.Context().Done():
		}
	})
}

const contentPolicy = "default-src 'none'; style-src 'self'; img-src 'self'; script-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"

// headers are those of every answer. Nothing of it is kept by the browser.
func headers(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		for name, value := range map[string]string{
			"Content-Security-Policy":      contentPolicy,
			"X-Content-Type-Options":       "nosniff",
			"X-Frame-Options":              "DENY",
			"Referrer-Policy":              "same-origin",
			"Cross-Origin-Opener-Policy":   "same-origin",
			"Cross-Origin-Resource-Policy": "same-origin",
			"Cache-Control":                "no-store",
		} {
			h.Set(name, value)
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxForm)
		next.ServeHTTP(w, r)
	})
}

// answer is a page to be shown.
type answer struct {
	name    string // of the template
	title   string
	data    any
	refresh bool // it shows what is live
	code    int  // 0: 200
}

// frame is what every page is shown in.
type frame struct {
	Title   string
	Nav     []navItem
	Who     string
	MayAct  bool
	Now     time.Time
	Refresh int    // seconds; 0: it stands still
	Paused  bool   // the reader stopped it
	Again   string // the page's own address, the other way
	Data    any
}

type navItem struct {
	Path, Name string
	Here       bool
}

func (c *console) page(make func(*http.Request) (answer, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), pageTime)
		defer cancel()
		a, err := make(r.WithContext(ctx))
		if err != nil {
			a = problemPage(err)
		}
		body, err := c.render(r, a)
		if err != nil { // a template of ours is wrong
			http.Error(w, "the page could not be made", http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		if a.code != 0 {
			w.WriteHeader(a.code)
		}
		_, _ = w.Write(body) // a reader who left misses nothing
	})
}

func (c *console) render(r *http.Request, a answer) ([]byte, error) {
	f := frame{Title: a.title, Who: c.cfg.Who(r), MayAct: c.cfg.MayAct(r), Now: c.cfg.Now().UTC(), Data: a.data}
	for _, n := range []navItem{{Path: "/", Name: "Live paths"}, {Path: "/flows", Name: "Flows"}, {Path: "/reviews", Name: "Reviews"}, {Path: "/nodes", Name: "Nodes"}, {Path: "/losses", Name: "Losses"}} {
		n.Here = r.Method == http.MethodGet && r.URL.Path == n.Path
		f.Nav = append(f.Nav, n)
	}
	if a.refresh {
		q := r.URL.Query()
		f.Paused = q.Get("refresh") == "off"
		if q.Del("refresh"); !f.Paused {
			f.Refresh = refreshEvery
			q.Set("refresh", "off")
		}
		f.Again = strings.TrimSuffix(r.URL.Path+"?"+q.Encode(), "?")
	}
	var out bytes.Buffer
	if err := c.pages[a.name].Execute(&out, f); err != nil {
		return nil, err
	}
	return visible(out.Bytes()), nil
}

// visible writes characters out that cannot be seen, or turn the text around them: records come from elsewhere. Our own
// templates have none but ends of lines.
func visible(page []byte) []byte {
	if utf8.Valid(page) && bytes.IndexFunc(page, unseen) < 0 {
		return page
	}
	out := make([]byte, 0, len(page)+64)
	for len(page) > 0 {
		r, n := utf8.DecodeRune(page)
		switch {
		case r == utf8.RuneError && n == 1:
			out = fmt.Appendf(out, `\x%02x`, page[0])
		case unseen(r):
			out = append(out, strings.Trim(strconv.QuoteRuneToASCII(r), "'")...)
		default:
			out = append(out, page[:n]...)
		}
		page = page[n:]
	}
	return out
}

func unseen(r rune) bool { return r != '\n' && !unicode.IsPrint(r) }

func (c *console) nowhere(*http.Request) (answer, error) {
	return answer{}, &problem{http.StatusNotFound, "There is no such page", "The address leads nowhere here.", "Go on from one of the pages above."}
}
