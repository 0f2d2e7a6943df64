package e2e_test

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// everyApp are workloads that a remote service lets ask, and the services of there do not all let in.
const everyApp = "spiffe://example.org/app/*"

// TestOutbound: workloads that know nothing of identities, on one node, ask for services of another one, and each is known there as who it
// is; what proves nothing, and who may not ask, does not get as far as the wire; and nothing passes there in the clear.
func TestOutbound(t *testing.T) {
	leak.Check(t)
	p := newPair(t)
	t.Run("without remote services", p.withoutRemote)
	p.apply(t, p.far(web.String()))
	since := p.now(t)
	for _, part := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"served", p.servedAsWorkload}, {"unregistered", p.unregistered}, {"other workload", p.otherWorkload}, {"speaks first", p.speaksFirst},
		{"masqueraded", p.masqueraded}, {"without Sallyport", p.withoutSallyport}, {"another one answers", p.anotherAnswers}, {"rotated", p.rotation},
		{"entry deleted", p.entryDeleted}, {"agent killed", p.agentKilled}, {"proxy killed", p.proxyKilled},
	} {
		t.Run(part.name, part.run)
	}
	p.untold(t, since)
	t.Run("removed", p.removed)
}

// web is where nginx of there is, behind its Sallyport.
func (p *pair) web(f lab.Family) netip.AddrPort {
	return netip.AddrPortFrom(p.there.Node.Addr(f), sinkPort)
}

// echo is where a service of there is that says whom it sees.
func (p *pair) echo(f lab.Family) netip.AddrPort {
	return netip.AddrPortFrom(p.there.Pod.Addr(f), podPort)
}

// inFamilies runs a part in each family.
func inFamilies(t *testing.T, run func(*testing.T, lab.Family)) {
	for _, f := range lab.Families() {
		t.Run(f.String(), func(t *testing.T) { run(t, f) })
	}
}

// withoutRemote is the control of all that follows: what asks plainly passes in the clear, is seen to, and is refused by the other node;
// who proves an identity himself is served.
func (p *pair) withoutRemote(t *testing.T) {
	inFamilies(t, func(t *testing.T, f lab.Family) {
		since := p.now(t)
		got := p.curl(t, p.who("process"), p.web(f))
		if got.err == nil || !p.told(t, since, got.path) {
			t.Errorf("plain curl: %v, %q; want a refusal, and to see what it asked for", got.err, got.out)
		}
		p.served.find(t, "the plain client", of(got.client, "DENY", "DENIED", "NO_TLS"))
		w := way{name: "node", client: p.here.Node, from: p.here.Node.Addr(f), to: p.echo(f)}
		if o := w.identified(within(t, patience), p.there, web); o.who != proxied {
			t.Errorf("client with an identity answered by %s, want the proxy of there", o)
		}
	})
}

// servedAsWorkload: both nodes say who it was, of a process and of a pod; the server sees the client's own address.
func (p *pair) servedAsWorkload(t *testing.T) {
	inFamilies(t, func(t *testing.T, f lab.Family) {
		for _, name := range []string{"process", "pod"} {
			p.wantServed(t, p.who(name), f, p.who(name).ns.Addr(f))
		}
	})
}

// wantServed has curl ask nginx of there, which is to see that address.
func (p *pair) wantServed(t *testing.T, c caller, f lab.Family, seen netip.Addr) {
	t.Helper()
	since, to := p.now(t), p.web(f)
	got := p.curl(t, c, to)
	if !got.servedTo(seen) {
		t.Errorf("curl of %s: %v, %q; want an answer to %s", c.name, got.err, got.out, seen)
	}
	asked := p.asked.find(t, c.name+" on its node", of(got.client, "OPEN", "PROXIED", "ORIGINATED"))
	if asked.Identity != c.id.String() || asked.Caller.Identity != c.id.String() || asked.Service != "far-host" || !strings.Contains(asked.Detail, p.there.own("proxy").String()) {
		t.Errorf("record of here: %s, %s, caller %+v, detail %q; want %s at far-host, by %s", asked, asked.Service, asked.Caller, asked.Detail, c.id, p.there.own("proxy"))
	}
	begun := p.begun(t, since, to)
	if len(begun) != 1 {
		t.Fatalf("%s: the connections %s passed, want one", c.name, begun)
	}
	served := p.served.find(t, c.name+" on the other node", of(begun[0], "OPEN", "PROXIED", "IDENTITY"))
	if served.Identity != c.id.String() || begun[0].Addr() != seen {
		t.Errorf("record of there: %+v, want %s of %s", served, c.id, seen)
	}
}

