package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
)

// tree is what will be installed, laid out below root, and beside it what nfpm needs.
type tree struct {
	release
	work, root string
	modules    []module
}

const docs = "usr/share/doc/sallyport"

// lay puts every file where it is installed, with its mode, whatever the umask.
func (t tree) lay(ctx context.Context) error {
	for _, step := range []func(context.Context) error{t.layPrograms, t.layUnits, t.layDocs, t.layManuals, t.layScripts, t.layLicenses} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	for _, dir := range []string{"etc/sallyport", "etc/sallyport/resources.d"} {
		if err := os.MkdirAll(filepath.Join(t.root, dir), 0o755); err != nil {
			return err
		}
	}
	return filepath.WalkDir(t.root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			err = os.Chmod(path, 0o755)
		}
		return err
	})
}

// put writes a file below root.
func (t tree) put(name string, mode os.FileMode, data []byte) error {
	path := filepath.Join(t.root, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(path, data, mode); err != nil {
		return err
	}
	return os.Chmod(path, mode)
}

func (t tree) copy(from, to string, mode os.FileMode) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return t.put(to, mode, data)
}

func (t tree) layPrograms(context.Context) error {
	for _, p := range programs {
		if err := t.copy(filepath.Join(t.binaries, p), "usr/bin/"+p, 0o755); err != nil {
			return err
		}
	}
	return nil
}

func (t tree) layUnits(context.Context) error {
	units, err := filepath.Glob("deploy/systemd/*.service")
	if err != nil || len(units) == 0 {
		return fmt.Errorf("no units in deploy/systemd: %w", err)
	}
	for _, u := range units {
		if err := t.copy(u, "usr/lib/systemd/system/"+filepath.Base(u), 0o644); err != nil {
			return err
		}
	}
	return t.copy("deploy/systemd/sallyport-enforced.conf", docs+"/examples/sallyport-enforced.conf", 0o644)
}

func (t tree) layDocs(context.Context) error {
	for _, f := range []string{"README.md", "SECURITY.md", "docs/operators.md", "docs/reasons.md", "docs/install.md", "docs/inventory.md", "docs/rollout.md",
		"docs/other-proxies.md"} {
		if err := t.copy(f, docs+"/"+filepath.Base(f), 0o644); err != nil {
			return err
		}
	}
	if err := t.compress(docs+"/changelog.gz", "CHANGELOG.md"); err != nil {
		return err
	}
	history := fmt.Sprintf("sallyport (%s) unstable; urgency=medium\n\n  * What changed is in changelog.gz.\n\n -- Sallyport maintainers <maintainers@sallyport.dev>  %s\n",
		t.debian(), t.at.Format("Mon, 02 Jan 2006 15:04:05 -0700"))
	if err := t.putCompressed(docs+"/changelog.Debian.gz", []byte(history)); err != nil {
		return err
	}
	if err := t.copy("deploy/package/copyright", docs+"/copyright", 0o644); err != nil {
		return err
	}
	if err := t.copy("deploy/package/lintian-overrides", "usr/share/lintian/overrides/sallyport", 0o644); err != nil {
		return err
	}
	return filepath.WalkDir("deploy/examples", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel("deploy/examples", path)
		if err != nil {
			return err
		}
		return t.copy(path, docs+"/examples/"+rel, 0o644)
	})
}

// layManuals has the command write its manual pages and completions; those of the others are written by hand.
func (t tree) layManuals(ctx context.Context) error {
	dir := filepath.Join(t.work, "manuals")
	cmd := exec.CommandContext(ctx, filepath.Join(t.binaries, "sallyport"), "docs", dir)
	cmd.Env = append(os.Environ(), fmt.Sprintf("SOURCE_DATE_EPOCH=%d", t.at.Unix()))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("write manual pages: %w: %s", err, out)
	}
	for shell, to := range map[string]string{"sallyport.bash": "bash-completion/completions/sallyport", "_sallyport": "zsh/vendor-completions/_sallyport",
		"sallyport.fish": "fish/vendor_completions.d/sallyport.fish"} {
		if err := t.copy(filepath.Join(dir, "completions", shell), "usr/share/"+to, 0o644); err != nil {
			return err
		}
	}
	for _, pattern := range []string{filepath.Join(dir, "man", "*.1"), "deploy/package/*.8"} {
		pages, err := filepath.Glob(pattern)
		if err != nil || len(pages) == 0 {
			return fmt.Errorf("no manual pages %s: %w", pattern, err)
		}
		for _, p := range pages {
			section := strings.TrimPrefix(filepath.Ext(p), ".")
			if err := t.compress("usr/share/man/man"+section+"/"+filepath.Base(p)+".gz", p); err != nil {
				return err
			}
		}
	}
	return nil
}

// compress is for files that Debian wants so.
func (t tree) compress(to, from string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return t.putCompressed(to, data)
}

func (t tree) putCompressed(to string, data []byte) error {
	var out bytes.Buffer
	if err := squeeze(&out, data); err != nil {
		return err
	}
	return t.put(to, 0o644, out.Bytes())
}

// squeeze writes no time and no name, unlike the command gzip.
func squeeze(out *bytes.Buffer, data []byte) error {
	z, err := gzip.NewWriterLevel(out, gzip.BestCompression)
	if err != nil {
		return err
	}
	if _, err := z.Write(data); err != nil {
		return err
	}
	return z.Close()
}

// layScripts fills in what the scripts have to know of the programs that they come with.
func (t tree) layScripts(context.Context) error {
	if err := os.MkdirAll(filepath.Join(t.work, "scripts"), 0o755); err != nil {
		return err
	}
	known := strings.NewReplacer("@LAYOUT@", fmt.Sprint(datapath.Layout()), "@VERSION@", t.debian())
	for _, name := range []string{"preinst", "postinst", "prerm", "postrm"} {
		text, err := os.ReadFile("deploy/package/" + name)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(t.work, "scripts", name), []byte(known.Replace(string(text))), 0o755); err != nil {
			return err
		}
	}
	return nil
}

var isLicense = regexp.MustCompile(`(?i)^(li[cs]en[cs]e|copying|notice|patents)([.-].*)?$`)

// layLicenses gathers the terms of everything that is linked in: most ask that they go along with the binaries.
func (t tree) layLicenses(context.Context) error {
	var all bytes.Buffer
	for _, m := range t.modules {
		entries, err := os.ReadDir(m.dir)
		if err != nil {
			return err
		}
		found := false
		for _, e := range entries {
			if e.IsDir() || !isLicense.MatchString(e.Name()) {
				continue
			}
			text, err := os.ReadFile(filepath.Join(m.dir, e.Name()))
			if err != nil {
				return err
			}
			found = true
			fmt.Fprintf(&all, "==== %s %s: %s\n\n%s\n\n", m.Path, m.Version, e.Name(), bytes.TrimSpace(text))
		}
		if !found {
			return fmt.Errorf("%s %s has no license that could go along", m.Path, m.Version)
		}
	}
	return t.putCompressed(docs+"/licenses.gz", all.Bytes())
}
