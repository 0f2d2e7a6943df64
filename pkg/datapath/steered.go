package datapath

import (
	"fmt"
	"net/netip"

	"github.com/sallyport-dev/sallyport/bpf"
)

// Steered tells whether a hook took the SYN of a connection to the proxy: then it has a leg, for a while also after it ended. It is the
// kernel's own word on one connection, whoever answered it.
func (d *Datapath) Steered(client, server netip.AddrPort) (bool, error) {
	key := bpf.LegKey{Client: toAddr(client.Addr()), Server: toAddr(server.Addr()), ClientPort: client.Port(), ServerPort: server.Port(),
		Side: bpf.SallyportSpLegSideSP_LEG_DOWN}
	var leg bpf.Leg
	err := d.objs.SpLegs.Lookup(&key, &leg)
	if isMissing(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read leg of %s to %s: %w", client, server, err)
	}
	return true, nil
}
