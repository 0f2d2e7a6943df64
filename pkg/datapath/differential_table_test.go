package datapath_test

import (
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/docs"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
	"github.com/sallyport-dev/sallyport/test/shape"
)

// TestEveryShape holds ARCHITECTURE's table of packets to the programs: towards a protected port of the host
// and of a pod, in both families, every shape is closed with the reasons that the table has, and no others.
func TestEveryShape(t *testing.T) {
	text, err := os.ReadFile("../../ARCHITECTURE.md")
	check(t, err)
	told := map[string][]string{}
	for _, row := range docs.ShapeTable(string(text)) {
		for _, name := range row.Shapes {
			told[name] = slices.Sorted(slices.Values(row.Reasons))
		}
	}
	d := newDifferential(t, 1)
	for _, s := range shape.All() {
		t.Run(s.Name, func(t *testing.T) {
			reasons := slices.Sorted(maps.Keys(d.reasonsOf(t, s)))
			if len(reasons) > 0 && !slices.Equal(reasons, told[s.Name]) {
				t.Errorf("closed with `%s`; ARCHITECTURE.md says `%s`", strings.Join(reasons, "`, `"), strings.Join(told[s.Name], "`, `"))
			}
		})
	}
}

// reasonsOf are those that the frames of a shape are counted with; "-" for one that is not.
func (d *differential) reasonsOf(t *testing.T, s shape.Shape) map[string]bool {
	reasons := map[string]bool{}
	for _, f := range lab.Families() {
		for at, name := range map[int]string{d.at("sp_dev_in"): "host", d.at("sp_pod_out"): "pod"} {
			d.reset(t)
			sc := d.scenes(t, f)[name]
			p := tcp(sc.client, sc.server, syn)
			if strings.HasPrefix(s.Name, "udp/") {
				p.Dst = netip.AddrPortFrom(p.Dst.Addr(), map[string]uint16{"host": hostUDPPort, "pod": podUDPPort}[name])
			}
			if s.Fits(p) {
				d.count(t, at, s, p, reasons)
			}
		}
	}
	return reasons
}

func (d *differential) count(t *testing.T, at int, s shape.Shape, p packet.Packet, reasons map[string]bool) {
	for _, b := range s.Frames(p) {
		before, c := d.counters(t), d.seen(shape.Case{Place: at, Frame: b})
		var o outcome
		check(t, d.Node.Do(func() error { o = d.try(c); return nil }))
		if o.refused {
			continue // too long, or too short, for a test run
		}
		found := flow.ReasonNone
		for reason, n := range d.counters(t) {
			if n.Packets != before[reason].Packets {
				found = reason
			}
		}
		if reasons[found.String()] = true; found == flow.ReasonNone {
			delete(reasons, found.String())
			reasons["-"] = true
		}
	}
}
