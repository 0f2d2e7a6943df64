package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"sallyport":       main,
		"sallyport-agent": siblingAgent,
		pluginName:        main,
	})
}

// siblingAgent stands next to the command under test and says how it was called.
func siblingAgent() {
	fmt.Println("agent called:", strings.Join(os.Args[1:], " "))
	if _, err := os.Stat(os.Args[len(os.Args)-1]); err != nil {
		fmt.Fprintln(os.Stderr, "no configuration")
		os.Exit(1)
	}
}

// resources are what the node of the tests enforces. KEY is alice's public key.
const resources = `apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: postgres}
spec:
  target: Pod
  ports: [5432]
  addresses: ["10.2.0.2", "fd00:2::2"]
  access:
    - identities: ["spiffe://example.org/app/web", "spiffe://example.org/ops/*"]
---
apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: ssh}
spec: {target: Host, mode: Shadow, ports: [22]}
---
apiVersion: sallyport.dev/v1alpha1
kind: BypassPolicy
metadata: {name: nightly-backup}
spec:
  services: [postgres]
  bindings: [address]
  sources: ["10.1.0.0/24"]
  maxDuration: 15m
  requesters: [alice]
---
apiVersion: sallyport.dev/v1alpha1
kind: Keyring
metadata: {name: operators}
spec:
  version: 1
  people:
    - name: alice
      keys: [{publicKey: "KEY"}]
`

// TestStories runs the stories of testdata/script, each against a node and a collector of its own.
func TestStories(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup:               setUpStory,
	})
}

func setUpStory(e *testscript.Env) error {
	t := e.T().(testing.TB)
	runDir, err := os.MkdirTemp("", "sp") // the path of a socket must be short
	if err != nil {
		return err
	}
	e.Defer(func() { os.RemoveAll(runDir) })
	key := storyKey(t, filepath.Join(e.WorkDir, "alice.key"))
	text := strings.ReplaceAll(resources, "KEY", key)
	if err := os.WriteFile(filepath.Join(e.WorkDir, "resources.yaml"), []byte(text), 0o644); err != nil {
		return err
	}
	quorum := strings.NewReplacer("requesters: [alice]\n", "requesters: [alice]\n  approvals: [{from: [\"group:dba\"]}]\n",
		"  people:\n", "  groups: [{name: dba, members: [bob]}]\n  people:\n    - name: bob\n      keys: [{publicKey: \""+
			storyKey(t, filepath.Join(e.WorkDir, "bob.key"))+"\"}]\n").Replace(text)
	if err := os.WriteFile(filepath.Join(e.WorkDir, "quorum.yaml"), []byte(quorum), 0o644); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(e.WorkDir, "team.yaml"), []byte(teamResources(t, text, e.WorkDir)), 0o644); err != nil {
		return err
	}
	n := newNode(t, text)
	n.record(someFlows()...)
	e.Defer(n.serve(t, filepath.Join(runDir, "agent.sock")))
	c := newCollector(t)
	c.node = n
	e.Defer(c.serve(t, filepath.Join(runDir, "collector.sock")))
	e.Setenv("SALLYPORT_RUN_DIR", runDir)
	e.Setenv("RUN", runDir)
	e.Setenv("COLLECTOR", "unix:"+filepath.Join(runDir, "collector.sock"))
	e.Setenv("USER", "root") // nobody's name in a keyring
	return nil
}

// teamResources want two approvals of a group, beside whose people there are others: with a key that has ended, was revoked or has no
// such use, and somebody whom nobody asks. Their keys are in dir.
func teamResources(t testing.TB, text, dir string) string {
	var people, revoked strings.Builder
	for _, p := range []struct{ name, more string }{{"bob", ""}, {"carol", ""}, {"dave", ""}, {"ended", ", notAfter: 2020-01-01T00:00:00Z"}, {"revoked", ""},
		{"useless", ", uses: [request]"}, {"officer", ", uses: [resources]"}, {"stranger", ""}} {
		key := storyKey(t, filepath.Join(dir, "team-"+p.name+".key"))
		fmt.Fprintf(&people, "    - name: %s\n      keys: [{publicKey: %q%s}]\n", p.name, key, p.more)
		if k, err := policy.ParsePublicKey(key); err == nil && p.name == "revoked" {
			revoked.WriteString(k.ID())
		}
	}
	return strings.NewReplacer("requesters: [alice]\n", "requesters: [alice]\n  approvals: [{from: [\"group:dba\"], min: 2}]\n",
		"  people:\n", "  revokedKeys: ["+revoked.String()+"]\n  groups: [{name: dba, members: [bob, carol, dave, ended, revoked, useless]}]\n  people:\n"+people.String()).Replace(text)
}

// result is what one command in this process did.
type result struct {
	code           int
	stdout, stderr string
}

// command runs a command line in this process. vars are its whole environment.
func command(ctx context.Context, vars map[string]string, args ...string) result {
	var out, errs bytes.Buffer
	e := env{
		stdin: strings.NewReader(""), stdout: &out, stderr: &errs, now: time.Now,
		getenv:     func(k string) string { return vars[k] },
		executable: func() (string, error) { return "/nowhere/sallyport", nil },
	}
	code := report(&errs, run(ctx, e, args))
	return result{code, out.String(), errs.String()}
}
