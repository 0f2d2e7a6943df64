package e2e_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
	"github.com/sallyport-dev/sallyport/test/oidc"
)

const (
	dbName  = "db.example.org" // what the services' web certificate is for
	sshPort = 22
	wikiAt  = 8443
)

// people is a world with a provider at which people log in, and services that take its tokens: PostgreSQL and a wiki on the node,
// and an SSH server in the pod.
type people struct {
	*world
	provider *oidc.Provider
	log      *followed
	home     string // of the person at the client
}

// TestPeople: unchanged psql, ssh and curl of a person who has logged in at a real provider, and has no SPIFFE identity.
func TestPeople(t *testing.T) {
	leak.Check(t)
	w := &people{world: newWorld(t, options{web: true})}
	w.home = filepath.Join(w.Dir, "home")
	must(t, os.Mkdir(w.home, 0o700))
	w.makeCertificate(t)
	w.startProvider(t)
	w.startPostgres(t, w.Node, "-h", "*", "-F")
	w.startSSH(t)
	w.startWiki(t)
	w.writeResources(t, "20-people.yaml", w.takes("[corp]", `[{subjects: [corp/ann]}, {identities: ["spiffe://example.org/app/web"]}]`))
	for _, d := range []*daemon{w.collector, w.agent, w.guard, w.proxy} {
		d.start(t)
	}
	w.log = w.follow(t)
	w.logIn(t, "ann", "default", false)
	w.logIn(t, "bob", "bob", true)
	w.logIn(t, "ann", "elsewhere", false, "--resource", "https://elsewhere.example.org")
	if out := w.person(t, "whoami"); !strings.Contains(out.stdout, "bob") || !strings.Contains(out.stdout, "https://db.example.org") || strings.Contains(out.stdout, "ey") {
		t.Errorf("whoami: %s", out)
	}
	t.Run("psql", w.psqlByToken)
	t.Run("ssh", w.sshByBoth)
	t.Run("curl", w.curlByToken)
	t.Run("turned_away", w.turnedAway)
	t.Run("cut", w.cutByToken)
	t.Run("provider_away", w.providerAway)
}

// takes protects the services.
func (w *people) takes(providers, access string) string {
	return fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: pg}
