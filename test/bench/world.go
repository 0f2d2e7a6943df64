package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/px"
	"github.com/sallyport-dev/sallyport/test/lab"
)

const (
	servicePort = 8081
	listenPort  = 15001 // of the copy proxy
	serviceID   = 1
	leaseTime   = time.Hour // the benchmark is no agent that could die
)

// world is a lab: a client, a node and a service in a pod.
type world struct {
	*lab.Lab
	name string
	self string // this program
}

func newWorld(name string, pods int) (*world, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find own program: %w", err)
	}
	l, err := lab.Build(lab.Options{Pods: pods})
	if err != nil {
		return nil, err
	}
	w := &world{Lab: l, name: name, self: self}
	if err := w.widenPorts(); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return w, nil
}

// widenPorts lets one client open connections for as long as a cell lasts.
func (w *world) widenPorts() error {
	for _, n := range []*lab.Namespace{w.Client, w.Node} {
		for key, value := range map[string]string{"ipv4/ip_local_port_range": "10240 65535", "ipv4/tcp_tw_reuse": "1"} {
			if err := n.Sysctl(key, value); err != nil {
				return err
			}
		}
	}
	return nil
}

// target is the service's address, as clients know it.
func (w *world) target(f lab.Family) netip.AddrPort {
	return netip.AddrPortFrom(w.Pod.Addr(f), servicePort)
}

// start runs this program in a role and waits until it says that it is ready.
func (w *world) start(ctx context.Context, ns *lab.Namespace, args ...string) error {
	return w.startBy(ctx, ns, exec.Command(w.self, args...))
}

// startBy is start with the command that brings the role about.
func (w *world) startBy(ctx context.Context, ns *lab.Namespace, cmd *exec.Cmd) error {
	out, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("open output: %w", err)
	}
	p, err := ns.Start(cmd)
	if err != nil {
		return err
	}
	line := make(chan error, 1)
	go func() {
		_, err := out.Read(make([]byte, 1))
		line <- err
	}()
	select {
	case err := <-line:
		if err != nil {
			return fmt.Errorf("start %v: %w: %s", cmd.Args, err, p.Output())
		}
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// node is a world with Sallyport's datapath on its node, hooked to every device, with the backstop at the sockets
// of this lab alone. The filter of the uplink is off: on a veth, native XDP costs far more than it does on a card.
type node struct {
	*world
	d  *datapath.Datapath
	px *px.Namespace
	cf datapath.Config

	stop   context.CancelFunc
	keeper sync.WaitGroup
}

// newNode leaves nothing behind when it fails.
func newNode(ctx context.Context, name string, pods int, cf datapath.Config) (n *node, err error) {
	w, err := newWorld(name, pods)
	if err != nil {
		return nil, err
	}
	n = &node{world: w, cf: cf, stop: func() {}}
	if err := n.open(); err != nil {
		return nil, errors.Join(err, n.close())
	}
	ctx, n.stop = context.WithCancel(ctx)
	n.keeper.Go(func() { n.readEvents(ctx) })
	return n, nil
}

func (n *node) open() error {
	bpffs, err := n.MountBPFFS()
	if err != nil {
		return err
	}
	where := px.Config{Path: filepath.Join(n.Dir, "px")}
	n.cf.Dir, n.cf.PxNetns, n.cf.ListenPort, n.cf.MaxTTL = filepath.Join(bpffs, "sallyport"), where.Path, listenPort, time.Hour
	n.cf.Logger = slog.New(slog.DiscardHandler)
	return n.Node.Do(func() (err error) {
		if n.px, err = px.Create(where); err != nil {
			return err
		}
		n.cf.Px0 = n.px.Px0()
		if n.d, err = datapath.Open(n.cf); err != nil {
			return err
		}
		if err := n.d.AttachPx(); err != nil {
			return err
		}
		if err := n.attach(); err != nil {
			return err
		}
		if _, err := n.d.AttachBackstop(n.Cgroup()); err != nil {
			return err
		}
		return n.d.Renew(leaseTime)
	})
}

func (n *node) attach() error {
	devices, err := net.Interfaces()
	if err != nil {
		return fmt.Errorf("list devices: %w", err)
	}
	for _, dev := range devices {
		var role datapath.Role
		switch {
		case dev.Name == lab.Uplink:
			role = datapath.RoleUplink
		case dev.Name == "lo":
			role = datapath.RoleLo
		case strings.HasPrefix(dev.Name, lab.PodDevice(0)):
			role = datapath.RolePod
		default:
			continue // px0, and what the kernel puts into every namespace
		}
		if err := n.d.Attach(dev.Index, role); err != nil {
			return err
		}
	}
	return nil
}

// close ends the datapath, and then the lab.
func (n *node) close() error {
	n.stop()
	n.keeper.Wait()
	var errs []error
	if n.d != nil {
		errs = append(errs, n.d.Close())
		_, err := datapath.Uninstall(n.cf.Dir)
		errs = append(errs, err)
	}
	if n.px != nil {
		errs = append(errs, n.px.Close(), n.Node.Do(func() error { return px.Remove(px.Config{Path: n.cf.PxNetns}) }))
	}
	return errors.Join(append(errs, n.Close())...)
}

// readEvents empties the rings, as an agent does.
func (n *node) readEvents(ctx context.Context) {
	if err := n.d.ReadEvents(ctx, func(flow.Record) {}); err != nil {
		fmt.Fprintln(os.Stderr, "bench: read events:", err)
	}
}

// sweep is done in the node's namespace: it looks behind its devices.
func (n *node) sweep() error {
	return n.Node.Do(func() error {
		_, err := n.d.Sweep()
		return err
	})
}

// keep sweeps every second, as an agent does, until the node is closed.
func (n *node) keep(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	stop := n.stop
	n.stop = func() { cancel(); stop() }
	n.keeper.Go(func() {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				if err := n.sweep(); err != nil {
					fmt.Fprintln(os.Stderr, "bench: sweep:", err)
				}
			}
		}
	})
}

