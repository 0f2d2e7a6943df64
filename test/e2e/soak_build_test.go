package e2e_test

import (
	"encoding/json"
	"fmt"
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
	root, err := filepath.Abs("../..")
	must(t, err)
	loader := filepath.Join(root, "bpf", "sallyport_bpfel.go")
	text, err := os.ReadFile(loader)
	must(t, err)
	changed := strings.Replace(string(text), "\n\treturn spec, err\n}\n", tagged, 1)
	changed = strings.Replace(changed, `"github.com/cilium/ebpf"`, "\"github.com/cilium/ebpf\"\n\t\"github.com/cilium/ebpf/asm\"", 1)
	if strings.Count(changed, "asm") < 4 {
		t.Fatalf("%s is not as it was: no place for another instruction", loader)
	}
	must(t, os.MkdirAll(dir, 0o700))
	file, overlay := filepath.Join(dir, "loader.go"), filepath.Join(dir, "overlay.json")
	write(t, file, changed)
	list, err := json.Marshal(map[string]any{"Replace": map[string]string{loader: file}})
	must(t, err)
	write(t, overlay, string(list))
	cmd := exec.Command("go", "build", "-buildvcs=false", "-overlay", overlay, "-o", dir+"/", "./cmd/...")
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatal(fmt.Errorf("build the other version: %w\n%s", err, out))
	}
	return dir
}
