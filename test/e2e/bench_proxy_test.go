package e2e_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// TestBenchProxy measures Sallyport's proxy with all that belongs to it beside HAProxy, nginx and a bare forwarder in Go, which have
// none of that, and what each part of it costs. Without BENCH_ROUNDS it shows that everything works.
func TestBenchProxy(t *testing.T) {
	leak.Check(t)
	b := newProxyBench(t, options{plain: true})
	contenders := append(b.outside(t), b.inside(t)...)
	for round := range b.rounds {
		for _, kinds := range b.turns() {
			for i := range contenders { // who comes first changes with the rounds
				b.measure(t, contenders[(i+round)%len(contenders)], kinds)
			}
		}
		for i := range contenders {
			b.weigh(t, contenders[(i+round)%len(contenders)])
		}
	}
	text := b.markdown(contenders)
	t.Log("\n\n" + text)
	if folder := os.Getenv("BENCH_PUBLISH"); folder != "" {
		must(t, os.WriteFile(filepath.Join(folder, "bench-proxy.md"), []byte(text), 0o644))
	}
}

// proxyBench is a lab for contenders that know nothing of Sallyport, and a world for those in px.
type proxyBench struct {
	rounds int
	short  bool
	self   string // this program
	plain  *lab.Lab
	world  *world
	pem    string // folder with svid.pem and bundle.pem of the proxy
	web    string // and of the client
	load   string // of the machine, when the run began
	series map[string]map[string][]float64
}

// contender is a proxy that is started for each measurement: nobody idles beside another.
type contender struct {
	name    string
	lab     *lab.Lab
	at      netip.AddrPort // where clients connect to
	start   func(t *testing.T) *lab.Process
	besides []*daemon // whose time counts, too
}

// kind is what a client does, and what is taken of it.
type benchKind struct {
	name string
	load role
	take func(gauged) map[string]float64
}

// What is measured, by the names in the tables.
const (
	perHandshake  = "connections, eight at a time, /s"
	cpuHandshake  = "CPU of a connection, µs"
	uploads       = "to the service, Gbit/s"
	downloads     = "from the service, Gbit/s"
	requestMedian = "request, p50, µs"
	requestTail   = "request, p99, µs"
	crowdedRate   = "requests, 16 at a time, /s"
	crowdedTail   = "16 at a time, p99, µs"
	idleMemory    = "1,000 idle connections, MiB"
)

func (b *proxyBench) kinds() []benchKind {
	micro := func(d time.Duration) float64 { return float64(d) / 1e3 }
	bits := func(name string) func(gauged) map[string]float64 {
		return func(g gauged) map[string]float64 { return map[string]float64{name: g.Bits / 1e9} }
	}
	return []benchKind{
		{perHandshake, role{Do: "handshakes", Connections: 8}, func(g gauged) map[string]float64 { return map[string]float64{perHandshake: g.PerSecond} }},
		{uploads, role{Do: "upload"}, bits(uploads)},
		{downloads, role{Do: "download"}, bits(downloads)},
		{requestMedian, role{Do: "requests", Connections: 1}, func(g gauged) map[string]float64 {
			return map[string]float64{requestMedian: micro(g.P50), requestTail: micro(g.P99)}
		}},
		{crowdedRate, role{Do: "requests", Connections: 16}, func(g gauged) map[string]float64 {
			return map[string]float64{crowdedRate: g.PerSecond, crowdedTail: micro(g.P99)}
		}},
	}
}

const (
	benchBackend = sinkPort // of the service, in the pod
	// benchCell is how long one load lasts in a full run.
	benchCell = 2 * time.Second
	// benchCellShort is for a run that shows that everything works.
	benchCellShort = 100 * time.Millisecond
	benchIdle      = 1000
	benchIdleShort = 20
)

// bare and whole are compared with the others.
const (
	bare  = "bare forwarder"
	whole = "Sallyport"
)

