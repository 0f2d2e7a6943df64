// Command needs installs what a make target needs from Debian's packages, and from npm's into .tools,
// and says so. What is already there is left alone.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// need is one thing that has to be on the machine: a command or a file (a pattern with a slash), and
// the Debian packages that bring it.
type need struct {
	what, why string
	packages  []string
}

var needs = map[string][]need{
	"test": {
		{"gcc", "the race detector links with it", []string{"gcc", "libc6-dev"}},
		{"bpftool", "tests read the maps as an operator does", []string{"bpftool"}},
		{"nft", "tests put a firewall into the node", []string{"nftables"}},
		{"setpriv", "tests start programs with fewer capabilities", []string{"util-linux"}},
		{"ssh-keygen", "tests sign with keys of OpenSSH", []string{"openssh-client"}},
		{"ssh", "the client of a protected service of the end-to-end test", []string{"openssh-client"}},
		{"sshd", "that service", []string{"openssh-server"}},
		{"psql", "the client of another one", []string{"postgresql-client"}},
		{"systemd-analyze", "a test has systemd read the units", []string{"systemd"}},
		{"/usr/lib/postgresql/*/bin/postgres", "the protected service of the end-to-end test, and the collector's database in its own", []string{"postgresql"}},
		{"redis-server", "one of the services that the inventory's test has it find", []string{"redis-server"}},
		{"promtool", "it tests the alert rules", []string{"prometheus"}},
		{"strace", "it has reads of the disk fail", []string{"strace"}},
		{"haproxy", "a proxy in the place of ours, and one that ours is measured beside", []string{"haproxy"}},
		{"/usr/lib/nginx/modules/ngx_stream_module.so", "another one", []string{"nginx-light", "libnginx-mod-stream"}},
		{"curl", "an unchanged client of a protected service", []string{"curl"}},
		{"chromium", "the browser that looks at the console", []string{"chromium"}},
		{"node", "it runs the OpenID provider of tests", []string{"nodejs"}},
		{"npm", "it installs the OpenID provider of tests", []string{"npm"}},
	},
	"test-package": {
		{"dpkg-deb", "it opens the package that a test made", []string{"dpkg"}},
		{"lintian", "it judges that package", []string{"lintian"}},
		{"shellcheck", "it reads the package's scripts", []string{"shellcheck"}},
		{"debootstrap", "it makes the Debian that the package is installed in", []string{"debootstrap"}},
		{"systemd-nspawn", "it boots that Debian", []string{"systemd-container"}},
	},
	"test-alerts": {
		{"prometheus", "it scrapes and evaluates the alert rules", []string{"prometheus"}},
		{"prometheus-alertmanager", "it is told of alerts", []string{"prometheus-alertmanager"}},
	},
	"test-k8s": {
		{"etcd", "it keeps what the API server has", []string{"etcd-server"}},
		{"containerd", "it runs the pods", []string{"containerd"}},
		{"runc", "so does it", []string{"runc"}},
		{"/usr/lib/cni/bridge", "it gives pods their devices", []string{"containernetworking-plugins"}},
		{"iptables", "portmap and kube-proxy write rules with it", []string{"iptables"}},
		{"nft", "so does kube-proxy in its other mode", []string{"nftables"}},
	},
	"bench-scale": {
		{"etcd", "it keeps what the API server has", []string{"etcd-server"}},
	},
	"test-kernels": {
		{"qemu-system-x86_64", "it boots the kernels", []string{"qemu-system-x86"}},
		{"/bin/busybox", "the shell of the guests", []string{"busybox-static"}},
		{"/usr/share/keyrings/debian-archive-keyring.gpg", "the kernels' packages are signed with it", []string{"debian-archive-keyring"}},
		{"xz", "the kernels' modules are compressed with it", []string{"xz-utils"}},
		{"ip", "tests in the guests ask it", []string{"iproute2"}},
		{"bpftool", "tests in the guests read the maps as an operator does", []string{"bpftool"}},
		{"nft", "tests in the guests put a firewall into the node", []string{"nftables"}},
		{"setpriv", "tests in the guests start programs with fewer capabilities", []string{"util-linux"}},
	},
	"bench-datapath": {
		{"iptables-legacy-restore", "a peer that the datapath is measured beside", []string{"iptables"}},
		{"nft", "a peer that the datapath is measured beside", []string{"nftables"}},
	},
	"generate": {
		{"clang-16", "the one compiler of bpf/", []string{"clang-16", "llvm-16"}},
		{"/usr/include/bpf/bpf_helpers.h", "headers of bpf/", []string{"libbpf-dev"}},
		{"/usr/include/linux/bpf.h", "headers of bpf/", []string{"linux-libc-dev"}},
		{"protoc", "the compiler of pkg/api", []string{"protobuf-compiler"}},
		{"/usr/include/google/protobuf/timestamp.proto", "pkg/api imports it", []string{"libprotobuf-dev"}},
	},
}

