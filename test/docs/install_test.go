package docs

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestInstallOnlyCopies: `sudo make install` needs no Go, which is often not in root's path, and says what to do first.
func TestInstallOnlyCopies(t *testing.T) {
	dir, to := t.TempDir(), filepath.Join(t.TempDir(), "root")
	if err := os.CopyFS(filepath.Join(dir, "deploy"), os.DirFS(filepath.Join(root, "deploy"))); err != nil {
		t.Fatal(err)
	}
	place(t, filepath.Join(dir, "Makefile"), read(t, "Makefile"))
	place(t, filepath.Join(dir, "path", "go"), "#!/bin/sh\necho go was run >&2\nexit 1\n")
	if err := os.Chmod(filepath.Join(dir, "path", "go"), 0o755); err != nil {
		t.Fatal(err)
	}
	install := func() (string, error) {
		cmd := exec.Command("make", "install", "DESTDIR="+to)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "PATH="+filepath.Join(dir, "path")+":"+os.Getenv("PATH"), "MAKEFLAGS=")
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	binaries := []string{"sallyport", "sallyport-agent", "sallyport-proxy", "sallyport-collector"}
	for _, b := range binaries[:3] {
		place(t, filepath.Join(dir, "bin", b), "")
	}
	if out, err := install(); err == nil || !strings.Contains(out, "bin/sallyport-collector is not built: run `make build` first, as yourself") {
		t.Errorf("with a binary missing: %v: %s", err, out)
	}
	if left, err := os.ReadDir(to); err == nil {
		t.Errorf("installed %v without all binaries", left)
	}
	place(t, filepath.Join(dir, "bin", binaries[3]), "")
	if out, err := install(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, b := range binaries {
		if _, err := os.Stat(filepath.Join(to, "usr/local/bin", b)); err != nil {
			t.Error(err)
		}
	}
}