func newProxyBench(t *testing.T, o options) *proxyBench {
	t.Helper()
	b := &proxyBench{rounds: 1, short: true, series: map[string]map[string][]float64{}}
	if v := os.Getenv("BENCH_ROUNDS"); v != "" {
		var err error
		b.rounds, err = strconv.Atoi(v)
		must(t, err)
		b.short = false
	}
	loads, _ := os.ReadFile("/proc/loadavg") // without it nothing is known
	b.load = strings.Join(strings.Fields(string(loads))[:3], " ")
	b.plain, b.world = lab.New(t, lab.Options{}), newWorld(t, o)
	must(t, os.Chmod(b.plain.Dir, 0o755))
	b.copySelf(t)
	b.pem, b.web = filepath.Join(b.world.Dir, "pem"), filepath.Join(b.world.Dir, "web")
	for dir, id := range map[string]spiffeid.ID{b.pem: proxyID, b.web: web} {
		must(t, os.Mkdir(dir, 0o755))
		writePEM(t, b.world.authority, id, dir)
	}
	for _, l := range []*lab.Lab{b.plain, b.world.Lab} {
		for _, n := range []*lab.Namespace{l.Client, l.Node} { // or many connections use up the ports
			must(t, n.Sysctl("ipv4/ip_local_port_range", "10240 65535"))
			must(t, n.Sysctl("ipv4/tcp_tw_reuse", "1"))
		}
		_, err := l.Pod.Start(b.as(role{Do: "service", At: netip.AddrPortFrom(l.Pod.Addr(lab.IPv4), benchBackend)}))
		must(t, err)
	}
	for _, d := range []*daemon{b.world.collector, b.world.agent, b.world.guard} {
		d.start(t)
	}
	must(t, unix.Setpriority(unix.PRIO_PGRP, b.world.collector.proc.Pid(), 19)) // it stands for another machine
	return b
}

// copySelf puts this program where the proxy's user can execute it.
func (b *proxyBench) copySelf(t *testing.T) {
	t.Helper()
	own, err := os.Open("/proc/self/exe")
	must(t, err)
	defer own.Close()
	b.self = filepath.Join(b.world.Dir, "bench-proxy")
	out, err := os.OpenFile(b.self, os.O_CREATE|os.O_WRONLY, 0o755)
	must(t, err)
	_, err = io.Copy(out, own)
	must(t, errors.Join(err, out.Close()))
}

func (b *proxyBench) as(r role) *exec.Cmd { return exec.Command(b.self, benchProxyCommand, r.text()) }

func (r role) text() string {
	text, err := json.Marshal(r)
	if err != nil {
		panic(err) // of strings and numbers
	}
	return string(text)
}

// outside are the proxies without Sallyport: clients connect to them, and they to the one service that they know.
func (b *proxyBench) outside(t *testing.T) []contender {
	t.Helper()
	at, to := netip.AddrPortFrom(b.plain.Node.Addr(lab.IPv4), 15001), netip.AddrPortFrom(b.plain.Pod.Addr(lab.IPv4), benchBackend)
	haproxy, nginx := filepath.Join(b.plain.Dir, "haproxy.cfg"), filepath.Join(b.plain.Dir, "nginx.conf")
	write(t, haproxy, fmt.Sprintf(haproxyBench, at, b.pem, to))
	write(t, nginx, fmt.Sprintf(nginxBench, at, b.pem, to, b.plain.Dir))
	by := func(name string, args ...string) contender {
		return contender{name: name, lab: b.plain, at: at, start: func(t *testing.T) *lab.Process {
			t.Helper()
			p, err := b.plain.Node.Start(exec.Command(args[0], args[1:]...))
			must(t, err)
			return p
		}}
	}
	return []contender{
		by(bare, b.self, benchProxyCommand, role{Do: "forward", At: at, To: to, PEM: b.pem}.text()),
		by("HAProxy", "/usr/sbin/haproxy", "-db", "-f", haproxy),
		by("nginx", "/usr/sbin/nginx", "-e", "stderr", "-c", nginx, "-g", "daemon off;"),
	}
}

