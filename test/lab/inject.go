package lab

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Inject sends a raw Ethernet frame out of a device of the namespace, as a workload with
// CAP_NET_RAW can.
func (n *Namespace) Inject(device string, frame []byte) error {
	index, err := n.Ifindex(device)
	if err != nil {
		return err
	}
	return n.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open packet socket: %w", err)
		}
		err = unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: index})
		if err = errors.Join(err, unix.Close(fd)); err != nil {
			return fmt.Errorf("inject on %s of %s: %w", device, n.Name, err)
		}
		return nil
	})
}

// MAC is the hardware address of a device of the namespace.
func (n *Namespace) MAC(device string) ([6]byte, error) {
	dev, err := n.Netlink.LinkByName(device)
	if err != nil {
		return [6]byte{}, fmt.Errorf("find %s in %s: %w", device, n.Name, err)
	}
	hw := dev.Attrs().HardwareAddr
	if len(hw) != 6 {
		return [6]byte{}, fmt.Errorf("%s of %s has hardware address %q, want 6 bytes", device, n.Name, hw)
	}
	return [6]byte(hw), nil
}
