package main

import (
	"bufio"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/test/lab"
)

var farID = spiffeid.RequireFromPath(domain, "/sallyport/proxy/node-b")

// attester is the agent's word on whose every connection is.
type attester struct {
	api.UnimplementedProxyReportServer
	mu    sync.Mutex
	svid  *x509svid.SVID  // guarded by mu; nil: none
	why   string          // guarded by mu; it is nobody's
	gone  bool            // guarded by mu; who issues identities has none for it
	signs int             // guarded by mu
	state *api.ProxyState // guarded by mu; what the proxy told last
	as    string          // guarded by mu; whom the proxy said that it speaks as when it asked last
}

func (a *attester) say(svid *x509svid.SVID, why string, gone bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.svid, a.why, a.gone, a.signs = svid, why, gone, 0
}

func (a *attester) signatures() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.signs
}

func (a *attester) toldAs() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.as
}

// Caller implements api.ProxyReportServer.
func (a *attester) Caller(_ context.Context, q *api.CallerRequest) (*api.CallerReply, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.as = q.GetIdentity()
	switch {
	case a.gone:
		return nil, status.Error(codes.PermissionDenied, "its identity is withdrawn")
	case a.svid == nil:
		return &api.CallerReply{Caller: &api.Workload{Why: a.why}}, nil
	}
	reply := &api.CallerReply{Caller: &api.Workload{Identity: a.svid.ID.String()}}
	for _, c := range a.svid.Certificates {
		reply.Chain = append(reply.Chain, c.Raw)
	}
	return reply, nil
}

// State implements api.ProxyReportServer.
func (a *attester) State(_ context.Context, s *api.ProxyState) (*api.ProxyStateReply, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.state = s
	return &api.ProxyStateReply{}, nil
}

func (a *attester) lastState() *api.ProxyState {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.state
}

// Sign implements api.ProxyReportServer.
func (a *attester) Sign(_ context.Context, q *api.SignRequest) (*api.SignReply, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if leaf := sha256.Sum256(a.svid.Certificates[0].Raw); string(leaf[:]) != string(q.GetLeaf()) {
		return nil, status.Error(codes.PermissionDenied, "another leaf")
	}
	a.signs++
	var opts crypto.SignerOpts = crypto.Hash(q.GetHash())
	if q.GetPss() {
		opts = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.Hash(q.GetHash())}
	}
	signature, err := a.svid.PrivateKey.Sign(rand.Reader, q.GetDigest(), opts)
	return &api.SignReply{Signature: signature}, err
}

// outbound is a bench whose client asks for remote services, which are in the pod: the way back is that of any service.
type outbound struct {
	*bench
	workload *x509svid.SVID
}

func newOutbound(t *testing.T, change func(*settings)) *outbound {
	o := &outbound{bench: newBench(t, func(s *settings) {
		s.policy = remotes("pass", web)
		if change != nil {
			change(s)
		}
	})}
	o.workload = o.issue(o.authority, web)
	o.records.say(o.workload, "", false)
	return o
}

func (o *outbound) in(t *testing.T) *outbound { return &outbound{o.bench.in(t), o.workload} }

// pass is where what speaks no TLS is passed on in the clear.
func (o *outbound) pass() netip.AddrPort { return o.closed() }

// remotes is a policy of remote services. At the last address they may speak no TLS, if without says so.
func remotes(without string, callers ...spiffeid.ID) string {
	list := make([]string, len(callers))
	for i, id := range callers {
		list[i] = fmt.Sprintf("%q, %q", id, id.String()+"/*")
	}
	one := func(name, addresses, without string) string {
		return fmt.Sprintf(`---
apiVersion: sallyport.dev/v1alpha1
kind: RemoteService
metadata: {name: %s}
spec: {addresses: [%s], ports: [%d], identities: [%q, %q], callers: [%s], without: %s}
`, name, addresses, port, farID, proxyID, strings.Join(list, ", "), without)
	}
	return one("orders", `"10.2.0.2", "fd00:2::2"`, "refuse") + one("legacy", `"fd00:2::3"`, without)
}

