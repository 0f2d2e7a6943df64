// Command kube builds Kubernetes' own programs for tests, from their module, into a folder that is kept: KUBE_BIN_DIR, or .tools/kube.
// What is there in the wanted version is left alone. The first time takes a quarter of an hour on two cores.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/mod/modfile"
)

// kubernetes is the one version of all of them. Its staging modules have it as v0.
const kubernetes = "v1.36.3"

// programs are in the order in which tests can begin with them.
var programs = []string{"kube-apiserver", "kubectl", "kubelet", "kube-controller-manager", "kube-scheduler", "kube-proxy"}

func main() {
	dir := os.Getenv("KUBE_BIN_DIR")
	if dir == "" {
		dir = filepath.Join(".tools", "kube")
	}
	if err := run(dir); err != nil {
		fmt.Fprintln(os.Stderr, "kube:", err)
		os.Exit(1)
	}
}

func run(dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	var missing []string
	for _, p := range programs {
		if !isThere(filepath.Join(dir, p)) {
			missing = append(missing, p)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	fmt.Printf("kube: building %s %s into %s\n", strings.Join(missing, ", "), kubernetes, dir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	module, err := os.MkdirTemp("", "kube-build-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(module)
	if err := makeModule(module); err != nil {
		return err
	}
	for _, p := range missing {
		if err := build(module, dir, p); err != nil {
			return err
		}
	}
	return nil
}

// isThere asks the program: another version is built anew.
func isThere(program string) bool {
	args := []string{"--version"}
	if filepath.Base(program) == "kubectl" {
		args = []string{"version", "--client"}
	}
	out, err := exec.Command(program, args...).Output()
	return err == nil && bytes.Contains(out, []byte(kubernetes))
}

// makeModule makes a throw-away module that requires Kubernetes, with its staging modules at their published versions.
func makeModule(dir string) error {
	published, err := download(dir)
	if err != nil {
		return err
	}
	data, err := os.ReadFile(published)
	if err != nil {
		return err
	}
	theirs, err := modfile.ParseLax(published, data, nil)
	if err != nil {
		return err
	}
	ours := new(modfile.File)
	errs := []error{ours.AddModuleStmt("example.test/kube"), ours.AddRequire("k8s.io/kubernetes", kubernetes)}
	if theirs.Go != nil {
		errs = append(errs, ours.AddGoStmt(theirs.Go.Version))
	}
	for _, r := range stagingModules(string(data)) {
		errs = append(errs, ours.AddReplace(r, "", r, "v0."+strings.TrimPrefix(kubernetes, "v1.")))
	}
	text, err := ours.Format()
	return errors.Join(append(errs, err, os.WriteFile(filepath.Join(dir, "go.mod"), text, 0o644))...)
}

// stagingModules are those that Kubernetes' go.mod replaces by folders of its own; they are published, too. The lax parser skips them.
func stagingModules(gomod string) (paths []string) {
	for line := range strings.Lines(gomod) {
		path, _, ok := strings.Cut(strings.TrimSpace(line), " => ./staging/")
		if path = strings.TrimPrefix(path, "replace "); ok {
			paths = append(paths, path)
		}
	}
	return paths
}

// download gives the file of Kubernetes' go.mod.
func download(dir string) (string, error) {
	cmd := exec.Command("go", "mod", "download", "-json", "k8s.io/kubernetes@"+kubernetes)
	cmd.Dir, cmd.Stderr = dir, os.Stderr
	cmd.Env = append(os.Environ(), "GOFLAGS=")
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("download Kubernetes: %w: %s", err, out)
	}
	var module struct{ GoMod string }
	return module.GoMod, json.Unmarshal(out, &module)
}

// build puts a program in place when it is whole. Without the versions it would refuse others of its kind.
func build(module, dir, program string) error {
	const base = "k8s.io/component-base/version"
	flags := fmt.Sprintf("-s -w -X %s.gitVersion=%s -X %s.gitMajor=1 -X %s.gitMinor=%s -X k8s.io/client-go/pkg/version.gitVersion=%s",
		base, kubernetes, base, base, strings.Split(kubernetes, ".")[1], kubernetes)
	half := filepath.Join(dir, "."+program)
	cmd := exec.Command("go", "build", "-mod=mod", "-trimpath", "-ldflags", flags, "-o", half, "k8s.io/kubernetes/cmd/"+program)
	cmd.Dir, cmd.Stdout, cmd.Stderr = module, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("build %s: %w", program, err)
	}
	fmt.Println("kube:", program)
	return os.Rename(half, filepath.Join(dir, program))
}
