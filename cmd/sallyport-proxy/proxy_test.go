package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/test/lab"
)

func TestCarriesInTheClientsName(t *testing.T) {
	b := newBench(t, nil)
	for _, f := range lab.Families() {
		t.Run(f.String(), func(t *testing.T) {
			b := b.in(t)
			service, err := b.Pod.WhoAnswers(b.target(f))
			b.must(err)
			c := b.dialAs(f, web)
			seen, err := lab.Ask(c)
			b.must(err)
			own := c.LocalAddr().(*net.TCPAddr).AddrPort()
			if seen.Addr() != b.Client.Addr(f) || seen.Addr() != own.Addr().Unmap() {
				t.Errorf("service saw %s, client is %s", seen, own)
			}
			if seen.Port() < 10240 || seen.Port() > 32767 {
				t.Errorf("port %d is outside px's range", seen.Port())
			}
			b.must(c.Close())
			if peers := service.Peers(); len(peers) != 1 {
				t.Errorf("service had connections from %v", peers)
			}
		})
	}
	open, end := b.find("OPEN", "IDENTITY"), b.find("CLOSE", "CLOSED")
	for _, r := range []struct{ what, have, want string }{
		{"identity", open.Identity, web.String()}, {"service", open.Service, "postgres"},
		{"verdict", open.Verdict, "PROXIED"}, {"server", open.Server, b.target(lab.IPv4).String()},
		{"flow", end.FlowId, open.FlowId}, {"client", end.Client, open.Client}, {"protocol", end.Protocol, "tcp"},
	} {
		if r.have != r.want {
			t.Errorf("%s is %q, want %q", r.what, r.have, r.want)
		}
	}
	if !strings.HasPrefix(open.Client, b.Client.Addr(lab.IPv4).String()+":") || open.Cpu != -1 || open.Boot.AsDuration() <= 0 {
		t.Errorf("record %v", open)
	}
	if end.BytesToServer != uint64(len("who answers?\n")) || end.BytesToClient == 0 {
		t.Errorf("bytes %d and %d", end.BytesToServer, end.BytesToClient)
	}
}

func TestNoTLSIsReset(t *testing.T) {
	b := newBench(t, nil)
	service := b.serve(lab.IPv4, func(net.Conn) {})
	c := b.plain(b.target(lab.IPv4))
	_, err := c.Write([]byte("GET / HTTP/1.0\r\n\r\n"))
	b.must(err)
	b.resets(c)
	r := b.find("DENY", "NO_TLS")
	if r.Verdict != "DENIED" || r.Service != "postgres" || r.Identity != "" || !strings.Contains(r.Detail, "0x47") {
		t.Errorf("record %v", r)
	}
	if peers := service.Peers(); len(peers) > 0 {
		t.Errorf("reached the service: %v", peers)
	}
}

func TestSilenceTimesOut(t *testing.T) {
	b := newBench(t, func(s *settings) { s.handshake = 300 * time.Millisecond })
	t.Run("no byte", func(t *testing.T) { b.in(t).resets(b.plain(b.target(lab.IPv4))) })
	t.Run("first byte only", func(t *testing.T) {
		b := b.in(t)
		c := b.plain(b.target(lab.IPv6))
		_, err := c.Write([]byte{0x16})
		b.must(err)
		b.resets(c)
	})
	b.find("DENY", "HANDSHAKE_TIMEOUT")
}

func TestLeavesWithoutAWord(t *testing.T) {
	b := newBench(t, nil)
	b.must(b.plain(b.target(lab.IPv4)).Close())
	if r := b.find("DENY", "HANDSHAKE_FAILED"); !strings.Contains(r.Detail, "first byte") {
		t.Errorf("record %v", r)
	}
}

