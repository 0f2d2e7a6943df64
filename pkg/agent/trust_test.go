package agent

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCheckTrustedDir(t *testing.T) {
	for _, c := range []struct {
		name            string
		dirMode, mode   os.FileMode
		dirOwner, owner int
		offenders       []string
	}{
		{name: "root's alone", dirMode: 0o755, mode: 0o644},
		{name: "group may write the file", dirMode: 0o755, mode: 0o664, offenders: []string{"a.yaml", "0664"}},
		{name: "others may write the file", dirMode: 0o755, mode: 0o646, offenders: []string{"a.yaml", "0646"}},
		{name: "others may write the directory", dirMode: 0o777, mode: 0o600, offenders: []string{"0777"}},
		{name: "somebody's file", dirMode: 0o755, mode: 0o600, owner: 1000, offenders: []string{"a.yaml", "uid 1000"}},
		{name: "somebody's directory", dirMode: 0o755, mode: 0o600, dirOwner: 1000, offenders: []string{"uid 1000"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "resources.d")
			file := filepath.Join(dir, "a.yaml")
			must(t, os.Mkdir(dir, 0o755))
			must(t, os.WriteFile(file, nil, 0o600))
			must(t, os.Chmod(file, c.mode))
			must(t, os.Chown(file, c.owner, 0))
			must(t, os.Chmod(dir, c.dirMode))
			must(t, os.Chown(dir, c.dirOwner, 0))
			err := checkTrustedDir(dir)
			if (err != nil) != (c.offenders != nil) || err != nil && !errors.Is(err, ErrUntrusted) {
				t.Fatalf("got %v", err)
			}
			for _, want := range c.offenders {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q does not name %q", err, want)
				}
			}
		})
	}
	parent := filepath.Join(t.TempDir(), "parent")
	must(t, os.MkdirAll(filepath.Join(parent, "resources.d"), 0o755))
	must(t, os.Chmod(parent, 0o777))
	if err := checkTrustedDir(filepath.Join(parent, "resources.d")); !errors.Is(err, ErrUntrusted) {
		t.Errorf("a directory that can be replaced: %v", err)
	}
	must(t, os.Chmod(parent, 0o777|os.ModeSticky))
	must(t, checkTrustedDir(filepath.Join(parent, "resources.d")))
	link := filepath.Join(t.TempDir(), "link")
	must(t, os.Symlink(filepath.Join(parent, "resources.d"), link))
	must(t, os.Chmod(parent, 0o777))
	if err := checkTrusted(link); !errors.Is(err, ErrUntrusted) {
		t.Errorf("a link to what can be replaced: %v", err)
	}
	if err := checkTrustedDir(filepath.Join(t.TempDir(), "absent")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent directory: %v", err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
