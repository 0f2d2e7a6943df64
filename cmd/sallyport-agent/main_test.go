package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/agent"
	"golang.org/x/sys/unix"
)

const goodConfig = `apiVersion: sallyport.dev/v1alpha1
kind: AgentConfig
metadata: {name: node-1}
spec: {trustDomain: example.org, resources: RESOURCES, bpffs: BPFFS}
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
	config, file := filepath.Join(dir, "agent.yaml"), filepath.Join(dir, "resources.d", "db.yaml")
	for _, d := range []string{"resources.d", "bpf"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	good := strings.NewReplacer("RESOURCES", dir+"/resources.d", "BPFFS", dir+"/bpf").Replace(goodConfig)
	write(t, config, good)
	write(t, file, goodResources)
	says := func(words string) {
		t.Helper()
		_, err := call(t, 0, "check", "--config", config)
		if text := agent.Describe(err); !strings.Contains(text, words) || !strings.Contains(text, "\nhint: ") {
			t.Errorf("%q", text)
		}
	}
	says("no host-visible bpffs: " + dir + "/bpf is not on one")
	if err := unix.Mount("bpf", dir+"/bpf", "bpf", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir+"/bpf", 0) })
	if out, err := call(t, 0, "check", "--config", config); err != nil || out != "ok\n" {
		t.Errorf("%q, %v", out, err)
	}
	write(t, config, strings.Replace(good, "bpffs:", "cgroup: /nonesuch, bpffs:", 1))
	says("no cgroup v2 at /nonesuch")
	write(t, config, good)
	write(t, file, strings.Replace(goodResources, "5432", "0", 1))
	says(file + ":4: spec.ports[0]: ")
}

func TestWrongCommandLines(t *testing.T) {
	for _, c := range []struct {
		uid  int
		args []string
		says string
	}{
		{1000, []string{"run"}, "needs root\nhint: "},
		{1000, []string{"guard"}, "needs root\nhint: "},
		{1000, []string{"px"}, "needs root\nhint: "},
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
