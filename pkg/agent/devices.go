package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path"
	"slices"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// resyncEvery bounds how long a device that no message told of stays without hooks.
const resyncEvery = 2 * time.Second

// link is a network device of the node, as far as hooking is concerned.
type link struct {
	name     string
	ifindex  int
	loopback bool
	kind     string // as the kernel has it: veth, bridge, bond
	master   *link  // the device that it is enslaved to
}

// classifier tells the part that a device plays from its name.
type classifier struct {
	pods   []string   // shell patterns of the host side of pod devices
	ignore []string   // shell patterns of devices that are never hooked; loopback cannot be ignored
	px0    func() int // ifindex of our own device, which has hooks of its own
}

// role gives the device's role; hooked is false for a device that gets no hooks from here. A packet meets the hooks of a
// device and of its master, so these share the work, or the master has it all.
func (c classifier) role(l link) (role datapath.Role, hooked bool) {
	pod := matches(c.pods, l.name)
	switch {
	case l.ifindex == c.px0():
		return "", false
	case l.loopback:
		return datapath.RoleLo, true
	case matches(c.ignore, l.name) || c.served(l):
		return "", false
	case l.kind == "bridge":
		return datapath.RoleBridge, true
	case c.hasMaster(l, "bridge") && pod:
		return datapath.RolePodPort, true
	case c.hasMaster(l, "bridge"):
		return datapath.RolePort, true
	case pod:
		return datapath.RolePod, true
	}
	return datapath.RoleUplink, true
}

// served says whether the device's master has all the hooks.
func (c classifier) served(l link) bool { return c.hasMaster(l, "bond") || c.hasMaster(l, "team") }

// hasMaster says whether the device is enslaved to a device of that kind which has hooks.
func (c classifier) hasMaster(l link, kind string) bool {
	return l.master != nil && l.master.kind == kind && !matches(c.ignore, l.master.name)
}

func (c classifier) ignored(l link) bool {
	return !l.loopback && l.ifindex != c.px0() && matches(c.ignore, l.name)
}

func matches(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		ok, err := path.Match(p, name)
		return ok && err == nil
	})
}

// hookPlan is what makes the hooks follow the devices.
type hookPlan struct {
	attach  []hookWant  // in the order in which to do it: loopback, pods, uplinks
	detach  []int       // devices that are gone
	release map[int]int // devices whose master has the hooks, and that master
}

// hookWant is a device that should have hooks; fresh says that it has none of its role yet.
type hookWant struct {
	datapath.Device
	fresh bool
}

// planHooks compares the hooks that are there with the devices that should have them. A device that has hooks is attached
// again too, which changes nothing, unless it is another device that took over the number. One that is ignored from now on
// keeps its hooks: to open a hole takes more than a name.
func planHooks(have []datapath.Device, links []link, c classifier) hookPlan {
	hooked := make(map[int]datapath.Role, len(have))
	for _, d := range have {
		if ours(d.Role) { // px1's number may be that of another device here
			hooked[d.Ifindex] = d.Role
		}
	}
	plan := hookPlan{release: make(map[int]int)}
	present := make(map[int]bool, len(links))
	for _, l := range links {
		present[l.ifindex] = true
		if role, ok := c.role(l); ok {
			dev := datapath.Device{Name: l.name, Ifindex: l.ifindex, Role: role}
			plan.attach = append(plan.attach, hookWant{dev, hooked[l.ifindex] != role})
		} else if _, had := hooked[l.ifindex]; had && c.served(l) {
			plan.release[l.ifindex] = l.master.ifindex
		}
	}
	for _, d := range have {
		if !present[d.Ifindex] && ours(d.Role) {
			plan.detach = append(plan.detach, d.Ifindex)
		}
	}
	slices.SortStableFunc(plan.attach, func(a, b hookWant) int { return rank(a.Role) - rank(b.Role) })
	return plan
}

// ours tells whether the watcher put the hooks there: px0, px1 and px's loopback have their own.
func ours(r datapath.Role) bool {
	return rank(r) >= 0
}

func rank(r datapath.Role) int {
	return slices.Index([]datapath.Role{datapath.RoleLo, datapath.RolePod, datapath.RolePodPort, datapath.RolePort, datapath.RoleBridge,
		datapath.RoleUplink}, r)
}

// devices keeps hooks on every device of the node, also on those that appear later.
type devices struct {
	datapath *datapath.Datapath
	classify classifier
	uplinks  *uplinks
	moving   *sync.Mutex // held by who makes px0 anew: until then it looks like any device
	problems *problems
	log      *slog.Logger
	changed  func() // called after devices came or went, from Run
	moved    func() // called after each look, from Run
}

// Run follows the kernel's messages until ctx ends. A message only says that something changed: the list of devices is read
// anew, so a lost message costs at most resyncEvery.
func (d *devices) Run(ctx context.Context) error {
	resync := time.NewTicker(resyncEvery)
	defer resync.Stop()
	for {
		if err := d.follow(ctx, resync.C); err != nil {
			d.problems.report(problemDevice, "", err)
		}
		d.moved()
		select {
		case <-ctx.Done():
			return nil
		case <-resync.C:
		}
	}
}

