package lab

import (
	"net/netip"
	"runtime"
	"sync/atomic"
	"testing"

	"github.com/sallyport-dev/sallyport/test/packet"
)

func TestStartedPodsComeAndGo(t *testing.T) {
	l := New(t, Options{})
	for round := range 3 { // the number is free again as soon as End returns
		pod := must[*Namespace](t)(l.StartPod(7))
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
	if _, err := l.StartPod(StartedPods); err == nil {
		t.Error("started a pod beyond the last")
	}
}

// TestArrivalsAreWhatTheStackWasGiven: a whole connection and a bare SYN are seen, what a firewall of
// the namespace took away is not.
func TestArrivalsAreWhatTheStackWasGiven(t *testing.T) {
	l := New(t, Options{})
	const bare = 50000 // the port of the SYN that is sent alone
	for _, f := range Families() {
		to := netip.AddrPortFrom(l.Node.Addr(f), port)
		var fins, syns atomic.Int64
		a := must[*Arrivals](t)(l.Node.Arrivals(func(one Arrival) {
			if one.Dst != to || one.Src.Addr() != l.Client.Addr(f) || one.Time.IsZero() {
				t.Errorf("arrived: %+v", one)
			}
			if one.Flags&packet.FIN != 0 {
				fins.Add(1)
			}
			if one.Flags == packet.SYN && one.Src.Port() == bare {
				syns.Add(1)
			}
		}, port+1, port, port+2))
		s := must[*Service](t)(l.Node.WhoAnswers(to))
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
		if fins.Load() != 1 || syns.Load() != 1 || a.Lost() != 0 {
			t.Errorf("%v: %d FIN and %d bare SYNs, %d lost, want one each", f, fins.Load(), syns.Load(), a.Lost())
		}
		for _, err := range []error{a.Close(), a.Close(), s.Close()} {
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
