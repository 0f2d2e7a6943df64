//go:build k8s

package k8s

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const (
	repository = "../.."
	pauseImage = "localhost/pause:1"
	ourImage   = "localhost/sallyport:0.1.0"
	namespace  = "sallyport-system"
)

// cluster is two nodes; the control plane is on the first.
type cluster struct {
	t     *testing.T
	dir   string
	bin   string // with Kubernetes' programs
	nodes []*node
}

// newCluster gives a cluster whose nodes are ready, and ends it with the test.
func newCluster(t *testing.T) *cluster {
	if os.Geteuid() != 0 {
		t.Fatal("needs root")
	}
	c := &cluster{t: t, bin: kubernetes(t)}
	cleanUp(t) // of one that was killed
	var err error
	c.dir, err = os.MkdirTemp("/var/tmp", prefix)
	must(t, err)
	must(t, os.Chmod(c.dir, 0o755))
	t.Cleanup(c.end)
	c.nodes = []*node{startNode(t, c.dir, 1), startNode(t, c.dir, 2)}
	c.connect()
	images := c.makeImages()
	c.controlPlane()
	for _, n := range c.nodes {
		c.runtime(n, images)
	}
	for _, n := range c.nodes {
		c.kubelet(n)
		c.kubeProxy(n, "iptables")
	}
	for _, n := range c.nodes {
		c.wait(time.Minute, "create", "node/"+n.name)
		c.wait(2*time.Minute, "condition=Ready", "node/"+n.name)
	}
	return c
}

// kubernetes is the folder of tools/kube.
func kubernetes(t *testing.T) string {
	dir := os.Getenv("KUBE_BIN_DIR")
	if dir == "" {
		dir = filepath.Join(repository, ".tools/kube")
	}
	dir, err := filepath.Abs(dir)
	must(t, err)
	for _, p := range []string{"kube-apiserver", "kubectl", "kubelet", "kube-controller-manager", "kube-scheduler", "kube-proxy"} {
		if _, err := os.Stat(filepath.Join(dir, p)); err != nil {
			t.Fatalf("%v: run `make test-k8s`, or `go run ./tools/kube` first", err)
		}
	}
	return dir
}

// cleanUp removes what a killed test left: its processes died with it, its control groups and folders did not.
func cleanUp(t *testing.T) {
	roots, err := filepath.Glob(filepath.Join(cgroups, "*", prefix+"*"))
	must(t, err)
	for _, r := range roots {
		must(t, removeTree(r))
	}
	dirs, err := filepath.Glob("/var/tmp/" + prefix + "*")
	must(t, err)
	for _, d := range dirs {
		must(t, os.RemoveAll(d))
	}
}

func (c *cluster) end() {
	if c.t.Failed() {
		c.tell()
	}
	for _, n := range c.nodes {
		if err := n.end(); err != nil {
			c.t.Errorf("end %s: %v", n.name, err)
		}
	}
	if os.Getenv("KEEP_LOGS") != "" {
		return
	}
	if err := os.RemoveAll(c.dir); err != nil {
		c.t.Error(err)
	}
}

