//go:build package

package main

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spdx/tools-golang/json"
	"github.com/spdx/tools-golang/spdxlib"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
)

var update = flag.Bool("update", false, "write testdata/contents.txt anew")

// made is what one run of the command made.
type made struct{ dir, deb, archive, sbom string }

// pack runs the command as somebody else might: with another umask, another time zone, and another folder for what is temporary.
func pack(t *testing.T, tool, binaries, umask, zone string) made {
	t.Helper()
	m := made{dir: filepath.Join(t.TempDir(), "out")}
	tmp := filepath.Join(t.TempDir(), "tmp")
	if err := os.Mkdir(tmp, 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", "umask "+umask+" && exec \"$@\"", "sh", tool, "-bin", binaries, "-out", m.dir, "-version", "v1.2.3-4-gabc")
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "TZ="+zone, "TMPDIR="+tmp)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	const name = "sallyport_1.2.3+4.gabc_"
	m.deb, m.archive, m.sbom = m.file(t, name+"*.deb"), m.file(t, name+"*.tar.gz"), m.file(t, name+"*.spdx.json")
	return m
}

func (m made) file(t *testing.T, pattern string) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(m.dir, pattern))
	if err != nil || len(found) != 1 {
		t.Fatalf("%s: %v, %v", pattern, found, err)
	}
	return found[0]
}

func say(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// TestPackage makes a release of the programs as they are, twice, and looks at what it holds.
func TestPackage(t *testing.T) {
	bin, tool := filepath.Join(t.TempDir(), "bin"), filepath.Join(t.TempDir(), "package")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", bin+"/", "./cmd/sallyport", "./cmd/sallyport-agent", "./cmd/sallyport-proxy", "./cmd/sallyport-collector")
	build.Dir, build.Env = "../..", append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build programs: %v\n%s", err, out)
	}
	say(t, "go", "build", "-o", tool, ".")
	first := pack(t, tool, bin, "022", "UTC")
	for name, check := range map[string]func(*testing.T, made){
		"contents": checkContents, "lintian": checkLintian, "sbom": checkSBOM, "sums": checkSums, "scripts": checkScripts, "units": checkUnits, "manuals": checkManuals,
	} {
		t.Run(name, func(t *testing.T) { check(t, first) })
	}
	t.Run("again", func(t *testing.T) {
		second := pack(t, tool, bin, "077", "Asia/Kolkata")
		for _, f := range []string{first.deb, first.archive, first.sbom, filepath.Join(first.dir, checksums)} {
			a, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			b, err := os.ReadFile(filepath.Join(second.dir, filepath.Base(f)))
			if err != nil || !bytes.Equal(a, b) {
				t.Errorf("%s is not the same again (%v)", filepath.Base(f), err)
			}
		}
	})
}

