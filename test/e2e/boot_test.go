package e2e_test

import (
	"context"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// afterPlug is how long clients go on after the last device is there.
const afterPlug = time.Second

// TestBootOrder: an agent that starts with no device but lo, no identity provider and no collector says that it is ready,
// and devices that appear after that are never open: not to the first packet. Without the agent all of it would arrive.
func TestBootOrder(t *testing.T) {
	leak.Check(t)
	for _, enforced := range []bool{false, true} {
		name := map[bool]string{false: "control", true: "enforced"}[enforced]
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, options{plain: true, booting: true})
			judge := newJudge(t)
			for _, s := range w.echoes {
				must(t, judge.witness.Watch(s))
			}
			if enforced {
				w.agent.start(t)
				if s := w.status(t); !s.Ready {
					t.Fatalf("said that it is ready: %+v", s)
				}
			}
			sent := w.plugUnderFire(t)
			judge.blind(t)
			seen := judge.reset()
			t.Logf("%d probes sent, %d seen by the services", sent, seen)
			if enforced && seen > 0 {
				t.Errorf("%d of %d probes reached a service", seen, sent)
			}
			if !enforced && seen < sent/4 {
				t.Errorf("%d of %d probes reached a service: the judge is blind", seen, sent)
			}
			if enforced {
				w.agent.stop(t)
				w.uninstall(t)
			}
		})
	}
}

// plugUnderFire makes the devices while client and pod send to both services from the first moment.
func (w *world) plugUnderFire(t *testing.T) (sent int) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var total atomic.Int64
	firing := make(chan error, 2)
	for ns, peer := range map[*lab.Namespace]string{w.Client: lab.Uplink, w.Pods[1]: lab.PodDevice(1)} {
		go func() { firing <- w.fire(ctx, ns, peer, &total) }()
	}
	must(t, w.Plug())
	select { // the test is about what happens in this time
	case <-time.After(afterPlug):
	case <-t.Context().Done():
	}
	cancel()
	for range 2 {
		must(t, <-firing)
	}
	return int(total.Load())
}

// fire sends as soon as there is a device to send by.
func (w *world) fire(ctx context.Context, ns *lab.Namespace, peer string, total *atomic.Int64) error {
	var o *origin
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for ; ctx.Err() == nil; <-tick.C {
		if o == nil {
			first, err := w.newOrigin(ns, peer)
			if err != nil {
				continue // not there yet
			}
			defer first.Close()
			o = first
		}
		for _, f := range lab.Families() {
			for _, to := range []netip.AddrPort{netip.AddrPortFrom(w.Node.Addr(f), hostPort), netip.AddrPortFrom(w.Pod.Addr(f), podPort)} {
				if o.probe(ns.Addr(f), to) == nil { // down as yet
					total.Add(1)
				}
			}
		}
	}
	return nil
}
