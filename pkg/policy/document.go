package policy

import (
	"errors"
	"strings"

	"go.yaml.in/yaml/v3"
)

// document is one YAML document on its way to a resource: it knows the line of every field that
// was written, and which fields are already known to be wrong.
type document struct {
	file     string
	root     *yaml.Node
	lines    map[string]int
	wrong    []string
	problems *problems
	unlined  bool // it is from no file: its lines mean nothing
}

func newDocument(file string, root *yaml.Node, p *problems) *document {
	return &document{file: file, root: root, lines: map[string]int{"": root.Line}, problems: p}
}

func (d *document) source() Source {
	if d.unlined {
		return Source{File: d.file}
	}
	return Source{File: d.file, Line: d.root.Line}
}

// line finds the line of a field, or of the nearest thing around it that was written.
func (d *document) line(field string) int {
	for {
		if n, ok := d.lines[field]; ok {
			return n
		}
		field = field[:max(strings.LastIndexAny(field, ".["), 0)]
	}
}

// report notes what is wrong with a field; a nil err is no problem. One problem for a field is
// enough: what follows from it is not reported.
func (d *document) report(field string, err error) {
	if err == nil || d.isWrong(field) {
		return
	}
	if len(d.wrong) < maxErrors {
		d.wrong = append(d.wrong, field)
	}
	d.problems.add(d.located(field, d.line(field), err))
}

func (d *document) located(field string, line int, err error) *Error {
	e := Error{Msg: err.Error()}
	if known, ok := errors.AsType[*Error](err); ok {
		e = *known
	}
	if d.unlined {
		line = 0
	}
	e.File, e.Line, e.Field = d.file, line, field
	e.Msg = cut(e.Msg)
	return &e
}

// maxMessage bounds how much of an odd value an error repeats, in bytes.
const maxMessage = 300

func cut(s string) string {
	if len(s) <= maxMessage {
		return s
	}
	return strings.ToValidUTF8(s[:maxMessage], "") + "…"
}

func (d *document) isWrong(field string) bool {
	for _, w := range d.wrong {
		if w == field || within(w, field) || within(field, w) {
			return true
		}
	}
	return false
}

// within reports whether the field inner is a part of outer.
func within(inner, outer string) bool {
	rest, ok := strings.CutPrefix(inner, outer)
	return ok && (outer == "" || strings.HasPrefix(rest, ".") || strings.HasPrefix(rest, "["))
}
