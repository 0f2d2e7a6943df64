package policy_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// write makes files in a new directory.
func write(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestLoadDir(t *testing.T) {
	docs := strings.SplitAfter(good, "---\n")
	dir := write(t, map[string]string{
		"10-postgres.yaml": docs[0] + docs[1], "20-bypass.yaml": docs[2], "30-keys.yaml": docs[3],
		".swap.yaml": "{", "README": "not ours", "old.yaml~": "{",
	})
	s, err := policy.LoadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if s.Digest() != mustParse(t, good).Digest() {
		t.Errorf("three files give another set than one:\n%s", s.YAML())
	}
	if svc, _ := s.Service("postgres"); svc.Source.File != filepath.Join(dir, "10-postgres.yaml") {
		t.Errorf("postgres was read at %s", svc.Source)
	}
	again, err := policy.LoadFiles(filepath.Join(dir, "30-keys.yaml"), filepath.Join(dir, "20-bypass.yaml"), filepath.Join(dir, "10-postgres.yaml"))
	if err != nil || again.Digest() != s.Digest() {
		t.Errorf("files in another order: %v", err)
	}
}

func TestLoadDirFollowsLinks(t *testing.T) {
	dir, real := t.TempDir(), write(t, map[string]string{"r.yaml": good})
	if err := os.Symlink(filepath.Join(real, "r.yaml"), filepath.Join(dir, "link.yaml")); err != nil {
		t.Fatal(err)
	}
	if _, err := policy.LoadDir(dir); err != nil {
		t.Error(err)
	}
}

func TestLoadDirWrong(t *testing.T) {
	for _, c := range []struct {
		name string
		make func(t *testing.T) string
		msgs []string
	}{
		{"missing", func(t *testing.T) string { return filepath.Join(t.TempDir(), "none") }, []string{"read directory: no such file or directory"}},
		{"a file", func(t *testing.T) string { return filepath.Join(write(t, map[string]string{"a": good}), "a") }, []string{"read directory: not a directory"}},
		{"empty", func(t *testing.T) string { return t.TempDir() }, []string{"has no *.yaml file"}},
		{"only hidden files", func(t *testing.T) string { return write(t, map[string]string{".a.yaml": good}) }, []string{"has no *.yaml file"}},
		{"empty file", func(t *testing.T) string { return write(t, map[string]string{"a.yaml": ""}) }, []string{"no ProtectedService"}},
		{"yml", func(t *testing.T) string { return write(t, map[string]string{"a.yaml": good, "b.yml": "{}"}) }, []string{"b.yml: is not read: its name does not end in .yaml"}},
		{"directory named as a file", func(t *testing.T) string {
			dir := write(t, map[string]string{"a.yaml": good})
			if err := os.Mkdir(filepath.Join(dir, "b.yaml"), 0o755); err != nil {
				t.Fatal(err)
			}
			return dir
		}, []string{"b.yaml: read file: it is not a regular file"}},
		{"pipe", func(t *testing.T) string {
			dir := write(t, map[string]string{"a.yaml": good})
			if err := syscall.Mkfifo(filepath.Join(dir, "b.yaml"), 0o644); err != nil {
				t.Fatal(err)
			}
			return dir
		}, []string{"b.yaml: read file: it is not a regular file"}},
		{"dangling link", func(t *testing.T) string {
			dir := write(t, map[string]string{"a.yaml": good})
			if err := os.Symlink("nowhere", filepath.Join(dir, "b.yaml")); err != nil {
				t.Fatal(err)
			}
			return dir
		}, []string{"b.yaml: read file: no such file or directory"}},
		{"huge file", func(t *testing.T) string {
			return write(t, map[string]string{"a.yaml": good, "b.yaml": strings.Repeat("#", 16<<20+1)})
		}, []string{"b.yaml: read file: it has more than 16777216 bytes"}},
		{"two bad files", func(t *testing.T) string {
			return write(t, map[string]string{"a.yaml": strings.Replace(good, "[5432]", "[0]", 1), "b.yaml": "x: ["})
		}, []string{"a.yaml:6: spec.ports[0]", "b.yaml:1: not valid YAML"}},
		{"same name in two files", func(t *testing.T) string {
			first, _, _ := strings.Cut(good, "---")
			return write(t, map[string]string{"a.yaml": good, "b.yaml": strings.Replace(first, "5432", "5433", 1)})
		}, []string{"b.yaml:3: metadata.name: the name \"postgres\" is already taken at"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, err := policy.LoadDir(c.make(t))
			errs := policy.Errors(err)
			if s != nil || len(errs) != len(c.msgs) {
				t.Fatalf("want %d errors, got %v", len(c.msgs), err)
			}
			for i, e := range errs {
				if !strings.Contains(e.Error(), c.msgs[i]) || e.File == "" || e.Hint == "" {
					t.Errorf("got %+v, want %q with file and hint", e, c.msgs[i])
				}
			}
		})
	}
}

func TestLoadErrorsCanBeMatched(t *testing.T) {
	_, err := policy.LoadDir(filepath.Join(t.TempDir(), "none"))
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	if _, err := policy.LoadFiles(filepath.Join(t.TempDir(), "none.yaml")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	if s, err := policy.LoadFiles(); err == nil {
		t.Errorf("no files gave %v", s)
	}
}
