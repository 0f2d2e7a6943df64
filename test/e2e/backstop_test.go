package e2e_test

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
	"github.com/sallyport-dev/sallyport/test/packet"
)

// unseenPod is the number of a pod that is started while no agent runs. A service in it is protected all the same.
const unseenPod = 7

func unseenService() string {
	return fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: late-echo}
spec:
  target: Pod
  ports: [%d]
  addresses: [%q, %q]
  access: [{identities: [%q]}]
---
`, podPort, lab.StartedAddr(unseenPod, lab.IPv4), lab.StartedAddr(unseenPod, lab.IPv6), web)
}

// reaches says whether a service answers a plain client that is given no path.
func reaches(from *lab.Namespace, to netip.AddrPort) bool {
	ctx, cancel := context.WithTimeout(context.Background(), attemptTime)
	defer cancel()
	_, _, err := from.Ask(ctx, netip.AddrPort{}, to)
	return err == nil
}

// TestPodWithoutAgent: a pod that starts while the agent is dead reaches no protected service, and its own is reached by
// nobody, from the first packet. Each device's refusals are counted. The agent that comes back says so and hooks it.
func TestPodWithoutAgent(t *testing.T) {
	leak.Check(t)
	w := startWorld(t, options{resource: unseenService()})
	w.agent.kill(t)
	pod, err := w.StartPod(unseenPod, nil)
	must(t, err)
	for _, f := range lab.Families() {
		echo, err := pod.WhoAnswers(netip.AddrPortFrom(unspecified(f), podPort))
		must(t, err)
		for _, try := range []struct {
			name string
			from *lab.Namespace
			to   netip.AddrPort
		}{
			{"the late pod to the node", pod, netip.AddrPortFrom(w.Node.Addr(f), hostPort)},
			{"the late pod to a pod", pod, netip.AddrPortFrom(w.Pod.Addr(f), podPort)},
			{"remote to the late pod", w.Client, netip.AddrPortFrom(pod.Addr(f), podPort)},
			{"a pod to the late pod", w.Pods[1], netip.AddrPortFrom(pod.Addr(f), podPort)},
			{"the node to the late pod", w.Node, netip.AddrPortFrom(pod.Addr(f), podPort)},
		} {
			if reaches(try.from, try.to) {
				t.Errorf("%v: %s: %s answered", f, try.name, try.to)
			}
		}
		if peers := echo.Peers(); len(peers) > 0 {
			t.Errorf("%v: the late pod's service was reached by %v", f, peers)
		}
	}
	if n := w.counters(t)["BACKSTOP"]; n == 0 {
		t.Errorf("nothing was counted: %v", w.counters(t))
	}
	w.agent.start(t)
	device := lab.StartedDevice(unseenPod)
	waitUntil(t, "an alarm that names the device", func() bool {
		return strings.Contains(strings.Join(w.status(t).Problems, "\n"), "by "+device)
	})
	for _, f := range lab.Families() {
		way := way{service: "host-echo", client: pod, from: pod.Addr(f), to: netip.AddrPortFrom(w.Node.Addr(f), hostPort)}
		if o := way.identified(within(t, patience), w, web); o.who != proxied {
			t.Errorf("%v: the late pod, hooked, with an identity: %s", f, o)
		}
	}
	waitUntil(t, "a record of the alarm", func() bool { return w.alarmed(t, "backstop", device) })
}

// alarmed says whether the log has an alarm of a kind, durably.
func (w *world) alarmed(t *testing.T, kind, text string) bool {
	t.Helper()
	for _, e := range w.grantEvents(t) {
		if e.Event.Step == "ALARM" && strings.HasPrefix(e.Event.Why, kind+" ") && strings.Contains(e.Event.Why, text) {
			return true
		}
	}
	return false
}

// TestUnexplainedTraffic: what a device without hooks forges with the tuple of a live connection is found, and named with
// the service, the kind and the device. Bulk traffic before it is not taken for it.
func TestUnexplainedTraffic(t *testing.T) {
	leak.Check(t)
	w := startWorld(t, options{})
	s := w.newSurvivor(t, "host-echo", lab.IPv6)
	bulk := way{service: "host-echo", client: w.Client, from: w.Client.Addr(lab.IPv6), to: netip.AddrPortFrom(w.Node.Addr(lab.IPv6), sinkPort)}
	w.bulkService(t, bulk)
	w.bulk(t, bulk, false)
	w.agent.kill(t) // else it would hook the pod's device
	pod, err := w.StartPod(unseenPod, nil)
	must(t, err)
	w.forge(t, pod, s.direct.own, s.way.to)
	w.agent.start(t)
	waitUntil(t, "an alarm that names the service", func() bool {
		return strings.Contains(strings.Join(w.status(t).Problems, "\n"), "sockets of host-echo got 6 bytes, 0 packets and 0 SYNs by path more")
	})
	waitUntil(t, "a record of the alarm", func() bool { return w.alarmed(t, "unexplained", "host-echo") })
	s.check(t, "after the forgery")
}

// forge sends one packet with 6 bytes of payload from a pod, in the name of others.
func (w *world) forge(t *testing.T, pod *lab.Namespace, from, to netip.AddrPort) {
	t.Helper()
	out, err := pod.Injector("eth0")
	must(t, err)
	defer out.Close()
	p := packet.Packet{Src: from, Dst: to, Flags: packet.ACK, Seq: 1, Ack: 1, Window: 1000, Payload: []byte("forged")}
	p.SrcMAC, err = pod.MAC("eth0")
	must(t, err)
	p.DstMAC, err = w.Node.MAC(lab.StartedDevice(unseenPod))
	must(t, err)
	before := w.counters(t)["SOCKET_PATH"]
	must(t, out.Send(p.Bytes()))
	waitUntil(t, "the packet at the socket", func() bool { return w.counters(t)["SOCKET_PATH"] > before })
}

// TestBackstopIsPutBack: links of the backstop that somebody detaches come back, and the loss is recorded.
func TestBackstopIsPutBack(t *testing.T) {
	leak.Check(t)
	w := startWorld(t, options{})
	for _, pin := range []string{"sp_cg_in", "sp_cg_out", "sp_sklookup"} {
		bpftool(t, nil, "link", "detach", "pinned", strings.Replace(w.pinned(pin), "/maps/", "/links/", 1))
		start := time.Now()
		waitUntil(t, "an alarm about "+pin, func() bool {
			return strings.Contains(strings.Join(w.status(t).Problems, "\n"), pin+" was detached")
		})
		t.Logf("%s: told after %v", pin, time.Since(start))
	}
	waitUntil(t, "a record of the alarm", func() bool { return w.alarmed(t, "backstop_lost", "sp_cg_in") })
	backstops := 0
	for _, h := range w.status(t).Hooks {
		if h.Role == "backstop" {
			backstops++
		}
	}
	if backstops != 3 {
		t.Errorf("status shows %d places of the backstop, want 3: %+v", backstops, w.status(t).Hooks)
	}
}
