package e2e_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// proxyUser is who the proxy is by default.
const proxyUser = 65532

// otherProxy is a program in the place of sallyport-proxy, as docs/other-proxies.md starts it.
type otherProxy struct {
	program string
	example string   // its configuration, in deploy/examples/other-proxies
	exec    []string // options of `sallyport-proxy exec`
	args    func(config string) []string
	reads   bool // knows one SPIFFE ID from another
}

func otherProxies() []otherProxy {
	return []otherProxy{
		{"haproxy", "haproxy.cfg", nil, func(config string) []string { return []string{"-db", "-f", config} }, true},
		{"nginx", "nginx.conf", []string{"--listen", "NGINX"}, func(config string) []string {
			return []string{"-e", "stderr", "-c", config, "-g", "daemon off;"}
		}, false},
	}
}

// TestAnotherProxy: HAProxy and nginx, with the configurations that the documents show and no line of ours in them, serve
// steered clients in px; services see the clients' own addresses. Without one nobody is served.
func TestAnotherProxy(t *testing.T) {
	leak.Check(t)
	for _, p := range otherProxies() {
		t.Run(p.program, func(t *testing.T) {
			t.Parallel()
			program, err := exec.LookPath(filepath.Join("/usr/sbin", p.program))
			if err != nil {
				t.Skipf("needs %s: apt-get install %[1]s", p.program)
			}
			w := newWorld(t, options{})
			for _, d := range []*daemon{w.collector, w.agent, w.guard} {
				d.start(t)
			}
			w.unserved(t)
			other := w.startOther(t, p, program)
			w.confined(t, other)
			for _, service := range services() {
				for _, f := range lab.Families() {
					for _, way := range w.ways(service, f) {
						t.Run(service+"/"+f.String()+"/"+way.name, func(t *testing.T) { w.servedByOther(t, way, p.reads) })
					}
				}
			}
			w.wantSaid(t, "listening", 0)
			must(t, other.Signal(syscall.SIGTERM)) // nginx takes its workers with it
			_ = other.Wait(within(t, patience))
			w.unserved(t)
		})
	}
}

// startOther has the program run in px, with a certificate of the proxy's identity and the bundle in files of its user.
func (w *world) startOther(t *testing.T, p otherProxy, program string) *lab.Process {
	t.Helper()
	dir := filepath.Join(w.Dir, "other")
	must(t, os.Mkdir(dir, 0o755))
	config := filepath.Join(dir, p.example)
	example, err := os.ReadFile("../../deploy/examples/other-proxies/" + p.example)
	must(t, err)
	must(t, os.WriteFile(config, []byte(strings.NewReplacer("/etc/sallyport/proxy", dir, "/run/sallyport-nginx", dir).Replace(string(example))), 0o644))
	writePEM(t, w.authority, proxyID, dir)
	must(t, os.Chown(dir, proxyUser, proxyUser))
	args := slices.Concat([]string{"exec", "--config", w.files.proxy}, p.exec, []string{"--", program}, p.args(config))
	process, err := w.Node.Start(exec.Command(filepath.Join(w.bin, "sallyport-proxy"), args...))
	must(t, err)
	waitUntil(t, p.program+" to listen", func() bool {
		select {
		case <-process.Exited():
			t.Fatalf("%s ended:\n%s", p.program, process.Output())
		default:
		}
		return w.saysOfProxy(t) == "listening"
	})
	return process
}

// writePEM writes svid.pem, with certificate and key of an identity, and bundle.pem for the proxy's user.
func writePEM(t *testing.T, a *devauthority.Authority, id spiffeid.ID, dir string) {
	t.Helper()
	svid, err := a.Issue(id)
	must(t, err)
	chain, key, err := svid.Marshal()
	must(t, err)
	bundle, err := a.Bundle().Marshal()
	must(t, err)
	for name, data := range map[string][]byte{"svid.pem": slices.Concat(chain, key), "bundle.pem": bundle} {
		path := filepath.Join(dir, name)
		must(t, os.WriteFile(path, data, 0o400))
		must(t, os.Chown(path, proxyUser, proxyUser))
	}
}

