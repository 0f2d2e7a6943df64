package proxy

import (
	"net/http"
	"testing"
)

// TestOneSpellingOfATarget: a path is judged as it is sent on, and what could be read in two ways is refused.
func TestOneSpellingOfATarget(t *testing.T) {
	for raw, want := range map[string]string{ // "": refused
		"/":                  "/",
		"/a/b/":              "/a/b/",
		"/a?x=/../b":         "/a",
		"/%61dmin":           "/admin",
		"/caf%c3%a9":         "/caf%C3%A9",
		"/a%20b":             "/a%20b",
		"/a;v=1/b":           "/a;v=1/b",
		"/100%25":            "/100%25",
		"/..":                "",
		"/a/../b":            "",
		"/a/./b":             "",
		"/a/..;x/b":          "",
		"/%2e%2e/b":          "",
		"/a/.%2E/b":          "",
		"//b":                "",
		"/a//b":              "",
		"/a%2fb":             "",
		"/a%5cb":             "",
		`/a\b`:               "",
		"/a%00":              "",
		"/a%0d%0aX:y":        "",
		"/a%7f":              "",
		"/a%252e%252e/b":     "",
		"/a%":                "",
		"/a%zz":              "",
		"/a#b":               "",
		"/a b":               "",
		"/\xff":              "",
		"/%ff":               "",
		"/%c0%ae%c0%ae/b":    "",
		"/%c2%80":            "",
		"*":                  "",
		"":                   "",
		"http://a/":          "",
		"http://other.test/": "",
		"a":                  "",
	} {
		got, err := readTarget(&http.Request{Method: "GET", RequestURI: raw, Host: "a"}, nil)
		if (err == nil) != (want != "") || err == nil && got.path != want {
			t.Errorf("%q is %q, %v; want %q", raw, got.path, err, want)
		}
	}
}

func TestOneSpellingOfAHost(t *testing.T) {
	for raw, want := range map[string]string{ // "": refused
		"Web.Example.org": "web.example.org", "web.example.org:8443": "web.example.org", "[fd00::1]:80": "fd00::1", "10.0.0.1": "10.0.0.1",
		"": "", "a,b": "", "a b": "", "a/b": "", "a@b": "", "web.example.org.": "", ".a": "", "a..b": "", "a:": "", "a:0": "", "a:70000": "",
		"a:+80": "", "a:b": "", "[fd00::1": "", "[10.0.0.1]": "", "[fd00::1%25lo]": "", "ä": "",
	} {
		got, err := readTarget(&http.Request{Method: "GET", RequestURI: "/", Host: raw}, nil)
		if (err == nil) != (want != "") || err == nil && got.host != want {
			t.Errorf("%q is %q, %v; want %q", raw, got.host, err, want)
		}
	}
	listed := []string{"web.example.org"}
	if _, err := readTarget(&http.Request{Method: "GET", RequestURI: "/", Host: "WEB.example.org:443"}, listed); err != nil {
		t.Errorf("its own name: %v", err)
	}
	if _, err := readTarget(&http.Request{Method: "GET", RequestURI: "/", Host: "other.example.org"}, listed); err == nil {
		t.Error("served under a name that is not listed")
	}
	two := &http.Request{Method: "GET", RequestURI: "/", Host: "a", Header: http.Header{"Host": {"b"}}}
	if _, err := readTarget(two, nil); err == nil {
		t.Error("took a Host that is not the :authority")
	}
	for _, method := range []string{"CONNECT", "TRACE"} {
		if _, err := readTarget(&http.Request{Method: method, RequestURI: "/", Host: "a"}, nil); err == nil {
			t.Errorf("took %s", method)
		}
	}
}