spec: {target: Host, ports: [%[1]d], tokens: {providers: %[4]s, certificate: db}, access: %[5]s}
---
apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: ssh}
spec: {target: Pod, ports: [%[2]d], addresses: ["10.2.0.2", "fd00:2::2"], tokens: {providers: %[4]s, certificate: db}, access: %[5]s}
---
apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: wiki}
spec: {target: Host, ports: [%[3]d], http: {authenticate: [oidc], providers: %[4]s, certificate: db, hosts: [%[8]s]}, access: [{subjects: [corp/ann], routes: [{paths: [/public/*]}]}]}
---
apiVersion: sallyport.dev/v1alpha1
kind: IdentityProvider
metadata: {name: corp}
spec: {issuer: %[6]q, audiences: ["https://db.example.org"], ca: %[7]q, skew: 1s}
`, postgresPort, sshPort, wikiAt, providers, access, w.provider.Issuer, w.provider.CA, dbName)
}

func (w *people) startProvider(t *testing.T) {
	t.Helper()
	w.provider = oidc.Start(t, oidc.Options{
		Address: w.Node.Addr(lab.IPv4), Do: w.Node.Do, Resource: "https://db.example.org", TTL: 2 * time.Minute,
		Dial: func(ctx context.Context, _, address string) (net.Conn, error) {
			return w.Client.Dial(ctx, netip.AddrPort{}, netip.MustParseAddrPort(address))
		},
		Clients: []oidc.Client{{ID: "sallyport", GrantTypes: []string{"authorization_code", "refresh_token", "urn:ietf:params:oauth:grant-type:device_code"},
			ResponseTypes: []string{"code"}, RedirectURIs: []string{"http://127.0.0.1/callback"}, TokenAuthMethod: "none", Application: "native"}},
	})
	write(t, filepath.Join(w.Dir, "provider.pem"), w.provider.CA)
}

// makeCertificate makes the one that the proxy shows to people.
func (w *people) makeCertificate(t *testing.T) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: dbName}, DNSNames: []string{dbName}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	for name, block := range map[string]*pem.Block{"web.pem": {Type: "CERTIFICATE", Bytes: der}, "web.key": {Type: "PRIVATE KEY", Bytes: secret}} {
		must(t, os.WriteFile(filepath.Join(w.Dir, name), pem.EncodeToMemory(block), 0o644)) // the proxy's user reads both
	}
}

// startSSH runs OpenSSH in the pod, for a key that is made for it.
func (w *people) startSSH(t *testing.T) {
	t.Helper()
	if err := os.Mkdir("/run/sshd", 0o755); err == nil { // where it shuts itself in; its package makes it at boot
		t.Cleanup(func() { must(t, os.Remove("/run/sshd")) })
	} else if !errors.Is(err, os.ErrExist) {
		t.Fatal(err)
	}
	for _, name := range []string{"ssh-host", "ssh-user"} {
		if s := capture(exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(w.Dir, name))); s.err != nil {
			t.Fatal(s)
		}
	}
	config := filepath.Join(w.Dir, "sshd.conf")
	write(t, config, fmt.Sprintf("Port %d\nHostKey %[2]s/ssh-host\nAuthorizedKeysFile %[2]s/ssh-user.pub\nPidFile none\nUsePAM no\nStrictModes no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n", sshPort, w.Dir))
	p, err := w.Pod.Start(exec.Command("/usr/sbin/sshd", "-D", "-e", "-f", config))
	must(t, err)
	waitUntil(t, "sshd", func() bool { return strings.Contains(p.Output(), "Server listening on") })
}

// startWiki is an HTTP service that says who it was told asks.
func (w *people) startWiki(t *testing.T) {
	t.Helper()
	l, err := w.Node.Listen(netip.AddrPortFrom(netip.IPv4Unspecified(), wikiAt))
	must(t, err)
	server := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(rw, "%s at %s as %s, authorization %q", r.RequestURI, r.Host, r.Header.Get("X-Sallyport-Identity"), r.Header.Get("Authorization"))
	})}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { server.Close() })
}

// command is sallyport as the person at the client runs it: with a home, and no Workload API.
func (w *people) command(args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(w.bin, "sallyport"), args...)
	cmd.Env = []string{"HOME=" + w.home, "PATH=" + os.Getenv("PATH")}
	return cmd
}

func (w *people) person(t *testing.T, args ...string) said {
	t.Helper()
	cmd := w.command(args...)
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	p, err := w.Client.Start(cmd)
	must(t, err)
	err = p.Wait(within(t, patience))
	return said{out.String(), errs.String(), err}
}

var addressOf = regexp.MustCompile(`https://\S+/(auth|device)\?\S+`)

// logIn runs the command, and does at the provider what it says.
func (w *people) logIn(t *testing.T, who, as string, device bool, more ...string) {
	t.Helper()
	args := append([]string{"login", "--provider", w.provider.Issuer, "--client-id", "sallyport", "--ca", filepath.Join(w.Dir, "provider.pem"), "--as", as}, more...)
	if device {
		args = append(args, "--device")
	}
	p, err := w.Client.Start(w.command(args...))
	must(t, err)
	waitUntil(t, "where to log in", func() bool { return addressOf.MatchString(p.Output()) })
	_, err = w.provider.Person(who, addressOf.FindString(p.Output()))
	must(t, err)
	must(t, p.Wait(within(t, patience)))
	if !strings.Contains(p.Output(), "logged in as "+who) {
		t.Fatalf("login: %s", p.Output())
	}
}

// tokenFlags are those of connect and forward.
func (w *people) tokenFlags(login string) []string {
	return []string{"--login", login, "--server-name", dbName, "--server-ca", filepath.Join(w.Dir, "web.pem")}
}

func (w *people) pgAt() netip.AddrPort {
	return netip.AddrPortFrom(w.Node.Addr(lab.IPv4), postgresPort)
}

// forwardAs listens for local clients, and gives where.
func (w *people) forwardAs(t *testing.T, to netip.AddrPort, login string, more ...string) (*lab.Process, netip.AddrPort) {
	t.Helper()
	args := append([]string{"forward", "-o", "json", "--listen", "127.0.0.1:0", "--to", to.String()}, append(w.tokenFlags(login), more...)...)
	p, err := w.Client.Start(w.command(args...))
	must(t, err)
	var ready struct{ Listen netip.AddrPort }
	waitUntil(t, "the tunnel", func() bool {
		line, _, ended := strings.Cut(p.Output(), "\n")
		return ended && json.Unmarshal([]byte(line), &ready) == nil
	})
	t.Cleanup(func() { must(t, p.Signal(syscall.SIGTERM)); <-p.Exited() })
	return p, ready.Listen
}

func (w *people) psqlByToken(t *testing.T) {
	_, local := w.forwardAs(t, w.pgAt(), "default")
	if seen, err := w.psql(t, local, "prefer"); err != nil || seen != w.Client.Addr(lab.IPv4).String() {
		t.Errorf("database saw %q, %v", seen, err)
	}
	r := w.log.find(t, "psql", func(r record) bool { return r.Service == "pg" && r.Event == "CLOSE" && r.Identity == "corp/ann" })
	if r.Proof != "oidc" || r.Verdict != "PROXIED" || r.BytesToClient == 0 {
		t.Errorf("record %+v", r)
	}
	p, local := w.forwardAs(t, w.pgAt(), "bob")
	if seen, err := w.psql(t, local, "disable"); err == nil {
		t.Errorf("psql of somebody who may not was answered as %s", seen)
	}
	waitUntil(t, "why", func() bool {
		return strings.Contains(p.Output(), "403 Forbidden, NOT_AUTHORISED") && strings.Contains(p.Output(), "hint=")
	})
}

// ssh runs OpenSSH's client in the client's namespace, through that command.
func (w *people) ssh(t *testing.T, proxy ...string) (string, error) {
	t.Helper()
	cmd := exec.Command("ssh", "-F", "none", "-o", "ProxyCommand="+strings.Join(append([]string{filepath.Join(w.bin, "sallyport"), "connect", "%h:%p"}, proxy...), " "),
		"-o", "UserKnownHostsFile="+filepath.Join(w.Dir, "known"), "-o", "StrictHostKeyChecking=accept-new", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes",
		"-i", filepath.Join(w.Dir, "ssh-user"), "root@"+w.Pod.Addr(lab.IPv4).String(), "echo from $SSH_CONNECTION; head -c 100000 /dev/zero | wc -c")
	cmd.Env = []string{"HOME=" + w.home, "PATH=" + os.Getenv("PATH")}
	p, err := w.Client.Start(cmd)
	must(t, err)
	err = p.Wait(within(t, patience))
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil // ssh ended well; what carried it sees that a little later
	}
	return p.Output(), err
}

func (w *people) sshByBoth(t *testing.T) {
	for who, flags := range map[string][]string{
		"corp/ann":   w.tokenFlags("default"),
		web.String(): {"--workload-api", "unix://" + w.socket(web), "--server-id", proxyID.String()},
	} {
		out, err := w.ssh(t, flags...)
		if err != nil || !strings.Contains(out, "from "+w.Client.Addr(lab.IPv4).String()+" ") || !strings.Contains(out, "100000") {
			t.Errorf("%s: %v %s", who, err, out)
		}
		r := w.log.find(t, "ssh", func(r record) bool { return r.Service == "ssh" && r.Event == "CLOSE" && r.Identity == who })
		if r.Application != "ssh" || r.BytesToClient < 100000/1000 {
			t.Errorf("record %+v", r)
		}
	}
	if out, err := w.ssh(t, w.tokenFlags("bob")...); err == nil || !strings.Contains(out, "hint: the token is good, and its owner may not come in") {
		t.Errorf("ssh of somebody who may not: %v %s", err, out)
	}
}

func (w *people) curlByToken(t *testing.T) {
	_, local := w.forwardAs(t, netip.AddrPortFrom(w.Node.Addr(lab.IPv4), wikiAt), "default", "--http")
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"served":                        {[]string{"/public/a?b"}, fmt.Sprintf("/public/a?b at %s:%d as corp/ann, authorization \"\" 200", dbName, wikiAt)},
		"another page":                  {[]string{"/private"}, "NOT_AUTHORISED"},
		"h2c":                           {[]string{"/public/a", "--http2-prior-knowledge"}, "200"},
		"a site's name that leads here": {[]string{"/public/a", "-H", "Host: evil.example.org"}, "403"},
		"a page of another site":        {[]string{"/public/a", "-H", "Origin: https://evil.example.org"}, "403"},
		"one that a browser tells of":   {[]string{"/public/a", "-H", "Sec-Fetch-Site: cross-site"}, "403"},
	} {
		out, err := w.Client.Run(within(t, patience), "curl", append([]string{"-sS", "--write-out", " %{http_code}", "http://" + local.String() + c.args[0]}, c.args[1:]...)...)
		if err != nil || !strings.Contains(out, c.want) {
			t.Errorf("%s: %v %s", name, err, out)
		}
	}
	w.log.find(t, "the request", func(r record) bool {
		return r.Service == "wiki" && r.Event == "REQUEST" && r.Identity == "corp/ann" && r.Proof == "oidc"
	})
}

// turnedAway: each with its exit code, in words, and with what next.
func (w *people) turnedAway(t *testing.T) {
	pg, wiki := w.pgAt().String(), netip.AddrPortFrom(w.Node.Addr(lab.IPv4), wikiAt).String()
	raw := netip.AddrPortFrom(w.Node.Addr(lab.IPv4), hostPort).String()
	for name, c := range map[string]struct {
		args []string
		code int
		says string
	}{
		"not allowed":           {append([]string{pg}, w.tokenFlags("bob")...), 3, "403 Forbidden, NOT_AUTHORISED"},
		"wrong audience":        {append([]string{pg}, w.tokenFlags("elsewhere")...), 3, "hint: `sallyport whoami` tells for whom the token is"},
		"no such login":         {append([]string{pg}, w.tokenFlags("carol")...), 3, "hint: log in: `sallyport login --as carol"},
		"service speaks HTTP":   {append([]string{wiki}, w.tokenFlags("default")...), 3, "takes them with `sallyport forward --http`"},
		"service without token": {append([]string{raw}, w.tokenFlags("default")...), 3, "or it takes no tokens there"},
		"another name":          {[]string{pg, "--login", "default", "--server-ca", filepath.Join(w.Dir, "web.pem"), "--server-name", "other.example.org"}, 3, "hint: name its CA with --server-ca"},
		"nobody listens":        {append([]string{w.Node.Addr(lab.IPv4).String() + ":1"}, w.tokenFlags("default")...), 4, "hint: check --to"},
		"flags without login":   {[]string{pg, "--server-name", "a"}, 2, "hint: add --login NAME"},
	} {
		s := w.person(t, append([]string{"connect"}, c.args...)...)
		var exit *exec.ExitError
		if !errors.As(s.err, &exit) || exit.ExitCode() != c.code || !strings.Contains(s.stderr, c.says) || !strings.Contains(s.stderr, "\nhint: ") {
			t.Errorf("%s: %s", name, s)
		}
	}
	w.log.find(t, "the wrong audience", func(r record) bool { return r.Service == "pg" && r.Reason == "TOKEN_REFUSED" && r.Event == "DENY" })
}

// hold is a connection of connect that the database has answered.
func (w *people) hold(t *testing.T, login string) (*lab.Process, io.WriteCloser) {
	t.Helper()
	cmd := w.command(append([]string{"connect", w.pgAt().String()}, w.tokenFlags(login)...)...)
	in, err := cmd.StdinPipe()
	must(t, err)
	p, err := w.Client.Start(cmd)
	must(t, err)
	_, err = in.Write([]byte("\x00\x00\x00\x08\x04\xd2\x16\x2f")) // PostgreSQL's question whether it speaks TLS
	must(t, err)
	waitUntil(t, "the database's no", func() bool { return p.Output() == "N" })
	return p, in
}

// cutByToken: who may not come in any more is cut.
func (w *people) cutByToken(t *testing.T) {
	p, in := w.hold(t, "default")
	defer in.Close()
	w.writeResources(t, "20-people.yaml", w.takes("[corp]", `[{subjects: [corp/carol]}]`))
	if err := p.Wait(within(t, patience)); errors.Is(err, context.DeadlineExceeded) {
		t.Fatal("the connection goes on")
	}
	if !strings.Contains(p.Output(), "hint: the connection was cut") {
		t.Errorf("connect says %q", p.Output())
	}
	w.log.find(t, "the cut", func(r record) bool {
		return r.Service == "pg" && r.Event == "CLOSE" && r.Reason == "POLICY_CHANGED" && r.Identity == "corp/ann"
	})
	w.writeResources(t, "20-people.yaml", w.takes("[corp]", `[{subjects: [corp/ann]}]`))
	waitUntil(t, "the way in again", func() bool {
		return w.person(t, append([]string{"connect", w.pgAt().String()}, w.tokenFlags("default")...)...).err == nil
	})
}

// providerAway: what was proven goes on, kept keys serve, and a login is over when it cannot be renewed.
func (w *people) providerAway(t *testing.T) {
	_, in := w.hold(t, "default")
	in.Close()
	w.provider.Stop()
	p, in := w.hold(t, "default")
	in.Close()
	must(t, p.Wait(within(t, patience)))
	file := filepath.Join(w.home, ".local/state/sallyport/logins/default.json")
	text, err := os.ReadFile(file)
	must(t, err)
	write(t, file, regexp.MustCompile(`"expires": "[^"]*"`).ReplaceAllString(string(text), `"expires": "2020-01-01T00:00:00Z"`))
	s := w.person(t, append([]string{"connect", w.pgAt().String()}, w.tokenFlags("default")...)...)
	var exit *exec.ExitError
	if !errors.As(s.err, &exit) || exit.ExitCode() != 4 || !strings.Contains(s.stderr, "the identity provider gave no answer") {
		t.Errorf("provider away, token expired: %s", s)
	}
	write(t, file, regexp.MustCompile(`"refresh": "[^"]*"`).ReplaceAllString(regexp.MustCompile(`"expires": "[^"]*"`).ReplaceAllString(string(text), `"expires": "2020-01-01T00:00:00Z"`), `"refresh": ""`))
	s = w.person(t, append([]string{"connect", w.pgAt().String()}, w.tokenFlags("default")...)...)
	if !errors.As(s.err, &exit) || exit.ExitCode() != 3 || !strings.Contains(s.stderr, "hint: log in again: `sallyport login --as default`") {
		t.Errorf("token expired, nothing to renew it with: %s", s)
	}
	if s := w.person(t, "logout"); s.err != nil || !strings.Contains(s.stderr, "the provider was not told") && strings.Contains(string(text), `"refresh"`) && s.stderr != "" {
		t.Errorf("logout: %s", s)
	}
	if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after the logout: %v", err)
	}
}