// as has the client be another workload that may ask: equal denials become one record, which takes its time.
func (o *outbound) as(name string) {
	o.Helper()
	id, err := web.AppendPath("/" + strings.ReplaceAll(name, " ", "-"))
	o.must(err)
	o.records.say(o.issue(o.authority, id), "", false)
}

// forget drops the records so far.
func (o *outbound) forget() {
	o.records.mu.Lock()
	defer o.records.mu.Unlock()
	o.records.records = nil
}

// far is who answers at a place: it tells who has come, and what came first of a client whose handshake did not succeed.
type far struct {
	*lab.Service
	mu    sync.Mutex
	peers []string // guarded by mu; SPIFFE IDs
	bytes []byte   // guarded by mu; what came, decrypted
}

func (f *far) seen() (peers []string, bytes string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.peers, string(f.bytes)
}

// answers serves mTLS with a line in front, and says every line again.
func (o *outbound) answers(at netip.AddrPort, svid *x509svid.SVID, bundle x509bundle.Source) *far {
	o.Helper()
	f := &far{}
	cfg := tlsconfig.MTLSServerConfig(svid, bundle, tlsconfig.AuthorizeAny())
	var err error
	f.Service, err = o.Pod.Serve(at, func(c net.Conn) {
		secure := tls.Server(c, cfg)
		if secure.Handshake() != nil {
			return
		}
		id, _ := x509svid.IDFromCert(secure.ConnectionState().PeerCertificates[0])
		f.mu.Lock()
		f.peers = append(f.peers, id.String())
		f.mu.Unlock()
		f.echo(secure)
		_ = secure.CloseWrite()
	})
	o.must(err)
	return f
}

// plain serves without TLS.
func (o *outbound) plainly(at netip.AddrPort) *far {
	o.Helper()
	f := &far{}
	var err error
	f.Service, err = o.Pod.Serve(at, func(c net.Conn) {
		f.echo(c)
	})
	o.must(err)
	return f
}

// echo greets first, as many protocols do, and says again what it is told until there is no more.
func (f *far) echo(c io.ReadWriter) {
	_, _ = io.WriteString(c, "hello\n")
	buf := make([]byte, 1024)
	for {
		n, err := c.Read(buf)
		f.mu.Lock()
		f.bytes = append(f.bytes, buf[:n]...)
		f.mu.Unlock()
		if err != nil {
			_, _ = io.WriteString(c, "bye\n")
			return
		}
		_, _ = c.Write(buf[:n])
	}
}

// talk is a client that knows nothing of any of this, and its whole conversation.
func (o *outbound) talk(to netip.AddrPort) {
	o.Helper()
	c := o.plain(to)
	lines := bufio.NewReader(c)
	for _, line := range []string{"hello\n", "one\n", "two\n"} {
		if line != "hello\n" {
			_, err := io.WriteString(c, line)
			o.must(err)
		}
		if got, err := lines.ReadString('\n'); err != nil || got != line {
			o.Fatalf("client reads %q, %v; want %q", got, err, line)
		}
	}
	o.must(c.CloseWrite())
	if rest, err := io.ReadAll(lines); err != nil || string(rest) != "bye\n" {
		o.Fatalf("client reads %q, %v at the end", rest, err)
	}
}

// live is a conversation that goes on.
func (o *outbound) live(to netip.AddrPort) *net.TCPConn {
	o.Helper()
	c := o.plain(to)
	if got, err := bufio.NewReader(c).ReadString('\n'); err != nil || got != "hello\n" {
		o.Fatalf("client reads %q, %v", got, err)
	}
	return c
}

