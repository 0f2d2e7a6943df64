//go:build spire

package main

import (
	"encoding/json"
	"os/exec"
	"testing"

	"github.com/sallyport-dev/sallyport/test/leak"
)

// TestDemoWithSPIRE tells the story with the SPIRE of SPIRE_BIN_DIR.
func TestDemoWithSPIRE(t *testing.T) {
	sallyport := buildAll(t)
	leak.Check(t)
	out, err := exec.Command(sallyport, "demo", "--identity", "spire", "-o", "json").Output()
	if err != nil {
		t.Fatalf("demo: %v\n%s", err, out)
	}
	var report demoReport
	if err := json.Unmarshal(out, &report); err != nil {
		t.Fatal(err)
	}
	if len(report.Steps) != 9 || report.failed() || report.Figures.LatePackets != 0 {
		t.Errorf("steps %+v, figures %+v, want 9 that are ok", report.Steps, report.Figures)
	}
}
