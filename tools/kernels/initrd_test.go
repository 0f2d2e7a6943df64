package main

import (
	"bytes"
	"strings"
	"testing"
)

// entries reads "newc" as the kernel does.
func entries(t *testing.T, b []byte) (names []string, data map[string]string) {
	t.Helper()
	data = map[string]string{}
	round := func(n int) int { return (n + 3) &^ 3 }
	field := func(i int) (n int) {
		for _, c := range string(b[6+8*i : 14+8*i]) {
			n = n<<4 | strings.IndexRune("0123456789abcdef", c)
		}
		return n
	}
	for {
		if string(b[:6]) != "070701" {
			t.Fatalf("no header at %q", b[:min(20, len(b))])
		}
		size, length := field(6), field(11)
		name := string(b[110 : 110+length-1])
		b = b[round(110+length):]
		if name == "TRAILER!!!" {
			return names, data
		}
		names, data[name] = append(names, name), string(b[:size])
		b = b[round(size):]
	}
}

func TestArchiveIsReadable(t *testing.T) {
	var out bytes.Buffer
	a := newArchive(&out)
	for _, err := range []error{
		a.file("/etc/one/deep", 0o644, []byte("12345")), a.file("/etc/two", 0o755, nil), a.dir("/tmp"), a.close(),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	names, data := entries(t, out.Bytes())
	if got := strings.Join(names, " "); got != "etc etc/one etc/one/deep etc/two tmp" {
		t.Errorf("entries: %s", got)
	}
	if data["etc/one/deep"] != "12345" || out.Len()%4 != 0 {
		t.Errorf("data %q in %d bytes", data["etc/one/deep"], out.Len())
	}
}