func TestOriginates(t *testing.T) {
	o := newOutbound(t, nil)
	for _, f := range lab.Families() {
		t.Run(f.String(), func(t *testing.T) {
			o := o.in(t)
			o.forget()
			there := o.answers(o.target(f), o.issue(o.authority, farID), o.authority.Bundle())
			defer there.Close()
			before := o.records.signatures()
			o.talk(o.target(f))
			open, end := o.find("OPEN", "ORIGINATED"), o.find("CLOSE", "CLOSED")
			if peers, bytes := there.seen(); len(peers) != 1 || peers[0] != web.String() || bytes != "one\ntwo\n" {
				t.Errorf("the far end has met %v and heard %q", peers, bytes)
			}
			if from := there.Peers(); len(from) != 1 || from[0].Addr() != o.Client.Addr(f) {
				t.Errorf("the far end was reached from %v", from)
			}
			if open.Identity != web.String() || open.Proof != "local" || open.Service != "orders" || open.Verdict != "PROXIED" || !strings.Contains(open.Detail, farID.String()) {
				t.Errorf("record %v", open)
			}
			if end.FlowId != open.FlowId || end.BytesToServer != 8 || end.BytesToClient != 6+8+4 {
				t.Errorf("record %v", end)
			}
			if n := o.records.signatures() - before; n != 1 {
				t.Errorf("%d signatures", n)
			}
		})
	}
}

// TestOriginatesForNobodyElse: who is not attested, or may not ask, does not get a packet to the far end.
func TestOriginatesForNobodyElse(t *testing.T) {
	o := newOutbound(t, nil)
	there := o.answers(o.target(lab.IPv4), o.issue(o.authority, farID), o.authority.Bundle())
	for name, s := range map[string]struct {
		to              netip.AddrPort
		svid            *x509svid.SVID
		why             string
		gone            bool
		reason, say, id string
	}{
		"unattested":             {o.target(lab.IPv4), nil, "no socket of this node", false, "UNATTESTED", "no socket of this node", ""},
		"identity taken away":    {o.target(lab.IPv6), nil, "", true, "UNATTESTED", "withdrawn", ""},
		"no caller of that name": {o.target(lab.IPv4), o.issue(o.authority, mallory), "", false, "NOT_AUTHORISED", "callers[0]", mallory.String()},
	} {
		t.Run(name, func(t *testing.T) {
			o := o.in(t)
			o.forget()
			o.records.say(s.svid, s.why, s.gone)
			o.refuses(s.to)
			if r := o.find("DENY", s.reason); !strings.Contains(r.Detail, s.say) || r.Identity != s.id || r.Service != "orders" {
				t.Errorf("record %v", r)
			}
		})
	}
	if peers := there.Peers(); len(peers) > 0 {
		t.Errorf("reached the far end: %v", peers)
	}
}

// TestWhoAnswers: who answers has to be who policy says. What the client says is told to nobody else.
func TestWhoAnswers(t *testing.T) {
	o := newOutbound(t, nil)
	others, err := devauthority.New(domain, devauthority.Options{})
	o.must(err)
	brief, err := devauthority.New(domain, devauthority.Options{TTL: time.Second})
	o.must(err)
	expired := o.issue(brief, farID)
	o.until(func() bool { return time.Now().After(expired.Certificates[0].NotAfter) })
	foreign, err := devauthority.New(partner, devauthority.Options{})
	o.must(err)
	for name, s := range map[string]struct {
		svid   *x509svid.SVID
		reason string
	}{
		"another identity":       {o.issue(o.authority, mallory), "PEER_REFUSED"},
		"another authority":      {o.issue(others, farID), "PEER_REFUSED"},
		"another trust domain":   {o.issue(foreign, partnerWeb), "PEER_REFUSED"},
		"expired":                {expired, "PEER_REFUSED"},
		"own proxy of this node": {o.issue(o.authority, proxyID), "LOOP"},
	} {
		for where, at := range map[string]netip.AddrPort{"refuse": o.target(lab.IPv4), "pass": o.pass()} {
			t.Run(name+"/"+where, func(t *testing.T) {
				o := o.in(t)
				o.forget()
				o.as(name + where)
				there := o.answers(at, s.svid, o.authority.Bundle())
				defer there.Close()
				o.refuses(at)
				o.find("DENY", s.reason)
				if peers, bytes := there.seen(); len(peers) > 0 || bytes != "" || len(there.Peers()) != 1 {
					t.Errorf("the far end has met %v in %d connections and heard %q", peers, len(there.Peers()), bytes)
				}
			})
		}
	}
}

