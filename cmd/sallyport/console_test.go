package main

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"net/http/cookiejar"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/proof"
	"github.com/sallyport-dev/sallyport/test/evidence"
)

// TestConsole: the command serves what the collector has, to the browser that opens the address it prints, until it is interrupted.
func TestConsole(t *testing.T) {
	t.Parallel()
	r := newRealCollector(t)
	n := evidence.NewLog(t, "").Node("node-a")
	const grant = "01J8ZQ4X5M3T9V0Y2B7C6D1E4F"
	r.send("node-a", n, n.Unlogged(proof.ClassCritical, nil, evidence.Grant(grant, "ACTIVATED"), evidence.Grant(grant, "REVOKED")))

	ctx, interrupt := context.WithCancel(t.Context())
	out, in := io.Pipe()
	done := make(chan error, 1)
	go func() {
		e := env{stdin: strings.NewReader(""), stdout: in, stderr: io.Discard, getenv: func(string) string { return "" }, now: time.Now}
		err := run(ctx, e, []string{"console", "--collector", "unix:" + r.socket, "--key", filepath.Join(r.dir, "log.pub")})
		in.CloseWithError(err)
		done <- err
	}()
	address, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	address = strings.TrimSpace(address)
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	browser := &http.Client{Jar: jar}
	visit := func(address string) string {
		t.Helper()
		resp, err := browser.Get(address)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(body)
	}
	base, _, _ := strings.Cut(address, "/enter?")
	if body := visit(base); !strings.Contains(body, "open the address") {
		t.Errorf("without the word: %s", body)
	}
	if body := visit(address); !strings.Contains(body, "Live paths") {
		t.Errorf("at first: %s", body)
	}
	if body := visit(base + "/grant?id=" + grant); !strings.Contains(body, "Proof verified") || strings.Contains(body, "as the collector itself tells it") || !strings.Contains(body, "REVOKED") {
		t.Errorf("the grant: %s", body)
	}
	interrupt()
	if err := <-done; err != nil {
		t.Errorf("end: %v", err)
	}
}

// TestConsoleRefuses says what is wrong before it serves anything.
func TestConsoleRefuses(t *testing.T) {
	t.Parallel()
	r := newRealCollector(t)
	for name, c := range map[string]struct {
		args []string
		code int
		want string
	}{
		"no collector":  {nil, exitUsage, "needs the collector"},
		"open to all":   {[]string{"--collector", "unix:" + r.socket, "--listen", "0.0.0.0:0"}, exitUsage, "no address of this machine alone"},
		"by name":       {[]string{"--collector", "unix:" + r.socket, "--listen", "localhost:0"}, exitUsage, "127.0.0.1:PORT"},
		"nobody there":  {[]string{"--collector", "unix:" + r.socket + "-none"}, exitUnreachable, "no answer"},
		"no key":        {[]string{"--collector", "unix:" + r.socket, "--key", "none.pub"}, exitCannotTell, "read key"},
		"port is taken": {[]string{"--collector", "unix:" + r.socket, "--listen", r.address}, exitFailed, "--listen"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second) // it would serve for ever
			defer cancel()
			got := command(ctx, nil, append([]string{"console"}, c.args...)...)
			if got.code != c.code || !strings.Contains(got.stderr, c.want) || got.stdout != "" {
				t.Errorf("%+v", got)
			}
		})
	}
}
