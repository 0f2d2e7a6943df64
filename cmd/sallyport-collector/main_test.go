package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/identity"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

const childEnv = "SALLYPORT_COLLECTOR_TEST_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

var domain = spiffeid.RequireTrustDomainFromString("example.org")

// workloadAPI serves the identity at a socket below dir.
func workloadAPI(t *testing.T, auth *devauthority.Authority, dir string, id spiffeid.ID) string {
	t.Helper()
	path := filepath.Join(dir, filepath.Base(id.Path())+".sock")
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := auth.Serve(ctx, path, id); err != nil {
			t.Errorf("workload API: %v", err)
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return "unix://" + path
}

// command is the command as a process.
type command struct {
	cmd    *exec.Cmd
	stderr bytes.Buffer
}

func startChild(t *testing.T, notify string, args ...string) *command {
	t.Helper()
	c := &command{cmd: exec.Command(os.Args[0], args...)}
	c.cmd.Env = append(os.Environ(), childEnv+"=1", "NOTIFY_SOCKET="+notify)
	c.cmd.Stderr = &c.stderr
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.cmd.Process.Kill() })
	return c
}

// The whole life: identity from the Workload API, readiness, a node's records over mTLS, a local
// reader, an orderly stop.
func TestServe(t *testing.T) {
	dir := must(os.MkdirTemp("", "collector"))(t) // short: socket paths have a limit
	t.Cleanup(func() { os.RemoveAll(dir) })
	auth := must(devauthority.New(domain, devauthority.Options{}))(t)
	api1 := workloadAPI(t, auth, dir, spiffeid.RequireFromPath(domain, "/sallyport/collector"))
	l := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	address := l.Addr().String()
	l.Close()
	configFile := filepath.Join(dir, "c.yaml")
	browsers := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	pages := browsers.Addr().String()
	browsers.Close()
	text := head + "  workloadAPI: " + api1 + "\n  listen: " + address + "\n  dataDir: " + dir + "/data\n  readers: [spiffe://example.org/ops/*]\n  console: {listen: '" + pages + "'}\n"
	if err := os.WriteFile(configFile, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	notify := must(net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"}))(t)
	defer notify.Close()
	c := startChild(t, notify.LocalAddr().String(), "--config", configFile, "--socket", dir+"/read.sock")
	if msg := told(t, notify); !strings.HasPrefix(msg, "READY=1\n") {
		t.Fatalf("service manager was told %q", msg)
	}

	deliver(t, dir, address, workloadAPI(t, auth, dir, spiffeid.RequireFromPath(domain, "/sallyport/agent/node-1")))
	conn := must(grpc.NewClient("unix:"+dir+"/read.sock", grpc.WithTransportCredentials(insecure.NewCredentials())))(t)
	defer conn.Close()
	stream := must(api.NewAuditClient(conn).Flows(t.Context(), &api.FlowQuery{Follow: true}))(t)
	if f := must(stream.Recv())(t); f.GetNode() != "node-1" || f.GetFlow().GetFlowId() != "f1" {
		t.Errorf("stored is %v", f)
	}

	me := must(auth.Issue(spiffeid.RequireFromPath(domain, "/ops/alice")))(t)
	browser := &http.Client{Transport: &http.Transport{TLSClientConfig: tlsconfig.MTLSClientConfig(me, auth.Bundle(), tlsconfig.AuthorizeMemberOf(domain))}}
	resp := must(browser.Get("https://" + pages + "/nodes"))(t)
	if body := string(must(io.ReadAll(resp.Body))(t)); !strings.Contains(body, "node-1") || !strings.Contains(body, "Read as spiffe://example.org/ops/alice") {
		t.Errorf("a browser is shown %s: %s", resp.Status, body)
	}
	resp.Body.Close()

	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if msg := told(t, notify); msg != "STOPPING=1" {
		t.Errorf("service manager was told %q", msg)
	}
	if err := c.cmd.Wait(); err != nil {
		t.Errorf("end: %v\n%s", err, c.stderr.String())
	}
	if _, err := stream.Recv(); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("follower was told %v", err)
	}
}

func told(t *testing.T, l *net.UnixConn) string {
	t.Helper()
	if err := l.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1000)
	return string(buf[:must(l.Read(buf))(t)])
}

// deliver is a node that hands over one record.
func deliver(t *testing.T, dir, address, workloadAPI string) {
	t.Helper()
	source := must(identity.New(identity.Config{Address: workloadAPI}))(t)
	st := must(store.Open(dir + "/state/node.db"))(t)
	defer st.Close()
	s := must(audit.New(audit.Config{Store: st, Node: "node-1", Address: address, Source: source,
		ServerID: spiffeid.RequireFromPath(domain, "/sallyport/collector"), Logger: slog.New(slog.DiscardHandler)}))(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 2)
	go func() { done <- source.Run(ctx) }()
	go func() { done <- s.Run(ctx) }()
	s.Flow(flow.Record{FlowID: "f1", Event: flow.EventOpen})
	for deadline := time.Now().Add(30 * time.Second); must(s.Status(ctx))(t).FlowPending > 0; {
		if time.Now().After(deadline) {
			t.Fatalf("not delivered: %+v", must(s.Status(ctx))(t))
		}
		<-time.After(10 * time.Millisecond)
	}
	cancel()
	if err := errors.Join(<-done, <-done); err != nil {
		t.Error(err)
	}
}

// What is wrong is told with its place and the next step, and nothing is made.
func TestRefuses(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad.yaml")
	if err := os.WriteFile(bad, []byte(head+"  dataDir: "+dir+"/data\n  listen: nowhere\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	named := filepath.Join(dir, "named.yaml")
	if err := os.WriteFile(named, []byte(head+"  postgres: {urlFile: "+dir+"/url}\n  console: {listen: ':8443', certificate: "+dir+"/web.pem, key: "+dir+"/web.key}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	rights := filepath.Join(dir, "rights.yaml") // root may everything but what cannot be written at all
	if err := os.WriteFile(rights, []byte(head+"  dataDir: /sys/sallyport\n  listen: '127.0.0.1:1'\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		args []string
		want []string
	}{
		"bad file": {[]string{"--config", bad}, []string{"error: " + bad + ":7: spec.listen: ", "\nhint: write HOST:PORT"}},
		"check":    {[]string{"check", "--config", bad}, []string{"error: " + bad + ":7: spec.listen: "}},
		"no files": {[]string{"check", "--config", named}, []string{"error: " + dir + "/url: spec.postgres.urlFile: ", "hint: name a file that the collector's user can read",
			"error: spec.console: browsers cannot be shown the certificate: open " + dir + "/web.pem", "hint: have " + dir + "/web.pem and "}},
		"no file":    {[]string{"--config", dir + "/none"}, []string{"error: read configuration: ", "hint: name the file with --config"}},
		"no rights":  {[]string{"--config", rights}, []string{"error: create collector: ", "hint: let the collector's user write to dataDir"}},
		"no command": {[]string{"serve"}, []string{`error: unknown command "serve"`}},
	} {
		t.Run(name, func(t *testing.T) {
			ch := startChild(t, "", c.args...)
			if err := ch.cmd.Wait(); err == nil {
				t.Error("it ended without an error")
			}
			for _, want := range c.want {
				if !strings.Contains(ch.stderr.String(), want) {
					t.Errorf("have %q, want %q", ch.stderr.String(), want)
				}
			}
		})
	}
	if _, err := os.Stat(dir + "/data"); !os.IsNotExist(err) {
		t.Errorf("directory was made: %v", err)
	}
}
