package agent

import (
	"net"
	"path/filepath"
	"testing"
	"time"
)

func TestNotify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	n := notifier{socket: path}
	for _, c := range []struct {
		send func() error
		want string
	}{
		{n.ready, "READY=1\nSTATUS=enforcing"},
		{n.alive, "WATCHDOG=1"},
		{n.stopping, "STOPPING=1\nSTATUS=stopping; enforcement stays on"},
		{func() error { return n.status("not ready:\nREADY=1") }, "STATUS=not ready: READY=1"},
	} {
		if err := c.send(); err != nil {
			t.Fatal(err)
		}
		if err := conn.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 256)
		k, err := conn.Read(buf)
		if err != nil || string(buf[:k]) != c.want {
			t.Errorf("got %q, %v; want %q", buf[:k], err, c.want)
		}
	}
	if err := (notifier{}).ready(); err != nil {
		t.Errorf("without a service manager: %v", err)
	}
	if err := (notifier{socket: path + "-absent"}).ready(); err == nil {
		t.Error("an absent socket gives no error")
	}
}

// TestNotifyWaitsForNobody: a service manager that does not read keeps nobody waiting.
func TestNotifyWaitsForNobody(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for range 1 << 16 { // as many as the socket takes
		if (notifier{socket: path}).alive() != nil {
			return
		}
	}
	t.Error("a socket that nobody reads takes everything")
}
