package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// format is how results are written. It is a pflag.Value.
type format string

const (
	formatTable format = "table"
	formatJSON  format = "json"
	formatYAML  format = "yaml"
)

var formats = []string{string(formatTable), string(formatJSON), string(formatYAML)}

func (f *format) String() string { return string(*f) }
func (f *format) Type() string   { return "FORMAT" }
func (f *format) Set(s string) error {
	switch format(s) {
	case formatTable, formatJSON, formatYAML:
		*f = format(s)
		return nil
	}
	return fmt.Errorf("must be table, json or yaml")
}

// show writes one result: as a table for people, or as one object for machines. The value is
// a message of the API or marshals to JSON.
func (c *cli) show(value any, people func(*table)) error {
	if c.output != formatTable {
		return c.showObject(value)
	}
	t := newTable(c.stdout)
	people(t)
	return t.Flush()
}

// showObject writes one object: a line of JSON, or a YAML document.
func (c *cli) showObject(value any) error {
	encode := encodeJSON
	if c.output == formatYAML {
		encode = encodeYAML
	}
	data, err := encode(value)
	if err != nil {
		return fmt.Errorf("write %s: %w", c.output, err)
	}
	_, err = c.stdout.Write(data)
	return err
}

// table writes aligned columns. Every cell is escaped.
type table struct{ *tabwriter.Writer }

func newTable(w io.Writer) *table {
	return &table{tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)}
}

func (t *table) row(cells ...any) {
	texts := make([]string, len(cells))
	for i, cell := range cells {
		texts[i] = escape(orDash(fmt.Sprint(cell)))
	}
	fmt.Fprintln(t.Writer, strings.Join(texts, "\t"))
}

// line writes text that belongs to no column.
func (t *table) line(format string, args ...any) {
	fmt.Fprintln(t.Writer, escape(fmt.Sprintf(format, args...)))
}

// column is one of a table that grows, whose widths are fixed in advance.
type column struct {
	title string
	width int
}

// writeColumns writes one line of a growing table; a longer cell moves the rest of its line.
func writeColumns(w io.Writer, columns []column, cells []string) error {
	var b strings.Builder
	for i, c := range columns {
		cell := escape(orDash(cells[i]))
		if i < len(columns)-1 {
			cell = fmt.Sprintf("%-*s  ", c.width, cell)
		}
		b.WriteString(cell)
	}
	b.WriteByte('\n')
	_, err := io.WriteString(w, b.String())
	return err
}

func titles(columns []column) []string {
	var all []string
	for _, c := range columns {
		all = append(all, c.title)
	}
	return all
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
