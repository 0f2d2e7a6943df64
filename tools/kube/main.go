// Command kube builds Kubernetes' own programs and their etcd for tests, from their modules, into a folder that is kept: KUBE_BIN_DIR, or .tools/kube.
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

// etcd is the one that Kubernetes of that version is a client of. Debian's is too old for watches that begin with a list: an API server
// cannot tell from it that nothing has changed, and its clients wait.
const etcd = "v3.6.8"

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
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if !isThere(filepath.Join(dir, "etcd")) {
		if err := makeEtcd(dir); err != nil {
			return err
		}
	}
	if len(missing) == 0 {
		return nil
	}
	fmt.Printf("kube: building %s %s into %s\n", strings.Join(missing, ", "), kubernetes, dir)
	module, err := os.MkdirTemp("", "kube-build-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(module)
	if err := makeModule(module); err != nil {
		return err
	}
	for _, p := range missing {
		if err := build(module, dir, "k8s.io/kubernetes/cmd/"+p, flags()); err != nil {
			return err
		}
	}
	return nil
}

// isThere asks the program: another version is built anew.
func isThere(program string) bool {
	args, version := []string{"--version"}, kubernetes
	switch filepath.Base(program) {
	case "kubectl":
		args = []string{"version", "--client"}
	case "etcd":
		version = strings.TrimPrefix(etcd, "v")
	}
	out, err := exec.Command(program, args...).Output()
	return err == nil && bytes.Contains(out, []byte(version))
}

// makeEtcd builds it in a throw-away module of its own.
func makeEtcd(dir string) error {
	const path = "go.etcd.io/etcd/server/v3"
	fmt.Printf("kube: building etcd %s into %s\n", etcd, dir)
	module, err := os.MkdirTemp("", "kube-build-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(module)
	if err := os.WriteFile(filepath.Join(module, "go.mod"), []byte("module example.test/etcd\n"), 0o644); err != nil {
		return err
	}
	get := exec.Command("go", "get", path+"@"+etcd)
	get.Dir, get.Env = module, append(os.Environ(), "GOFLAGS=")
	if out, err := get.CombinedOutput(); err != nil {
		return fmt.Errorf("download etcd: %w: %s", err, out)
	}
	return build(module, dir, path, "-s -w")
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

// flags put the versions into Kubernetes' programs. Without them they would refuse others of their kind.
func flags() string {
	const base = "k8s.io/component-base/version"
	return fmt.Sprintf("-s -w -X %s.gitVersion=%s -X %s.gitMajor=1 -X %s.gitMinor=%s -X k8s.io/client-go/pkg/version.gitVersion=%s",
		base, kubernetes, base, base, strings.Split(kubernetes, ".")[1], kubernetes)
}

// build puts the program of a package in place when it is whole.
func build(module, dir, path, flags string) error {
	program := filepath.Base(path)
	if program == "v3" {
		program = "etcd"
	}
	half := filepath.Join(dir, "."+program)
	cmd := exec.Command("go", "build", "-mod=mod", "-trimpath", "-ldflags", flags, "-o", half, path)
	cmd.Dir, cmd.Stdout, cmd.Stderr = module, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("build %s: %w", program, err)
	}
	fmt.Println("kube:", program)
	return os.Rename(half, filepath.Join(dir, program))
}