func TestNotAuthorised(t *testing.T) {
	b := newBench(t, nil)
	service := b.serve(lab.IPv4, func(net.Conn) {})
	c := b.tlsAs(b.plain(b.target(lab.IPv4)), mallory)
	_, err := c.Write([]byte("early data of a client that does not wait"))
	if err == nil {
		_, err = c.Read(make([]byte, 1))
	}
	if err == nil || !strings.Contains(err.Error(), "bad certificate") {
		t.Errorf("client sees %v, want the alert", err)
	}
	if r := b.find("DENY", "NOT_AUTHORISED"); r.Identity != mallory.String() || r.Service != "postgres" {
		t.Errorf("record %v", r)
	}
	if peers := service.Peers(); len(peers) > 0 {
		t.Errorf("reached the service: %v", peers)
	}
}

func TestForeignAuthority(t *testing.T) {
	b := newBench(t, nil)
	other, err := devauthority.New(domain, devauthority.Options{})
	b.must(err)
	mine := b.authority
	b.authority = other // same names, other keys
	c := b.tlsAs(b.plain(b.target(lab.IPv4)), web)
	b.authority = mine
	if err := c.Handshake(); err == nil {
		t.Error("client trusts a foreign proxy")
	}
	svid, err := other.Issue(web)
	b.must(err)
	c = b.tlsWith(b.plain(b.target(lab.IPv4)), svid)
	_, err = c.Read(make([]byte, 1))
	if err == nil || !strings.Contains(err.Error(), "bad certificate") {
		t.Errorf("client sees %v, want the alert", err)
	}
	if r := b.find("DENY", "HANDSHAKE_FAILED"); r.Identity != "" {
		t.Errorf("an unproven identity is in the record: %v", r)
	}
}

func TestUnknownService(t *testing.T) {
	b := newBench(t, nil)
	b.refuses(b.unknown())
	if r := b.find("DENY", "UNKNOWN_SERVICE"); r.Server != b.unknown().String() {
		t.Errorf("record %v", r)
	}
}

func TestConnectionLimit(t *testing.T) {
	b := newBench(t, func(s *settings) { s.connections = 2 })
	_, err := b.Pod.WhoAnswers(b.target(lab.IPv4))
	b.must(err)
	first, second := b.dialAs(lab.IPv4, web), b.dialAs(lab.IPv4, web)
	for _, c := range []net.Conn{first, second} {
		_, err := lab.Ask(c)
		b.must(err)
	}
	b.refuses(b.target(lab.IPv4))
	b.find("DENY", "LIMIT")
	b.must(first.Close())
	b.find("CLOSE", "CLOSED")
	third := b.dialAs(lab.IPv4, web)
	_, err = lab.Ask(third)
	b.must(err)
}

// Connections that prove nothing do not keep out one that does, however many they are.
func TestSilenceKeepsNobodyOut(t *testing.T) {
	b := newBench(t, func(s *settings) { s.connections = 2 })
	_, err := b.Pod.WhoAnswers(b.target(lab.IPv4))
	b.must(err)
	for range 4 {
		b.plain(b.target(lab.IPv4))
	}
	c := b.dialAs(lab.IPv4, web)
	_, err = lab.Ask(c)
	b.must(err)
	b.find("DENY", "LIMIT")
	b.plain(b.target(lab.IPv4))
	b.plain(b.target(lab.IPv4))
	_, err = lab.Ask(c)
	b.must(err)
}

func TestUpstreamRefuses(t *testing.T) {
	b := newBench(t, nil)
	c := b.tlsAs(b.plain(b.closed()), web)
	_, err := c.Read(make([]byte, 1))
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("client sees %v", err)
	}
	if r := b.find("DENY", "UPSTREAM_FAILED"); r.Identity != web.String() || !strings.Contains(r.Detail, "refused") {
		t.Errorf("record %v", r)
	}
}

