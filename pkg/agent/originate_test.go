package agent

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/identity"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// remoteSet has a remote service at these addresses, for these callers.
func remoteSet(t *testing.T, addresses []netip.Addr, callers ...spiffeid.ID) *policy.Set {
	t.Helper()
	quoted := func(all []string) string { return `["` + strings.Join(all, `", "`) + `"]` }
	var names []string
	for _, id := range callers {
		names = append(names, id.String())
	}
	set, err := policy.Parse("remote.yaml", fmt.Appendf(nil, `apiVersion: sallyport.dev/v1alpha1
kind: RemoteService
metadata: {name: orders}
spec: {addresses: %s, ports: [5432], identities: ["spiffe://example.org/far"], callers: %s}
`, quoted(texts(addresses)), quoted(names)))
	must(t, err)
	return set
}

// spoken is a proxy that asks about connections of pods, with a policy and a clock that tests change.
type spoken struct {
	*reporting
	c     *calling
	set   *policy.Set
	ahead time.Duration
}

func (c *calling) spoken(t *testing.T) *spoken {
	t.Helper()
	c.t = t
	c.authority.SetEntries(devauthority.Entry{ID: ofPodID, PodUID: testPod})
	s := &spoken{c: c, reporting: newReporting(t, func(k *sink) { k.callers = c.openers })}
	s.allow(t, ofPodID)
	clock := clock{wall: time.Now, boot: func() time.Duration { return datapath.BootTime() + s.ahead }}
	s.server.originations = newOriginations(c.openers, func() *policy.Set { return s.set }, clock)
	return s
}

func (s *spoken) allow(t *testing.T, callers ...spiffeid.ID) {
	t.Helper()
	s.set = remoteSet(t, []netip.Addr{s.c.lab.Node.Addr(lab.IPv4), s.c.lab.Node.Addr(lab.IPv6)}, callers...)
}

// connects is a connection of the pod, or of another one that nobody has registered.
func (s *spoken) connects(t *testing.T, pod string, port uint16) connection {
	t.Helper()
	group := s.c.group("kubepods/burstable/pod" + pod + "/" + testContainer)
	client, server := s.c.connects(s.c.lab.Pod, group, group, s.c.lab.Pod.Addr(lab.IPv4), port)
	return connection{client, server}
}

func (c connection) request() *api.CallerRequest {
	return &api.CallerRequest{Protocol: "tcp", Client: c.client.String(), Server: c.server.String()}
}

// asks is the proxy's first question, which has to be answered with a chain.
func (s *spoken) asks(t *testing.T, c connection) *x509.Certificate {
	t.Helper()
	reply, err := s.client.Caller(t.Context(), c.request())
	must(t, err)
	if len(reply.GetChain()) == 0 {
		t.Fatalf("no certificates: %v", reply)
	}
	leaf, err := x509.ParseCertificate(reply.GetChain()[0])
	must(t, err)
	return leaf
}

// signs asks for a signature of that digest.
func (s *spoken) signs(t *testing.T, c connection, leaf *x509.Certificate, change func(*api.SignRequest)) ([]byte, error) {
	t.Helper()
	of, digest := sha256.Sum256(leaf.Raw), sha256.Sum256([]byte("transcript"))
	q := &api.SignRequest{Connection: c.request(), Leaf: of[:], Digest: digest[:], Hash: uint32(crypto.SHA256)}
	if change != nil {
		change(q)
	}
	reply, err := s.client.Sign(t.Context(), q)
	return reply.GetSignature(), err
}

