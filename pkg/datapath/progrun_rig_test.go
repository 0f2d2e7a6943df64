package datapath_test

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/px"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// Services of the rig beside those of every node: UDP ones, and TCP ones whose ports are refused to UDP.
const (
	hostUDPPort = 8090
	podUDPPort  = 8091
	hostWebPort = 8443
	podWebPort  = 8444
	hostUDPID   = 3
	podUDPID    = 4
	hostWebID   = 5
	podWebID    = 6
	udpIdle     = 30 // seconds
)

// Verdicts of the programs (linux/pkt_cls.h).
const (
	actNext     int32 = -1
	actDrop     int32 = 2
	actRedirect int32 = 7
)

// rig is a node whose programs are run by hand: loaded, with px, and hooked nowhere.
type rig struct {
	*lab.Lab
	d   *datapath.Datapath
	m   *bpf.SallyportMaps
	px  *px.Namespace
	px1 int
	// pxNetns is the cookie of px.
	pxNetns uint64
	cfg     bpf.Config
	where   datapath.Config
	rings   []*ringbuf.Reader // must-deliver, best-effort
}

// newRig makes a rig whose hash tables have the given sizes; 0 is the default.
func newRig(t testing.TB, flows, legs uint32) *rig {
	t.Helper()
	return newRigOf(t, smallConfig(flows, legs))
}

func smallConfig(flows, legs uint32) datapath.Config {
	return datapath.Config{MaxFlows: flows, MaxLegs: legs, MaxPaths: 64, RingBytes: 1 << 16}
}

// newRigOf fills in where the datapath lives.
func newRigOf(t testing.TB, cfg datapath.Config) *rig {
	t.Helper()
	r := &rig{Lab: lab.New(t, lab.Options{Pods: 2, UplinkMTU: 9000})}
	bpffs, err := r.MountBPFFS()
	check(t, err)
	where := px.Config{Path: filepath.Join(r.Dir, "px")}
	check(t, r.Node.Do(func() (err error) { r.px, err = px.Create(where); return err }))
	t.Cleanup(func() {
		check(t, r.px.Close())
		check(t, r.Node.Do(func() error { return px.Remove(where) }))
	})
	cfg.Dir, cfg.PxNetns, cfg.Px0 = filepath.Join(bpffs, "sallyport"), where.Path, r.px.Px0()
	cfg.ListenPort, cfg.MaxTTL = listenPort, time.Hour
	check(t, r.Node.Do(func() (err error) { r.d, err = datapath.Open(cfg); return err }))
	t.Cleanup(func() {
		check(t, r.d.Close())
		_, err := datapath.Uninstall(cfg.Dir)
		check(t, err)
	})
	r.m, r.where = r.d.Maps(), cfg
	check(t, r.px.Do(func() error {
		dev, err := net.InterfaceByName("px1")
		if err == nil {
			r.px1 = dev.Index
		}
		px, nsErr := datapath.OwnNetns()
		r.pxNetns = px
		return errors.Join(err, nsErr)
	}))
	check(t, r.m.SpConfig.Lookup(uint32(0), &r.cfg))
	r.cfg.Px1Ifindex, r.cfg.PxNetns = uint32(r.px1), r.pxNetns
	r.openRings(t)
	r.protect(t)
	return r
}

func (r *rig) openRings(t testing.TB) {
	for _, m := range []*ebpf.Map{r.m.SpMustDeliver, r.m.SpBestEffort} {
		reader, err := ringbuf.NewReader(m)
		check(t, err)
		t.Cleanup(func() { check(t, reader.Close()) })
		r.rings = append(r.rings, reader)
	}
}

func (r *rig) protect(t testing.TB) {
	pod, err := r.Node.Ifindex(lab.PodDevice(0))
	check(t, err)
	addresses := []netip.Addr{r.Pod.Addr(lab.IPv4), r.Pod.Addr(lab.IPv6)}
	_, err = r.d.SetServices([]datapath.Service{
		{ID: hostID, Name: "host-echo", Target: datapath.TargetHost, Ports: []uint16{hostPort}},
		{ID: podID, Name: "pod-echo", Target: datapath.TargetPod, Ports: []uint16{podPort}, Ifindex: pod, Addresses: addresses},
		{ID: hostUDPID, Name: "host-udp", Target: datapath.TargetHost, Protocol: datapath.UDP, Ports: []uint16{hostUDPPort}, Idle: udpIdle * time.Second},
		{ID: podUDPID, Name: "pod-udp", Target: datapath.TargetPod, Protocol: datapath.UDP, Ports: []uint16{podUDPPort}, Ifindex: pod,
			Addresses: addresses, Idle: udpIdle * time.Second},
		{ID: hostWebID, Name: "host-web", Target: datapath.TargetHost, Ports: []uint16{hostWebPort, hostUDPPort}, DenyUDP: true},
		{ID: podWebID, Name: "pod-web", Target: datapath.TargetPod, Ports: []uint16{podWebPort}, Ifindex: pod, Addresses: addresses, DenyUDP: true},
	})
	check(t, err)
}