// confined: the program is held as sallyport-proxy is, with all that it started.
func (w *world) confined(t *testing.T, p *lab.Process) {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Pid()))
	must(t, err)
	for _, want := range []string{
		"Uid:\t65532\t65532\t65532\t65532\n", "Gid:\t65532\t65532\t65532\t65532\n", "NoNewPrivs:\t1\n",
		"CapPrm:\t0000000000002000\n", "CapEff:\t0000000000002000\n", "CapBnd:\t0000000000002000\n",
	} {
		if !strings.Contains(string(status), want) {
			t.Errorf("status of the program lacks %q:\n%s", want, status)
		}
	}
}

// servedByOther: who has an identity is served, and nobody without.
func (w *world) servedByOther(t *testing.T, c way, reads bool) {
	w.wantReason(t, "NO_PATH", func() {
		if o := c.identified(within(t, patience), w, web); o.who != proxied {
			t.Errorf("client with an identity answered by %s, want the proxy", o)
		}
	})
	came := w.came()
	refused := map[string]outcome{"plain client": c.plain(within(t, patience)), "client of another authority": w.foreign(t, c)}
	if reads {
		for _, id := range []spiffeid.ID{mallory, spiffeid.RequireFromPath(domain, web.Path()+"s")} {
			refused[id.String()] = c.identified(within(t, patience), w, id)
		}
	}
	for who, o := range refused {
		if o.err == nil && o.own.IsValid() || o.who == direct || o.who == proxied {
			t.Errorf("%s answered by %s", who, o)
		}
	}
	if now := w.came(); now != came {
		t.Errorf("%d connections came to the services from those who are to be refused", now-came)
	}
}

// foreign comes with a certificate of web's name by an authority that nobody knows.
func (w *world) foreign(t *testing.T, c way) outcome {
	t.Helper()
	a, err := devauthority.New(domain, devauthority.Options{})
	must(t, err)
	svid, err := a.Issue(web)
	must(t, err)
	return c.with(within(t, patience), w, svid)
}

// came is how many connections the two services have seen.
func (w *world) came() (n int) {
	for _, s := range w.echoes {
		n += len(s.Peers())
	}
	return n
}

// unserved: without a proxy nobody is answered, the kernel says why, and so does status.
func (w *world) unserved(t *testing.T) {
	t.Helper()
	for _, service := range services() {
		way := w.ways(service, lab.IPv4)[0]
		w.wantReason(t, "NO_PATH", func() {
			before := w.counters(t)
			if o := way.identified(within(t, silence), w, web); o.who != nobody {
				t.Errorf("client of %s answered by %s, want silence", service, o)
			}
			if after := w.counters(t); after["NO_LISTENER"] <= before["NO_LISTENER"] {
				t.Errorf("NO_LISTENER stays at %d", after["NO_LISTENER"])
			}
		})
	}
	w.wantSaid(t, "NOT LISTENING", 0)
}

// saysOfProxy is what status has of the proxy.
func (w *world) saysOfProxy(t *testing.T) string {
	t.Helper()
	for line := range strings.Lines(w.cli(t, "status")) {
		if rest, ok := strings.CutPrefix(line, "proxy "); ok {
			said, _, _ := strings.Cut(strings.TrimSpace(rest), ":")
			return said
		}
	}
	return ""
}

// wantSaid: status and metrics tell what is there, and that no records come from it.
func (w *world) wantSaid(t *testing.T, proxy string, reporting int) {
	t.Helper()
	if got := w.saysOfProxy(t); got != proxy {
		t.Errorf("status says of the proxy %q, want %q", got, proxy)
	}
	listening := 0
	if proxy == "listening" {
		listening = 1
	}
	metrics := w.metrics(t)
	for name, want := range map[string]int{"listening": listening, "reporting": reporting} {
		if line := fmt.Sprintf("sallyport_proxy_%s %d\n", name, want); !strings.Contains(metrics, line) {
			t.Errorf("metrics lack %q", line)
		}
	}
}
