package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/cilium/ebpf"

	"github.com/sallyport-dev/sallyport/bpf"
)

type row struct {
	key   bpf.ServiceKey
	value bpf.Service
}

// rowsOf lists the rows of the services, then those that refuse UDP where no UDP service is, and last those that say which
// shadowed service stands for an address where no port can be read.
func rowsOf(services []Service, gen uint32) []row {
	var rows []row
	taken := map[bpf.ServiceKey]bool{}
	add := func(r row) {
		rows = append(rows, r)
		taken[r.key] = true
	}
	for _, s := range services {
		for _, r := range s.rows(s.Protocol.number(), gen) {
			if (r.key.Device == 0 && !s.Selected) || !taken[r.key] { // or another service of the same pod has it
				add(r)
			}
		}
	}
	for _, s := range services {
		if !s.DenyUDP {
			continue
		}
		for _, r := range s.rows(UDP, gen) {
			if !taken[watched(r.key, false)] && !taken[watched(r.key, true)] {
				add(r)
			}
		}
	}
	for _, s := range services {
		if s.Mode != Shadow {
			continue
		}
		for _, r := range s.rows(s.Protocol.number(), gen) {
			r.key.Port, r.key.Protocol = 0, 0
			if r.key.Device == 0 && !taken[r.key] {
				add(r)
			}
		}
	}
	return rows
}

// watched is the key of a service that is not enforced, or is, at the same place.
func watched(k bpf.ServiceKey, yes bool) bpf.ServiceKey {
	k.Watched = 0
	if yes {
		k.Watched = 1
	}
	return k
}

// ownedOf are those rows that anything is decided by, of services that are on this node: what is behind another node's address
// may be sent whatever it takes.
func ownedOf(rows []row) []row {
	return slices.DeleteFunc(slices.Clone(rows), func(r row) bool { return r.key.Watched != 0 || r.isRemote() })
}

func (r row) isRemote() bool { return Target(r.value.Target) == TargetRemote }

// ownServices are those whose sockets are on this node: the others' volumes have nothing here to be compared with.
func ownServices(services []Service) []Service {
	return slices.DeleteFunc(slices.Clone(services), func(s Service) bool { return s.Target == TargetRemote })
}

// checkRemote refuses what the programs would not do for a service on another node.
func checkRemote(services []Service) error {
	for _, s := range services {
		if s.Target == TargetRemote && (s.Mode != Enforce || s.Protocol.number() != TCP || s.DenyUDP || s.Ifindex != 0) {
			return fmt.Errorf("service %s is on another node: it can only be TCP, enforced and without a device", s.Name)
		}
	}
	return nil
}

// ofMode splits the services into those that are enforced, and those that are not.
func ofMode(services []Service) (enforced, others []Service) {
	for _, s := range services {
		if s.Mode == Enforce {
			enforced = append(enforced, s)
		} else {
			others = append(others, s)
		}
	}
	return enforced, others
}

// undecidedDevice is SP_UNDECIDED_DEVICE in C.
const undecidedDevice = 0xffffffff

// rows makes a row for each address and port.
func (s *Service) rows(p Protocol, gen uint32) (rows []row) {
	if s.Target != TargetPod { // a service of the host is at every local address
		places := []Place{{Addresses: s.Addresses}}
		if s.Target == TargetHost {
			places[0].Addresses = []netip.Addr{netip.IPv6Unspecified()}
		}
		return s.rowsAt(places, p, gen)
	}
	rows = s.rowsAt(s.Places(), p, gen)
	if s.Selected {
		value := s.value(0, gen)
		for _, port := range s.Ports {
			key := bpf.ServiceKey{Port: port, Protocol: uint8(p), Device: undecidedDevice}
			rows = append(rows, row{watched(key, s.Mode != Enforce), value})
		}
	}
	return rows
}

func (s *Service) rowsAt(places []Place, p Protocol, gen uint32) (rows []row) {
	for _, place := range places {
		value := s.value(place.Ifindex, gen)
		add := func(k bpf.ServiceKey) {
			rows = append(rows, row{watched(k, s.Mode != Enforce), value})
		}
		for _, port := range s.Ports {
			for _, a := range place.Addresses {
				add(bpf.ServiceKey{Address: toAddr(a), Port: port, Protocol: uint8(p)})
			}
			for _, device := range place.devices() {
				add(bpf.ServiceKey{Port: port, Protocol: uint8(p), Device: uint32(device)})
			}
		}
	}
	return rows
}

func (s *Service) value(ifindex int, gen uint32) bpf.Service {
	return bpf.Service{Id: s.ID, Target: bpf.SallyportSpTarget(s.Target), Ifindex: uint32(ifindex), Generation: gen,
		UdpIdleS: uint32(s.Idle / time.Second), Mode: bpf.SallyportSpMode(s.Mode), Name: toLabel(s.Name)}
}

