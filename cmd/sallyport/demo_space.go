package main

import (
	"fmt"
	"net"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// space is a network namespace with a thread in it, which is in the demo's control group. It is gone when the thread, and what was started
// from it, are gone: it has no name.
type space struct {
	handle netns.NsHandle
	calls  chan func()
}

func newSpace(cgroup string) (*space, error) {
	s := &space{calls: make(chan func())}
	made := make(chan error, 1)
	go s.loop(cgroup, made)
	return s, <-made
}

// loop keeps its thread for itself; the runtime ends the thread with the goroutine, unless it is the main one.
func (s *space) loop(cgroup string, made chan<- error) {
	runtime.LockOSThread()
	err := joinCgroup(cgroup)
	if err != nil {
		made <- err
		return
	}
	defer leaveCgroup(cgroup)
	if s.handle, err = netns.New(); err != nil {
		made <- fmt.Errorf("make network namespace: %w", err)
		return
	}
	made <- nil
	for f := range s.calls {
		f()
	}
}

// do runs f on the thread of the namespace. Processes that f starts die with the thread.
func (s *space) do(f func() error) error {
	done := make(chan error, 1)
	s.calls <- func() { done <- f() }
	return <-done
}

func (s *space) close() error {
	close(s.calls)
	return s.handle.Close()
}

// loopback turns lo on.
func (s *space) loopback() error {
	return s.do(func() error { return configure("lo") })
}

// configure gives a device its addresses and turns it on. The current namespace is the device's.
func configure(device string, addresses ...string) error {
	link, err := netlink.LinkByName(device)
	if err != nil {
		return fmt.Errorf("find %s: %w", device, err)
	}
	for _, a := range addresses {
		ip, network, err := net.ParseCIDR(a)
		if err != nil {
			return err
		}
		network.IP = ip
		if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: network}); err != nil {
			return fmt.Errorf("give %s to %s: %w", a, device, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("turn %s on: %w", device, err)
	}
	return nil
}

// connect makes the one link of the demo: up0 on the node, eth0 at the client. The node checks sources
// strictly, as a careful node does.
func connect(node, client *space) error {
	err := node.do(func() error {
		for _, dev := range []string{"all", "default", "lo"} {
			if err := os.WriteFile("/proc/sys/net/ipv4/conf/"+dev+"/rp_filter", []byte("1"), 0); err != nil {
				return err
			}
		}
		veth := &netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "up0"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(client.handle)),
		}
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("add veth: %w", err)
		}
		return configure("up0", demoNode+"/24")
	})
	if err != nil {
		return err
	}
	return client.do(func() error { return configure("eth0", demoClient+"/24") })
}
