package docs

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

const root = "../.."

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// documents are the Markdown files of the repository.
func documents(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, pattern := range []string{"*.md", "docs/*.md"} {
		files, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			name := strings.TrimPrefix(f, root+"/")
			all[name] = read(t, name)
		}
	}
	if len(all) < 6 {
		t.Fatalf("found %d documents only", len(all))
	}
	return all
}

func TestReadmeIsShort(t *testing.T) {
	if n := strings.Count(read(t, "README.md"), "\n"); n > 100 {
		t.Errorf("README.md has %d lines, want at most 100", n)
	}
}

func glob(t *testing.T, pattern string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(root, pattern))
	if err != nil || len(files) == 0 {
		t.Fatalf("%s: %v", pattern, err)
	}
	return files
}

func TestMakeTargetsInDocumentsExist(t *testing.T) {
	makefile := read(t, "Makefile")
	used := regexp.MustCompile("(?m)(?:^|[`(]|sudo )make ([a-z0-9-]+)")
	for name, text := range documents(t) {
		for _, m := range used.FindAllStringSubmatch(text, -1) {
			if !regexp.MustCompile(`(?m)^` + m[1] + `:.*## `).MatchString(makefile) {
				t.Errorf("%s names `make %s`, which is no target with a help line", name, m[1])
			}
		}
	}
}

func TestLinksInDocumentsLeadSomewhere(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#:]+)\)`)
	for name, text := range documents(t) {
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			if _, err := os.Stat(filepath.Join(root, filepath.Dir(name), m[1])); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

func TestEveryReasonIsExplained(t *testing.T) {
	row := regexp.MustCompile("(?m)^\\| `([A-Z_]+)` \\|")
	explained := map[string]int{}
	for _, m := range row.FindAllStringSubmatch(read(t, "docs/reasons.md"), -1) {
		explained[m[1]]++
	}
	for _, r := range flow.Reasons() {
		if r != flow.ReasonNone && explained[r.String()] != 1 {
			t.Errorf("docs/reasons.md explains %s %d times, want once", r, explained[r.String()])
		}
	}
	for name := range explained {
		_, reason := flow.ParseReason(name)
		_, verdict := flow.ParseVerdict(name)
		if reason != nil && verdict != nil {
			t.Errorf("docs/reasons.md explains %s, which is no reason and no verdict", name)
		}
	}
}

func TestEveryMapIsInTheArchitecture(t *testing.T) {
	architecture := read(t, "ARCHITECTURE.md")
	for _, m := range regexp.MustCompile(`\} (sp_\w+) SEC\("\.maps"\)`).FindAllStringSubmatch(read(t, "bpf/maps.h"), -1) {
		if m[1] != "sp_table" && !strings.Contains(architecture, "`"+m[1]+"`") { // the inner map of sp_services
			t.Errorf("ARCHITECTURE.md does not say what %s holds", m[1])
		}
	}
	for _, m := range regexp.MustCompile(`(?m)^int (sp_\w+)\(`).FindAllStringSubmatch(read(t, "bpf/sallyport.c"), -1) {
		if !strings.Contains(architecture, "`"+m[1]+"`") {
			t.Errorf("ARCHITECTURE.md does not say where %s is", m[1])
		}
	}
}

// TestShapesNameTheirTests: every test that the table of packet shapes names is there.
func TestShapesNameTheirTests(t *testing.T) {
	_, table, ok := strings.Cut(read(t, "ARCHITECTURE.md"), "### Packet shapes")
	if !ok {
		t.Fatal("ARCHITECTURE.md has no table of packet shapes")
	}
	table, _, _ = strings.Cut(table, "### Hooks")
	sources := ""
	files, err := filepath.Glob(filepath.Join(root, "pkg/datapath/*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	hostile, err := filepath.Glob(filepath.Join(root, "test/hostile/*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range slices.Concat(files, hostile) {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		sources += string(b)
	}
	for _, row := range strings.Split(table, "\n") {
		if !strings.HasPrefix(row, "| ") || strings.HasPrefix(row, "| shape") || strings.HasPrefix(row, "| ---") {
			continue
		}
		names := regexp.MustCompile("`(Test\\w+)").FindAllStringSubmatch(row, -1)
		if len(names) == 0 {
			t.Errorf("no test for: %s", row)
		}
		for _, m := range names {
			if !strings.Contains(sources, "func "+m[1]+"(t *testing.T)") {
				t.Errorf("%s is no test: %s", m[1], row)
			}
		}
	}
}

func TestExamplesAreValid(t *testing.T) {
	config, err := policy.ParseAgentConfig("agent.yaml", []byte(read(t, "deploy/examples/agent.yaml")))
	if err != nil {
		t.Fatal(err)
	}
	set, err := policy.LoadDir(filepath.Join(root, "deploy/examples/resources.d"))
	if err != nil {
		t.Fatal(err)
	}
	if err := set.Test(); err != nil || set.Tests() == 0 {
		t.Errorf("%d tests: %v", set.Tests(), err)
	}
	remote, err := policy.LoadFiles(filepath.Join(root, "deploy/examples/remote.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	rolledOut, err := policy.LoadFiles(append(glob(t, "deploy/examples/resources.d/*.yaml"), filepath.Join(root, "deploy/examples/rollout.yaml"))...)
	if err != nil || len(rolledOut.Rollouts()) != 1 {
		t.Errorf("roll-out: %v", err)
	}
	attesting := config
	attesting.Spec.Workloads.API = policy.WorkloadsBroker
	service := remote.RemoteServices()[0]
	if err := remote.CheckNode(config); err != nil || service.Closed(config) == nil || service.Closed(attesting) != nil {
		t.Errorf("remote services: %v, where nobody attests %v, where somebody does %v", err, service.Closed(config), service.Closed(attesting))
	}
	// What the example calls a default is one.
	want := policy.DefaultAgentConfig()
	want.Name, want.Spec.TrustDomain = config.Name, config.Spec.TrustDomain
	want.Spec.Collector, want.Spec.Metrics = config.Spec.Collector, config.Spec.Metrics
	want.Spec.Automation = config.Spec.Automation
	got, wanted := describe(config.Spec), describe(want.Spec)
	if got != wanted {
		t.Errorf("example and defaults differ:\n%s\n%s", got, wanted)
	}
}

func TestCollectorExampleIsValid(t *testing.T) {
	cmd := exec.Command("go", "run", "./cmd/sallyport-collector", "check", "--config", "deploy/examples/collector.yaml")
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// describe prints values, not pointers, and no difference between empty and missing lists.
func describe(v policy.AgentConfigSpec) string {
	collector := *v.Collector
	v.Collector = nil
	return fmt.Sprintf("%v %v", v, collector)
}
