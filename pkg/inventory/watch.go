package inventory

import (
	"cmp"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
)

// portKey is where a connection can arrive.
type portKey struct {
	space    uint64
	protocol string
	port     uint16
}

// listenerKey tells listeners apart: a port that two processes wait at, at different addresses, is two.
type listenerKey struct {
	portKey
	pid int32
}

// found is a listener with the connections that were seen at it.
type found struct {
	Listener
	seen map[netip.AddrPort]*Process // by client; nil: unknown
	last int                         // round in which it was there
}

// watch is what has been seen in all looks so far.
type watch struct {
	listeners map[listenerKey]*found
	at        map[portKey][]*found
	processes *processes
	rounds    int
	ephemeral [2]uint16 // ports that the kernel gives to who asks for none
}

func newWatch() (*watch, error) {
	w := &watch{listeners: map[listenerKey]*found{}, at: map[portKey][]*found{}, processes: newProcesses()}
	text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		return nil, err
	}
	for i, field := range strings.Fields(string(text)) {
		port, err := strconv.ParseUint(field, 10, 16)
		if err != nil || i > 1 {
			break
		}
		w.ephemeral[i] = uint16(port)
	}
	return w, nil
}

// round is one look at everything.
func (w *watch) round() error {
	spaces, err := readSpaces()
	if err != nil {
		return err
	}
	w.rounds++
	waiting := map[uint32]bool{}
	for _, s := range spaces {
		for _, k := range s.sockets {
			if w.serves(k) {
				waiting[k.inode] = true
			}
		}
	}
	w.processes.find(waiting)
	for _, s := range spaces {
		for _, k := range s.sockets {
			if w.serves(k) {
				w.listen(s, k)
			}
		}
	}
	talking := connections(spaces, w.at)
	for _, m := range talking {
		waiting[m.inode] = true
	}
	w.processes.find(waiting)
	w.meet(talking)
	w.processes.forget(waiting)
	return nil
}

// succeeded hands the clients of a listener that is gone to the one that has its port now, as after a restart, and says whether there is one.
func (w *watch) succeeded(gone *found) bool {
	for _, f := range w.at[portKey{gone.Namespace, gone.Protocol, gone.Port}] {
		if gone.last < w.rounds && f.last == w.rounds {
			maps.Copy(f.seen, gone.seen)
			return true
		}
	}
	return false
}

// serves leaves out the UDP sockets of those who ask: their ports are the kernel's choice.
func (w *watch) serves(k socket) bool {
	port := k.local.Port()
	asks := k.protocol == UDP && (port == 0 || w.ephemeral[0] <= port && port <= w.ephemeral[1])
	return k.waits() && !asks
}

// listen takes a socket that waits.
func (w *watch) listen(s *space, k socket) {
	var owner Process
	if p := w.processes.owner(k.inode); p != nil {
		owner = *p
	}
	key := listenerKey{portKey{s.inode, k.protocol, k.local.Port()}, owner.PID}
	f := w.listeners[key]
	if f == nil {
		f = &found{
			Listener: Listener{Protocol: k.protocol, Port: k.local.Port(), Namespace: s.inode, Where: s.where, Process: owner},
			seen:     map[netip.AddrPort]*Process{},
		}
		f.Kind, f.Because = classify(f.Listener)
		w.listeners[key] = f
		w.at[key.portKey] = append(w.at[key.portKey], f)
	}
	f.last = w.rounds
	if a := k.local.Addr(); !slices.Contains(f.Addresses, a) {
		f.Addresses = append(f.Addresses, a)
		slices.SortFunc(f.Addresses, netip.Addr.Compare)
	}
	if s.where != Host {
		f.Reach = s.reach()
	}
}

// meeting is a connection to a listener, and the socket of its client if that is on this node.
type meeting struct {
	at     *found
	client netip.AddrPort
	inode  uint32
}

// meet takes connections. Whose socket it was can be known from a later look than the first.
func (w *watch) meet(all []meeting) {
	for _, m := range all {
		if m.at.seen[m.client] == nil {
			m.at.seen[m.client] = w.processes.owner(m.inode)
		}
	}
}

// connections finds those to listeners, from either end: who hung up first keeps the memory of it (TIME_WAIT).
func connections(spaces []*space, at map[portKey][]*found) []meeting {
	ends := endsOf(spaces)
	var all []meeting
	for _, s := range spaces {
		for _, k := range s.sockets {
			if !k.connection() {
				continue
			}
			if f := listening(at, s, k.local); f != nil {
				all = append(all, meeting{f, k.remote, ends.client(spaces, s, k)})
			}
			if to := owning(spaces, s, k.remote.Addr()); to != nil {
				if f := listening(at, to, k.remote); f != nil {
					all = append(all, meeting{f, k.local, k.inode})
				}
			}
		}
	}
	return all
}

func listening(at map[portKey][]*found, s *space, to netip.AddrPort) *found {
	for _, f := range at[portKey{s.inode, TCP, to.Port()}] {
		if f.at(to.Addr()) {
			return f
		}
	}
	return nil
}

// owning is the namespace that an address leads to from another; nil if there is none on this node, or if several have it.
func owning(spaces []*space, from *space, a netip.Addr) *space {
	if from.has(a) {
		return from
	}
	var one *space
	for _, s := range spaces {
		if s.where == Apart || !slices.Contains(s.addresses, a) {
			continue
		}
		if one != nil {
			return nil
		}
		one = s
	}
	return one
}

// ends finds a socket by its namespace and tuple.
type ends map[end]uint32

type end struct {
	space         uint64
	local, remote netip.AddrPort
}

func endsOf(spaces []*space) ends {
	all := ends{}
	for _, s := range spaces {
		for _, k := range s.sockets {
			if k.connection() {
				all[end{s.inode, k.local, k.remote}] = k.inode
			}
		}
	}
	return all
}

// client is the inode of the socket at the other end of a service's, or 0.
func (e ends) client(spaces []*space, s *space, k socket) uint32 {
	if from := owning(spaces, s, k.remote.Addr()); from != nil {
		return e[end{from.inode, k.remote, k.local}]
	}
	return 0
}

// grouped are the clients: connections from the same process, or the same address, are one.
func (f *found) grouped() []Client {
	type group struct {
		address netip.Addr
		name    string
		cgroup  string
		uid     uint32
	}
	groups := map[group]*Client{}
	for from, p := range f.seen {
		key := group{address: from.Addr()}
		if p != nil {
			key.name, key.cgroup, key.uid = p.Name, p.Cgroup, p.UID
		}
		c := groups[key]
		if c == nil {
			c = &Client{Address: from.Addr(), Process: p}
			groups[key] = c
		}
		c.Connections++
	}
	all := []Client{}
	for _, c := range groups {
		all = append(all, *c)
	}
	slices.SortFunc(all, compareClients)
	return all
}

func compareClients(a, b Client) int {
	return cmp.Or(a.Address.Compare(b.Address), cmp.Compare(a.name(), b.name()), cmp.Compare(a.Identity, b.Identity), cmp.Compare(a.Connections, b.Connections))
}

func (c Client) name() string {
	if c.Process == nil {
		return ""
	}
	return c.Process.Name
}
