package docs

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const units = "deploy/systemd/"

// directives are those of a unit file: lists are joined, as systemd does.
func directives(t *testing.T, name string) map[string][]string {
	t.Helper()
	all := map[string][]string{}
	for line := range strings.Lines(read(t, units+name)) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if ok && !strings.HasPrefix(key, "#") {
			all[key] = append(all[key], strings.Fields(value)...)
		}
	}
	return all
}

// TestBootOrder: the agent is there before anything configures a network, needs nothing that comes later, and takes
// nobody down with it.
func TestBootOrder(t *testing.T) {
	agent := directives(t, "sallyport-agent.service")
	for key, want := range map[string][]string{
		"DefaultDependencies": {"no"}, "Type": {"notify"}, "Before": {"network-pre.target", "sockets.target", "shutdown.target"},
		"Wants": {"network-pre.target", "sallyport-guard.service", "sallyport-proxy.service"}, "Conflicts": {"shutdown.target"},
		"After": {"local-fs.target", "sys-fs-bpf.mount"},
	} {
		for _, v := range want {
			if !slices.Contains(agent[key], v) {
				t.Errorf("agent: %s=%v has no %s", key, agent[key], v)
			}
		}
	}
	late := regexp.MustCompile(`^(network|nss|time-sync|basic|sysinit|multi-user|remote-fs|spire|sallyport)`)
	for _, key := range []string{"After", "Requires", "BindsTo", "Requisite"} {
		for _, v := range agent[key] {
			if late.MatchString(v) {
				t.Errorf("agent: %s=%s may come after the network, or wait for the agent", key, v)
			}
		}
	}
	for _, name := range []string{"sallyport-guard.service", "sallyport-proxy.service"} {
		u := directives(t, name)
		if !slices.Contains(u["After"], "sallyport-agent.service") {
			t.Errorf("%s: After=%v: the agent makes what it needs", name, u["After"])
		}
		for _, key := range []string{"Requires", "BindsTo", "PartOf", "Requisite"} {
			if slices.Contains(u[key], "sallyport-agent.service") {
				t.Errorf("%s: %s= the agent: it has to outlive it", name, key)
			}
		}
	}
}

// TestWaitingForEnforcement: what waits does not start without an agent that is ready, and is not stopped with it.
func TestWaitingForEnforcement(t *testing.T) {
	gate, dropin := directives(t, "sallyport-enforced.service"), directives(t, "sallyport-enforced.conf")
	if !slices.Contains(gate["After"], "sallyport-agent.service") || !slices.Contains(gate["Wants"], "sallyport-agent.service") ||
		!slices.Contains(gate["Before"], "network-pre.target") || len(gate["Requires"])+len(gate["BindsTo"])+len(gate["PartOf"]) > 0 {
		t.Errorf("gate: %v", gate)
	}
	for _, key := range []string{"Requires", "After"} {
		if !slices.Equal(dropin[key], []string{"sallyport-enforced.service"}) {
			t.Errorf("drop-in: %s=%v", key, dropin[key])
		}
	}
}

// TestSystemdTakesTheUnits has systemd itself read them, with the drop-in on a network manager: no unknown directive,
// and no cycle.
func TestSystemdTakesTheUnits(t *testing.T) {
	dir := t.TempDir()
	files, err := filepath.Glob(filepath.Join(root, units, "*.service"))
	if err != nil || len(files) < 5 {
		t.Fatalf("units: %v, %v", files, err)
	}
	var names []string
	for _, f := range files {
		name := filepath.Base(f)
		// The programs are not installed where the test runs.
		text := regexp.MustCompile(`(?m)^(Exec\w+=)/\S+`).ReplaceAllString(read(t, units+name), "${1}/bin/true")
		place(t, filepath.Join(dir, name), text)
		names = append(names, name)
	}
	place(t, filepath.Join(dir, "net.service"), "[Unit]\nDefaultDependencies=no\nAfter=network-pre.target\nBefore=network.target\nWants=network.target\n[Service]\nExecStart=/bin/true\n")
	place(t, filepath.Join(dir, "net.service.d", "enforced.conf"), read(t, units+"sallyport-enforced.conf"))
	place(t, filepath.Join(dir, "served.socket"), "[Socket]\nListenStream=5432\nAccept=no\n")
	place(t, filepath.Join(dir, "served.service"), "[Service]\nExecStart=/bin/true\n")
	place(t, filepath.Join(dir, "served.socket.d", "enforced.conf"), read(t, units+"sallyport-enforced.conf"))
	cmd := exec.Command("systemd-analyze", append([]string{"verify", "--man=no"}, append(names, "net.service", "served.socket")...)...)
	cmd.Env = append(os.Environ(), "SYSTEMD_UNIT_PATH="+dir+":")
	if out, err := cmd.CombinedOutput(); err != nil || strings.Contains(string(out), dir) || strings.Contains(string(out), "cycle") {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestWatchdogs: what holds or steers is started anew when it does not move, however often it failed, and the proxy can be exchanged.
func TestWatchdogs(t *testing.T) {
	for _, name := range []string{"sallyport-agent.service", "sallyport-guard.service", "sallyport-proxy.service"} {
		if u := directives(t, name); len(u["WatchdogSec"]) != 1 || !slices.Equal(u["Restart"], []string{"always"}) || !slices.Equal(u["Type"], []string{"notify"}) ||
			!slices.Equal(u["StartLimitIntervalSec"], []string{"0"}) {
			t.Errorf("%s: WatchdogSec=%v Restart=%v Type=%v StartLimitIntervalSec=%v", name, u["WatchdogSec"], u["Restart"], u["Type"], u["StartLimitIntervalSec"])
		}
	}
	proxy := directives(t, "sallyport-proxy.service")
	if len(proxy["ExecReload"]) == 0 || !strings.HasPrefix(proxy["ExecReload"][0], "+") || !slices.Contains(proxy["ExecReload"], "--signal=HUP") {
		t.Errorf("proxy: ExecReload=%v", proxy["ExecReload"])
	}
}

// TestExposure holds the units to what systemd makes of their sandboxes, which docs/install.md states.
func TestExposure(t *testing.T) {
	stated := regexp.MustCompile(`(?m)^\| (sallyport-\S+\.service) \| ([0-9.]+) \|`).FindAllStringSubmatch(read(t, "docs/install.md"), -1)
	if len(stated) != 4 {
		t.Fatalf("docs/install.md states %q", stated)
	}
	overall := regexp.MustCompile(`(?m)Overall exposure level for \S+: ([0-9.]+) `)
	for _, s := range stated {
		out, err := exec.Command("systemd-analyze", "security", "--offline=yes", "--no-pager", filepath.Join(root, units, s[1])).CombinedOutput()
		if m := overall.FindSubmatch(out); m == nil || string(m[1]) != s[2] {
			t.Errorf("%s: stated %s, systemd says %q (%v)", s[1], s[2], m, err)
		}
	}
}

func place(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}
