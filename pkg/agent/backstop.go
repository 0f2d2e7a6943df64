package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// backstopTick is how often the backstop's counters are read.
const backstopTick = time.Second

// refusedStands is how long a device whose packets were refused stays a problem after the last of them.
const refusedStands = time.Minute

// backstopCgroup is the control group that the backstop belongs to. Without one there is nothing behind the hooks of
// devices, and the agent does not enforce.
func backstopCgroup(cfg policy.AgentConfig) (string, error) {
	dir, err := cfg.Spec.Cgroup, error(nil)
	if dir == "" {
		dir, err = datapath.FindCgroup()
	} else {
		err = datapath.CheckCgroup(dir)
	}
	if err != nil {
		return "", fmt.Errorf("look for the control group of the backstop, without which nothing is enforced: %w", err)
	}
	return dir, nil
}

// backstop keeps the last line attached and reads what it saw: who came around the hooks, and whether sockets got more
// than the hooks let through.
type backstop struct {
	datapath *datapath.Datapath
	cgroup   string
	unhooked func() []string // devices without hooks, for the alarm's text
	problems *problems
	alarm    func(alarmName, string)
	name     func(serviceID uint32) string

	refused  map[string]uint64 // owned by Run; packets by device
	since    time.Duration     // boot time of the last look of the agent before this one
	detector detector          // owned by Run
}

func (n *node) attachBackstop(context.Context) error {
	if err := n.datapath.DenyPodLoopback(n.cfg.Spec.PodLoopback == policy.PodLoopbackDeny); err != nil {
		return err
	}
	if _, err := n.datapath.AttachBackstop(n.cgroup); err != nil {
		return fmt.Errorf("attach backstop: %w", err)
	}
	left, err := n.datapath.LeaseLeft()
	if err != nil {
		return err
	}
	since := datapath.BootTime() + left - n.cfg.Spec.Lease.Duration // nobody looked since it was renewed
	n.backstop = &backstop{since: since, datapath: n.datapath, cgroup: n.cgroup, unhooked: n.unhookedDevices, problems: n.problems,
		alarm: n.alarms.raise, name: n.serviceName, detector: newDetector()}
	return nil
}

// serviceName names a service of the table in force.
func (n *node) serviceName(id uint32) string {
	for _, s := range n.datapath.Services() {
		if s.ID == id {
			return s.Name
		}
	}
	return fmt.Sprintf("service %d", id)
}

// unhookedDevices lists the devices of the node that have no hooks of ours now.
func (n *node) unhookedDevices() []string {
	hooked := make(map[int]bool)
	for _, d := range n.datapath.Devices() {
		if d.Role != datapath.RolePx1 { // its number is that of another namespace
			hooked[d.Ifindex] = true
		}
	}
	links, err := listLinks()
	if err != nil {
		return nil
	}
	var names []string
	for _, l := range links {
		if !hooked[l.ifindex] {
			names = append(names, l.name)
		}
	}
	return names
}

// Run looks until ctx ends.
func (b *backstop) Run(ctx context.Context) error {
	look := time.NewTicker(backstopTick)
	defer look.Stop()
	sinceAttach := time.Duration(0)
	for {
		b.problems.report(problemBackstop, "counters", errors.Join(b.lookForRefused(), b.lookForUnexplained()))
		if sinceAttach += backstopTick; sinceAttach >= resyncEvery {
			sinceAttach = 0
			b.problems.report(problemBackstop, "", b.keepAttached())
		}
		select {
		case <-ctx.Done():
			return nil
		case <-look.C:
		}
	}
}

// keepAttached makes links anew that somebody took off.
func (b *backstop) keepAttached() error {
	made, err := b.datapath.AttachBackstop(b.cgroup)
	for _, program := range made {
		b.alarm(alarmBackstopLost, program+" was detached, and is attached again")
	}
	if err != nil {
		err = fmt.Errorf("attach backstop: %w", err)
	}
	return err
}

// lookForRefused raises an alarm for the devices whose packets were refused since the last look.
func (b *backstop) lookForRefused() error {
	refusals, err := b.datapath.Refused()
	if err != nil {
		return fmt.Errorf("read refusals: %w", err)
	}
	now, stands := datapath.BootTime(), make(map[string]bool)
	before, fresh := b.refused, []string(nil)
	b.refused = make(map[string]uint64, len(refusals))
	for _, r := range refusals {
		device := r.String()
		b.refused[device] = r.Packets
		if r.Packets > before[device] && r.Last > b.since {
			fresh = append(fresh, fmt.Sprintf("%d by %s", r.Packets-before[device], device))
		}
		if now-r.Last < refusedStands {
			stands[device] = true
			b.problems.report(problemBackstop, device, fmt.Errorf("%d packets to protected services came around the hooks, and were refused", r.Packets))
		}
	}
	if len(fresh) > 0 {
		b.alarm(alarmBackstop, "packets to protected services came around the hooks, and were refused at their sockets: "+strings.Join(fresh, ", "))
	}
	b.problems.keep(problemBackstop, func(subject string) bool {
		return stands[subject] || subject == "" || subject == "counters" || strings.HasPrefix(subject, "service ")
	})
	return nil
}

// lookForUnexplained compares sockets with hooks.
func (b *backstop) lookForUnexplained() error {
	traffic, err := b.datapath.Traffic()
	if err != nil {
		return err
	}
	for _, f := range b.detector.look(datapath.BootTime(), traffic) {
		text := fmt.Sprintf("sockets of %s got %s by %s more than the hooks let through: neither proxied nor granted", b.name(f.service), f.more, f.kind)
		if open := b.unhooked(); len(open) > 0 {
			text += "; devices without hooks: " + strings.Join(open, ", ")
		}
		b.alarm(alarmUnexplained, text)
	}
	return nil
}
