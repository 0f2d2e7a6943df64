package leak

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/test/lab"
)

const token = "test-of-the-leak-check"

// take looks at what can be of the test.
func take(token string) (snapshot, error) {
	all, others, err := look(token)
	maps.DeleteFunc(all, func(o object, _ string) bool { return others[o] })
	return all, err
}

// begin takes the machine and looks at it.
func begin(t *testing.T) snapshot {
	t.Helper()
	Check(t)
	t.Setenv(marker, token)
	before, err := take(token)
	if err != nil {
		t.Fatal(err)
	}
	return before
}

// sees fails the test unless the new things come to match the patterns, one to one, in order. The
// kernel takes its time to free, and what others do on the machine comes and goes.
func sees(t *testing.T, before snapshot, patterns ...string) {
	t.Helper()
	var left []string
	for deadline := time.Now().Add(grace); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		now, err := take(token)
		if err != nil {
			t.Fatal(err)
		}
		left = now.since(before).lines()
		if slices.EqualFunc(left, patterns, func(line, pattern string) bool {
			return regexp.MustCompile("^" + pattern).MatchString(line)
		}) {
			return
		}
	}
	t.Errorf("new things:\n%s\nwant:\n%s", strings.Join(left, "\n"), strings.Join(patterns, "\n"))
}

func program(t *testing.T, name string) *ebpf.Program {
	t.Helper()
	return load(t, &ebpf.ProgramSpec{Name: name, Type: ebpf.SchedCLS}, -1)
}

// programOf lets everything pass.
func programOf(t *testing.T, typ ebpf.ProgramType, attach ebpf.AttachType) *ebpf.Program {
	t.Helper()
	return load(t, &ebpf.ProgramSpec{Name: "sp_leak", Type: typ, AttachType: attach}, 1)
}

// load makes a program that returns one number.
func load(t *testing.T, spec *ebpf.ProgramSpec, returns int64) *ebpf.Program {
	t.Helper()
	spec.License = "GPL"
	spec.Instructions = asm.Instructions{asm.LoadImm(asm.R0, returns, asm.DWord), asm.Return()}
	p, err := ebpf.NewProgram(spec)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func needRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: BPF programs and namespaces (CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN)")
	}
}

