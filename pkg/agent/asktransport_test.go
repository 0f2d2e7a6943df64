package agent

import (
	"errors"
	"net"
	"runtime"
	"testing"

	"golang.org/x/time/rate"
)

// TestConnectionsHaveARate: beyond its burst a listener hands nothing on before it is time, listeners with one rate share it, and
// Close ends the wait.
func TestConnectionsHaveARate(t *testing.T) {
	pace := rate.NewLimiter(rate.Limit(1e-6), 3)
	listen := func() *pacedListener {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, err)
		t.Cleanup(func() { l.Close() })
		return paced(l, pace)
	}
	accept := func(l net.Listener) {
		t.Helper()
		client, err := net.Dial("tcp", l.Addr().String())
		must(t, err)
		server, err := l.Accept()
		must(t, err)
		must(t, errors.Join(client.Close(), server.Close()))
	}
	a, b := listen(), listen()
	accept(a)
	accept(b)
	accept(a)
	waiting, err := net.Dial("tcp", b.Addr().String())
	must(t, err)
	defer waiting.Close()
	done := make(chan error, 1)
	go func() {
		conn, err := b.Accept()
		if err == nil {
			err = errors.Join(conn.Close(), errors.New("a fourth connection was handed on"))
		}
		done <- err
	}()
	for pace.Tokens() > -0.5 { // until it waits for its turn
		select {
		case err := <-done:
			t.Fatal(err)
		default:
			runtime.Gosched()
		}
	}
	must(t, b.Close())
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}
