package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/pkg/px"
	"github.com/sallyport-dev/sallyport/test/lab"
)

const asProgram = "SALLYPORT_PROXY_TEST_AS_PROGRAM"

// TestMain is also the program under test: the launcher executes the test binary again.
func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// port of the services and of the proxy: routes alone, without the programs that assign packets to
// the proxy's listener, cannot lead to another port.
const port = 5432

var (
	domain  = spiffeid.RequireTrustDomainFromString("example.org")
	web     = spiffeid.RequireFromPath(domain, "/app/web")
	mallory = spiffeid.RequireFromPath(domain, "/app/mallory")
	proxyID = spiffeid.RequireFromPath(domain, "/sallyport/proxy/node-1")
)

const wait = 10 * time.Second

// bench is a lab whose node steers to px by routes of the test, in place of the tc programs: what
// comes from client or pod for the other goes to px0; what px sends goes where it is addressed.
type bench struct {
	*testing.T
	*lab.Lab
	ctx       context.Context
	authority *devauthority.Authority
	run       string
	notify    *net.UnixConn // the service manager's end
	proxy     *lab.Process
	records   *collector
}

// settings that tests change.
type settings struct {
	handshake, idle, drain, dial time.Duration
	grace                        time.Duration
	ttl                          time.Duration // of identities; 0: an hour
	connections                  int
	noIdentity, noAgent, noPx    bool
	certificate                  bool // the proxy has a web certificate
	policy                       string
}

func newBench(t *testing.T, change func(*settings)) *bench {
	t.Helper()
	s := settings{handshake: 5 * time.Second, idle: time.Hour, drain: 5 * time.Second, dial: 5 * time.Second, connections: 1000,
		policy: policyFor(web)}
	if change != nil {
		change(&s)
	}
	b := &bench{T: t, Lab: lab.New(t, lab.Options{})}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	b.ctx = ctx
	t.Cleanup(cancel)
	b.run = filepath.Join(b.Dir, "run")
	b.must(os.Chmod(b.Dir, 0o755))
	b.must(os.Mkdir(b.run, 0o755))
	authority, err := devauthority.New(domain, devauthority.Options{TTL: s.ttl})
	b.must(err)
	b.authority = authority
	b.writePolicy(s.policy)
	if !s.noIdentity {
		b.background(func(ctx context.Context) error { return authority.Serve(ctx, b.workloadSocket(), proxyID) })
	}
	if !s.noAgent {
		b.startAgent()
	}
	if s.certificate {
		b.webCertificate()
	}
	b.steer(s.noPx)
	b.startProxy(s)
	return b
}

func (b *bench) must(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

func (b *bench) workloadSocket() string { return filepath.Join(b.run, "workload.sock") }

// background runs f until the test ends.
func (b *bench) background(f func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	b.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			b.Error(err)
		}
	})
}

func policyFor(ids ...spiffeid.ID) string {
	list := make([]string, len(ids))
	for i, id := range ids {
		list[i] = fmt.Sprintf("%q", id)
	}
	return fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: postgres}
spec:
  target: Pod
  ports: [%d]
  addresses: ["10.2.0.2", "fd00:2::2", "fd00:2::3"]
  access: [{identities: [%s]}]