// reset takes everything away that a case can have left, but for the records.
func (r *rig) reset(t testing.TB) {
	t.Helper()
	check(t, r.m.SpConfig.Put(uint32(0), &r.cfg))
	check(t, r.d.Renew(time.Minute))
	empty[bpf.FlowKey, bpf.Flow](t, r.m.SpFlows)
	empty[bpf.LegKey, bpf.Leg](t, r.m.SpLegs)
	empty[bpf.LegKey, bpf.Leg](t, r.m.SpStrays)
	empty[bpf.OriginKey, bpf.Origin](t, r.m.SpOrigins)
	empty[uint32, bpf.Device](t, r.m.SpDevices)
	empty[bpf.DenyKey, bpf.Deny](t, r.m.SpDenies)
	empty[bpf.DenyKey, bpf.Deny](t, r.m.SpSightings)
	empty[bpf.BackstopKey, bpf.Backstop](t, r.m.SpBackstop)
	empty[bpf.FragmentKey, bpf.Fragment](t, r.m.SpFragments)
	empty[bpf.PathKey, bpf.PathRef](t, r.m.SpPathIndex)
	check(t, r.m.SpPathState.Put(uint32(0), &bpf.PathStatus{}))
	check(t, r.m.SpPaths.Put(uint32(0), &bpf.Path{}))
	cpus := ebpf.MustPossibleCPU()
	check(t, r.m.SpBudget.Put(uint32(0), make([]bpf.Budget, cpus)))
	for reason := range r.counters(t) {
		check(t, r.m.SpCounters.Put(uint32(reason), make([]bpf.Counter, cpus)))
	}
	seen, err := r.d.Watched()
	check(t, err)
	for id := range seen {
		check(t, r.m.SpWatched.Put(id, make([]bpf.Watched, cpus)))
	}
	check(t, r.m.SpSequence.Put(uint32(0), make([]bpf.Sequence, cpus)))
	check(t, r.m.SpTokens.Put(uint32(0), make([]bpf.Tokens, cpus)))
}

func empty[K comparable, V any](t testing.TB, m *ebpf.Map) {
	t.Helper()
	for k := range all[K, V](t, m) {
		check(t, m.Delete(&k))
	}
}

// all reads a hash map.
func all[K comparable, V any](t testing.TB, m *ebpf.Map) map[K]V {
	t.Helper()
	out := map[K]V{}
	var k K
	var v V
	it := m.Iterate()
	for it.Next(&k, &v) {
		out[k] = v
	}
	check(t, it.Err())
	return out
}

// counters reads every counter that is not zero, also those that no reason names.
func (r *rig) counters(t testing.TB) map[flow.Reason]datapath.Counter {
	t.Helper()
	out := map[flow.Reason]datapath.Counter{}
	for i := range r.m.SpCounters.MaxEntries() {
		var perCPU []bpf.Counter
		check(t, r.m.SpCounters.Lookup(i, &perCPU))
		var sum datapath.Counter
		for _, c := range perCPU {
			sum.Packets += c.Packets
			sum.Bytes += c.Bytes
		}
		if sum != (datapath.Counter{}) {
			out[flow.Reason(i)] = sum
		}
	}
	return out
}

// drain takes every record out of both rings, in order of their sequence numbers.
func (r *rig) drain(t testing.TB) []*bpf.Event {
	t.Helper()
	var events []*bpf.Event
	for _, ring := range r.rings {
		ring.SetDeadline(time.Now()) // what is there and no more
		for {
			record, err := ring.Read()
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			check(t, err)
			e, err := datapath.DecodeEvent(record.RawSample)
			check(t, err)
			events = append(events, e)
		}
	}
	slices.SortStableFunc(events, func(a, b *bpf.Event) int { return int(int64(a.Seq) - int64(b.Seq)) })
	return events
}

// device names the devices of the node by their index.
func (r *rig) device(t testing.TB, name string) int {
	t.Helper()
	if name == "px1" {
		return r.px1
	}
	i, err := r.Node.Ifindex(name)
	check(t, err)
	return i
}

func (r *rig) program(name string) *ebpf.Program {
	p := r.d.Programs()
	return map[string]*ebpf.Program{
		"sp_dev_in": p.SpDevIn, "sp_dev_out": p.SpDevOut, "sp_pod_out": p.SpPodOut,
		"sp_l3_in": p.SpL3In, "sp_l3_out": p.SpL3Out, "sp_lo_in": p.SpLoIn, "sp_px0_in": p.SpPx0In,
		"sp_px1_in": p.SpPx1In, "sp_px_lo_in": p.SpPxLoIn, "sp_px_lo_out": p.SpPxLoOut,
		"sp_cg_in": p.SpCgIn, "sp_bridge_in": p.SpBridgeIn, "sp_port_out": p.SpPortOut, "sp_pod_port_out": p.SpPodPortOut,
		"sp_bridge_out": p.SpBridgeOut, "sp_port_in": p.SpPortIn,
	}[name]
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// addAddress gives lo one more address.
func addAddress(t testing.TB, n *lab.Namespace, a netip.Addr) {
	t.Helper()
	lo, err := n.Netlink.LinkByName("lo")
	check(t, err)
	ip := &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
	check(t, n.Netlink.AddrAdd(lo, &netlink.Addr{IPNet: ip, Flags: unix.IFA_F_NODAD}))
}
