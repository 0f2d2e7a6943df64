package build

import (
	"runtime/debug"
	"strings"
	"testing"
)

func TestDescribe(t *testing.T) {
	known := &debug.BuildInfo{
		Main:     debug.Module{Version: "v1.2.3"},
		Settings: []debug.BuildSetting{{Key: "vcs.revision", Value: "abc"}, {Key: "vcs.modified", Value: "true"}},
		Deps: []*debug.Module{
			{Path: "example.org/b", Version: "v1.0.0", Sum: "h1:b="},
			{Path: "example.org/a", Version: "v1.0.0", Replace: &debug.Module{Path: "example.org/fork", Version: "v1.0.1", Sum: "h1:f="}},
		},
	}
	i := From(known)
	said := i.Describe("sallyport")
	for _, want := range []string{"sallyport version v1.2.3\n", "commit abc+dirty\n", "2 modules sha256:"} {
		if !strings.Contains(said, want) {
			t.Errorf("%q does not say %q", said, want)
		}
	}
	if i.Modules[1] != (Module{"example.org/fork", "v1.0.1", "h1:f="}) {
		t.Errorf("module that was replaced: %v", i.Modules[1])
	}
	before := i.Sum()
	known.Deps[0], known.Deps[1] = known.Deps[1], known.Deps[0]
	if From(known).Sum() != before {
		t.Error("the sum depends on the order")
	}
	known.Deps[0].Sum, known.Deps[1].Sum = "h1:x=", "h1:x="
	if From(known).Sum() == before {
		t.Error("the sum does not depend on what the modules hold")
	}
}

func TestLinkerHasTheWord(t *testing.T) {
	defer func() { version, commit = "", "" }()
	version, commit = "1.0.0", "def"
	if i := From(&debug.BuildInfo{Main: debug.Module{Version: "v1.2.3"}}); i.Version != "1.0.0" || i.Commit != "def" {
		t.Errorf("%+v", i)
	}
	version, commit = "", ""
	if i := From(&debug.BuildInfo{}); i.Version != "unknown" || !strings.Contains(i.Describe("x"), "commit unknown\n") {
		t.Errorf("of nothing: %+v", i)
	}
}