// devices lists those behind which the pod is: its ports are closed at its other addresses, too.
func (p *Place) devices() []int {
	if p.Ifindex == 0 {
		return nil
	}
	return append([]int{p.Ifindex}, p.Besides...)
}

// SetServices replaces the whole table in one step and returns its generation, and so does every change of a mode. The port
// bits and the owners are set before the swap and cleared after it, so that at every moment they cover the table
// in force. On an error before the swap the old table stands.
//
// Connections to a service that is enforced from then on are strays: they are reset at their next packet. So are proxied
// connections of a service that is enforced no more, by its own end, which knows nothing of them. Its bypassed ones go on, and
// their flows end here: a later Sweep tells of them.
func (d *Datapath) SetServices(services []Service) (uint32, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := checkRemote(services); err != nil {
		return 0, err
	}
	gen := d.gen + 1
	rows := rowsOf(services, gen)
	inner, err := d.newTable(rows)
	if err != nil {
		return 0, err
	}
	defer inner.Close()
	old, err := d.portBits()
	if err != nil {
		return 0, err
	}
	want := bitsOf(rows)
	if err := d.writePorts(union(old, want)); err != nil {
		return 0, err
	}
	enforced, others := ofMode(services)
	if err := d.addOwners(ownedOf(rows)); err != nil {
		return 0, err
	}
	if err := d.addTraffic(ownServices(enforced)); err != nil {
		return 0, err
	}
	_, open := ofMode(d.services)
	if err := d.endWatchedFlows(open); err != nil { // one that a process before left would let through what came meanwhile
		return 0, err
	}
	if err := d.objs.SpServices.Put(uint32(0), inner); err != nil {
		return 0, fmt.Errorf("swap services: %w", err)
	}
	d.gen, d.rows, d.services = gen, len(rows), services
	if err := d.writePorts(want); err != nil {
		return gen, err
	}
	return gen, errors.Join(d.endWatchedFlows(others), d.dropOwners(ownedOf(rows)), d.dropTraffic(ownServices(enforced)), d.dropWatched(others),
		d.addWatched(others))
}

func (d *Datapath) newTable(rows []row) (*ebpf.Map, error) {
	inner, err := ebpf.NewMap(d.table)
	if err != nil {
		return nil, fmt.Errorf("make services table: %w", err)
	}
	for _, r := range rows {
		if err := inner.Update(&r.key, &r.value, ebpf.UpdateNoExist); err != nil {
			inner.Close()
			return nil, fmt.Errorf("add service %s at port %d: %w", fromLabel(r.value.Name), r.key.Port, err)
		}
	}
	return inner, nil
}

// portWords is SP_PORT_WORDS in C: the words of TCP's ports, before those of UDP's.
const portWords = 1024

type portBits [2 * portWords]bpf.Ports

// bitsOf flags the ports of the rows. Port 0 of TCP, which nobody has, says that any service of this node is enforced.
func bitsOf(rows []row) (b portBits) {
	for _, r := range rows {
		word, bit := int(r.key.Port>>6), uint64(1)<<(r.key.Port&63)
		if Protocol(r.key.Protocol) == UDP {
			word += portWords
		}
		switch {
		case r.isRemote():
			b[word].Bits |= bit
		case r.key.Watched == 0:
			b[word].Bits |= bit
			b[0].Bits |= 1
		case r.key.Port != 0:
			b[word].Watched |= bit
		}
	}
	return b
}

func union(a, b portBits) portBits {
	for i := range a {
		a[i].Bits |= b[i].Bits
		a[i].Watched |= b[i].Watched
	}
	return a
}

func (d *Datapath) portBits() (b portBits, err error) {
	for i := range b {
		if err := d.objs.SpPorts.Lookup(uint32(i), &b[i]); err != nil {
			return b, fmt.Errorf("read port bits: %w", err)
		}
	}
	return b, nil
}

func (d *Datapath) writePorts(want portBits) error {
	have, err := d.portBits()
	if err != nil {
		return err
	}
	for i := range want {
		if have[i] == want[i] {
			continue
		}
		if err := d.objs.SpPorts.Put(uint32(i), &want[i]); err != nil {
			return fmt.Errorf("write port bits: %w", err)
		}
	}
	return nil
}

// ownerOf is who has the port of a row: an address, or the pod behind a device.
func ownerOf(k bpf.ServiceKey) bpf.OwnerKey {
	return bpf.OwnerKey{Address: k.Address, Device: k.Device}
}

func (d *Datapath) addOwners(rows []row) error {
	for _, r := range rows {
		if err := d.objs.SpOwners.Put(ownerOf(r.key), &bpf.Owner{Target: uint32(r.value.Target)}); err != nil {
			return fmt.Errorf("add owner: %w", err)
		}
	}
	return nil
}

