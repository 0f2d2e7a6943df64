package agent

import (
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
)

func TestListens(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer ln.Close()
	port := uint16(ln.Addr().(*net.TCPAddr).Port)
	conn, err := net.Dial("tcp", ln.Addr().String()) // its connections have the port too
	must(t, err)
	defer conn.Close()
	table, err := os.ReadFile("/proc/thread-self/net/tcp")
	must(t, err)
	if !listens(strings.NewReader(string(table)), port) {
		t.Error("the listener is not seen")
	}
	must(t, ln.Close())
	table, err = os.ReadFile("/proc/thread-self/net/tcp")
	must(t, err)
	if listens(strings.NewReader(string(table)), port) {
		t.Error("a connection is taken for a listener")
	}
	if listens(strings.NewReader("header\nnonsense\n"), 1) {
		t.Error("nonsense listens")
	}
}
