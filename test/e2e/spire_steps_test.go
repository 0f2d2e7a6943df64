//go:build spire

package e2e_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/sallyport-dev/sallyport/pkg/identity"
)

// spireLoad is what clients saw while something was done to SPIRE.
type spireLoad struct {
	s *spireWorld
	t *testing.T

	mu         sync.Mutex
	requests   int             // guarded by mu
	failures   []string        // guarded by mu
	own, proxy map[string]bool // guarded by mu; serial numbers of certificates
	late       []time.Duration // guarded by mu; from the due end of live connections to their end
}

// under runs f while requesters connect again and again, and keepers hold on to one connection each for as long as it lasts.
func (s *spireWorld) under(t *testing.T, requesters, keepers int, f func()) *spireLoad {
	t.Helper()
	l := &spireLoad{s: s, t: t, own: map[string]bool{}, proxy: map[string]bool{}}
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for range requesters {
		clients.Go(func() { l.request(stop) })
	}
	for range keepers {
		clients.Go(func() { l.keep(stop) })
	}
	f()
	close(stop)
	clients.Wait()
	t.Logf("%d requests, %d failed; certificates seen: %d of the client, %d of the proxy; %d live connections ended by the end of theirs",
		l.requests, len(l.failures), len(l.own), len(l.proxy), len(l.late))
	for _, f := range l.failures[:min(len(l.failures), 10)] {
		t.Error(f)
	}
	if len(l.failures) > 0 { // what the node says of it is gone with the test
		for _, r := range s.log.all(t) {
			if r.Event == "DENY" || r.Event == "CLOSE" && r.Reason != "CLOSED" {
				t.Logf("record %s: %s", r, r.Detail)
			}
		}
	}
	return l
}

func (l *spireLoad) request(stop <-chan struct{}) {
	pace := time.NewTicker(50 * time.Millisecond)
	defer pace.Stop()
	for {
		v, err := l.s.open(l.t.Context(), l.s.source, l.s.source)
		if err == nil {
			v.Close()
		}
		l.saw(v, err)
		select {
		case <-pace.C:
		case <-stop:
			return
		}
	}
}

func (l *spireLoad) saw(v visit, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.requests++
	if err != nil {
		l.failures = append(l.failures, fmt.Sprintf("%s: %v", time.Now().Format(time.TimeOnly), err))
		return
	}
	l.own[serial(v.shown)], l.proxy[serial(v.met)] = true, true
}

// keep asks on one connection until it ends, which must be when its certificate and the grace are over.
func (l *spireLoad) keep(stop <-chan struct{}) {
	pace := time.NewTicker(200 * time.Millisecond)
	defer pace.Stop()
	for {
		v, err := l.s.open(l.t.Context(), l.s.source, l.s.source)
		l.saw(v, err)
		for err == nil {
			select {
			case <-pace.C:
			case <-stop:
				v.Close()
				return
			}
			if err = v.ask(); err != nil {
				l.ended(v, err)
				v.Close()
			} else {
				l.saw(v, nil)
			}
		}
	}
}

func (l *spireLoad) ended(v visit, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	late := time.Since(notAfter(v.shown).Add(spireGrace))
	if late < 0 || late > spireSlack {
		l.failures = append(l.failures, fmt.Sprintf("%s: a live connection was cut %s after its due end: %v", time.Now().Format(time.TimeOnly), late, err))
		return
	}
	l.late = append(l.late, late)
}

// rotation: SPIRE renews every certificate each minute, and nobody notices but who is too long on one connection.
func (s *spireWorld) rotation(t *testing.T) {
	l := s.under(t, 4, 8, func() { <-time.After(2*spireTTL + time.Minute) })
	if len(l.own) < 4 || len(l.proxy) < 4 {
		t.Errorf("%d certificates of the client and %d of the proxy in 5 minutes, want 4 of each at least", len(l.own), len(l.proxy))
	}
	if len(l.late) == 0 {
		t.Fatal("no connection outlived its certificate")
	}
	t.Logf("live connections ended %s to %s after certificate and grace", slices.Min(l.late), slices.Max(l.late))
	s.log.find(t, "a connection that outlived its certificate", func(r record) bool { return r.Event == "CLOSE" && r.Reason == "IDENTITY_EXPIRED" })
}

// authority runs a step of the replacement of SPIRE's signing key.
func (s *spireWorld) authority(t *testing.T, step string, flags ...string) string {
	t.Helper()
	out, err := s.spire.Control(within(t, patience), append([]string{"localauthority", "x509", step, "-output", "json"}, flags...)...)
	must(t, err)
	return out
}

// authorities are the ids of SPIRE's signing keys, by their state.
func (s *spireWorld) authorities(t *testing.T) map[string]string {
	t.Helper()
	var answer map[string]struct {
		ID string `json:"authority_id"`
	}
	out := s.authority(t, "show")
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	ids := map[string]string{}
	for state, a := range answer {
		ids[state] = a.ID
	}
	return ids
}

func (s *spireWorld) trusts(authorities int) func() bool {
	return func() bool {
		b, err := s.source.GetX509BundleForTrustDomain(domain)
		return err == nil && len(b.X509Authorities()) == authorities
	}
}

