package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
)

// ErrUntrusted says that somebody other than root could have written a file that the agent was to obey.
var ErrUntrusted = errors.New("is not root's alone")

// checkTrusted refuses a file or directory that is not owned by root or that group or others may write, or that somebody
// could put another one in the place of. Symbolic links are followed, and their targets held to the same.
func checkTrusted(path string) error {
	abs, err := filepath.Abs(path)
	if err != nil {
		return fmt.Errorf("check owner of %s: %w", path, err)
	}
	target, err := filepath.EvalSymlinks(abs)
	if err != nil {
		return fmt.Errorf("check owner of %s: %w", path, err)
	}
	for _, p := range slices.Compact([]string{abs, target}) {
		if err := checkChain(p); err != nil {
			return err
		}
	}
	return nil
}

// checkChain looks at a path and at every directory on the way to it.
func checkChain(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("check owner: %w", err)
	}
	if err := trusted(path, info); err != nil {
		return err
	}
	for dir := filepath.Dir(path); ; dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err != nil {
			return fmt.Errorf("check owner: %w", err)
		}
		// In a sticky directory nobody can rename what is root's.
		if info.Mode()&fs.ModeSticky == 0 {
			err = trusted(dir, info)
		}
		if err != nil || dir == "/" {
			return err
		}
	}
}

func trusted(path string, info fs.FileInfo) error {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("check owner of %s: no owner known", path)
	}
	if st.Uid != 0 || info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%s %w: owner uid %d, mode %04o", path, ErrUntrusted, st.Uid, info.Mode().Perm())
	}
	return nil
}

// checkTrustedDir does the same for a directory and each of its YAML files; every offender is named.
func checkTrustedDir(dir string) error {
	errs := []error{checkTrusted(dir)}
	names, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
	if err != nil {
		return fmt.Errorf("list %s: %w", dir, err)
	}
	for _, name := range names {
		errs = append(errs, checkTrusted(name))
	}
	return errors.Join(errs...)
}