// module is something from npm: the folder with its package-lock.json, which pins all of it, and the folder that it goes to.
type module struct{ lock, to, why string }

var modules = map[string][]module{
	"test": {{"test/oidc/npm", ".tools/oidc-provider", "the OpenID provider of tests"}},
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "needs:", err)
		os.Exit(1)
	}
}

func run(targets []string) error {
	var packages []string
	for _, t := range targets {
		list, ok := needs[t]
		if !ok {
			return fmt.Errorf("unknown target %q", t)
		}
		for _, n := range list {
			if there(n.what) {
				continue
			}
			fmt.Printf("needs: %s is not here (%s); installing %s\n", n.what, n.why, strings.Join(n.packages, ", "))
			packages = append(packages, n.packages...)
		}
	}
	if len(packages) > 0 {
		if err := install(slices.Compact(slices.Sorted(slices.Values(packages)))); err != nil {
			return err
		}
	}
	for _, t := range targets {
		for _, m := range modules[t] {
			if err := m.install(); err != nil {
				return err
			}
		}
	}
	return nil
}

// install has npm fetch what the lock file pins, unless that very file was installed from before. No script of a package runs.
func (m module) install() error {
	lock, err := os.ReadFile(filepath.Join(m.lock, "package-lock.json"))
	if err != nil {
		return err
	}
	done := filepath.Join(m.to, "installed")
	if before, err := os.ReadFile(done); err == nil && bytes.Equal(before, lock) {
		return nil
	}
	fmt.Printf("needs: %s is not here; npm installs it into %s\n", m.why, m.to)
	if err := os.CopyFS(m.to, os.DirFS(m.lock)); errors.Is(err, os.ErrExist) { // another version
		if err := os.RemoveAll(m.to); err != nil {
			return err
		}
		return m.install()
	} else if err != nil {
		return err
	}
	cmd := exec.Command("npm", "ci", "--prefix", m.to, "--ignore-scripts", "--no-audit", "--no-fund", "--silent")
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("run npm ci in %s: %w", m.to, err)
	}
	return os.WriteFile(done, lock, 0o644)
}

func there(what string) bool {
	if !strings.Contains(what, "/") {
		_, err := exec.LookPath(what)
		return err == nil || sbin(what)
	}
	found, err := filepath.Glob(what)
	return err == nil && len(found) > 0
}

// sbin looks where administrators' commands are, which may not be in PATH.
func sbin(command string) bool {
	_, err := os.Stat(filepath.Join("/usr/sbin", command))
	return err == nil
}

// install asks for fresh package lists only when the present ones do not do. Services that come with packages stay down: tests run their own.
func install(packages []string) (err error) {
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fmt.Errorf("no apt-get on this machine: install %s by hand", strings.Join(packages, ", "))
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("not root: run apt-get install %s", strings.Join(packages, " "))
	}
	allow, err := forbidServices()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, allow()) }()
	args := append([]string{"install", "-y", "--no-install-recommends"}, packages...)
	first := apt(args...)
	if first == nil {
		return nil
	}
	if err := apt("update"); err != nil {
		return errors.Join(first, err)
	}
	return apt(args...)
}

// policyFile is what Debian's maintainer scripts ask before they start a service.
const policyFile = "/usr/sbin/policy-rc.d"

// forbidServices has no service started until allow. A policy that is there is somebody else's, and stays.
func forbidServices() (allow func() error, err error) {
	f, err := os.OpenFile(policyFile, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if errors.Is(err, os.ErrExist) {
		return func() error { return nil }, nil
	}
	if err != nil {
		return nil, err
	}
	_, err = f.WriteString("#!/bin/sh\nexit 101\n")
	return func() error { return os.Remove(policyFile) }, errors.Join(err, f.Close())
}

func apt(args ...string) error {
	cmd := exec.Command("apt-get", args...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("run apt-get %s: %w", args[0], err)
	}
	return nil
}