// protect makes the service in the pod the one protected service.
func (n *node) protect() error { return n.protectAmong(1) }

// protectAmong puts it in the middle of so many; the others are addresses behind the same device.
func (n *node) protectAmong(services int) error {
	dev, err := n.Node.Ifindex(lab.PodDevice(0))
	if err != nil {
		return err
	}
	var all []datapath.Service
	for i, a := range among(n.Pod.Addr(lab.IPv4), services) {
		s := datapath.Service{ID: uint32(serviceID + 1 + i), Name: fmt.Sprintf("service-%d", i), Target: datapath.TargetPod,
			Ports: []uint16{servicePort}, Ifindex: dev, Addresses: []netip.Addr{a}}
		if a == n.Pod.Addr(lab.IPv4) {
			s.ID, s.Name, s.Addresses = serviceID, "measured", append(s.Addresses, n.Pod.Addr(lab.IPv6))
		}
		all = append(all, s)
	}
	_, err = n.d.SetServices(all)
	return err
}

// openPath gives a client a path to the service, for as long as paths may live.
func (n *node) openPath(client netip.Addr, left time.Duration) (uint32, error) {
	return n.d.OpenPath(datapath.Path{Grant: "01BENCH", Client: client, ServiceID: serviceID, Service: "measured",
		Ports: []uint16{servicePort}, Deadline: datapath.BootTime() + left})
}

// startProxy runs the copy proxy in px.
func (n *node) startProxy(ctx context.Context) error {
	return n.startBy(ctx, n.Node, exec.Command("nsenter", "--net="+n.cf.PxNetns, n.self, "proxy", fmt.Sprint(listenPort)))
}

// among gives n addresses, the given one in the middle: where a list is searched in order, that is its mean.
func among(a netip.Addr, n int) []netip.Addr {
	all := make([]netip.Addr, n)
	for i := range all {
		all[i] = netip.AddrFrom4([4]byte{10, 210, byte(i >> 8), byte(i)})
	}
	all[n/2] = a
	return all
}
