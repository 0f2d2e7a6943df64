package main

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestExecRefuses: what can be known to fail fails before anything is entered or given up, and says what next.
func TestExecRefuses(t *testing.T) {
	config := filepath.Join(t.TempDir(), "agent.yaml")
	if err := os.WriteFile(config, []byte("apiVersion: sallyport.dev/v1alpha1\nkind: AgentConfig\nmetadata: {name: n}\nspec: {trustDomain: example.org}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		want []string
	}{
		{nil, []string{"no program is named", "hint: sallyport-proxy exec -- haproxy"}},
		{[]string{"--listen", "A=B", "--", "true"}, []string{`"A=B" is no name of a variable`, "hint: "}},
		{[]string{"--config", config, "--", "no-such-program"}, []string{"no-such-program", "hint: name it with its folder"}},
		{[]string{"--config", "/no/such/file", "--", "true"}, []string{"/no/such/file"}},
		{[]string{"--nonsense"}, []string{"nonsense"}},
	} {
		err := run(t.Context(), environment{args: append([]string{"sallyport-proxy", "exec"}, c.args...), stderr: io.Discard})
		for _, want := range c.want {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("exec %q: %v, want %q", c.args, err, want)
			}
		}
	}
}
