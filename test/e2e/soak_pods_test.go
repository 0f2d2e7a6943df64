package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"github.com/sallyport-dev/sallyport/test/lab"
)

const (
	podLife = 600 * time.Millisecond // of a started pod, about
	// earlyProbes and podProbes are made by a started pod: before it has addresses, and then.
	earlyProbes, podProbes = 20, 60
)

// started is a pod that the soak started: a client from its first moment, and a service of its own.
type started struct {
	number   int
	ns       *lab.Namespace
	origin   *origin
	services []*lab.Service
}

// pods starts and stops pods until ctx ends, one after the other, and counts them.
func (p *prober) pods(ctx context.Context, dice *rand.Rand, happened func(string)) error {
	for n := 0; ctx.Err() == nil; n++ {
		if err := p.onePod(ctx, n%latePods, dice, happened); err != nil {
			return err
		}
	}
	return nil
}

// onePod is the life of one.
func (p *prober) onePod(ctx context.Context, number int, dice *rand.Rand, happened func(string)) (err error) {
	happened("pod-start")
	s := &started{number: number}
	defer func() {
		happened("pod-stop")
		err = errors.Join(err, s.end())
	}()
	var early error
	s.ns, err = p.StartPod(number, func(ns *lab.Namespace) { early = p.early(s, ns, dice) })
	if err = errors.Join(err, early); err != nil {
		return err
	}
	if err := p.serveLate(s); err != nil {
		return err
	}
	to := s.addresses()
	p.addLate(to)
	defer p.dropLate(to)
	for range podProbes {
		to := p.targets(dice)
		if slices.Contains(s.addresses(), to) {
			continue // what a pod does to itself is its own business
		}
		p.send(s.origin, s.ns.Addr(familyOf(to)), to)
	}
	for _, f := range lab.Families() {
		for _, to := range []netip.AddrPort{netip.AddrPortFrom(p.Node.Addr(f), hostPort), netip.AddrPortFrom(p.Pod.Addr(f), podPort)} {
			p.connects.Add(1)
			p.connect(way{name: "started pod", client: s.ns, from: s.ns.Addr(f), to: to}, false)
		}
	}
	pause(ctx, dice, podLife)
	return nil
}

// early probes while the pod's device is up and nothing else is.
func (p *prober) early(s *started, ns *lab.Namespace, dice *rand.Rand) (err error) {
	if s.origin, err = p.newOrigin(ns, lab.StartedDevice(s.number)); err != nil {
		return err
	}
	for range earlyProbes {
		to := p.targets(dice)
		p.send(s.origin, lab.StartedAddr(s.number, familyOf(to)), to)
	}
	return ns.Sysctl("ipv4/ip_local_port_range", clientPorts)
}

func (p *prober) serveLate(s *started) error {
	for _, to := range s.addresses() {
		service, err := s.ns.WhoAnswers(to)
		if err != nil {
			return err
		}
		s.services = append(s.services, service)
		if err := p.judge.witness.Watch(service); err != nil {
			return err
		}
	}
	return nil
}

func (s *started) addresses() (all []netip.AddrPort) {
	for _, f := range lab.Families() {
		all = append(all, netip.AddrPortFrom(lab.StartedAddr(s.number, f), latePort))
	}
	return all
}

func (s *started) end() error {
	var errs []error
	for _, v := range s.services {
		errs = append(errs, v.Close())
	}
	if s.origin != nil {
		errs = append(errs, s.origin.Close())
	}
	if s.ns != nil {
		errs = append(errs, s.ns.End())
	}
	return errors.Join(errs...)
}

// lateServices protect what runs in pods that come and go.
func lateServices() (yaml string) {
	for n := range latePods {
		yaml += fmt.Sprintf(`---
apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: late-echo-%d}
spec:
  target: Pod
  ports: [%d]
  addresses: [%q, %q]
  access: [{identities: [%q]}]
`, n, latePort, lab.StartedAddr(n, lab.IPv4), lab.StartedAddr(n, lab.IPv6), web)
	}
	return yaml
}

// pause lets up to d pass: when it ends is what the test is about.
func pause(ctx context.Context, dice *rand.Rand, d time.Duration) {
	select {
	case <-time.After(time.Duration(dice.Int64N(int64(d)))):
	case <-ctx.Done():
	}
}
