package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestThere(t *testing.T) {
	for what, want := range map[string]bool{
		"go":               true,
		"/etc/pass*d":      true,
		"no-such-command":  false,
		"/no/such/file-*x": false,
	} {
		if there(what) != want {
			t.Errorf("there(%q) = %v", what, !want)
		}
	}
}

func TestUnknownTargetIsRefused(t *testing.T) {
	if err := run([]string{"nonsense"}); err == nil || !strings.Contains(err.Error(), "nonsense") {
		t.Errorf("run: %v", err)
	}
}

func TestEveryNeedSaysWhy(t *testing.T) {
	for target, list := range needs {
		for _, n := range list {
			if n.what == "" || n.why == "" || len(n.packages) == 0 {
				t.Errorf("%s: %+v is incomplete", target, n)
			}
		}
	}
	for target, list := range modules {
		for _, m := range list {
			if _, err := os.Stat(filepath.Join("../..", m.lock, "package-lock.json")); err != nil || m.why == "" {
				t.Errorf("%s: %+v is incomplete: %v", target, m, err)
			}
		}
	}
}
