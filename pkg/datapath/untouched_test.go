package datapath_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/px"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// sysctlDir is a constant of the kernel: what it shows is of the reading thread's namespace.
const sysctlDir = "/proc/sys/net"

// moving are readings rather than settings.
var moving = []string{"nf_conntrack_count", "tcp_fastopen_key", "flow_limit"}

// surroundings are the settings of a namespace that Sallyport must not touch.
func surroundings(t *testing.T, n *lab.Namespace) map[string]string {
	t.Helper()
	out := map[string]string{}
	must(t, n.Do(func() error {
		return filepath.WalkDir(sysctlDir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || slices.Contains(moving, d.Name()) {
				return err
			}
			if b, err := os.ReadFile(path); err == nil { // some are for writing only
				out[path] = strings.TrimSpace(string(b))
			}
			return nil
		})
	}))
	for _, command := range []string{
		"ip -4 rule", "ip -6 rule", "ip -4 route show table all", "ip -6 route show table all", "ip -o address",
		"ip -d -o link", "nft list ruleset", "tc qdisc", "ip neigh show nud permanent",
	} {
		fields := strings.Fields(command)
		text, err := n.Run(within(t), fields[0], fields[1:]...)
		must(t, err)
		for line := range strings.Lines(text) {
			out[command+": "+strings.TrimSpace(line)] = "there"
		}
	}
	return out
}

// differences lists what is not the same, but for what is px0's own.
func differences(before, after map[string]string) []string {
	var out []string
	for k, v := range before {
		if now, ok := after[k]; !ok {
			out = append(out, fmt.Sprintf("gone: %s = %s", k, v))
		} else if now != v {
			out = append(out, fmt.Sprintf("changed: %s = %s, was %s", k, now, v))
		}
	}
	for k, v := range after {
		if _, ok := before[k]; !ok {
			out = append(out, fmt.Sprintf("new: %s = %s", k, v))
		}
	}
	slices.Sort(out)
	return slices.DeleteFunc(out, func(s string) bool {
		return strings.HasPrefix(s, "new: ") && (strings.Contains(s, "/px0/") || strings.Contains(s, " px0"))
	})
}

// TestHostIsUntouched: with everything set up and in use, no sysctl, rule, route, address or netfilter
// rule of the node differs but px0's own; uninstalled, not even those.
func TestHostIsUntouched(t *testing.T) { eachProfile(t, testHostIsUntouched) }

func testHostIsUntouched(t *testing.T, profile datapath.Profile) {
	t.Parallel()
	l := lab.New(t, lab.Options{Pods: 2})
	bpffs, err := l.MountBPFFS()
	must(t, err)
	before := surroundings(t, l.Node)
	if len(before) < 100 {
		t.Fatalf("only %d settings were read", len(before))
	}

	must(t, l.Node.Sysctl("ipv4/conf/lo/accept_local", "1"))
	if d := differences(before, surroundings(t, l.Node)); len(d) != 1 {
		t.Fatalf("one sysctl was changed, seen was %q", d)
	}
	must(t, l.Node.Sysctl("ipv4/conf/lo/accept_local", "0"))

	n := &node{Lab: l}
	where := px.Config{Path: filepath.Join(l.Dir, "px")}
	must(t, l.Node.Do(func() (err error) { n.px, err = px.Create(where); return err }))
	t.Cleanup(func() { _ = n.px.Close() })
	n.cf = datapath.Config{Dir: filepath.Join(bpffs, "sallyport"), PxNetns: where.Path, Px0: n.px.Px0(),
		ListenPort: listenPort, Profile: profile, MaxFlows: 64, MaxLegs: 64, MaxPaths: 16, MaxTTL: time.Hour}
	n.open(t)
	defer n.d.Close()
	must(t, n.attachAll(n.d))
	n.protect(t)
	must(t, n.d.Renew(time.Minute))
	n.standIn(t)
	n.everySays(t, "proxy", "set up")
	c := n.cells()[0]
	c.path(n, t, time.Minute)
	c.dialDirect(t)
	for _, d := range differences(before, surroundings(t, l.Node)) {
		if profile != datapath.ProfileClsact || !strings.HasPrefix(d, "new: tc qdisc: qdisc clsact ") {
			t.Errorf("in use: %s", d)
		}
	}

	n.uninstall(t)
	must(t, l.Node.Do(func() error { return px.Remove(where) }))
	for _, d := range differences(before, surroundings(t, l.Node)) {
		t.Errorf("removed: %s", d)
	}
}
