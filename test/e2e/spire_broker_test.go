//go:build spire

package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/pkg/identity"
	"github.com/sallyport-dev/sallyport/test/lab"
)

var (
	delegate = spiffeid.RequireFromPath(domain, "/sallyport/agent/"+nodeName)
	partner  = spiffeid.RequireTrustDomainFromString("partner.example")
)

// spireOffice is a real SPIRE whose agent tells the test of other processes, by both APIs.
type spireOffice struct {
	*lab.Lab
	spire         *devauthority.SPIRE
	issuer, local *lab.Process
	source        *identity.Source
	watches       []*spireWatch // of the same process, by each API
	child         *exec.Cmd
}

// spireWatch is what one API tells of the process.
type spireWatch struct {
	api string
	end chan error

	mu       sync.Mutex
	told     identity.Attested // guarded by mu
	unusable int               // guarded by mu; times that it was told so
}

// TestSPIREBrokers (`make test-spire`) asks a real spire-agent who another process is, by the SPIFFE Broker API and by the
// Delegated Identity API at a time.
func TestSPIREBrokers(t *testing.T) {
	if err := devauthority.CheckSPIRE(os.Getenv(devauthority.SPIREVariable)); err != nil {
		t.Fatalf("%v\nhint: %s", err, devauthority.SPIREHint)
	}
	s := startSPIREOffice(t)
	s.all(t, "no entry: unissued", identity.Unissued)
	s.register(t, "web")
	s.all(t, "entry to identity", identity.Fresh)
	s.verifies(t)
	s.rotated(t)
	s.away(t)
	s.deleted(t)
	s.federated(t)
	s.ends(t)
}

func startSPIREOffice(t *testing.T) *spireOffice {
	t.Helper()
	s := &spireOffice{Lab: lab.New(t, lab.Options{})}
	var err error
	s.spire, err = devauthority.NewSPIRE(devauthority.SPIREConfig{
		Bin: os.Getenv(devauthority.SPIREVariable), Dir: filepath.Join(s.Dir, "spire"), Socket: filepath.Join(s.Dir, "workload", "agent.sock"),
		TrustDomain: domain, Port: 8481, Delegates: []spiffeid.ID{delegate},
	})
	must(t, err)
	s.issuer, err = s.Node.Start(s.spire.Server())
	must(t, err)
	must(t, s.spire.Join(within(t, patience)))
	s.startAgent(t)
	must(t, s.spire.Ready(within(t, patience)))
	self, err := os.Executable()
	must(t, err)
	must(t, s.spire.Register(within(t, patience), "self", delegate, spireTTL, "unix:path:"+self))
	s.source, err = identity.New(identity.Config{Address: s.spire.Address(), ID: delegate})
	must(t, err)
	background(t, s.source.Run)
	must(t, s.source.Wait(within(t, spireServed)))

	s.child = exec.Command(s.program(t), "1h")
	must(t, s.child.Start())
	t.Cleanup(func() { _ = s.child.Process.Kill(); _ = s.child.Wait() })
	spiffe, err := identity.NewSPIFFEBroker(identity.BrokerConfig{Address: s.spire.BrokerAddress()}, s.source, domain)
	must(t, err)
	t.Cleanup(func() { _ = spiffe.Close() })
	delegated, err := identity.NewSPIREDelegated(identity.BrokerConfig{Address: s.spire.DelegatedAddress()})
	must(t, err)
	t.Cleanup(func() { _ = delegated.Close() })
	s.watch(t, "broker", spiffe)
	s.watch(t, "delegated", delegated)
	return s
}

func (s *spireOffice) startAgent(t *testing.T) {
	t.Helper()
	var err error
	s.local, err = s.Node.Start(s.spire.Agent())
	must(t, err)
}