// follow works through one subscription, until it breaks or ctx ends.
func (d *devices) follow(ctx context.Context, resync <-chan time.Time) error {
	updates, failed, stop, err := subscribeLinks()
	if err != nil {
		return err
	}
	defer stop()
	for {
		if err := d.sync(); err != nil {
			return err
		}
		d.problems.report(problemDevice, "", nil)
		d.moved()
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return fmt.Errorf("watch devices: %w", err)
		case _, ok := <-updates:
			if !ok {
				return errors.New("watch devices: subscription ended")
			}
			drain(updates)
		case <-resync:
		}
	}
}

// sync makes the hooks follow the devices once. A device that cannot be hooked is a problem of its own; the others go on.
func (d *devices) sync() error {
	d.moving.Lock()
	defer d.moving.Unlock()
	links, err := listLinks()
	if err != nil {
		return err
	}
	plan := planHooks(d.datapath.Devices(), links, d.classify)
	moved := len(plan.detach) > 0
	d.detach(plan.detach) // first: a device that came back with another number still has the hooks of the old one
	for _, want := range plan.attach {
		d.attach(want)
		moved = moved || want.fresh
	}
	d.detach(released(plan, d.datapath.Devices()))
	d.uplinks.sync(links)
	d.reportHoles(links)
	if moved {
		d.changed()
	}
	return nil
}

// released are the devices whose master has its hooks by now.
func released(p hookPlan, have []datapath.Device) (out []int) {
	for ifindex, master := range p.release {
		if slices.ContainsFunc(have, func(h datapath.Device) bool { return h.Ifindex == master && ours(h.Role) }) {
			out = append(out, ifindex)
		}
	}
	return out
}

func (d *devices) detach(ifindexes []int) {
	for _, ifindex := range ifindexes {
		if err := d.datapath.Detach(ifindex); err != nil {
			d.log.Warn("forget device", "ifindex", ifindex, "error", err)
		}
	}
}

func (d *devices) attach(w hookWant) {
	err := d.datapath.Attach(w.Ifindex, w.Role)
	switch {
	case err != nil:
		err = fmt.Errorf("hook %s (ifindex %d) as %s: %w", w.Name, w.Ifindex, w.Role, err)
	case w.fresh:
		d.log.Info("device hooked", "device", w.Name, "ifindex", w.Ifindex, "role", w.Role)
	}
	d.problems.report(problemDevice, w.Name, err)
}

// errIgnored is the standing problem of a device that configuration leaves out.
var errIgnored = errors.New("gets no hooks, by devices.ignore: what comes by it to protected services is refused, " +
	"unless hooks from before that setting are still on it (`sallyport-agent uninstall` takes them off)")

// reportHoles names the devices that are ignored and forgets the problems of devices that are gone.
func (d *devices) reportHoles(links []link) {
	names := map[string]bool{"": true}
	for _, l := range links {
		names[l.name] = true
		if d.classify.ignored(l) {
			d.problems.report(problemIgnored, l.name, errIgnored)
		}
	}
	exists := func(name string) bool { return names[name] }
	d.problems.keep(problemDevice, exists)
	d.problems.keep(problemIgnored, exists)
}

func listLinks() ([]link, error) {
	all, err := netlink.LinkList()
	if errors.Is(err, netlink.ErrDumpInterrupted) {
		all, err = netlink.LinkList()
	}
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	links := make([]link, len(all))
	byIndex := make(map[int]*link, len(all))
	for i, l := range all {
		links[i] = toLink(l)
		byIndex[links[i].ifindex] = &links[i]
	}
	for i, l := range all {
		links[i].master = byIndex[l.Attrs().MasterIndex]
	}
	return links, nil
}

func toLink(l netlink.Link) link {
	a := l.Attrs()
	return link{name: a.Name, ifindex: a.Index, loopback: a.RawFlags&unix.IFF_LOOPBACK != 0, kind: l.Type()}
}

// subscribeLinks tells of every change of a device from now on. After stop the channel of updates closes.
func subscribeLinks() (updates <-chan netlink.LinkUpdate, failed <-chan error, stop func(), err error) {
	ch := make(chan netlink.LinkUpdate, 64)
	errs := make(chan error, 1)
	done := make(chan struct{})
	err = netlink.LinkSubscribeWithOptions(ch, done, netlink.LinkSubscribeOptions{
		ErrorCallback: func(err error) {
			select {
			case errs <- err:
			default:
			}
		},
		ReceiveBufferSize: 1 << 20,
	})
	if err != nil {
		close(done)
		return nil, nil, nil, fmt.Errorf("watch devices: %w", err)
	}
	stop = func() {
		close(done)
		for range ch { // let the sender see that we left
		}
	}
	return ch, errs, stop, nil
}

// drain takes what is waiting: one look at the devices answers for all of it.
func drain[T any](ch <-chan T) {
	for {
		select {
		case _, ok := <-ch:
			if !ok {
				return
			}
		default:
			return
		}
	}
}