// checkContents holds modes, owners and names to the list in testdata; the archive has the same files.
func checkContents(t *testing.T, m made) {
	var deb, archive []string
	for line := range strings.Lines(say(t, "dpkg-deb", "-c", m.deb)) {
		f := strings.Fields(line)
		deb = append(deb, f[0]+" "+f[1]+" "+strings.TrimPrefix(f[5], "./"))
	}
	slices.Sort(deb)
	const golden = "testdata/contents.txt"
	have := strings.Join(deb, "\n") + "\n"
	if *update {
		if err := os.WriteFile(golden, []byte(have), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil || have != string(want) {
		t.Errorf("contents are not those of %s (go test ./tools/package -update writes it): %v\n%s", golden, err, have)
	}
	for line := range strings.Lines(say(t, "tar", "-tvzf", m.archive)) {
		f := strings.Fields(line)
		_, name, _ := strings.Cut(f[5], "/")
		archive = append(archive, f[0]+" "+strings.Replace(f[1], "0/0", "root/root", 1)+" "+name)
	}
	slices.Sort(archive)
	if !slices.Equal(deb, archive) {
		t.Errorf("the archive has other files than the package:\n%s", strings.Join(archive, "\n"))
	}
}

func checkLintian(t *testing.T, m made) {
	out, err := exec.Command("lintian", "--allow-root", "--fail-on", "error,warning", "--tag-display-limit", "0", m.deb).CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func checkSums(t *testing.T, m made) {
	cmd := exec.Command("sha256sum", "--strict", "-c", checksums)
	cmd.Dir = m.dir
	if out, err := cmd.CombinedOutput(); err != nil || bytes.Count(out, []byte(": OK")) != 3 {
		t.Errorf("%v\n%s", err, out)
	}
}

// checkSBOM has the library validate the document, and holds it to what Go's own tool says of the programs.
func checkSBOM(t *testing.T, m made) {
	f, err := os.Open(m.sbom)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	doc, err := json.Read(f)
	if err != nil {
		t.Fatal(err)
	}
	if err := spdxlib.ValidateDocument(doc); err != nil {
		t.Error(err)
	}
	known, linked, hashes := map[string]string{}, map[string]bool{}, map[string]string{}
	for _, p := range doc.Packages {
		known[p.PackageName+" "+p.PackageVersion] = strings.TrimPrefix(p.PackageSourceInfo, "go.sum: ")
		for _, r := range doc.Relationships {
			if r.Relationship == "STATIC_LINK" && r.RefB.ElementRefID == p.PackageSPDXIdentifier {
				linked[string(r.RefA.ElementRefID)+" "+p.PackageName] = true
			}
		}
	}
	for _, f := range doc.Files {
		for _, c := range f.Checksums {
			hashes[fmt.Sprintf("%s %s", c.Algorithm, f.FileName)] = c.Value
		}
	}
	root := t.TempDir()
	say(t, "dpkg-deb", "-x", m.deb, root)
	for _, program := range programs {
		path := filepath.Join(root, "usr/bin", program)
		for algorithm, tool := range map[string]string{"SHA1": "sha1sum", "SHA256": "sha256sum"} {
			if sum, _, _ := strings.Cut(say(t, tool, path), " "); hashes[algorithm+" ./usr/bin/"+program] != sum {
				t.Errorf("%s has the %s %s; the SBOM has %q", program, algorithm, sum, hashes[algorithm+" ./usr/bin/"+program])
			}
		}
		for line := range strings.Lines(say(t, "go", "version", "-m", path)) {
			f := strings.Fields(line)
			if f[0] == "dep" && !linked[string(fileID(program))+" "+f[1]] {
				t.Errorf("the SBOM does not say that %s is in %s", f[1], program)
			}
			if f[0] == "dep" && known[f[1]+" "+f[2]] != f[3] {
				t.Errorf("%s has %s %s with sum %s; the SBOM has sum %q", program, f[1], f[2], f[3], known[f[1]+" "+f[2]])
			}
		}
	}
	if len(known) < 50 {
		t.Errorf("%d packages", len(known))
	}
}

// checkScripts reads the scripts as they are in the package, and has the first of them refuse another layout of maps.
func checkScripts(t *testing.T, m made) {
	dir := filepath.Join(t.TempDir(), "control")
	say(t, "dpkg-deb", "-e", m.deb, dir)
	for _, s := range []string{"preinst", "postinst", "prerm", "postrm"} {
		say(t, "dash", "-n", filepath.Join(dir, s))
		say(t, "shellcheck", filepath.Join(dir, s))
	}
	enforcing := func(layout int, args ...string) (string, error) {
		script := fmt.Sprintf("mount -t tmpfs none /sys/fs/bpf && mkdir -p /sys/fs/bpf/sallyport/v%d && exec sh %s/preinst \"$@\"", layout, dir)
		out, err := exec.Command("unshare", append([]string{"-m", "sh", "-c", script, "sh"}, args...)...).CombinedOutput()
		return string(out), err
	}
	if out, err := enforcing(datapath.Layout(), "upgrade", "1.0"); err != nil || out != "" {
		t.Errorf("with our layout: %v: %s", err, out)
	}
	for _, args := range [][]string{{"upgrade", "9.0"}, {"install"}} {
		out, err := enforcing(datapath.Layout()+1, args...)
		if err == nil || !strings.Contains(out, fmt.Sprintf("(1.2.3+4.gabc) reads map layout %d, and the node enforces with %d", datapath.Layout(), datapath.Layout()+1)) || !strings.Contains(out, "hint: ") {
			t.Errorf("%v with another layout: %v: %s", args, err, out)
		}
	}
	if out, err := enforcing(datapath.Layout()+1, "abort-upgrade", "9.0"); err != nil {
		t.Errorf("the way back is barred: %v: %s", err, out)
	}
}

// checkUnits: each program that a unit names is in the package, where it says.
func checkUnits(t *testing.T, m made) {
	root := t.TempDir()
	say(t, "dpkg-deb", "-x", m.deb, root)
	units, err := filepath.Glob(filepath.Join(root, "usr/lib/systemd/system/*.service"))
	if err != nil || len(units) != 5 {
		t.Fatalf("units: %v, %v", units, err)
	}
	ours := regexp.MustCompile(`(?m)^Exec\w+=(/\S*sallyport\S*)`)
	for _, u := range units {
		text, err := os.ReadFile(u)
		if err != nil {
			t.Fatal(err)
		}
		found := ours.FindAllStringSubmatch(string(text), -1)
		if len(found) == 0 && filepath.Base(u) != "sallyport-enforced.service" {
			t.Errorf("%s starts none of our programs", u)
		}
		for _, f := range found {
			if _, err := os.Stat(filepath.Join(root, f[1])); err != nil {
				t.Errorf("%s: %v", filepath.Base(u), err)
			}
		}
	}
}

// checkManuals: what the programs' own help names is in the pages that are written by hand.
func checkManuals(t *testing.T, m made) {
	root := t.TempDir()
	say(t, "dpkg-deb", "-x", m.deb, root)
	command := regexp.MustCompile(`(?m)^  ([a-z]+) {2,}`)
	for _, p := range []string{"sallyport-agent", "sallyport-collector"} {
		page := say(t, "gzip", "-dc", filepath.Join(root, "usr/share/man/man8", p+".8.gz"))
		for _, c := range command.FindAllStringSubmatch(say(t, filepath.Join(root, "usr/bin", p), "--help"), -1) {
			if c[1] != "help" && c[1] != "completion" && !strings.Contains(page, ".B "+c[1]+"\n") {
				t.Errorf("%s.8 does not tell of %q", p, c[1])
			}
		}
	}
}
