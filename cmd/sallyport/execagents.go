package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/sallyport-dev/sallyport/pkg/client"
)

// agentAddress is one address of an agent, under the name that somebody gave.
type agentAddress struct {
	name string
	at   netip.AddrPort
}

func (a agentAddress) String() string {
	if a.name == a.at.Addr().String() {
		return a.at.String()
	}
	return a.name + " at " + a.at.String()
}

// families are those of addresses that the command connects by.
type families struct{ only4, only6 bool }

func (f families) has(a netip.Addr) bool {
	if a.Is4() {
		return !f.only6
	}
	return !f.only4
}

// resolveAgents gives every address of every agent, those of a name in the resolver's order: a name may stand for all nodes of
// a service, and a node has an address of each family, from which its service sees us with another one of ours.
func resolveAgents(ctx context.Context, agents []string, by families) (all []agentAddress, err error) {
	for _, agent := range agents {
		host, port := agent, agentPort
		if h, p, err := net.SplitHostPort(agent); err == nil {
			host, port = h, p
		}
		host = strings.Trim(host, "[]")
		addresses, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		number, portErr := strconv.ParseUint(port, 10, 16)
		if err := errors.Join(err, portErr); err != nil {
			return nil, withHint(&exitError{exitUnreachable, fmt.Errorf("find agent: %w", err)}, "write --agent db-1.example.org, 10.2.0.2:%s or [fd00:2::2]:%s", agentPort, agentPort)
		}
		found := 0
		for _, a := range addresses {
			one := agentAddress{host, netip.AddrPortFrom(a.Unmap(), uint16(number))}
			if !by.has(one.at.Addr()) {
				continue
			}
			found++
			if !slices.ContainsFunc(all, func(o agentAddress) bool { return o.at == one.at }) {
				all = append(all, one)
			}
		}
		if found == 0 {
			return nil, withHint(&exitError{exitUnreachable, fmt.Errorf("find agent: %s has no address of that family", host)}, "leave out --ipv4 and --ipv6, or name another agent")
		}
	}
	return all, nil
}

// asked is what an agent at one address made of the request.
type asked struct {
	agentAddress
	err error // nil: the path is open
}

// missingPaths tells what of the failures keeps the command from being run, and what is only worth a note. A command connects to the
// first address of a name, in the resolver's order, that can be reached, and to others of that family: each has to have its path.
// Addresses that cannot be reached are not connected to, and those of the other family come after.
func missingPaths(all []asked) (notes []string, err error) {
	var names []string
	for _, a := range all {
		if !slices.Contains(names, a.name) {
			names = append(names, a.name)
		}
	}
	var errs []error
	for _, name := range names {
		used, reached := firstReached(all, name)
		for _, a := range all {
			switch {
			case a.name != name || a.err == nil:
			case !reached, a.at.Addr().Is4() == used.Is4() && !errors.Is(a.err, client.ErrNotReached):
				errs = append(errs, fmt.Errorf("%s: %w", a, a.err))
			default:
				notes = append(notes, fmt.Sprintf("no path by %s: %v", a, a.err))
			}
		}
	}
	return notes, errors.Join(errs...)
}

// firstReached is the first address of a name where somebody is.
func firstReached(all []asked, name string) (netip.Addr, bool) {
	for _, a := range all {
		if a.name == name && !errors.Is(a.err, client.ErrNotReached) {
			return a.at.Addr(), true
		}
	}
	return netip.Addr{}, false
}
