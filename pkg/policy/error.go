package policy

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// maxErrors bounds how many problems one parse lists; the rest are counted.
const maxErrors = 100

// Error is one wrong field of something that an operator wrote: a resource, a configuration or a
// grant. File and Line are empty where it was not read from a file.
type Error struct {
	File  string
	Line  int
	Field string // path of the field, like spec.ports[0]
	Msg   string // what is wrong
	Hint  string // the next step, may be empty
	Err   error  // sentinel that callers may match, may be nil
}

// lineBreaks are what a condition or a pattern of several lines brings into the words of those who read it.
var lineBreaks = strings.NewReplacer("\r", " ", "\n", " ", "\t", " ")

// Error gives "file:line: field: msg", in one line. The hint is left to the caller.
func (e *Error) Error() string {
	var b strings.Builder
	if e.File != "" {
		b.WriteString(e.File)
		if e.Line > 0 {
			fmt.Fprintf(&b, ":%d", e.Line)
		}
		b.WriteString(": ")
	}
	if e.Field != "" {
		b.WriteString(e.Field + ": ")
	}
	b.WriteString(e.Msg)
	return lineBreaks.Replace(b.String())
}

// Unwrap gives the sentinel, so that errors.Is finds it.
func (e *Error) Unwrap() error { return e.Err }

// Errors takes a joined or wrapped error apart: every *Error in it, in order. An error without an
// *Error comes back as one that has its text, so that nothing is lost.
func Errors(err error) []*Error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*Error](err); !ok {
		return []*Error{{Msg: err.Error(), Err: err}}
	}
	switch e := any(err).(type) { // level by level, so not by errors.As
	case interface{ Unwrap() []error }:
		var out []*Error
		for _, part := range e.Unwrap() {
			out = append(out, Errors(part)...)
		}
		return out
	case *Error:
		return []*Error{e}
	}
	return Errors(errors.Unwrap(err))
}

// faultf tells what is wrong with a value, before its place is known.
func faultf(hint, format string, args ...any) error {
	return &Error{Msg: fmt.Sprintf(format, args...), Hint: hint}
}

// problems collects what one parse found.
type problems struct {
	list []*Error
	more int
}

func (p *problems) add(e *Error) {
	if len(p.list) >= maxErrors {
		p.more++
		return
	}
	p.list = append(p.list, e)
}

// err joins the problems in the order of files, lines and fields.
func (p *problems) err() error {
	if len(p.list) == 0 {
		return nil
	}
	slices.SortStableFunc(p.list, func(a, b *Error) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Field, b.Field))
	})
	errs := make([]error, 0, len(p.list)+1)
	for _, e := range p.list {
		errs = append(errs, e)
	}
	if p.more > 0 {
		errs = append(errs, &Error{
			Msg:  fmt.Sprintf("%d more problems are not shown", p.more),
			Hint: "mend the first ones and check again",
		})
	}
	return errors.Join(errs...)
}