// testSpokenFor: a connection to a remote service gets the certificates of its workload, where policy lets that workload ask.
func (c *calling) testSpokenFor(t *testing.T) {
	s := c.spoken(t)
	web := s.connects(t, testPod, 44000)
	if id, err := x509svid.IDFromCert(s.asks(t, web)); err != nil || id != ofPodID {
		t.Errorf("certificates of %s, %v", id, err)
	}
	without := func(what string, c connection, identity string) {
		reply, err := s.client.Caller(t.Context(), c.request())
		if err != nil || len(reply.GetChain()) > 0 || reply.GetCaller().GetIdentity() != identity {
			t.Errorf("%s: %v, %v", what, reply, err)
		}
	}
	s.allow(t, ofProcessID)
	without("no caller of the service", web, ofPodID.String())
	s.set = remoteSet(t, []netip.Addr{c.lab.Client.Addr(lab.IPv4)}, ofPodID)
	without("no remote service", web, ofPodID.String())
	s.allow(t, ofPodID)
	without("no socket", connection{netip.AddrPortFrom(web.client.Addr(), 44001), web.server}, "")

	if _, err := s.client.Caller(t.Context(), s.connects(t, otherPod, 44002).request()); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "unissued") {
		t.Errorf("a pod without an identity: %v", err)
	}
	c.authority.Withdraw(ofPodID)
	c.eventually("its identity to be gone", func() bool {
		_, err := s.client.Caller(t.Context(), web.request())
		return status.Code(err) == codes.PermissionDenied && strings.Contains(err.Error(), "withdrawn")
	})
	c.authority.Restore(ofPodID)
	c.eventually("its identity to be back", func() bool { return c.who(web.client, web.server).Identity != "" })

	s.asks(t, web)
	c.authority.SetEntries(devauthority.Entry{ID: ofProcessID, PodUID: testPod})
	s.allow(t, ofPodID, ofProcessID)
	c.eventually("a connection to be refused another identity than it began with", func() bool {
		_, err := s.client.Caller(t.Context(), web.request())
		return status.Code(err) == codes.PermissionDenied && strings.Contains(err.Error(), ofPodID.String()+" is its identity no more")
	})
	if id, err := x509svid.IDFromCert(s.asks(t, s.connects(t, testPod, 44003))); err != nil || id != ofProcessID {
		t.Errorf("a new connection: certificates of %s, %v", id, err)
	}
	c.testSpokenForBefore(t, s, web)
}

// testSpokenForBefore: an agent that has just begun goes by whom the proxy says that it speaks as: by one that the workload has no more
// for nothing, and of several by that one.
func (c *calling) testSpokenForBefore(t *testing.T, s *spoken, conn connection) {
	s.server.originations = newOriginations(c.openers, func() *policy.Set { return s.set }, s.server.originations.clock)
	q := conn.request()
	q.Identity = ofPodID.String()
	if _, err := s.client.Caller(t.Context(), q); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), ofPodID.String()+" is its identity no more") {
		t.Errorf("one that the workload has no more: %v", err)
	}
	c.authority.SetEntries(devauthority.Entry{ID: ofProcessID, PodUID: testPod}, devauthority.Entry{ID: ofPodID, PodUID: testPod})
	c.eventually("certificates of the one of two that it speaks as", func() bool {
		reply, err := s.client.Caller(t.Context(), q)
		return err == nil && len(reply.GetChain()) > 0 && reply.GetCaller().GetIdentity() == ofPodID.String()
	})
	q.Identity = "web"
	if _, err := s.client.Caller(t.Context(), q); status.Code(err) != codes.InvalidArgument {
		t.Errorf("no identity: %v", err)
	}
}

