package docs

import (
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/privilege"
)

// TestPrivilegesAreTheSameEverywhere: what the programs ask for, what the units give, and what the table says.
func TestPrivilegesAreTheSameEverywhere(t *testing.T) {
	architecture := read(t, "ARCHITECTURE.md")
	for _, s := range []privilege.Set{privilege.Agent(), privilege.Guard(), privilege.Launcher()} {
		want := strings.Fields(s.String())
		unit := read(t, "deploy/systemd/"+s.Unit)
		for _, key := range []string{"CapabilityBoundingSet", "AmbientCapabilities"} {
			m := regexp.MustCompile(`(?m)^` + key + `=(.*)$`).FindStringSubmatch(unit)
			if m == nil && key == "AmbientCapabilities" {
				continue
			}
			if m == nil || !same(strings.Fields(m[1]), want) {
				t.Errorf("%s: %s is %q, the %s asks for %q", s.Unit, key, m, s.Process, want)
			}
		}
		row := regexp.MustCompile(`(?m)^\| ` + s.Process + ` \| 0[^|]*\| ([A-Z_, ]+) \|`).FindStringSubmatch(architecture)
		if row == nil {
			t.Errorf("ARCHITECTURE.md has no privileges of the %s", s.Process)
			continue
		}
		var told []string
		for name := range strings.SplitSeq(row[1], ", ") {
			told = append(told, "CAP_"+name)
		}
		if !same(told, want) {
			t.Errorf("ARCHITECTURE.md has %q for the %s, which asks for %q", told, s.Process, want)
		}
	}
}

func same(a, b []string) bool {
	return slices.Equal(slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b)))
}
