package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"reflect"
	"strings"
	"testing"
	"testing/quick"
	"time"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

var hostile = []string{
	"", "plain", "ünïcödé 漢字", "\x1b[2J\x07", "two\nlines", "tab\tcell", "\u009b31m", "\u202egrant", "\U000e0041", "\xff\xfe", "\u2028", "yes", "12", "null", "- a: b", "\ufeff", "\u0085x", `back\slash "quote"`,
}

func TestEscapeShowsWhatDoesNotPrint(t *testing.T) {
	for in, want := range map[string]string{
		"plain":      "plain",
		"ünïcödé 漢字": "ünïcödé 漢字",
		"\x1b[2J":    `\x1b[2J`,
		"a\tb\nc":    `a\x09b\x0ac`,
		"\u009b31m":  `\u009b31m`,
		"\u202eabc":  `\u202eabc`,
		"\xff\ufffd": `\xff` + "\ufffd",
	} {
		if got := escape(in); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}

func FuzzEscape(f *testing.F) {
	for _, s := range hostile {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if got := escape(s); !utf8.ValidString(got) || strings.IndexFunc(got, unprintable) >= 0 {
			t.Errorf("%q became %q", s, got)
		}
	})
}

// Whatever a record says, its forms for machines print as themselves and mean what it says.
func TestEncodingsKeepTheMeaning(t *testing.T) {
	check := func(s string) bool {
		s = strings.ToValidUTF8(s, "?")
		value := map[string]string{"text": s}
		for form, encode := range map[string]func(any) ([]byte, error){"json": encodeJSON, "yaml": encodeYAML} {
			data, err := encode(value)
			if err != nil || strings.IndexFunc(strings.ReplaceAll(string(data), "\n", ""), unprintable) >= 0 {
				t.Logf("%s of %q: %q, %v", form, s, data, err)
				return false
			}
			var got map[string]string
			if form == "json" {
				err = json.Unmarshal(data, &got)
			} else {
				err = yaml.Unmarshal(data, &got)
			}
			if err != nil || !reflect.DeepEqual(got, value) {
				t.Logf("%s of %q: %q means %q, %v", form, s, data, got, err)
				return false
			}
		}
		return true
	}
	for _, s := range hostile {
		if !check(s) {
			t.Fail()
		}
	}
	if err := quick.Check(check, nil); err != nil {
		t.Error(err)
	}
}

func TestPlainForm(t *testing.T) {
	at := timestamppb.New(time.Date(2026, 7, 1, 22, 0, 0, 5e6, time.UTC))
	for _, c := range []struct {
		name  string
		value any
		want  string
	}{
		{"order, numbers, times", &api.LossRecord{Stage: "s", Count: 1 << 60, From: at},
			`{"stage":"s","cause":"","count":1152921504606846976,"from":"2026-07-01T22:00:00.005Z","at_most":false,"ranges":[]}`},
		{"lists and durations", &api.PathsReply{Paths: []*api.Path{{Slot: 1, Left: durationpb.New(1500 * time.Millisecond)}}},
			`"left":"1.5s"`},
		{"empty list", &api.GrantsReply{}, `{"grants":[]}`},
		{"map in order", &api.StatusReply{Reasons: map[string]uint64{"b": 2, "a": 1}}, `"reasons":{"a":1,"b":2}`},
		{"enum and nested", &api.StoredLoss{Class: api.Class_CLASS_CRITICAL, Loss: &api.LossRecord{}}, `"class":"CLASS_CRITICAL"`},
		{"unknown enum", &api.StoredLoss{Class: 9}, `"class":9`},
		{"bytes", &api.GrantEvent{Envelope: []byte("<>")}, `"envelope":"PD4="`},
	} {
		got, err := encodeJSON(c.value)
		if err != nil || !strings.Contains(string(got), c.want) || bytes.Count(got, []byte("\n")) != 1 {
			t.Errorf("%s: got %s, %v; want %s", c.name, got, err, c.want)
		}
	}
}

func TestReport(t *testing.T) {
	problems := &problemsError{what: "check grant", list: []*policy.Error{
		{File: "a.yaml", Line: 3, Field: "spec", Msg: "is \x1b[1mwrong", Hint: "mend it"}, {Field: "reason", Msg: "is empty"},
	}}
	for _, c := range []struct {
		err  error
		code int
		text string
	}{
		{nil, exitDone, ""},
		{errors.New("read: \x1b]0;x\x07\nline two"), exitFailed, "sallyport: read: \\x1b]0;x\\x07\nline two\n"},
		{fmt.Errorf("call: %w", client.ErrUnreachable), exitUnreachable, "sallyport: call: no answer\n"},
		{fmt.Errorf("call: %w", client.ErrForbidden), exitRefused, "sallyport: call: caller is not allowed\n"},
		{client.ErrNotFound, exitFailed, "sallyport: not found\n"},
		{withHint(usagef("no %s", "file"), "name it\nfirst"), exitUsage, "sallyport: no file\nhint: name it\\x0afirst\n"},
		{withHint(fs.ErrNotExist, "make it"), exitFailed, "sallyport: file does not exist\nhint: make it\n"},
		{problems, exitRefused, "sallyport: check grant: 2 problems\na.yaml:3: spec: is \\x1b[1mwrong\nhint: mend it\nreason: is empty\n"},
	} {
		var b bytes.Buffer
		if code := report(&b, c.err); code != c.code || b.String() != c.text {
			t.Errorf("%v: got %d %q, want %d %q", c.err, code, b.String(), c.code, c.text)
		}
	}
}

// A result that cannot be written is an error: the reader may be gone, or the disk full.
func TestWriteErrorsAreTold(t *testing.T) {
	for _, f := range formats {
		c := &cli{env: env{stdout: brokenWriter{}}, output: format(f)}
		if err := c.show(&api.StatusReply{}, func(t *table) { t.row("a", "b") }); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("%s: got %v", f, err)
		}
	}
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }
