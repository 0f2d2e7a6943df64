package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const port = 5432

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func TestEveryoneReachesEveryone(t *testing.T) {
	l := New(t, Options{Pods: 2})
	ctx := testContext(t)
	servers := map[string]*Namespace{"host": l.Node, "pod": l.Pod}
	clients := map[string]*Namespace{"remote": l.Client, "same-node pod": l.Pods[1], "node": l.Node}
	for _, f := range Families() {
		for sname, server := range servers {
			addr := netip.AddrPortFrom(server.Addr(f), port)
			s := must[*Service](t)(server.WhoAnswers(addr))
			for cname, client := range clients {
				t.Run(f.String()+"/"+sname+"/"+cname, func(t *testing.T) {
					own, seen, err := client.Ask(ctx, netip.AddrPort{}, addr)
					if err != nil {
						t.Fatal(err)
					}
					if own != seen {
						t.Errorf("service saw %v, client is %v", seen, own)
					}
					if cname != "node" && own.Addr() != client.Addr(f) {
						t.Errorf("client used %v, want its first address %v", own.Addr(), client.Addr(f))
					}
				})
			}
			if got := len(s.Peers()); got != len(clients) {
				t.Errorf("service remembers %d peers, want %d", got, len(clients))
			}
		}
	}
}

func TestOtherAddressIsUsedWhenAsked(t *testing.T) {
	l := New(t, Options{})
	for _, f := range Families() {
		addr := netip.AddrPortFrom(l.Pod.Addr(f), port)
		must[*Service](t)(l.Pod.WhoAnswers(addr))
		_, seen, err := l.Client.Ask(testContext(t), netip.AddrPortFrom(l.Client.Other(f), 0), addr)
		if err != nil || seen.Addr() != l.Client.Other(f) {
			t.Errorf("%v: service saw %v (%v), want %v", f, seen, err, l.Client.Other(f))
		}
	}
}

func TestLoopbackOfTheNode(t *testing.T) {
	l := New(t, Options{})
	for _, f := range Families() {
		addr := netip.AddrPortFrom(f.Loopback(), port)
		must[*Service](t)(l.Node.WhoAnswers(addr))
		if _, _, err := l.Node.Ask(testContext(t), netip.AddrPort{}, addr); err != nil {
			t.Errorf("%v: %v", f, err)
		}
		if _, _, err := l.Client.Ask(testContext(t), netip.AddrPort{}, addr); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%v from another namespace: %v, want refused", f, err)
		}
	}
}

func TestNodeFiltersReversePaths(t *testing.T) {
	l := New(t, Options{Pods: 2})
	for _, dev := range []string{"all", "default", "lo", Uplink, PodDevice(0), PodDevice(1)} {
		out := must[string](t)(l.Node.Run(testContext(t), "cat", "/proc/sys/net/ipv4/conf/"+dev+"/rp_filter"))
		if out != "1\n" {
			t.Errorf("rp_filter of %s is %q", dev, out)
		}
	}
}

