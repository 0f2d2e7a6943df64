package main

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/apimachinery/pkg/util/yaml"

	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/privilege"
)

const (
	chartDir = "../../deploy/kubernetes/chart"
	baseDir  = "../../deploy/kubernetes/base"
)

// TestBaseIsTheChart: what is committed for kustomize is what the chart gives.
func TestBaseIsTheChart(t *testing.T) {
	want := baseOf(rendered(t, nil), "sallyport-system")
	have, err := filepath.Glob(filepath.Join(baseDir, "*"))
	if err != nil || len(have) != len(want) {
		t.Errorf("base has %d files (%v), the chart gives %d: run `go generate ./tools/chart`", len(have), err, len(want))
	}
	for _, f := range want {
		data, err := os.ReadFile(filepath.Join(baseDir, f.name))
		if err != nil || string(data) != f.text {
			t.Errorf("%s is not what the chart gives (%v): run `go generate ./tools/chart`", f.name, err)
		}
	}
}

// worlds are values by which each template gives something.
var worlds = map[string]map[string]any{
	"as it is":  nil,
	"collector": {"collector": map[string]any{"enabled": true, "storageClassName": "fast", "config": map[string]any{"readers": []any{"spiffe://example.org/ops/*"}}}},
	"cluster":   {"cluster": map[string]any{"enabled": true, "apiServer": map[string]any{"host": "10.0.0.1"}}, "agentConfig": map[string]any{"policySignatures": "off"}},
	"uninstall": {"uninstall": map[string]any{"nodes": []any{"node-1", "node-2.example.org"}}},
}

// TestManifests: each is strictly what the API server knows, and no field is one that it does not.
func TestManifests(t *testing.T) {
	for name, values := range worlds {
		kinds := map[string]int{}
		for _, o := range objects(t, rendered(t, values)) {
			kinds[o.GetObjectKind().GroupVersionKind().Kind]++
		}
		sets := kinds["DaemonSet"]
		if name == "uninstall" && (sets != 0 || kinds["Job"] != 2) || name != "uninstall" && (sets != 1 || kinds["Job"] != 0) || name == "collector" && kinds["StatefulSet"] != 1 ||
			name == "cluster" && (kinds["ClusterRole"] != 1 || kinds["ConfigMap"] != 1) || name != "cluster" && kinds["ClusterRole"] != 0 {
			t.Errorf("%s: %v", name, kinds)
		}
	}
}

// TestConfigurations: what the ConfigMaps hold is what the programs read, whatever the node is called.
func TestConfigurations(t *testing.T) {
	for name, values := range worlds {
		for _, o := range objects(t, rendered(t, values)) {
			m, ok := o.(*corev1.ConfigMap)
			if !ok {
				continue
			}
			if text, ok := m.Data["agent.yaml"]; ok {
				cfg, err := policy.ParseAgentConfig("agent.yaml", []byte(text))
				if err == nil {
					cfg, err = cfg.For("node-1.example.org")
				}
				if err != nil || cfg.AgentID().Path() != "/sallyport/agent/node-1.example.org" {
					t.Errorf("%s: %s: %v", name, cfg.AgentID(), err)
				}
			}
			if m.Name == "sallyport-resources" {
				checkResources(t, m.Data)
			}
		}
	}
}

func checkResources(t *testing.T, files map[string]string) {
	dir := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := policy.LoadDir(dir); err != nil {
		t.Error(err)
	}
}

// TestTokenIsTheAgentsAlone: what the agent may ask the API server for, the process that parses untrusted bytes may not.
func TestTokenIsTheAgentsAlone(t *testing.T) {
	for name, values := range worlds {
		for _, o := range objects(t, rendered(t, values)) {
			d, ok := o.(*appsv1.DaemonSet)
			if !ok {
				continue
			}
			pod := d.Spec.Template.Spec
			if pod.AutomountServiceAccountToken == nil || *pod.AutomountServiceAccountToken {
				t.Errorf("%s: every container gets the token", name)
			}
			for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
				has := slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == "token" })
				if want := name == "cluster" && c.Name == "agent"; has != want {
					t.Errorf("%s: %s has the token: %v", name, c.Name, has)
				}
			}
		}
	}
}

