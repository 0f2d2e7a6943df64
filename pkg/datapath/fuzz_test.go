package datapath_test

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/test/shape"
)

// FuzzFrame looks for a frame that could reach a protected port and is passed on. Its corpus holds one of
// every shape.
func FuzzFrame(f *testing.F) {
	d := newDifferential(f, 1)
	for i := range uint64(16) {
		c := d.draw(i)
		f.Add(uint8(c.Place), c.frame.Segmented, c.Frame)
	}
	f.Fuzz(func(t *testing.T, at uint8, segmented bool, frame []byte) {
		if len(frame) < 14 || len(frame) > 3000 {
			return
		}
		c := d.seen(shape.Case{Place: int(at) % len(d.places), Frame: bytes.Clone(frame)})
		c.frame.Segmented = segmented
		check(t, d.Node.Do(func() error { // what a socket may have depends on whose namespace it is in
			o := d.try(c)
			d.remember(c, o)
			if d.leak(c, o) && !d.explained(t, c, o) {
				t.Errorf("%v\nreference: %+v, verdict %d", c, o.judgement, o.verdict)
			}
			return nil
		}))
	})
}

// FuzzDecodeEvent: a record of a ring is read whole or refused, and reads the same again.
func FuzzDecodeEvent(f *testing.F) {
	f.Fuzz(func(t *testing.T, raw []byte) {
		e, err := datapath.DecodeEvent(raw)
		size := binary.Size(bpf.Event{})
		if (err == nil) != (len(raw) >= size) {
			t.Fatalf("%d bytes of %d: %v", len(raw), size, err)
		}
		if err != nil {
			return
		}
		again, err := binary.Append(nil, binary.NativeEndian, e)
		if err != nil || !bytes.Equal(again, raw[:size]) {
			t.Errorf("read %x as %x: %v", raw[:size], again, err)
		}
		r := datapath.FromEvent(e)
		if strings.ContainsRune(r.Service+r.Grant, 0) || len(r.Grant) > len(e.Grant) {
			t.Errorf("labels %q and %q", r.Service, r.Grant)
		}
		if r.Client.Addr() != datapath.FromAddr(e.Client) || r.Client.Addr().Is4In6() {
			t.Errorf("client %v", r.Client)
		}
	})
}
