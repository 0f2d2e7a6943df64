package main

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// Exit codes. They are part of the interface: scripts depend on them.
const (
	exitDone        = 0
	exitFailed      = 1 // something went wrong
	exitUsage       = 2 // the command line is wrong
	exitRefused     = 3 // the agent, a policy, a check or a person said no
	exitUnreachable = 4 // the agent, the collector, the service or the identity provider gave no answer
)

const exitCodesHelp = `Exit codes:
  0  done
  1  something went wrong
  2  the command line is wrong
  3  refused: the agent, a policy, a check or a person said no
  4  no answer from the agent, the collector, the service or the identity provider`

// exitError gives an error its exit code.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

// hintError gives an error the next step.
type hintError struct {
	err  error
	hint string
}

func (e *hintError) Error() string { return e.err.Error() }
func (e *hintError) Unwrap() error { return e.err }

func withHint(err error, format string, args ...any) error {
	return &hintError{err: err, hint: fmt.Sprintf(format, args...)}
}

// hinted tells whether an error names the next step: by withHint, or in the agent's own words,
// which have hints as lines.
func hinted(err error) bool {
	_, ok := errors.AsType[*hintError](err)
	return ok || strings.Contains(err.Error(), "\nhint: ")
}

func usagef(format string, args ...any) error {
	return &exitError{code: exitUsage, err: fmt.Errorf(format, args...)}
}

func refused(err error) error { return &exitError{code: exitRefused, err: err} }

// problemsError is everything that is wrong with what an operator wrote, each with its next step.
type problemsError struct {
	what  string
	list  []*policy.Error
	cause error
}

func (e *problemsError) Error() string { return e.what + ": " + plural(len(e.list), "problem") }
func (e *problemsError) Unwrap() error { return e.cause }

// explained makes a refusal of pkg/policy or pkg/grant one that report shows with every field
// and hint. What is no refusal only gets its context.
func explained(what string, err error) error {
	if _, ok := errors.AsType[*policy.Error](err); !ok {
		if err == nil {
			return nil
		}
		return fmt.Errorf("%s: %w", what, err)
	}
	return &problemsError{what: what, list: policy.Errors(err), cause: err}
}

// report prints an error with its hints, and gives the exit code.
func report(w io.Writer, err error) int {
	if err == nil {
		return exitDone
	}
	if e, ok := errors.AsType[*commandError](err); ok {
		return e.code
	}
	fmt.Fprintln(w, "sallyport: "+escapeLines(err.Error()))
	if p, ok := errors.AsType[*problemsError](err); ok {
		for _, problem := range p.list {
			fmt.Fprintln(w, escape(problem.Error()))
			reportHint(w, problem.Hint)
		}
	}
	if h, ok := errors.AsType[*hintError](err); ok {
		reportHint(w, h.hint)
	}
	return exitCode(err)
}

func reportHint(w io.Writer, hint string) {
	if hint != "" {
		fmt.Fprintln(w, "hint: "+escape(hint))
	}
}

func exitCode(err error) int {
	if _, ok := errors.AsType[*problemsError](err); ok {
		return exitRefused
	}
	if e, ok := errors.AsType[*exitError](err); ok {
		return e.code
	}
	switch {
	case errors.Is(err, client.ErrUnreachable):
		return exitUnreachable
	case errors.Is(err, client.ErrRefused), errors.Is(err, client.ErrForbidden):
		return exitRefused
	}
	return exitFailed
}
