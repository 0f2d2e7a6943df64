// Package datapath loads, attaches and pins the programs, and keeps their tables: the only package
// that knows kernel bytes.
package datapath

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// schema is the layout of maps and pins that this package can read; SP_SCHEMA in C.
const schema = 4

// Layout is the number of that layout, which the folder of the pins is named by: v4 for 4.
func Layout() int { return schema }

// ErrLayout says that what is pinned has a layout that this version cannot read.
var ErrLayout = errors.New("unknown map layout")

// Config says where the datapath lives.
type Config struct {
	// Dir is the pin directory below a bpffs mount. All pins are in Dir/v1.
	Dir string
	// PxNetns is the file of the px namespace, Px0 the ifindex of px0 in the host namespace.
	PxNetns string
	Px0     int
	// ListenPort is the port of the proxy's transparent listeners in px.
	ListenPort uint16
	// Profile is how programs are held on devices; empty is ProfileAuto.
	Profile Profile
	// MaxFlows, MaxLegs and MaxPaths size the tables of a new datapath; 0 is the default. An
	// adopted one keeps its sizes.
	MaxFlows, MaxLegs, MaxPaths uint32
	// RingBytes sizes each event ring: a power of two and a multiple of the page size; 0 is the default.
	RingBytes uint32
	// MaxTTL is the furthest deadline that a path may have; the kernel refuses beyond it.
	MaxTTL time.Duration
	// Repaired is told of each hook that was not where it belongs and is there again. It must not call
	// the datapath.
	Repaired func(Repair)
	Logger   *slog.Logger

	oneBuffer bool                       // as on kernels before 5.18; for tests
	change    func(*ebpf.CollectionSpec) // makes another version of the programs; for tests
}

// Datapath is the loaded and pinned datapath of one node. Its methods may be called from several
// goroutines.
type Datapath struct {
	cfg      Config
	profile  Profile // settled
	objs     objects
	table    *ebpf.MapSpec // of the inner services map
	adopted  bool
	frags    bool // XDP may have frames in several buffers
	cuts     cuts // owned by Sweep
	tallies  tallies
	received received

	mu       sync.Mutex // guards what follows
	devices  map[string]attachment
	xdp      map[int]xdpState     // by ifindex
	backstop map[string]link.Link // by the name of the program, which is that of the pin
	cgroup   string               // that the backstop is attached to; empty: not yet
	services []Service
	rows     int
	gen      uint32
	free     []uint32 // free path slots, last used first
	live     map[uint32]Path
	ended    []flow.Record // of flows that SetServices ended, until Sweep gives them

	// opening is held by who opens a path, which writes maps and does nothing else, and is taken after mu. Shut takes it
	// alone: mu may be held by somebody who waits for a device.
	opening sync.Mutex
	shut    bool // guarded by opening; OpenPath refuses
}

// objects are the programs and maps, without the variables that only keep types in the BTF.
type objects struct {
	bpf.SallyportPrograms
	bpf.SallyportMaps
}

func (o *objects) Close() error {
	return errors.Join(o.SallyportPrograms.Close(), o.SallyportMaps.Close())
}

// Open loads the programs, or adopts what is pinned under cfg.Dir: maps keep their contents, links
// stay where they are. It attaches nothing new. It returns ErrBPFFS or ErrLayout for what it cannot
// work with, and then has changed nothing.
func Open(cfg Config) (*Datapath, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if err := CheckBPFFS(cfg.Dir); err != nil {
		return nil, err
	}
	if err := checkVersions(cfg.Dir); err != nil {
		return nil, err
	}
	profile, err := cfg.Profile.choose()
	if err != nil {
		return nil, err
	}
	if err := checkKernel(profile.requirements()); err != nil {
		return nil, err
	}
	spec, err := bpf.LoadSallyport()
	if err != nil {
		return nil, fmt.Errorf("read programs: %w", err)
	}
	profile.prepare(spec)
	if cfg.change != nil {
		cfg.change(spec)
	}
	d := &Datapath{cfg: cfg, profile: profile, table: spec.Maps["sp_table"].Copy(), devices: map[string]attachment{},
		xdp: map[int]xdpState{}, backstop: map[string]link.Link{}, live: map[uint32]Path{}}
	if d.frags, err = adaptXDP(spec, cfg.oneBuffer); err != nil {
		return nil, err
	}
	if d.adopted, err = prepareMaps(spec, cfg); err != nil {
		return nil, err
	}
	if err := makePinDirs(cfg.Dir); err != nil {
		return nil, err
	}
	opts := &ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: mapsDir(cfg.Dir)}}
	if err := spec.LoadAndAssign(&d.objs, opts); err != nil {
		if errors.Is(err, ebpf.ErrMapIncompatible) {
			return nil, fmt.Errorf("%w: %s: uninstall with the version that made it", ErrLayout, err)
		}
		return nil, fmt.Errorf("load programs: %w", err)
	}
	for _, step := range []func() error{d.openTallies, d.openReceived, d.restore, d.keepPrograms} {
		if err := step(); err != nil {
			d.Close()
			return nil, err
		}
	}
	return d, nil
}

// Profile is how programs are held on devices: never ProfileAuto.
func (d *Datapath) Profile() Profile { return d.profile }

// Adopted says whether Open found a datapath and went on with it.
func (d *Datapath) Adopted() bool { return d.adopted }

// Close frees the handles of this process. Pinned programs go on enforcing.
func (d *Datapath) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	for _, a := range d.devices {
		errs = append(errs, a.hold.close())
	}
	errs = append(errs, d.closeXDP())
	for _, l := range d.backstop {
		errs = append(errs, l.Close())
	}
	d.devices, d.backstop = map[string]attachment{}, map[string]link.Link{}
	return errors.Join(append(errs, d.tallies.m.Close(), d.received.close(), d.objs.Close())...)
}

