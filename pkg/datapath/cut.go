package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/vishvananda/netns"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// cutFlowLinger is how long the entry of a flow whose path ended stays after its sockets were destroyed: it lets
// their RST through to the other party.
const cutFlowLinger = 500 * time.Millisecond

// cuts are the flows whose path ended, from the sweep that cut them to the one that takes them.
type cuts map[bpf.FlowKey]cut

type cut struct {
	id    uint64
	since time.Duration // CLOCK_BOOTTIME
	fresh bool          // not cut before
}

// done tells whether nothing is left of a flow to be cut. One that is not done is noted in `next`.
func (c cuts) done(next cuts, k bpf.FlowKey, f *bpf.Flow, why flow.Reason) bool {
	if !isPathEnd(why) || k.Protocol != uint32(TCP) || isCut(f) {
		return true
	}
	before, known := c[k]
	if known && before.id == f.Id {
		before.fresh = false
		next[k] = before
		return BootTime()-before.since >= cutFlowLinger
	}
	next[k] = cut{id: f.Id, since: BootTime(), fresh: true}
	return false
}

// isPathEnd tells whether a flow ended with its path, and not by its parties.
func isPathEnd(r flow.Reason) bool { return r >= flow.ReasonPathExpired && r <= flow.ReasonPathStale }

// isCut tells whether the programs told both parties of a flow's end.
func isCut(f *bpf.Flow) bool {
	const both = uint32(bpf.SallyportSpFlagsSP_CUT_CLIENT | bpf.SallyportSpFlagsSP_CUT_SERVER)
	return f.Flags&both == both
}

// destroyer destroys the sockets of flows whose path ended, so that idle connections end too. An RST of the service's
// socket ends the client's half wherever it is; for clients on the node their own socket is destroyed as well, in case the
// service's is out of reach.
type destroyer struct {
	host *sockets
	pods map[int]*sockets // by device; nil for one whose namespace was not found
	errs []error
}

// destroySockets ends the connections of the flows. It goes on where it can; nothing is enforced by it.
func destroySockets(keys []bpf.FlowKey, flows []bpf.Flow) error {
	if len(keys) == 0 {
		return nil
	}
	host, err := openSockets(netns.None())
	if err != nil {
		return err
	}
	d := &destroyer{host: host, pods: map[int]*sockets{}}
	defer d.close()
	for i := range keys {
		if err := d.destroy(&keys[i], &flows[i]); errors.Is(err, ErrNoDestroy) {
			return err
		} else if err != nil {
			d.errs = append(d.errs, err)
		}
	}
	return errors.Join(d.errs...)
}

func (d *destroyer) close() {
	d.host.Close()
	for _, s := range d.pods {
		if s != nil {
			s.Close()
		}
	}
}

func (d *destroyer) destroy(k *bpf.FlowKey, f *bpf.Flow) error {
	client := netip.AddrPortFrom(fromAddr(k.Client), k.ClientPort)
	server := netip.AddrPortFrom(fromAddr(k.Server), k.ServerPort)
	device := int(f.Ifindex)
	var errs []error
	if !isPods(f) {
		errs = append(errs, d.host.destroy(server, client, device))
	} else if pod := d.pod(device); pod != nil {
		errs = append(errs, pod.destroy(server, client, 0))
	}
	return errors.Join(append(errs, d.host.destroy(client, server, device))...)
}

// isPods tells whether the service of a flow is in a pod.
func isPods(f *bpf.Flow) bool {
	return f.Hook == bpf.SallyportSpHookSP_HOOK_OUT || f.Hook == bpf.SallyportSpHookSP_HOOK_PORT
}

// standingSockets tells for each flow whether its service has the connection. It does not where nobody can tell.
func standingSockets(keys []bpf.FlowKey, flows []bpf.Flow) []bool {
	standing := make([]bool, len(keys))
	if len(keys) == 0 {
		return standing
	}
	host, err := openSockets(netns.None())
	if err != nil {
		return standing
	}
	d := &destroyer{host: host, pods: map[int]*sockets{}}
	defer d.close()
	for i := range keys {
		standing[i] = d.stands(&keys[i], &flows[i])
	}
	return standing
}

func (d *destroyer) stands(k *bpf.FlowKey, f *bpf.Flow) bool {
	at := d.host
	if isPods(f) {
		at = d.pod(int(f.Ifindex))
	}
	client := netip.AddrPortFrom(fromAddr(k.Client), k.ClientPort)
	server := netip.AddrPortFrom(fromAddr(k.Server), k.ServerPort)
	return at != nil && at.has(server, client, int(f.Ifindex))
}

// pod opens the sockets of the pod behind a device, once.
func (d *destroyer) pod(device int) *sockets {
	if s, known := d.pods[device]; known {
		return s
	}
	s, err := podSockets(device)
	if err != nil {
		d.errs = append(d.errs, err)
	}
	d.pods[device] = s
	return s
}

func podSockets(device int) (*sockets, error) {
	ns, err := namespaceBehind(device)
	if err != nil {
		return nil, fmt.Errorf("reach the sockets of a pod: %w", err)
	}
	s, err := openSockets(ns)
	return s, errors.Join(err, ns.Close())
}