// testSignedFor: what is signed is what TLS needs for a connection that was just asked about, and by its own key.
func (c *calling) testSignedFor(t *testing.T) {
	s := c.spoken(t)
	conn := s.connects(t, testPod, 45000)
	if _, err := s.signs(t, conn, s.issued(t, ofPodID), nil); status.Code(err) != codes.PermissionDenied {
		t.Errorf("before it was asked about: %v", err)
	}
	leaf := s.asks(t, conn)
	signature, err := s.signs(t, conn, leaf, nil)
	must(t, err)
	if digest := sha256.Sum256([]byte("transcript")); !ecdsa.VerifyASN1(leaf.PublicKey.(*ecdsa.PublicKey), digest[:], signature) {
		t.Error("it is not signed by the leaf's key")
	}
	t.Run("what TLS does not need", func(t *testing.T) {
		for what, change := range map[string]func(*api.SignRequest){
			"short digest":    func(q *api.SignRequest) { q.Digest = q.GetDigest()[:31] },
			"long digest":     func(q *api.SignRequest) { q.Digest = make([]byte, 1<<16) },
			"no digest":       func(q *api.SignRequest) { q.Digest = nil },
			"another hash":    func(q *api.SignRequest) { q.Hash = uint32(crypto.SHA1); q.Digest = make([]byte, 20) },
			"no hash":         func(q *api.SignRequest) { q.Hash = 0 },
			"PSS":             func(q *api.SignRequest) { q.Pss = true },
			"no leaf":         func(q *api.SignRequest) { q.Leaf = nil },
			"no connection":   func(q *api.SignRequest) { q.Connection = nil },
			"of a datagram":   func(q *api.SignRequest) { q.Connection.Protocol = "udp" },
			"a whole message": func(q *api.SignRequest) { q.Hash, q.Digest = 0, []byte("TLS 1.3, client CertificateVerify") },
		} {
			again := s.connects(t, testPod, 45000) // with its signatures to come
			s.refuses(t, what, again, s.asks(t, again), codes.InvalidArgument, change)
		}
	})
	t.Run("another's leaf", func(t *testing.T) {
		s.refuses(t, "another's", conn, s.issued(t, ofProcessID), codes.PermissionDenied, nil)
		s.refuses(t, "of a name that is its own", conn, s.issued(t, ofPodID), codes.PermissionDenied, nil)
	})
	t.Run("another connection", func(t *testing.T) {
		now := s.connects(t, testPod, 45001)
		s.refuses(t, "not asked about", now, leaf, codes.PermissionDenied, nil)
		s.asks(t, now)
		s.connects(t, testPod, 45001)
		s.refuses(t, "the next of that port", now, leaf, codes.PermissionDenied, nil)
		s.refuses(t, "none at all", connection{netip.AddrPortFrom(now.client.Addr(), 45002), now.server}, leaf, codes.PermissionDenied, nil)
	})
	t.Run("ended", func(t *testing.T) {
		now := s.connects(t, testPod, 45003)
		s.asks(t, now)
		stream := s.stream("01J8ZQ4X5M3T9V0Y2B7C6D1E4F")
		closed := audit.FlowToAPI(flow.Record{Event: flow.EventClose, CPU: -1, Seq: 1, Protocol: "tcp", Client: now.client, Server: now.server, FlowID: "x"})
		must(t, stream.Send(records(0, closed)))
		_, err := stream.Recv()
		must(t, err)
		s.refuses(t, "ended", now, leaf, codes.PermissionDenied, nil)
	})
}

// refuses to sign, for that reason.
func (s *spoken) refuses(t *testing.T, what string, c connection, leaf *x509.Certificate, want codes.Code, change func(*api.SignRequest)) {
	t.Helper()
	if got, err := s.signs(t, c, leaf, change); status.Code(err) != want || got != nil {
		t.Errorf("%s: %v, want %s", what, err, want)
	}
}

// testSignedWhile: and for as long as it is the caller's, and the caller may ask.
func (c *calling) testSignedWhile(t *testing.T) {
	s := c.spoken(t)
	conn := s.connects(t, testPod, 45000)
	leaf := s.asks(t, conn)
	t.Run("late", func(t *testing.T) {
		now := s.connects(t, testPod, 45004)
		s.asks(t, now)
		s.ahead = signFor + time.Second
		defer func() { s.ahead = 0 }()
		s.refuses(t, "late", now, leaf, codes.PermissionDenied, nil)
	})
	t.Run("policy", func(t *testing.T) {
		now := s.connects(t, testPod, 45005)
		s.asks(t, now)
		s.allow(t, ofProcessID)
		s.refuses(t, "no caller any more", now, leaf, codes.PermissionDenied, nil)
		s.set = remoteSet(t, []netip.Addr{c.lab.Client.Addr(lab.IPv4)}, ofPodID)
		s.refuses(t, "no remote service any more", now, leaf, codes.PermissionDenied, nil)
		s.allow(t, ofPodID)
	})
	t.Run("often", func(t *testing.T) {
		now := s.connects(t, testPod, 45006)
		for range signaturesEach {
			s.asks(t, now) // gives it no more of them
			_, err := s.signs(t, now, leaf, nil)
			must(t, err)
		}
		s.refuses(t, "once more", now, leaf, codes.ResourceExhausted, nil)
	})
	t.Run("rotated", func(t *testing.T) {
		now := s.connects(t, testPod, 45007)
		old := s.asks(t, now)
		for range 2 {
			_, err := s.signs(t, now, old, nil) // a handshake that was under way
			must(t, err)
			before := s.asks(t, now)
			c.authority.Rotate()
			c.eventually("the next certificate", func() bool { return !s.asks(t, now).Equal(before) })
			if !before.Equal(old) {
				s.refuses(t, "the one before the last", now, old, codes.PermissionDenied, nil)
				break
			}
		}
	})
	t.Run("replaced", func(t *testing.T) {
		now := s.connects(t, testPod, 45009)
		own := s.asks(t, now)
		c.t = t
		s.allow(t, ofPodID, ofProcessID)
		c.authority.SetEntries(devauthority.Entry{ID: ofProcessID, PodUID: testPod})
		c.eventually("another identity", func() bool { return c.who(now.client, now.server).Identity == ofProcessID.String() })
		s.refuses(t, "of an identity that it had", now, own, codes.PermissionDenied, nil)
		c.authority.SetEntries(devauthority.Entry{ID: ofPodID, PodUID: testPod})
		c.eventually("its identity to be back", func() bool { return c.who(now.client, now.server).Identity == ofPodID.String() })
		s.allow(t, ofPodID)
	})
	t.Run("withdrawn", func(t *testing.T) {
		now := s.connects(t, testPod, 45008)
		own := s.asks(t, now)
		c.t = t
		c.authority.Withdraw(ofPodID)
		defer c.authority.Restore(ofPodID)
		c.eventually("its identity to be gone", func() bool { return c.who(now.client, now.server).Identity == "" })
		s.refuses(t, "withdrawn", now, own, codes.PermissionDenied, nil)
	})
}

