package datapath_test

import (
	"context"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// TestPodOfUnknownDevice: a pod that is up before the table knows its device, or behind another device
// than the table says, is closed, also to those who have a path to the instance before. There is no
// proxy: nobody else could answer.
func TestPodOfUnknownDevice(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	other, err := n.Node.Ifindex(lab.PodDevice(1))
	must(t, err)
	known := n.d.Services()
	for name, ifindex := range map[string]int{"none": 0, "another": other} {
		for _, c := range n.cells() {
			if c.serviceID != podID {
				continue
			}
			t.Run(name+"/"+c.name, func(t *testing.T) {
				_, err := n.d.SetServices(known)
				must(t, err)
				slot := c.path(n, t, time.Minute)
				live := c.dialDirect(t)
				_, err = n.d.SetServices(moved(known, podID, ifindex))
				must(t, err)
				if answers(t, live) {
					t.Errorf("live connection goes on; counters:%s", n.counters(t))
				}
				ctx, cancel := context.WithTimeout(within(t), silence)
				defer cancel()
				if conn, err := c.client.Dial(ctx, netip.AddrPortFrom(c.from, 0), c.target()); err == nil {
					conn.Close()
					t.Errorf("service answers a SYN; counters:%s", n.counters(t))
				}
				must(t, n.d.EndPath(slot, datapath.PathRevoked))
			})
		}
	}
}

// silence is how long to wait for an answer that must not come.
const silence = 200 * time.Millisecond

func answers(t *testing.T, conn net.Conn) bool {
	t.Helper()
	must(t, conn.SetDeadline(time.Now().Add(silence)))
	_, err := io.WriteString(conn, "still there?\n")
	must(t, err)
	n, _ := conn.Read(make([]byte, 1))
	return n > 0
}

// moved puts a service behind another device.
func moved(services []datapath.Service, id uint32, ifindex int) []datapath.Service {
	out := append([]datapath.Service(nil), services...)
	for i := range out {
		if out[i].ID == id {
			out[i].Ifindex = ifindex
		}
	}
	return out
}
