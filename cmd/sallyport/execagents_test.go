package main

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/client"
)

// TestMissingPaths: a command is run when what it will connect to has its path, and else it is said what has none.
func TestMissingPaths(t *testing.T) {
	open := error(nil)
	unreached := fmt.Errorf("no route: %w, %w", client.ErrUnreachable, client.ErrNotReached)
	refused := fmt.Errorf("not listed: %w", client.ErrRefused)
	nobody := fmt.Errorf("connection refused: %w", client.ErrUnreachable)
	at := func(name, address string, err error) asked {
		return asked{agentAddress{name, netip.AddrPortFrom(netip.MustParseAddr(address), 9470)}, err}
	}
	for _, c := range []struct {
		name         string
		all          []asked
		notes, wrong string // addresses
	}{
		{"one", []asked{at("db", "10.2.0.2", open)}, "", ""},
		{"one refuses", []asked{at("db", "10.2.0.2", refused)}, "", "10.2.0.2"},
		{"both families", []asked{at("db", "fd00::2", open), at("db", "10.2.0.2", open)}, "", ""},
		{"no way to the first", []asked{at("db", "fd00::2", unreached), at("db", "10.2.0.2", open)}, "fd00::2", ""},
		{"no way to the second", []asked{at("db", "fd00::2", open), at("db", "10.2.0.2", unreached)}, "10.2.0.2", ""},
		{"the first is refused: it would be connected to", []asked{at("db", "fd00::2", refused), at("db", "10.2.0.2", open)}, "", "fd00::2"},
		{"no agent at the first, though somebody is there", []asked{at("db", "fd00::2", nobody), at("db", "10.2.0.2", open)}, "", "fd00::2"},
		{"the second is refused", []asked{at("db", "10.2.0.2", open), at("db", "fd00::2", refused)}, "fd00::2", ""},
		{"no agent at the second", []asked{at("db", "10.2.0.2", open), at("db", "fd00::2", nobody)}, "fd00::2", ""},
		{"one of two nodes", []asked{at("db", "10.2.0.2", open), at("db", "10.2.0.3", refused)}, "", "10.2.0.3"},
		{"one of two nodes is down", []asked{at("db", "10.2.0.2", open), at("db", "10.2.0.3", unreached)}, "10.2.0.3", ""},
		{"no way to any", []asked{at("db", "10.2.0.2", unreached), at("db", "fd00::2", unreached)}, "", "10.2.0.2 fd00::2"},
		{"two names, one not reached", []asked{at("db-1", "10.2.0.2", open), at("db-2", "10.2.0.3", unreached)}, "", "10.2.0.3"},
		{"two names, each by its own", []asked{at("db-1", "10.2.0.2", open), at("db-1", "fd00::2", refused), at("db-2", "fd00::3", open), at("db-2", "10.2.0.3", refused)}, "fd00::2 10.2.0.3", ""},
	} {
		notes, err := missingPaths(c.all)
		if got := namedIn(c.all, notes...); got != c.notes {
			t.Errorf("%s: notes on %q, want %q", c.name, got, c.notes)
		}
		var said []string
		if err != nil {
			said = strings.Split(err.Error(), "\n")
		}
		if got := namedIn(c.all, said...); got != c.wrong {
			t.Errorf("%s: failed for %q, want %q", c.name, got, c.wrong)
		}
	}
}

// namedIn lists the addresses that lines name, with the name and the cause.
func namedIn(all []asked, lines ...string) string {
	var found []string
	for _, a := range all {
		for _, l := range lines {
			if strings.Contains(l, a.name+" at "+a.at.String()+": ") && strings.HasSuffix(l, a.err.Error()) {
				found = append(found, a.at.Addr().String())
			}
		}
	}
	return strings.Join(found, " ")
}

func TestResolveAgents(t *testing.T) {
	for _, c := range []struct {
		agents []string
		by     families
		want   string
	}{
		{[]string{"10.2.0.2"}, families{}, "10.2.0.2:9470"},
		{[]string{"10.2.0.2:1", "[fd00:2::2]:2", "fd00:2::3", "10.2.0.2:1"}, families{}, "10.2.0.2:1 [fd00:2::2]:2 [fd00:2::3]:9470"},
		{[]string{"localhost"}, families{only4: true}, "localhost at 127.0.0.1:9470"},
	} {
		all, err := resolveAgents(t.Context(), c.agents, c.by)
		var got []string
		for _, a := range all {
			got = append(got, a.String())
		}
		if err != nil || strings.Join(got, " ") != c.want {
			t.Errorf("%v: %v, %v, want %s", c.agents, got, err, c.want)
		}
	}
	for _, agents := range [][]string{{"10.2.0.2:port"}, {"10.2.0.2:70000"}, {"no such name"}, {"10.2.0.2"}} {
		if all, err := resolveAgents(t.Context(), agents, families{only6: true}); err == nil || !hinted(err) || exitCode(err) != exitUnreachable {
			t.Errorf("%v: %v, %v", agents, all, err)
		}
	}
}
