package datapath

import (
	"fmt"
	"net/netip"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// SetSources says which sources no packet from an uplink may have: the node's own and its pods', and those of a deny list.
// It works where a filter is; other devices do not look. What is new is refused before what is old is let in again.
func (d *Datapath) SetSources(own, denied []netip.Prefix) error {
	want := map[bpf.Prefix]bpf.Source{}
	for _, p := range denied {
		want[toPrefix(p)] = bpf.Source{Reason: bpf.SallyportSpReason(flow.ReasonXDPDenied)}
	}
	for _, p := range own {
		want[toPrefix(p)] = bpf.Source{Reason: bpf.SallyportSpReason(flow.ReasonXDPOwnSource)}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	have, err := d.sources()
	if err != nil {
		return err
	}
	for key, value := range want {
		if old, ok := have[key]; ok && old == value {
			continue
		}
		if err := d.objs.SpSources.Put(&key, &value); err != nil {
			return fmt.Errorf("refuse source %s: %w", fromPrefix(key), err)
		}
	}
	for key := range have {
		if _, ok := want[key]; ok {
			continue
		}
		if err := d.objs.SpSources.Delete(&key); err != nil {
			return fmt.Errorf("admit source %s: %w", fromPrefix(key), err)
		}
	}
	return nil
}

func (d *Datapath) sources() (map[bpf.Prefix]bpf.Source, error) {
	have := map[bpf.Prefix]bpf.Source{}
	var key bpf.Prefix
	var value bpf.Source
	it := d.objs.SpSources.Iterate()
	for it.Next(&key, &value) {
		have[key] = value
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("read refused sources: %w", err)
	}
	return have, nil
}

// mappedBits is how much longer an IPv4 prefix is in the mapped form.
const mappedBits = 96

func toPrefix(p netip.Prefix) bpf.Prefix {
	p = p.Masked()
	bits := p.Bits()
	if p.Addr().Is4() {
		bits += mappedBits
	}
	return bpf.Prefix{Bits: uint32(bits), Address: p.Addr().As16()}
}

func fromPrefix(p bpf.Prefix) netip.Prefix {
	a, bits := netip.AddrFrom16(p.Address), int(p.Bits)
	if a.Is4In6() && bits >= mappedBits {
		return netip.PrefixFrom(a.Unmap(), bits-mappedBits)
	}
	return netip.PrefixFrom(a, bits)
}

// SYNLimit is how many SYNs may come in: Rate a second, and Burst at a time. A Rate of 0 is no limit.
type SYNLimit struct{ Rate, Burst uint32 }

// intervals gives the time between two SYNs and the time that a burst is worth.
func (l SYNLimit) intervals() (interval, burst uint64) {
	if l.Rate == 0 {
		return 0, 0
	}
	interval = uint64(1e9) / uint64(l.Rate)
	return interval, interval * uint64(max(l.Burst, 1))
}

// LimitSYNs bounds the SYNs towards protected services on uplinks that have a filter: from one source (an IPv4 address, an
// IPv6 /64) to all of them, and from all sources to one of them.
func (d *Datapath) LimitSYNs(source, service SYNLimit) error {
	var l bpf.SYNLimits
	l.SourceIntervalNs, l.SourceBurstNs = source.intervals()
	l.ServiceIntervalNs, l.ServiceBurstNs = service.intervals()
	if err := d.objs.SpSynLimits.Put(uint32(0), &l); err != nil {
		return fmt.Errorf("limit SYNs: %w", err)
	}
	return nil
}
