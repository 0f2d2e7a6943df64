package rules

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// pkg is what go list says of a package.
type pkg struct {
	ImportPath, Name, Doc string
	Imports               []string
	TestImports           []string
	XTestImports          []string
}

func packages(t *testing.T) []pkg {
	t.Helper()
	var stderr bytes.Buffer
	cmd := exec.Command("go", "list", "-json=ImportPath,Name,Doc,Imports,TestImports,XTestImports", module+"...")
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, &stderr)
	}
	var all []pkg
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

// TestModuleFile holds what go mod tidy would: direct dependencies are those that we import.
func TestModuleFile(t *testing.T) {
	var file struct {
		Require []struct {
			Path     string
			Indirect bool
		}
	}
	out, err := exec.Command("go", "mod", "edit", "-json").Output()
	if err == nil {
		err = json.Unmarshal(out, &file)
	}
	if err != nil {
		t.Fatalf("go mod edit: %v", err)
	}
	direct := map[string]bool{}
	for _, p := range packages(t) {
		for _, i := range slices.Concat(p.Imports, p.TestImports, p.XTestImports) {
			owner := "" // the longest module path that is a prefix
			for _, m := range file.Require {
				if (i == m.Path || strings.HasPrefix(i, m.Path+"/")) && len(m.Path) > len(owner) {
					owner = m.Path
				}
			}
			direct[owner] = true
		}
	}
	for _, m := range file.Require {
		if m.Indirect == direct[m.Path] {
			t.Errorf("go.mod: %s is indirect: %v, imported by us: %v", m.Path, m.Indirect, direct[m.Path])
		}
	}
}

// matches says whether an import path is one of the patterns.
func matches(path string, patterns []string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		if rest, ok := strings.CutPrefix(p, "./"); ok {
			p = module + rest
		}
		if dir, ok := strings.CutSuffix(p, "/..."); ok {
			return path == dir || strings.HasPrefix(path, dir+"/")
		}
		return path == p
	})
}

// binds says whether the rule forbids the package what the rule is about.
func (r rule) binds(path string) bool {
	if matches(path, r.imports) {
		return false
	}
	if len(r.not) > 0 {
		return matches(path, r.not)
	}
	return !matches(path, r.only)
}

// broken lists the imports of the package that a rule forbids, with the reason.
func broken(p pkg, rules []rule) []string {
	var found []string
	for _, r := range rules {
		for _, i := range p.Imports {
			if r.binds(p.ImportPath) && matches(i, r.imports) {
				found = append(found, i+": "+r.why)
			}
		}
	}
	return found
}

func TestImports(t *testing.T) {
	for _, p := range packages(t) {
		for _, b := range broken(p, rules) {
			t.Errorf("%s imports %s", p.ImportPath, b)
		}
	}
}

func TestRulesAreAboutSomething(t *testing.T) {
	all := packages(t)
	for _, r := range rules {
		for _, pattern := range slices.Concat(r.only, r.not) {
			if !slices.ContainsFunc(all, func(p pkg) bool { return matches(p.ImportPath, []string{pattern}) }) {
				t.Errorf("rule %q names %s, which is not there", r.why, pattern)
			}
		}
		if r.why == "" {
			t.Errorf("rule about %v has no reason", r.imports)
		}
	}
}

func TestBrokenRulesAreFound(t *testing.T) {
	for path, imports := range map[string]string{
		module + "pkg/policy":     "net/http",
		module + "pkg/agent":      module + "bpf",
		module + "cmd/sallyport":  module + "pkg/agent",
		module + "pkg/proxy":      "github.com/spiffe/go-spiffe/v2/workloadapi",
		module + "pkg/store":      module + "pkg/api",
		module + "pkg/collector":  module + "test/lab",
		module + "pkg/flow":       "golang.org/x/sys/unix",
		module + "pkg/newcomer":   "github.com/cilium/ebpf/link",
		module + "pkg/devtool":    module + "tools/fuzz",
		module + "pkg/newcomer/x": "google.golang.org/grpc",
		module + "pkg/login":      "github.com/crewjam/saml",
		module + "pkg/token":      "github.com/russellhaering/goxmldsig",
		module + "pkg/px":         "github.com/spiffe/go-spiffe/v2/bundle/x509bundle",
	} {
		if len(broken(pkg{ImportPath: path, Imports: []string{imports}}, rules)) == 0 {
			t.Errorf("no rule forbids %s to import %s", path, imports)
		}
	}
	for path, imports := range map[string]string{
		module + "pkg/datapath": module + "bpf",
		module + "test/lab":     "testing",
		module + "pkg/agent":    "google.golang.org/grpc/codes",
		module + "pkg/policy":   "github.com/spiffe/go-spiffe/v2/spiffeid",
	} {
		if b := broken(pkg{ImportPath: path, Imports: []string{imports}}, rules); len(b) > 0 {
			t.Errorf("%s may not import %s: %v", path, imports, b)
		}
	}
}

func TestEveryPackageSaysWhatItIs(t *testing.T) {
	for _, p := range packages(t) {
		begin := "Package " + p.Name + " "
		if p.Name == "main" {
			begin = "Command " + p.ImportPath[strings.LastIndexByte(p.ImportPath, '/')+1:] + " "
		}
		if !strings.HasPrefix(p.Doc, begin) || !strings.HasSuffix(strings.TrimSpace(p.Doc), ".") {
			t.Errorf("%s: package comment is %q, want a sentence that begins with %q", p.ImportPath, p.Doc, begin)
		}
	}
}

func TestEveryPackageHasAHome(t *testing.T) {
	for _, p := range packages(t) {
		for _, part := range strings.Split(strings.TrimPrefix(p.ImportPath, module), "/") {
			if slices.Contains(homeless, part) {
				t.Errorf("%s: %q says nothing about what is inside; name the thing", p.ImportPath, part)
			}
		}
	}
}

// TestNoProgramIsCommitted: what git keeps is read by people, but for the programs that bpf2go compiled.
func TestNoProgramIsCommitted(t *testing.T) {
	out, err := exec.Command("git", "-C", "../..", "ls-files", "-z").Output()
	if err != nil {
		t.Fatalf("git ls-files: %v", err)
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(out), "\x00"), "\x00") {
		if strings.HasPrefix(name, "bpf/") {
			continue
		}
		begin := make([]byte, 4)
		f, err := os.Open(filepath.Join("../..", name))
		if errors.Is(err, fs.ErrNotExist) { // taken out, but not yet of the index
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.ReadFull(f, begin)
		_ = f.Close()
		if bytes.Equal(begin, []byte("\x7fELF")) {
			t.Errorf("%s is a program: take it out, make builds it", name)
		}
	}
}