`, port, strings.Join(list, ", "))
}

// writePolicy writes as the agent does: by rename.
func (b *bench) writePolicy(text string) {
	b.Helper()
	path := filepath.Join(b.run, "policy.yaml")
	b.must(os.WriteFile(path+".new", []byte(text), 0o644))
	b.must(os.Rename(path+".new", path))
}

// steer makes px and the routes that stand for the datapath.
func (b *bench) steer(later bool) {
	b.Helper()
	for _, dev := range []string{"all", "default", lab.Uplink, lab.PodDevice(0)} {
		b.must(b.Node.Sysctl("ipv4/conf/"+dev+"/rp_filter", "0"))
	}
	if !later {
		b.makePx()
	}
}

func (b *bench) makePx() {
	b.Helper()
	var ns *px.Namespace
	b.must(b.Node.Do(func() (err error) {
		ns, err = px.Create(px.Config{Path: filepath.Join(b.run, "px")})
		return err
	}))
	b.Cleanup(func() { ns.Close() })
	b.must(b.Node.Sysctl("ipv4/conf/px0/rp_filter", "0"))
	b.must(b.Node.Sysctl("ipv6/conf/px0/disable_ipv6", "0"))
	// without ARP each side sends to its own address: make it the other's as well
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 9}
	px0, err := b.Node.Netlink.LinkByName("px0")
	b.must(err)
	b.must(b.Node.Netlink.LinkSetHardwareAddr(px0, mac))
	b.must(ns.Do(func() error {
		px1, err := netlink.LinkByName("px1")
		if err != nil {
			return err
		}
		return netlink.LinkSetHardwareAddr(px1, mac)
	}))
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		b.steerFamily(family, px0.Attrs().Index)
	}
}

func (b *bench) steerFamily(family, px0 int) {
	b.Helper()
	everything := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	if family == netlink.FAMILY_V6 {
		everything = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	b.must(b.Node.Netlink.RouteAdd(&netlink.Route{Dst: everything, LinkIndex: px0, Table: 200}))
	for i, dev := range []string{lab.Uplink, lab.PodDevice(0)} {
		r := netlink.NewRule()
		r.Family, r.IifName, r.Table, r.Priority = family, dev, 200, 10+i
		b.must(b.Node.Netlink.RuleAdd(r))
	}
}

func (b *bench) startProxy(s settings) {
	b.Helper()
	path := filepath.Join(b.run, "notify")
	b.must(os.RemoveAll(path)) // of a proxy before
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	b.must(err)
	b.Cleanup(func() { notify.Close() })
	b.notify = notify
	b.must(os.Chmod(path, 0o666))
	config := filepath.Join(b.Dir, "agent.yaml")
	b.must(os.WriteFile(config, []byte(b.config(s)), 0o600)) // root's alone
	cmd := exec.Command("/proc/self/exe", "--config", config)
	cmd.Env = append(os.Environ(), asProgram+"=1", "NOTIFY_SOCKET="+path)
	b.proxy, err = b.Node.Start(cmd)
	b.must(err)
	if s.noPx {
		return
	}
	b.awaitReady(notify)
}

func (b *bench) awaitReady(notify *net.UnixConn) {
	b.Helper()
	buf := make([]byte, 100)
	b.must(notify.SetReadDeadline(time.Now().Add(wait)))
	n, err := notify.Read(buf)
	if err != nil || string(buf[:n]) != "READY=1" {
		b.Fatalf("proxy says %q (%v)", buf[:n], err)
	}
}

func (b *bench) config(s settings) string {
	return fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: AgentConfig
metadata: {name: node-1}
spec:
  trustDomain: example.org
  runDir: %s
  workloadAPI: unix://%s
  proxy: {listenPort: %d, maxConnections: %d, handshakeTimeout: %s, idleTimeout: %s, dialTimeout: %s, drainTimeout: %s, expiryGrace: %s%s}
`, b.run, b.workloadSocket(), port, s.connections, s.handshake, s.idle, s.dial, s.drain, s.grace, b.certificates(s))
}

func (b *bench) certificates(s settings) string {
	if !s.certificate {
		return ""
	}
	return fmt.Sprintf(", certificates: [{name: public, certFile: %s/web.pem, keyFile: %s/web.key}]", b.Dir, b.Dir)
}

// target is the service's address; somebody listens there when the test has started it.
func (b *bench) target(f lab.Family) netip.AddrPort { return netip.AddrPortFrom(b.Pod.Addr(f), port) }

// closed is protected, but nobody listens there.
func (b *bench) closed() netip.AddrPort { return netip.AddrPortFrom(b.Pod.Other(lab.IPv6), port) }

// unknown is in no service.
func (b *bench) unknown() netip.AddrPort { return netip.AddrPortFrom(b.Pod.Other(lab.IPv4), port) }

func (b *bench) serve(f lab.Family, handle func(net.Conn)) *lab.Service {
	b.Helper()
	s, err := b.Pod.Serve(b.target(f), handle)
	b.must(err)
	return s
}

