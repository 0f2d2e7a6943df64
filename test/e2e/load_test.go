package e2e_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// TestSlowClients puts clients on the proxy that are slow on purpose, and handshakes without end, beside a good client: limits hold,
// each connection is told of once, and nothing is left when they have gone. With SLOW_CLIENTS=10000 it is `make bench-slow`, which also
// tells what the good client gets.
func TestSlowClients(t *testing.T) {
	leak.Check(t)
	l := newSiege(t)
	l.fresh = l.goroutines(t, l.startProxy(t))
	p := l.startProxy(t)
	l.quiet = l.judged(t, l.contender(), nil)
	l.rest, l.restFiles = memoryOf(t, p), descriptors(t, p)
	for _, a := range loadAttacks(l.n, l.floods) {
		l.face(t, p, a)
	}
	l.after = l.judged(t, l.contender(), nil)
	l.await(t)
	if left := l.goroutines(t, p); left > l.fresh+goroutineSlack {
		t.Errorf("%d goroutines are left, a fresh proxy has %d:\n%s", left, l.fresh, p.Output())
	}
	text := l.markdown()
	t.Log("\n\n" + text)
	if folder := os.Getenv("BENCH_PUBLISH"); folder != "" && !l.short {
		must(t, os.WriteFile(filepath.Join(folder, "bench-slow.md"), []byte(text), 0o644))
	}
}

const (
	shopPort = 8091 // of a service in the pod that speaks HTTP
	// crowdNetwork begins the addresses that attackers come from.
	crowdNetwork = "10.64."
	// loadFiles are the descriptors that a process has beside those of connections, of which each takes two.
	loadFiles = 1024
	// loadTime is how long the good client is watched in each part of a full run.
	loadTime      = 15 * time.Second
	loadTimeShort = time.Second
	// goroutineSlack is what comes and goes by itself: a stream to the agent, timers.
	goroutineSlack = 8
)

// siege is the world of the benchmark with a service that speaks HTTP.
type siege struct {
	*proxyBench
	n, floods int // slow connections, and handshakes at a time
	places    int // that the proxy has
	sources   int // addresses of attackers
	pause     time.Duration
	time      time.Duration
	config    string // of the proxy
	forged    string // folder with a certificate of another authority
	bad       string // and with one whose owner may use the HTTP service alone
	records   *followed

	fresh        int // goroutines of a proxy that has done little
	rest         float64
	restFiles    int
	quiet, after loadSaid
	faced        []faced
	connected    int64
}

// pastPlaces is the one attack that is beyond a limit of the proxy's.
const pastPlaces = "say nothing, more than there are places"

// loadAttack is one way to be a bad client.
type loadAttack struct {
	name, do string
	n        int
	port     uint16
	forged   bool     // half of them have a certificate of another authority
	reasons  []string // of which each must be in the records
}

// loadAttacks stay within the proxy's limits, but for one.
func loadAttacks(n, floods int) []loadAttack {
	return []loadAttack{
		{name: "say nothing", do: "silent", n: n, port: benchBackend, reasons: []string{"HANDSHAKE_TIMEOUT"}},
		{name: pastPlaces, do: "silent", n: 2 * n, port: benchBackend, reasons: []string{"LIMIT"}},
		{name: "drip a ClientHello", do: "drip", n: n, port: benchBackend, reasons: []string{"HANDSHAKE_TIMEOUT"}},
		{name: "drip the header of a request", do: "header", n: n, port: shopPort, reasons: []string{"REQUEST_LIMIT"}},
		{name: "drip a body", do: "body", n: n, port: shopPort, reasons: []string{"REQUEST_LIMIT"}},
		{name: "hold HTTP/2 idle", do: "h2", n: n, port: shopPort, reasons: []string{"OPEN"}},
		{name: "handshakes without end", do: "flood", n: floods, port: benchBackend, forged: true, reasons: []string{"NOT_AUTHORISED", "HANDSHAKE_FAILED"}},
	}
}

// faced is what an attack did.
type faced struct {
	loadAttack
	beside, during []loadSaid // of the good client, with the attack at somebody else, and at the proxy, by round
	bare           []loadSaid // of a good client of that somebody
	connected      int64
	took           time.Duration // of the attack, in all rounds
	memory, left   float64       // KiB of the proxy, at most at the end of a round, and after the last
	reasons        map[string]uint64
}

