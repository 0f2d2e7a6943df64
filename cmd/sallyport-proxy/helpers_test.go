package main

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/test/lab"
)

func itoa(n int) string { return strconv.Itoa(n) }

// in is the same bench for a subtest.
func (b *bench) in(t *testing.T) *bench {
	c := *b
	c.T = t
	return &c
}

// check is must for other goroutines than the test's.
func (b *bench) check(err error) {
	b.Helper()
	if err != nil {
		b.Error(err)
	}
}

func (b *bench) until(holds func() bool) {
	b.Helper()
	deadline := time.Now().Add(wait)
	for !holds() {
		if time.Now().After(deadline) {
			b.Fatal("does not come about")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// eventually connects as soon as a change of policy lets the identity in.
func (b *bench) eventually(f lab.Family, id spiffeid.ID) *tls.Conn {
	b.Helper()
	var conn *tls.Conn
	b.until(func() bool {
		raw, err := b.Client.Dial(b.ctx, netip.AddrPort{}, b.target(f))
		if err != nil {
			return false
		}
		c := b.tlsAs(raw, id)
		if _, err := lab.Ask(c); err != nil {
			raw.Close()
			return false
		}
		b.Cleanup(func() { raw.Close() })
		conn = c
		return true
	})
	return conn
}

// tlsWith wraps a connection for an identity that was made elsewhere.
func (b *bench) tlsWith(c net.Conn, svid *x509svid.SVID) *tls.Conn {
	return tls.Client(c, tlsconfig.MTLSClientConfig(svid, b.authority.Bundle(), tlsconfig.AuthorizeID(proxyID)))
}

// blackhole lets the pod's answers to an address vanish.
func (b *bench) blackhole(a netip.Addr) {
	b.Helper()
	b.must(b.Pod.Netlink.RouteAdd(&netlink.Route{
		Dst:  &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())},
		Type: unix.RTN_BLACKHOLE,
	}))
}

// counter tells of every write.
type counter struct {
	w     io.Writer
	moved chan struct{}
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	select {
	case c.moved <- struct{}{}:
	default:
	}
	return n, err
}

var errDiffers = errors.New("differs from what was sent")

// repeats accepts one text again and again.
type repeats struct {
	of  []byte
	pos int
}

func (r *repeats) Write(p []byte) (int, error) {
	for i := 0; i < len(p); {
		n := min(len(r.of)-r.pos, len(p)-i)
		if !bytes.Equal(p[i:i+n], r.of[r.pos:r.pos+n]) {
			return i, fmt.Errorf("byte %d: %w", i, errDiffers)
		}
		i, r.pos = i+n, (r.pos+n)%len(r.of)
	}
	return len(p), nil
}
