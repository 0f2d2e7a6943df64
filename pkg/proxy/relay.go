package proxy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Sizes of buffers: one TLS record on the way to the service, several on the way back.
const (
	recordSize = 16 << 10
	chunkSize  = 64 << 10
)

// secured is the side of a relay that is proven: TLS, or the connection itself where policy has it go in the clear.
type secured interface {
	io.ReadWriter
	CloseWrite() error
}

// relay carries bytes both ways. A side that does not read holds the other one back: nothing is
// kept but one buffer in each direction. Where we speak for a workload, the two sides have changed places.
type relay struct {
	client secured
	down   *net.TCPConn // below client
	up     *net.TCPConn
	names  [2]string // of client and of up, in errors

	buffers            *buffers
	toServer, toClient uint64 // payload bytes; each is owned by its direction, read after run
	isSSH              atomic.Bool
	activity
}

// run copies until both sides have ended their half, and returns nil then. An error in either
// direction resets both connections: nobody must take a stream that broke for a complete one.
func (r *relay) run() error {
	done := make(chan error, 2)
	go func() { done <- r.serverward() }()
	go func() { done <- r.clientward() }()
	err := <-done
	if err == nil {
		err = <-done
		r.close(err)
		return err
	}
	r.close(err)
	return first(err, <-done)
}

// first is what ended a relay; the other direction ended because of it.
func first(err, _ error) error { return err }

func (r *relay) close(err error) {
	if err != nil {
		resetClose(r.down)
		resetClose(r.up)
		return
	}
	_ = r.down.Close() // both halves have ended in order
	_ = r.up.Close()
}

// serverward ends with the client's close_notify, which becomes a FIN.
func (r *relay) serverward() error {
	buf := r.buffers.records.get()
	defer r.buffers.records.put(buf)
	for {
		n, err := r.client.Read(*buf)
		if n > 0 {
			r.lookAt((*buf)[:n], &r.toServer)
			r.moved()
			if err := r.write(r.up, (*buf)[:n], &r.toServer); err != nil {
				return fmt.Errorf("write to %s: %w", r.names[1], err)
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			_ = r.up.CloseWrite() // a service that is gone shows in the other direction
			return nil
		case err != nil:
			return fmt.Errorf("read from %s: %w", r.names[0], err)
		}
	}
}

// clientward ends with the service's FIN, which becomes close_notify and FIN.
func (r *relay) clientward() error {
	raw, err := r.up.SyscallConn()
	if err != nil {
		return fmt.Errorf("read from %s: %w", r.names[1], err)
	}
	for {
		buf, n, err := readReady(raw, &r.buffers.chunks)
		if err == nil && n == 0 {
			return r.endClientward()
		}
		if err != nil {
			return fmt.Errorf("read from %s: %w", r.names[1], err)
		}
		r.moved()
		r.lookAt((*buf)[:n], &r.toClient)
		err = r.write(r.client, (*buf)[:n], &r.toClient)
		r.buffers.chunks.put(buf)
		if err != nil {
			return fmt.Errorf("write to %s: %w", r.names[0], err)
		}
	}
}

func (r *relay) endClientward() error {
	if err := r.client.CloseWrite(); err != nil {
		return fmt.Errorf("write to %s: %w", r.names[0], err)
	}
	_ = r.down.CloseWrite() // close_notify has said it
	return nil
}

// rawReader is what readReady needs of a syscall.RawConn.
type rawReader interface {
	Read(func(fd uintptr) (done bool)) error
}

// readReady waits for data and only then takes a buffer, so that idle connections hold none. The
// caller gives the buffer back when n is above 0. n of 0 without error is the end.
func readReady(raw rawReader, chunks *pool) (buf *[]byte, n int, err error) {
	var readErr error
	err = raw.Read(func(fd uintptr) bool {
		buf = chunks.get()
		n, readErr = unix.Read(int(fd), *buf)
		for readErr == unix.EINTR {
			n, readErr = unix.Read(int(fd), *buf)
		}
		if n > 0 {
			return true
		}
		chunks.put(buf)
		return readErr != unix.EAGAIN
	})
	if err == nil {
		err = readErr
	}
	return buf, max(n, 0), err
}

// sshBanner is what either side of an SSH connection says first (RFC 4253, 4.2).
var sshBanner = []byte("SSH-2.0-")

// lookAt tells what is spoken by the first bytes of a direction. sent is how many went before.
func (r *relay) lookAt(b []byte, sent *uint64) {
	if *sent == 0 && bytes.HasPrefix(b, sshBanner) {
		r.isSSH.Store(true)
	}
}

func (r *relay) write(to io.Writer, b []byte, count *uint64) error {
	n, err := to.Write(b)
	*count += uint64(n)
	r.moved()
	return err
}

// buffers are shared by all connections of a proxy.
type buffers struct{ records, chunks pool }

func newBuffers() *buffers {
	return &buffers{records: pool{size: recordSize}, chunks: pool{size: chunkSize}}
}

// pool keeps buffers of one size.
type pool struct {
	free sync.Pool
	size int
}

func (p *pool) get() *[]byte {
	if buf, ok := p.free.Get().(*[]byte); ok {
		return buf
	}
	buf := make([]byte, p.size)
	return &buf
}

func (p *pool) put(buf *[]byte) { p.free.Put(buf) }

// copyBuffers lends buffers to httputil.ReverseProxy.
type copyBuffers struct{ *pool }

// Get implements httputil.BufferPool.
func (b copyBuffers) Get() []byte { return *b.get() }

// Put implements httputil.BufferPool.
func (b copyBuffers) Put(buf []byte) { b.put(&buf) }
