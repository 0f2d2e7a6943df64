//go:build spire

package e2e_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/pkg/identity"
	"github.com/sallyport-dev/sallyport/test/lab"
)

const (
	spireTTL   = 2 * time.Minute  // of what SPIRE issues: it is renewed each minute
	spireGrace = 30 * time.Second // the default of expiryGrace
	spireSlack = 5 * time.Second  // of a busy machine, after what is due

	// What ARCHITECTURE.md promises.
	spireServed    = time.Minute // from the entry to the first answer
	spireWithdrawn = time.Minute // from the entry's deletion to the first refusal, where the deletion counts at once
	spireBack      = time.Minute // from the start of SPIRE's agent to fresh
)

// spireWorld is a world whose identities come from a real SPIRE on its node.
type spireWorld struct {
	*world
	spire         *devauthority.SPIRE
	issuer, local *lab.Process // SPIRE's server, and its agent
	way           way
	log           *followed
	// source is the test's own identity: it is a workload of SPIRE, by the path of its program.
	source *identity.Source
}

// TestSPIRE (`make test-spire`) has the real programs live on the identities of a real spire-server and spire-agent. Its steps
// follow each other: each leaves the world as it found it.
func TestSPIRE(t *testing.T) {
	if err := devauthority.CheckSPIRE(os.Getenv(devauthority.SPIREVariable)); err != nil {
		t.Fatalf("%v\nhint: %s", err, devauthority.SPIREHint)
	}
	s := startSPIREWorld(t)
	for _, step := range []struct {
		name string
		run  func(*spireWorld, *testing.T)
	}{
		{"entry to answer", (*spireWorld).entryToAnswer},
		{"rotation under load", (*spireWorld).rotation},
		{"signing key replaced", (*spireWorld).keyReplaced},
		{"client's entry deleted", (*spireWorld).clientDeleted},
		{"client denied", (*spireWorld).clientDenied},
		{"proxy's entry deleted", (*spireWorld).proxyDeleted},
		{"agent stopped", (*spireWorld).agentStopped},
		{"server stopped", (*spireWorld).serverStopped},
	} {
		if !t.Run(step.name, func(t *testing.T) { step.run(s, t) }) {
			return
		}
	}
	for _, d := range []*daemon{s.collector, s.agent, s.proxy} {
		for line := range strings.Lines(d.proc.Output()) {
			if strings.Contains(line, "identity state") {
				t.Logf("%s: %s", filepath.Base(d.name), line)
			}
		}
	}
}

// startSPIREWorld has SPIRE know the programs, and no client yet.
func startSPIREWorld(t *testing.T) *spireWorld {
	t.Helper()
	s := &spireWorld{}
	s.world = newWorld(t, options{plain: true, provider: s.provide})
	s.way = s.ways("host-echo", lab.IPv4)[0]
	began := time.Now()
	for _, d := range []*daemon{s.collector, s.agent, s.guard, s.proxy} {
		d.start(t)
	}
	t.Logf("programs are ready %s after their start", since(began))
	s.log = s.follow(t)
	var err error
	s.source, err = identity.New(identity.Config{Address: s.spire.Address(), ID: web})
	must(t, err)
	background(t, s.source.Run)
	return s
}

// provide starts SPIRE on the node.
func (s *spireWorld) provide(t *testing.T, w *world) string {
	t.Helper()
	socket := filepath.Join(w.Dir, "workload.sock")
	var err error
	s.spire, err = devauthority.NewSPIRE(devauthority.SPIREConfig{
		Bin: os.Getenv(devauthority.SPIREVariable), Dir: filepath.Join(w.Dir, "spire"), Socket: socket, TrustDomain: domain, Port: 8481,
	})
	must(t, err)
	s.world = w
	began := time.Now()
	s.issuer, err = w.Node.Start(s.spire.Server())
	must(t, err)
	must(t, s.spire.Join(within(t, patience)))
	s.local, err = w.Node.Start(s.spire.Agent())
	must(t, err)
	must(t, s.spire.Ready(within(t, patience)))
	t.Logf("SPIRE is ready %s after its start", since(began))
	s.register(t, "agent", spiffeid.RequireFromPath(domain, "/sallyport/agent/"+nodeName), "unix:path:"+filepath.Join(w.bin, "sallyport-agent"))
	s.register(t, "collector", spiffeid.RequireFromPath(domain, "/sallyport/collector"), "unix:path:"+filepath.Join(w.bin, "sallyport-collector"))
	s.registerProxy(t)
	return socket
}

func (s *spireWorld) register(t *testing.T, entry string, id spiffeid.ID, selectors ...string) {
	t.Helper()
	must(t, s.spire.Register(within(t, patience), entry, id, spireTTL, selectors...))
}

// registerProxy knows the proxy by its user, which nobody else is.
func (s *spireWorld) registerProxy(t *testing.T) {
	t.Helper()
	s.register(t, "proxy", proxyID, "unix:uid:65532")
}