// Configurations of the peers: as Debian has them, with the cryptography that is compared.
const (
	haproxyBench = `global
    maxconn 4000
    ssl-default-bind-options ssl-min-ver TLSv1.3 no-tls-tickets
    ssl-default-bind-ciphersuites TLS_AES_128_GCM_SHA256
    tune.ssl.cachesize 0
defaults
    mode tcp
    timeout connect 5s
    timeout client 1h
    timeout server 1h
frontend bench
    bind %[1]s ssl crt %[2]s/svid.pem ca-file %[2]s/bundle.pem verify required
    default_backend service
backend service
    server one %[3]s
`
	nginxBench = `load_module /usr/lib/nginx/modules/ngx_stream_module.so;
pid %[4]s/nginx.pid;
error_log stderr;
worker_processes auto;
events { worker_connections 8000; }
stream {
    ssl_protocols TLSv1.3;
    ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;
    ssl_certificate %[2]s/svid.pem;
    ssl_certificate_key %[2]s/svid.pem;
    ssl_client_certificate %[2]s/bundle.pem;
    ssl_verify_client on;
    ssl_session_tickets off;
    ssl_session_cache off;
    proxy_timeout 1h;
    server {
        listen %[1]s ssl;
        proxy_pass %[3]s;
    }
}
`
)

// The parts of Sallyport, each with those before it.
const (
	inPx     = "bare forwarder, in px"
	verified = "and SPIFFE identities"
	silent   = "sallyport-proxy, no records"
)

// inside are those that clients are steered to: from a bare forwarder to the whole.
func (b *proxyBench) inside(t *testing.T) []contender {
	t.Helper()
	w := b.world
	at := netip.AddrPortFrom(w.Pod.Addr(lab.IPv4), benchBackend)
	by := func(name string, besides []*daemon, program string, args ...string) contender {
		return contender{name: name, lab: w.Lab, at: at, besides: besides, start: func(t *testing.T) *lab.Process {
			t.Helper()
			p, err := w.Node.Start(exec.Command(filepath.Join(w.bin, program), args...))
			must(t, err)
			return p
		}}
	}
	forwarder := func(name string, identity bool) contender {
		r := role{Do: "forward", At: netip.MustParseAddrPort("0.0.0.0:15001"), PEM: b.pem, Identity: identity}
		return by(name, nil, "sallyport-proxy", "exec", "--config", w.files.proxy, "--", b.self, benchProxyCommand, r.text())
	}
	return []contender{
		forwarder(inPx, false), forwarder(verified, true),
		by(silent, nil, "sallyport-proxy", "--config", b.withoutAgent(t)),
		by(whole, []*daemon{w.agent}, "sallyport-proxy", "--config", w.files.proxy),
	}
}

// withoutAgent is a configuration by which the proxy finds px and policy, and nobody who takes records.
func (b *proxyBench) withoutAgent(t *testing.T) string {
	t.Helper()
	w, run := b.world, filepath.Join(b.world.Dir, "silent")
	must(t, os.Mkdir(run, 0o755))
	for _, name := range []string{"px", "policy.yaml"} {
		must(t, os.Symlink(filepath.Join(w.files.run, name), filepath.Join(run, name)))
	}
	config, err := os.ReadFile(w.files.proxy)
	must(t, err)
	path := filepath.Join(w.Dir, "silent.yaml")
	write(t, path, strings.ReplaceAll(string(config), "runDir: "+w.files.run, "runDir: "+run))
	return path
}

// run has the contender serve while f runs.
func (b *proxyBench) run(t *testing.T, c contender, f func(*lab.Process)) {
	t.Helper()
	p := c.start(t)
	waitUntil(t, c.name+" to serve", func() bool {
		select {
		case <-p.Exited():
			t.Fatalf("%s ended:\n%s", c.name, p.Output())
		default:
		}
		return b.serves(c)
	})
	f(p)
	must(t, p.Signal(syscall.SIGTERM))
	_ = p.Wait(within(t, patience)) // it may not know the signal
}

// serves tries once, with little patience: a SYN that nobody takes is not repeated for a second.
func (b *proxyBench) serves(c contender) bool {
	ctx, cancel := context.WithTimeout(context.Background(), bound(300*time.Millisecond))
	defer cancel()
	conn, err := c.lab.Client.Dial(ctx, netip.AddrPort{}, c.at)
	if err != nil {
		return false
	}
	defer conn.Close()
	secured, err := b.world.secure(ctx, conn, web)
	if err != nil {
		return false
	}
	deadline, _ := ctx.Deadline()
	_, err = secured.Write([]byte{askEcho})
	return errors.Join(err, secured.SetDeadline(deadline), exchange(secured, []byte{1})) == nil
}

