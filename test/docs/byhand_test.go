package docs

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// endAllByHand finds the line with which a person ends every path.
func endAllByHand(t *testing.T) string {
	t.Helper()
	for line := range strings.Lines(read(t, "ARCHITECTURE.md")) {
		if strings.HasSuffix(line, "| bpftool batch file -\n") {
			return strings.TrimSuffix(line, "\n")
		}
	}
	t.Fatal("ARCHITECTURE.md has no line that ends every path")
	return ""
}

// TestEndAllByHandFindsEverySlot: the documented line ends what is active, wherever it is, and nothing else, with any awk.
func TestEndAllByHandFindsEverySlot(t *testing.T) {
	dir := t.TempDir()
	fake := `#!/bin/sh
case "$1 $2" in
"map dump") cat "${0%/*}/dump" ;;
"batch file") cat > "${0%/*}/batch" ;;
esac
`
	dump := "["
	for _, s := range []string{"0 ACTIVE", "1 FREE", "7 REVOKED", "255 ACTIVE", "256 ACTIVE", "300 PENDING", "40000 ACTIVE", "65535 ACTIVE"} {
		slot, state, _ := strings.Cut(s, " ")
		dump += "{\n        \"key\": " + slot + ",\n        \"value\": {\n            \"state\": \"SP_PATH_" + state + "\"\n        }\n    },"
	}
	place(t, filepath.Join(dir, "dump"), strings.TrimSuffix(dump, ",")+"\n]\n")
	place(t, filepath.Join(dir, "bpftool"), fake)
	if err := os.Chmod(filepath.Join(dir, "bpftool"), 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", endAllByHand(t))
	cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	got, err := os.ReadFile(filepath.Join(dir, "batch"))
	if err != nil {
		t.Fatal(err)
	}
	want := ""
	for _, key := range []string{"0 0 0 0", "255 0 0 0", "0 1 0 0", "64 156 0 0", "255 255 0 0"} {
		want += "map update pinned /sys/fs/bpf/sallyport/v4/maps/sp_path_state key " + key + " value 3 0 0 0\n"
	}
	if string(got) != want {
		t.Errorf("told bpftool\n%swant\n%s", got, want)
	}
}

// TestEndAllByHandIsAtHand: who has only the command has the line, too.
func TestEndAllByHandIsAtHand(t *testing.T) {
	if !strings.Contains(read(t, "cmd/sallyport/panic.go"), "`"+endAllByHand(t)+"`") {
		t.Error("`sallyport panic --help` has another line than ARCHITECTURE.md")
	}
}
