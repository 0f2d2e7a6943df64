package client

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync/atomic"
)

// secured is a TLS connection on which an end without close_notify is an error. crypto/tls takes
// an end of the TCP connection between two records for a proper end, so that whoever can send a
// FIN, or a proxy that is killed, would end our stream as if the server had.
type secured struct {
	*tls.Conn
	raw *endWatcher
}

func secure(conn net.Conn, cfg *tls.Config) *secured {
	raw := &endWatcher{Conn: conn}
	return &secured{Conn: tls.Client(raw, cfg), raw: raw}
}

// Read gives io.ErrUnexpectedEOF where the connection was cut.
func (s *secured) Read(p []byte) (int, error) {
	n, err := s.Conn.Read(p)
	if errors.Is(err, io.EOF) && s.raw.ended.Load() {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// endWatcher notes the end of the TCP connection. TLS looks no further after a close_notify, so
// an end that was seen came without one.
type endWatcher struct {
	net.Conn
	ended atomic.Bool
}

func (w *endWatcher) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if errors.Is(err, io.EOF) {
		w.ended.Store(true)
	}
	return n, err
}