// TestWithoutTLS: what speaks no TLS is refused, or passed on in the clear where policy says so, and only then.
func TestWithoutTLS(t *testing.T) {
	o := newOutbound(t, func(s *settings) { s.handshake = 2 * time.Second })
	t.Run("refuse", func(t *testing.T) {
		o := o.in(t)
		there := o.plainly(o.target(lab.IPv4))
		defer there.Close()
		o.refuses(o.target(lab.IPv4))
		o.find("DENY", "PEER_REFUSED")
		if len(there.Peers()) != 1 {
			t.Errorf("%d connections", len(there.Peers()))
		}
	})
	t.Run("pass", func(t *testing.T) {
		o := o.in(t)
		o.forget()
		there := o.plainly(o.pass())
		defer there.Close()
		o.talk(o.pass())
		if r := o.find("OPEN", "IN_CLEAR"); r.Identity != web.String() || r.Service != "legacy" || r.Proof != "local" {
			t.Errorf("record %v", r)
		}
		if n := o.records.signatures(); n != 0 {
			t.Errorf("%d signatures for nobody", n)
		}
	})
	t.Run("pass for nobody who is not attested", func(t *testing.T) {
		o := o.in(t)
		o.forget()
		o.records.say(nil, "no socket", false)
		defer o.records.say(o.workload, "", false)
		there := o.plainly(o.pass())
		defer there.Close()
		o.refuses(o.pass())
		o.find("DENY", "UNATTESTED")
		if len(there.Peers()) != 0 {
			t.Errorf("reached it: %v", there.Peers())
		}
	})
	t.Run("pass to who hangs up", func(t *testing.T) {
		o := o.in(t)
		o.forget()
		first := true
		there, err := o.Pod.Serve(o.pass(), func(c net.Conn) {
			if first {
				first = false // reads a line that it does not understand, and leaves
				_, _ = c.Read(make([]byte, 4))
				return
			}
			(&far{}).echo(c)
		})
		o.must(err)
		defer there.Close()
		o.talk(o.pass())
		o.find("OPEN", "IN_CLEAR")
	})
	for name, s := range map[string]struct {
		answer func(net.Conn)
		reason string
	}{
		"alert": {func(c net.Conn) { _, _ = c.Write([]byte{21, 3, 3, 0, 2, 2, 40}); _, _ = io.Copy(io.Discard, c) }, "HANDSHAKE_FAILED"},
		"older TLS": {func(c net.Conn) {
			svid, _ := o.authority.Issue(farID)
			cfg := tlsconfig.MTLSServerConfig(svid, o.authority.Bundle(), tlsconfig.AuthorizeAny())
			cfg.MaxVersion = tls.VersionTLS12
			_ = tls.Server(c, cfg).Handshake()
		}, "HANDSHAKE_FAILED"},
		"half a record": {func(c net.Conn) { _, _ = c.Read(make([]byte, 4096)); _, _ = c.Write([]byte{22, 3, 3}) }, "HANDSHAKE_FAILED"},
		"nothing":       {func(c net.Conn) { _, _ = io.Copy(io.Discard, c) }, "HANDSHAKE_TIMEOUT"},
	} {
		t.Run("no way around TLS/"+name, func(t *testing.T) {
			o := o.in(t)
			o.forget()
			o.as(name)
			there, err := o.Pod.Serve(o.pass(), s.answer)
			o.must(err)
			defer there.Close()
			o.refuses(o.pass())
			o.find("DENY", s.reason)
			if len(there.Peers()) != 1 {
				t.Errorf("%d connections", len(there.Peers()))
			}
		})
	}
}

