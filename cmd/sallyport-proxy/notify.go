package main

import (
	"net"
	"time"
)

// notifier tells the service manager about the process (sd_notify). Without a socket it tells nobody.
// The socket is a file, or an abstract one, which is not reachable from px.
type notifier struct{ socket string }

// notifyWithin bounds the wait for a service manager that does not read.
const notifyWithin = 200 * time.Millisecond

// send is best effort: a service manager that does not hear of us does what it is configured to.
func (n notifier) send(state string) {
	if n.socket == "" {
		return
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: n.socket, Net: "unixgram"})
	if err != nil {
		return
	}
	defer conn.Close()
	_ = conn.SetWriteDeadline(time.Now().Add(notifyWithin))
	_, _ = conn.Write([]byte(state))
}