func TestTapSeesWhatReachesTheService(t *testing.T) {
	l := New(t, Options{})
	for _, f := range Families() {
		tap := must[*Tap](t)(l.Pod.Tap(port))
		addr := netip.AddrPortFrom(l.Pod.Addr(f), port)
		must[*Service](t)(l.Pod.WhoAnswers(addr))
		start := time.Now()
		own, _, err := l.Client.Ask(testContext(t), netip.AddrPort{}, addr)
		if err != nil {
			t.Fatal(err)
		}
		syn := func(p Packet) bool { return p.SYN && !p.ACK && p.Src == own && p.Dst == addr && !p.Outgoing }
		p := must[Packet](t)(tap.Wait(testContext(t), syn))
		if p.Time.Before(start) || time.Since(p.Time) < 0 || p.Boot == 0 {
			t.Errorf("%v: time stamp %v (boot %v) is outside the test, which began %v", f, p.Time, p.Boot, start)
		}
		question := func(p Packet) bool { return p.Payload > 0 && p.Dst == addr }
		p = must[Packet](t)(tap.Wait(testContext(t), question))
		if string(p.Head) != "who answers?\n" || p.Payload != len(p.Head) {
			t.Errorf("%v: payload %d %q", f, p.Payload, p.Head)
		}
		if n, err := tap.Count(syn); n != 1 || err != nil {
			t.Errorf("%v: %d SYNs (%v), want 1", f, n, err)
		}
		if n, err := tap.Lost(); n != 0 || err != nil {
			t.Errorf("%v: %d lost (%v)", f, n, err)
		}
		if err := tap.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestTapIgnoresOtherPorts(t *testing.T) {
	l := New(t, Options{})
	for _, f := range Families() {
		tap := must[*Tap](t)(l.Pod.Tap(port, port+1))
		all := must[*Tap](t)(l.Pod.Tap())
		addr := netip.AddrPortFrom(l.Pod.Addr(f), port+2)
		must[*Service](t)(l.Pod.WhoAnswers(addr))
		if _, _, err := l.Client.Ask(testContext(t), netip.AddrPort{}, addr); err != nil {
			t.Fatal(err)
		}
		if p, err := tap.Packets(); len(p) != 0 || err != nil {
			t.Errorf("%v: tap of another port saw %v (%v)", f, p, err)
		}
		if p, err := all.Packets(); len(p) == 0 || err != nil {
			t.Errorf("%v: tap of all ports saw nothing (%v)", f, err)
		}
	}
}

func TestProcessesLiveInTheNamespace(t *testing.T) {
	l := New(t, Options{})
	p := must[*Process](t)(l.Node.Start(exec.Command("sleep", "60")))
	want := must[string](t)(os.Readlink(l.Node.Path()))
	got := must[string](t)(os.Readlink(filepath.Join("/proc", strconv.Itoa(p.Pid()), "ns/net")))
	if got != want {
		t.Errorf("process is in %s, want %s", got, want)
	}
	if err := p.Stop(5 * time.Second); err == nil || !strings.Contains(err.Error(), "terminated") {
		t.Errorf("stop: %v, want the signal", err)
	}
	if _, err := l.Node.Start(exec.Command("/nonexistent")); err == nil {
		t.Error("started a file that is not there")
	}
	if out, err := l.Node.Run(testContext(t), "sh", "-c", "echo out; echo err >&2; exit 3"); err == nil || out != "out\nerr\n" {
		t.Errorf("run: %q, %v", out, err)
	}
}

func TestDoLeavesTheThreadWhereItWas(t *testing.T) {
	l := New(t, Options{})
	before := must[netns.NsHandle](t)(netns.Get())
	defer before.Close()
	boom := errors.New("boom")
	if err := l.Pod.Do(func() error { return boom }); !errors.Is(err, boom) {
		t.Errorf("Do: %v", err)
	}
	after := must[netns.NsHandle](t)(netns.Get())
	defer after.Close()
	if !before.Equal(after) {
		t.Error("Do left its thread in another namespace")
	}
}

func TestCloseLeavesNothing(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces (CAP_SYS_ADMIN and CAP_NET_ADMIN)")
	}
	l := must[*Lab](t)(Build(Options{}))
	dir := must[string](t)(l.MountBPFFS())
	if again := must[string](t)(l.MountBPFFS()); again != dir {
		t.Errorf("second mount at %s, want %s", again, dir)
	}
	stray := must[*Process](t)(l.Node.Start(exec.Command("sh", "-c", "sleep 60 & wait")))
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
	if err := syscall.Kill(-stray.Pid(), 0); err == nil {
		t.Error("a process of the group is alive")
	}
	if m, err := mountsBelow(l.Dir); len(m) != 0 || err != nil {
		t.Errorf("mounts are left: %v (%v)", m, err)
	}
	if _, err := os.Stat(l.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("directory is left: %v", err)
	}
}

// TestCloseUnhooksWhatIsKept: connections that nobody holds any more keep a namespace for minutes after the lab, and filters on its devices with it.
func TestCloseUnhooksWhatIsKept(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces (CAP_SYS_ADMIN and CAP_NET_ADMIN)")
	}
	l := must[*Lab](t)(Build(Options{}))
	defer l.Close()
	held := must[netns.NsHandle](t)(create()) // as such a connection would
	defer held.Close()
	h := must[*netlink.Handle](t)(netlink.NewHandleAt(held))
	defer h.Close()
	if err := h.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "px1"}, PeerName: "peer"}); err != nil {
		t.Fatal(err)
	}
	for _, d := range must[[]netlink.Link](t)(h.LinkList()) {
		if err := h.QdiscAdd(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: d.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
		}}); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(l.Dir, "kept")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", int(held)), path, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for _, q := range must[[]netlink.Qdisc](t)(h.QdiscList(nil)) {
		if q.Type() == "clsact" {
			t.Errorf("%v is left", q.Attrs())
		}
	}
}

func TestSweepRemovesLabsOfDeadProcessesOnly(t *testing.T) {
	tmp := t.TempDir()
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	dead := filepath.Join(tmp, dirPrefix(gone.Process.Pid)+"x")
	alive := filepath.Join(tmp, dirPrefix(os.Getpid())+"x")
	for _, d := range []string{dead, alive} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	sweep(tmp)
	if _, err := os.Stat(dead); !errors.Is(err, os.ErrNotExist) {
		t.Error("directory of a dead process is left")
	}
	if _, err := os.Stat(alive); err != nil {
		t.Error("directory of a live process is gone")
	}
}

func TestBuildRefusesTooManyPods(t *testing.T) {
	if _, err := Build(Options{Pods: 8}); err == nil {
		t.Error("built a lab with 8 pods")
	}
}

// TestTwoNodes: nodes and pods of two labs on one client reach each other through it, as themselves, and a capture there has every
// packet whole.
func TestTwoNodes(t *testing.T) {
	here := New(t, Options{Pods: 2})
	there := New(t, Options{Pods: 2, Beside: here})
	if there.Client != here.Client || there.Cgroup() == here.Cgroup() && here.Cgroup() != "" {
		t.Fatal("the labs are to share the client, and no control group")
	}
	capture := must[*Tap](t)(here.Client.Capture(port))
	long := strings.Repeat("long ", 200)
	for _, f := range Families() {
		for _, server := range []*Namespace{here.Node, here.Pods[1], there.Node, there.Pods[1]} {
			s := must[*Service](t)(server.WhoAnswers(netip.AddrPortFrom(server.Addr(f), port)))
			for _, client := range []*Namespace{here.Node, here.Pod, there.Node, there.Pod, here.Client} {
				own, seen, err := client.Ask(testContext(t), netip.AddrPortFrom(client.Addr(f), 0), s.Addr)
				if err != nil || own != seen {
					t.Errorf("%s to %s of %s: %s, the service saw %s (%v)", client.Name, server.Name, s.Addr, own, seen, err)
				}
			}
		}
		to := netip.AddrPortFrom(there.Pods[1].Addr(f), port)
		c := must[net.Conn](t)(here.Pod.Dial(testContext(t), netip.AddrPort{}, to))
		if _, err := io.WriteString(c, long); err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
		if p := must[Packet](t)(capture.Wait(testContext(t), func(p Packet) bool {
			return p.Src == addrPort(c.LocalAddr()) && p.Payload == len(long)
		})); string(p.Head) != long {
			t.Errorf("kept %d bytes of %d", len(p.Head), p.Payload)
		}
	}
}
