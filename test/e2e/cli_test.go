package e2e_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/sallyport-dev/sallyport/pkg/grant"
)

// said is how a command ended.
type said struct {
	stdout, stderr string
	err            error
}

func (s said) String() string { return fmt.Sprintf("%v\n%s%s", s.err, s.stdout, s.stderr) }

// try runs the real command, in the test's own network: the agent's socket is a file.
func (w *world) try(args ...string) said {
	return capture(exec.Command(filepath.Join(w.bin, "sallyport"), append([]string{"--run-dir", w.files.run}, args...)...))
}

func capture(cmd *exec.Cmd) said {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	return said{stdout.String(), stderr.String(), err}
}

// cli runs a command that must succeed.
func (w *world) cli(t *testing.T, args ...string) string {
	t.Helper()
	s := w.try(args...)
	if s.err != nil {
		t.Fatalf("sallyport %s: %s", strings.Join(args, " "), s)
	}
	return s.stdout
}

// read runs a reading command and takes its JSON.
func read[T any](t *testing.T, w *world, args ...string) T {
	t.Helper()
	var v T
	out := w.cli(t, append(args, "-o", "json")...)
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		t.Fatalf("sallyport %s: %v: %q", strings.Join(args, " "), err, out)
	}
	return v
}

// status is what the tests look at in `sallyport status`.
type status struct {
	Ready       bool
	NotReadyWhy string `json:"not_ready_why"`
	Generation  uint32
	Services    uint32
	LivePaths   uint32 `json:"live_paths"`
	LiveFlows   uint32 `json:"live_flows"`
	LostFlow    uint64 `json:"lost_flow"`
	Collector   string
	Identity    string `json:"identity_state"`
	Problems    []string
	Hooks       []struct{ Device, Role string }
}

func (w *world) status(t *testing.T) status {
	t.Helper()
	return read[status](t, w, "status")
}

// path is a line of `sallyport paths`.
type path struct {
	Slot            uint32
	State           string
	Grant           string
	Client          string
	Flows           uint64
	BytesToServer   uint64 `json:"bytes_to_server"`
	BytesToClient   uint64 `json:"bytes_to_client"`
	PacketsToServer uint64 `json:"packets_to_server"`
	PacketsToClient uint64 `json:"packets_to_client"`
}

func (w *world) paths(t *testing.T) []path {
	t.Helper()
	return read[struct{ Paths []path }](t, w, "paths").Paths
}

// activated is a grant that the agent has put to work.
type activated struct {
	ID       string
	State    string
	Deadline time.Time
}

// wanted are the terms of a grant.
type wanted struct {
	service  string
	client   netip.Addr
	duration string
}

// issue signs a grant with alice's key, as she does, and gives its file.
func (w *world) issue(t *testing.T, g wanted, more ...string) string {
	t.Helper()
	file := filepath.Join(w.Dir, ulid.Make().String()+".grant")
	w.cli(t, append([]string{"grant", "issue", "--service", g.service, "--client", g.client.String(), "--for", g.duration,
		"--node", nodeName, "--reason", "test", "--key", w.key, "--policy", w.files.resources, "--out", file,
		"--yes"}, more...)...)
	return file
}

// open issues and activates, as alice does on the node.
func (w *world) open(t *testing.T, g wanted) activated {
	t.Helper()
	return read[activated](t, w, "grant", "activate", w.issue(t, g), "--key", w.key, "--yes")
}

func (w *world) revoke(t *testing.T, g activated) {
	t.Helper()
	if got := read[activated](t, w, "grant", "revoke", g.ID, "--why", "test"); got.State != "revoked" {
		t.Fatalf("revoked grant is %q", got.State)
	}
}

// publicKey gives the public half of a private key's file, as a Keyring has it.
func publicKey(t *testing.T, file string) string {
	t.Helper()
	key, err := grant.ReadPrivateKey(file)
	must(t, err)
	return key.Public().String()
}

// run starts a program of the world in the node and waits for its end.
func (w *world) run(t *testing.T, program string, args ...string) (string, error) {
	t.Helper()
	return w.Node.Run(within(t, patience), filepath.Join(w.bin, program), args...)
}

// uninstall takes Sallyport off the node, as an operator does.
func (w *world) uninstall(t *testing.T) string {
	t.Helper()
	out, err := w.run(t, "sallyport", "uninstall", "--yes", "--config", w.files.agent)
	if err != nil {
		t.Fatalf("uninstall: %v", err)
	}
	return out
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
