package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/term"
)

// env is the process as the commands see it, so that tests run them whole.
type env struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	getenv         func(string) string
	now            func() time.Time
	// executable gives the path of this program; the agent's is its sibling.
	executable func() (string, error)
}

func processEnv() env {
	return env{
		stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr,
		getenv: os.Getenv, now: time.Now, executable: os.Executable,
	}
}

// note tells people what they should know but did not ask for.
func (e env) note(format string, args ...any) {
	fmt.Fprintln(e.stderr, "note: "+escapeLines(fmt.Sprintf(format, args...)))
}

// confirm asks a yes-or-no question, until ctx ends. Without a terminal there is nobody to ask:
// that is an error whose hint is --yes.
func (e env) confirm(ctx context.Context, question string) error {
	file, ok := e.stdin.(*os.File)
	if !ok || !term.IsTerminal(int(file.Fd())) {
		return withHint(usagef("cannot ask %q: standard input is no terminal", question),
			"give --yes to answer in advance")
	}
	fmt.Fprintf(e.stderr, "%s [y/N] ", question)
	answer := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(file).ReadString('\n') // what cannot be read is no yes
		answer <- strings.ToLower(strings.TrimSpace(line))
	}()
	select {
	case text := <-answer:
		if text == "y" || text == "yes" {
			return nil
		}
	case <-ctx.Done():
		fmt.Fprintln(e.stderr)
	}
	return refused(errors.New("not confirmed, nothing was done"))
}
