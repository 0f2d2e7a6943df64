// Package docs holds the documents and examples of the repository to what is built.
package docs

import (
	"regexp"
	"strings"
)

// ShapeRow is a row of ARCHITECTURE.md's table of packets: what happens to some shapes, with which reasons, and
// the tests that show it. No reason is "-".
type ShapeRow struct {
	Shapes, Reasons, Tests []string
	What                   string
}

const shapeHeader = "| shape | what happens | reason | test |"

// ShapeTable reads the table from the document.
func ShapeTable(markdown string) []ShapeRow {
	_, section, _ := strings.Cut(markdown, "\n## Every shape of packet\n")
	_, table, _ := strings.Cut(section, shapeHeader+"\n")
	var rows []ShapeRow
	for line := range strings.Lines(table) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), " | ")
		if len(cells) != 4 {
			break
		}
		if strings.HasPrefix(cells[0], " ---") {
			continue // the line under the header
		}
		rows = append(rows, ShapeRow{quoted(cells[0]), quoted(cells[2]), quoted(cells[3]), strings.TrimSpace(cells[1])})
	}
	return rows
}

// quoted are the words in back quotes.
func quoted(cell string) []string {
	var out []string
	for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cell, -1) {
		out = append(out, m[1])
	}
	return out
}
