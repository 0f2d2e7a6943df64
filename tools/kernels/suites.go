package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// suite is a package whose tests depend on what the kernel does.
type suite struct {
	pkg  string
	cut  string // of the tests, by -test.run; empty means all
	skip string // by -test.skip, of the cut
	real bool   // needs the four programs
	// limit bounds one kernel's run. In emulation a test takes some ten times as long.
	limit time.Duration
}

// suites are in the order in which a failure of one explains those of the next.
var suites = []suite{
	{pkg: "test/lab", limit: 5 * time.Minute},
	{pkg: "test/leak", limit: 5 * time.Minute},
	{pkg: "pkg/px", limit: 5 * time.Minute},
	// Left out: what holds a thousand connections to a second, and what packets are generated for by the
	// hundred thousand, which does not depend on the kernel.
	{pkg: "pkg/datapath", skip: "^(TestThousandIdleConnections|TestNothingPassesThatMustNot|TestTheProofFindsAHole|TestFilterDropsNothingFree)$", limit: 75 * time.Minute},
	{pkg: "test/hostile", limit: 20 * time.Minute},
	{pkg: "test/e2e", cut: "^(TestMatrix|TestReadiness|TestRestartAdopts|TestUninstall|TestPrivilegesSuffice|TestPrivilegesAreAskedFor)$", real: true, limit: 40 * time.Minute},
}

// Name is what the command line calls it.
func (s suite) Name() string { return s.pkg }

// args are the flags of the test program.
func (s suite) args(o options) []string {
	args := []string{"-test.v", "-test.timeout", s.limit.String()}
	switch {
	case o.run != "":
		return append(args, "-test.run", o.run)
	case o.long:
		return args
	}
	if s.cut != "" {
		args = append(args, "-test.run", s.cut)
	}
	if s.skip != "" {
		args = append(args, "-test.skip", s.skip)
	}
	return args
}

// build is what a suite needs in the guest, built once for all kernels.
type build struct {
	suite    suite
	work     string // scratch
	test     string // the test program
	programs string // the folder of the four programs, if it needs them
	self     string // this program, static, for the guest's process 1
	sources  []string
	root     string // of the module
}

// commands are those of this machine that tests run.
var commands = []string{"bpftool", "nft", "ip", "tc", "setpriv", "ss"}

// shell has cat, sh, sleep and their like, without libraries.
const shell = "/bin/busybox"

func buildAll(ctx context.Context, work string, which []suite) ([]build, error) {
	root, err := moduleRoot(ctx)
	if err != nil {
		return nil, err
	}
	list, err := output(ctx, root, "git", "ls-files")
	if err != nil {
		return nil, err
	}
	self, programs := filepath.Join(work, "init"), filepath.Join(work, "programs")
	if err := static(ctx, root, "build", "-o", self, "./tools/kernels"); err != nil {
		return nil, err
	}
	var all []build
	for _, s := range which {
		b := build{suite: s, work: work, self: self, sources: strings.Fields(list), root: root}
		b.test = filepath.Join(work, strings.ReplaceAll(s.pkg, "/", "-"))
		if err := static(ctx, root, "test", "-c", "-o", b.test, "./"+s.pkg); err != nil {
			return nil, err
		}
		if s.real && b.programs == "" {
			b.programs = programs
			if err := static(ctx, root, "build", "-o", programs+"/", "./cmd/..."); err != nil {
				return nil, err
			}
		}
		all = append(all, b)
	}
	return all, nil
}

func moduleRoot(ctx context.Context) (string, error) {
	file, err := output(ctx, "", "go", "env", "GOMOD")
	return filepath.Dir(strings.TrimSpace(file)), err
}

// static runs the go command so that what it builds needs no library.
func static(ctx context.Context, dir, verb string, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", append([]string{verb, "-ldflags", "-s -w"}, args...)...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, out)
	}
	return nil
}

func output(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w", strings.Join(cmd.Args, " "), err)
	}
	return string(out), nil
}

// writeInitrd makes the guest's root file system.
func (b build) writeInitrd(path string, p plan, mods []module) error {
	f, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("create initrd: %w", err)
	}
	defer f.Close()
	a := newArchive(f)
	text, err := p.encode(mods)
	if err != nil {
		return err
	}
	err = errors.Join(a.add("/init", b.self), a.file(planFile, 0o644, text), a.add(testProgram, b.test), b.addCommands(a), b.addSources(a))
	for _, m := range mods {
		err = errors.Join(err, a.file(moduleFile(m.name), 0o644, m.code))
	}
	for _, d := range []string{"/proc", "/sys", "/dev", "/tmp", "/run", "/var/tmp", "/root"} {
		err = errors.Join(err, a.dir(d))
	}
	err = errors.Join(err, a.file("/etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\n")),
		a.file("/etc/group", 0o644, []byte("root:x:0:\n")), a.file("/etc/hosts", 0o644, []byte("127.0.0.1 localhost\n::1 localhost\n")))
	return errors.Join(err, a.close(), f.Close())
}

// addSources copies the module's files: tests read their data, and each other's sources.
func (b build) addSources(a *archive) error {
	for _, s := range b.sources {
		if err := a.add(filepath.Join(sourceRoot, s), filepath.Join(b.root, s)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

func (b build) addCommands(a *archive) error {
	if err := a.add(shell, shell); err != nil {
		return err
	}
	done := map[string]bool{}
	for _, name := range commands {
		path, err := exec.LookPath(name)
		if err != nil {
			path = filepath.Join("/usr/sbin", name)
		}
		if err := a.command(path, done); err != nil {
			return err
		}
	}
	if b.programs == "" {
		return nil
	}
	list, err := os.ReadDir(b.programs)
	if err != nil {
		return fmt.Errorf("list programs: %w", err)
	}
	for _, e := range list {
		err = errors.Join(err, a.add(filepath.Join(programFolder, e.Name()), filepath.Join(b.programs, e.Name())))
	}
	return err
}
