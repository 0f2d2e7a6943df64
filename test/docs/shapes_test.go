package docs

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/shape"
)

// testFiles are the texts of every test of the module.
func testFiles(t *testing.T) string {
	t.Helper()
	var all strings.Builder
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		b, err := os.ReadFile(path)
		all.Write(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all.String()
}

// TestEveryReasonIsTested: a reason that no test names is one that nobody would miss.
func TestEveryReasonIsTested(t *testing.T) {
	tests := testFiles(t)
	names := regexp.MustCompile(`(?m)^\s(Reason\w+)\s+Reason = (\d+)$`).FindAllStringSubmatch(read(t, "pkg/flow/zz_generated_enums.go"), -1)
	if len(names) != len(flow.Reasons()) {
		t.Fatalf("found %d names of %d reasons", len(names), len(flow.Reasons()))
	}
	for i, r := range flow.Reasons() {
		named := regexp.MustCompile(`\bflow\.` + names[i][1] + `\b|["` + "`" + ` ]` + r.String() + `\b`)
		if r != flow.ReasonNone && !named.MatchString(tests) {
			t.Errorf("no test names %s (flow.%s)", r, names[i][1])
		}
	}
}

// TestEveryShapeIsInTheArchitecture: the table of packets has every shape once, with reasons and tests that
// are there. What it says of reasons is held by pkg/datapath's TestEveryShape.
func TestEveryShapeIsInTheArchitecture(t *testing.T) {
	tests, seen := testFiles(t), map[string]int{}
	for _, row := range ShapeTable(read(t, "ARCHITECTURE.md")) {
		for _, s := range row.Shapes {
			seen[s]++
		}
		for _, r := range row.Reasons {
			if _, err := flow.ParseReason(r); err != nil && r != "-" {
				t.Errorf("%v: %v", row.Shapes, err)
			}
		}
		if row.What == "" || len(row.Reasons) == 0 || len(row.Tests) == 0 {
			t.Errorf("%v: %+v is incomplete", row.Shapes, row)
		}
		for _, name := range row.Tests {
			if !strings.Contains(tests, "\nfunc "+name+"(t *testing.T) {") {
				t.Errorf("%v: there is no test %s", row.Shapes, name)
			}
		}
	}
	for _, s := range shape.All() {
		if seen[s.Name] != 1 {
			t.Errorf("ARCHITECTURE.md has %s %d times, want once", s.Name, seen[s.Name])
		}
		delete(seen, s.Name)
	}
	for name := range seen {
		if !slices.ContainsFunc(others, func(o string) bool { return o == name }) {
			t.Errorf("ARCHITECTURE.md has %s, which is no shape", name)
		}
	}
}

// others are shapes that no single frame shows: they have tests of their own.
var others = []string{}
