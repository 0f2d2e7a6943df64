//go:build k8s

package k8s

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// image is a container image of one layer: files of this machine, at their places in it.
type image struct {
	name  string
	files map[string]string // place: file here
	texts map[string]string // place: content
	trees []string          // folders, with all that is in them, at the place that they have here
	dirs  []string
	entry string
}

// save writes it as `docker save` does.
func (i image) save(t *testing.T, to string) {
	t.Helper()
	layer := i.layer(t)
	id := fmt.Sprintf("%x", sha256.Sum256(layer))
	config, err := json.Marshal(map[string]any{"architecture": "amd64", "os": "linux", "config": i.config(),
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + id}}})
	must(t, err)
	configName := fmt.Sprintf("%x.json", sha256.Sum256(config))
	manifest, err := json.Marshal([]map[string]any{{"Config": configName, "RepoTags": []string{i.name}, "Layers": []string{id + "/layer.tar"}}})
	must(t, err)
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	add(t, w, configName, 0o644, bytes.NewReader(config), int64(len(config)))
	add(t, w, id+"/layer.tar", 0o644, bytes.NewReader(layer), int64(len(layer)))
	add(t, w, "manifest.json", 0o644, bytes.NewReader(manifest), int64(len(manifest)))
	must(t, w.Close())
	must(t, os.WriteFile(to, out.Bytes(), 0o644))
}

func (i image) config() map[string]any {
	if i.entry == "" {
		return map[string]any{}
	}
	return map[string]any{"Entrypoint": []string{i.entry}}
}

func (i image) layer(t *testing.T) []byte {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, d := range i.dirs {
		must(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d + "/", Mode: 0o1777}))
	}
	for place, file := range i.files {
		addFile(t, w, place, file)
	}
	for place, text := range i.texts {
		add(t, w, place, 0o644, strings.NewReader(text), int64(len(text)))
	}
	for _, tree := range i.trees {
		addTree(t, w, tree)
	}
	must(t, w.Close())
	return out.Bytes()
}

func addTree(t *testing.T, w *tar.Writer, tree string) {
	must(t, filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() { // links: what they lead to
				addFile(t, w, path, path)
			}
		}
		return err
	}))
}

func addFile(t *testing.T, w *tar.Writer, place, file string) {
	f, err := os.Open(file)
	must(t, err)
	defer f.Close()
	info, err := f.Stat()
	must(t, err)
	add(t, w, place, int64(info.Mode().Perm()), f, info.Size())
}

func add(t *testing.T, w *tar.Writer, place string, mode int64, r io.Reader, size int64) {
	must(t, w.WriteHeader(&tar.Header{Name: strings.TrimPrefix(place, "/"), Mode: mode, Size: size}))
	_, err := io.Copy(w, r)
	must(t, err)
}

// withLibraries adds programs of this machine and the libraries that they are linked with.
func (i image) withLibraries(t *testing.T, programs ...string) image {
	for _, p := range programs {
		i.files[p] = p
		out, err := exec.Command("ldd", p).Output()
		must(t, err)
		for _, m := range regexp.MustCompile(`(/\S+) \(0x`).FindAllStringSubmatch(string(out), -1) {
			i.files[m[1]] = m[1]
		}
	}
	return i
}

// postgres is Debian's, with a shell and psql, and no entry in any registry.
func postgres(t *testing.T) image {
	bins, err := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	if err != nil || len(bins) == 0 {
		t.Fatal("no PostgreSQL on this machine: run `go run ./tools/needs test`")
	}
	home := filepath.Dir(filepath.Dir(bins[0]))
	i := image{name: "localhost/postgres:1", files: map[string]string{}, dirs: []string{"tmp", "data", "var/run/postgresql"},
		texts: map[string]string{"/etc/passwd": "root:x:0:0::/:/bin/sh\npostgres:x:999:999::/data:/bin/sh\n", "/etc/group": "root:x:0:\npostgres:x:999:\n"},
		trees: []string{filepath.Join(home, "lib"), filepath.Join("/usr/share/postgresql", filepath.Base(home)), "/usr/share/zoneinfo/Etc"}}
	i.files["/usr/share/zoneinfo/UTC"] = "/usr/share/zoneinfo/UTC"
	return i.withLibraries(t, bins[0], home+"/bin/initdb", home+"/bin/psql", "/bin/sh", "/bin/sleep")
}
