package main

import (
	"cmp"
	"context"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/sallyport-dev/sallyport/pkg/build"
)

// module is one that is linked into a program.
type module struct {
	build.Module
	dir string   // its source
	in  []string // programs that have it
}

// golang is Go's own library, as a module among the others.
const golang = "std"

// modulesOf reads from the programs themselves what is in them: the module file names more than is linked.
func modulesOf(ctx context.Context, binaries string) ([]module, error) {
	found := map[build.Module]*module{}
	for _, p := range programs {
		info, err := buildinfo.ReadFile(filepath.Join(binaries, p))
		if err != nil {
			return nil, fmt.Errorf("read what %s was built from: %w", p, err)
		}
		for _, m := range append(build.From(info).Modules, build.Module{Path: golang, Version: info.GoVersion}) {
			if found[m] == nil {
				found[m] = &module{Module: m}
			}
			found[m].in = append(found[m].in, p)
		}
	}
	var all []module
	for _, m := range found {
		all = append(all, *m)
	}
	slices.SortFunc(all, func(a, b module) int { return cmp.Or(cmp.Compare(a.Path, b.Path), cmp.Compare(a.Version, b.Version)) })
	return all, findSources(ctx, all)
}

// findSources fills in where the sources are. Go downloads what is not there.
func findSources(ctx context.Context, all []module) error {
	root, err := output(ctx, "go", "env", "GOROOT")
	if err != nil {
		return err
	}
	args := []string{"mod", "download", "-json"}
	for _, m := range all {
		if m.Path != golang {
			args = append(args, m.Path+"@"+m.Version)
		}
	}
	out, err := exec.CommandContext(ctx, "go", args...).Output()
	if err != nil {
		return fmt.Errorf("find sources of modules: %w", err)
	}
	dirs := map[string]string{golang: root}
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var m struct{ Path, Dir string }
		if err := d.Decode(&m); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return fmt.Errorf("find sources of modules: %w", err)
		}
		dirs[m.Path] = m.Dir
	}
	for i := range all {
		all[i].dir = dirs[all[i].Path]
	}
	return nil
}