func version(dir string) string  { return filepath.Join(dir, fmt.Sprintf("v%d", schema)) }
func mapsDir(dir string) string  { return filepath.Join(version(dir), "maps") }
func linksDir(dir string) string { return filepath.Join(version(dir), "links") }

// qdiscsDir has an empty directory for each device whose qdisc clsact we made, by its ifindex.
func qdiscsDir(dir string) string { return filepath.Join(version(dir), "qdiscs") }

// checkVersions refuses a directory that holds the pins of another layout: two datapaths on one
// node would fight for its devices.
func checkVersions(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read pin directory: %w", err)
	}
	for _, e := range entries {
		if name := e.Name(); name != filepath.Base(version(dir)) && strings.HasPrefix(name, "v") {
			return fmt.Errorf("%w: %s: uninstall with the version that made it", ErrLayout, filepath.Join(dir, name))
		}
	}
	return nil
}

// prepareMaps pins every map by its name, gives it the configured size or the size of the pinned one,
// and leaves the services empty: what is pinned there must not be overwritten by a template.
func prepareMaps(spec *ebpf.CollectionSpec, cfg Config) (adopted bool, err error) {
	sizes := map[string]uint32{
		"sp_must_deliver": cfg.RingBytes, "sp_best_effort": cfg.RingBytes,
		"sp_flows": cfg.MaxFlows, "sp_legs": cfg.MaxLegs, "sp_paths": cfg.MaxPaths, "sp_path_state": cfg.MaxPaths, "sp_budget": cfg.MaxPaths,
	}
	for name, m := range spec.Maps {
		if !strings.HasPrefix(name, "sp_") {
			delete(spec.Maps, name) // the section that keeps types in the BTF
			continue
		}
		m.Contents = nil
		if unpinned(name) {
			continue
		}
		m.Pinning = ebpf.PinByName
		if sizes[name] != 0 {
			m.MaxEntries = sizes[name]
		}
		pinned, err := ebpf.LoadPinnedMap(filepath.Join(mapsDir(cfg.Dir), name), nil)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return false, fmt.Errorf("open pinned map %s: %w", name, err)
		}
		m.MaxEntries = pinned.MaxEntries()
		err = checkLayout(name, pinned, m)
		if name == "sp_services" && err == nil {
			err = checkTable(pinned, spec.Maps["sp_table"])
		}
		pinned.Close()
		if err != nil {
			return false, err
		}
		adopted = true
	}
	return adopted, nil
}

// restore fills an empty configuration and reads what an adopted datapath holds.
func (d *Datapath) restore() error {
	var c bpf.Config
	if err := d.objs.SpConfig.Lookup(uint32(0), &c); err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	if c.Schema != 0 && c.Schema != schema {
		return fmt.Errorf("%w: pinned schema %d, this version reads %d: uninstall with the version that made it", ErrLayout, c.Schema, schema)
	}
	if err := d.writeConfig(c); err != nil {
		return err
	}
	if err := d.restoreServices(); err != nil {
		return err
	}
	return d.restorePaths()
}

// writeConfig keeps the secrets of an adopted configuration: packets marked a moment ago are still
// under way.
func (d *Datapath) writeConfig(c bpf.Config) error {
	if c.Schema == 0 {
		var r [22]byte
		if _, err := rand.Read(r[:]); err != nil {
			return fmt.Errorf("make secrets: %w", err)
		}
		c.Secret = [2]uint64{binary.NativeEndian.Uint64(r[0:]), binary.NativeEndian.Uint64(r[8:])}
		copy(c.Stamp[:], r[16:])
		c.Stamp[0] = c.Stamp[0]&0xfc | 0x02 // a local unicast address
		c.Schema = schema
	}
	c.Px0Ifindex = uint32(d.cfg.Px0)
	c.ListenPort = uint32(d.cfg.ListenPort)
	c.MaxTtlNs = uint64(d.cfg.MaxTTL)
	host, err := ownNetns()
	if err != nil {
		return err
	}
	c.HostNetns, c.HostNetnsInode = host.cookie, host.inode
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return fmt.Errorf("count CPUs: %w", err)
	}
	c.Cpus = uint32(cpus)
	if err := d.objs.SpConfig.Put(uint32(0), &c); err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	return nil
}

// BootTime reads CLOCK_BOOTTIME: the clock of every deadline. It counts suspend and no clock step.
func BootTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("clock_gettime(CLOCK_BOOTTIME): " + err.Error()) // cannot fail on Linux >= 2.6.39
	}
	return time.Duration(ts.Nano())
}

// Renew moves the dead-man lease to the given time from now. Without it nothing new is admitted.
func (d *Datapath) Renew(lease time.Duration) error {
	l := bpf.Lease{UntilNs: uint64(BootTime() + lease)}
	if err := d.objs.SpLease.Put(uint32(0), &l); err != nil {
		return fmt.Errorf("renew lease: %w", err)
	}
	return nil
}

// LeaseLeft says how long the lease still holds; negative when it has lapsed.
func (d *Datapath) LeaseLeft() (time.Duration, error) {
	var l bpf.Lease
	if err := d.objs.SpLease.Lookup(uint32(0), &l); err != nil {
		return 0, fmt.Errorf("read lease: %w", err)
	}
	return time.Duration(l.UntilNs) - BootTime(), nil
}

// closeLink is for error paths, where the first error is the one to tell.
func closeLink(l link.Link) {
	_ = l.Close()
}
