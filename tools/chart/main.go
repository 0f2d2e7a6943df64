// Command chart renders deploy/kubernetes/chart as Helm does, and writes the base for kustomize, which is what the chart gives
// with its own values: there is one source of both.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"helm.sh/helm/v4/pkg/chart/common"
	chartutil "helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
)

//go:generate go run . -chart ../../deploy/kubernetes/chart -base ../../deploy/kubernetes/base

const generated = "# Written by tools/chart from deploy/kubernetes/chart. DO NOT EDIT: change the chart, or patch this in an overlay.\n"

func main() {
	dir := flag.String("chart", "deploy/kubernetes/chart", "`FOLDER` of the chart")
	values := flag.String("values", "", "`FILE` with values beside the chart's own")
	namespace := flag.String("namespace", "sallyport-system", "`NAME` of the namespace")
	base := flag.String("base", "", "write the base for kustomize into this `FOLDER`, and print nothing")
	flag.Parse()
	if err := run(*dir, *values, *namespace, *base); err != nil {
		fmt.Fprintln(os.Stderr, "chart:", err)
		os.Exit(1)
	}
}

func run(dir, valuesFile, namespace, base string) error {
	values := common.Values{}
	if valuesFile != "" {
		var err error
		if values, err = common.ReadValuesFile(valuesFile); err != nil {
			return fmt.Errorf("read values: %w", err)
		}
	}
	files, err := render(dir, namespace, values)
	if err != nil {
		return err
	}
	if base != "" {
		return write(base, baseOf(files, namespace))
	}
	for _, f := range files {
		fmt.Printf("---\n%s", f.text)
	}
	return nil
}

// file is what one template gave.
type file struct{ name, text string }

// render gives the manifests in the order of the templates' names, without those that are empty.
func render(dir, namespace string, values map[string]any) ([]file, error) {
	chart, err := loader.LoadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("load chart: %w", err)
	}
	release := common.ReleaseOptions{Name: "sallyport", Namespace: namespace, Revision: 1, IsInstall: true}
	top, err := chartutil.ToRenderValues(chart, values, release, common.DefaultCapabilities)
	if err != nil {
		return nil, fmt.Errorf("join values: %w", err)
	}
	out, err := engine.Render(chart, top)
	if err != nil {
		return nil, fmt.Errorf("render chart: %w", err)
	}
	var files []file
	for name, text := range out {
		if text = strings.Trim(text, "\n"); text != "" && path.Ext(name) == ".yaml" {
			files = append(files, file{path.Base(name), text + "\n"})
		}
	}
	slices.SortFunc(files, func(a, b file) int { return strings.Compare(a.name, b.name) })
	return files, nil
}

// baseOf adds what Helm makes by itself: the namespace, which has to let the pods be privileged, and the list of files.
func baseOf(files []file, namespace string) []file {
	list := generated + "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nnamespace: " + namespace + "\nresources:\n  - namespace.yaml\n"
	base := []file{{"namespace.yaml", generated + "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: " + namespace +
		"\n  labels: {pod-security.kubernetes.io/enforce: privileged}\n"}}
	for _, f := range files {
		base = append(base, file{f.name, generated + f.text})
		list += "  - " + f.name + "\n"
	}
	return append(base, file{"kustomization.yaml", list})
}

// write has the files, and no other, in the folder.
func write(dir string, files []file) error {
	old, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
	errs := []error{err, os.MkdirAll(dir, 0o755)}
	for _, name := range old {
		errs = append(errs, os.Remove(name))
	}
	for _, f := range files {
		errs = append(errs, os.WriteFile(filepath.Join(dir, f.name), []byte(f.text), 0o644))
	}
	return errors.Join(errs...)
}
