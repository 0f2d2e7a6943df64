package e2e_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/test/lab"
)

const (
	bannerPort  = sinkPort // in the other node's pod: a server that speaks first
	openPort    = 9000     // on the other node: of nobody's service
	firstClient = 20000    // below those that the kernel gives
	banner      = "SSH-2.0-lab ready\r\n"
)

// pair is two nodes with a Sallyport each: workloads of here ask for services of there, by way of the machine between the two.
type pair struct {
	here, there   *world
	wire          *lab.Tap  // on the machine between
	asked, served *followed // records of here and of there
	callers       []caller
	entries       []devauthority.Entry
	applied       string     // remote services
	ports         uint16     // of clients so far, from firstClient on
	conns         []net.Conn // of dial
	rotated       []net.Conn // those of them that live since before a rotation
}

// caller is a workload of here.
type caller struct {
	name  string
	ns    *lab.Namespace
	id    spiffeid.ID // zero: it is not registered
	group *lab.Group  // of its container; nil: a process of the node
}

// newPair has both nodes ready, and no remote service yet.
func newPair(t *testing.T) *pair {
	t.Helper()
	p := &pair{here: newWorld(t, options{workloads: true})}
	p.there = newWorld(t, options{beside: p.here})
	t.Cleanup(func() {
		for _, c := range p.conns {
			c.Close()
		}
	})
	var err error
	p.wire, err = p.here.Client.Capture(hostPort, podPort, sinkPort, openPort)
	must(t, err)
	p.startNginx(t)
	for _, f := range lab.Families() {
		_, err := p.there.Pod.Serve(netip.AddrPortFrom(unspecified(f), bannerPort), speakFirst)
		must(t, err)
	}
	for _, both := range [][]*daemon{{p.here.collector, p.there.collector}, {p.here.agent, p.there.agent}, {p.here.guard, p.there.guard}, {p.here.proxy, p.there.proxy}} {
		for _, d := range both {
			must(t, d.launch())
		}
		for _, d := range both {
			must(t, d.wait())
		}
	}
	p.asked, p.served = p.here.follow(t), p.there.follow(t)
	p.callers = []caller{
		{"process", p.here.Node, web, nil}, p.pod(t, "pod", 0, web),
		{"other process", p.here.Node, mallory, nil}, p.pod(t, "other pod", 1, mallory),
		{"unregistered process", p.here.Node, spiffeid.ID{}, nil}, p.pod(t, "unregistered pod", 1, spiffeid.ID{}),
	}
	return p
}

// pod is a container of a pod of here, which the authority knows by the pod's UID.
func (p *pair) pod(t *testing.T, name string, at int, id spiffeid.ID) caller {
	t.Helper()
	uid := fmt.Sprintf("00000000-0000-4000-8000-%012d", len(p.entries)+1)
	if id.IsZero() {
		uid = "00000000-0000-4000-8000-000000000000"
	}
	var group *lab.Group
	path := ""
	for _, part := range []string{"kubepods", "pod" + uid, strings.Repeat("0f", 32)} {
		path = filepath.Join(path, part)
		if exists(filepath.Join(p.here.Cgroup(), path)) {
			continue
		}
		var err error
		group, err = p.here.NewGroup(path)
		must(t, err)
	}
	if !id.IsZero() {
		p.register(devauthority.Entry{ID: id, PodUID: uid})
	}
	return caller{name, p.here.Pods[at], id, group}
}

func (p *pair) register(e devauthority.Entry) {
	p.entries = append(p.entries, e)
	p.here.authority.SetEntries(p.entries...)
}

// forget takes entries away and gives what brings them back.
func (p *pair) forget(match func(devauthority.Entry) bool) (back func()) {
	before := slices.Clone(p.entries)
	p.entries = slices.DeleteFunc(p.entries, match)
	p.here.authority.SetEntries(p.entries...)
	return func() {
		p.entries = before
		p.here.authority.SetEntries(p.entries...)
	}
}

func speakFirst(c net.Conn) {
	if _, err := io.WriteString(c, banner); err == nil {
		_, _ = io.Copy(c, c)
	}
}