// A SYN that is dropped stands for a tuple that a bypassed flow holds.
func TestDialTriesAnotherPort(t *testing.T) {
	b := newBench(t, func(s *settings) { s.dial = 3 * time.Second })
	tap, err := b.Pod.Tap(port)
	b.must(err)
	b.serve(lab.IPv4, func(net.Conn) {})
	b.blackhole(b.Client.Addr(lab.IPv4))
	c := b.tlsAs(b.plain(b.target(lab.IPv4)), web)
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("client sees %v", err)
	}
	if r := b.find("DENY", "UPSTREAM_FAILED"); !strings.Contains(r.Detail, "timeout") {
		t.Errorf("record %v", r)
	}
	packets, err := tap.Packets()
	b.must(err)
	ports := map[uint16]bool{}
	for _, p := range packets {
		if p.SYN && !p.ACK && !p.Outgoing {
			ports[p.Src.Port()] = true
		}
	}
	if len(ports) < 2 {
		t.Errorf("dialled from ports %v, want at least two", ports)
	}
}

func TestHalfClose(t *testing.T) {
	b := newBench(t, nil)
	heard := make(chan string, 2)
	b.serve(lab.IPv4, func(c net.Conn) { // answers when the client has ended its half
		data, err := io.ReadAll(c)
		b.check(err)
		heard <- string(data)
		_, err = io.WriteString(c, "answer after EOF")
		b.check(err)
	})
	b.serve(lab.IPv6, func(c net.Conn) { // ends its half first
		_, err := io.WriteString(c, "greeting")
		b.check(err)
		b.check(c.(*net.TCPConn).CloseWrite())
		data, err := io.ReadAll(c)
		b.check(err)
		heard <- string(data)
	})
	t.Run("client first", func(t *testing.T) {
		b := b.in(t)
		c := b.dialAs(lab.IPv4, web)
		_, err := io.WriteString(c, "question")
		b.must(err)
		b.must(c.CloseWrite())
		data, err := io.ReadAll(c)
		if err != nil || string(data) != "answer after EOF" {
			t.Errorf("client read %q, %v", data, err)
		}
		if got := <-heard; got != "question" {
			t.Errorf("service read %q", got)
		}
	})
	t.Run("service first", func(t *testing.T) {
		b := b.in(t)
		c := b.dialAs(lab.IPv6, web)
		data, err := io.ReadAll(c)
		if err != nil || string(data) != "greeting" {
			t.Errorf("client read %q, %v", data, err)
		}
		_, err = io.WriteString(c, "said after the service's EOF")
		b.must(err)
		b.must(c.CloseWrite())
		if got := <-heard; got != "said after the service's EOF" {
			t.Errorf("service read %q", got)
		}
	})
	b.find("CLOSE", "CLOSED")
}

func TestBrokenStreamsAreResetOnTheOtherSide(t *testing.T) {
	b := newBench(t, nil)
	ended := make(chan error, 2)
	b.serve(lab.IPv4, func(c net.Conn) {
		_, err := io.ReadAll(c)
		ended <- err
	})
	b.serve(lab.IPv6, func(c net.Conn) {
		_, err := c.Read(make([]byte, 1))
		b.check(err)
		b.check(c.(*net.TCPConn).SetLinger(0))
	})
	t.Run("client ends without close_notify", func(t *testing.T) {
		b := b.in(t)
		raw := b.plain(b.target(lab.IPv4))
		c := b.tlsAs(raw, web)
		_, err := io.WriteString(c, "half a statement")
		b.must(err)
		b.must(raw.CloseWrite())
		if err := <-ended; !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("service sees %v, want a reset", err)
		}
	})
	t.Run("client resets", func(t *testing.T) {
		b := b.in(t)
		raw := b.plain(b.target(lab.IPv4))
		c := b.tlsAs(raw, web)
		_, err := io.WriteString(c, "half a statement")
		b.must(err)
		b.must(raw.SetLinger(0))
		b.must(raw.Close())
		if err := <-ended; !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("service sees %v, want a reset", err)
		}
	})
	t.Run("service resets", func(t *testing.T) {
		b := b.in(t)
		c := b.dialAs(lab.IPv6, web)
		_, err := io.WriteString(c, "x")
		b.must(err)
		b.resets(c)
	})
}

