package datapath

import (
	"fmt"

	"github.com/sallyport-dev/sallyport/bpf"
)

// Ingress is the kind of device that a client is reached by.
type Ingress uint32

// Kinds of devices that a path may be for.
const (
	IngressAny    Ingress = 0
	IngressUplink Ingress = 1
	IngressPod    Ingress = 2
	IngressLocal  Ingress = 3 // the node itself
)

// DeviceFacts is what the programs are told of a device. A pod's device that is bound takes only what the node's routes
// send back to it, in that family; an uplink takes nothing from an address of the node or of a bound pod. A bridge with nothing but
// pods behind it (Pods) is where these ask for services on other nodes.
type DeviceFacts struct{ Uplink, Pod, BoundIPv4, BoundIPv6, Pods bool }

func (f DeviceFacts) bits() (b bpf.SallyportSpFact) {
	for _, one := range []struct {
		set bool
		bit bpf.SallyportSpFact
	}{
		{f.Uplink, bpf.SallyportSpFactSP_DEVICE_UPLINK}, {f.Pod, bpf.SallyportSpFactSP_DEVICE_POD},
		{f.BoundIPv4, bpf.SallyportSpFactSP_DEVICE_BOUND4}, {f.BoundIPv6, bpf.SallyportSpFactSP_DEVICE_BOUND6},
		{f.Pods, bpf.SallyportSpFactSP_DEVICE_PODS},
	} {
		if one.set {
			b |= one.bit
		}
	}
	return b
}

// SetDevices tells the programs what is known of devices, by ifindex. Those left out are held to nothing.
func (d *Datapath) SetDevices(facts map[int]DeviceFacts) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	keys, values, err := entries[uint32, bpf.Device](d.objs.SpDevices)
	if err != nil {
		return err
	}
	have := map[uint32]bpf.Device{}
	for i, k := range keys {
		have[k] = values[i]
	}
	for ifindex, f := range facts {
		key, want := uint32(ifindex), bpf.Device{Facts: f.bits()}
		if old, ok := have[key]; ok && old == want {
			continue
		}
		if err := d.objs.SpDevices.Put(key, &want); err != nil {
			return fmt.Errorf("note device %d: %w", ifindex, err)
		}
	}
	for key := range have {
		if _, ok := facts[int(key)]; ok {
			continue
		}
		if err := d.objs.SpDevices.Delete(key); err != nil && !isMissing(err) {
			return fmt.Errorf("forget device %d: %w", key, err)
		}
	}
	return nil
}

// Bound says to which families of its pod's addresses a device is held, as "IPv4, IPv6"; empty for none.
func (d *Datapath) Bound(ifindex int) string {
	var v bpf.Device
	if err := d.objs.SpDevices.Lookup(uint32(ifindex), &v); err != nil {
		return ""
	}
	four, six := v.Facts&bpf.SallyportSpFactSP_DEVICE_BOUND4 != 0, v.Facts&bpf.SallyportSpFactSP_DEVICE_BOUND6 != 0
	switch {
	case four && six:
		return "IPv4, IPv6"
	case four:
		return "IPv4"
	case six:
		return "IPv6"
	}
	return ""
}
