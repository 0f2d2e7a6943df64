package login

import (
	"encoding/base64"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestSealIsForOneUse(t *testing.T) {
	t.Parallel()
	k := NewKeys()
	made := use{what: "session", service: "app", host: "app.example.org"}
	text, err := k.seal(made, "secret")
	if err != nil {
		t.Fatal(err)
	}
	var got string
	if err := k.unseal(made, text, &got); err != nil || got != "secret" {
		t.Errorf("it opens to %q, %v", got, err)
	}
	for _, other := range []use{
		{what: "state", service: "app", host: "app.example.org"}, {what: "session", service: "ap", host: "papp.example.org"},
		{what: "session", service: "app", host: "app.example.com"}, {what: "session", service: "app", host: "app.example.org", browser: "x"}, {},
	} {
		if k.unseal(other, text, &got) == nil {
			t.Errorf("it opens for %+v", other)
		}
	}
	if NewKeys().unseal(made, text, &got) == nil {
		t.Error("it opens with another key")
	}
	again, err := k.seal(made, "secret")
	if err != nil || again == text {
		t.Errorf("the same value is sealed to the same text (%v)", err)
	}
	if strings.Contains(text, "secret") {
		t.Errorf("it can be read: %s", text)
	}
}

func TestKeysOfAFile(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "keys")
	read := func(text string) (*Keys, error) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return ReadKeys(file)
	}
	one, two := base64.StdEncoding.EncodeToString([]byte(strings.Repeat("1", 32))), base64.StdEncoding.EncodeToString([]byte(strings.Repeat("2", 32)))
	old, err := read(one + "\n")
	if err != nil {
		t.Fatal(err)
	}
	text, err := old.seal(use{what: "session"}, "kept")
	if err != nil {
		t.Fatal(err)
	}
	next, err := read("\n" + two + "\n" + one)
	if err != nil {
		t.Fatal(err)
	}
	var got string
	if err := next.unseal(use{what: "session"}, text, &got); err != nil || got != "kept" {
		t.Errorf("with a key in front, the old text opens to %q, %v", got, err)
	}
	if text, err = next.seal(use{what: "session"}, "new"); err != nil || old.unseal(use{what: "session"}, text, &got) == nil {
		t.Errorf("the new key does not seal (%v)", err)
	}
	for text, want := range map[string]string{"": "has no key", one + "\nabc\n": "keys:2: is not a key of 32 bytes", one[:40]: "keys:1: is not", "$" + one: "keys:1: is not"} {
		if _, err := read(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
	if _, err := KeysOf(file + "-none"); err == nil {
		t.Error("a file that is not there has keys")
	}
	if _, err := read(one); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(file, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := KeysOf(file); err == nil || !strings.Contains(err.Error(), "chmod o= ") {
		t.Errorf("keys that everybody can read: %v", err)
	}
	if k, err := KeysOf(""); err != nil || len(k.open) != 1 {
		t.Errorf("no file: %v", err)
	}
}

func TestStrip(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ given, left []string }{
		{[]string{"__Host-sallyport-session-app=abc"}, nil},
		{[]string{"a=b; __Host-sallyport-session-app=abc; c=d"}, []string{"a=b; c=d"}},
		{[]string{"a=b", " __host-SALLYPORT-session-app.1=abc ;c=d"}, []string{"a=b", "c=d"}},
		{[]string{"a=__Host-sallyport-session-app; __Host-other=1"}, []string{"a=__Host-sallyport-session-app; __Host-other=1"}},
		{nil, nil},
	} {
		h := http.Header{"Accept": {"x"}}
		if c.given != nil {
			h["Cookie"] = c.given
		}
		Strip(h)
		if !slices.Equal(h["Cookie"], c.left) || h.Get("Accept") != "x" {
			t.Errorf("%q: left %q", c.given, h["Cookie"])
		}
	}
	h := http.Header{"Set-Cookie": {"__Host-sallyport-session-app=x; Path=/; Secure", "a=b; Path=/"}}
	StripAnswer(h)
	if !slices.Equal(h["Set-Cookie"], []string{"a=b; Path=/"}) {
		t.Errorf("answer: left %q", h["Set-Cookie"])
	}
}

// TestEndingsAreBounded: those that ran out are forgotten first, then the oldest; whatever is as old as that counts as ended too.
func TestEndingsAreBounded(t *testing.T) {
	t.Parallel()
	e := endings{at: map[string]time.Time{}}
	now := time.Now()
	name := func(i int) string { return "s" + time.Duration(i).String() }
	until := func(i int) time.Time { return now.Add(time.Hour + time.Duration(i)) }
	for i := range maxEnded {
		e.add(name(i), until(i), now)
	}
	if e.has("never ended", until(-1)) {
		t.Error("a session counts as ended although nothing was forgotten")
	}
	e.add("one more", now.Add(2*time.Hour), now)
	if len(e.at) != maxEnded || !e.has(name(1), until(1)) || !e.has("one more", now.Add(2*time.Hour)) {
		t.Errorf("%d are kept", len(e.at))
	}
	if !e.has(name(0), until(0)) || !e.has("older", until(-1)) || e.has("younger", until(1)) {
		t.Errorf("a session that was ended and forgotten counts: %v; one that is older: %v; one that is younger does not: %v",
			!e.has(name(0), until(0)), !e.has("older", until(-1)), e.has("younger", until(1)))
	}
	e.add("much later", now.Add(3*time.Hour), now.Add(90*time.Minute))
	if len(e.at) != 2 || !e.has("one more", now.Add(2*time.Hour)) || !e.has("much later", now.Add(3*time.Hour)) || !e.has(name(0), until(0)) {
		t.Errorf("%d are kept after most ran out", len(e.at))
	}
	e.add("older than all", until(-2), now)
	if e.has("younger", until(1)) {
		t.Error("there was room, and yet more is forgotten")
	}
}
