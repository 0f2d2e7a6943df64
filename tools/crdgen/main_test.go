package main

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

// TestCommitted: the definitions in the tree are those of the types.
func TestCommitted(t *testing.T) {
	const folder = "../../deploy/crds"
	made, err := definitions()
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range made {
		if is, err := os.ReadFile(filepath.Join(folder, name)); err != nil || !bytes.Equal(is, text) {
			t.Errorf("%s is not what the types say (%v): run `go generate ./pkg/kube/v1alpha1`", name, err)
		}
	}
	there, err := filepath.Glob(filepath.Join(folder, "*"))
	if err != nil || len(there) != len(made) || len(made) != 9 {
		t.Errorf("%s has %d files, and %d are generated (%v)", folder, len(there), len(made), err)
	}
}
