// Package build tells what the program that asks was built from.
package build

import (
	"crypto/sha256"
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
)

// Set by the linker for packages (tools/package). Other builds tell what Go found in the repository.
var version, commit string

// Info is what a program was built from.
type Info struct {
	Version string
	Commit  string // "+dirty" behind it: and of changes that are in no commit; empty: not known
	Modules []Module
}

// Module is one that is linked into the program, with the hash of its content as go.sum has it.
type Module struct{ Path, Version, Sum string }

// Version is the version alone.
func Version() string { return Read().Version }

// Read tells it of this program.
func Read() Info {
	known, ok := debug.ReadBuildInfo()
	if !ok {
		return Info{Version: orElse(version, "unknown"), Commit: commit}
	}
	return From(known)
}

// From tells it of a program whose build information was read, which has the linker's words only where it is this one.
func From(known *debug.BuildInfo) Info {
	i := Info{Version: orElse(version, orElse(known.Main.Version, "unknown")), Commit: orElse(commit, revision(known.Settings))}
	for _, d := range known.Deps {
		if d.Replace != nil {
			d = d.Replace
		}
		i.Modules = append(i.Modules, Module{d.Path, d.Version, d.Sum})
	}
	return i
}

func revision(settings []debug.BuildSetting) string {
	said := map[string]string{}
	for _, s := range settings {
		said[s.Key] = s.Value
	}
	if said["vcs.modified"] == "true" {
		return said["vcs.revision"] + "+dirty"
	}
	return said["vcs.revision"]
}

// Sum stands for all modules at once: two programs with the same one have the same code of others in them.
func (i Info) Sum() string {
	var lines []string
	for _, m := range i.Modules {
		lines = append(lines, m.Path+" "+m.Version+" "+m.Sum+"\n")
	}
	slices.Sort(lines)
	return fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(strings.Join(lines, ""))))
}

// Describe is what `--version` of a program says, ended by a line's end. `go version -m` names each module.
func (i Info) Describe(program string) string {
	return fmt.Sprintf("%s version %s\ncommit %s\n%s %s/%s\n%d modules %s\n", program, i.Version, orElse(i.Commit, "unknown"),
		runtime.Version(), runtime.GOOS, runtime.GOARCH, len(i.Modules), i.Sum())
}

func orElse(value, otherwise string) string {
	if value != "" {
		return value
	}
	return otherwise
}
