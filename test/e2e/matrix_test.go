package e2e_test

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// TestMatrix asks in every cell who answers, and why: a plain client, one with an identity that may come, one with an
// identity that may not. The cells are MATRIX/service/family/state/way.
func TestMatrix(t *testing.T) {
	leak.Check(t)
	for _, service := range services() {
		for _, f := range lab.Families() {
			t.Run(fmt.Sprintf("%s/%s", service, f), func(t *testing.T) {
				t.Parallel()
				newMatrix(t, service, f).run(t)
			})
		}
	}
}

// matrix is one world with all cells of one service in one family.
type matrix struct {
	*world
	cells []*cell
	log   *followed
}

// cell is one way with what is open for it.
type cell struct {
	way
	grant activated
	conn  live
	noTLS uint64 // connections that the proxy has to have denied for it
}

func newMatrix(t *testing.T, service string, f lab.Family) *matrix {
	t.Helper()
	m := &matrix{world: startWorld(t, options{lease: "4s"})}
	m.log = m.follow(t)
	for _, way := range m.ways(service, f) {
		m.cells = append(m.cells, &cell{way: way})
	}
	return m
}

func (m *matrix) run(t *testing.T) {
	m.each(t, "no_grant", func(t *testing.T, c *cell) { m.closed(t, c, "NO_PATH") })
	m.each(t, "wrong_source", m.wrongSource)
	m.live(t)
	m.revoked(t)
	m.expired(t)
	t.Run("records", m.denialsAddUp) // what a killed proxy has not told yet dies with it
	m.proxyKilled(t)
	m.agentKilled(t)
	t.Run("records_of_second_proxy", m.denialsAddUp)
}

// each runs the cells of one state, one after the other.
func (m *matrix) each(t *testing.T, state string, check func(*testing.T, *cell)) {
	t.Helper()
	for _, c := range m.cells {
		t.Run(state+"/"+c.name, func(t *testing.T) { check(t, c) })
	}
}

func (c *cell) open(t *testing.T, m *matrix, client netip.Addr, duration string) {
	t.Helper()
	c.grant = m.open(t, wanted{c.service, client, duration})
}

// closed: the way around the proxy is closed, for this reason, and the proxy is open to those who may come.
func (m *matrix) closed(t *testing.T, c *cell, reason string) {
	t.Helper()
	m.wantReason(t, reason, func() {
		if o := c.plain(within(t, patience)); o.who != cut {
			t.Errorf("plain client answered by %s, want a reset", o)
		}
		c.noTLS++
	})
	m.served(t, c, reason)
}

// served: an identity that may come is served by the proxy, and one that may not is refused; both are on record.
func (m *matrix) served(t *testing.T, c *cell, reason string) {
	t.Helper()
	m.wantReason(t, reason, func() {
		o := c.identified(within(t, patience), m.world, web)
		if o.who != proxied {
			t.Fatalf("client with an identity answered by %s, want the proxy", o)
		}
		if m.agentLives() {
			r := m.log.find(t, "the proxied connection", of(o.own, "OPEN", "PROXIED", "IDENTITY"))
			if r.Identity != web.String() || r.Service != c.service || r.Server != c.to.String() || r.Grant != "" {
				t.Errorf("record %v", r)
			}
		}
		if o := c.identified(within(t, patience), m.world, mallory); o.who != denied {
			t.Errorf("client with a wrong identity answered by %s, want an alert", o)
		}
	})
}

func (m *matrix) agentLives() bool {
	select {
	case <-m.agent.proc.Exited():
		return false
	default:
		return true
	}
}

// bypassed: the service answers directly, and the OPEN record names the grant.
func (m *matrix) bypassed(t *testing.T, c *cell) {
	t.Helper()
	m.wantReason(t, "PATH_OPEN", func() {
		o := c.plain(within(t, patience))
		if o.who != direct {
			t.Fatalf("plain client answered by %s, want the service", o)
		}
		r := m.log.find(t, "the bypassed connection", of(o.own, "OPEN", "BYPASSED", "PATH_OPEN"))
		if r.Grant != c.grant.ID || r.Service != c.service || r.Server != c.to.String() || r.Identity != "" {
			t.Errorf("record %v", r)
		}
	})
}

func (m *matrix) live(t *testing.T) {
	m.each(t, "live_path", func(t *testing.T, c *cell) {
		c.open(t, m, c.from, "5m")
		m.bypassed(t, c)
	})
}

// revoked: live connections are cut at their next packet, and their records say why. To a new one there is no path.
func (m *matrix) revoked(t *testing.T) {
	m.dialAll(t)
	m.each(t, "revoked", func(t *testing.T, c *cell) {
		m.revoke(t, c.grant)
		c.conn.wantCut(t)
		m.log.find(t, "the flow's end", of(c.conn.own, "CLOSE", "BYPASSED", "PATH_REVOKED"))
		m.closed(t, c, "NO_PATH")
	})
}

