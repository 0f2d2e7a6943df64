package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/agent"
)

const goodConfig = `apiVersion: sallyport.dev/v1alpha1
kind: AgentConfig
metadata: {name: node-1}
spec: {trustDomain: example.org, resources: RESOURCES}
`

const goodResources = `apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: db}
spec: {target: Host, ports: [5432]}
`

// call runs a command line and gives what it wrote and what it failed with.
func call(t *testing.T, uid int, args ...string) (stdout string, err error) {
	t.Helper()
	var out, diagnostics bytes.Buffer
	p := process{stdout: &out, stderr: &diagnostics, uid: uid}
	cmd := p.command()
	cmd.SetArgs(args)
	err = cmd.ExecuteContext(t.Context())
	return out.String(), err
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestCheck(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("files of the agent are root's")
	}
	dir := t.TempDir()
	config := filepath.Join(dir, "agent.yaml")
	write(t, config, strings.Replace(goodConfig, "RESOURCES", dir+"/resources.d", 1))
	if err := os.Mkdir(filepath.Join(dir, "resources.d"), 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "resources.d", "db.yaml")
	write(t, file, goodResources)
	if out, err := call(t, 0, "check", "--config", config); err != nil || out != "ok\n" {
		t.Errorf("%q, %v", out, err)
	}
	write(t, file, strings.Replace(goodResources, "5432", "0", 1))
	_, err := call(t, 0, "check", "--config", config)
	if text := agent.Describe(err); !strings.Contains(text, file+":4: spec.ports[0]: ") || !strings.Contains(text, "\nhint: ") {
		t.Errorf("%q", text)
	}
}

func TestWrongCommandLines(t *testing.T) {
	for _, c := range []struct {
		uid  int
		args []string
		says string
	}{
		{1000, []string{"run"}, "needs root\nhint: "},
		{1000, []string{"guard"}, "needs root\nhint: "},
		{1000, []string{"uninstall"}, "needs root\nhint: "},
		{1000, []string{"rollback"}, "needs root\nhint: "},
		{0, []string{"walk"}, `unknown command "walk"`},
		{0, []string{"run", "--log-level", "LOUD"}, "log-level"},
		{0, []string{"run", "more"}, `unknown command "more"`},
		{0, []string{"run", "--config", "/nonexistent/agent.yaml"}, "/nonexistent/agent.yaml"},
	} {
		_, err := call(t, c.uid, c.args...)
		if err == nil || !strings.Contains(agent.Describe(err), c.says) {
			t.Errorf("%v: %v", c.args, err)
		}
	}
	if _, err := call(t, 1000, "run"); !errors.Is(err, errNotRoot) {
		t.Errorf("%v", err)
	}
}

func TestHelpNamesEveryCommand(t *testing.T) {
	out, err := call(t, 1000, "--help")
	if err != nil {
		t.Fatal(err)
	}
	for _, command := range []string{"run", "guard", "check", "rollback", "uninstall", "--config", "--log-level"} {
		if !strings.Contains(out, command) {
			t.Errorf("help lacks %s", command)
		}
	}
}
