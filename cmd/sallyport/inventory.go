package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/pkg/inventory"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// inventoryFlags are those of sallyport inventory.
type inventoryFlags struct {
	watch   time.Duration
	propose string
	mode    string
	all     bool
}

func (c *cli) inventory() *cobra.Command {
	var flags inventoryFlags
	cmd := &cobra.Command{
		Use:   "inventory",
		Short: "What listens on this node, who talks to it, and what to write to protect it",
		Long: `Find the listening sockets of all network namespaces of this node, whose they are, and who is connected to them. Only
sockets and processes are looked at: nothing is sent, and no agent is needed. With --for it watches for clients that come and
go; with an agent, or with --collector, the flow records of services that are protected already add their clients and the
identities that these proved.

--propose writes a ProtectedService in mode Observe for each that has none, one file each, with what it would have denied
and what has to be decided before Enforce as comments. No file is overwritten.`,
		Example: `  sudo sallyport inventory
  sudo sallyport inventory --for 10m --propose ./proposed
  sudo sallyport inventory -o json`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error { return c.takeInventory(cmd.Context(), flags) },
	}
	f := cmd.Flags()
	f.DurationVar(&flags.watch, "for", 0, "watch for clients for this `DURATION`")
	f.StringVar(&flags.propose, "propose", "", "write protected services into this `DIRECTORY`")
	f.StringVar(&flags.mode, "mode", string(policy.ModeObserve), "the `MODE` of what is proposed: Observe or Shadow")
	f.BoolVar(&flags.all, "all", false, "show what no device of the node leads to as well")
	fixed(cmd, "mode", []string{string(policy.ModeObserve), string(policy.ModeShadow)})
	return cmd
}

func (c *cli) takeInventory(ctx context.Context, flags inventoryFlags) error {
	mode := policy.Mode(flags.mode)
	if mode != policy.ModeObserve && mode != policy.ModeShadow {
		return withHint(usagef("--mode %s: what is proposed closes nothing", flags.mode), "write Observe or Shadow")
	}
	if flags.watch < 0 {
		return usagef("--for %s: less than nothing", flags.watch)
	}
	if os.Geteuid() != 0 {
		return withHint(errors.New("take inventory: other users' sockets and network namespaces are for root"), "run it with sudo")
	}
	found, err := inventory.Look(ctx, inventory.Config{For: flags.watch})
	if err != nil {
		return fmt.Errorf("take inventory: %w", err)
	}
	if ctx.Err() != nil {
		c.note("stopped before the time was over: this is what was seen until then")
		ctx = context.WithoutCancel(ctx)
	}
	if err := c.addProtected(ctx, found); err != nil {
		return err
	}
	if !flags.all {
		found.LeaveOut(inventory.Apart)
	}
	view := inventoryView{Inventory: found}
	if flags.propose != "" {
		if view.Proposed, err = c.propose(found, flags.propose, mode); err != nil {
			return err
		}
	}
	return c.show(view, func(t *table) { inventoryTable(t, view) })
}

// inventoryView is the inventory with what was written.
type inventoryView struct {
	*inventory.Inventory
	Proposed []proposed `json:"proposed,omitempty"`
}

// proposed is a proposal and its file.
type proposed struct {
	File string `json:"file"`
	inventory.Proposal
}

// addProtected adds what an agent knows, if there is one, and with --collector what the collector has of this node's services.
func (c *cli) addProtected(ctx context.Context, found *inventory.Inventory) error {
	err := c.withAgent(ctx, func(ctx context.Context, a *client.Agent) error {
		reply, err := a.Services(ctx)
		if err != nil {
			return err
		}
		for _, s := range reply.GetServices() {
			if err := protect(found, s); err != nil {
				return err
			}
		}
		if c.collector != "" {
			return nil
		}
		return addFlows(found, a.Flows(ctx, &api.FlowQuery{}))
	})
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, client.ErrUnreachable) {
		c.note("no agent answers at %s: only sockets were looked at", c.agentSocket())
		return nil
	}
	if err != nil || c.collector == "" {
		return err
	}
	return c.withAudit(ctx, false, func(ctx context.Context, a *client.Audit) error {
		return addFlows(found, a.Flows(ctx, &api.FlowQuery{Limit: inventoryFlows}))
	})
}

// inventoryFlows is how many of the collector's latest records are asked for.
const inventoryFlows = 10000

func protect(found *inventory.Inventory, s *api.Service) error {
	if s.GetTarget() != string(policy.TargetHost) && len(s.GetAddresses()) == 0 {
		return nil // it is nowhere yet
	}
	var ports []uint16
	for _, p := range s.GetPorts() {
		ports = append(ports, uint16(p))
	}
	var addresses []netip.Addr
	for _, text := range s.GetAddresses() {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return fmt.Errorf("read the agent's services: %w", err)
		}
		addresses = append(addresses, a)
	}
	found.Protect(s.GetName(), s.GetMode(), strings.ToUpper(s.GetProtocol()), ports, addresses)
	return nil
}