// wrongSource: a path for another address opens nothing. It comes before any path for the right one.
func (m *matrix) wrongSource(t *testing.T, c *cell) {
	foreign := m.open(t, wanted{c.service, c.other, "1m"})
	defer m.revoke(t, foreign)
	m.closed(t, c, "NO_PATH")
}

// dialAll opens a live connection in every cell.
func (m *matrix) dialAll(t *testing.T) {
	t.Helper()
	for _, c := range m.cells {
		c.conn = c.dialDirect(t)
	}
}

// expired: as revoked, by the clock alone.
func (m *matrix) expired(t *testing.T) {
	m.each(t, "expired", func(t *testing.T, c *cell) {
		c.open(t, m, c.from, bound(time.Second).String())
		c.conn = c.dialDirect(t)
		waitUntil(t, "the deadline", func() bool { return time.Now().After(c.grant.Deadline) })
		c.conn.wantCut(t)
		m.log.find(t, "the flow's end", of(c.conn.own, "CLOSE", "BYPASSED", "PATH_EXPIRED"))
		m.closed(t, c, "NO_PATH")
	})
}

// proxyKilled: without a path nobody answers, with one the service does. A new proxy serves at once.
func (m *matrix) proxyKilled(t *testing.T) {
	m.proxy.kill(t)
	m.each(t, "proxy_killed", func(t *testing.T, c *cell) {
		before := m.counters(t)
		if o := c.plain(within(t, silence)); o.who != nobody {
			t.Errorf("plain client answered by %s, want silence", o)
		}
		if o := c.identified(within(t, silence), m.world, web); o.who != nobody {
			t.Errorf("client with an identity answered by %s, want silence", o)
		}
		if after := m.counters(t); after["NO_LISTENER"] < before["NO_LISTENER"]+2 {
			t.Errorf("NO_LISTENER grew from %d to %d, want 2 at least", before["NO_LISTENER"], after["NO_LISTENER"])
		}
		c.open(t, m, c.from, "5m")
		m.bypassed(t, c)
		m.revoke(t, c.grant)
	})
	m.proxy.start(t)
	m.each(t, "proxy_restarted", func(t *testing.T, c *cell) { m.closed(t, c, "NO_PATH") })
}

// afterKill is how long paths last that see the agent die: longer than its lease.
const afterKill = 12 * time.Second

// agentKilled: a dead agent admits nothing new, and what it admitted dies on time; the proxy goes on.
func (m *matrix) agentKilled(t *testing.T) {
	for _, c := range m.cells {
		c.open(t, m, c.from, bound(afterKill).String())
	}
	m.dialAll(t)
	m.agent.kill(t)
	m.each(t, "agent_killed", m.leaseLapsed)
	m.each(t, "agent_killed_deadline", func(t *testing.T, c *cell) {
		waitUntil(t, "the deadline", func() bool { return time.Now().After(c.grant.Deadline) })
		c.conn.wantCut(t)
		m.closed(t, c, "PATH_EXPIRED")
	})
	m.agent.start(t)
	m.each(t, "agent_restarted", func(t *testing.T, c *cell) {
		m.log.find(t, "the flow's end", of(c.conn.own, "CLOSE", "BYPASSED", "PATH_EXPIRED"))
		m.closed(t, c, "NO_PATH")
	})
}

func (m *matrix) leaseLapsed(t *testing.T, c *cell) {
	waitUntil(t, "the lease to lapse", func() bool {
		o := c.plain(within(t, patience))
		if o.who == cut {
			c.noTLS++
		}
		return o.who == cut
	})
	m.closed(t, c, "LEASE_LAPSED")
	if o := c.conn.ask(); o.who != direct {
		t.Errorf("live connection: %s, want the service", o)
	}
	if time.Now().After(c.grant.Deadline) {
		t.Errorf("looked too late: the deadline is over, too")
	}
}

// denialsAddUp: every plain connection that the proxy took is on record as NO_TLS, none twice.
func (m *matrix) denialsAddUp(t *testing.T) {
	for _, c := range m.cells {
		got := uint64(0)
		waitUntil(t, fmt.Sprintf("%d denials of %s", c.noTLS, c.name), func() bool {
			got = m.log.denials(t, c.from, c.to, "NO_TLS")
			return got >= c.noTLS
		})
		if got != c.noTLS {
			t.Errorf("%s: %d NO_TLS on record, want %d", c.name, got, c.noTLS)
		}
	}
}