// TestRoleOnlyReads: no verb changes anything but a status.
func TestRoleOnlyReads(t *testing.T) {
	for _, o := range objects(t, rendered(t, worlds["cluster"])) {
		role, ok := o.(*rbacv1.ClusterRole)
		if !ok {
			continue
		}
		for _, r := range role.Rules {
			for _, resource := range r.Resources {
				want := []string{"list", "watch"}
				if strings.HasSuffix(resource, "/status") {
					want = []string{"patch"}
				}
				if !slices.Equal(r.Verbs, want) {
					t.Errorf("%s: %v, want %v", resource, r.Verbs, want)
				}
			}
		}
	}
}

// TestPrivilegesOfContainers: each has what its program asks for, and says what for in the manifest; nothing is privileged but what ends at once.
func TestPrivilegesOfContainers(t *testing.T) {
	source, err := os.ReadFile(filepath.Join(chartDir, "templates/daemonset.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	pod := daemonSet(t).Spec.Template.Spec
	want := map[string]privilege.Set{"agent": privilege.Agent(), "guard": privilege.Guard(), "proxy": privilege.Launcher()}
	for _, c := range pod.Containers {
		s := c.SecurityContext
		if s.Privileged != nil || s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem || s.SeccompProfile == nil || s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault ||
			len(s.Capabilities.Drop) != 1 || s.Capabilities.Drop[0] != "ALL" {
			t.Errorf("%s: %v", c.Name, s)
		}
		var names []string
		for _, add := range s.Capabilities.Add {
			names = append(names, "CAP_"+string(add))
		}
		if got := strings.Join(names, " "); got != want[c.Name].String() {
			t.Errorf("%s: has %s, its program asks for %s", c.Name, got, want[c.Name])
		}
		for _, capability := range want[c.Name].Capabilities {
			if line := "- " + strings.TrimPrefix(capability.Name, "CAP_"); !reasoned(string(source), line, capability.For) {
				t.Errorf("%s: the manifest does not say that %s is for %q", c.Name, capability.Name, capability.For)
			}
		}
		delete(want, c.Name)
	}
	if len(want) > 0 || len(pod.InitContainers) != 1 {
		t.Errorf("no container for %v; %d that end at once", want, len(pod.InitContainers))
	}
}

// reasoned looks for a line with its comment.
func reasoned(manifest, line, why string) bool {
	for l := range strings.Lines(manifest) {
		item, comment, _ := strings.Cut(l, "#")
		if strings.TrimSpace(item) == line && strings.TrimSpace(comment) == why {
			return true
		}
	}
	return false
}

func daemonSet(t *testing.T) *appsv1.DaemonSet {
	for _, o := range objects(t, rendered(t, nil)) {
		if d, ok := o.(*appsv1.DaemonSet); ok {
			return d
		}
	}
	t.Fatal("no DaemonSet")
	return nil
}

func rendered(t *testing.T, values map[string]any) []file {
	t.Helper()
	files, err := render(chartDir, "sallyport-system", values)
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// objects decodes strictly: a field that is unknown or twice there is an error.
func objects(t *testing.T, files []file) (all []runtime.Object) {
	t.Helper()
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{appsv1.AddToScheme, batchv1.AddToScheme, corev1.AddToScheme, rbacv1.AddToScheme} {
		utilruntime.Must(add(scheme))
	}
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	for _, f := range files {
		documents := yaml.NewDocumentDecoder(io.NopCloser(strings.NewReader(f.text)))
		for {
			buf := make([]byte, 1<<20)
			n, err := documents.Read(buf)
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v", f.name, err)
			}
			if data := bytes.TrimSpace(buf[:n]); !onlyComments(data) {
				o, _, err := decoder.Decode(data, nil, nil)
				if err != nil {
					t.Errorf("%s: %v", f.name, err)
					continue
				}
				all = append(all, o)
			}
		}
	}
	return all
}

func onlyComments(data []byte) bool {
	for l := range bytes.Lines(data) {
		if l = bytes.TrimSpace(l); len(l) > 0 && l[0] != '#' && !bytes.Equal(l, []byte("---")) {
			return false
		}
	}
	return true
}
