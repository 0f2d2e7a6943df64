package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/px"
	"github.com/sallyport-dev/sallyport/pkg/store"
	"github.com/vishvananda/netlink"
)

// Removed is what Uninstall took away.
type Removed struct {
	Links, Maps int    // detached, unpinned
	Grants      int    // that were active
	State       string // directory that keeps the node's records
	Pending     uint64 // records in it that the collector never acknowledged
}

// errLeft says that something of ours is still there.
var errLeft = errors.New("still there")

// Uninstall ends enforcement: it records that, detaches every hook whoever holds it, removes pins, px and sockets, and makes
// sure that they are gone. The records stay. It can be repeated after an error. The error wraps ErrRunning while the agent
// runs, for it would put everything back. actor is told in the record.
func Uninstall(ctx context.Context, o Options, actor string) (removed Removed, err error) {
	cfg, err := o.config()
	if err != nil {
		return Removed{}, err
	}
	if err := makeDirs(cfg); err != nil {
		return Removed{}, err
	}
	l, err := takeLock(cfg.LockFile())
	if err != nil {
		return Removed{}, err
	}
	defer func() { err = errors.Join(err, l.release()) }()
	s, _, err := openOrRecover(storeFile(cfg), bootClock(), o.logger())
	if err != nil {
		return Removed{}, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	u := uninstall{cfg: cfg, store: s, clock: bootClock(), actor: actor, removed: Removed{State: cfg.Spec.StateDir}}
	if u.cgroup, err = backstopCgroup(cfg); err != nil {
		u.cgroup = "" // then there is no backstop
	}
	err = u.run(ctx)
	return u.removed, err
}

// uninstall is one run of the command. The lock is held.
type uninstall struct {
	cfg     policy.AgentConfig
	store   *store.Store
	clock   clock
	cgroup  string
	actor   string
	removed Removed
}

// run records before it takes effect, and goes on after a removal that failed, so that as little as possible is left.
func (u *uninstall) run(ctx context.Context) error {
	if err := u.record(ctx); err != nil {
		return err
	}
	report, err := datapath.Uninstall(u.cfg.PinDir())
	u.removed.Links, u.removed.Maps = report.Links, report.Maps
	if err != nil {
		err = fmt.Errorf("remove datapath: %w", err)
	}
	unpinned, detachErr := datapath.DetachAll(u.cgroup)
	inPx, pxErr := datapath.DetachPx(u.cfg.PxPath())
	u.removed.Links += unpinned + inPx
	err = errors.Join(err, detachErr, pxErr, px.Remove(px.Config{Path: u.cfg.PxPath()}), u.endGrants(ctx), u.removeFiles(), u.left())
	last, acked, seqErr := u.store.Seqs(ctx)
	u.removed.Pending = last - acked
	return errors.Join(err, seqErr)
}

func (u *uninstall) record(ctx context.Context) error {
	event, err := encodeEvent(newEvent(stepUninstalled, u.actor, "uninstall", u.clock))
	if err == nil {
		err = u.store.KeepUrgent(ctx, nil, event)
	}
	if err != nil {
		return fmt.Errorf("record uninstall: %w", err)
	}
	return nil
}

// endGrants records the end of grants whose paths went with the maps.
func (u *uninstall) endGrants(ctx context.Context) error {
	rows, err := u.store.ActiveGrants(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, row := range rows {
		e := newEvent(stepRevoked, u.actor, "uninstall", u.clock)
		e.Grant, e.Deadline, e.Slots, e.Signers = row.ID, timestamp(row.Deadline), row.Slots, row.Signers
		event, err := encodeEvent(e)
		if err == nil {
			err = u.store.EndGrant(ctx, row.ID, stateEnded, "uninstall", event)
		}
		if err == nil {
			u.removed.Grants++
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (u *uninstall) removeFiles() error {
	var errs []error
	for _, path := range []string{u.cfg.AgentSocket(), u.cfg.ProxySocket(), u.cfg.PolicyFile(), u.cfg.SignalsFile(), u.cfg.LockFile(), u.cfg.GuardFile(), witnessFile(u.cfg), string(panicFile(u.cfg))} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove file: %w", err))
		}
	}
	return errors.Join(append(errs, removeHalfWritten(u.cfg.PolicyFile()), removeHalfWritten(u.cfg.SignalsFile()))...)
}

// left looks for what should be gone.
func (u *uninstall) left() error {
	var errs []error
	for _, path := range []string{u.cfg.PinDir(), u.cfg.PxPath()} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("%s is %w", path, errLeft))
		}
	}
	if _, err := netlink.LinkByName(px.HostDevice); err == nil {
		errs = append(errs, fmt.Errorf("device %s is %w", px.HostDevice, errLeft))
	}
	hooks, err := datapath.Attached(u.cgroup)
	if len(hooks) > 0 {
		errs = append(errs, fmt.Errorf("hooks %s are %w", strings.Join(hooks, ", "), errLeft))
	}
	return errors.Join(append(errs, err)...)
}

// Describe tells it in one line, for people.
func (r Removed) Describe() string {
	return fmt.Sprintf("detached %d links, unpinned %d maps, ended %d grants at %s; records stay in %s (%d not acknowledged by a collector)",
		r.Links, r.Maps, r.Grants, time.Now().UTC().Format(time.RFC3339), r.State, r.Pending)
}
