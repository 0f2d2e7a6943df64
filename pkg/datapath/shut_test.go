package datapath_test

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
)

// TestShutWaitsForNobody: every path ends while somebody waits for a device with the datapath's lock held, and what opens
// behind that lock afterwards is refused.
func TestShutWaitsForNobody(t *testing.T) {
	r := newRig(t, 64, 64)
	path := datapath.Path{Grant: "01TEST", Client: netip.MustParseAddr("10.9.0.1"), ServiceID: hostID, Service: "host-echo",
		Ports: []uint16{hostPort}, Deadline: datapath.BootTime() + 10*time.Minute}
	_, err := r.d.OpenPath(path)
	check(t, err)
	release := r.d.Occupy()
	opened := make(chan error, 1)
	go func() {
		other := path
		other.Client = netip.MustParseAddr("10.9.0.2")
		_, err := r.d.OpenPath(other)
		opened <- err
	}()
	shut := make(chan error, 1)
	go func() {
		ended, err := r.d.Shut()
		if ended != 1 {
			err = errors.Join(err, errors.New("not one path ended"))
		}
		shut <- err
	}()
	select {
	case err := <-shut:
		check(t, err)
	case <-time.After(10 * time.Second):
		t.Error("it waits for the lock")
	}
	release()
	if err := <-opened; !errors.Is(err, datapath.ErrShut) {
		t.Errorf("opened after it: %v", err)
	}
	r.d.Reopen()
	_, err = r.d.OpenPath(path)
	check(t, err)
}