// tell says what the cluster was like when a test failed.
func (c *cluster) tell() {
	for _, args := range [][]string{{"get", "pods", "-A", "-o", "wide"}, {"logs", "-n", namespace, "-l", "app.kubernetes.io/name=sallyport", "--all-containers", "--prefix", "--tail=30"}} {
		out, err := c.kubectl(args...).CombinedOutput()
		c.t.Logf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	for _, n := range c.nodes {
		out, err := c.kubectl("logs", "client-"+n.name, "-c", "forward", "--tail=5").CombinedOutput()
		c.t.Logf("client of %s: %v\n%s", n.name, err, out)
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		out, err = n.inside(ctx, filepath.Join(c.dir, "bin/sallyport"), "flows").CombinedOutput()
		cancel()
		c.t.Logf("flows of %s: %v\n%s", n.name, err, out)
	}
}

// connect joins the nodes by one wire, and routes pods' addresses over it.
func (c *cluster) connect() {
	a, b := c.nodes[0], c.nodes[1]
	out, err := exec.Command("ip", "link", "add", "eth0", "netns", fmt.Sprint(a.pid), "type", "veth", "peer", "name", "eth0", "netns", fmt.Sprint(b.pid)).CombinedOutput()
	if err != nil {
		c.t.Fatalf("join nodes: %v: %s", err, out)
	}
	for i, n := range c.nodes {
		other := c.nodes[1-i]
		for _, args := range []string{"link set lo up", "addr add " + n.ip + "/24 dev eth0", "link set eth0 up", "route add default via 10.98.0.254",
			"route add " + other.pods + ".0/24 via " + other.ip, "addr add " + n.ip6 + "/64 dev eth0 nodad", "-6 route add " + other.net6 + "::/64 via " + other.ip6,
			"-6 route add default via fd98::fe"} {
			n.run(append([]string{"ip"}, strings.Fields(args)...)...)
		}
		n.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding")
	}
}

func (c *cluster) makeImages() (files []string) {
	bin := filepath.Join(c.dir, "bin")
	must(c.t, os.MkdirAll(bin, 0o755))
	build := exec.Command("go", "build", "-trimpath", "-o", bin, "./cmd/sallyport", "./cmd/sallyport-agent", "./cmd/sallyport-proxy", "./cmd/sallyport-collector", "./test/k8s/pause", "./test/k8s/probe")
	build.Dir, build.Env = repository, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		c.t.Fatalf("build: %v\n%s", err, out)
	}
	ours := image{name: ourImage, files: map[string]string{}}
	for _, b := range []string{"sallyport", "sallyport-agent", "sallyport-proxy", "sallyport-collector"} {
		ours.files["/"+b] = filepath.Join(bin, b)
	}
	for i, im := range []image{{name: pauseImage, files: map[string]string{"/pause": filepath.Join(bin, "pause")}, entry: "/pause"}, ours, postgres(c.t),
		{name: probeImage, files: map[string]string{"/pause": filepath.Join(bin, "pause"), "/probe": filepath.Join(bin, "probe")}}} {
		file := filepath.Join(c.dir, fmt.Sprintf("image-%d.tar", i))
		im.save(c.t, file)
		files = append(files, file)
	}
	return files
}

func (c *cluster) controlPlane() {
	n := c.nodes[0]
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(c.t, err)
	public, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	must(c.t, err)
	tokens := "admin,admin,admin,\"system:masters\"\n"
	for _, n := range c.nodes {
		tokens += fmt.Sprintf("%s,system:node:%s,%s,\"system:nodes\"\n", n.name, n.name, n.name)
	}
	for name, data := range map[string][]byte{
		"sa.key": pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}),
		"sa.pub": pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}), "tokens.csv": []byte(tokens),
	} {
		must(c.t, os.WriteFile(filepath.Join(c.dir, name), data, 0o600))
	}
	for _, token := range []string{"admin", c.nodes[0].name, c.nodes[1].name} {
		must(c.t, os.WriteFile(c.kubeconfig(token), fmt.Appendf(nil, `{"apiVersion":"v1","kind":"Config","current-context":"x","contexts":[{"name":"x","context":{"cluster":"c","user":"u"}}],
"clusters":[{"name":"c","cluster":{"server":"https://%s:6443","insecure-skip-tls-verify":true}}],"users":[{"name":"u","user":{"token":%q}}]}`, n.ip, token), 0o600))
	}
	n.daemon("etcd", "etcd", "--data-dir", filepath.Join(n.dir, "etcd"), "--listen-client-urls", "http://127.0.0.1:2379", "--advertise-client-urls", "http://127.0.0.1:2379", "--listen-peer-urls", "http://127.0.0.1:2380")
	c.apiServer()
	admin := c.kubeconfig("admin")
	n.daemon("controllers", filepath.Join(c.bin, "kube-controller-manager"), "--kubeconfig="+admin, "--service-account-private-key-file="+filepath.Join(c.dir, "sa.key"),
		"--root-ca-file="+filepath.Join(c.certs(), "apiserver.crt"), "--cert-dir="+c.certs(), "--leader-elect=false")
	n.daemon("scheduler", filepath.Join(c.bin, "kube-scheduler"), "--kubeconfig="+admin, "--authentication-kubeconfig="+admin, "--authorization-kubeconfig="+admin, "--leader-elect=false", "--cert-dir="+c.certs())
}

func (c *cluster) certs() string { return filepath.Join(c.dir, "certs") }

// apiServer starts it, again after it was killed.
func (c *cluster) apiServer() {
	n := c.nodes[0]
	n.daemon("apiserver", filepath.Join(c.bin, "kube-apiserver"), "--etcd-servers=http://127.0.0.1:2379", "--bind-address="+n.ip, "--advertise-address="+n.ip, "--secure-port=6443",
		"--cert-dir="+c.certs(), "--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+filepath.Join(c.dir, "sa.pub"),
		"--service-account-signing-key-file="+filepath.Join(c.dir, "sa.key"), "--service-cluster-ip-range=10.97.0.0/24,fd97::/112", "--authorization-mode=Node,RBAC",
		"--token-auth-file="+filepath.Join(c.dir, "tokens.csv"), "--allow-privileged", "--kubelet-preferred-address-types=InternalIP")
	eventually(c.t, 2*time.Minute, "the API server is ready", func() error {
		out, err := c.kubectl("get", "--raw", "/readyz").CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s\n%s", err, out, n.log("apiserver"))
		}
		return nil
	})
}

