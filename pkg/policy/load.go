package policy

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// LoadDir reads the set of resources in the *.yaml files of dir, in the order of their names. Files
// whose name begins with a dot are left out. A directory that is missing, unreadable or without a
// file is an error: an empty set is never taken to allow everything. So is a *.yml file, which
// would otherwise be overlooked.
func LoadDir(dir string) (*Set, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, &Error{File: dir, Msg: "read directory: " + reason(err), Hint: "make the directory and put resources in it", Err: err}
	}
	p := &parser{}
	files := 0
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		switch {
		case strings.HasPrefix(e.Name(), "."):
		case strings.HasSuffix(e.Name(), ".yml"):
			p.add(&Error{File: path, Msg: "is not read: its name does not end in .yaml", Hint: "rename it, or move it out of the directory"})
		case strings.HasSuffix(e.Name(), ".yaml"):
			p.readFile(path)
			files++
		}
	}
	if files == 0 {
		p.add(&Error{File: dir, Msg: "has no *.yaml file", Hint: "put at least one ProtectedService in it"})
	}
	return p.set(dir)
}

// LoadFiles reads one set of resources from the named files.
func LoadFiles(paths ...string) (*Set, error) {
	p := &parser{}
	for _, path := range paths {
		p.readFile(path)
	}
	return p.set(strings.Join(paths, ", "))
}

func (p *parser) readFile(path string) {
	data, err := readRegular(path)
	if err != nil {
		p.add(&Error{File: path, Msg: "read file: " + reason(err), Hint: "make it a readable regular file of text", Err: err})
		return
	}
	p.read(path, data)
}

// readRegular reads a file, but nothing that could block or never end.
func readRegular(path string) ([]byte, error) {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("it is not a regular file (%s)", info.Mode().Type())
	case info.Size() > maxFile:
		return nil, fmt.Errorf("it has more than %d bytes", maxFile)
	}
	return os.ReadFile(path)
}

// reason is an error's text without the path, which stands beside it already.
func reason(err error) string {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err.Error()
	}
	return err.Error()
}
