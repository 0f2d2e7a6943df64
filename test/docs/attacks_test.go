package docs

import (
	"regexp"
	"strings"
	"testing"
)

// TestAttacksNameTheirTests: every test that the tables of attacks name is there.
func TestAttacksNameTheirTests(t *testing.T) {
	tests := testFiles(t)
	named := regexp.MustCompile("`((?:Test|Fuzz)\\w+)").FindAllStringSubmatch(read(t, "docs/attacks.md"), -1)
	if len(named) == 0 {
		t.Fatal("docs/attacks.md names no tests")
	}
	for _, m := range named {
		if !strings.Contains(tests, "\nfunc "+m[1]+"(") {
			t.Errorf("docs/attacks.md names %s, which is no test", m[1])
		}
	}
}