func (c *cluster) kubeconfig(who string) string { return filepath.Join(c.dir, who+".kubeconfig") }

// runtime starts containerd, with Debian's bridge plugin, and gives it the images before anything can ask for them.
func (c *cluster) runtime(n *node, images []string) {
	must(c.t, os.WriteFile(filepath.Join(n.dir, "cni/10.conflist"), fmt.Appendf(nil, `{"cniVersion":"0.4.0","name":"br","plugins":[
{"type":"bridge","bridge":"cni0","isGateway":true,"hairpinMode":true,"ipam":{"type":"host-local","ranges":[[{"subnet":"%s.0/24"}],[{"subnet":"%s::/64"}]],"routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]}},
{"type":"portmap","capabilities":{"portMappings":true}}]}`, n.pods, n.net6), 0o644))
	config := filepath.Join(n.dir, "containerd.toml")
	must(c.t, os.WriteFile(config, fmt.Appendf(nil, `version = 2
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
  sandbox_image = %q
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = %q
`, pauseImage, filepath.Join(n.dir, "cni")), 0o644))
	n.daemon("containerd", "containerd", "-c", config)
	eventually(c.t, time.Minute, "containerd of "+n.name+" answers", func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		out, err := n.inside(ctx, "ctr", "version").CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s\n%s", err, out, n.log("containerd"))
		}
		return nil
	})
	for _, i := range images {
		n.run("ctr", "-n", "k8s.io", "image", "import", i)
	}
}

func (c *cluster) kubelet(n *node) {
	config := filepath.Join(n.dir, "kubelet.yaml")
	must(c.t, os.WriteFile(config, fmt.Appendf(nil, `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: %s
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
cgroupRoot: /%s
failCgroupV1: false
failSwapOn: false
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
volumePluginDir: %s
clusterDNS: [10.97.0.10]
evictionHard: {"memory.available": "100Mi", "nodefs.available": "1%%", "imagefs.available": "1%%"}
`, n.ip, prefix+n.name, filepath.Join(n.dir, "plugins")), 0o644))
	n.daemon("kubelet", filepath.Join(c.bin, "kubelet"), "--config="+config, "--kubeconfig="+c.kubeconfig(n.name), "--hostname-override="+n.name, "--node-ip="+n.ip+","+n.ip6,
		"--cert-dir="+filepath.Join(n.dir, "certs"))
}

// kubeProxy has the node carry addresses of Services to pods, by iptables or by nftables.
func (c *cluster) kubeProxy(n *node, mode string) {
	n.daemon("kube-proxy", filepath.Join(c.bin, "kube-proxy"), "--kubeconfig="+c.kubeconfig("admin"), "--hostname-override="+n.name, "--proxy-mode="+mode,
		"--cluster-cidr=10.96.0.0/16,fd96::/48", "--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0")
}

// kubectl is a command of whoever runs the cluster.
func (c *cluster) kubectl(args ...string) *exec.Cmd {
	return c.nodes[0].inside(context.Background(), append([]string{filepath.Join(c.bin, "kubectl"), "--kubeconfig", c.kubeconfig("admin"), "--request-timeout=60s"}, args...)...)
}

func (c *cluster) do(args ...string) string {
	c.t.Helper()
	out, err := c.kubectl(args...).CombinedOutput()
	if err != nil {
		c.t.Fatalf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func (c *cluster) apply(manifests string) {
	c.t.Helper()
	cmd := c.kubectl("apply", "-f", "-")
	cmd.Stdin = strings.NewReader(manifests)
	if out, err := cmd.CombinedOutput(); err != nil {
		c.t.Fatalf("kubectl apply: %v\n%s", err, out)
	}
}

func (c *cluster) wait(within time.Duration, for_, what string, args ...string) {
	c.t.Helper()
	c.do(append([]string{"wait", "--timeout=" + within.String(), "--for=" + for_, what}, args...)...)
}

// chart is what Helm would apply, with values.
func (c *cluster) chart(values string) string {
	c.t.Helper()
	file := filepath.Join(c.dir, "values.yaml")
	must(c.t, os.WriteFile(file, []byte(values), 0o644))
	cmd := exec.Command("go", "run", "./tools/chart", "-values", file, "-namespace", namespace)
	cmd.Dir = repository
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		c.t.Fatalf("render chart: %v\n%s", errors.Join(err), &stderr)
	}
	return string(out)
}
