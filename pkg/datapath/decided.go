package datapath

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/sallyport-dev/sallyport/bpf"
)

// Namespace is the network namespace of a pod.
type Namespace struct {
	// Cookie is the kernel's number of it, which it gives once.
	Cookie uint64
	// ID is how devices of the node name it whose other ends are in it (IFLA_LINK_NETNSID); negative: none of them has named it yet.
	ID int
}

// OpenNamespace reads what a file of a network namespace, such as /proc/PID/ns/net, is about. It is called in the node's.
func OpenNamespace(file string) (Namespace, error) {
	ns, err := netns.GetFromPath(file)
	if err != nil {
		return Namespace{}, fmt.Errorf("open network namespace: %w", err)
	}
	defer ns.Close()
	id, err := netlink.GetNetNsIdByFd(int(ns))
	if err != nil {
		return Namespace{}, fmt.Errorf("find number of network namespace: %w", err)
	}
	var own namespace
	if err := inNetns(fmt.Sprintf("/proc/self/fd/%d", int(ns)), func() (err error) { own, err = ownNetns(); return err }); err != nil {
		return Namespace{}, err
	}
	return Namespace{Cookie: own.cookie, ID: id}, nil
}

// SetDecided says of which network namespaces it is known what is in them, with the name of each pod. In every other one but the node's
// the ports of Selected services are closed. Services first: what a pod has to have protected is in the table when it is decided.
func (d *Datapath) SetDecided(pods map[uint64]string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	keys, values, err := entries[uint64, bpf.Decided](d.objs.SpDecided)
	if err != nil {
		return err
	}
	var errs []error
	have := make(map[uint64]bpf.Decided, len(keys))
	for i, cookie := range keys {
		have[cookie] = values[i]
		if _, ok := pods[cookie]; ok {
			continue
		}
		if err := d.objs.SpDecided.Delete(cookie); err != nil && !isMissing(err) {
			errs = append(errs, fmt.Errorf("forget network namespace %d: %w", cookie, err))
		}
	}
	for cookie, pod := range pods {
		var want bpf.Decided
		writeLabel(want.Pod[:], pod)
		if have[cookie] == want {
			continue
		}
		if err := d.objs.SpDecided.Put(cookie, &want); err != nil {
			errs = append(errs, fmt.Errorf("decide pod %s: %w", pod, err))
		}
	}
	return errors.Join(errs...)
}

// Decided lists the network namespaces of SetDecided, with the names of their pods.
func (d *Datapath) Decided() (map[uint64]string, error) {
	keys, values, err := entries[uint64, bpf.Decided](d.objs.SpDecided)
	if err != nil {
		return nil, err
	}
	pods := make(map[uint64]string, len(keys))
	for i, cookie := range keys {
		pods[cookie] = readLabel(values[i].Pod[:])
	}
	return pods, nil
}
