package agent

import (
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/store"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// hook has the node's uplink decide, and a service behind it.
func (l *life) hook() {
	l.t.Helper()
	must(l.t, l.datapath.AttachPx())
	dev, err := l.lab.Node.Ifindex(lab.Uplink)
	must(l.t, err)
	must(l.t, l.lab.Node.Do(func() error { return l.datapath.Attach(dev, datapath.RoleUplink) }))
	must(l.t, l.datapath.Renew(time.Minute))
	_, err = l.lab.Node.WhoAnswers(l.server())
	must(l.t, err)
}

// server is the protected service on the node.
func (l *life) server() netip.AddrPort { return netip.AddrPortFrom(l.lab.Node.Addr(lab.IPv4), 5432) }

// client is the address of the client beyond the uplink.
func (l *life) client(p *grant.Payload) {
	p.Addresses = []netip.Addr{l.lab.Client.Addr(lab.IPv4)}
}

// dial connects from the client, under a path.
func (l *life) dial() net.Conn {
	l.t.Helper()
	conn, err := l.lab.Client.Dial(l.t.Context(), netip.AddrPortFrom(l.lab.Client.Addr(lab.IPv4), 0), l.server())
	must(l.t, err)
	l.t.Cleanup(func() { conn.Close() })
	return conn
}

// later moves both clocks on.
func (b *testbed) later(d time.Duration) { b.clock.wall, b.clock.boot = b.clock.wall+d, b.clock.boot+d }

// TestIdleEndsAGrant: packets keep it alive, silence ends it with a reason of its own, and the shorter time of grant and
// policy counts.
func TestIdleEndsAGrant(t *testing.T) {
	for _, c := range []struct {
		name   string
		asked  time.Duration
		policy string
		ends   time.Duration // 0: never
	}{
		{"of the grant", 10 * time.Minute, "", 10 * time.Minute},
		{"of the policy", 0, "4m", 4 * time.Minute},
		{"the policy's is shorter", 10 * time.Minute, "4m", 4 * time.Minute},
		{"the grant's is shorter", 3 * time.Minute, "4m", 3 * time.Minute},
		{"none", 0, "", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newTestbed(t, 16)
			if c.policy != "" {
				b.set = withPolicy(t, b, "idleTimeout: "+c.policy)
			}
			l := b.begin()
			defer l.kill()
			l.hook()
			row, err := l.Activate(t.Context(), b.signer.envelope(t, func(p *grant.Payload) {
				l.client(p)
				p.Duration, p.IdleTimeout = 15*time.Minute, c.asked
			}), "uid:0")
			must(t, err)
			conn := l.dial()
			state := func() string {
				_, err := l.tick(t.Context())
				must(t, err)
				states, _ := l.states()
				return states[row.ID]
			}
			for range 3 { // each answer is a packet; together they last longer than silence may
				_, err := lab.Ask(conn)
				must(t, err)
				if got := state(); got != store.StateActive {
					t.Fatalf("ended although packets went: %s", got)
				}
				b.later(2 * time.Minute)
			}
			if c.ends == 0 {
				b.later(8 * time.Minute)
				if got := state(); got != store.StateActive {
					t.Errorf("%s, without an idle time", got)
				}
				return
			}
			b.later(c.ends - 2*time.Minute - 10*time.Second)
			if got := state(); got != store.StateActive {
				t.Fatalf("%s before its time", got)
			}
			b.later(20 * time.Second)
			if got := state(); got != stateIdle {
				t.Fatalf("%s after its time", got)
			}
			rows, err := l.all(t.Context())
			must(t, err)
			want := "nothing was sent for " + policy.Duration{Duration: c.ends}.String()
			if _, open := l.states(); len(open) != 0 || rows[0].EndedWhy != want {
				t.Errorf("%+v, open %v", rows[0], open)
			}
			if steps := slices.DeleteFunc(l.steps(), func(s string) bool { return s == stepWarned }); !slices.Equal(steps, []string{stepActivated, stepIdle}) {
				t.Errorf("steps %v", steps)
			}
		})
	}
}

// withPolicy is the testbed's set with one more line in its BypassPolicy.
func withPolicy(t *testing.T, b *testbed, line string) *policy.Set {
	t.Helper()
	set, err := policy.Parse("test.yaml", []byte(strings.Replace(b.signer.resources("15m"), "requesters: [alice]\n", "requesters: [alice]\n  "+line+"\n", 1)))
	must(t, err)
	return set
}
