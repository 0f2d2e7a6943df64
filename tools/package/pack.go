package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

// arch is what Go and Debian call the processor alike, as far as the programs are built for it.
const arch = runtime.GOARCH

// checksums is the file that sha256sum -c reads.
const checksums = "SHA256SUMS"

// deb has nfpm write the package of the tree.
func (r release) deb(ctx context.Context, t tree) (string, error) {
	recipe, err := os.ReadFile("deploy/package/nfpm.yaml")
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(t.work, "nfpm.yaml"), recipe, 0o644); err != nil {
		return "", err
	}
	out, err := filepath.Abs(r.out)
	if err != nil {
		return "", err
	}
	name := r.name() + ".deb"
	cmd := exec.CommandContext(ctx, "go", "run", nfpm, "package", "--config", "nfpm.yaml", "--packager", "deb", "--target", filepath.Join(out, name))
	cmd.Dir = t.work
	cmd.Env = append(os.Environ(), "DEB_VERSION="+r.debian(), "ARCH="+arch, fmt.Sprintf("SOURCE_DATE_EPOCH=%d", r.at.Unix()))
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("make Debian package: %w: %s", err, out)
	}
	return name, nil
}

// archive has the same files for hosts without dpkg, in one folder, in the order of their names.
func (r release) archive(_ context.Context, t tree) (string, error) {
	var plain, packed bytes.Buffer
	top := r.name()
	w := tar.NewWriter(&plain)
	err := filepath.WalkDir(t.root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(t.root, path)
		if err != nil {
			return err
		}
		return r.add(w, path, filepath.Join(top, rel))
	})
	if err != nil {
		return "", fmt.Errorf("make archive: %w", err)
	}
	if err := w.Close(); err != nil {
		return "", fmt.Errorf("make archive: %w", err)
	}
	if err := squeeze(&packed, plain.Bytes()); err != nil {
		return "", fmt.Errorf("make archive: %w", err)
	}
	name := top + ".tar.gz"
	return name, os.WriteFile(filepath.Join(r.out, name), packed.Bytes(), 0o644)
}

// add says nothing of who packed, and when.
func (r release) add(w *tar.Writer, path, name string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	h := &tar.Header{Format: tar.FormatPAX, Typeflag: tar.TypeReg, Name: name, Mode: int64(info.Mode().Perm()), Size: info.Size(), ModTime: r.at}
	if info.IsDir() {
		h.Typeflag, h.Name, h.Size = tar.TypeDir, name+"/", 0
		return w.WriteHeader(h)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	_, err = w.Write(data)
	return err
}

func (r release) sums(files []string) error {
	var lines []string
	for _, f := range files {
		data, err := os.ReadFile(filepath.Join(r.out, f))
		if err != nil {
			return err
		}
		lines = append(lines, fmt.Sprintf("%x  %s\n", sha256.Sum256(data), f))
	}
	slices.Sort(lines)
	return os.WriteFile(filepath.Join(r.out, checksums), []byte(strings.Join(lines, "")), 0o644)
}
