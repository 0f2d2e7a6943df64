package px

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const roleEnv = "SALLYPORT_PX_TEST_ROLE"

// TestMain is also the program that Exec starts.
func TestMain(m *testing.M) {
	switch os.Getenv(roleEnv) {
	case "launch":
		err := Exec(Command{
			Path: os.Getenv("PX_PATH"), UID: 65532, GID: 65532,
			Args: []string{"inside", "argument"}, Env: []string{
				roleEnv + "=inside", "PX_PATH=" + os.Getenv("PX_PATH"), "HOME_NETNS=" + os.Getenv("HOME_NETNS"),
			},
		})
		fmt.Println("launch:", err)
		os.Exit(1)
	case "launch another":
		err := Exec(Command{
			Path: os.Getenv("PX_PATH"), UID: 65532, GID: 65532, Program: "/bin/sh",
			Args: []string{"sh", "-c", `echo "$0 $GIVEN $MADE"; cat /proc/self/status`, "another"},
			Env:  []string{"GIVEN=given"}, Inside: func() ([]string, error) {
				return []string{"MADE=" + fmt.Sprint(CheckInside(os.Getenv("PX_PATH")))}, nil
			},
		})
		fmt.Println("launch:", err)
		os.Exit(1)
	case "inside":
		for _, line := range lookAround() {
			fmt.Println(line)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// lookAround tries from inside what a proxy that was taken over would try.
func lookAround() []string {
	say := func(what string, err error) string { return fmt.Sprintf("%s: %v", what, err) }
	lines := []string{
		say("args", fmt.Errorf("%q", os.Args)),
		say("confined", CheckConfined()),
		say("inside", CheckInside(os.Getenv("PX_PATH"))),
		say("all threads", allThreadsConfined()),
	}
	if home, err := os.Open(os.Getenv("HOME_NETNS")); err != nil {
		lines = append(lines, say("setns back", err))
	} else {
		lines = append(lines, say("setns back", unix.Setns(int(home.Fd()), unix.CLONE_NEWNET)))
	}
	init, err := os.Open("/proc/1/ns/net")
	if err == nil {
		err = unix.Setns(int(init.Fd()), unix.CLONE_NEWNET)
	}
	lines = append(lines,
		say("setns init", err),
		say("unshare net", unix.Unshare(unix.CLONE_NEWNET)),
		say("setuid 0", raw(unix.SYS_SETRESUID, 0, 0, 0)),
		say("write sysctl", os.WriteFile("/proc/sys/net/ipv4/conf/px1/rp_filter", []byte("1"), 0)),
	)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1)
	}
	return append(lines, say("transparent", err))
}

func allThreadsConfined() error {
	threads, err := filepath.Glob("/proc/self/task/*/status")
	for _, t := range threads {
		data, readErr := os.ReadFile(t)
		err = errors.Join(err, readErr, confined(string(data)))
	}
	return err
}

func TestExecConfines(t *testing.T) {
	n := newNode(t)
	n.create()
	home := filepath.Join(t.TempDir(), "home")
	if err := pin(n.ns, home); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unpin(home) })
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleEnv+"=launch", "PX_PATH="+n.path, "HOME_NETNS="+home)
	// the temporary folders of the test are closed to other users; the paths below are not
	for _, dir := range []string{filepath.Dir(home), filepath.Dir(filepath.Dir(n.path))} {
		for ; dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
			if err := os.Chmod(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	n.in(func() error {
		if err := cmd.Run(); err != nil {
			t.Errorf("run: %v", err)
		}
		return nil
	})
	want := []string{
		`args: ["inside" "argument"]`,
		"confined: <nil>",
		"inside: <nil>",
		"all threads: <nil>",
		"setns back: operation not permitted",
		"unshare net: operation not permitted",
		"setuid 0: operation not permitted",
		"transparent: <nil>",
	}
	for _, line := range want {
		if !strings.Contains(out.String(), line+"\n") {
			t.Errorf("missing %q", line)
		}
	}
	for _, bad := range []string{"setns init: <nil>", "write sysctl: <nil>"} {
		if strings.Contains(out.String(), bad) {
			t.Errorf("possible inside: %s", bad)
		}
	}
	if t.Failed() {
		t.Logf("output:\n%s", out.String())
	}
}

// TestExecOfAnother: another program is confined in the same way, and finds what was made for it inside px.
func TestExecOfAnother(t *testing.T) {
	n := newNode(t)
	n.create()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleEnv+"=launch another", "PX_PATH="+n.path)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	n.in(func() error {
		if err := cmd.Run(); err != nil {
			t.Errorf("run: %v", err)
		}
		return nil
	})
	said, status, _ := strings.Cut(out.String(), "\n")
	if want := "another given <nil>"; said != want {
		t.Errorf("program says %q, want %q", said, want)
	}
	if err := confined(status); err != nil {
		t.Error(err)
	}
}

// TestExecWithoutInside: what could not be made inside px is an error, and nothing is executed.
func TestExecWithoutInside(t *testing.T) {
	n := newNode(t)
	n.create()
	n.in(func() error {
		broken := errors.New("broken")
		err := Exec(Command{Path: n.path, UID: 1, GID: 1, Program: "/bin/true", Args: []string{"true"}, Inside: func() ([]string, error) { return nil, broken }})
		if !errors.Is(err, broken) {
			t.Errorf("exec: %v, want %v", err, broken)
		}
		return nil
	})
}

func TestExecRefuses(t *testing.T) {
	if err := Exec(Command{Path: "/nonexistent", UID: 0, GID: 1}); err == nil || !strings.Contains(err.Error(), "uid 0") {
		t.Errorf("root: %v", err)
	}
	if err := Exec(Command{Path: "/nonexistent", UID: 1, GID: 1}); !errors.Is(err, ErrNotThere) {
		t.Errorf("no px: %v", err)
	}
}

func TestConfined(t *testing.T) {
	good := "Name:\tx\nUid:\t65532\t65532\t65532\t65532\nGid:\t65532\t65532\t65532\t65532\nGroups:\t \n" +
		"CapInh:\t0000000000002000\nCapPrm:\t0000000000002000\nCapEff:\t0000000000002000\n" +
		"CapBnd:\t0000000000002000\nCapAmb:\t0000000000002000\nNoNewPrivs:\t1\n"
	if err := confined(good); err != nil {
		t.Errorf("good: %v", err)
	}
	bad := [][2]string{
		{"CapEff:\t0000000000002000", "CapEff:\t0000000000003000"},
		{"CapBnd:\t0000000000002000", "CapBnd:\t000001ffffffffff"},
		{"CapAmb:\t0000000000002000", "CapAmb:\t0000000000000000"},
		{"CapInh:\t0000000000002000\n", ""},
		{"NoNewPrivs:\t1", "NoNewPrivs:\t0"},
		{"Groups:\t ", "Groups:\t0 "},
		{"Uid:\t65532\t65532\t65532", "Uid:\t65532\t65532\t0"},
	}
	for _, c := range bad {
		if err := confined(strings.Replace(good, c[0], c[1], 1)); !errors.Is(err, ErrConfinement) {
			t.Errorf("%q: %v", c[1], err)
		}
	}
}
