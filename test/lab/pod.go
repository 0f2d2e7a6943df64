package lab

import (
	"errors"
	"fmt"
	"net/netip"
)

// firstStarted is the first subnet of pods that are started later: those of Options come before it.
const firstStarted = 100

// StartedPods is how many pods of StartPod there can be at a time.
const StartedPods = 100

// StartPod adds a pod to the running lab: its device appears on the node with the first packets of the
// pod behind it, as from a CNI. The number, below StartedPods, decides the device's name and the
// addresses; it may come again after End. A pod that is not ended lives as long as the lab.
//
// If early is not nil, it is called in between: the device eth0 is up, and has no address yet.
func (l *Lab) StartPod(number int, early func(*Namespace)) (*Namespace, error) {
	return l.StartPodAs(number, 0, early)
}

// StartPodAs is StartPod with the number that the node's device shall have, which has to be free; 0 lets the kernel choose.
func (l *Lab) StartPodAs(number, ifindex int, early func(*Namespace)) (*Namespace, error) {
	if number < 0 || number >= StartedPods {
		return nil, fmt.Errorf("start pod: number %d, want 0 to %d", number, StartedPods-1)
	}
	pod, err := l.newNamespace(fmt.Sprintf("started%d", number))
	if err != nil {
		return nil, err
	}
	k := link{subnet: byte(firstStarted + number), mtu: 1500, ifindex: ifindex, node: side{l.Node, StartedDevice(number), 1, false}, leaf: side{pod, "eth0", 2, false}}
	k.leaf.note(k.subnet) // and not the node's: its own addresses are those that it has from the start
	if early != nil {
		k.whenUp = func() { early(pod) }
	}
	if err := k.connect(); err != nil {
		return nil, errors.Join(fmt.Errorf("connect %s: %w", pod.Name, err), pod.End())
	}
	return pod, nil
}

// StartedDevice is the name of the node's device towards a started pod.
func StartedDevice(number int) string { return fmt.Sprintf("vethpods%d", number) }

// StartedAddr is the address of a started pod, known before it is there.
func StartedAddr(number int, f Family) netip.Addr { return address(f, byte(firstStarted+number), 2) }

// End removes a started pod, with its device on the node. Sockets in it have to be closed, processes
// ended. Calls after the first do nothing.
func (n *Namespace) End() error {
	if dev, err := n.Netlink.LinkByName("eth0"); err == nil { // not the second time
		if err := n.Netlink.LinkDel(dev); err != nil {
			return fmt.Errorf("remove device of %s: %w", n.Name, err)
		}
	}
	return n.end()
}
