package docs

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestInstallOnlyCopies: `sudo make install` needs no Go, which is often not in root's path, and says what to do first.
func TestInstallOnlyCopies(t *testing.T) {
	dir, to := t.TempDir(), filepath.Join(t.TempDir(), "root")
	if err := os.CopyFS(filepath.Join(dir, "deploy"), os.DirFS(filepath.Join(root, "deploy"))); err != nil {
		t.Fatal(err)
	}
	place(t, filepath.Join(dir, "Makefile"), read(t, "Makefile"))
	place(t, filepath.Join(dir, "path", "go"), "#!/bin/sh\necho go was run >&2\nexit 1\n")
	if err := os.Chmod(filepath.Join(dir, "path", "go"), 0o755); err != nil {
		t.Fatal(err)
	}
	install := func() (string, error) {
		cmd := exec.Command("make", "install", "DESTDIR="+to)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "PATH="+filepath.Join(dir, "path")+":"+os.Getenv("PATH"), "MAKEFLAGS=")
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	binaries := []string{"sallyport", "sallyport-agent", "sallyport-proxy", "sallyport-collector"}
	for _, b := range binaries[:3] {
		place(t, filepath.Join(dir, "bin", b), "")
	}
	if out, err := install(); err == nil || !strings.Contains(out, "bin/sallyport-collector is not built: run `make build` first, as yourself") {
		t.Errorf("with a binary missing: %v: %s", err, out)
	}
	if left, err := os.ReadDir(to); err == nil {
		t.Errorf("installed %v without all binaries", left)
	}
	place(t, filepath.Join(dir, "bin", binaries[3]), "")
	if out, err := install(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, b := range binaries {
		if _, err := os.Stat(filepath.Join(to, "usr/local/bin", b)); err != nil {
			t.Error(err)
		}
	}
}

// TestPathsAreThoseOfThePackage: what is copied from examples and documents names programs where they are.
func TestPathsAreThoseOfThePackage(t *testing.T) {
	texts := documents(t)
	for _, pattern := range []string{"deploy/*/*", "deploy/*/*/*"} {
		for _, f := range glob(t, pattern) {
			if info, err := os.Stat(f); err == nil && info.Mode().IsRegular() {
				name := strings.TrimPrefix(f, root+"/")
				texts[name] = read(t, name)
			}
		}
	}
	for name, text := range texts {
		if strings.Contains(text, "/usr/local/bin/sallyport") {
			t.Errorf("%s names a program in /usr/local/bin", name)
		}
	}
}

// machine is a place with directories of its own in the place of the machine's, for scripts that name them from the root.
type machine struct{ dir string }

func newMachine(t *testing.T) machine {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts (CAP_SYS_ADMIN)")
	}
	m := machine{t.TempDir()}
	for _, d := range []string{"etc", "run", "bpf"} {
		if err := os.Mkdir(filepath.Join(m.dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

// run gives what a script says there.
func (m machine) run(script string, args ...string) (string, error) {
	const within = `mount --bind "$0/run" /run && mount --bind "$0/bpf" /sys/fs/bpf && mount --bind "$0/etc" /etc && exec sh "$@"`
	cmd := exec.Command("unshare", append([]string{"--mount", "--propagation", "private", "sh", "-c", within, m.dir, filepath.Join(root, script)}, args...)...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// TestUninstallKeepsWhatEnforces: as long as something enforces, the programs that can end it stay.
func TestUninstallKeepsWhatEnforces(t *testing.T) {
	m, prefix := newMachine(t), t.TempDir()
	agent := filepath.Join(prefix, "bin/sallyport-agent")
	place(t, agent, "#!/bin/sh\necho could not read it >&2\nexit 1\n")
	if err := os.Chmod(agent, 0o755); err != nil {
		t.Fatal(err)
	}
	kept := func(why, says string) {
		t.Helper()
		out, err := m.run("deploy/systemd/uninstall", "", prefix)
		if err == nil || !strings.Contains(out, says) {
			t.Errorf("%s: %v: %s", why, err, out)
		}
		if _, err := os.Stat(agent); err != nil {
			t.Fatalf("%s: %v", why, err)
		}
	}
	place(t, filepath.Join(m.dir, "bpf/sallyport/v4/links/one"), "")
	kept("pins and no configuration", "agent.yaml is gone: nothing is removed")
	place(t, filepath.Join(m.dir, "etc/sallyport/agent.yaml"), "")
	kept("an uninstall that fails", "so nothing is removed")
	place(t, agent, "#!/bin/sh\n")
	if out, err := m.run("deploy/systemd/uninstall", "", prefix); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	if _, err := os.Stat(agent); err == nil {
		t.Error("an uninstall that went well left the agent")
	}
}

// TestRemovalNamesWhatWaits: a unit that requires ours would not start any more, and be it the network.
func TestRemovalNamesWhatWaits(t *testing.T) {
	m := newMachine(t)
	place(t, filepath.Join(m.dir, "etc/systemd/system/other.service.d/limits.conf"), "[Service]\nLimitNOFILE=4096\n")
	place(t, filepath.Join(m.dir, "etc/systemd/system/net.service.d/enforced.conf"), read(t, units+"sallyport-enforced.conf"))
	for _, script := range [][]string{{"deploy/package/prerm", "remove"}, {"deploy/systemd/uninstall", "", t.TempDir()}} {
		out, _ := m.run(script[0], script[1:]...) // there is nothing to remove
		if strings.Count(out, "keeps a unit from starting") != 1 || !strings.Contains(out, "/etc/systemd/system/net.service.d/enforced.conf keeps") {
			t.Errorf("%s: %s", script[0], out)
		}
	}
}

// TestPackageNamesWhatStandsInFront: after `make install`, the package's own units are not those that systemd takes.
func TestPackageNamesWhatStandsInFront(t *testing.T) {
	m := newMachine(t)
	out, err := m.run("deploy/package/postinst", "configure", "")
	if err != nil || strings.Contains(out, "in front") || !strings.Contains(out, "nothing is started: write /etc/sallyport/agent.yaml") {
		t.Errorf("on a bare machine: %v: %s", err, out)
	}
	place(t, filepath.Join(m.dir, "etc/systemd/system/sallyport-agent.service"), "[Service]\nExecStartPre=/bin/true\nExecStart=/opt/bin/sallyport-agent run\n")
	if out, err := m.run("deploy/package/postinst", "configure", ""); err != nil || !strings.Contains(out, "stands in front of the package's unit, with /opt/bin/sallyport-agent\nhint: ") {
		t.Errorf("after make install: %v: %s", err, out)
	}
}