// turns are the kinds that a contender is measured in before the next one is: one, where that matters.
func (b *proxyBench) turns() (all [][]benchKind) {
	if b.short {
		return [][]benchKind{b.kinds()}
	}
	for _, k := range b.kinds() {
		all = append(all, []benchKind{k})
	}
	return all
}

func (b *proxyBench) measure(t *testing.T, c contender, kinds []benchKind) {
	t.Helper()
	b.run(t, c, func(p *lab.Process) {
		for _, k := range kinds {
			before := spent(t, p, c.besides)
			g := b.put(t, c, k, p)
			for name, v := range k.take(g) {
				b.add(name, c.name, v)
			}
			if k.name == perHandshake {
				b.add(cpuHandshake, c.name, float64(spent(t, p, c.besides)-before)/1e3/float64(g.Done))
			}
		}
	})
}

// put has a client put one load on the contender.
func (b *proxyBench) put(t *testing.T, c contender, k benchKind, p *lab.Process) (g gauged) {
	t.Helper()
	r := k.load
	r.At, r.PEM, r.Time = c.at, b.web, benchCell
	if b.short {
		r.Time = benchCellShort
	}
	out, err := c.lab.Client.Run(within(t, patience), b.self, benchProxyCommand, r.text())
	if err == nil {
		err = json.Unmarshal([]byte(out), &g)
	}
	if err != nil || g.Done == 0 {
		t.Fatalf("%s, %s: %v, %+v\n%s", c.name, k.name, err, g, p.Output())
	}
	return g
}

func (b *proxyBench) add(series, contender string, v float64) {
	if b.series[series] == nil {
		b.series[series] = map[string][]float64{}
	}
	b.series[series][contender] = append(b.series[series][contender], v)
}

// weigh compares what a fresh process has in memory with a few connections and with many more, which are idle.
func (b *proxyBench) weigh(t *testing.T, c contender) {
	t.Helper()
	few, more := benchIdle/5, benchIdle
	if b.short {
		few, more = benchIdleShort, benchIdleShort
	}
	b.run(t, c, func(p *lab.Process) {
		say, says := pipe(t)
		heard, hears := pipe(t)
		cmd := b.as(role{Do: "idle", At: c.at, PEM: b.web})
		cmd.Stdin, cmd.Stdout = say, hears
		client, err := c.lab.Client.Start(cmd)
		must(t, err)
		must(t, errors.Join(say.Close(), hears.Close()))
		answers := bufio.NewScanner(heard)
		open := func(n int) float64 {
			fmt.Fprintln(says, n)
			if !answers.Scan() {
				t.Fatalf("%s: the client did not open %d connections: %s", c.name, n, client.Output())
			}
			return memoryOf(t, p)
		}
		before := open(few)
		b.add(idleMemory, c.name, (open(few+more)-before)/float64(more)*1000/1024)
		must(t, says.Close())
		must(t, client.Wait(within(t, patience)))
	})
}

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	must(t, err)
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

// group lists the processes that a contender consists of.
func group(t *testing.T, p *lab.Process) (pids []int) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*")
	must(t, err)
	for _, dir := range all {
		pid, err := strconv.Atoi(filepath.Base(dir))
		must(t, err)
		if id, err := syscall.Getpgid(pid); err == nil && id == p.Pid() {
			pids = append(pids, pid)
		}
	}
	return pids
}

// spent is the CPU time of a contender and of what belongs to it.
func spent(t *testing.T, p *lab.Process, besides []*daemon) (sum time.Duration) {
	t.Helper()
	for _, pid := range group(t, p) {
		sum += cpuTime(t, pid)
	}
	for _, d := range besides {
		sum += cpuTime(t, d.proc.Pid())
	}
	return sum
}

// memoryOf is what of a contender is in memory, in KiB; what its processes share counts once.
func memoryOf(t *testing.T, p *lab.Process) (sum float64) {
	t.Helper()
	for _, pid := range group(t, p) {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		must(t, err)
		_, rest, ok := strings.Cut(string(text), "\nPss:")
		if !ok {
			t.Fatalf("no Pss of %d", pid)
		}
		kib, err := strconv.Atoi(strings.Fields(rest)[0])
		must(t, err)
		sum += float64(kib)
	}
	return sum
}