func (d *Datapath) dropOwners(rows []row) error {
	keep := map[bpf.OwnerKey]bool{}
	for _, r := range rows {
		keep[ownerOf(r.key)] = true
	}
	var stale []bpf.OwnerKey
	var a bpf.OwnerKey
	var o bpf.Owner
	it := d.objs.SpOwners.Iterate()
	for it.Next(&a, &o) {
		if !keep[a] {
			stale = append(stale, a)
		}
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read owners: %w", err)
	}
	for _, a := range stale {
		if err := d.objs.SpOwners.Delete(&a); err != nil {
			return fmt.Errorf("drop owner: %w", err)
		}
	}
	return nil
}

// restoreServices reads the table of an adopted datapath.
func (d *Datapath) restoreServices() error {
	rows, err := d.pinnedRows()
	if err != nil {
		return err
	}
	byID := map[uint32]*Service{}
	var order []uint32
	for _, r := range rows {
		d.gen = max(d.gen, r.value.Generation)
		if r.key.Port == 0 {
			continue // it only stands for others of its address
		}
		s := byID[r.value.Id]
		if s == nil {
			s = &Service{ID: r.value.Id, Name: fromLabel(r.value.Name), Target: Target(r.value.Target),
				Idle: time.Duration(r.value.UdpIdleS) * time.Second, Mode: Mode(r.value.Mode)}
			byID[r.value.Id] = s
			order = append(order, r.value.Id)
		}
		s.add(r.key, int(r.value.Ifindex))
	}
	for _, id := range order {
		d.services = append(d.services, byID[id].settled())
	}
	d.rows = len(rows)
	return nil
}

// add takes in what a row says, of the pod behind that device.
func (s *Service) add(k bpf.ServiceKey, ifindex int) {
	switch device := int(k.Device); {
	case device == undecidedDevice:
		s.Selected = true
		s.protects(k)
		return
	case device != 0:
		if p := s.pod(ifindex); device != ifindex && !slices.Contains(p.Besides, device) {
			p.Besides = append(p.Besides, device)
		}
		return
	}
	if Protocol(k.Protocol) == UDP && s.Idle == 0 {
		s.DenyUDP = true
		return
	}
	s.protects(k)
	if a, p := fromAddr(k.Address), s.pod(ifindex); s.Target != TargetHost && !slices.Contains(p.Addresses, a) {
		p.Addresses = append(p.Addresses, a)
	}
}

// protects notes the port of a row.
func (s *Service) protects(k bpf.ServiceKey) {
	if Protocol(k.Protocol) == UDP && s.Idle == 0 {
		s.DenyUDP = true
		return
	}
	s.Protocol = Protocol(k.Protocol)
	if !slices.Contains(s.Ports, k.Port) {
		s.Ports = append(s.Ports, k.Port)
	}
}

// pod is that behind a device, among those seen so far.
func (s *Service) pod(ifindex int) *Place {
	i := slices.IndexFunc(s.Pods, func(p Place) bool { return p.Ifindex == ifindex })
	if i < 0 {
		i = len(s.Pods)
		s.Pods = append(s.Pods, Place{Ifindex: ifindex})
	}
	return &s.Pods[i]
}

// settled is the service as it was given to SetServices, but for the order of what it lists.
func (s *Service) settled() Service {
	out := *s
	if s.Selected || len(s.Pods) == 0 {
		return out
	}
	out.Addresses, out.Ifindex, out.Besides, out.Pods = s.Pods[0].Addresses, s.Pods[0].Ifindex, s.Pods[0].Besides, nil
	return out
}

func (d *Datapath) pinnedRows() ([]row, error) {
	var inner *ebpf.Map
	err := d.objs.SpServices.Lookup(uint32(0), &inner)
	if isMissing(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open services table: %w", err)
	}
	defer inner.Close()
	var rows []row
	var r row
	it := inner.Iterate()
	for it.Next(&r.key, &r.value) {
		rows = append(rows, r)
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("read services table: %w", err)
	}
	return rows, nil
}

// Services is the table in force, with the ids that live paths refer to.
func (d *Datapath) Services() []Service {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]Service(nil), d.services...)
}

// Generation counts the swaps of the services table, over restarts.
func (d *Datapath) Generation() uint32 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.gen
}

// serviceAt names the service that a packet was for, if it is known: one that is enforced, or one that is not.
func (d *Datapath) serviceAt(dst netip.AddrPort, p Protocol, enforced bool) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	name := ""
	for _, s := range d.services {
		if (s.Mode == Enforce) != enforced {
			continue
		}
		if s.Protocol.number() != p && (!s.DenyUDP || p != UDP) {
			continue
		}
		for _, port := range s.Ports {
			if port != dst.Port() {
				continue
			}
			if s.Target == TargetHost && name == "" {
				name = s.Name
			}
			if slices.ContainsFunc(s.Places(), func(p Place) bool { return slices.Contains(p.Addresses, dst.Addr()) }) {
				return s.Name
			}
		}
	}
	return name
}