func TestBackPressureAndIntegrity(t *testing.T) {
	const size = 48 << 20
	b := newBench(t, nil)
	read, sum := make(chan struct{}), make(chan []byte, 1)
	b.serve(lab.IPv4, func(c net.Conn) { // does not read until it is told to; then echoes the digest
		<-read
		h := sha256.New()
		_, err := io.Copy(h, c)
		b.check(err)
		sum <- h.Sum(nil)
		_, err = c.Write(bytes.Repeat(h.Sum(nil), size/32))
		b.check(err)
	})
	c := b.dialAs(lab.IPv4, web)
	source := io.LimitReader(rand.NewChaCha8([32]byte{1}), size)
	want := sha256.New()
	source = io.TeeReader(source, want)

	b.must(c.NetConn().SetWriteDeadline(time.Now().Add(wait)))
	b.must(c.NetConn().SetReadDeadline(time.Time{}))
	sent, blocked := make(chan int64, 1), make(chan struct{})
	progress := &counter{w: c, moved: make(chan struct{}, 1)}
	go func() {
		n, err := io.Copy(progress, source)
		b.check(err)
		b.check(c.CloseWrite())
		sent <- n
	}()
	go func() { // blocked: nothing moved for half a second
		defer close(blocked)
		for {
			select {
			case <-progress.moved:
			case <-time.After(500 * time.Millisecond):
				return
			}
		}
	}()
	<-blocked
	select {
	case n := <-sent:
		t.Fatalf("all %d bytes were taken though the service read none", n)
	default:
	}
	b.must(c.NetConn().SetWriteDeadline(time.Now().Add(time.Minute)))
	close(read)
	if n := <-sent; n != size {
		t.Errorf("sent %d", n)
	}
	if got := <-sum; !bytes.Equal(got, want.Sum(nil)) {
		t.Error("service read something else than the client wrote")
	}
	back, err := io.Copy(&repeats{of: want.Sum(nil)}, c)
	if err != nil || back != size {
		t.Errorf("read %d bytes back: %v", back, err)
	}
	r := b.find("CLOSE", "CLOSED")
	if r.BytesToServer != size || r.BytesToClient != size {
		t.Errorf("record counts %d and %d bytes", r.BytesToServer, r.BytesToClient)
	}
}

func TestIdleConnectionsEnd(t *testing.T) {
	b := newBench(t, func(s *settings) { s.idle = time.Second })
	service := make(chan error, 1)
	b.serve(lab.IPv4, func(c net.Conn) {
		_, err := io.ReadAll(c)
		service <- err
	})
	c := b.dialAs(lab.IPv4, web)
	start := time.Now()
	for range 4 { // activity in one direction keeps it
		_, err := c.Write([]byte("x"))
		b.must(err)
		time.Sleep(400 * time.Millisecond)
	}
	b.resets(c)
	if d := time.Since(start); d < 2*time.Second {
		t.Errorf("ended after %s in spite of activity", d)
	}
	if err := <-service; !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("service sees %v", err)
	}
	b.find("CLOSE", "IDLE_TIMEOUT")
}

func TestChangesCutLiveConnections(t *testing.T) {
	ops := spiffeid.RequireFromPath(domain, "/ops/oncall")
	b := newBench(t, nil)
	b.writePolicy(policyFor(web, ops))
	_, err := b.Pod.WhoAnswers(b.target(lab.IPv4))
	b.must(err)
	stays := b.eventually(lab.IPv4, ops)
	goes := b.dialAs(lab.IPv4, web)
	_, err = lab.Ask(goes)
	b.must(err)

	b.writePolicy(policyFor(ops))
	b.must(goes.SetDeadline(time.Now().Add(wait)))
	b.resets(goes)
	if r := b.find("CLOSE", "POLICY_CHANGED"); r.Identity != web.String() {
		t.Errorf("record %v", r)
	}
	if _, err = lab.Ask(stays); err != nil {
		t.Errorf("a connection that is still allowed was cut: %v", err)
	}

	b.writePolicy("kind: Nonsense\n") // changes nothing
	b.authority.Rotate()              // neither does a rotation
	if _, err = lab.Ask(b.dialAs(lab.IPv4, ops)); err != nil {
		t.Errorf("the last good policy is not kept: %v", err)
	}
	if _, err = lab.Ask(stays); err != nil {
		t.Errorf("cut by a bad file or a rotation: %v", err)
	}
	b.must(b.authority.ReplaceRoot())
	b.must(stays.SetDeadline(time.Now().Add(wait)))
	b.resets(stays)
}

