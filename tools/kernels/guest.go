package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Where things are in the guest.
const (
	planFile      = "/plan.json"
	testProgram   = "/test"
	programFolder = "/programs"
	sourceRoot    = "/src"
	applets       = "/applets" // of the shell, where nothing better is
	reportPort    = "/dev/ttyS1"
	suiteCommand  = "suite"
	slowness      = "SALLYPORT_SLOWNESS=8" // how many times: tests wait longer (test/e2e)
)

func moduleFile(name string) string { return "/modules/" + name + ".ko" }

// plan is what the guest shall do.
type plan struct {
	Dir     string   // of the package, below the sources
	Args    []string // of the test program
	Modules []string // in order
}

func (p plan) encode(mods []module) ([]byte, error) {
	for _, m := range mods {
		p.Modules = append(p.Modules, m.name)
	}
	return json.Marshal(p)
}

func readPlan() (p plan, err error) {
	text, err := os.ReadFile(planFile)
	if err != nil {
		return p, fmt.Errorf("read plan: %w", err)
	}
	return p, json.Unmarshal(text, &p)
}

// boot is process 1: it prepares the machine, has the suite run by a child, reaps whatever tests
// leave to it, and switches off. An error of its own is on the console.
func boot() {
	if err := prepare(); err != nil {
		fmt.Println("kernels: prepare guest:", err)
	} else if err := child(); err != nil {
		fmt.Println("kernels: run suite:", err)
	}
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {} // process 1 must not end
}

// child waits for every process that ends, until the one that runs the suite does.
func child() error {
	p, err := os.StartProcess("/init", []string{"/init", suiteCommand}, &os.ProcAttr{
		Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin:" + applets, "HOME=/root", "TMPDIR=/tmp", "SALLYPORT_PROGRAMS=" + programFolder,
			slowness},
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
	})
	if err != nil {
		return err
	}
	for {
		pid, err := unix.Wait4(-1, nil, 0, nil)
		if pid == p.Pid || err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// mounts are in order.
var mounts = []struct{ kind, at string }{
	{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"devpts", "/dev/pts"}, {"tmpfs", "/dev/shm"},
	{"tmpfs", "/tmp"}, {"tmpfs", "/run"}, {"bpf", "/sys/fs/bpf"}, {"cgroup2", "/sys/fs/cgroup"},
}

func prepare() error {
	for _, m := range mounts {
		_ = os.MkdirAll(m.at, 0o755) // what cannot be made is not mounted either
		if err := unix.Mount(m.kind, m.at, m.kind, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	p, err := readPlan()
	if err != nil {
		return err
	}
	for _, name := range p.Modules {
		if err := load(name); err != nil {
			fmt.Printf("kernels: module %s: %v\n", name, err) // the tests will say what they miss
		}
	}
	return errors.Join(unix.Chmod("/tmp", 0o1777), up("lo"), unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1 << 20, Max: 1 << 20}),
		os.Mkdir(applets, 0o755), exec.Command(shell, "--install", "-s", applets).Run())
}

func load(name string) error {
	f, err := os.Open(moduleFile(name))
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

// up is `ip link set up`.
func up(device string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open socket: %w", err)
	}
	defer unix.Close(fd)
	r, err := unix.NewIfreq(device)
	if err != nil {
		return fmt.Errorf("name %s: %w", device, err)
	}
	r.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, r); err != nil {
		return fmt.Errorf("set %s up: %w", device, err)
	}
	return nil
}

// runSuite runs the test program, shows what it writes on the console, and reports.
func runSuite() (code int) {
	p, err := readPlan()
	if err != nil {
		fmt.Println("kernels:", err)
		return 1
	}
	var text bytes.Buffer
	cmd := exec.Command(testProgram, p.Args...)
	cmd.Dir = filepath.Join(sourceRoot, p.Dir)
	cmd.Stdout = io.MultiWriter(os.Stdout, &text)
	cmd.Stderr = cmd.Stdout
	began := time.Now()
	err = cmd.Run()
	r := parse(text.String())
	r.Took = time.Since(began)
	if err != nil {
		r.Error = err.Error()
	}
	if err := send(r); err != nil {
		fmt.Println("kernels: report:", err)
		return 1
	}
	return 0
}

// send writes the report and waits until it is out.
func send(r report) error {
	f, err := os.OpenFile(reportPort, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := json.NewEncoder(f).Encode(r); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	return unix.IoctlSetInt(int(f.Fd()), unix.TCSBRK, 1)
}
