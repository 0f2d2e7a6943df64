package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/sallyport-dev/sallyport/test/leak"
)

// buildAll puts the four binaries into one folder, as `make build` does.
func buildAll(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces and BPF")
	}
	dir := t.TempDir()
	out, err := exec.Command("go", "build", "-o", dir+"/", "../...").CombinedOutput()
	if err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return filepath.Join(dir, "sallyport")
}

// TestDemo runs the whole story and reads its report.
func TestDemo(t *testing.T) {
	sallyport := buildAll(t)
	leak.Check(t)
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(sallyport, "demo", "-o", "json")
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("demo: %v\n%s", err, stderr.Bytes())
	}
	var report demoReport
	decoder := json.NewDecoder(&stdout)
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&report); err != nil {
		t.Fatalf("read report: %v", err)
	}
	if len(report.Steps) != 8 || report.failed() {
		t.Errorf("steps %+v, want 8 that are ok", report.Steps)
	}
	f := report.Figures
	if f.LatePackets != 0 || f.BytesKernel == 0 || f.BytesKernel != f.BytesLog || f.DeadlineToResetUs <= 0 || f.ResetToProxiedUs <= 0 {
		t.Errorf("figures %+v", f)
	}
}

// TestDemoInterrupted: Ctrl-C in the middle of the story removes everything, too.
func TestDemoInterrupted(t *testing.T) {
	sallyport := buildAll(t)
	leak.Check(t)
	cmd := exec.Command(sallyport, "demo")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for n := 0; n < 8 && lines.Scan(); n++ { // up to the grant
	}
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	for lines.Scan() {
	}
	if err := cmd.Wait(); err == nil {
		t.Error("an interrupted demo succeeded")
	}
	if left, _ := filepath.Glob("/run/sallyport-demo-*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
