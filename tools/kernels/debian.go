package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// kernel is one that Debian ships: the package that depends on it, and the suite that has it.
type kernel struct{ name, suite, meta string }

// kernels are the oldest that Sallyport supports among those that Debian ships, the one in between
// that most nodes run, and the newest.
var kernels = []kernel{
	{"6.1", "bookworm-security", "linux-image-cloud-amd64"},
	{"6.12", "bookworm-security", "linux-image-6.12-cloud-amd64"},
	{"newest", "trixie-backports", "linux-image-cloud-amd64"},
}

// Name is what the command line calls it.
func (k kernel) Name() string { return k.name }

// keyring has the keys of the archive, from the package debian-archive-keyring.
const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// fetch returns the kernel's unpacked files. Those in the cache do, unless the newest are asked for.
func (k kernel) fetch(ctx context.Context, cache string, refresh bool) (tree, error) {
	dir := filepath.Join(cache, k.name)
	if !refresh {
		if t, err := findTree(filepath.Join(dir, "root")); err == nil {
			return t, nil
		}
	}
	a, err := k.newApt(dir)
	if err != nil {
		return tree{}, err
	}
	if err := a.run(ctx, "apt-get", "update", "-qq"); err != nil {
		return tree{}, err
	}
	packages, err := a.follow(ctx, k.meta)
	if err != nil {
		return tree{}, err
	}
	return a.unpack(ctx, packages)
}

// apt is a state of apt's own, so that the machine's stays as it is.
type apt struct{ dir string }

func (k kernel) newApt(dir string) (apt, error) {
	a := apt{dir}
	mirror, err := mirror(strings.HasSuffix(k.suite, "-security"))
	if err != nil {
		return a, err
	}
	for _, sub := range []string{"lists/partial", "archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return a, fmt.Errorf("make apt's state: %w", err)
		}
	}
	line := fmt.Sprintf("deb [arch=amd64 signed-by=%s] %s %s main\n", keyring, mirror, k.suite)
	if err := os.WriteFile(filepath.Join(dir, "sources.list"), []byte(line), 0o644); err != nil {
		return a, fmt.Errorf("write apt's sources: %w", err)
	}
	return a, nil
}

// mirror is where this machine gets Debian from, by its own sources.
func mirror(security bool) (string, error) {
	want := "debian"
	if security {
		want = "debian-security"
	}
	files, err := filepath.Glob("/etc/apt/sources.list.d/*")
	if err != nil {
		return "", fmt.Errorf("list apt's sources: %w", err)
	}
	for _, f := range append(files, "/etc/apt/sources.list") {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // not there, or not ours to read
		}
		for _, word := range strings.Fields(string(b)) {
			if u := strings.TrimSuffix(word, "/"); strings.Contains(u, "://") && strings.HasSuffix(u, "/"+want) && !strings.Contains(u, "snapshot.") {
				return u, nil
			}
		}
	}
	return "", fmt.Errorf("find mirror: apt's sources name no archive that ends in /%s", want)
}

func (a apt) args(more ...string) []string {
	o := []string{
		"-o", "Dir::Etc::sourcelist=" + a.dir + "/sources.list", "-o", "Dir::Etc::sourceparts=-",
		"-o", "Dir::State::lists=" + a.dir + "/lists", "-o", "Dir::Cache::archives=" + a.dir + "/archives",
		"-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache=", "-o", "APT::Sandbox::User=root",
	}
	return append(o, more...)
}

func (a apt) run(ctx context.Context, name string, args ...string) error {
	_, err := a.output(ctx, name, args...)
	return err
}

func (a apt) output(ctx context.Context, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, a.args(args...)...)
	cmd.Dir = filepath.Join(a.dir, "archives")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("run %s %s: %w: %s", name, args[0], err, stderr.Bytes())
	}
	return out, nil
}

// follow lists the packages that carry the kernel's files, from its meta-package on: the image
// itself, or, as newer kernels are packed, a binary and its modules.
func (a apt) follow(ctx context.Context, name string) (found []string, err error) {
	out, err := a.output(ctx, "apt-cache", "show", "--no-all-versions", name)
	if err != nil {
		return nil, err
	}
	s := bufio.NewScanner(bytes.NewReader(out))
	for s.Scan() {
		list, ok := strings.CutPrefix(s.Text(), "Depends: ")
		if !ok {
			continue
		}
		for _, d := range strings.Split(list, ", ") {
			d, _, _ = strings.Cut(d, " ")
			if !isKernel(d) {
				continue
			}
			more, err := a.follow(ctx, d)
			if err != nil {
				return nil, err
			}
			found = append(append(found, d), more...)
		}
	}
	return found, s.Err()
}

func isKernel(name string) bool {
	for _, p := range []string{"linux-image-", "linux-binary-", "linux-modules-"} {
		if rest, ok := strings.CutPrefix(name, p); ok && rest != "" && rest[0] >= '0' && rest[0] <= '9' {
			return true
		}
	}
	return false
}

// unpack puts the packages' files where fetch finds them, replacing others.
func (a apt) unpack(ctx context.Context, packages []string) (tree, error) {
	if len(packages) == 0 {
		return tree{}, errors.New("find packages: the meta-package depends on no kernel")
	}
	if err := a.run(ctx, "apt-get", append([]string{"download", "-qq"}, packages...)...); err != nil {
		return tree{}, err
	}
	fresh, root := filepath.Join(a.dir, "fresh"), filepath.Join(a.dir, "root")
	if err := os.RemoveAll(fresh); err != nil {
		return tree{}, fmt.Errorf("remove old files: %w", err)
	}
	debs, err := filepath.Glob(filepath.Join(a.dir, "archives", "*.deb"))
	if err != nil {
		return tree{}, fmt.Errorf("list packages: %w", err)
	}
	for _, deb := range debs {
		if out, err := exec.CommandContext(ctx, "dpkg-deb", "-x", deb, fresh).CombinedOutput(); err != nil {
			return tree{}, fmt.Errorf("unpack %s: %w: %s", filepath.Base(deb), err, out)
		}
		if err := os.Remove(deb); err != nil {
			return tree{}, fmt.Errorf("remove package: %w", err)
		}
	}
	if _, err := findTree(fresh); err != nil {
		return tree{}, err
	}
	if err := errors.Join(os.RemoveAll(root), os.Rename(fresh, root)); err != nil {
		return tree{}, fmt.Errorf("replace old kernel: %w", err)
	}
	return findTree(root)
}

// tree is the files of one kernel.
type tree struct {
	image   string // the bootable file
	mods    string // the folder of its modules
	version string
}

func findTree(root string) (tree, error) {
	images, err := filepath.Glob(filepath.Join(root, "boot", "vmlinuz-*"))
	if err != nil {
		return tree{}, fmt.Errorf("find kernel: %w", err)
	}
	if len(images) == 0 { // the newest packages have it beside the modules
		images, _ = filepath.Glob(filepath.Join(root, "usr", "lib", "modules", "*", "vmlinuz"))
	}
	if len(images) != 1 {
		return tree{}, fmt.Errorf("find kernel below %s: %d images, want 1: %w", root, len(images), fs.ErrNotExist)
	}
	for _, lib := range []string{"lib", "usr/lib"} {
		if dirs, _ := filepath.Glob(filepath.Join(root, lib, "modules", "*")); len(dirs) == 1 {
			return tree{images[0], dirs[0], filepath.Base(dirs[0])}, nil
		}
	}
	return tree{}, fmt.Errorf("find modules below %s: %w", root, fs.ErrNotExist)
}