// TestExpiryEndsLiveConnections: a connection lasts as long as the certificate that it was let in by, and the
// grace; that the proxy's own is renewed meanwhile cuts nothing.
func TestExpiryEndsLiveConnections(t *testing.T) {
	const ttl, grace = 3 * time.Second, time.Second
	b := newBench(t, func(s *settings) { s.ttl, s.grace = ttl, grace })
	_, err := b.Pod.WhoAnswers(b.target(lab.IPv4))
	b.must(err)
	svid, err := b.authority.Issue(web)
	b.must(err)
	old := b.tlsWith(b.plain(b.target(lab.IPv4)), svid)
	end := svid.Certificates[0].NotAfter.Add(grace)
	for time.Until(end) > 200*time.Millisecond {
		if _, err := lab.Ask(old); err != nil {
			t.Fatalf("%s before the end: %v", time.Until(end), err)
		}
		time.Sleep(50 * time.Millisecond) // between two requests
	}
	young := b.dialAs(lab.IPv4, web)
	b.must(old.SetDeadline(time.Now().Add(wait)))
	b.resets(old)
	if late := time.Since(end); late < 0 || late > 3*time.Second {
		t.Errorf("reset %s after the end of certificate and grace", late)
	}
	if _, err := lab.Ask(young); err != nil {
		t.Errorf("a connection with a newer certificate: %v", err)
	}
	r := b.find("CLOSE", "IDENTITY_EXPIRED")
	if r.Identity != web.String() || !strings.Contains(r.Detail, svid.Certificates[0].NotAfter.UTC().Format(time.RFC3339)) {
		t.Errorf("record %v", r)
	}
	late := b.tlsWith(b.plain(b.target(lab.IPv4)), svid)
	if _, err := lab.Ask(late); err == nil {
		t.Error("a certificate that has expired let somebody in")
	}
	b.find("DENY", "HANDSHAKE_FAILED")
}

func TestDrain(t *testing.T) {
	b := newBench(t, func(s *settings) { s.drain = 2 * time.Second })
	_, err := b.Pod.WhoAnswers(b.target(lab.IPv4))
	b.must(err)
	silent := b.plain(b.target(lab.IPv4)) // before the others: when they are served, it was accepted
	ends, lasts := b.dialAs(lab.IPv4, web), b.dialAs(lab.IPv4, web)
	for _, c := range []net.Conn{ends, lasts} {
		_, err = lab.Ask(c)
		b.must(err)
	}
	b.must(b.proxy.Signal(unix.SIGTERM))
	b.resets(silent) // had proven nothing
	soon, cancel := context.WithTimeout(b.ctx, 300*time.Millisecond)
	defer cancel()
	if c, err := b.Client.Dial(soon, netip.AddrPort{}, b.target(lab.IPv4)); err == nil {
		c.Close()
		t.Error("a new connection was accepted while draining")
	}
	if _, err := lab.Ask(ends); err != nil {
		t.Errorf("a live connection was cut at once: %v", err)
	}
	b.must(ends.Close())
	b.must(lasts.SetDeadline(time.Now().Add(wait)))
	b.resets(lasts)
	if err := b.proxy.Wait(b.ctx); err != nil {
		t.Errorf("proxy ended with %v", err)
	}
	b.find("CLOSE", "CLOSED")
	b.find("CLOSE", "DRAINED")
	b.find("DENY", "DRAINED")
}

