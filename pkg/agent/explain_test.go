package agent

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// TestExplainPaths: what a path means for a new connection depends on its budget, and one that is over is told of.
func TestExplainPaths(t *testing.T) {
	leak.Check(t)
	client := netip.MustParseAddr("10.1.0.2")
	path := func(state datapath.PathState, budget datapath.Budget, flows uint64, ingress datapath.Ingress) datapath.PathStatus {
		return datapath.PathStatus{State: state, Flows: flows, Path: datapath.Path{
			Grant: "g", Client: client, ServiceID: 7, Ports: []uint16{53}, Budget: budget, Ingress: ingress}}
	}
	for name, c := range map[string]struct {
		path                    datapath.PathStatus
		protocol                string
		verdict, reason, phrase string
	}{
		"live": {path(datapath.PathActive, datapath.Budget{}, 9, 0), policy.ProtocolTCP, "BYPASSED", "PATH_OPEN", "straight to the service"},
		"connections left": {path(datapath.PathActive, datapath.Budget{Connections: 2}, 1, 0), policy.ProtocolTCP,
			"BYPASSED", "PATH_OPEN", "straight to the service"},
		"no connections left": {path(datapath.PathActive, datapath.Budget{Connections: 2}, 2, 0), policy.ProtocolTCP,
			"PROXIED", "PATH_CONNECTIONS", "all of its 2 connections"},
		"no connections left, UDP": {path(datapath.PathActive, datapath.Budget{Connections: 2}, 2, 0), policy.ProtocolUDP,
			"DENIED", "PATH_CONNECTIONS", "all of its 2 connections"},
		"rate":         {path(datapath.PathActive, datapath.Budget{ConnectionsPerSecond: 3}, 9, 0), policy.ProtocolTCP, "BYPASSED", "PATH_OPEN", "PATH_RATE"},
		"ingress":      {path(datapath.PathActive, datapath.Budget{}, 0, datapath.IngressPod), policy.ProtocolTCP, "BYPASSED", "PATH_OPEN", "PATH_INGRESS"},
		"spent":        {path(datapath.PathSpent, datapath.Budget{Bytes: 1}, 1, 0), policy.ProtocolTCP, "PROXIED", "NO_PATH", "grant g is spent"},
		"expired, UDP": {path(datapath.PathExpired, datapath.Budget{}, 1, 0), policy.ProtocolUDP, "DENIED", "UDP_NO_PATH", "grant g is expired"},
		"none":         {datapath.PathStatus{}, policy.ProtocolTCP, "PROXIED", "NO_PATH", "no live path: the first packet"},
	} {
		t.Run(name, func(t *testing.T) {
			service := policy.ProtectedService{Spec: policy.ProtectedServiceSpec{Protocol: c.protocol}}
			r := overPath(&api.ExplainReply{}, question{client: client}, service, nil, c.path)
			text := strings.Join(r.Lines, "\n")
			if r.Verdict != c.verdict || r.Reason != c.reason || r.Grant != c.path.Grant || !strings.Contains(text, c.phrase) {
				t.Errorf("%s %s %q: %s", r.Verdict, r.Reason, r.Grant, text)
			}
		})
	}
}

// TestLatestPath: a live path comes before those that are over, and another client's, service's or port's never counts.
func TestLatestPath(t *testing.T) {
	leak.Check(t)
	client := netip.MustParseAddr("10.1.0.2")
	paths := []datapath.PathStatus{
		{State: datapath.PathExpired, Path: datapath.Path{Grant: "old", Client: client, ServiceID: 7, Ports: []uint16{53}, Deadline: 1}},
		{State: datapath.PathSpent, Path: datapath.Path{Grant: "newer", Client: client, ServiceID: 7, Ports: []uint16{53}, Deadline: 9}},
		{State: datapath.PathActive, Path: datapath.Path{Grant: "live", Client: client, ServiceID: 8, Ports: []uint16{53}, Deadline: 5}},
		{State: datapath.PathRevoked, Path: datapath.Path{Grant: "later", Client: client, ServiceID: 8, Ports: []uint16{53}, Deadline: 9}},
	}
	for _, c := range []struct {
		client  netip.Addr
		service uint32
		port    uint16
		grant   string
	}{
		{client, 7, 53, "newer"}, {client, 8, 53, "live"}, {client, 7, 54, ""}, {client, 9, 53, ""}, {client.Next(), 8, 53, ""},
	} {
		if p := latest(paths, c.client, c.service, c.port); p.Grant != c.grant {
			t.Errorf("%s to port %d of service %d: %q, want %q", c.client, c.port, c.service, p.Grant, c.grant)
		}
	}
}

// TestExplainWaysAround: whoever is not let through learns which policies could be asked, and what the others have against it.
func TestExplainWaysAround(t *testing.T) {
	leak.Check(t)
	signer := newSigner(t)
	later := strings.NewReplacer("name: backup", "name: later", "maxDuration: 15m", "maxDuration: 1h\n  notAfter: 2001-01-01T00:00:00Z").
		Replace(signer.resources("15m"))
	_, later, _ = strings.Cut(later, "---\n")
	later, _, _ = strings.Cut(later, "---\n")
	const denial = "---\napiVersion: sallyport.dev/v1alpha1\nkind: DenyList\nmetadata: {name: stop}\nspec: {reason: incident, services: [postgres]}\n"
	for name, c := range map[string]struct {
		more, client string
		says         []string
	}{
		"may be asked for": {"", "10.1.0.2", []string{`may be asked for under policy "backup" (r.yaml:8): asked for by alice, for at most 15m`}},
		"another ended":    {"---\n" + later, "10.1.0.2", []string{`under policy "backup"`, `no way around: policy "later" ended at 2001`}},
		"from elsewhere":   {"", "192.0.2.1", []string{`no way around: policy "backup" does not list 192.0.2.1 in its sources`}},
		"the node itself":  {"", "10.0.0.1", []string{"10.0.0.1 is an address of the node"}},
		"denied":           {denial, "10.1.0.2", []string{`no way around: a way around postgres is denied by the list "stop": incident`}},
	} {
		t.Run(name, func(t *testing.T) {
			set, err := policy.Parse("r.yaml", []byte(signer.resources("15m")+c.more))
			must(t, err)
			r := &api.ExplainReply{}
			around(r, set, policy.GrantFacts{Service: "postgres", Ports: []uint16{5432}, Addresses: []netip.Addr{netip.MustParseAddr(c.client)},
				NodeAddresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, Now: time.Now()})
			text := strings.Join(r.Lines, "\n")
			if len(r.Lines) != len(c.says) || !contains(text, c.says...) {
				t.Errorf("it says: %s", text)
			}
		})
	}
}
