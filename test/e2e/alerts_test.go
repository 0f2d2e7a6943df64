//go:build alerts

package e2e_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// alertTime bounds how long an alert takes to come, or to go.
var alertTime = bound(90 * time.Second)

// TestAlerts (`make test-alerts`) has a real Prometheus scrape a real agent and a real collector and evaluate the rules as they are shipped, but for their times and
// thresholds; a real Alertmanager is told. Each alert comes from what it is about, and goes.
func TestAlerts(t *testing.T) {
	leak.Check(t)
	w := newWorld(t, options{plain: true, resource: unseenService()})
	key := func(name string) string { return filepath.Join(w.Dir, name+".key") }
	for _, name := range glassPeople {
		w.cli(t, "keygen", "--out", key(name))
	}
	w.writeResources(t, "20-glass.yaml", glassResources(t, key))
	config, err := os.ReadFile(w.files.collector)
	must(t, err)
	write(t, w.files.collector, string(config)+"  metrics: \"127.0.0.1:9470\"\n")
	fill, free := w.smallDisk(t)
	for _, d := range []*daemon{w.collector, w.agent, w.guard, w.proxy} {
		d.start(t)
	}
	a := w.watchAlerts(t)
	a.quiet(t)

	g := w.breakGlass(t, key)
	a.fire(t, "BreakGlass", "LongGrant", "WideGrant", "PathUnused")
	w.countMore(t)
	w.revoke(t, g)
	a.fire(t, "ReconciliationDifference")
	a.clear(t, "BreakGlass", "LongGrant", "WideGrant", "PathUnused", "ReconciliationDifference")
	a.fire(t, "BreakGlassUnreviewed")
	w.cli(t, "grant", "review", g.ID, "--key", key("gil"), "--by", "gil", "--why", "it was a test", "--yes")
	a.clear(t, "BreakGlassUnreviewed")

	waitUntil(t, "records at the collector", func() bool { return len(w.grantEvents(t)) > 0 })
	w.collector.stop(t)
	a.fire(t, "CollectorDown")
	days, err := filepath.Glob(filepath.Join(w.files.records, "*.db"))
	must(t, err)
	must(t, os.Truncate(slices.Max(days), 5000))
	w.collector.start(t)
	a.fire(t, "DayDamaged", "ChainBreak", "Loss")
	w.collector.stop(t)
	w.collector.start(t)
	a.clear(t, "CollectorDown", "DayDamaged", "ChainBreak", "Loss")

	s := w.newSurvivor(t, "host-echo", lab.IPv6)
	w.agent.kill(t)
	a.fire(t, "SilentNode")
	ids := filepath.Join(w.Dir, "id")
	must(t, os.Rename(ids, ids+".away"))
	pod, err := w.StartPod(unseenPod, nil)
	must(t, err)
	if reaches(pod, netip.AddrPortFrom(w.Node.Addr(lab.IPv4), hostPort)) {
		t.Error("a pod without hooks reached the node")
	}
	w.forge(t, pod, s.direct.own, s.way.to)
	w.agent.start(t)
	a.fire(t, "BackstopHit", "UnexplainedTraffic", "IdentityStale")
	must(t, os.Rename(ids+".away", ids))
	a.clear(t, "SilentNode", "BackstopHit", "UnexplainedTraffic", "IdentityStale")

	fill()
	a.await(t, "CollectorCannotStore fires", func(active []string) bool {
		reaches(w.Pod, netip.AddrPortFrom(w.Node.Addr(lab.IPv4), hostPort)) // for a record
		return slices.Contains(active, "CollectorCannotStore")
	})
	free()
	a.clear(t, "CollectorCannotStore")

	must(t, os.RemoveAll(filepath.Join(w.bpffs, "sallyport")))
	a.fire(t, "EnforcementAttacked")
	a.clear(t, "EnforcementAttacked")

	w.writeResources(t, "30-wrong.yaml", "kind: Nothing\n")
	a.fire(t, "Problem")
	must(t, os.Remove(filepath.Join(w.files.resources, "30-wrong.yaml")))
	a.clear(t, "Problem")

	drop := "table inet closed { chain out { type filter hook output priority 0; oif lo tcp dport " + strconv.Itoa(hostPort) + " drop; }; }"
	_, err = w.Node.Run(t.Context(), "nft", drop) // probes are lost before they come to a hook
	must(t, err)
	w.agent.stop(t)
	must(t, w.agent.launch())
	a.fire(t, "NotReady")
	_, err = w.Node.Run(t.Context(), "nft", "delete table inet closed")
	must(t, err)
	a.clear(t, "NotReady")
}

