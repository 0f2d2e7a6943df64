package main

import (
	"reflect"
	"strings"
	"testing"
)

const ran = `=== RUN   TestGood
--- PASS: TestGood (0.00s)
=== RUN   TestTable
=== RUN   TestTable/one
    x_test.go:7: got 1, want 2
        and more
=== RUN   TestTable/two
--- FAIL: TestTable (0.10s)
    --- FAIL: TestTable/one (0.00s)
    --- PASS: TestTable/two (0.00s)
=== RUN   TestOld
    y_test.go:9: needs netkit
--- SKIP: TestOld (0.00s)
`

func TestParseCountsAndQuotes(t *testing.T) {
	r := parse(ran + "FAIL\n")
	if r.Passed != 2 || len(r.Failed) != 2 || len(r.Skipped) != 1 {
		t.Fatalf("counted %+v", r)
	}
	if r.passed() {
		t.Error("a run with a failed test passed")
	}
	if f := r.Failed[1]; f.Name != "TestTable/one" || !strings.Contains(f.Said, "want 2") || !strings.Contains(f.Said, "and more") {
		t.Errorf("failed: %+v", f)
	}
	if s := (test{"TestOld", "y_test.go:9: needs netkit"}); !reflect.DeepEqual(r.Skipped[0], s) {
		t.Errorf("skipped: %+v, want %+v", r.Skipped[0], s)
	}
}

func TestParseKeepsTheLastWordsOfARunThatBroke(t *testing.T) {
	r := parse("=== RUN   TestX\npanic: boom\n\ngoroutine 1 [running]:\n")
	if !strings.Contains(r.Tail, "panic: boom") {
		t.Errorf("tail %q", r.Tail)
	}
	if r = parse("=== RUN   TestGood\n--- PASS: TestGood (0.00s)\nPASS\n"); r.Tail != "" || !r.passed() {
		t.Errorf("a good run: %+v", r)
	}
}

// TestNoReportIsAFailure: neither a kernel that panics nor an emulator that is not there passes.
func TestNoReportIsAFailure(t *testing.T) {
	if r := readReport("/nonexistent", "/nonexistent", nil); r.passed() {
		t.Error("no report passed")
	}
}

func TestChoose(t *testing.T) {
	got, err := choose(kernels, "newest,6.1")
	if err != nil || len(got) != 2 || got[0].name != "6.1" || got[1].name != "newest" {
		t.Errorf("chose %+v (%v)", got, err)
	}
	if _, err := choose(kernels, "6.1,7.77"); err == nil || !strings.Contains(err.Error(), "7.77") {
		t.Errorf("unknown name: %v", err)
	}
}

func TestIsKernel(t *testing.T) {
	for name, want := range map[string]bool{
		"linux-image-6.1.0-56-cloud-amd64": true, "linux-modules-7.3.4+deb13-cloud-amd64": true, "linux-binary-7.3.4+deb13-cloud-amd64": true,
		"linux-image-cloud-amd64": false, "linux-base-7.3.4+deb13-cloud-amd64": false, "linux-modules-cloud-amd64": false, "dracut": false,
	} {
		if isKernel(name) != want {
			t.Errorf("isKernel(%s) = %v", name, !want)
		}
	}
}