// keyReplaced: SPIRE's signing key is replaced in its own four steps. The last takes trust from the old one, and with it
// from connections that it vouched for.
func (s *spireWorld) keyReplaced(t *testing.T) {
	held, err := s.open(t.Context(), s.source, s.source)
	must(t, err)
	defer held.Close()
	signer := func(svid *x509svid.SVID) []byte { return svid.Certificates[0].AuthorityKeyId }
	l := s.under(t, 4, 0, func() {
		s.authority(t, "prepare")
		s.until(t, "prepared: both keys are trusted", spireServed, s.trusts(2))
		ids := s.authorities(t)
		s.authority(t, "activate", "-authorityID", ids["prepared"])
		s.authority(t, "taint", "-authorityID", ids["active"])
		s.until(t, "tainted: client and proxy have certificates of the new key", spireServed, func() bool {
			v, err := s.open(t.Context(), s.source, s.source)
			if err != nil {
				t.Errorf("connect: %v", err)
				return false
			}
			v.Close()
			return !bytes.Equal(signer(v.shown), signer(held.shown)) && !bytes.Equal(signer(v.met), signer(held.met))
		})
		must(t, held.ask())
		s.authority(t, "revoke", "-authorityID", ids["active"])
		s.until(t, "revoked: a live connection of the old key is cut", spireServed, func() bool { return held.ask() != nil })
		s.until(t, "revoked: the new key alone is trusted", spireServed, s.trusts(1))
	})
	if l.requests == 0 {
		t.Error("nothing was asked meanwhile")
	}
	r := s.log.find(t, "the cut", of(unmapped(held.LocalAddr()), "CLOSE", "PROXIED", "POLICY_CHANGED"))
	t.Logf("in the log: %s: %s", r, r.Detail)
}

// due checks when something came.
func due(t *testing.T, what string, at time.Time) {
	t.Helper()
	late := time.Since(at)
	t.Logf("%s: %s after it was due", what, late.Round(time.Millisecond))
	if late < 0 || late > spireSlack {
		t.Errorf("%s came %s after it was due", what, late)
	}
}

// clientDeleted: our own clients stop when SPIRE tells them. Who keeps a certificate can use it until it ends, and a live
// connection for the grace after that.
func (s *spireWorld) clientDeleted(t *testing.T) {
	stop, forward := s.forward(t, s.way.to, web)
	defer stop()
	held, err := s.open(t.Context(), s.source, s.source)
	must(t, err)
	defer held.Close()
	must(t, s.spire.Delete(within(t, patience), "web"))
	must(t, s.spire.Delete(within(t, patience), "cli"))
	t.Logf("deleted; the certificate that was shown is valid for another %s", time.Until(notAfter(held.shown)).Round(time.Second))
	s.until(t, "deleted: the client knows that its identity is withdrawn", spireWithdrawn, func() bool { return s.source.Status().State == identity.Withdrawn })
	t.Logf("SPIRE says: %v", s.source.Status().Err)
	if err := s.once(t); err == nil {
		t.Error("the withdrawn identity connected")
	}
	s.until(t, "deleted: sallyport forward is refused", spireWithdrawn, func() bool {
		_, _, err := s.Client.Ask(t.Context(), netip.AddrPort{}, forward)
		return err != nil
	})
	must(t, held.ask())
	if time.Until(notAfter(held.shown)) > time.Second {
		must(t, s.onceAs(t, held.shown))
	}
	s.until(t, "deleted: who kept the certificate is refused", spireTTL+spireSlack, func() bool { return s.onceAs(t, held.shown) != nil })
	due(t, "the refusal", notAfter(held.shown))
	s.until(t, "deleted: its live connection is cut", spireGrace+spireSlack, func() bool { return held.ask() != nil })
	due(t, "the cut", notAfter(held.shown).Add(spireGrace))
	r := s.log.find(t, "the cut", of(unmapped(held.LocalAddr()), "CLOSE", "PROXIED", "IDENTITY_EXPIRED"))
	t.Logf("in the log: %s: %s", r, r.Detail)
	r = s.log.find(t, "the refusal", func(r record) bool { return r.Event == "DENY" && strings.Contains(r.Detail, "expired") })
	t.Logf("in the log: %s: %s", r, r.Detail)

	s.registerWeb(t)
	s.until(t, "entry made again: served", spireServed, func() bool { return s.once(t) == nil })
}