func newSiege(t *testing.T) *siege {
	t.Helper()
	l := &siege{n: 64, floods: 4, sources: 20, pause: 100 * time.Millisecond, time: loadTimeShort}
	if v := os.Getenv("SLOW_CLIENTS"); v != "" {
		var err error
		l.n, err = strconv.Atoi(v)
		must(t, err)
		l.floods, l.sources, l.pause, l.time = 128, 1000, 0, loadTime
	}
	l.raiseFiles(t)
	short := l.time == loadTimeShort
	l.proxyBench = newProxyBench(t, options{plain: !short, resource: fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: shop}
spec:
  target: Pod
  ports: [%d]
  addresses: ["10.2.0.2"]
  http:
    authenticate: [spiffe]
    limits: {headerTimeout: %[2]s, bodyTimeout: %[2]s, bodyRate: 1KiB}
  access: [{identities: [%[3]q]}]
---
`, shopPort, l.patience(), mallory)})
	l.short = short
	for _, lab := range []*lab.Lab{l.plain, l.world.Lab} {
		(&world{Lab: lab}).routeCrowd(t)
	}
	w := l.world
	web := loadRole{Do: "web", At: netip.AddrPortFrom(w.Pod.Addr(lab.IPv4), shopPort)}
	_, err := w.Pod.Start(l.asLoad(web))
	must(t, err)
	l.makeIdentities(t)
	l.writeLoadConfig(t)
	l.records = w.follow(t)
	return l
}

// patience is how slow a client may be.
func (l *siege) patience() time.Duration {
	if l.time == loadTimeShort {
		return 2 * time.Second
	}
	return 5 * time.Second
}

// makeIdentities makes those of attackers.
func (l *siege) makeIdentities(t *testing.T) {
	t.Helper()
	l.bad, l.forged = filepath.Join(l.world.Dir, "bad"), filepath.Join(l.world.Dir, "forged")
	other, err := devauthority.New(domain, devauthority.Options{})
	must(t, err)
	for dir, from := range map[string]*devauthority.Authority{l.bad: l.world.authority, l.forged: other} {
		must(t, os.Mkdir(dir, 0o755))
		writePEM(t, from, mallory, dir)
	}
	bundle, err := os.ReadFile(filepath.Join(l.bad, "bundle.pem")) // the proxy is the real one
	must(t, err)
	must(t, os.WriteFile(filepath.Join(l.forged, "bundle.pem"), bundle, 0o400))
}

// writeLoadConfig gives the proxy its places.
func (l *siege) writeLoadConfig(t *testing.T) {
	t.Helper()
	config, err := os.ReadFile(l.world.files.proxy)
	must(t, err)
	l.config = filepath.Join(l.world.Dir, "load.yaml")
	limits := fmt.Sprintf("maxConnections: %d, handshakeTimeout: %s", l.places, l.patience())
	write(t, l.config, strings.ReplaceAll(string(config), "maxConnections: 4000, handshakeTimeout: 2s", limits))
}

// raiseFiles has all programs open as many files as they need, if we may, and settles for fewer connections if not.
func (l *siege) raiseFiles(t *testing.T) {
	t.Helper()
	var files unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &files))
	l.places = l.n * 5 / 4 // of which the proven have 7 in 8
	if need := uint64(2*l.places + loadFiles); files.Max < need {
		switch err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: need, Max: need}); {
		case err == nil:
			t.Cleanup(func() { must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &files)) })
		case errors.Is(err, unix.EPERM):
			l.places = int(files.Max-loadFiles) / 2
			l.n = l.places * 5 / 6
			t.Logf("no process may have more than %d files open here: %d connections", files.Max, l.n)
		default:
			t.Fatal(err)
		}
	}
}

func (l *siege) startProxy(t *testing.T) *lab.Process {
	t.Helper()
	d := l.world.daemon("sallyport-proxy", "--config", l.config)
	l.world.proxy = d
	d.start(t)
	waitUntil(t, "the proxy to serve", func() bool { return l.serves(l.contender()) })
	return d.proc
}

func (l *siege) contender() contender {
	return contender{lab: l.world.Lab, at: netip.AddrPortFrom(l.world.Pod.Addr(lab.IPv4), benchBackend)}
}

func (l *siege) asLoad(r loadRole) *exec.Cmd { return exec.Command(l.self, loadCommand, r.text()) }

// loadClient is a process that attacks, or is good.
type loadClient struct {
	proc    *lab.Process
	end     *os.File
	answers *bufio.Scanner
}

// begin returns when the clients are ready.
func (l *siege) begin(t *testing.T, in *lab.Lab, r loadRole) *loadClient {
	t.Helper()
	say, says := pipe(t)
	heard, hears := pipe(t)
	cmd := l.asLoad(r)
	cmd.Stdin, cmd.Stdout = say, hears
	p, err := in.Client.Start(cmd)
	must(t, err)
	must(t, errors.Join(say.Close(), hears.Close()))
	c := &loadClient{proc: p, end: says, answers: bufio.NewScanner(heard)}
	c.answers.Buffer(nil, 1<<20)
	if !c.answers.Scan() || c.answers.Text() != "ready" {
		_ = p.Wait(within(t, time.Second))
		t.Fatalf("clients (%s) did not become ready: %s", r.Do, p.Output())
	}
	return c
}

// finish ends the clients, and gives what became of them.
func (c *loadClient) finish(t *testing.T) (said loadSaid) {
	t.Helper()
	must(t, c.end.Close())
	if !c.answers.Scan() {
		t.Fatalf("clients did not say what became of them: %s", c.proc.Output())
	}
	must(t, json.Unmarshal(c.answers.Bytes(), &said))
	must(t, c.proc.Wait(within(t, patience)))
	return said
}

// judged watches a good client of somebody for a while. Whoever is given must still run then.
func (l *siege) judged(t *testing.T, of contender, beside *loadClient) loadSaid {
	t.Helper()
	good := l.begin(t, of.lab, loadRole{Do: "good", At: of.at, PEM: []string{l.web}})
	var ended <-chan struct{}
	if beside != nil {
		ended = beside.proc.Exited()
	}
	select {
	case <-ended:
		t.Fatalf("the attack ended: %s", beside.proc.Output())
	case <-time.After(l.time): // what is measured
	}
	return good.finish(t)
}

// face has the proxy face an attack, after somebody else has.
func (l *siege) face(t *testing.T, p *lab.Process, a loadAttack) {
	t.Helper()
	f := &faced{loadAttack: a, reasons: map[string]uint64{}}
	before := l.reasons(t)
	for range l.rounds {
		if !l.short {
			beside, bare := l.elsewhere(t, a)
			f.beside, f.bare = append(f.beside, beside), append(f.bare, bare)
		}
		l.endure(t, p, f)
	}
	f.left = memoryOf(t, p)
	l.connected += f.connected
	if !l.short { // to be told of each attack by itself takes a while
		l.settled(t)
		t.Logf("%s: %d connections, all: %d, told of: %d", a.name, f.connected, l.connected, l.told(t))
	}
	for reason, n := range l.reasons(t) {
		if n > before[reason] {
			f.reasons[reason] = n - before[reason]
		}
	}
	l.faced = append(l.faced, *f)
}

// endure puts the attack on the proxy for a while: who may come through does, each time, and the log says why attackers do not.
func (l *siege) endure(t *testing.T, p *lab.Process, f *faced) {
	t.Helper()
	before, began := l.reasons(t), time.Now()
	attack := l.begin(t, l.world.Lab, l.attack(f.loadAttack, netip.AddrPortFrom(l.world.Pod.Addr(lab.IPv4), f.port)))
	good := l.judged(t, l.contender(), attack)
	l.awaitReasons(t, f.loadAttack, before)
	f.memory = max(f.memory, memoryOf(t, p))
	f.connected += attack.finish(t).Connected
	f.took += time.Since(began)
	waitUntil(t, "the connections of those who "+f.name+" to end", func() bool { return descriptors(t, p) <= l.restFiles })
	if failed := good.New.Failed + good.Live.Failed; failed > 0 || len(good.New.Took) == 0 || len(good.Live.Took) == 0 {
		t.Errorf("while others %s, a good client had %d new connections and %d requests, and %d failures", f.name, len(good.New.Took), len(good.Live.Took), failed)
	}
	f.during = append(f.during, good)
}

func (l *siege) attack(a loadAttack, at netip.AddrPort) loadRole {
	r := loadRole{Do: a.do, At: at, PEM: []string{l.bad}, N: a.n, Sources: l.sources, Pause: l.pause}
	if a.forged {
		r.PEM = append(r.PEM, l.forged)
	}
	return r
}

// elsewhere puts the attack on a listener that is not Sallyport's, and watches a good client of that, as soon after the attack has begun as it is
// watched at Sallyport. Then it is one that comes through Sallyport: the machine's cores are as busy.
func (l *siege) elsewhere(t *testing.T, a loadAttack) (good, bare loadSaid) {
	t.Helper()
	c := contender{name: "bare listener", lab: l.plain, at: netip.AddrPortFrom(l.plain.Node.Addr(lab.IPv4), 15001)}
	c.start = func(t *testing.T) *lab.Process {
		t.Helper()
		p, err := l.plain.Node.Start(l.asLoad(loadRole{Do: "bare", At: c.at, To: netip.AddrPortFrom(l.plain.Pod.Addr(lab.IPv4), benchBackend),
			PEM: []string{l.pem}, N: l.places, Pause: l.patience()}))
		must(t, err)
		return p
	}
	l.run(t, c, func(*lab.Process) {
		attack := l.begin(t, l.plain, l.attack(a, c.at))
		bare = l.judged(t, c, attack)
		good = l.judged(t, l.contender(), attack)
		attack.finish(t)
	})
	return good, bare
}

// reasons adds up what the collector has of attackers: refusals by reason, and how many came through.
func (l *siege) reasons(t *testing.T) map[string]uint64 {
	t.Helper()
	sums := map[string]uint64{}
	for _, r := range l.records.all(t) {
		switch {
		case !strings.HasPrefix(r.Client, crowdNetwork):
		case r.Event == "OPEN":
			sums["OPEN"] += r.Count
		case r.Event == "DENY":
			sums[r.Reason] += r.Count
		case r.Event == "CLOSE" && r.Reason == "LIMIT", r.Event == "REQUEST" && r.Reason == "REQUEST_LIMIT":
			sums[r.Reason+" of who was let in"] += r.Count
		}
	}
	return sums
}

// awaitReasons waits until the log says why attackers are refused.
func (l *siege) awaitReasons(t *testing.T, a loadAttack, before map[string]uint64) {
	t.Helper()
	defer func() {
		if t.Failed() {
			t.Logf("the log has %v, had %v before", l.reasons(t), before)
		}
	}()
	waitUntil(t, fmt.Sprintf("%v of those who %s", a.reasons, a.name), func() bool {
		now := l.reasons(t)
		for _, reason := range a.reasons {
			in := reason + " of who was let in"
			if now[reason]+now[in] <= before[reason]+before[in] {
				return false
			}
		}
		return true
	})
}

// ofRequests are refusals on connections that were told of when they opened.
var ofRequests = []string{"REQUEST_LIMIT", "BAD_REQUEST"}

// told are the connections of attackers that the log tells of: each was let in, or refused.
func (l *siege) told(t *testing.T) (n int64) {
	t.Helper()
	for _, r := range l.records.all(t) {
		if strings.HasPrefix(r.Client, crowdNetwork) && (r.Event == "OPEN" || r.Event == "DENY" && !slices.Contains(ofRequests, r.Reason)) {
			n += int64(r.Count)
		}
	}
	return n
}

// await waits until the log tells of all connections. Nobody is told of twice.
func (l *siege) await(t *testing.T) {
	t.Helper()
	waitUntil(t, fmt.Sprintf("records of %d connections", l.connected), func() bool { return l.told(t) >= l.connected })
	if told := l.told(t); told != l.connected {
		t.Errorf("records tell of %d connections, there were %d", told, l.connected)
	}
}

// settled returns when no more is told for longer than equal refusals are held back.
func (l *siege) settled(t *testing.T) {
	t.Helper()
	last, since := l.told(t), time.Now()
	for ; time.Since(since) < 7*time.Second; time.Sleep(100 * time.Millisecond) { // between two looks
		if now := l.told(t); now != last {
			last, since = now, time.Now()
		}
	}
}

// descriptors are the open files of a process.
func descriptors(t *testing.T, p *lab.Process) int {
	t.Helper()
	all, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.Pid()))
	must(t, err)
	return len(all)
}

// goroutines ends a process, which lists them.
func (l *siege) goroutines(t *testing.T, p *lab.Process) int {
	t.Helper()
	must(t, p.Signal(syscall.SIGQUIT))
	_ = p.Wait(within(t, patience)) // it does not end well
	return len(regexp.MustCompile(`(?m)^goroutine \d+ `).FindAllString(p.Output(), -1))
}