// plain connects without proving anything.
func (b *bench) plain(to netip.AddrPort) *net.TCPConn {
	b.Helper()
	c, err := b.Client.Dial(b.ctx, netip.AddrPort{}, to)
	b.must(err)
	b.Cleanup(func() { c.Close() })
	b.must(c.SetDeadline(time.Now().Add(wait)))
	return c.(*net.TCPConn)
}

// tlsAs wraps a connection for the identity, without a handshake yet.
func (b *bench) tlsAs(c net.Conn, id spiffeid.ID) *tls.Conn {
	b.Helper()
	svid, err := b.authority.Issue(id)
	b.must(err)
	return tls.Client(c, tlsconfig.MTLSClientConfig(svid, b.authority.Bundle(), tlsconfig.AuthorizeID(proxyID)))
}

// dialAs connects as the identity and has the handshake done.
func (b *bench) dialAs(f lab.Family, id spiffeid.ID) *tls.Conn {
	b.Helper()
	c := b.tlsAs(b.plain(b.target(f)), id)
	b.must(c.HandshakeContext(b.ctx))
	return c
}

// refuses connects and wants a reset, which may come before the dial returns.
func (b *bench) refuses(to netip.AddrPort) {
	b.Helper()
	c, err := b.Client.Dial(b.ctx, netip.AddrPort{}, to)
	if err == nil {
		defer c.Close()
		b.must(c.SetDeadline(time.Now().Add(wait)))
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, unix.ECONNRESET) {
		b.Errorf("client sees %v, want a reset", err)
	}
}

// resets says whether the next read ends in RST.
func (b *bench) resets(c net.Conn) {
	b.Helper()
	n, err := c.Read(make([]byte, 1))
	if !errors.Is(err, unix.ECONNRESET) {
		b.Errorf("read %d bytes, %v; want a reset", n, err)
	}
}

// collector is the agent's side: a real ProxyReport server.
type collector struct {
	attester
	mu      sync.Mutex
	records []*api.FlowRecord // guarded by mu
	lost    uint64            // guarded by mu
	changed chan struct{}     // guarded by mu
	seen    map[string]uint64 // guarded by mu; last number of each instance
}

func (b *bench) startAgent() {
	b.Helper()
	b.records = &collector{changed: make(chan struct{}), seen: map[string]uint64{}}
	l, err := net.Listen("unix", filepath.Join(b.run, "proxy.sock"))
	b.must(err)
	b.must(os.Chmod(filepath.Join(b.run, "proxy.sock"), 0o666))
	s := grpc.NewServer()
	api.RegisterProxyReportServer(s, b.records)
	b.background(func(ctx context.Context) error {
		stop := context.AfterFunc(ctx, s.Stop)
		defer stop()
		return s.Serve(l)
	})
}

func (c *collector) Report(stream api.ProxyReport_ReportServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	instance := first.GetHello().GetInstance()
	for {
		frame, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := stream.Send(&api.ProxyAck{Seq: c.take(instance, frame.GetRecords())}); err != nil {
			return err
		}
	}
}

func (c *collector) take(instance string, r *api.ProxyRecords) uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, rec := range r.GetRecords() {
		if rec.Seq > c.seen[instance] {
			c.seen[instance] = rec.Seq
			c.records = append(c.records, rec)
		}
	}
	c.lost += r.GetLost()
	close(c.changed)
	c.changed = make(chan struct{})
	return c.seen[instance]
}

// find waits for a record of that event and reason.
func (b *bench) find(event, reason string) *api.FlowRecord {
	b.Helper()
	deadline := time.After(wait)
	for {
		b.records.mu.Lock()
		changed := b.records.changed
		for _, r := range b.records.records {
			if r.Event == event && r.Reason == reason {
				b.records.mu.Unlock()
				return r
			}
		}
		have := fmt.Sprint(b.records.records)
		b.records.mu.Unlock()
		select {
		case <-changed:
		case <-deadline:
			b.Fatalf("no record %s %s among %s", event, reason, have)
		}
	}
}