// smallDisk has the collector's records on a disk of their own. What it returns fills that disk, and empties it again.
func (w *world) smallDisk(t *testing.T) (fill, free func()) {
	t.Helper()
	must(t, os.MkdirAll(w.files.records, 0o700))
	must(t, unix.Mount("tmpfs", w.files.records, "tmpfs", 0, "size=64m,mode=0700"))
	t.Cleanup(func() {
		w.collector.stop(t)
		must(t, unix.Unmount(w.files.records, 0))
	})
	ballast := filepath.Join(w.files.records, "ballast")
	return func() {
		f, err := os.Create(ballast)
		must(t, err)
		defer f.Close()
		if _, err := io.Copy(f, zeros{}); !errors.Is(err, unix.ENOSPC) {
			t.Fatalf("fill the collector's disk: %v", err)
		}
	}, func() { must(t, os.Remove(ballast)) }
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// countMore has the kernel count a flow of each path that no record will tell of.
func (w *world) countMore(t *testing.T) {
	t.Helper()
	paths, err := ebpf.LoadPinnedMap(w.pinned("sp_paths"), nil)
	must(t, err)
	defer paths.Close()
	var slot uint32
	var path bpf.SallyportSpPath
	for it := paths.Iterate(); it.Next(&slot, &path); {
		if path.Epoch == 0 {
			continue
		}
		path.Flows++
		path.BytesToServer += 4096
		must(t, paths.Update(slot, &path, ebpf.UpdateExist))
	}
}

// breakGlass opens a path as people do when nothing else works.
func (w *world) breakGlass(t *testing.T, key func(string) string) activated {
	t.Helper()
	file := filepath.Join(w.Dir, "glass.grant")
	way := w.ways("host-echo", lab.IPv4)[0]
	w.cli(t, "grant", "issue", "--break-glass", "--service", way.service, "--client", way.from.String(), "--for", "10m", "--node", nodeName,
		"--max-bytes", "4MiB", "--reason", "the provider is down", "--key", key("dana"), "--policy", w.files.resources, "--out", file, "--yes")
	for _, who := range []string{"eli", "fay"} {
		w.cli(t, "grant", "approve", file, "--key", key(who), "--policy", w.files.resources, "--out", file+"."+who, "--yes")
		file += "." + who
	}
	return read[activated](t, w, "grant", "activate", file, "--key", key("dana"), "--yes")
}

// alerting is a Prometheus and an Alertmanager on the node.
type alerting struct {
	client http.Client
	procs  []*lab.Process
}

// quick are the rules with times and thresholds for a test; promtool's tests hold the real ones. Each replacement must have something to
// replace.
func quick(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile("../../deploy/prometheus/rules.yaml")
	must(t, err)
	rules := string(data)
	for _, r := range [][2]string{{`for: \w+`, "for: 1s"}, {`\[15m\]`, "[20s]"}, {` > 32\b`, " > 0"}, {` > 14400\b`, " > 400"}, {` > 1800\b`, " > 3"}} {
		pattern := regexp.MustCompile(r[0])
		if !pattern.MatchString(rules) {
			t.Fatalf("rules have no %s", r[0])
		}
		rules = pattern.ReplaceAllString(rules, r[1])
	}
	return rules
}

func (w *world) watchAlerts(t *testing.T) *alerting {
	t.Helper()
	dir := filepath.Join(w.Dir, "alerts")
	must(t, os.Mkdir(dir, 0o755))
	write(t, filepath.Join(dir, "rules.yaml"), quick(t))
	for _, name := range []string{"prometheus.yaml", "alertmanager.yaml"} {
		data, err := os.ReadFile("../../deploy/prometheus/" + name)
		must(t, err)
		write(t, filepath.Join(dir, name), strings.ReplaceAll(string(data), "_interval: 15s", "_interval: 1s"))
	}
	a := &alerting{client: http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			return w.Node.Dial(ctx, netip.AddrPort{}, netip.MustParseAddrPort(address))
		}}}}
	for _, command := range [][]string{
		{"prometheus-alertmanager", "--config.file=" + dir + "/alertmanager.yaml", "--storage.path=" + dir + "/alertmanager", "--web.listen-address=127.0.0.1:9093",
			"--cluster.listen-address="},
		{"prometheus", "--config.file=" + dir + "/prometheus.yaml", "--storage.tsdb.path=" + dir + "/prometheus", "--web.listen-address=127.0.0.1:9090",
			"--rules.alert.resend-delay=1s"},
	} {
		p, err := w.Node.Start(exec.Command(command[0], command[1:]...))
		must(t, err)
		a.procs = append(a.procs, p)
	}
	return a
}

// ask decodes what a program answers; false while it does not.
func (a *alerting) ask(url string, into any) bool {
	reply, err := a.client.Get(url)
	if err != nil {
		return false
	}
	defer reply.Body.Close()
	return reply.StatusCode == http.StatusOK && json.NewDecoder(reply.Body).Decode(into) == nil
}

// active are the alerts that Alertmanager has.
func (a *alerting) active() (names []string, ok bool) {
	var alerts []struct{ Labels map[string]string }
	ok = a.ask("http://127.0.0.1:9093/api/v2/alerts", &alerts)
	for _, l := range alerts {
		names = append(names, strings.TrimPrefix(l.Labels["alertname"], "Sallyport"))
	}
	return names, ok
}

func (a *alerting) await(t *testing.T, what string, is func(active []string) bool) {
	t.Helper()
	var names []string
	for deadline := time.Now().Add(alertTime); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		var ok bool
		if names, ok = a.active(); ok && is(names) {
			t.Log(what)
			return
		}
		for _, p := range a.procs {
			select {
			case <-p.Exited():
				t.Fatalf("%s: ended:\n%s", what, p.Output())
			default:
			}
		}
	}
	t.Fatalf("%s: not in time; active are %v", what, names)
}

func (a *alerting) fire(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		a.await(t, name+" fires", func(active []string) bool { return slices.Contains(active, name) })
	}
}

func (a *alerting) clear(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		a.await(t, name+" is over", func(active []string) bool { return !slices.Contains(active, name) })
	}
}

// quiet waits for both to be scraped, and for no alert.
func (a *alerting) quiet(t *testing.T) {
	t.Helper()
	a.await(t, "both are scraped and quiet", func(active []string) bool {
		var reply struct {
			Data struct {
				ActiveTargets []struct{ Health string }
			}
		}
		up := 0
		if a.ask("http://127.0.0.1:9090/api/v1/targets", &reply) {
			for _, target := range reply.Data.ActiveTargets {
				if target.Health == "up" {
					up++
				}
			}
		}
		return up == 2 && len(active) == 0
	})
}