// clientDenied: who cannot wait for a certificate to end has a DenyList, which counts for live connections, too.
func (s *spireWorld) clientDenied(t *testing.T) {
	held, err := s.open(t.Context(), s.source, s.source)
	must(t, err)
	defer held.Close()
	s.writeResources(t, "30-deny.yaml", fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: DenyList
metadata: {name: gone}
spec: {reason: its key was stolen, identities: [%q]}
`, web))
	s.until(t, "denied: its live connection is cut", patience, func() bool { return held.ask() != nil })
	if err := s.once(t); err == nil {
		t.Error("a denied identity connected")
	}
	must(t, os.Remove(filepath.Join(s.files.resources, "30-deny.yaml")))
	s.until(t, "denied no more: served", patience, func() bool { return s.once(t) == nil })
}

// proxyDeleted: a proxy that SPIRE has disowned lets nobody in.
func (s *spireWorld) proxyDeleted(t *testing.T) {
	held, err := s.open(t.Context(), s.source, s.source)
	must(t, err)
	defer held.Close()
	must(t, s.spire.Delete(within(t, patience), "proxy"))
	s.until(t, "deleted: new connections are refused", spireWithdrawn, func() bool { return s.once(t) != nil })
	r := s.log.find(t, "the refusal", func(r record) bool { return r.Event == "DENY" && r.Reason == "NO_OWN_IDENTITY" })
	t.Logf("in the log: %s: %s", r, r.Detail)
	t.Logf("a live connection: %v", held.ask())
	s.registerProxy(t)
	s.until(t, "entry made again: served", spireServed, func() bool { return s.once(t) == nil })
}

// stopLocal ends SPIRE's agent in order.
func (s *spireWorld) stopLocal(t *testing.T) {
	t.Helper()
	if err := s.local.Stop(patience); err != nil {
		t.Fatalf("stop SPIRE's agent: %v", err)
	}
}

func (s *spireWorld) startLocal(t *testing.T) {
	t.Helper()
	var err error
	s.local, err = s.Node.Start(s.spire.Agent())
	must(t, err)
}

// agentStopped: without SPIRE's agent everything goes on until certificates end, and status tells.
func (s *spireWorld) agentStopped(t *testing.T) {
	patient := s.mint(t, web, 20*time.Minute) // so that it is the proxy's certificate that ends
	v, err := s.open(t.Context(), patient, s.source)
	must(t, err)
	v.Close()
	s.stopLocal(t)
	s.until(t, "stopped: status says stale-valid", patience, func() bool { return s.statusSays(t, "stale-valid") })
	t.Logf("status: %s", s.status(t).Identity)
	requests, last := 0, v
	s.until(t, "stopped: the proxy refuses", spireTTL+spireSlack, func() bool {
		v, err := s.open(t.Context(), patient, s.source)
		if err != nil {
			t.Logf("the client sees: %v", err)
			return true
		}
		requests, last = requests+1, v
		v.Close()
		return false
	})
	t.Logf("%d requests were served meanwhile", requests)
	due(t, "the refusal", notAfter(last.met))
	r := s.log.find(t, "the refusal", func(r record) bool {
		return r.Event == "DENY" && r.Reason == "NO_OWN_IDENTITY" && strings.Contains(r.Detail, "expired")
	})
	t.Logf("in the log: %s: %s", r, r.Detail)
	s.until(t, "stopped: status says expired", spireTTL+spireSlack, func() bool { return s.statusSays(t, "expired") })
	t.Logf("status: %s", s.status(t).Identity)
	began := time.Now()
	s.startLocal(t)
	s.until(t, "started: status says fresh", spireBack, func() bool { return s.statusSays(t, "fresh") })
	s.until(t, "started: served", spireBack, func() bool { return s.once(t) == nil })
	if all := time.Since(began); all > spireBack {
		t.Errorf("back after %s, want at most %s", all, spireBack)
	}
}

// serverStopped: an agent of SPIRE that has lost its server serves what it has, and renews nothing. One that starts without its
// server knows no entries, which takes nobody's identity away.
func (s *spireWorld) serverStopped(t *testing.T) {
	must(t, s.issuer.Stop(patience))
	s.until(t, "server stopped, agent not: status says stale-valid", spireTTL, func() bool { return s.statusSays(t, "stale-valid") })
	t.Logf("status: %s", s.status(t).Identity)
	must(t, s.once(t))
	s.startIssuer(t)
	s.until(t, "server is back: fresh", spireBack, s.fresh(t))

	must(t, s.issuer.Stop(patience))
	s.stopLocal(t)
	s.startLocal(t)
	s.staysUsable(t, 30*time.Second)
	s.startIssuer(t)
	s.until(t, "server is back after a start without it: fresh", spireBack, s.fresh(t))
	must(t, s.once(t))
}

func (s *spireWorld) startIssuer(t *testing.T) {
	t.Helper()
	var err error
	s.issuer, err = s.Node.Start(s.spire.Server())
	must(t, err)
}

func (s *spireWorld) fresh(t *testing.T) func() bool {
	return func() bool { return s.source.Status().State == identity.Fresh && s.statusSays(t, "fresh") }
}

// staysUsable asks again and again, and wants no state but those of a source that is away.
func (s *spireWorld) staysUsable(t *testing.T, while time.Duration) {
	t.Helper()
	states := map[identity.State]bool{}
	look := time.NewTicker(100 * time.Millisecond)
	defer look.Stop()
	for began := time.Now(); time.Since(began) < while; <-look.C {
		st := s.source.Status()
		if !states[st.State] {
			t.Logf("%s: client %s: %v; status: %s", since(began), st.State, st.Err, s.status(t).Identity)
		}
		states[st.State] = true
		if err := s.once(t); err != nil {
			t.Fatalf("%s: %v", since(began), err)
		}
	}
}