// program is one that SPIRE tells from all others, by its path.
func (s *spireOffice) program(t *testing.T) string {
	t.Helper()
	sleep, err := exec.LookPath("sleep")
	must(t, err)
	text, err := os.ReadFile(sleep)
	must(t, err)
	path := filepath.Join(s.Dir, "web")
	must(t, os.WriteFile(path, text, 0o755))
	return path
}

func (s *spireOffice) watch(t *testing.T, api string, b identity.Broker) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	w := &spireWatch{api: api, end: make(chan error, 1)}
	go func() {
		w.end <- b.Watch(ctx, identity.Workload{PID: int32(s.child.Process.Pid)}, w.tell)
		close(w.end)
	}()
	t.Cleanup(func() { cancel(); <-w.end })
	s.watches = append(s.watches, w)
}

func (w *spireWatch) tell(a identity.Attested) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.told = a
	if !a.State.Usable() {
		w.unusable++
	}
}

func (w *spireWatch) now() identity.Attested {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.told
}

// each waits for what both APIs come to tell, and says how long that took.
func (s *spireOffice) each(t *testing.T, what string, most time.Duration, holds func(identity.Attested) bool) {
	t.Helper()
	began := time.Now()
	for _, w := range s.watches {
		for !holds(w.now()) {
			if time.Since(began) > most {
				t.Fatalf("%s: %s: not within %s: %+v; own identity %+v", what, w.api, most, w.now(), s.source.Status())
			}
			time.Sleep(100 * time.Millisecond) // between two looks
		}
		t.Logf("%s: %s: after %s: %s %v %v", what, w.api, since(began), w.now().State, w.now().IDs, w.now().Err)
	}
}

func (s *spireOffice) all(t *testing.T, what string, state identity.State) {
	t.Helper()
	s.each(t, what, spireServed, func(a identity.Attested) bool { return a.State == state && (len(a.IDs) > 0) == state.Usable() })
}

func (s *spireOffice) register(t *testing.T, entry string, federates ...string) {
	t.Helper()
	flags := []string{"entry", "create", "-entryID", entry, "-parentID", "spiffe://" + domain.Name() + "/spire-node", "-spiffeID", web.String(),
		"-x509SVIDTTL", fmt.Sprint(int(spireTTL.Seconds())), "-selector", "unix:path:" + filepath.Join(s.Dir, "web")}
	for _, td := range federates {
		flags = append(flags, "-federatesWith", td)
	}
	_, err := s.spire.Control(within(t, patience), flags...)
	must(t, err)
}

// verifies: what is told is the other's identity, and not our own.
func (s *spireOffice) verifies(t *testing.T) {
	t.Helper()
	for _, w := range s.watches {
		a := w.now()
		id, _, err := x509svid.Verify(a.SVIDs[0].Certificates, a.Bundles)
		if err != nil || id != web || len(a.IDs) != 1 {
			t.Errorf("%s: certificate is of %s (%v), told %v", w.api, id, err, a.IDs)
		}
	}
}

// rotated: SPIRE renews each minute, and nothing is missing meanwhile.
func (s *spireOffice) rotated(t *testing.T) {
	t.Helper()
	before := map[string]bool{}
	for _, w := range s.watches {
		before[serial(w.now().SVIDs[0])] = true
		w.mu.Lock()
		w.unusable = 0
		w.mu.Unlock()
	}
	s.each(t, "renewed", spireTTL, func(a identity.Attested) bool {
		return a.State == identity.Fresh && !before[serial(a.SVIDs[0])]
	})
	for _, w := range s.watches {
		if w.unusable > 0 {
			t.Errorf("%s: without an identity %d times", w.api, w.unusable)
		}
	}
}

// away: while SPIRE's agent is stopped, what it said counts.
func (s *spireOffice) away(t *testing.T) {
	t.Helper()
	must(t, s.local.Stop(patience))
	s.all(t, "agent stopped", identity.StaleValid)
	s.startAgent(t)
	s.all(t, "agent started", identity.Fresh)
}

