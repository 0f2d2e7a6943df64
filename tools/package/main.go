// Command package makes what is installed on plain hosts: a Debian package, an archive of the same files, an SPDX SBOM of the
// modules in the programs, and the checksums of all three. The same commit and Go give the same bytes, wherever, whenever and
// as whomever it runs.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// nfpm writes the Debian package. It is the newest whose modules can all be had from the public proxy.
const nfpm = "github.com/goreleaser/nfpm/v2/cmd/nfpm@v2.44.2"

// programs are the binaries, each from the folder of its name below cmd/.
var programs = []string{"sallyport", "sallyport-agent", "sallyport-proxy", "sallyport-collector"}

// release is one run.
type release struct {
	out      string // folder of what is made
	binaries string // folder of programs that were built before; empty: they are built
	version  string
	commit   string
	at       time.Time // the commit's; the only time that stands in anything
}

func main() {
	var r release
	flag.StringVar(&r.out, "out", "dist", "`FOLDER` for what is made")
	flag.StringVar(&r.binaries, "bin", "", "`FOLDER` with programs that were built before, to be packed as they are")
	flag.StringVar(&r.version, "version", "", "`VERSION` (default: what git describe says, or dev)")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, r); err != nil {
		fmt.Fprintln(os.Stderr, "package:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, r release) error {
	if err := r.fromGit(ctx); err != nil {
		return err
	}
	files, err := r.make(ctx)
	if err != nil {
		return err
	}
	for _, f := range files {
		fmt.Println(filepath.Join(r.out, f))
	}
	return nil
}

// fromGit fills in what the repository says.
func (r *release) fromGit(ctx context.Context) (err error) {
	if r.commit, err = output(ctx, "git", "rev-parse", "HEAD"); err != nil {
		return err
	}
	seconds, err := output(ctx, "git", "log", "-1", "--format=%ct")
	if err != nil {
		return err
	}
	at, err := strconv.ParseInt(seconds, 10, 64)
	if err != nil {
		return fmt.Errorf("read time of commit %s: %w", r.commit, err)
	}
	r.at = time.Unix(at, 0).UTC()
	if r.version != "" {
		return nil
	}
	if r.version, err = output(ctx, "git", "describe", "--tags", "--dirty"); err != nil {
		r.version = "dev" // without any tag
	}
	return nil
}

// debian is the version as dpkg orders it: 1.2.3 for v1.2.3, and what is on its way to the next one comes after it. What has no
// version is before all that have one, by its time.
func (r release) debian() string {
	if r.version == "dev" {
		return fmt.Sprintf("0.0.0+dev%s.g%.12s", r.at.Format("20060102150405"), r.commit)
	}
	upstream, rest, _ := strings.Cut(strings.TrimPrefix(r.version, "v"), "-")
	if rest != "" {
		upstream += "+" + strings.ReplaceAll(rest, "-", ".")
	}
	return upstream
}

// make lays the files out in a folder of its own and packs them. It gives the names of what it made in r.out.
func (r release) make(ctx context.Context) (files []string, err error) {
	work, err := os.MkdirTemp("", "sallyport-package-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(work)
	if r.binaries == "" {
		r.binaries = filepath.Join(work, "bin")
		if err := r.build(ctx); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(r.out, 0o755); err != nil {
		return nil, err
	}
	modules, err := modulesOf(ctx, r.binaries)
	if err != nil {
		return nil, err
	}
	t := tree{release: r, work: work, root: filepath.Join(work, "root"), modules: modules}
	if err := t.lay(ctx); err != nil {
		return nil, err
	}
	for _, pack := range []func(context.Context, tree) (string, error){r.deb, r.archive, r.sbom} {
		name, err := pack(ctx, t)
		if err != nil {
			return nil, err
		}
		files = append(files, name)
	}
	return append(files, checksums), r.sums(files)
}

// build makes the programs static, without what only debuggers read, and free of where and when they were built.
func (r release) build(ctx context.Context) error {
	const linked = "github.com/sallyport-dev/sallyport/pkg/build."
	args := []string{"build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -X " + linked + "version=" + r.version + " -X " + linked + "commit=" + r.commit, "-o", r.binaries + "/"}
	for _, p := range programs {
		args = append(args, "./cmd/"+p)
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("build programs: %w", err)
	}
	return nil
}

func output(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("run %s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return strings.TrimSpace(string(out)), nil
}
