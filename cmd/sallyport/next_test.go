package main

import (
	"os/exec"
	"path/filepath"
	"testing"
)

// TestNumbered: the next file is beside the one before, in its form, and is not there yet.
func TestNumbered(t *testing.T) {
	dir := t.TempDir()
	for _, there := range []string{"b.2.grant", "b.3.grant"} {
		if err := writeNew(filepath.Join(dir, there), nil); err != nil {
			t.Fatal(err)
		}
	}
	for from, want := range map[string]string{
		"a.grant": "a.2.grant", "a.2.grant": "a.3.grant", "a.9.grant": "a.10.grant", "b.grant": "b.4.grant", "b.2.grant": "b.4.grant",
		"a": "a.2", "a.2": "a.3", "a.b.grant": "a.b.2.grant", "2026.grant": "2026.2.grant", ".grant": ".2.grant", "with space.grant": "with space.2.grant",
	} {
		if got := numbered(filepath.Join(dir, from)); got != filepath.Join(dir, want) {
			t.Errorf("after %s comes %s, want %s", from, filepath.Base(got), want)
		}
	}
	if got := numbered("a.grant"); got != "a.2.grant" {
		t.Errorf("a relative name became %s", got)
	}
}

// TestCommandLine: a shell reads each word of a printed line as it was.
func TestCommandLine(t *testing.T) {
	words := []string{"plain", "/a/b.grant", "two words", "it's", `"$HOME" \ *`, "", "~/key", "-x"}
	line := commandLine("show", words)
	out, err := exec.CommandContext(t.Context(), "sh", "-c", `sallyport() { shift; printf '%s\n' "$@"; }; `+line).Output()
	if err != nil {
		t.Fatalf("%s: %v", line, err)
	}
	want := ""
	for _, w := range words {
		want += w + "\n"
	}
	if string(out) != want {
		t.Errorf("%s: the shell reads %q", line, out)
	}
}