// goesOn has a line said again.
func goesOn(c *net.TCPConn) error {
	_, err := io.WriteString(c, "on\n")
	if err == nil {
		_, err = io.ReadFull(c, make([]byte, 3))
	}
	return err
}

// TestOriginatedIsAskedAgain: live connections end with what they were let out by.
func TestOriginatedIsAskedAgain(t *testing.T) {
	t.Parallel()
	o := newOutbound(t, nil)
	there := o.answers(o.target(lab.IPv4), o.issue(o.authority, farID), o.authority.Bundle())
	defer there.Close()
	clear := o.plainly(o.pass())
	defer clear.Close()
	c, plain := o.live(o.target(lab.IPv4)), o.live(o.pass())
	o.writePolicy(remotes("refuse", web))
	o.resets(plain)
	o.must(goesOn(c))
	o.writePolicy(remotes("refuse", mallory))
	o.resets(c)
	o.find("CLOSE", "POLICY_CHANGED")
	o.writePolicy(remotes("refuse", web))
	o.until(func() bool {
		c = o.plain(o.target(lab.IPv4))
		n, _ := c.Read(make([]byte, 6))
		return n > 0
	})
	o.records.say(nil, "", true)
	o.resets(c)
	if r := o.find("CLOSE", "IDENTITY_EXPIRED"); !strings.Contains(r.Detail, "withdrawn") {
		t.Errorf("record %v", r)
	}
}

// TestOriginatedAsAnother: a live connection ends when the agent says that its workload is another one now, though nobody has withdrawn
// anything: an agent that has just begun may know no better. It is told whom the connection is carried as.
func TestOriginatedAsAnother(t *testing.T) {
	t.Parallel()
	o := newOutbound(t, nil)
	there := o.answers(o.target(lab.IPv4), o.issue(o.authority, farID), o.authority.Bundle())
	defer there.Close()
	c := o.live(o.target(lab.IPv4))
	o.must(c.SetDeadline(time.Now().Add(3 * wait)))
	o.until(func() bool { return o.records.toldAs() == web.String() })
	o.must(goesOn(c))
	o.records.say(o.issue(o.authority, mallory), "", false)
	o.resets(c)
	if r := o.find("CLOSE", "IDENTITY_EXPIRED"); r.Identity != web.String() || !strings.Contains(r.Detail, "its workload is "+mallory.String()) {
		t.Errorf("record %v", r)
	}
}

// TestOriginatedOutlivesACertificate: a newer certificate of the workload keeps its connections alive, and without one they end with the
// time of the last, also when nobody can say any more whose they are.
func TestOriginatedOutlivesACertificate(t *testing.T) {
	t.Parallel()
	o := newOutbound(t, func(s *settings) { s.ttl = 8 * time.Second })
	there := o.answers(o.target(lab.IPv4), o.issue(o.authority, farID), o.authority.Bundle())
	defer there.Close()
	c := o.live(o.target(lab.IPv4))
	o.must(c.SetDeadline(time.Now().Add(3 * wait)))
	first := o.workload.Certificates[0].NotAfter
	o.workload = o.issue(o.authority, web)
	o.records.say(o.workload, "", false)
	for begun := first.Add(-4 * time.Second); time.Now().Before(first.Add(2 * time.Second)); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(begun) { // newer ones come, as from a real source
			o.workload, begun = o.issue(o.authority, web), first
			o.records.say(o.workload, "", false)
		}
		o.must(goesOn(c))
	}
	o.records.say(nil, "it had ended", false)
	o.resets(c)
	now, r := time.Now(), o.find("CLOSE", "IDENTITY_EXPIRED")
	last, err := time.Parse(time.RFC3339, r.Detail[strings.LastIndex(r.Detail, " ")+1:])
	if err != nil || !last.After(first) || now.Before(last) {
		t.Errorf("cut at %s, the first certificate was valid until %s, and says %s", now, first, r.Detail)
	}
}