func (s *spireOffice) deleted(t *testing.T) {
	t.Helper()
	must(t, s.spire.Delete(within(t, patience), "web"))
	s.all(t, "entry deleted", identity.Withdrawn)
}

// federated: an entry may name another trust domain, which is trusted for its workload alone and until the federation
// ends. The test's own entry names it, too, and verifies its certificates and tokens.
func (s *spireOffice) federated(t *testing.T) {
	t.Helper()
	foreign, err := devauthority.New(partner, devauthority.Options{})
	must(t, err)
	bundle, err := foreign.TrustBundle().Marshal()
	must(t, err)
	file := filepath.Join(s.Dir, "partner.json")
	must(t, os.WriteFile(file, bundle, 0o600))
	_, err = s.spire.Control(within(t, patience), "bundle", "set", "-id", partner.IDString(), "-format", "spiffe", "-path", file)
	must(t, err)
	s.register(t, "web-federated", partner.IDString())
	self, err := os.Executable()
	must(t, err)
	_, err = s.spire.Control(within(t, patience), "entry", "update", "-entryID", "self", "-parentID", "spiffe://"+domain.Name()+"/spire-node",
		"-spiffeID", delegate.String(), "-x509SVIDTTL", fmt.Sprint(int(spireTTL.Seconds())), "-selector", "unix:path:"+self,
		"-federatesWith", partner.IDString())
	must(t, err)
	trusted := func(a identity.Attested) bool {
		if a.Bundles == nil {
			return false
		}
		_, err := a.Bundles.GetX509BundleForTrustDomain(partner)
		return err == nil
	}
	s.each(t, "federated", spireServed, func(a identity.Attested) bool { return a.State == identity.Fresh && trusted(a) })
	visitor := spiffeid.RequireFromPath(partner, "/web")
	svid, err := foreign.Issue(visitor)
	must(t, err)
	token, err := foreign.IssueToken(visitor, "service")
	must(t, err)
	s.own(t, "own: partner's certificates and tokens are trusted", func() bool { return s.trusts(svid, token, true) })
	_, err = s.spire.Control(within(t, patience), "bundle", "delete", "-id", partner.IDString(), "-mode", "dissociate")
	must(t, err)
	s.each(t, "federation ended", spireServed, func(a identity.Attested) bool { return a.State == identity.Fresh && !trusted(a) })
	s.own(t, "own: partner's certificates and tokens are trusted no more", func() bool { return s.trusts(svid, token, false) })
}

func (s *spireOffice) trusts(svid *x509svid.SVID, token string, want bool) bool {
	_, _, err := x509svid.Verify(svid.Certificates, s.source)
	_, tokenErr := jwtsvid.ParseAndValidate(token, s.source, []string{"service"})
	return (err == nil) == want && (tokenErr == nil) == want
}

func (s *spireOffice) own(t *testing.T, what string, holds func() bool) {
	t.Helper()
	began := time.Now()
	for !holds() {
		if time.Since(began) > spireServed {
			t.Fatalf("%s: not within %s: %+v", what, spireServed, s.source.Status())
		}
		time.Sleep(100 * time.Millisecond) // between two looks
	}
	t.Logf("%s: after %s", what, since(began))
}

// ends: nothing is left of a process that has ended.
func (s *spireOffice) ends(t *testing.T) {
	t.Helper()
	must(t, s.child.Process.Kill())
	began := time.Now()
	for _, w := range s.watches {
		select {
		case err := <-w.end:
			if a := w.now(); !errors.Is(err, identity.ErrEnded) || len(a.IDs)+len(a.SVIDs) > 0 {
				t.Errorf("%s: ended with %v, left %+v", w.api, err, a)
			}
		case <-time.After(patience):
			t.Fatalf("%s: the watch outlives its process", w.api)
		}
	}
	t.Logf("process ended: both watches ended after %s", since(began))
}
