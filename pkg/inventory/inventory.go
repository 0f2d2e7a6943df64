// Package inventory finds what listens on a node and who talks to it, by looking at sockets and processes alone: nothing is
// sent, and no packet is read.
package inventory

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"
)

// DefaultEvery is the time between two looks at the sockets.
const DefaultEvery = 250 * time.Millisecond

// Config says how to look.
type Config struct {
	// For is how long to watch for clients. Zero: one look.
	For time.Duration
	// Every is the time between two looks; zero: DefaultEvery. A connection that begins and is forgotten in between goes
	// unseen; the kernel remembers for a minute those that ended in good order, at the end that hung up.
	Every time.Duration
}

// Inventory is what was found.
type Inventory struct {
	// Looked is for how long, like 10s.
	Looked    string     `json:"looked"`
	Listeners []Listener `json:"listeners"`
}

// Protocols of a listener.
const (
	TCP = "TCP"
	UDP = "UDP"
)

// Listener is a port that one process, or a family of them, waits at in one network namespace.
type Listener struct {
	Protocol string `json:"protocol"`
	Port     uint16 `json:"port"`
	// Addresses are those that its sockets are bound to; an unspecified one stands for all of the namespace.
	Addresses []netip.Addr `json:"addresses"`
	// Namespace is the inode of the network namespace, and Where what it is to the node.
	Namespace uint64 `json:"namespace"`
	Where     Where  `json:"where"`
	// Reach are the addresses of a pod by which others reach it.
	Reach []netip.Addr `json:"reach,omitempty"`

	Process Process `json:"process"`
	Kind    Kind    `json:"kind"`
	// Because says what the kind was told by.
	Because string `json:"because"`

	// Service is the protected service that has the port already, and Mode its mode.
	Service string `json:"service,omitempty"`
	Mode    string `json:"mode,omitempty"`

	Clients  []Client `json:"clients"`
	Cautions []string `json:"cautions,omitempty"`
}

// Where says what a network namespace is to the node.
type Where string

// Places of a listener.
const (
	// Host is the namespace that we run in.
	Host Where = "host"
	// Pod is one that a device of the host leads into.
	Pod Where = "pod"
	// Apart is one that no device of the host leads into.
	Apart Where = "apart"
)

// Client is who was seen at a listener: connections with the same address, process and identity are one.
type Client struct {
	Address netip.Addr `json:"address"`
	// Process is whose socket it is, if that is on this node and was still there.
	Process *Process `json:"process,omitempty"`
	// Identity is one that was proven or attested in a flow record.
	Identity string `json:"identity,omitempty"`
	// Connections are at least so many.
	Connections uint64 `json:"connections"`
}

// Look watches the node's sockets, in all of its network namespaces, for as long as the configuration says or until ctx
// ends. It is for root; the calling thread's namespace counts as the host's.
func Look(ctx context.Context, c Config) (*Inventory, error) {
	if c.Every <= 0 {
		c.Every = DefaultEvery
	}
	l, err := newWatch()
	if err != nil {
		return nil, err
	}
	begun := time.Now()
	tick := time.NewTicker(c.Every)
	defer tick.Stop()
	for {
		if err := l.round(); err != nil {
			return nil, err
		}
		if time.Since(begun)+c.Every > c.For {
			break
		}
		select {
		case <-tick.C:
			continue
		case <-ctx.Done():
		}
		break
	}
	return l.result(time.Since(begun)), nil
}

// LeaveOut drops the listeners of a place.
func (v *Inventory) LeaveOut(where Where) {
	v.Listeners = slices.DeleteFunc(v.Listeners, func(l Listener) bool { return l.Where == where })
}

// result puts everything in order, and says what cannot be protected.
func (l *watch) result(took time.Duration) *Inventory {
	v := &Inventory{Looked: took.Round(100 * time.Millisecond).String(), Listeners: []Listener{}}
	sockets := unixListeners(l.listeners)
	maps.DeleteFunc(l.listeners, func(_ listenerKey, f *found) bool { return l.succeeded(f) })
	for _, f := range l.listeners {
		one := f.Listener
		one.Clients = f.grouped()
		one.Cautions = cautions(one, sockets[one.Process.PID])
		v.Listeners = append(v.Listeners, one)
	}
	slices.SortFunc(v.Listeners, compareListeners)
	return v
}

// order of places in what is shown: the host's first.
var order = map[Where]int{Host: 0, Pod: 1, Apart: 2}

func compareListeners(a, b Listener) int {
	return cmp.Or(order[a.Where]-order[b.Where], cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Protocol, b.Protocol),
		cmp.Compare(a.Port, b.Port), cmp.Compare(a.Process.PID, b.Process.PID))
}

// at says whether connections to that address of its namespace are the listener's.
func (l Listener) at(a netip.Addr) bool {
	return slices.ContainsFunc(l.Addresses, func(own netip.Addr) bool { return own == a || own.IsUnspecified() })
}

// loopbackOnly says that nobody outside of its namespace reaches it.
func (l Listener) loopbackOnly() bool {
	return len(l.Addresses) > 0 && !slices.ContainsFunc(l.Addresses, func(a netip.Addr) bool { return !a.IsLoopback() })
}

// String names the listener in a line.
func (l Listener) String() string {
	return fmt.Sprintf("%s port %d of %q", l.Protocol, l.Port, l.Process.Name)
}
