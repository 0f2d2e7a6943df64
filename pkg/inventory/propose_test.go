package inventory

import (
	"net/netip"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// hostile would be a document of its own, and speak to a terminal, if anybody wrote it down as it is.
const hostile = "x\n---\nspec: {mode: Enforce}\r\x1b[2J\u2028\u0085\xff"

func listener() Listener {
	return Listener{
		Protocol: TCP, Port: 5432, Addresses: []netip.Addr{netip.IPv4Unspecified()}, Where: Host, Kind: Unknown, Because: "nothing is known",
		Process: Process{PID: 7, Name: "server"},
	}
}

// TestForeignText: names of programs, users and control groups, and paths of sockets, are anybody's.
func TestForeignText(t *testing.T) {
	l := listener()
	l.Process = Process{PID: 7, Name: hostile, User: hostile, Unit: hostile}
	l.Clients = []Client{{Address: netip.MustParseAddr("10.1.0.2"), Process: &Process{PID: 8, Name: hostile, Pod: hostile}, Connections: 1}}
	l.Cautions = cautions(l, []string{hostile})
	for _, p := range (&Inventory{Listeners: []Listener{l}}).Propose(policy.ModeShadow) {
		data, err := p.Document(time.Now(), "1s")
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range string(data) {
			if r != '\n' && !unicode.IsPrint(r) {
				t.Errorf("%U in:\n%q", r, data)
			}
		}
		set, err := policy.Parse("proposed.yaml", data)
		if err != nil {
			t.Fatalf("%v\n%s", err, data)
		}
		if all := set.Services(); len(all) != 1 || all[0].Spec.Mode != policy.ModeShadow {
			t.Errorf("have %+v of\n%s", all, data)
		}
	}
}

// TestNamesAreLabels: whatever programs are called, each proposal has a name of its own that a resource may have.
func TestNamesAreLabels(t *testing.T) {
	v := &Inventory{}
	for i, name := range []string{hostile, strings.Repeat("long", 20), "-", "Ünïcode", "", "same", "same"} {
		l := listener()
		l.Process, l.Namespace = Process{PID: int32(10 + i), Name: name}, uint64(i)
		v.Listeners = append(v.Listeners, l)
	}
	seen := map[string]bool{}
	for _, p := range v.Propose(policy.ModeObserve) {
		if err := policy.CheckName(p.Name); err != nil {
			t.Errorf("%s: %v", p.Name, err)
		}
		if seen[p.Name] {
			t.Errorf("%s twice", p.Name)
		}
		seen[p.Name] = true
	}
	if len(seen) != len(v.Listeners) {
		t.Errorf("%d proposals for %d listeners", len(seen), len(v.Listeners))
	}
}

// TestIdentitiesOfFlows: who proved an identity is let in by the proposal, and who did not would have been denied. A service that is
// enforced is not proposed again.
func TestIdentitiesOfFlows(t *testing.T) {
	known, other := netip.MustParseAddrPort("10.1.0.2:40000"), netip.MustParseAddrPort("10.1.0.3:40000")
	at := netip.MustParseAddrPort("10.1.0.1:5432")
	l := listener()
	l.Clients = []Client{{Address: known.Addr(), Connections: 1}, {Address: other.Addr(), Connections: 2}}
	v := &Inventory{Listeners: []Listener{l}}
	v.Protect("pg", "Observe", TCP, []uint16{5432}, nil)
	v.AddFlow(Flow{Client: known, Server: at, Identity: "spiffe://example.org/app", Count: 5})
	v.AddFlow(Flow{Client: netip.MustParseAddrPort("10.1.0.4:1"), Server: at, Identity: "corp/alice", Count: 1})
	v.AddFlow(Flow{Client: known, Server: netip.MustParseAddrPort("10.1.0.1:99"), Identity: "spiffe://example.org/else", Count: 1})
	all := v.Propose(policy.ModeShadow)
	if len(all) != 1 || all[0].Name != "pg" {
		t.Fatalf("have %+v", all)
	}
	p := all[0]
	if rules := p.Service.Spec.Access; len(rules) != 1 || len(rules[0].Identities) != 1 || rules[0].Identities[0] != "spiffe://example.org/app" ||
		len(rules[0].Subjects) != 1 || rules[0].Subjects[0] != "corp/alice" {
		t.Errorf("access %+v", rules)
	}
	if len(p.Denied) != 1 || p.Denied[0].Address != other.Addr() || p.Denied[0].Connections != 2 {
		t.Errorf("denied %+v", p.Denied)
	}
	v.Protect("pg", "Enforce", TCP, []uint16{5432}, nil)
	if again := v.Propose(policy.ModeShadow); len(again) != 0 {
		t.Errorf("an enforced service is proposed: %+v", again)
	}
}

// TestOnePortIsOneService: two processes at different addresses of a port share the service, since that has the port on every address.
func TestOnePortIsOneService(t *testing.T) {
	first, second := listener(), listener()
	second.Process.PID++
	second.Clients = []Client{{Address: netip.MustParseAddr("10.1.0.2"), Connections: 1}}
	all := (&Inventory{Listeners: []Listener{first, second}}).Propose(policy.ModeObserve)
	if len(all) != 1 || len(all[0].Service.Spec.Ports) != 1 || len(all[0].Listeners) != 2 || len(all[0].Denied) != 1 {
		t.Errorf("have %+v", all)
	}
}

// TestRestart: who listens anew inherits the clients of the process before.
func TestRestart(t *testing.T) {
	port := portKey{1, TCP, 5432}
	client := netip.MustParseAddrPort("10.1.0.2:40000")
	made := func(pid int32, last int) *found {
		l := listener()
		l.Namespace, l.Process.PID = port.space, pid
		return &found{Listener: l, seen: map[netip.AddrPort]*Process{}, last: last}
	}
	before, after := made(7, 3), made(8, 4)
	before.seen[client] = nil
	w := &watch{rounds: 4, listeners: map[listenerKey]*found{{port, 7}: before, {port, 8}: after}, at: map[portKey][]*found{port: {before, after}}}
	v := w.result(time.Second)
	if len(v.Listeners) != 1 || v.Listeners[0].Process.PID != 8 || len(v.Listeners[0].Clients) != 1 {
		t.Errorf("have %+v", v.Listeners)
	}
}

// TestWhatCannotBeProtected holds the cautions that need no kernel.
func TestWhatCannotBeProtected(t *testing.T) {
	kubelet := listener()
	kubelet.Clients = []Client{{Address: netip.MustParseAddr("10.1.0.1"), Process: &Process{PID: 9, Name: "kubelet"}, Connections: 1}}
	apart := listener()
	apart.Where = Apart
	local := listener()
	local.Addresses = []netip.Addr{netip.IPv6Loopback()}
	for words, l := range map[string]Listener{"kubelet": kubelet, "no device of the node": apart, "loopback only": local} {
		if all := strings.Join(cautions(l, nil), "\n"); !strings.Contains(all, words) {
			t.Errorf("nothing about %q in %q", words, all)
		}
	}
}

func TestControlGroups(t *testing.T) {
	for table, want := range map[string][3]string{
		"0::/system.slice/postgresql.service\n":                      {"postgresql.service"},
		"3:cpu:/a\n1:name=systemd:/system.slice/ssh.service\n0::/\n": {"ssh.service"},
		"0::/kubepods.slice/kubepods-pod0a1b2c3d_0000_1111_2222_333344445555.slice/cri-containerd-" + strings.Repeat("ab", 32) + ".scope\n": {
			"cri-containerd-" + strings.Repeat("ab", 32) + ".scope", "0a1b2c3d-0000-1111-2222-333344445555", strings.Repeat("ab", 32)},
		"": {},
	} {
		unit, pod, container := membership(cgroupPath(table))
		if have := [3]string{unit, pod, container}; have != want {
			t.Errorf("%q: have %q, want %q", table, have, want)
		}
	}
}

func TestUnixTable(t *testing.T) {
	const table = `Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0001 01 4001 /run/with blank/.s.PGSQL.5432
0000000000000000: 00000003 00000000 00000000 0001 03 4002 /run/connected
0000000000000000: 00000002 00000000 00010000 0001 01 4003
nonsense
`
	found := waitingUnix(table)
	if len(found) != 1 || found[4001] != "/run/with blank/.s.PGSQL.5432" {
		t.Errorf("have %v", found)
	}
}
