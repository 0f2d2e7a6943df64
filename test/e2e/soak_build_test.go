package e2e_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// tagged begins every program with one more instruction, which does nothing: the kernel then sees
// another program, by another tag, as it does after a real upgrade.
const tagged = `
	for _, p := range spec.Programs {
		first := asm.Mov.Imm(asm.R0, 0)
		first.Metadata = p.Instructions[0].Metadata
		p.Instructions[0].Metadata = asm.Metadata{}
		p.Instructions = append(asm.Instructions{first}, p.Instructions...)
	}
	return spec, err
}
`

// buildOther builds the programs as another version of themselves: other program tags, and another
// version string.
func buildOther(t *testing.T, dir string) string {
	t.Helper()
	return buildChanged(t, dir, "bpf/sallyport_bpfel.go", func(text string) string {
		text = strings.Replace(text, "\n\treturn spec, err\n}\n", tagged, 1)
		return strings.Replace(text, `"github.com/cilium/ebpf"`, "\"github.com/cilium/ebpf\"\n\t\"github.com/cilium/ebpf/asm\"", 1)
	})
}

// buildChanged builds the programs with one source file changed, which stays as it is.
func buildChanged(t *testing.T, dir, file string, change func(string) string) string {
	t.Helper()
	root, err := filepath.Abs("../..")
	must(t, err)
	source := filepath.Join(root, file)
	text, err := os.ReadFile(source)
	must(t, err)
	changed := change(string(text))
	if changed == string(text) {
		t.Fatalf("%s is not as it was: there is no place for the change", file)
	}
	must(t, os.MkdirAll(dir, 0o700))
	replacement, overlay := filepath.Join(dir, "changed.go"), filepath.Join(dir, "overlay.json")
	write(t, replacement, changed)
	list, err := json.Marshal(map[string]any{"Replace": map[string]string{source: replacement}})
	must(t, err)
	write(t, overlay, string(list))
	cmd := exec.Command("go", "build", "-buildvcs=false", "-overlay", overlay, "-o", dir+"/", "./cmd/...")
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build with another %s: %v\n%s", file, err, out)
	}
	return dir
}