func TestNoOwnIdentity(t *testing.T) {
	b := newBench(t, func(s *settings) { s.noIdentity = true })
	c := b.tlsAs(b.plain(b.target(lab.IPv4)), web)
	if err := c.Handshake(); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("client sees %v", err)
	}
	b.find("DENY", "NO_OWN_IDENTITY")
}

func TestNoPolicyLetsNobodyIn(t *testing.T) {
	b := newBench(t, nil)
	b.must(os.Remove(b.run + "/policy.yaml")) // the last good one stays in force
	_, err := b.Pod.WhoAnswers(b.target(lab.IPv4))
	b.must(err)
	_, err = lab.Ask(b.dialAs(lab.IPv4, web))
	b.must(err)
	b.must(b.proxy.Kill())
	b.startProxy(settings{handshake: time.Second, idle: time.Hour, dial: time.Second, drain: time.Second, connections: 10})
	b.refuses(b.target(lab.IPv4))
	if r := b.find("DENY", "UNKNOWN_SERVICE"); !strings.Contains(r.Detail, "no policy") {
		t.Errorf("record %v", r)
	}
	b.writePolicy(policyFor(web))
	_, err = lab.Ask(b.eventually(lab.IPv4, web))
	b.must(err)
}

func TestWorksWithoutAgent(t *testing.T) {
	b := newBench(t, func(s *settings) { s.noAgent = true })
	_, err := b.Pod.WhoAnswers(b.target(lab.IPv4))
	b.must(err)
	c := b.dialAs(lab.IPv4, web)
	_, err = lab.Ask(c)
	b.must(err)
	b.must(c.Close())
	b.startAgent() // and the records were kept for it
	b.find("OPEN", "IDENTITY")
	b.find("CLOSE", "CLOSED")
}

func TestWaitsForPx(t *testing.T) {
	b := newBench(t, func(s *settings) { s.noPx = true })
	b.until(func() bool { return strings.Contains(b.proxy.Output(), "waiting for the px namespace") })
	b.makePx()
	b.until(func() bool { return strings.Contains(b.proxy.Output(), "msg=listening") })
	_, err := b.Pod.WhoAnswers(b.target(lab.IPv4))
	b.must(err)
	_, err = lab.Ask(b.eventually(lab.IPv4, web))
	b.must(err)
}

func TestRunsConfined(t *testing.T) {
	b := newBench(t, nil)
	status, err := os.Open("/proc/" + itoa(b.proxy.Pid()) + "/status")
	b.must(err)
	defer status.Close()
	want := map[string]string{
		"CapInh": "0000000000002000", "CapPrm": "0000000000002000", "CapEff": "0000000000002000",
		"CapBnd": "0000000000002000", "CapAmb": "0000000000002000", "NoNewPrivs": "1",
		"Uid": "65532\t65532\t65532\t65532", "Gid": "65532\t65532\t65532\t65532", "Groups": "",
	}
	for s := bufio.NewScanner(status); s.Scan(); {
		key, value, _ := strings.Cut(s.Text(), ":")
		if expected, ok := want[key]; ok && strings.TrimSpace(value) != expected {
			t.Errorf("%s is %q, want %q", key, value, expected)
		}
		delete(want, key)
	}
	if len(want) > 0 {
		t.Errorf("not told: %v", want)
	}
	own, err := os.Stat("/proc/" + itoa(b.proxy.Pid()) + "/ns/net")
	b.must(err)
	px, err := os.Stat(b.run + "/px")
	b.must(err)
	if !os.SameFile(own, px) {
		t.Error("proxy is not in px")
	}
}

func TestEndsWhenPxIsReplaced(t *testing.T) {
	b := newBench(t, nil)
	b.must(unix.Unmount(b.run+"/px", unix.MNT_DETACH))
	if err := b.proxy.Wait(b.ctx); err == nil {
		t.Error("proxy ended without an error")
	}
	if !strings.Contains(b.proxy.Output(), "another namespace") {
		t.Errorf("proxy said %s", b.proxy.Output())
	}
}
