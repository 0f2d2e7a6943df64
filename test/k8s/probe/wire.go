package main

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// wire carries frames, a line of base64 each, between a device and whoever holds in and out. The first line is the device's own address.
// With past, what it sends goes past queues and egress hooks.
func wire(device string, past bool, in io.Reader, out io.Writer) error {
	dev, err := net.InterfaceByName(device)
	if err != nil {
		return err
	}
	all := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_ALL))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(all))
	if err != nil {
		return fmt.Errorf("open packet socket: %w", err)
	}
	at := &unix.SockaddrLinklayer{Protocol: all, Ifindex: dev.Index}
	if err := unix.Bind(fd, at); err != nil {
		return fmt.Errorf("bind to %s: %w", device, err)
	}
	if past {
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1); err != nil {
			return fmt.Errorf("go past queues: %w", err)
		}
	}
	fmt.Fprintln(out, base64.StdEncoding.EncodeToString(dev.HardwareAddr))
	go receive(fd, out)
	for lines := bufio.NewScanner(in); lines.Scan(); {
		frame, err := base64.StdEncoding.DecodeString(lines.Text())
		if err != nil {
			return err
		}
		if err := unix.Sendto(fd, frame, 0, at); err != nil {
			return fmt.Errorf("send %d bytes: %w", len(frame), err)
		}
	}
	return nil
}

// receive writes what comes in by the socket, until the process ends.
func receive(fd int, out io.Writer) {
	buffer := make([]byte, 1<<16)
	for {
		n, from, err := unix.Recvfrom(fd, buffer, 0)
		if err != nil {
			return
		}
		if l, ok := from.(*unix.SockaddrLinklayer); ok && l.Pkttype != unix.PACKET_OUTGOING {
			fmt.Fprintln(out, base64.StdEncoding.EncodeToString(buffer[:n]))
		}
	}
}

// marked connects once with each mark, and says how often a database answered.
func marked(address string, marks []string, out io.Writer) error {
	answered := 0
	for _, text := range marks {
		mark, err := strconv.ParseUint(text, 0, 32)
		if err != nil {
			return err
		}
		yes, err := answers(address, int(mark))
		if err != nil {
			return err
		}
		if yes {
			answered++
		}
	}
	fmt.Fprintln(out, answered)
	return nil
}

// answers asks for TLS in PostgreSQL's way, which has an answer of one letter. An error is that of setting the mark.
func answers(address string, mark int) (bool, error) {
	var refused error
	d := net.Dialer{Timeout: patience, Control: func(_, _ string, c syscall.RawConn) error {
		if err := c.Control(func(fd uintptr) { refused = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, mark) }); err != nil {
			return err
		}
		return refused
	}}
	c, err := d.DialContext(context.Background(), "tcp", address)
	if err != nil {
		return false, refused
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return false, err
	}
	letter := make([]byte, 1)
	_, _ = c.Write([]byte{0, 0, 0, 8, 4, 210, 22, 47}) // who cannot be written to does not answer
	n, _ := c.Read(letter)
	return n == 1 && (letter[0] == 'N' || letter[0] == 'S'), nil
}
