//go:build k8s

package k8s

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
)

// probedPod answers HTTP at the protected port, or listens nowhere, and kubelet probes it there.
func (c *inCluster) probedPod(name, args, probe string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s, labels: {app: db}}
spec:
  nodeName: %s
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 1
  containers:
    - {name: main, image: %q, imagePullPolicy: Never, command: [/pause%s], readinessProbe: {%s, periodSeconds: 1, timeoutSeconds: 2}}
`, name, c.nodes[0].name, pauseImage, args, probe)
}

// TestProbes: of chosen pods, those that kubelet probes at a protected port become ready by what the service lists, and by nothing else: not
// without a list, not where nobody listens in the pod, and no other process of the node gets there with it.
func TestProbes(t *testing.T) {
	c := &inCluster{world: newWorld(t)}
	var err error
	c.officer, err = grant.GenerateKey()
	must(t, err)
	c.officerFile = filepath.Join(c.dir, "carol.key")
	must(t, grant.WritePrivateKey(c.officerFile, c.officer))
	first := c.nodes[0]
	first.run("sh", "-c", `mkdir -p "$1/kubelet" && for p in $(pgrep -f "^$2"); do echo $p > "$1/kubelet/cgroup.procs"; done`, "sh", podGroups, filepath.Join(c.bin, "kubelet"))
	c.define()
	c.install(c.values())
	c.do("wait", "--for=condition=Accepted", "--timeout=1m", "psvc/db", "rset/all")
	const byTCP, byHTTP = "tcpSocket: {port: 5432}", "httpGet: {port: 5432, path: /}"
	c.apply(c.probedPod("probed-http", `, ":5432"`, byHTTP))
	c.wait(time.Minute, "jsonpath={.status.phase}=Running", "pod/probed-http")
	node := way{"the node itself", c.onNode(first), c.db, 5432}
	c.refused("without probes", []way{node})
	if out := c.do("get", "pod", "probed-http", "-o", "jsonpath={.status.containerStatuses[0].ready}"); out != "false" {
		t.Errorf("ready without an exception: %s", out)
	}

	c.listProbes()
	c.apply(c.probedPod("probed-tcp", `, ":5432"`, byTCP))
	c.wait(time.Minute, "condition=Ready", "pod/probed-http")
	c.wait(time.Minute, "condition=Ready", "pod/probed-tcp")
	c.refused("beside kubelet", []way{node})
	c.apply(c.probedPod("probed-nobody", "", byTCP))
	c.wait(time.Minute, "jsonpath={.status.phase}=Running", "pod/probed-nobody")
	eventually(t, time.Minute, "kubelet's own connection is refused by the pod", func() error {
		out := c.do("get", "events", "--field-selector", "involvedObject.name=probed-nobody,reason=Unhealthy", "-o", "jsonpath={.items[*].message}")
		if !strings.Contains(out, "refused") {
			return fmt.Errorf("events: %q", out)
		}
		return nil
	})
	if out := c.do("get", "pod", "probed-nobody", "-o", "jsonpath={.status.containerStatuses[0].ready}"); out != "false" {
		t.Errorf("ready, and nobody listens: %s", out)
	}
}

// listProbes signs a version of the resources in which the service lists kubelet's group.
func (c *inCluster) listProbes() {
	file := filepath.Join(c.policy(), "resources.yaml")
	data, err := os.ReadFile(file)
	must(c.t, err)
	next := strings.NewReplacer("  ports: [5432]\n", "  ports: [5432]\n  probes: {ports: [5432], cgroup: /kubelet}\n", "version: 1}\n", "version: 2}\n").Replace(string(data))
	must(c.t, os.WriteFile(file, []byte(next), 0o644))
	must(c.t, os.Remove(filepath.Join(c.policy(), "resources.dsse")))
	c.nodes[0].run(c.cli(), "policy", "sign", c.policy(), "--key", c.officerFile, "--yes")
	signatures, err := os.ReadFile(filepath.Join(c.policy(), "resources.dsse"))
	must(c.t, err)
	c.do("annotate", "--overwrite", "resourceset", "all", "sallyport.dev/signatures="+string(signatures))
	c.do("apply", "-f", c.policy())
}