func TestSeesProgramsMapsAndTCXLinks(t *testing.T) {
	needRoot(t)
	before := begin(t)
	l := lab.New(t, lab.Options{})
	inLab, err := take(token)
	if err != nil {
		t.Fatal(err)
	}
	p := program(t, "sp_leak")
	defer p.Close()
	sees(t, inLab, `program \d+: sp_leak`)

	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: "sp_leak_map", Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	sees(t, inLab, `map \d+: sp_leak_map`, `program \d+: sp_leak`)
	m.Close()
	up, err := l.Node.Ifindex(lab.Uplink)
	if err != nil {
		t.Fatal(err)
	}
	var k link.Link
	if err := l.Node.Do(func() (err error) {
		k, err = link.AttachTCX(link.TCXOptions{Interface: up, Program: p, Attach: ebpf.AttachTCXIngress})
		return err
	}); errors.Is(err, ebpf.ErrNotSupported) {
		t.Skip("needs tcx links (Linux 6.6): ", err)
	} else if err != nil {
		t.Fatal(err)
	}
	p.Close()
	dir, err := l.MountBPFFS()
	if err != nil {
		t.Fatal(err)
	}
	if err := k.Pin(filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	k.Close() // nothing but the pin holds it now
	sees(t, inLab, `link \d+: tcx on device \d+ of program sp_leak`, `mount .*/bpf: bpf`, `pin .*/bpf/link`, `program \d+: sp_leak`)

	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	left, err := wait(token, before, grace)
	if err != nil || len(left) > 0 {
		t.Errorf("after the lab is gone: %v (%v)", left, err)
	}
}

// TestSeesTheBackstopsLinks: those that hang on control groups and namespaces.
func TestSeesTheBackstopsLinks(t *testing.T) {
	needRoot(t)
	begin(t)
	l := lab.New(t, lab.Options{})
	inLab, err := take(token)
	if err != nil {
		t.Fatal(err)
	}
	onCgroup := programOf(t, ebpf.CGroupSKB, ebpf.AttachCGroupInetIngress)
	a, err := link.AttachCgroup(link.CgroupOptions{Path: l.Cgroup(), Attach: ebpf.AttachCGroupInetIngress, Program: onCgroup})
	if err != nil {
		t.Fatal(err)
	}
	onCgroup.Close()
	sees(t, inLab, `link \d+: on control group \d+ of program sp_leak`, `program \d+: sp_leak`)
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	onNetns := programOf(t, ebpf.SkLookup, ebpf.AttachSkLookup)
	var b link.Link
	if err := l.Node.Do(func() (err error) {
		f, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			return err
		}
		defer f.Close()
		b, err = link.AttachNetNs(int(f.Fd()), onNetns)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	onNetns.Close()
	sees(t, inLab, `link \d+: on namespace net:\[\d+\] of program sp_leak`, `program \d+: sp_leak`)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestIgnoresForeignNames(t *testing.T) {
	needRoot(t)
	before := begin(t)
	p := program(t, "other")
	defer p.Close()
	sees(t, before)
}

func TestIgnoresWhatAnotherProcessHolds(t *testing.T) {
	needRoot(t)
	before := begin(t)
	p := program(t, "sp_foreign")
	sees(t, before, `program \d+: sp_foreign`)

	pid := holder(t, p.FD())
	defer func() { _ = unix.Kill(pid, unix.SIGKILL) }()
	sees(t, before, `program \d+: sp_foreign`) // we hold it as well
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	sees(t, before)
}

// holder starts a process that does not know of the test and holds a descriptor.
func holder(t *testing.T, fd int) (pid int) {
	t.Helper()
	sh := exec.Command("sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $!") // the sleep is nobody's child soon
	sh.Env = []string{}
	sh.ExtraFiles = []*os.File{duplicate(t, fd)}
	out, err := sh.Output()
	if err != nil {
		t.Fatal(err)
	}
	if pid, err = strconv.Atoi(strings.TrimSpace(string(out))); err != nil {
		t.Fatal(err)
	}
	if err := sh.ExtraFiles[0].Close(); err != nil {
		t.Fatal(err)
	}
	return pid
}

// What is pinned in a lab of another process is that one's, as long as it lives.
func TestIgnoresWhatAnotherLabPinned(t *testing.T) {
	needRoot(t)
	before := begin(t)
	dir := filepath.Join(t.TempDir(), fmt.Sprintf("sallyport-lab-%d-1", os.Getppid()))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("bpf", dir, "bpf", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, 0)
	p := program(t, "sp_pinned")
	sees(t, before, `program \d+: sp_pinned`)
	if err := p.Pin(filepath.Join(dir, "p")); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	sees(t, before)
}

func duplicate(t *testing.T, fd int) *os.File {
	t.Helper()
	d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(d), "copy")
}

func TestSeesProcesses(t *testing.T) {
	needRoot(t)
	before := begin(t)
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	sees(t, before, `process \d+: sleep`)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	sees(t, before)
}

func TestSeesNamespaceFiles(t *testing.T) {
	needRoot(t)
	before := begin(t)
	l := lab.New(t, lab.Options{})
	inLab, err := take(token)
	if err != nil {
		t.Fatal(err)
	}
	sees(t, before, `control group .*/sallyport-lab-`, `namespace net:`, `namespace net:`, `namespace net:`)
	file := filepath.Join(l.Dir, "px")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(l.Pod.Path(), file, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	sees(t, inLab, `mount .*/px: nsfs`)
}

func TestForeignPlaces(t *testing.T) {
	needRoot(t)
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	v := &view{procs: []process{{pid: 1}, {pid: os.Getpid(), mine: true}}, instances: map[string]bool{}}
	for path, want := range map[string]bool{
		"/tmp/sallyport-lab-1-x/bpf":                                      true,
		"/tmp/sallyport-lab-" + strconv.Itoa(os.Getpid()) + "-x/bpf":      false,
		"/tmp/sallyport-lab-" + strconv.Itoa(gone.Process.Pid) + "-x/bpf": true,
		"/run/sallyport-demo-123/bpf":                                     false, // of nobody
		"/sys/fs/bpf":                                                     false,
	} {
		if got := v.isForeign(path); got != want {
			t.Errorf("isForeign(%s) = %v", path, got)
		}
	}
}

// TestIgnoresWhatAnotherDemoPinned: what only a pin holds belongs to whoever works in that directory.
func TestIgnoresWhatAnotherDemoPinned(t *testing.T) {
	needRoot(t)
	before := begin(t)
	dir := filepath.Join(t.TempDir(), "sallyport-demo-1")
	bpffs := filepath.Join(dir, "bpf")
	if err := os.MkdirAll(bpffs, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("bpffs", bpffs, "bpf", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(bpffs, unix.MNT_DETACH) }()
	inner := &ebpf.MapSpec{Name: "sp_inner", Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1}
	in, err := ebpf.NewMap(inner)
	if err != nil {
		t.Fatal(err)
	}
	out, err := ebpf.NewMap(&ebpf.MapSpec{Name: "sp_outer", Type: ebpf.ArrayOfMaps, KeySize: 4, ValueSize: 4, MaxEntries: 1,
		InnerMap: inner, Contents: []ebpf.MapKV{{Key: uint32(0), Value: in}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := out.Pin(filepath.Join(bpffs, "outer")); err != nil {
		t.Fatal(err)
	}
	out.Close()
	in.Close()
	sees(t, before, `map \d+: sp_`, `map \d+: sp_`, `mount .*/bpf: bpf`, `pin .*/outer`) // of a demo of nobody

	pid := orphan(t, "sh", "-c", "sleep 60; :", dir+"/agent.yaml")
	defer func() { _ = unix.Kill(-pid, unix.SIGKILL) }()
	sees(t, before)
}

// orphan starts a process that does not know of the test, as the leader of a process group.
func orphan(t *testing.T, args ...string) (pid int) {
	t.Helper()
	sh := exec.Command("sh", append([]string{"-c", `setsid "$@" >/dev/null 2>&1 & echo $!`, "sh"}, args...)...)
	sh.Env = []string{"PATH=" + os.Getenv("PATH")}
	out, err := sh.Output()
	if err != nil {
		t.Fatal(err)
	}
	if pid, err = strconv.Atoi(strings.TrimSpace(string(out))); err != nil {
		t.Fatal(err)
	}
	return pid
}
