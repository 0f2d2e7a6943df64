//go:build k8s

package apiserver

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/test/lab"
)

// Users of a Server. Admin may do everything; Agent what RBAC says.
const (
	Admin = "admin"
	Agent = "agent"
)

// Server is an API server with its etcd.
type Server struct {
	t    testing.TB
	at   *lab.Namespace
	dir  string
	bin  string
	etcd *lab.Process
	api  *lab.Process
}

// Start gives a Server that answers, at port 6443 of the namespace's loopback, and ends it with the test. dir is its own.
func Start(t testing.TB, at *lab.Namespace, dir string) *Server {
	t.Helper()
	s := &Server{t: t, at: at, dir: dir, bin: programs(t)}
	for _, sub := range []string{"certs", "etcd", "home"} {
		s.must(os.MkdirAll(filepath.Join(dir, sub), 0o700))
	}
	s.keys()
	s.must(os.WriteFile(s.file("tokens.csv"), fmt.Appendf(nil, "token-%s,%[1]s,1,system:masters\ntoken-%s,%[2]s,2\n", Admin, Agent), 0o600))
	for _, user := range []string{Admin, Agent} {
		s.must(os.WriteFile(s.Kubeconfig(user), fmt.Appendf(nil, kubeconfig, s.Certificate(), user), 0o600))
	}
	s.etcd = s.start(s.storage(), "--data-dir", s.file("etcd"), "--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
		"--listen-peer-urls=http://127.0.0.1:2380", "--log-level=error")
	s.Begin()
	t.Cleanup(func() {
		s.End()
		s.must(s.etcd.Kill())
	})
	return s
}

// programs is the folder with those of Kubernetes.
func programs(t testing.TB) string {
	dir := os.Getenv("KUBE_BIN_DIR")
	if dir == "" {
		dir = filepath.Join("..", "..", ".tools", "kube")
	}
	dir, err := filepath.Abs(dir)
	if err == nil {
		_, err = os.Stat(filepath.Join(dir, "kube-apiserver"))
	}
	if err != nil {
		t.Fatalf("%v: run `make test-k8s`, or `go run ./tools/kube` first", err)
	}
	return dir
}

// storage is the etcd beside Kubernetes' programs, or else Debian's, which is older.
func (s *Server) storage() string {
	own := filepath.Join(s.bin, "etcd")
	if _, err := os.Stat(own); err != nil {
		return "etcd"
	}
	return own
}

const kubeconfig = `apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://127.0.0.1:6443", certificate-authority: %q}}]
users: [{name: u, user: {token: token-%s}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
`

func (s *Server) file(name string) string { return filepath.Join(s.dir, name) }

func (s *Server) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// Kubeconfig is the file by which a user reaches it.
func (s *Server) Kubeconfig(user string) string { return s.file(user + ".kubeconfig") }

// Certificate is the file with what clients trust.
func (s *Server) Certificate() string { return s.file("certs/apiserver.crt") }

// Pid is the process of the API server; 0 after End.
func (s *Server) Pid() int {
	if s.api == nil {
		return 0
	}
	return s.api.Pid()
}

// keys makes those of service accounts, without which it does not start.
func (s *Server) keys() {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	s.must(err)
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	s.must(err)
	s.must(os.WriteFile(s.file("sa.key"), pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}), 0o600))
	s.must(os.WriteFile(s.file("sa.pub"), pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}), 0o600))
}

func (s *Server) start(name string, args ...string) *lab.Process {
	s.t.Helper()
	p, err := s.at.Start(exec.Command(name, args...))
	s.must(err)
	return p
}

// Begin starts the API server, again after End, and waits until it answers.
func (s *Server) Begin() {
	s.t.Helper()
	s.api = s.start(filepath.Join(s.bin, "kube-apiserver"), "--etcd-servers=http://127.0.0.1:2379", "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1",
		"--secure-port=6443", "--cert-dir="+s.file("certs"), "--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+s.file("sa.pub"),
		"--service-account-signing-key-file="+s.file("sa.key"), "--service-cluster-ip-range=10.97.0.0/24", "--authorization-mode=RBAC",
		"--token-auth-file="+s.file("tokens.csv"), "--disable-admission-plugins=ServiceAccount", "--endpoint-reconciler-type=none")
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(3 * time.Minute); ; {
		_, err := s.Try("", "get", "--raw", "/readyz")
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-s.api.Exited():
			s.t.Fatalf("the API server has ended:\n%s", s.api.Output())
		case <-deadline:
			s.t.Fatalf("the API server does not answer: %v\n%s", err, s.api.Output())
		}
	}
}

// End kills the API server; etcd goes on.
func (s *Server) End() {
	s.t.Helper()
	if s.api != nil {
		s.must(s.api.Kill())
	}
	s.api = nil
}

// Try runs kubectl as Admin, with that on its standard input, and gives what it says.
func (s *Server) Try(input string, args ...string) (string, error) {
	s.t.Helper()
	cmd := exec.Command(filepath.Join(s.bin, "kubectl"), append([]string{"--kubeconfig", s.Kubeconfig(Admin)}, args...)...)
	cmd.Env = append(os.Environ(), "HOME="+s.file("home"))
	cmd.Stdin = strings.NewReader(input)
	p, err := s.at.Start(cmd)
	s.must(err)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	err = p.Wait(ctx)
	return p.Output(), err
}

// Kubectl is Try, and what goes wrong ends the test.
func (s *Server) Kubectl(input string, args ...string) string {
	s.t.Helper()
	out, err := s.Try(input, args...)
	if err != nil {
		s.t.Fatalf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// Eventually asks kubectl until the answer has all of these words.
func (s *Server) Eventually(words []string, args ...string) string {
	s.t.Helper()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(time.Minute); ; {
		out, err := s.Try("", args...)
		has := err == nil
		for _, w := range words {
			has = has && strings.Contains(out, w)
		}
		if has {
			return out
		}
		select {
		case <-tick.C:
		case <-deadline:
			s.t.Fatalf("kubectl %s never said %q: %v\n%s", strings.Join(args, " "), words, err, out)
		}
	}
}
