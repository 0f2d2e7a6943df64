package main

import (
	"bytes"
	"strings"
	"testing"
	"unicode"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// eachCommand visits every command of ours.
func eachCommand(root *cobra.Command, visit func(*cobra.Command)) {
	for _, cmd := range root.Commands() {
		if cmd.Name() != "help" && cmd.Name() != "completion" {
			visit(cmd)
			eachCommand(cmd, visit)
		}
	}
}

func testRoot() *cobra.Command {
	return newRoot(env{stdout: &bytes.Buffer{}, stderr: &bytes.Buffer{}, getenv: func(string) string { return "" }})
}

func TestEveryCommandExplainsItself(t *testing.T) {
	root := testRoot()
	eachCommand(root, func(cmd *cobra.Command) {
		if cmd.Short == "" || strings.HasSuffix(cmd.Short, ".") || !unicode.IsUpper(rune(cmd.Short[0])) {
			t.Errorf("%s: short help %q", cmd.CommandPath(), cmd.Short)
		}
		if cmd.Args == nil || cmd.RunE == nil {
			t.Errorf("%s: takes any arguments, or does nothing", cmd.CommandPath())
		}
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			if f.Usage == "" || strings.HasSuffix(f.Usage, ".") {
				t.Errorf("%s --%s: help %q", cmd.CommandPath(), f.Name, f.Usage)
			}
		})
		r := command(t.Context(), nil, append(strings.Fields(cmd.CommandPath())[1:], "--help")...)
		if r.code != exitDone || !strings.Contains(r.stdout, "Usage:") || r.stderr != "" {
			t.Errorf("%s --help: %+v", cmd.CommandPath(), r)
		}
	})
}

// The words of DESIGN are fixed: no synonyms in what people read.
func TestHelpUsesTheWords(t *testing.T) {
	eachCommand(testRoot(), func(cmd *cobra.Command) {
		text := strings.ToLower(cmd.Short + cmd.Long + cmd.Example + cmd.Flags().FlagUsages())
		for _, word := range []string{"exception", "whitelist", "allowlist", "lease", "ticketing", "backend", "session", "permission", "exemption", "waiver", "tunnel", "sidecar", "upstream"} {
			if strings.Contains(text, word) {
				t.Errorf("%s: help says %q", cmd.CommandPath(), word)
			}
		}
	})
}

func TestEveryCommandRefusesTooManyArguments(t *testing.T) {
	eachCommand(testRoot(), func(cmd *cobra.Command) {
		if cmd.HasSubCommands() || strings.HasPrefix(cmd.CommandPath(), "sallyport policy ") || cmd.Name() == "join" {
			return
		}
		r := command(t.Context(), nil, append(strings.Fields(cmd.CommandPath())[1:], "a", "b", "c")...)
		if r.code != exitUsage || !strings.Contains(r.stderr, "hint: ") {
			t.Errorf("%s: %+v", cmd.CommandPath(), r)
		}
	})
}

// TestWrongWordsAreAnsweredWithTheRight: what a filter takes is told by the flag that was wrong, and all of it is taken.
func TestWrongWordsAreAnsweredWithTheRight(t *testing.T) {
	for flag, words := range map[string][]string{"event": eventWords(), "verdict": verdictWords(), "reason": reasonNames()} {
		r := command(t.Context(), nil, "flows", "--"+flag, "nope")
		if r.code != exitUsage || !strings.Contains(r.stderr, "hint: write one of: "+strings.Join(words, " ")) {
			t.Errorf("--%s: %+v", flag, r)
		}
		for _, w := range words {
			if r := command(t.Context(), nil, "--run-dir", t.TempDir(), "flows", "--"+flag, w); r.code == exitUsage {
				t.Errorf("--%s %s: %+v", flag, w, r)
			}
		}
	}
}