// refusedHere has curl be refused on its own node: not a packet of it reaches the wire.
func (p *pair) refusedHere(t *testing.T, c caller, to netip.AddrPort, reason string) record {
	t.Helper()
	since := p.now(t)
	got := p.curl(t, c, to)
	if !got.isReset() {
		t.Errorf("curl of %s: %v, %q; want a reset", c.name, got.err, got.out)
	}
	if begun := p.begun(t, since, to); len(begun) > 0 || p.told(t, since, got.path) {
		t.Errorf("%s: the connections %s passed, want none", c.name, begun)
	}
	return p.asked.find(t, c.name, of(got.client, "DENY", "DENIED", reason))
}

// unregistered: what nobody attests is refused, and the record says why.
func (p *pair) unregistered(t *testing.T) {
	inFamilies(t, func(t *testing.T, f lab.Family) {
		for _, name := range []string{"unregistered process", "unregistered pod"} {
			if r := p.refusedHere(t, p.who(name), p.web(f), "UNATTESTED"); r.Identity != "" || r.Caller.Why == "" {
				t.Errorf("record: %+v, want why it is not attested", r)
			}
		}
	})
}

// otherWorkload: who may not ask is refused here, and who may ask and not come in is refused there, each by its name.
func (p *pair) otherWorkload(t *testing.T) {
	inFamilies(t, func(t *testing.T, f lab.Family) {
		for _, name := range []string{"other process", "other pod"} {
			if r := p.refusedHere(t, p.who(name), p.web(f), "NOT_AUTHORISED"); r.Identity != mallory.String() {
				t.Errorf("record: %+v, want %s", r, mallory)
			}
		}
	})
	p.apply(t, p.far(everyApp))
	defer p.apply(t, p.far(web.String()))
	inFamilies(t, func(t *testing.T, f lab.Family) {
		for _, name := range []string{"other process", "other pod"} {
			since := p.now(t)
			if got := p.curl(t, p.who(name), p.web(f)); got.err == nil {
				t.Errorf("curl of %s got %q, want a refusal by the other node", name, got.out)
			}
			begun := p.begun(t, since, p.web(f))
			if len(begun) != 1 {
				t.Fatalf("%s: the connections %s passed, want one", name, begun)
			}
			if r := p.served.find(t, name, of(begun[0], "DENY", "DENIED", "NOT_AUTHORISED")); r.Identity != mallory.String() {
				t.Errorf("record of there: %+v, want %s", r, mallory)
			}
		}
		p.wantServed(t, p.who("pod"), f, p.who("pod").ns.Addr(f))
	})
}

// speaksFirst: a server that speaks before the client does is heard.
func (p *pair) speaksFirst(t *testing.T) {
	inFamilies(t, func(t *testing.T, f lab.Family) {
		conn, err := p.dial(t, p.who("pod"), netip.AddrPortFrom(p.there.Pod.Addr(f), bannerPort))
		must(t, err)
		must(t, conn.SetDeadline(time.Now().Add(patience)))
		for _, said := range []string{banner, "SSH-2.0-client\r\n"} {
			if said != banner {
				_, err = io.WriteString(conn, said)
				must(t, err)
			}
			heard := make([]byte, len(said))
			if _, err := io.ReadFull(conn, heard); err != nil || string(heard) != said {
				t.Fatalf("heard %q, %v, want %q", heard, err, said)
			}
		}
	})
}

// masquerade has pods' packets leave with the node's address.
const masquerade = `add table inet hide
add chain inet hide post { type nat hook postrouting priority srcnat; }
add rule inet hide post iifname "vethpod*" oifname "up0" masquerade
`