func (s *spireWorld) registerWeb(t *testing.T) {
	t.Helper()
	self, err := os.Executable()
	must(t, err)
	s.register(t, "web", web, "unix:path:"+self)
}

func since(began time.Time) time.Duration { return time.Since(began).Round(10 * time.Millisecond) }

// until polls what SPIRE and the programs take their time for, and tells how long it was.
func (s *spireWorld) until(t *testing.T, what string, most time.Duration, done func() bool) time.Duration {
	t.Helper()
	began := time.Now()
	for !done() {
		if time.Since(began) > most {
			t.Fatalf("%s: not within %s; own identity %+v, status %q", what, most, s.source.Status(), s.status(t).Identity)
		}
		time.Sleep(100 * time.Millisecond) // between two looks
	}
	t.Logf("%s: after %s", what, since(began))
	return time.Since(began)
}

// visit is one connection through the proxy.
type visit struct {
	net.Conn
	shown, met *x509svid.SVID // our certificate, and the proxy's
}

// open connects as whoever svid and bundles are, and asks once.
func (s *spireWorld) open(ctx context.Context, from x509svid.Source, bundles x509bundle.Source) (v visit, err error) {
	if v.shown, err = from.GetX509SVID(); err != nil {
		return v, err
	}
	raw, err := s.way.dial(ctx)
	if err != nil {
		return v, err
	}
	conn := tls.Client(raw, tlsconfig.MTLSClientConfig(v.shown, bundles, tlsconfig.AuthorizeID(proxyID)))
	v.Conn = conn
	if err = conn.HandshakeContext(ctx); err == nil {
		v.met = &x509svid.SVID{Certificates: conn.ConnectionState().PeerCertificates}
		err = v.ask()
	}
	if err != nil {
		raw.Close()
	}
	return v, err
}

// ask wants the service's answer, by way of the proxy.
func (v visit) ask() error {
	seen, err := lab.Ask(v.Conn)
	if o := judge(unmapped(v.LocalAddr()), seen, err); o.who != proxied {
		return fmt.Errorf("answered by %s: %w", o, err)
	}
	return nil
}

// once connects as the test's own identity and closes.
func (s *spireWorld) once(t *testing.T) error {
	t.Helper()
	return s.onceAs(t, s.source)
}

func (s *spireWorld) onceAs(t *testing.T, from x509svid.Source) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	v, err := s.open(ctx, from, s.source)
	if err == nil {
		v.Close()
	}
	return err
}

func notAfter(svid *x509svid.SVID) time.Time { return svid.Certificates[0].NotAfter }

func serial(svid *x509svid.SVID) string { return svid.Certificates[0].SerialNumber.String() }

// mint has SPIRE's server issue a certificate past its agent, for a client that does not live on it.
func (s *spireWorld) mint(t *testing.T, id spiffeid.ID, ttl time.Duration) *x509svid.SVID {
	t.Helper()
	dir := t.TempDir()
	_, err := s.spire.Control(within(t, patience), "x509", "mint", "-spiffeID", id.String(), "-ttl", ttl.String(), "-write", dir)
	must(t, err)
	svid, err := x509svid.Load(filepath.Join(dir, "svid.pem"), filepath.Join(dir, "key.pem"))
	must(t, err)
	return svid
}

// entryToAnswer: nobody's entry is refused, and each delay on the way to an answer is told.
func (s *spireWorld) entryToAnswer(t *testing.T) {
	s.until(t, "no entry: unissued", spireServed, func() bool { return s.source.Status().State == identity.Unissued })
	t.Logf("SPIRE says: %v", s.source.Status().Err)
	began := time.Now()
	s.registerWeb(t)
	t.Logf("entry created: took %s", since(began))
	s.until(t, "entry to SVID", spireServed, func() bool { return s.source.Status().State == identity.Fresh })
	s.until(t, "SVID to authenticated answer", spireServed, func() bool { return s.once(t) == nil })
	if all := time.Since(began); all > spireServed {
		t.Errorf("%s from entry to answer, want at most %s", all, spireServed)
	}
	r := s.log.find(t, "the first connection", func(r record) bool { return r.Event == "OPEN" && r.Identity == web.String() })
	t.Logf("in the log: %s", r)

	s.register(t, "cli", web, "unix:path:"+filepath.Join(s.bin, "sallyport"))
	stop, local := s.forward(t, s.way.to, web)
	if _, seen, err := s.Client.Ask(within(t, patience), netip.AddrPort{}, local); err != nil || seen.Addr() != s.way.from {
		t.Errorf("by sallyport forward: the service saw %s (%v), want %s", seen, err, s.way.from)
	}
	stop()
}

// statusSays looks at what people are told.
func (s *spireWorld) statusSays(t *testing.T, text string) bool {
	t.Helper()
	return strings.HasPrefix(s.status(t).Identity, text)
}
