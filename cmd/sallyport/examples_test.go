package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

const repository = "../.."

// TestEveryCommandHasAnExample: and each is a command line that is in order.
func TestEveryCommandHasAnExample(t *testing.T) {
	for _, line := range commandLines(testRoot().Long) {
		line, _, _ = strings.Cut(line, "  ") // what it is for
		checkLine(t, "sallyport --help", line)
	}
	eachCommand(testRoot(), func(cmd *cobra.Command) {
		if cmd.HasSubCommands() {
			return
		}
		lines := commandLines(cmd.Example)
		shown := false
		for _, line := range lines {
			checkLine(t, cmd.CommandPath(), line)
			shown = shown || strings.HasPrefix(line+" ", cmd.CommandPath()+" ")
		}
		if !shown {
			t.Errorf("%s: the help has no example of it: %q", cmd.CommandPath(), cmd.Example)
		}
	})
}

// TestDocumentsShowCommandsThatAreInOrder: every line for a shell in the documents, and every command that is named in prose, in
// examples, or in a hint of the programs themselves.
func TestDocumentsShowCommandsThatAreInOrder(t *testing.T) {
	lines, mentions := 0, 0
	for path, text := range sources(t) {
		if strings.HasSuffix(path, ".md") {
			for _, block := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(text, -1) {
				for _, line := range commandLines(block[1]) {
					checkLine(t, path, line)
					lines++
				}
			}
			text = regexp.MustCompile("(?s)```.*?```").ReplaceAllString(text, "")
		}
		for _, m := range regexp.MustCompile("`((?:sudo )?sallyport [^`]*)`").FindAllStringSubmatch(text, -1) {
			checkMention(t, path, strings.TrimPrefix(strings.Join(strings.Fields(m[1]), " "), "sudo "))
			mentions++
		}
	}
	if lines < 5 || mentions < 50 {
		t.Errorf("found %d lines and %d mentions only", lines, mentions)
	}
}

// sources are the documents, examples and programs of the repository, but no tests.
func sources(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(repository, func(path string, d fs.DirEntry, err error) error {
		name := d.Name()
		if err == nil && d.IsDir() && (name == ".git" || name == ".tools" || name == "bin" || name == "testdata" || path == filepath.Join(repository, "test")) {
			return filepath.SkipDir
		}
		wanted := strings.HasSuffix(name, ".md") || strings.HasSuffix(name, ".yaml") || strings.HasSuffix(name, ".go") && !strings.HasSuffix(name, "_test.go")
		if err != nil || d.IsDir() || !wanted {
			return err
		}
		text, err := os.ReadFile(path)
		all[strings.TrimPrefix(path, repository+"/")] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// commandLines are the lines of a text for a shell that begin with our command, whole, without prompts, sudo and comments.
func commandLines(text string) (lines []string) {
	text = strings.ReplaceAll(text, "\\\n", " ")
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(regexp.MustCompile(`^\s*(?:\w+\$ +)?(?:sudo )?(?:bin/)?`).ReplaceAllString(line, ""))
		if strings.HasPrefix(line, "sallyport ") {
			lines = append(lines, line)
		} else if _, own, ok := strings.Cut(line, "'sallyport "); ok { // for another command to run
			own, _, _ = strings.Cut(own, "'")
			lines = append(lines, "sallyport "+own)
		}
	}
	return lines
}

// checkLine holds that a line can be typed: the command, its flags with their values, and its arguments.
func checkLine(t *testing.T, where, line string) {
	t.Helper()
	args := words(line)[1:]
	cmd, rest, err := testRoot().Find(args)
	if err == nil {
		err = cmd.ParseFlags(rest)
	}
	if err == nil {
		err = cmd.ValidateArgs(cmd.Flags().Args())
	}
	if err == nil {
		err = cmd.ValidateFlagGroups()
	}
	if err != nil || !cmd.HasParent() || cmd.HasSubCommands() {
		t.Errorf("%s: %s: %v (%s)", where, line, err, cmd.CommandPath())
	}
}

// checkMention holds that a command exists that somebody names, and that it has the flags.
func checkMention(t *testing.T, where, text string) {
	t.Helper()
	if strings.ContainsAny(text, "%\"+") || strings.Contains(text, "...") {
		text = regexp.MustCompile(`[%"+.].*`).ReplaceAllString(text, "") // the program fills in the rest
	}
	cmd, rest, err := testRoot().Find(words(text)[1:])
	if err != nil {
		t.Errorf("%s: %s: %v", where, text, err)
		return
	}
	if cmd.HasSubCommands() && len(rest) > 0 && !strings.HasPrefix(rest[0], "-") {
		t.Errorf("%s: %s: %s has no command %s", where, text, cmd.CommandPath(), rest[0])
	}
	for _, word := range rest {
		name, _, _ := strings.Cut(strings.TrimLeft(word, "-"), "=")
		if strings.HasPrefix(word, "--") && name != "" && name != "help" && flagNamed(cmd, name) == nil {
			t.Errorf("%s: %s: %s has no flag --%s", where, text, cmd.CommandPath(), name)
		}
	}
}

func flagNamed(cmd *cobra.Command, name string) *pflag.Flag {
	if f := cmd.Flags().Lookup(name); f != nil {
		return f
	}
	return cmd.InheritedFlags().Lookup(name)
}

// words takes a line apart as a shell does, up to where another command or a comment begins.
func words(line string) (all []string) {
	for _, m := range regexp.MustCompile(`'([^']*)'|"([^"]*)"|(#|[|;&>]|[^\s'"|;&>#][^\s'"|;&>]*)`).FindAllStringSubmatch(line, -1) {
		switch m[3] {
		case "#", "|", ";", "&", ">":
			return all
		}
		all = append(all, m[1]+m[2]+m[3])
	}
	return all
}
