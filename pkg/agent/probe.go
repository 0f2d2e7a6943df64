package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// probeTimeout bounds one probe's connect: a dead proxy answers nothing at all.
const probeTimeout = time.Second

// errNotCrossed says that a probe met no hook.
var errNotCrossed = errors.New("a connection to a protected port was not steered")

// steered are the reasons that a first packet gets when a hook takes it to the proxy, whether or not the proxy is there.
var steered = []flow.Reason{flow.ReasonNoPath, flow.ReasonNoListener, flow.ReasonPxAccept}

// probe makes sure that the hooks are crossed, by crossing them.
type probe struct {
	counters func() (map[flow.Reason]datapath.Counter, error)
}

// cross connects to a protected address until a steering counter has moved. The connection itself tells nothing: whoever
// answers, answers.
func (p probe) cross(ctx context.Context, target netip.AddrPort) error {
	before, err := p.counters()
	if err != nil {
		return fmt.Errorf("probe %s: %w", target, err)
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	answered := connect(ctx, target)
	look := time.NewTicker(2 * time.Millisecond)
	defer look.Stop()
	for last := false; ; {
		after, err := p.counters()
		if err != nil {
			return fmt.Errorf("probe %s: %w", target, err)
		}
		if moved(before, after) {
			return nil
		}
		if last {
			return fmt.Errorf("probe %s: %w", target, errNotCrossed)
		}
		select {
		case <-answered: // or given up: what its packets did is counted by now
			last = true
		case <-look.C:
		}
	}
}

func moved(before, after map[flow.Reason]datapath.Counter) bool {
	return slices.ContainsFunc(steered, func(r flow.Reason) bool { return after[r].Packets > before[r].Packets })
}

// connect tries to connect until ctx ends, hangs up at once, and closes the channel then.
func connect(ctx context.Context, target netip.AddrPort) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		dialer := net.Dialer{}
		dialer.SetMultipathTCP(false)
		if conn, err := dialer.DialContext(ctx, "tcp", target.String()); err == nil {
			conn.Close()
		}
	}()
	return done
}

// all probes every target; the error names those that met no hook.
func (p probe) all(ctx context.Context, targets []netip.AddrPort) error {
	var errs []error
	for _, t := range targets {
		errs = append(errs, p.cross(ctx, t))
	}
	return errors.Join(errs...)
}

// probeTargets picks what to connect to: one TCP service of each kind in each address family.
func probeTargets(services []datapath.Service) []netip.AddrPort {
	type kind struct {
		target datapath.Target
		v6     bool
	}
	picked := make(map[kind]bool)
	var targets []netip.AddrPort
	for _, s := range services {
		if s.Protocol == datapath.UDP {
			continue
		}
		for _, a := range probeAddresses(s) {
			k := kind{s.Target, a.Is6()}
			if !picked[k] && len(s.Ports) > 0 {
				picked[k] = true
				targets = append(targets, netip.AddrPortFrom(a, s.Ports[0]))
			}
		}
	}
	return targets
}

func probeAddresses(s datapath.Service) []netip.Addr {
	switch s.Target {
	case datapath.TargetHost:
		return []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})}
	case datapath.TargetRemote: // others are not knocked at
		return nil
	}
	return locatedAddresses(s) // to the others there is nowhere to send it yet
}
