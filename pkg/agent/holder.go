package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// holderGrace is how long a grant waits for its holder to come back after the agent was restarted.
const holderGrace = 15 * time.Second

// ErrHeld says that a grant has a holder still, and is open.
var ErrHeld = errors.New("grant is held")

// Whys of a grant that its holder let go of.
const (
	whyGivenBack  = "given back by its holder"
	whyHolderGone = "holder gone"
)

// holding is a workload's grip on a grant that it asked for itself: a stream, without which the grant ends.
type holding struct {
	ended chan struct{} // closed when the grant is over; then its ending can be read
	// device is that of the pod that asked; 0: it asked from elsewhere. Whoever has its address once the device is gone is another.
	device int
	let    string        // why its holder let go of it; empty: nobody has. Guarded by grants.mu
	lost   time.Duration // boot time since which nobody holds it, as the agent was restarted; 0: somebody does. Guarded by grants.mu
}

func newHolding(p grant.Payload) *holding {
	return &holding{ended: make(chan struct{}), device: int(p.Device)}
}

// wanted is a payload that a workload asks for, and what proves who it is.
type wanted struct {
	payload grant.Payload
	proof   string // names the certificate
}

func (w wanted) prove() (grant.Verified, error) {
	return grant.Proven(w.payload, w.proof), w.payload.Validate()
}

// ActivateFor opens the path that a workload asks for. It is as Activate for what follows, but the grant ends when its
// holder lets go.
func (g *grants) ActivateFor(ctx context.Context, want wanted) (*held, error) {
	a := &activation{ask: &want, actor: want.payload.Requester}
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.activate(ctx, a)
}

// TakeUp gives an active grant back to its holder, after the agent was restarted. The error wraps ErrNoGrant if it is over or
// somebody else's, or if its pod is gone and another has the address; and ErrHeld if its paths are open, for one whose stream may be
// broken without our knowing yet.
func (g *grants) TakeUp(id, requester string, client netip.Addr) (*held, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	h, ok := g.active[id]
	if !ok || h.over != nil || h.holding == nil || h.payload.Requester != requester || h.payload.Addresses[0] != client ||
		h.holding.device != 0 && podDevice(client, g.datapath.Devices()) != h.holding.device {
		return nil, fmt.Errorf("take up grant %q: %w", plain(id), ErrNoGrant)
	}
	if h.holding.lost == 0 {
		return nil, fmt.Errorf("take up grant %q: %w", id, ErrHeld)
	}
	h.holding.lost = 0
	return h, nil
}

// reclaim makes an adopted grant wait for its holder, if it had one. Not if its pod was replaced while no agent ran: then it tells why
// the grant cannot go on.
func (g *grants) reclaim(h *held) (why string) {
	if !policy.IsWorkload(h.payload.Requester) {
		return ""
	}
	h.holding = newHolding(h.payload)
	h.holding.lost = g.clock.boot()
	if h.holding.device == 0 {
		return ""
	}
	if now := podDevice(h.payload.Addresses[0], g.datapath.Devices()); now != 0 && now != h.holding.device {
		return whyHolderGone + ": its address is another pod's"
	}
	return ""
}

// endLost ends the grants whose holders let go of them, did not come back in time, or whose pods are gone.
func (g *grants) endLost(ctx context.Context) error {
	all := g.every() // before the devices: whoever comes has one of them
	now, here := g.clock.boot(), g.hookedDevices()
	var lost []doomed
	_ = inTurns(&g.mu, all, func(h *held) error {
		if h.over != nil {
			return nil
		}
		if h.holding != nil && h.holding.let != "" {
			lost = append(lost, doomed{h, ending{grant: h.row.ID}.revoked(h.payload.Requester, h.holding.let)})
		} else if why := h.holding.goneWhy(now, here); why != "" {
			lost = append(lost, doomed{h, ending{grant: h.row.ID}.revoked("agent", whyHolderGone+": "+why)})
		}
		return nil
	})
	return g.endMany(ctx, lost)
}

func (g *grants) hookedDevices() map[int]bool {
	here := make(map[int]bool)
	for _, d := range g.datapath.Devices() {
		here[d.Ifindex] = true
	}
	return here
}

// goneWhy tells why nobody holds a grant any more, or nothing.
func (h *holding) goneWhy(now time.Duration, here map[int]bool) string {
	switch {
	case h == nil:
		return ""
	case h.lost != 0 && now-h.lost >= holderGrace:
		return "it did not come back after the agent was restarted"
	case h.device != 0 && !here[h.device]:
		return "its pod's device is not there any more"
	}
	return ""
}

// recount gives what a grant says and who vouches for it by other keyrings than before. Its signatures were verified when it began, or when
// this agent took it up.
func (h *held) recount(known map[string]policy.KnownKey) (grant.Verified, error) {
	if h.isUnsigned() {
		return h.verify(nil, nil)
	}
	return grant.Recount(h.payload, h.row.Signers, known, h.row.Activated)
}

// isUnsigned tells whether nobody has signed the grant: a workload asked for it, or the resources list it.
func (h *held) isUnsigned() bool { return policy.IsWorkload(h.payload.Requester) || h.isProbe() }

// verify gives what a grant says and who vouches for it: those who signed it, the workload that asked for it, or the resources.
func (h *held) verify(envelope []byte, keys []policy.Keyring) (grant.Verified, error) {
	if h.isUnsigned() {
		return grant.Proven(h.payload, strings.Join(h.row.Signers, " ")), nil
	}
	return grant.Verify(envelope, keys, h.row.Activated)
}
