package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/sallyport-dev/sallyport/bpf"
)

// ErrNoCaller says that no socket is known to have opened a connection: none of this node's control groups did, or what one said
// was not kept.
var ErrNoCaller = errors.New("no socket of this node is known to have opened it")

// Caller is whose socket opened a TCP connection to a protected port, as the kernel saw it when the SYN was sent. What becomes of
// the socket later is not in it: it can be handed to another process, and its own can fork or run another program.
type Caller struct {
	// Cookie is the kernel's number of the socket, never given twice.
	Cookie uint64
	// Cgroup is the number of the control group that the socket was made in.
	Cgroup uint64
	// PID is the process that connected, as the node counts them, and Started the CLOCK_BOOTTIME of its start; 0: nobody knows.
	PID     int32
	Started time.Duration
	// User and Group are what the process was at work as: its effective ones, at that time.
	User, Group uint32
	// ProcessCgroup is the control group of that process, at that time.
	ProcessCgroup uint64
	// Taken is when a hook decided on the SYN: the connection began then.
	Taken time.Duration
}

// Caller tells whose socket opened the latest connection from client to server that a hook has decided on. The error wraps
// ErrNoCaller, also while a later SYN with the same addresses and ports is under way.
func (d *Datapath) Caller(client, server netip.AddrPort) (Caller, error) {
	key := bpf.FlowKey{Client: toAddr(client.Addr()), Server: toAddr(server.Addr()), ClientPort: client.Port(), ServerPort: server.Port(), Protocol: uint32(TCP)}
	var c bpf.Caller
	err := d.objs.SpCallers.Lookup(&key, &c)
	if isMissing(err) || err == nil && c.TakenNs == 0 {
		return Caller{}, fmt.Errorf("%s to %s: %w", client, server, ErrNoCaller)
	}
	if err != nil {
		return Caller{}, fmt.Errorf("read caller of %s to %s: %w", client, server, err)
	}
	return Caller{Cookie: c.Cookie, Cgroup: c.Cgroup, PID: int32(c.Pid), User: c.User, Group: c.UsersGroup, Started: time.Duration(c.StartedNs),
		ProcessCgroup: c.ProcessCgroup, Taken: time.Duration(c.TakenNs)}, nil
}
