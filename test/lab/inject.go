package lab

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Injector sends raw Ethernet frames out of a device, as a workload with CAP_NET_RAW can. Its methods
// may be called from several goroutines.
type Injector struct {
	name string
	fd   int
	to   unix.SockaddrLinklayer
}

// Injector opens one for a device of the namespace. The caller closes it.
func (n *Namespace) Injector(device string) (*Injector, error) {
	index, err := n.Ifindex(device)
	if err != nil {
		return nil, err
	}
	i := &Injector{name: device + " of " + n.Name, to: unix.SockaddrLinklayer{Ifindex: index}}
	err = n.Do(func() (err error) {
		i.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open packet socket: %w", err)
	}
	return i, nil
}

// Send puts one frame on the wire.
func (i *Injector) Send(frame []byte) error {
	to := i.to
	if err := unix.Sendto(i.fd, frame, 0, &to); err != nil {
		return fmt.Errorf("inject on %s: %w", i.name, err)
	}
	return nil
}

// Close ends it. No Send may be under way.
func (i *Injector) Close() error { return unix.Close(i.fd) }

// Inject sends one frame out of a device of the namespace.
func (n *Namespace) Inject(device string, frame []byte) error {
	i, err := n.Injector(device)
	if err != nil {
		return err
	}
	return errors.Join(i.Send(frame), i.Close())
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
