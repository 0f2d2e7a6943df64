package lab

import (
	"net/netip"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/test/packet"
)

func TestStartedPodsComeAndGo(t *testing.T) {
	l := New(t, Options{})
	for round := range 3 { // the number is free again as soon as End returns
		pod := must[*Namespace](t)(l.StartPod(7, nil))
		for _, f := range Families() {
			if pod.Addr(f) != StartedAddr(7, f) {
				t.Errorf("address %s, want %s", pod.Addr(f), StartedAddr(7, f))
			}
			s := must[*Service](t)(pod.WhoAnswers(netip.AddrPortFrom(pod.Addr(f), port)))
			own, seen, err := l.Client.Ask(testContext(t), netip.AddrPort{}, s.Addr)
			if err != nil || own != seen {
				t.Errorf("round %d, %v: %s, the service saw %s (%v)", round, f, own, seen, err)
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		}
		if err := pod.End(); err != nil {
			t.Fatal(err)
		}
		if _, err := l.Node.Ifindex(StartedDevice(7)); err == nil {
			t.Error("the device is left")
		}
	}
	if got := len(l.Node.addrs[IPv4]); got != 2 {
		t.Errorf("the node has %d addresses that tests know of, want its first 2", got)
	}
	if _, err := l.StartPod(StartedPods, nil); err == nil {
		t.Error("started a pod beyond the last")
	}
}

// TestWitnessSeesWhatTheServiceIsGiven: a whole connection and a bare SYN, not what a firewall took away.
func TestWitnessSeesWhatTheServiceIsGiven(t *testing.T) {
	l := New(t, Options{})
	const bare = 50000 // the port of the SYN that is sent alone
	for _, f := range Families() {
		to := netip.AddrPortFrom(l.Node.Addr(f), port)
		var fins, syns atomic.Int64
		w := must[*Witness](t)(NewWitness(func(g Given) {
			if g.Dst != to || g.Src.Addr() != l.Client.Addr(f) || time.Since(g.Time).Abs() > time.Minute {
				t.Errorf("given: %+v", g)
			}
			if g.Flags&packet.FIN != 0 {
				fins.Add(1)
			}
			if g.Flags == packet.SYN && g.Src.Port() == bare {
				syns.Add(1)
			}
		}))
		s := must[*Service](t)(l.Node.WhoAnswers(to))
		if err := w.Watch(s); err != nil {
			t.Fatal(err)
		}
		if _, _, err := l.Client.Ask(testContext(t), netip.AddrPort{}, to); err != nil {
			t.Fatal(err)
		}
		syn := packet.Packet{Src: netip.AddrPortFrom(l.Client.Addr(f), bare), Dst: to, Flags: packet.SYN}
		syn.SrcMAC, syn.DstMAC = must[[6]byte](t)(l.Client.MAC("eth0")), must[[6]byte](t)(l.Node.MAC(Uplink))
		if err := l.Client.Inject("eth0", syn.Bytes()); err != nil {
			t.Fatal(err)
		}
		for end := testContext(t); end.Err() == nil && (syns.Load() == 0 || fins.Load() == 0); {
			runtime.Gosched()
		}
		l.withoutPort(t, func() {
			tap := must[*Tap](t)(l.Node.Tap(port))
			if err := l.Client.Inject("eth0", syn.Bytes()); err != nil {
				t.Fatal(err)
			}
			if _, err := tap.Wait(testContext(t), func(p Packet) bool { return p.Dst == to && p.SYN }); err != nil {
				t.Fatal(err)
			}
		})
		lost, err := w.Lost()
		if fins.Load() != 1 || syns.Load() != 1 || lost != 0 || err != nil {
			t.Errorf("%v: %d FIN and %d bare SYNs, want one each, %d lost (%v)", f, fins.Load(), syns.Load(), lost, err)
		}
		for _, err := range []error{s.Close(), w.Close()} {
			if err != nil {
				t.Error(err)
			}
		}
	}
}

// withoutPort runs f while the node's firewall drops what comes to the port.
func (l *Lab) withoutPort(t *testing.T, f func()) {
	t.Helper()
	table := "add table inet t; add chain inet t c { type filter hook input priority 0; }; add rule inet t c tcp dport 5432 drop"
	if _, err := l.Node.Run(testContext(t), "nft", table); err != nil {
		t.Fatal(err)
	}
	f()
	if _, err := l.Node.Run(testContext(t), "nft", "delete", "table", "inet", "t"); err != nil {
		t.Fatal(err)
	}
}
