package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// figure writes a value with three digits that say something, and its unit.
func figure(v float64, unit string) string { return number(v) + unit }

func number(v float64) string {
	switch a := math.Abs(v); {
	case v == math.Trunc(v) && a < 1000:
		return strconv.FormatFloat(v, 'f', -1, 64)
	case a >= 1000:
		return sign(v) + thousands(int(math.Round(a)))
	case a >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case a >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}

func sign(v float64) string {
	if v < 0 {
		return "-"
	}
	return ""
}

// counted says how many there are of a thing.
func counted(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return thousands(n) + " " + thing + "s"
}

// thousands writes a number with commas.
func thousands(n int) string {
	if n < 1000 {
		return fmt.Sprint(n)
	}
	return thousands(n/1000) + fmt.Sprintf(",%03d", n%1000)
}

// String tells the quartiles and the ends.
func (s spread) String() string {
	if s.N == 1 {
		return "one value"
	}
	return fmt.Sprintf("%s to %s (%s to %s)", number(s.Low), number(s.High), number(s.Min), number(s.Max))
}

// row writes one row of a Markdown table.
func row(cells ...string) string { return "| " + strings.Join(cells, " | ") + " |\n" }

// head writes the first two rows; columns after the first are right-aligned.
func head(first string, columns ...string) string {
	return row(append([]string{first}, columns...)...) + "| --- |" + strings.Repeat(" ---: |", len(columns)) + "\n"
}
