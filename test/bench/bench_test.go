package main

import (
	"encoding/xml"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/test/leak"
)

// TestMain lets the test's program be what it starts: service, client and proxy.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && roles[os.Args[1]] != nil {
		main()
		return
	}
	os.Exit(m.Run())
}

// TestShortRun measures everything once, but the agent, which may not be built, and leaves nothing behind.
func TestShortRun(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces and BPF programs")
	}
	leak.Check(t)
	out := t.TempDir()
	if err := run(t.Context(), []string{"-rounds", "1", "-out", out, "-publish", out, "-bin", "../../bin"}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"bench-datapath.md", "bench-datapath.svg", "bench-datapath.json"} {
		b, err := os.ReadFile(filepath.Join(out, name))
		if err != nil || len(b) == 0 {
			t.Errorf("%s: %d bytes, %v", name, len(b), err)
		}
	}
}

func TestArguments(t *testing.T) {
	for _, args := range [][]string{{"-rounds", "0"}, {"-parts", "nonsense"}, {"what"}, {"-nonsense"}} {
		if _, err := readPlan(args); err == nil {
			t.Errorf("%q was taken", args)
		}
	}
}

func TestQuantile(t *testing.T) {
	for _, c := range []struct {
		values []float64
		q      float64
		want   float64
	}{
		{nil, 0.5, 0}, {[]float64{7}, 0.99, 7}, {[]float64{3, 1, 2}, 0.5, 2}, {[]float64{4, 1, 2, 3}, 0.5, 2.5},
		{[]float64{1, 2, 3, 4, 5}, 0.25, 2}, {[]float64{0, 10}, 0.99, 9.9}, {[]float64{0, 10}, 1, 10},
	} {
		if got := quantile(c.values, c.q); math.Abs(got-c.want) > 1e-9 {
			t.Errorf("quantile %v of %v is %v, want %v", c.q, c.values, got, c.want)
		}
	}
}

// TestRatiosAreOfTheSameRound: a disturbed round disturbs both sides and leaves no trace.
func TestRatiosAreOfTheSameRound(t *testing.T) {
	a, b := &series{Values: []float64{10, 2, 10}}, &series{Values: []float64{20, 4, 20, 9}}
	if s := spreadOf(ratios(a, b)); s.Median != 0.5 || s.Min != 0.5 || s.Max != 0.5 || s.N != 3 {
		t.Errorf("ratios %+v, want three times 0.5", s)
	}
	if ratios(nil, b) != nil || ratios(a, nil) != nil {
		t.Error("ratios of nothing")
	}
	if got := less(b, a).Values; len(got) != 3 || got[1] != 2 {
		t.Errorf("less: %v", got)
	}
}

func TestJudge(t *testing.T) {
	for _, c := range []struct {
		name string
		aim  aim
		want string
	}{
		{"below an upper limit", aim{values: []float64{1, 2, 3}, limit: 2}, "met"},
		{"above it", aim{values: []float64{3, 3, 3}, limit: 2, why: "slow"}, "missed"},
		{"around it", aim{values: []float64{1, 3, 5, 1, 3}, limit: 2}, "missed, within the noise"},
		{"above a lower limit", aim{values: []float64{1}, limit: 0.95, least: true}, "met"},
		{"below it", aim{values: []float64{0.9}, limit: 0.95, least: true}, "missed"},
		{"a tail is not the median", aim{values: []float64{1, 1, 1, 9}, limit: 2, tail: 1}, "missed"},
	} {
		v := c.aim.judge()
		if v.Result != c.want || (v.Why != "") != (c.aim.why != "") {
			t.Errorf("%s: %+v, want %s", c.name, v, c.want)
		}
	}
}

func TestNumbers(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 0.984: "0.98", 1: "1", 12.34: "12.3", 123.4: "123", 1234.5: "1,235",
		-1234567: "-1,234,567", -0.5: "-0.50", 999: "999"} {
		if got := number(v); got != want {
			t.Errorf("number(%v) = %q, want %q", v, got, want)
		}
	}
}

// TestPlotIsXML: also of a name that means something there.
func TestPlotIsXML(t *testing.T) {
	r := &results{Rounds: 2}
	r.add(groupPackets, "empty program/IPv4", "ns", 10, 12)
	r.add(groupPackets, "bypassed & <more>/IPv4", "ns", 100, 120)
	for _, n := range []int{1, 100, 10000} {
		r.add(bulk.group+overExceptions, scaleName("bypassed", n), "Gbit/s", 10, 11)
	}
	svg := r.plot()
	for d := xml.NewDecoder(strings.NewReader(svg)); ; {
		_, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, svg)
		}
	}
	for _, want := range []string{"&lt;more&gt;", "10,000", "Gbit/s"} {
		if !strings.Contains(svg, want) {
			t.Errorf("plot has no %q", want)
		}
	}
}

// TestRulesMeanTheSame: each peer has every service and every exception.
func TestRulesMeanTheSame(t *testing.T) {
	service := many(4)
	r := ruleSet{services: among(service, 3), exceptions: among(numbered(service, 7), 3), service: service}
	for _, k := range peerKinds() {
		text := k.rules(r)
		for _, a := range append(r.services, r.exceptions...) {
			if !strings.Contains(text, a.String()) {
				t.Errorf("%s: no %s in\n%s", k.kind, a, text)
			}
		}
	}
}