// issued is a certificate that was never the workload's.
func (s *spoken) issued(t *testing.T, id spiffeid.ID) *x509.Certificate {
	t.Helper()
	svid, err := s.c.authority.Issue(id)
	must(t, err)
	return svid.Certificates[0]
}

// asProxy has everything signed in the way of the proxy.
type asProxy struct {
	o    *originations
	c    connection
	leaf *x509.Certificate
}

func (p asProxy) Public() crypto.PublicKey { return p.leaf.PublicKey }

func (p asProxy) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	leaf := sha256.Sum256(p.leaf.Raw)
	_, pss := opts.(*rsa.PSSOptions)
	return p.o.sign(p.c, &api.SignRequest{Leaf: leaf[:], Digest: digest, Hash: uint32(opts.HashFunc()), Pss: pss})
}

// TestSignsForTLS: a handshake with each kind of key succeeds, signed from afar.
func TestSignsForTLS(t *testing.T) {
	t.Parallel()
	_, edwards, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	must(t, err)
	for name, key := range map[string]crypto.Signer{"Ed25519": edwards, "RSA": rsaKey, "P-256": p256, "P-384": p384} {
		t.Run(name, func(t *testing.T) {
			leaf := selfSigned(t, key)
			pin, err := identity.NewPin(int32(os.Getpid()))
			must(t, err)
			defer pin.Close()
			c := connection{netip.MustParseAddrPort("10.1.0.2:4000"), netip.MustParseAddrPort("10.9.0.1:5432")}
			o := newOriginations(&openers{opened: func(netip.AddrPort, netip.AddrPort) (datapath.Caller, error) { return datapath.Caller{Taken: 1}, nil }},
				func() *policy.Set { return remoteSet(t, []netip.Addr{c.server.Addr()}, ofPodID) }, bootClock())
			svid := &x509svid.SVID{ID: ofPodID, Certificates: []*x509.Certificate{leaf}, PrivateKey: key}
			o.asked[c] = &asked{began: 1, at: o.clock.boot(), attended: &attended{pin: pin, svids: []*x509svid.SVID{svid}}}
			near, far := net.Pipe()
			done := make(chan error, 1)
			server := tls.Server(far, &tls.Config{ClientAuth: tls.RequireAnyClientCert, Certificates: []tls.Certificate{{Certificate: [][]byte{selfSigned(t, p256).Raw}, PrivateKey: p256}}})
			go func() { done <- server.HandshakeContext(t.Context()) }()
			client := tls.Client(near, &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true,
				Certificates: []tls.Certificate{{Certificate: [][]byte{leaf.Raw}, PrivateKey: asProxy{o, c, leaf}}}})
			must(t, client.HandshakeContext(t.Context()))
			must(t, <-done)
			if !server.ConnectionState().PeerCertificates[0].Equal(leaf) {
				t.Error("the server has met somebody else")
			}
		})
	}
}

func selfSigned(t *testing.T, key crypto.Signer) *x509.Certificate {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	return cert
}