// masqueraded: on a node that hides its pods behind its own address they are told apart none the less.
func (p *pair) masqueraded(t *testing.T) {
	node := p.here.Node
	_, err := node.Run(within(t, patience), "nft", masquerade)
	must(t, err)
	defer func() {
		_, err := node.Run(within(t, patience), "nft", "delete", "table", "inet", "hide")
		must(t, err)
	}()
	inFamilies(t, func(t *testing.T, f lab.Family) {
		p.wantServed(t, p.who("pod"), f, node.Addr(f))
		p.wantServed(t, p.who("process"), f, node.Addr(f))
		p.refusedHere(t, p.who("unregistered pod"), p.web(f), "UNATTESTED")
	})
}

// withoutSallyport: a server that knows no TLS is asked for nothing, unless policy says so, and then the log does, too.
func (p *pair) withoutSallyport(t *testing.T) {
	to := func(f lab.Family) netip.AddrPort { return netip.AddrPortFrom(p.there.Node.Addr(f), openPort) }
	defer p.apply(t, p.far(web.String()))
	p.apply(t, p.far(web.String())+p.open(""))
	inFamilies(t, func(t *testing.T, f lab.Family) {
		since := p.now(t)
		got := p.curl(t, p.who("pod"), to(f))
		if got.err == nil || p.told(t, since, got.path) {
			t.Errorf("curl: %v, %q; want a refusal, and nothing in the clear", got.err, got.out)
		}
		p.asked.find(t, "the refusal", of(got.client, "DENY", "DENIED", "PEER_REFUSED"))
	})
	p.apply(t, p.far(web.String())+p.open("  without: pass\n"))
	inFamilies(t, func(t *testing.T, f lab.Family) {
		since := p.now(t)
		got := p.curl(t, p.who("pod"), to(f))
		if !got.servedTo(p.who("pod").ns.Addr(f)) || !p.told(t, since, got.path) {
			t.Errorf("curl: %v, %q; want an answer, in the clear", got.err, got.out)
		}
		if r := p.asked.find(t, "what passed", of(got.client, "OPEN", "PROXIED", "IN_CLEAR")); r.Identity != web.String() {
			t.Errorf("record: %+v, want %s", r, web)
		}
		p.refusedHere(t, p.who("unregistered pod"), to(f), "UNATTESTED")
		p.refusedHere(t, p.who("other pod"), to(f), "NOT_AUTHORISED")
	})
}

// answers is a server of ours on the other node that speaks TLS as some identity and tells what certificates it is shown.
func (p *pair) answers(t *testing.T, f lab.Family, id spiffeid.ID) (at netip.AddrPort, shown <-chan string) {
	t.Helper()
	svid, err := p.there.authority.Issue(id)
	must(t, err)
	config := tlsconfig.MTLSServerConfig(svid, p.there.authority.Bundle(), tlsconfig.AuthorizeMemberOf(domain))
	serials := make(chan string, 64)
	s, err := p.there.Node.Serve(netip.AddrPortFrom(p.there.Node.Addr(f), 0), func(c net.Conn) {
		secured := tls.Server(c, config)
		if secured.Handshake() != nil {
			serials <- ""
			return
		}
		serials <- secured.ConnectionState().PeerCertificates[0].SerialNumber.String()
		_, _ = io.Copy(secured, secured)
	})
	must(t, err)
	return s.Addr, serials
}

// ours is the remote service at one place.
func ours(at netip.AddrPort, answers spiffeid.ID) string {
	all := remote("ours", []netip.Addr{at.Addr(), at.Addr()}, fmt.Sprint(at.Port()), answers, web.String(), "")
	return strings.Replace(all, fmt.Sprintf(", %q", at.Addr()), "", 1)
}

// anotherAnswers: a server with an identity that is not to answer is told nothing.
func (p *pair) anotherAnswers(t *testing.T) {
	defer p.apply(t, p.far(web.String()))
	inFamilies(t, func(t *testing.T, f lab.Family) {
		at, shown := p.answers(t, f, mallory)
		p.apply(t, p.far(web.String())+ours(at, p.there.own("proxy")))
		got := p.curl(t, p.who("pod"), at)
		if !got.isReset() || <-shown != "" {
			t.Errorf("curl: %v, %q; want a reset", got.err, got.out)
		}
		if r := p.asked.find(t, "the refusal", of(got.client, "DENY", "DENIED", "PEER_REFUSED")); !strings.Contains(r.Detail, mallory.String()) {
			t.Errorf("record: %+v, want who answered", r)
		}
	})
}

