package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
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

// cross connects to a protected address. crossed is told by the steering counters, not by the connection: whoever
// answers, answers. accepted tells that the proxy took it.
func (p probe) cross(ctx context.Context, target netip.AddrPort) (crossed, accepted bool, err error) {
	before, err := p.counters()
	if err != nil {
		return false, false, fmt.Errorf("probe %s: %w", target, err)
	}
	dialer := net.Dialer{Timeout: probeTimeout}
	dialer.SetMultipathTCP(false)
	conn, dialErr := dialer.DialContext(ctx, "tcp", target.String())
	if dialErr == nil {
		conn.Close()
	}
	after, err := p.counters()
	if err != nil {
		return false, false, fmt.Errorf("probe %s: %w", target, err)
	}
	for _, r := range steered {
		crossed = crossed || after[r].Packets > before[r].Packets
	}
	accepted = dialErr == nil && after[flow.ReasonPxAccept].Packets > before[flow.ReasonPxAccept].Packets
	return crossed, accepted, nil
}

// all probes every target; the error names those that met no hook.
func (p probe) all(ctx context.Context, targets []netip.AddrPort) (accepted bool, err error) {
	var errs []error
	for _, t := range targets {
		crossed, ok, err := p.cross(ctx, t)
		accepted = accepted || ok
		if err == nil && !crossed {
			err = fmt.Errorf("probe %s: %w", t, errNotCrossed)
		}
		errs = append(errs, err)
	}
	return accepted, errors.Join(errs...)
}

// probeTargets picks what to connect to: one service of each kind in each address family.
func probeTargets(services []datapath.Service) []netip.AddrPort {
	type kind struct {
		target datapath.Target
		v6     bool
	}
	picked := make(map[kind]bool)
	var targets []netip.AddrPort
	for _, s := range services {
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
	switch {
	case s.Target == datapath.TargetHost:
		return []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})}
	case s.Ifindex == 0: // nowhere to send it yet
		return nil
	}
	return s.Addresses
}
