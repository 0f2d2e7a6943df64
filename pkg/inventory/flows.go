package inventory

import (
	"net/netip"
	"slices"
)

// Flow is what a flow record says of who came to a listener.
type Flow struct {
	Client, Server netip.AddrPort
	// Identity that was proven, or attested of the client's process; "": none was.
	Identity string
	// Count is how many connections it stands for.
	Count uint64
}

// Protect marks the listeners that a protected service has already. Without addresses it is one of the host.
func (v *Inventory) Protect(name, mode, protocol string, ports []uint16, addresses []netip.Addr) {
	for i := range v.Listeners {
		l := &v.Listeners[i]
		if l.Protocol != protocol || !slices.Contains(ports, l.Port) {
			continue
		}
		reached := slices.ContainsFunc(l.Reach, func(a netip.Addr) bool { return slices.Contains(addresses, a) })
		if reached || len(addresses) == 0 && l.Where == Host {
			l.Service, l.Mode = name, mode
		}
	}
}

// AddFlow adds a flow of a TCP service that is protected already, in whatever mode. A client that sockets showed too gets the
// identity; others are added.
func (v *Inventory) AddFlow(f Flow) {
	for i := range v.Listeners {
		if l := &v.Listeners[i]; l.Protocol == TCP && l.Port == f.Server.Port() && l.reachedAt(f.Server.Addr()) {
			l.addFlow(f)
			return
		}
	}
}

// reachedAt says whether others come to the listener by that address.
func (l Listener) reachedAt(a netip.Addr) bool {
	if l.Where == Host {
		return l.Service != "" && l.at(a)
	}
	return slices.Contains(l.Reach, a) && l.at(a)
}

func (l *Listener) addFlow(f Flow) {
	i := slices.IndexFunc(l.Clients, func(c Client) bool { return c.Address == f.Client.Addr() && c.Identity == f.Identity })
	if i < 0 { // sockets knew of nobody's identity; what is seen at the same address is taken for the same client
		i = slices.IndexFunc(l.Clients, func(c Client) bool { return c.Address == f.Client.Addr() && c.Identity == "" })
	}
	if i < 0 {
		l.Clients = append(l.Clients, Client{Address: f.Client.Addr(), Identity: f.Identity, Connections: f.Count})
		slices.SortFunc(l.Clients, compareClients)
		return
	}
	c := &l.Clients[i]
	c.Identity = f.Identity
	c.Connections = max(c.Connections, f.Count)
}