// TestRemoteRows: a remote service is a row, without the addresses that are here or protected here, and the proxy is handed no more.
func TestRemoteRows(t *testing.T) {
	t.Parallel()
	d := newDirectory(t)
	here := map[string]bool{}
	var unknown error
	d.isHere = func(a netip.Addr) (bool, error) { return here[a.String()] || unknown != nil, unknown }
	beside := podAndHost
	write := func(addresses string) {
		d.write("r.yaml", beside+`---
apiVersion: sallyport.dev/v1alpha1
kind: RemoteService
metadata: {name: orders}
spec: {addresses: `+addresses+`, ports: [5432, 80], identities: ["spiffe://example.org/far"], callers: ["spiffe://example.org/ns/*"]}
`)
		d.reload()
	}
	check := func(what string, want []string, problem string) {
		t.Helper()
		row, ok := d.current().service("orders")
		if ok != (len(want) > 0) || !slices.Equal(texts(row.Addresses), want) || ok && (row.Target != datapath.TargetRemote || row.Mode != datapath.Enforce || row.ID == 0) {
			t.Errorf("%s: row %+v, want %v", what, row, want)
		}
		handed, err := policy.LoadFiles(d.proxy)
		must(t, err)
		if r, ok := handed.RemoteService("orders"); ok != (len(want) > 0) || !slices.Equal(texts(r.Spec.Addresses), want) {
			t.Errorf("%s: the proxy has %v, want %v", what, r.Spec.Addresses, want)
		}
		if got := strings.Join(d.problems.lines(), "; "); !strings.Contains(got, problem) || problem == "" && got != "" {
			t.Errorf("%s: problems %q, want %q", what, got, problem)
		}
	}
	write(`["10.9.0.1", "fd00:9::1"]`)
	check("elsewhere", []string{"10.9.0.1", "fd00:9::1"}, "")
	here["10.9.0.1"] = true
	d.reload()
	check("one has come here", []string{"fd00:9::1"}, "10.9.0.1 of remote service orders leads to this node")
	unknown = errors.New("dump interrupted")
	d.reload()
	check("nobody can tell", []string{"fd00:9::1"}, "fd00:9::1 of remote service orders stays as it was, for nobody can tell whether it is of this node: dump interrupted")
	write(`["10.9.0.1", "10.9.0.2"]`)
	check("nobody can tell of a new one", []string{"10.9.0.2"}, "10.9.0.2 of remote service orders stays as it was")
	unknown = nil
	write(`["10.9.0.1", "fd00:9::1"]`)
	here["fd00:9::1"] = true
	d.reload()
	check("all have", nil, "fd00:9::1 of remote service orders")
	clear(here)
	write(`["10.2.0.2", "10.9.0.1"]`)
	check("one is protected", []string{"10.9.0.1"}, "10.2.0.2 of remote service orders is one of the protected service web")
	if row, _ := d.current().service("web"); !slices.Equal(texts(row.Addresses), []string{"10.2.0.2"}) {
		t.Errorf("the protected service is %+v", row)
	}
	beside = strings.Replace(podAndHost, "{target: Pod,", "{target: Pod, mode: Observe,", 1)
	write(`["10.2.0.2", "10.9.0.1"]`)
	check("one is watched", []string{"10.2.0.2", "10.9.0.1"}, "")
	write(`["10.9.0.1"]`)
	check("mended", []string{"10.9.0.1"}, "")
	n := &node{}
	d.closed = n.isClosed
	d.reload()
	check("nobody attests", []string{"10.9.0.1"}, "orders is closed on this node: nobody tells it the identities of its workloads (spec.workloads.api: none): "+
		"whoever asks for it is refused; write spec.workloads of the node's configuration")
	if _, ok := d.current().service("web"); !ok || remoteState(d.current(), false) != "; closed to workloads of this node: orders" {
		t.Errorf("nobody attests: the rest is in force: %v; state %q", ok, remoteState(d.current(), false))
	}
	n.cfg.Spec.Workloads.API = policy.WorkloadsBroker
	d.reload()
	check("somebody attests", []string{"10.9.0.1"}, "")
	if got := probeTargets(d.current().services); slices.ContainsFunc(got, func(a netip.AddrPort) bool { return a.Addr().String() == "10.9.0.1" }) {
		t.Errorf("others are knocked at: %v", got)
	}
}