// rotation: new connections show the new certificate, and those that live go on.
func (p *pair) rotation(t *testing.T) {
	defer p.apply(t, p.far(web.String()))
	at, shown := p.answers(t, lab.IPv4, web)
	p.apply(t, p.far(web.String())+ours(at, web))
	pod := p.who("pod")
	live := p.talk(t, pod)
	p.rotated = p.talk(t, p.who("process"))
	serial := func() string {
		conn, err := p.dial(t, pod, at)
		must(t, err)
		defer conn.Close()
		return <-shown
	}
	first := serial()
	if first == "" {
		t.Fatal("the server was not shown a certificate")
	}
	p.here.authority.Rotate()
	waitUntil(t, "the new certificate", func() bool { s := serial(); return s != first && s != "" })
	goOn(t, live)
}

// entryDeleted: what is no more registered is refused, and what lives of it is cut; it comes back with its entry.
func (p *pair) entryDeleted(t *testing.T) {
	pod := p.who("pod")
	live := p.talk(t, pod)
	back := p.forget(func(e devauthority.Entry) bool { return e.ID == web && e.PodUID != "" })
	began := time.Now()
	for _, conn := range live {
		p.isCut(t, conn, "IDENTITY_EXPIRED")
	}
	t.Logf("cut after %v", time.Since(began).Round(time.Millisecond))
	goOn(t, p.rotated) // of another workload with the same identity; the proxy has asked about it since the rotation, too
	inFamilies(t, func(t *testing.T, f lab.Family) { p.refusedHere(t, pod, p.web(f), "UNATTESTED") })
	back()
	waitUntil(t, "the pod to be served again", func() bool { return p.curl(t, pod, p.web(lab.IPv4)).err == nil })
}

// agentKilled: nobody is told whose a new connection is, so there is none; those that live go on.
func (p *pair) agentKilled(t *testing.T) {
	pod := p.who("pod")
	live := p.talk(t, pod)
	p.here.agent.kill(t)
	goOn(t, live)
	inFamilies(t, func(t *testing.T, f lab.Family) { p.nothingLeaves(t, f) })
	goOn(t, live)
	p.here.agent.start(t)
	waitUntil(t, "the pod to be served again", func() bool { return p.curl(t, pod, p.web(lab.IPv4)).err == nil })
	goOn(t, live)
}

// nothingLeaves: workloads that ask now get no answer, and no packet of theirs is seen between the nodes.
func (p *pair) nothingLeaves(t *testing.T, f lab.Family) {
	t.Helper()
	for _, name := range []string{"process", "pod"} {
		since := p.now(t)
		got := p.curlFor(t, silence, p.who(name), p.web(f))
		if begun := p.begun(t, since, p.web(f)); got.err == nil || len(begun) > 0 {
			t.Errorf("curl of %s: %v, %q, connections %s; want none", name, got.err, got.out, begun)
		}
	}
}

// proxyKilled: what it carried ends, and nothing passes until it is back.
func (p *pair) proxyKilled(t *testing.T) {
	pod := p.who("pod")
	live := p.talk(t, pod)
	p.here.proxy.kill(t)
	for _, conn := range live {
		if _, err := lab.Ask(conn); err == nil {
			t.Error("a connection outlives the proxy that carried it")
		}
	}
	inFamilies(t, func(t *testing.T, f lab.Family) { p.nothingLeaves(t, f) })
	p.here.proxy.start(t)
	waitUntil(t, "the pod to be served again", func() bool { return p.curl(t, pod, p.web(lab.IPv4)).err == nil })
}

// removed: without the remote service it is as before: what asks plainly passes in the clear.
func (p *pair) removed(t *testing.T) {
	live := p.talk(t, p.who("pod"))
	p.apply(t, "")
	for _, conn := range live {
		p.isCut(t, conn, "POLICY_CHANGED")
	}
	inFamilies(t, func(t *testing.T, f lab.Family) {
		for _, name := range []string{"process", "pod"} {
			since := p.now(t)
			got := p.curl(t, p.who(name), p.web(f))
			if begun := p.begun(t, since, p.web(f)); got.err == nil || !slices.Contains(begun, got.client) || !p.told(t, since, got.path) {
				t.Errorf("curl of %s: %v, %q, connections %s; want its own, in the clear, and refused by the other node", name, got.err, got.out, begun)
			}
		}
	})
}
