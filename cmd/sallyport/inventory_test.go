package main

import (
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

// TestInventoryCommand: with an agent, a listener has its service and a client the identity that a flow record proved; what is proposed for it
// allows that identity. A second run overwrites nothing.
func TestInventoryCommand(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: other users' sockets (CAP_SYS_PTRACE and CAP_SYS_ADMIN)")
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	at := ln.Addr().String()
	_, port, _ := net.SplitHostPort(at)
	runDir, err := os.MkdirTemp("", "sp") // the path of a socket must be short
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(runDir)
	n := newNode(t, "apiVersion: sallyport.dev/v1alpha1\nkind: ProtectedService\nmetadata: {name: seen}\nspec: {target: Host, mode: Observe, ports: ["+port+"]}\n")
	n.record(&api.FlowRecord{Event: "WATCHED", Client: "127.0.0.1:40000", Server: at, Service: "seen", Identity: "spiffe://example.org/app/web", Count: 3})
	defer n.serve(t, filepath.Join(runDir, "agent.sock"))()

	dir := filepath.Join(t.TempDir(), "proposed")
	args := []string{"inventory", "--run-dir", runDir, "--propose", dir, "-o", "json"}
	r := command(t.Context(), nil, args...)
	if r.code != 0 {
		t.Fatalf("%+v", r)
	}
	var found struct {
		Listeners []struct {
			Service, Mode string
			Clients       []struct {
				Identity    string
				Connections int
			}
		}
		Proposed []struct{ Name string }
	}
	if err := json.Unmarshal([]byte(r.stdout), &found); err != nil {
		t.Fatalf("%v\n%s", err, r.stdout)
	}
	seen := false
	for _, l := range found.Listeners {
		if l.Service == "seen" {
			seen = l.Mode == "Observe" && len(l.Clients) == 1 && l.Clients[0].Identity == "spiffe://example.org/app/web" && l.Clients[0].Connections == 3
		}
	}
	if !seen {
		t.Errorf("the agent's service is not in %s", r.stdout)
	}
	data, err := os.ReadFile(filepath.Join(dir, "seen.yaml"))
	if err != nil || !strings.Contains(string(data), "- spiffe://example.org/app/web") || !strings.Contains(string(data), "denied nobody") {
		t.Errorf("%v\n%s", err, data)
	}
	if r := command(t.Context(), nil, "policy", "check", dir); r.code != 0 {
		t.Errorf("policy check: %+v", r)
	}
	if r := command(t.Context(), nil, args...); r.code == 0 || !strings.Contains(r.stderr, "no file is overwritten") {
		t.Errorf("again: %+v", r)
	}
	if r := command(t.Context(), nil, "inventory", "--mode", "Enforce"); r.code != exitUsage || !strings.Contains(r.stderr, "closes nothing") {
		t.Errorf("to be enforced: %+v", r)
	}
	if r := command(t.Context(), nil, "inventory", "--run-dir", t.TempDir()); r.code != 0 || !strings.Contains(r.stderr, "only sockets were looked at") {
		t.Errorf("without an agent: %+v", r)
	}
}