// nginxConfig is of a web server that answers with what it was asked for, and whom it saw.
const nginxConfig = `pid %[1]s/nginx.pid;
error_log stderr;
daemon off;
master_process off;
events {}
http {
  access_log off;
  client_body_temp_path %[1]s; proxy_temp_path %[1]s; fastcgi_temp_path %[1]s; uwsgi_temp_path %[1]s; scgi_temp_path %[1]s;
  server {
    listen %[2]d; listen [::]:%[2]d ipv6only=on; listen %[3]d; listen [::]:%[3]d ipv6only=on;
    return 200 "$uri seen from $remote_addr\n";
  }
}
`

// startNginx serves on the other node, at a port of host-echo and at one of nobody's.
func (p *pair) startNginx(t *testing.T) {
	t.Helper()
	dir := filepath.Join(p.there.Dir, "nginx")
	must(t, os.Mkdir(dir, 0o755)) // nginx makes it its user's
	file := filepath.Join(dir, "nginx.conf")
	write(t, file, fmt.Sprintf(nginxConfig, dir, sinkPort, openPort))
	server, err := p.there.Node.Start(exec.Command("/usr/sbin/nginx", "-e", "stderr", "-c", file))
	must(t, err)
	waitUntil(t, "nginx", func() bool {
		select {
		case <-server.Exited():
			t.Fatalf("nginx ended:\n%s", server.Output())
		default:
		}
		c, err := p.there.Node.Dial(t.Context(), netip.AddrPort{}, netip.AddrPortFrom(lab.IPv6.Loopback(), openPort))
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

// remote is a document of a RemoteService.
func remote(name string, addresses []netip.Addr, ports string, answers spiffeid.ID, callers, more string) string {
	return fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: RemoteService
metadata: {name: %s}
spec:
  addresses: ["%s", "%s"]
  ports: [%s]
  identities: [%q]
  callers: [%q]
%s---
`, name, addresses[0], addresses[1], ports, answers, callers, more)
}

// far is the remote service that both services of there are, for callers.
func (p *pair) far(callers string) string {
	node, pod := p.there.Node, p.there.Pod
	return remote("far-host", []netip.Addr{node.Addr(lab.IPv4), node.Addr(lab.IPv6)}, fmt.Sprintf("%d, %d", hostPort, sinkPort), p.there.own("proxy"), callers, "") +
		remote("far-pod", []netip.Addr{pod.Addr(lab.IPv4), pod.Addr(lab.IPv6)}, fmt.Sprintf("%d, %d", podPort, bannerPort), p.there.own("proxy"), callers, "")
}

// open is the remote service at a place without Sallyport.
func (p *pair) open(more string) string {
	node := p.there.Node
	return remote("open", []netip.Addr{node.Addr(lab.IPv4), node.Addr(lab.IPv6)}, fmt.Sprint(openPort), p.there.own("proxy"), web.String(), more)
}

// apply has the node take remote services, and waits until agent and proxy have them in force.
func (p *pair) apply(t *testing.T, yaml string) {
	t.Helper()
	yaml = "# no others\n" + yaml
	if yaml == p.applied {
		return
	}
	p.applied = yaml
	inForce := func() (n [2]int) {
		return [2]int{strings.Count(p.here.agent.proc.Output(), "resources in force"), strings.Count(p.here.proxy.proc.Output(), "policy in force")}
	}
	before := inForce()
	p.here.writeResources(t, "20-remote.yaml", yaml)
	waitUntil(t, "the remote services to be in force", func() bool {
		now := inForce()
		return now[0] > before[0] && now[1] > before[1]
	})
}

// fetched is what curl came back with.
type fetched struct {
	path   string // that it asked for, which is said nowhere else
	out    string
	err    error
	client netip.AddrPort
}

// served tells whether the server answered, to a client of that address.
func (f fetched) servedTo(a netip.Addr) bool {
	return f.err == nil && f.out == fmt.Sprintf("%s seen from %s\n", f.path, a)
}

// isReset tells whether the connection was reset, which curl may learn as soon as it is there.
func (f fetched) isReset() bool {
	return f.err != nil && (strings.Contains(f.out, "reset by peer") || strings.Contains(f.out, "Failed to connect"))
}

// curl has an unchanged curl ask as the workload.
func (p *pair) curl(t *testing.T, c caller, to netip.AddrPort) fetched {
	t.Helper()
	return p.curlFor(t, patience, c, to)
}

// curlFor has it wait that long.
func (p *pair) curlFor(t *testing.T, most time.Duration, c caller, to netip.AddrPort) fetched {
	t.Helper()
	f := fetched{path: "/" + ulid.Make().String(), client: netip.AddrPortFrom(c.ns.Addr(familyOf(to)), firstClient+p.ports)}
	p.ports++
	r := p.start(t, c, "curl", "-sS", "--max-time", fmt.Sprint(most.Seconds()), "--local-port", strconv.Itoa(int(f.client.Port())), "http://"+to.String()+f.path)
	f.err = r.Wait(within(t, patience+most))
	f.out = r.Output()
	return f
}

// start runs a program as the workload. A process of the node is registered before the program begins in it.
func (p *pair) start(t *testing.T, c caller, args ...string) *lab.Process {
	t.Helper()
	if c.group != nil {
		r, err := c.group.Start(c.ns, exec.Command(args[0], args[1:]...))
		must(t, err)
		return r
	}
	held := exec.Command("sh", append([]string{"-c", `read go; exec "$@"`, "sh"}, args...)...)
	release, err := held.StdinPipe()
	must(t, err)
	r, err := c.ns.Start(held)
	must(t, err)
	if !c.id.IsZero() {
		p.register(devauthority.Entry{ID: c.id, PID: int32(r.Pid())})
	}
	_, err = io.WriteString(release, "\n")
	must(t, err)
	return r
}

// dial connects as the workload. What is no pod is the process of the test.
func (p *pair) dial(t *testing.T, c caller, to netip.AddrPort) (conn net.Conn, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	do := c.ns.Do
	if c.group != nil {
		do = func(f func() error) error { return c.group.Do(c.ns, f) }
	} else if !slices.ContainsFunc(p.entries, func(e devauthority.Entry) bool { return e.PID == int32(os.Getpid()) }) {
		p.register(devauthority.Entry{ID: c.id, PID: int32(os.Getpid())})
	}
	err = do(func() (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, "tcp", to.String())
		return err
	})
	if err == nil {
		p.conns = append(p.conns, conn)
	}
	return conn, err
}

// talk connects as the workload to echo, in each family, and keeps the connections. They have been answered once.
func (p *pair) talk(t *testing.T, c caller) (live []net.Conn) {
	t.Helper()
	for _, f := range lab.Families() {
		conn, err := p.dial(t, c, p.echo(f))
		must(t, err)
		if _, err := lab.Ask(conn); err != nil {
			t.Fatalf("%s is not served in %s: %v", c.name, f, err)
		}
		live = append(live, conn)
	}
	return live
}

// who is the caller of that name.
func (p *pair) who(name string) caller {
	return p.callers[slices.IndexFunc(p.callers, func(c caller) bool { return c.name == name })]
}

// isCut waits for the end of a connection on which nobody says a word, and for its record.
func (p *pair) isCut(t *testing.T, c net.Conn, reason string) {
	t.Helper()
	must(t, c.SetReadDeadline(time.Now().Add(2*patience)))
	if n, err := c.Read(make([]byte, 1)); !isReset(err) {
		t.Fatalf("live connection: read %d bytes, %v; want a reset", n, err)
	}
	p.asked.find(t, "the end of the live connection", func(r record) bool {
		return r.Event == "CLOSE" && r.Client == c.LocalAddr().String() && r.Reason == reason
	})
}

// goOn: live connections are answered.
func goOn(t *testing.T, live []net.Conn) {
	t.Helper()
	for _, c := range live {
		if _, err := lab.Ask(c); err != nil {
			t.Errorf("live connection of %s: %v", c.LocalAddr(), err)
		}
	}
}
