package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// ErrUntrusted says that somebody other than root could have written a file that the agent was to obey.
var ErrUntrusted = errors.New("is not root's alone")

// checkTrusted refuses a file or directory that is not owned by root or that group or others may write. Symbolic links are
// followed: what counts is who can write the thing itself.
func checkTrusted(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("check owner: %w", err)
	}
	return trusted(path, info)
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
