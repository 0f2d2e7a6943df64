// Command probe is both sides of an attack: a service that tells a secret to whoever reaches it, and a stranger who tries to, by sockets or by frames.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	port     = "5432"
	every    = 50 * time.Millisecond  // probes of one address
	patience = 500 * time.Millisecond // until one is connected, and then until it is told something
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 3 && args[0] == "serve":
		return serve(args[1], args[2])
	case len(args) == 2 && args[0] == "reach":
		return reach(os.Stdin, os.Stdout, []byte(args[1]))
	case len(args) == 3 && args[0] == "wire":
		return wire(args[1], args[2] == "past", os.Stdin, os.Stdout)
	case len(args) == 2 && args[0] == "stat":
		_, err := os.Stat(args[1])
		return err
	case len(args) > 2 && args[0] == "marked":
		return marked(args[1], args[2:], os.Stdout)
	}
	return errors.New("usage: probe serve PORT SECRET | reach SECRET | wire DEVICE past|through | stat FILE | marked ADDRESS:PORT MARK [MARK]")
}

// serve says the secret, and since when it listens, to each connection of either family until the process is told to end.
func serve(port, secret string) error {
	l, err := net.Listen("tcp", ":"+port)
	if err != nil {
		return err
	}
	line := fmt.Sprintf("%s %d\n", secret, time.Now().UnixMicro())
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.WriteString(c, line) // who has gone does not want it
				_ = c.Close()
			}()
		}
	}()
	<-ended
	return l.Close()
}

// Report is what reach says of an address, a line of JSON each: that it has begun, and what came of it.
type Report struct {
	Address string  `json:"address"`
	Begun   bool    `json:"begun,omitempty"`
	Probes  []int64 `json:"probes,omitempty"` // when each was sent, Unix time in microseconds
	Read    int     `json:"read,omitempty"`   // those that were told the secret
}

// reach probes addresses from the line "+ADDRESS" on until "-ADDRESS".
func reach(in io.Reader, out io.Writer, secret []byte) error {
	var mu sync.Mutex // guards out
	say := func(r Report) {
		mu.Lock()
		defer mu.Unlock()
		_ = json.NewEncoder(out).Encode(r) // whoever reads misses it
	}
	ends := map[string]chan struct{}{}
	for lines := bufio.NewScanner(in); lines.Scan(); {
		line := lines.Text()
		if len(line) < 2 {
			return fmt.Errorf("read %q: neither +ADDRESS nor -ADDRESS", line)
		}
		address := line[1:]
		if end := ends[address]; end != nil {
			close(end)
			delete(ends, address)
		}
		if line[0] == '+' {
			ends[address] = make(chan struct{})
			go probe(say, address, secret, ends[address])
		}
	}
	return nil
}

// probe probes one address, and says when it has begun and what came of it.
func probe(say func(Report), address string, secret []byte, end <-chan struct{}) {
	var all sync.WaitGroup
	var read atomic.Int32
	r := Report{Address: address}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for n := 0; ; n++ {
		r.Probes = append(r.Probes, time.Now().UnixMicro())
		all.Go(func() {
			if tells(address, secret) {
				read.Add(1)
			}
		})
		if n == 0 {
			say(Report{Address: address, Begun: true})
		}
		select {
		case <-tick.C:
		case <-end:
			all.Wait()
			r.Read = int(read.Load())
			say(r)
			return
		}
	}
}

// tells says whether a connection is told the secret. That somebody accepts it means nothing.
func tells(address string, secret []byte) bool {
	c, err := net.DialTimeout("tcp", net.JoinHostPort(address, port), patience)
	if err != nil {
		return false
	}
	defer c.Close()
	if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return false
	}
	told := make([]byte, len(secret))
	_, err = io.ReadFull(c, told)
	return err == nil && bytes.Equal(told, secret)
}