// addFlows adds flows that begin, or that were refused.
func addFlows(found *inventory.Inventory, flows iter.Seq2[*api.StoredFlow, error]) error {
	for stored, err := range flows {
		if err != nil {
			return err
		}
		r := stored.GetFlow()
		from, err1 := netip.ParseAddrPort(r.GetClient())
		to, err2 := netip.ParseAddrPort(r.GetServer())
		if err1 != nil || err2 != nil || r.GetEvent() == "CLOSE" || r.GetEvent() == "REQUEST" {
			continue // of no single connection, or of one that another record tells of
		}
		found.AddFlow(inventory.Flow{
			Client: from, Server: to, Count: max(1, r.GetCount()),
			Identity: either(r.GetIdentity(), r.GetCaller().GetIdentity()),
		})
	}
	return nil
}

// propose writes what is proposed, each into a file of its own that must not be there.
func (c *cli) propose(found *inventory.Inventory, dir string, mode policy.Mode) ([]proposed, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("propose services: %w", err)
	}
	var all []proposed
	for _, p := range found.Propose(mode) {
		data, err := p.Document(c.now(), found.Looked)
		if err != nil {
			return nil, fmt.Errorf("propose services: %w", err)
		}
		file := filepath.Join(dir, p.Name+".yaml")
		if err := writeNew(file, data); err != nil {
			return nil, withHint(fmt.Errorf("propose services: %w", err), "name an empty directory: no file is overwritten")
		}
		all = append(all, proposed{file, p})
	}
	return all, nil
}

func inventoryTable(t *table, v inventoryView) {
	t.row("WHERE", "LISTENS AT", "KIND", "PROCESS", "PID", "USER", "UNIT OR POD", "SERVICE", "CLIENTS")
	for _, l := range v.Listeners {
		t.row(place(l), listensAt(l), l.Kind, l.Process.Name, pidText(l.Process), l.Process.User, l.Process.Home(), protectedBy(l), len(l.Clients))
	}
	clientsTable(t, v.Listeners)
	cautionLines(t, v.Listeners)
	for i, p := range v.Proposed {
		if i == 0 {
			t.line("")
			t.row("PROPOSED", "FILE", "PORTS", "ALLOW", "WOULD HAVE DENIED")
		}
		t.row(p.Name, p.File, ports(p.Service.Spec.Ports), allowed(p.Service.Spec.Access), plural(len(p.Denied), "client"))
	}
}

func place(l inventory.Listener) string {
	if l.Where == inventory.Host {
		return string(l.Where)
	}
	if len(l.Reach) > 0 {
		return fmt.Sprintf("%s %s", l.Where, l.Reach[0])
	}
	return fmt.Sprintf("%s net:%d", l.Where, l.Namespace)
}

func listensAt(l inventory.Listener) string {
	var texts []string
	for _, a := range l.Addresses {
		texts = append(texts, choose(a.IsUnspecified(), "*", a.String()))
	}
	if len(texts) == 2 && texts[0] == texts[1] { // both families
		texts = texts[:1]
	}
	return fmt.Sprintf("%s %s port %d", l.Protocol, strings.Join(texts, ","), l.Port)
}

func pidText(p inventory.Process) string {
	if p.PID == 0 {
		return ""
	}
	return fmt.Sprint(p.PID)
}

func protectedBy(l inventory.Listener) string {
	if l.Service == "" {
		return ""
	}
	return fmt.Sprintf("%s (%s)", l.Service, l.Mode)
}

func clientsTable(t *table, listeners []inventory.Listener) {
	begun := false
	for _, l := range listeners {
		for _, c := range l.Clients {
			if !begun {
				t.line("")
				t.row("CLIENT", "OF", "CONNECTIONS", "IDENTITY", "PROCESS", "USER", "UNIT OR POD")
				begun = true
			}
			var p inventory.Process
			if c.Process != nil {
				p = *c.Process
			}
			t.row(c.Address, l, c.Connections, c.Identity, p.Name, p.User, p.Home())
		}
	}
}

func cautionLines(t *table, listeners []inventory.Listener) {
	begun := false
	for _, l := range listeners {
		for _, says := range l.Cautions {
			if !begun {
				t.line("")
				t.line("Mind:")
				begun = true
			}
			t.line("- %s %s: %s", place(l), l, says)
		}
	}
}

func allowed(rules []policy.AccessRule) string {
	var all []string
	for _, r := range rules {
		all = append(append(all, r.Identities...), r.Subjects...)
	}
	if len(all) == 0 {
		return "nobody"
	}
	return strings.Join(all, ",")
}
