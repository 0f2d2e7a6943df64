package e2e_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// builds are the programs under test, each kind built at most once per test process. Where there is no
// compiler, as in the guests of test-kernels, a variable of the environment names the folder of both.
type builds struct {
	dir         string
	race, plain func() (string, error)
}

var built builds

func TestMain(m *testing.M) {
	if len(os.Args) > 4 && os.Args[1] == traceCommand {
		os.Exit(runTracer(os.Args[2:]))
	}
	if len(os.Args) == 5 && os.Args[1] == crowdCommand {
		os.Exit(runCrowd(os.Args[2:]))
	}
	if len(os.Args) == 3 && os.Args[1] == benchProxyCommand {
		os.Exit(runBenchProxy(os.Args[2]))
	}
	if len(os.Args) == 3 && os.Args[1] == loadCommand {
		os.Exit(runLoad(os.Args[2]))
	}
	if len(os.Args) == 3 && os.Args[1] == fleetCommand {
		os.Exit(runFleet(os.Args[2]))
	}
	if len(os.Args) == 3 && os.Args[1] == paceCommand {
		os.Exit(runPace(os.Args[2]))
	}
	os.Exit(runTests(m))
}

func runTests(m *testing.M) int {
	sweep(os.TempDir())
	dir, err := os.MkdirTemp("", fmt.Sprintf("%s%d-", dirName, os.Getpid()))
	if err != nil {
		fmt.Fprintln(os.Stderr, "make directory of the programs:", err)
		return 1
	}
	defer os.RemoveAll(dir)
	if err := os.Setenv("GORACE", "halt_on_error=1 atexit_sleep_ms=0"); err != nil { // of the programs: a second for each command adds up
		fmt.Fprintln(os.Stderr, "set GORACE:", err)
		return 1
	}
	built = builds{
		dir:   dir,
		race:  sync.OnceValues(func() (string, error) { return build(filepath.Join(dir, "race"), raced...) }),
		plain: sync.OnceValues(func() (string, error) { return build(filepath.Join(dir, "plain"), "-trimpath") }),
	}
	if given := os.Getenv("SALLYPORT_PROGRAMS"); given != "" {
		built.race = func() (string, error) { return given, nil }
		built.plain = built.race
	}
	return m.Run()
}

const dirName = "sallyport-e2e-"

// sweep removes the programs of test processes that were killed.
func sweep(tmp string) {
	dirs, err := filepath.Glob(filepath.Join(tmp, dirName+"*"))
	if err != nil {
		return
	}
	for _, d := range dirs {
		pid, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(d), dirName), "-")
		if n, err := strconv.Atoi(pid); err == nil && syscall.Kill(n, 0) == syscall.ESRCH {
			os.RemoveAll(d)
		}
	}
}

// raced are the flags of the race detector; what they leave out, and why, is in the Makefile.
var raced = []string{"-race", "-gcflags=modernc.org/sqlite/lib=-race=false", "-gcflags=modernc.org/libc=-race=false", "-gcflags=modernc.org/memory=-race=false"}

// build puts the four programs into dir.
func build(dir string, flags ...string) (string, error) {
	cmd := exec.Command("go", slices.Concat([]string{"build"}, flags, []string{"-o", dir + "/",
		"./cmd/sallyport", "./cmd/sallyport-agent", "./cmd/sallyport-proxy", "./cmd/sallyport-collector"})...)
	cmd.Dir = "../.."
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build programs: %w\n%s", err, out)
	}
	return dir, nil
}

// programs gives the folder of the programs: with the race detector, or as they are shipped.
func programs(t *testing.T, plain bool) string {
	t.Helper()
	kind := built.race
	if plain {
		kind = built.plain
	}
	dir, err := kind()
	must(t, err)
	return dir
}
