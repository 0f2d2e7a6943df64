package agent

import (
	"fmt"
	"net"
	"strings"
	"time"
)

// notifier tells the service manager about the process (sd_notify(3)). With an empty socket it tells nobody.
type notifier struct {
	socket string // NOTIFY_SOCKET; "@name" is an abstract socket
}

// notifyWithin bounds the wait for a service manager that does not read: the lease is renewed by who notifies.
const notifyWithin = 200 * time.Millisecond

// send hands over assignments such as "READY=1".
func (n notifier) send(assignments ...string) error {
	if n.socket == "" {
		return nil
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: n.socket, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("notify service manager: %w", err)
	}
	defer conn.Close()
	if err := conn.SetWriteDeadline(time.Now().Add(notifyWithin)); err != nil {
		return fmt.Errorf("notify service manager: %w", err)
	}
	if _, err := conn.Write([]byte(strings.Join(assignments, "\n"))); err != nil {
		return fmt.Errorf("notify service manager: %w", err)
	}
	return nil
}

func (n notifier) ready() error { return n.send("READY=1", "STATUS=enforcing") }
func (n notifier) stopping() error {
	return n.send("STOPPING=1", "STATUS=stopping; enforcement stays on")
}
func (n notifier) alive() error          { return n.send("WATCHDOG=1") }
func (n notifier) status(s string) error { return n.send("STATUS=" + oneLine(s)) }

// oneLine keeps a message within one assignment.
func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }
