package main

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// Sizes of a panel, in pixels.
const (
	panelWidth, panelHeight = 560, 380
	plotLeft, plotRight     = 70, 20 // margins within a panel
	plotTop, plotBottom     = 64, 46
	barsLeft                = 230
)

// drawing collects SVG elements. x and y move what is drawn next.
type drawing struct {
	b    strings.Builder
	x, y float64
}

func (d *drawing) line(x1, y1, x2, y2 float64, class string) {
	fmt.Fprintf(&d.b, "<line x1=%q y1=%q x2=%q y2=%q class=%q/>\n", px1(d.x+x1), px1(d.y+y1), px1(d.x+x2), px1(d.y+y2), class)
}

func (d *drawing) rect(x, y, w, h float64, colour string) {
	fmt.Fprintf(&d.b, "<rect x=%q y=%q width=%q height=%q fill=%q/>\n", px1(d.x+x), px1(d.y+y), px1(max(w, 0)), px1(h), colour)
}

func (d *drawing) dot(x, y float64, colour string) {
	fmt.Fprintf(&d.b, "<circle cx=%q cy=%q r=\"3.5\" fill=%q/>\n", px1(d.x+x), px1(d.y+y), colour)
}

func (d *drawing) stroke(x1, y1, x2, y2 float64, colour string) {
	fmt.Fprintf(&d.b, "<line x1=%q y1=%q x2=%q y2=%q stroke=%q stroke-width=\"2\"/>\n", px1(d.x+x1), px1(d.y+y1), px1(d.x+x2), px1(d.y+y2), colour)
}

// text is anchored at start, middle or end.
func (d *drawing) text(x, y float64, anchor, class, s string) {
	fmt.Fprintf(&d.b, "<text x=%q y=%q text-anchor=%q class=%q>%s</text>\n", px1(d.x+x), px1(d.y+y), anchor, class, html.EscapeString(s))
}

func px1(v float64) string { return fmt.Sprintf("%.1f", v) }

// scale maps values to pixels, evenly or by their logarithm.
type scale struct {
	low, high float64 // values at the ends
	from, to  float64 // pixels at the ends
	log       bool
}

func (s scale) at(v float64) float64 {
	low, high := s.low, s.high
	if s.log {
		low, high, v = math.Log10(low), math.Log10(high), math.Log10(math.Max(v, s.low))
	}
	return s.from + (v-low)/(high-low)*(s.to-s.from)
}

// ticks are round values between the ends: powers of ten, or about five even steps.
func (s scale) ticks() []float64 {
	var out []float64
	if s.log {
		for v := math.Pow(10, math.Ceil(math.Log10(s.low)-1e-9)); v <= s.high*1.0001; v *= 10 {
			out = append(out, v)
		}
		return out
	}
	step := niceStep((s.high - s.low) / 5)
	for v := math.Ceil(s.low/step) * step; v <= s.high*1.0001; v += step {
		out = append(out, v)
	}
	return out
}

// niceStep rounds up to 1, 2 or 5 times a power of ten.
func niceStep(v float64) float64 {
	power := math.Pow(10, math.Floor(math.Log10(v)))
	for _, m := range []float64{1, 2, 5} {
		if v <= m*power {
			return m * power
		}
	}
	return 10 * power
}

// bar is one row of a bar chart.
type bar struct {
	label  string
	value  spread
	colour string
}

// bars draws a panel of horizontal bars with the quartiles as whiskers. A mark is a line across them.
func (d *drawing) bars(title, axis string, mark float64, rows []bar) {
	d.text(plotLeft/2, 24, "start", "title", title)
	most := mark
	for _, r := range rows {
		most = max(most, r.value.High)
	}
	s := scale{low: 0, high: most * 1.12, from: barsLeft, to: panelWidth - plotRight - 30}
	for _, t := range s.ticks() {
		d.line(s.at(t), plotTop-20, s.at(t), panelHeight-plotBottom, "grid")
		d.text(s.at(t), panelHeight-plotBottom+16, "middle", "tick", number(t))
	}
	d.text((s.from+s.to)/2, panelHeight-10, "middle", "axis", axis)
	if mark > 0 {
		d.line(s.at(mark), plotTop-20, s.at(mark), panelHeight-plotBottom, "mark")
	}
	height := float64(panelHeight-plotBottom-plotTop+16) / float64(max(len(rows), 1))
	for i, r := range rows {
		y := plotTop - 16 + height*float64(i)
		d.rect(s.from, y+height*0.15, s.at(r.value.Median)-s.from, height*0.7, r.colour)
		d.line(s.at(r.value.Low), y+height/2, s.at(r.value.High), y+height/2, "whisker")
		d.text(s.from-6, y+height/2+4, "end", "label", r.label)
		d.text(s.at(r.value.High)+5, y+height/2+4, "start", "tick", number(r.value.Median))
	}
}

// curve is one line of a line chart.
type curve struct {
	label  string
	colour string
	x      []float64
	y      []spread
}

// lines draws a panel of curves over a logarithmic x axis, with the quartiles as whiskers.
func (d *drawing) lines(title, xAxis, yAxis string, curves []curve) {
	d.text(plotLeft/2, 24, "start", "title", title)
	x, y := lineScales(curves)
	for _, t := range x.ticks() {
		d.line(x.at(t), plotTop, x.at(t), panelHeight-plotBottom, "grid")
		d.text(x.at(t), panelHeight-plotBottom+16, "middle", "tick", thousands(int(math.Round(t))))
	}
	for _, t := range y.ticks() {
		d.line(x.from, y.at(t), x.to, y.at(t), "grid")
		d.text(x.from-6, y.at(t)+4, "end", "tick", number(t))
	}
	d.text((x.from+x.to)/2, panelHeight-10, "middle", "axis", xAxis)
	d.text(plotLeft/2, plotTop-10, "start", "axis", yAxis)
	for i, c := range curves {
		d.curve(x, y, c)
		left := x.to - 110*float64(len(curves)-i)
		d.stroke(left, plotTop-14, left+14, plotTop-14, c.colour)
		d.text(left+18, plotTop-10, "start", "tick", c.label)
	}
}

func lineScales(curves []curve) (x, y scale) {
	most, right := 0.0, 10.0
	for _, c := range curves {
		for i := range c.x {
			most, right = max(most, c.y[i].High), max(right, c.x[i])
		}
	}
	if most == 0 {
		most = 1
	}
	return scale{low: 1, high: right, from: plotLeft, to: panelWidth - plotRight, log: true},
		scale{low: 0, high: most * 1.1, from: panelHeight - plotBottom, to: plotTop}
}

func (d *drawing) curve(x, y scale, c curve) {
	for i := range c.x {
		at := x.at(c.x[i])
		d.line(at, y.at(c.y[i].Low), at, y.at(c.y[i].High), "whisker")
		d.dot(at, y.at(c.y[i].Median), c.colour)
		if i > 0 {
			d.stroke(x.at(c.x[i-1]), y.at(c.y[i-1].Median), at, y.at(c.y[i].Median), c.colour)
		}
	}
}
