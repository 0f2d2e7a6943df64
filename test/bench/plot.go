package main

import (
	"fmt"
	"strings"
)

// Colours of the ways.
var colours = map[string]string{
	"direct": "#7f8c8d", "bypassed": "#1f5fbf", "steered": "#5b9bd5",
	"iptables": "#c0392b", "nft rules": "#e08e0b", "nft sets": "#2e8b57",
}

const style = `text { font-family: "Helvetica Neue", Arial, sans-serif; fill: #222; }
.title { font-size: 15px; font-weight: bold; } .axis { font-size: 12px; } .tick, .label { font-size: 11px; }
.grid { stroke: #ddd; stroke-width: 1; } .whisker { stroke: #111; stroke-width: 1.5; }
.mark { stroke: #c0392b; stroke-width: 1.5; stroke-dasharray: 5 3; }`

// plot draws every panel that the run has data for, two beside each other.
func (r *results) plot() string {
	var panels []func(*drawing)
	for _, make := range []func() func(*drawing){
		r.packetPanel, r.directPanel,
		func() func(*drawing) { return r.scalePanel(connects, overServices, "steered", "protected services") },
		func() func(*drawing) { return r.scalePanel(bulk, overExceptions, "bypassed", "exceptions") },
	} {
		if p := make(); p != nil {
			panels = append(panels, p)
		}
	}
	d := &drawing{}
	for i, draw := range panels {
		d.x, d.y = float64(i%2*panelWidth), float64(i/2*panelHeight)
		draw(d)
	}
	d.x, d.y = 0, float64((len(panels)+1)/2*panelHeight)
	d.text(plotLeft/2, 18, "start", "tick", fmt.Sprintf("Medians and quartiles of %s on %s", counted(r.Rounds, "round"), r.Machine))
	return fmt.Sprintf("<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %.0f\">\n<style>%s</style>\n"+
		"<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n%s</svg>\n", 2*panelWidth, d.y+30, style, d.b.String())
}

// packetPanel has the packets of IPv4.
func (r *results) packetPanel() func(*drawing) {
	var rows []bar
	for _, s := range r.inGroup(groupPackets) {
		name, four := strings.CutSuffix(s.Name, "/IPv4")
		if !four || strings.HasPrefix(name, "empty program,") {
			continue
		}
		rows = append(rows, bar{strings.TrimSuffix(name, " at random"), spreadOf(s.Values), packetColour(name)})
	}
	if rows == nil {
		return nil
	}
	return func(d *drawing) { d.bars("What a packet costs in the program", "nanoseconds a packet, IPv4", 0, rows) }
}

func packetColour(name string) string {
	for prefix, colour := range map[string]string{"empty": colours["direct"], "unprotected": colours["nft sets"],
		"bypassed": colours["bypassed"], "steered": colours["steered"]} {
		if strings.HasPrefix(name, prefix) {
			return colour
		}
	}
	return colours["iptables"]
}

// directPanel has every way's ratios to a node without programs.
func (r *results) directPanel() func(*drawing) {
	var rows []bar
	for _, of := range []struct{ group, title string }{{bulk.group, "throughput"}, {connects.group, "connections"}, {pingPong.group + ", p50", "p50 latency"}} {
		for _, s := range r.inGroup(of.group) {
			if s.Name != "direct" {
				rows = append(rows, bar{of.title + ", " + s.Name, spreadOf(ratios(s, r.find(of.group, "direct"))), colours[s.Name]})
			}
		}
	}
	if rows == nil {
		return nil
	}
	return func(d *drawing) { d.bars("Against a node without any program", "ratio to direct", 1, rows) }
}

// scalePanel has one kind of traffic over a number of something.
func (r *results) scalePanel(k kind, suffix, ours, axis string) func(*drawing) {
	all := r.inGroup(k.group + suffix)
	if len(all) == 0 {
		return nil
	}
	var curves []curve
	for _, name := range []string{ours, "iptables", "nft rules", "nft sets"} {
		c := curve{label: name, colour: colours[name]}
		for _, n := range []int{1, 100, 10000} {
			if s := r.find(k.group+suffix, scaleName(name, n)); s != nil {
				c.x, c.y = append(c.x, float64(n)), append(c.y, spreadOf(s.Values))
			}
		}
		curves = append(curves, c)
	}
	return func(d *drawing) { d.lines(strings.ToUpper(k.group[:1])+k.group[1:]+suffix, axis, all[0].Unit, curves) }
}
