//go:build k8s

package k8s

import (
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// talk is one connection to the database, with a question each moment: what time it is there.
type talk struct {
	end   chan struct{} // closed: ask the last question
	ended chan struct{} // closed when there is no connection any more
	err   error         // after ended, as what follows
	out   bytes.Buffer
}

// at is how psql is told to connect to an address.
func (w *world) at(host string) string {
	return fmt.Sprintf("host=%s port=5432 dbname=postgres sslmode=disable connect_timeout=20", host)
}

func (w *world) talk(psql *exec.Cmd) *talk {
	w.t.Helper()
	c := &talk{end: make(chan struct{}), ended: make(chan struct{})}
	in, err := psql.StdinPipe()
	must(w.t, err)
	psql.Stdout, psql.Stderr = &c.out, &c.out
	must(w.t, psql.Start())
	go func() {
		defer close(c.ended)
		c.err = psql.Wait()
	}()
	go func() {
		defer in.Close()
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				fmt.Fprintln(in, "select extract(epoch from clock_timestamp());")
			case <-c.end:
				fmt.Fprintln(in, "select 6*7;")
				return
			case <-c.ended:
				return
			}
		}
	}()
	return c
}

// hangUp asks the last question, and tells whether the connection lived until then.
func (c *talk) hangUp() error {
	close(c.end)
	<-c.ended
	if lines := c.lines(); c.err != nil || lines[len(lines)-1] != "42" {
		return fmt.Errorf("%w: %s", errors.Join(c.err, errNoAnswer), lines[len(lines)-1])
	}
	return nil
}

// The rest is for after the end.

func (c *talk) lines() []string { return strings.Split(strings.TrimSpace(c.out.String()), "\n") }

func (c *talk) answers() int { return len(c.lines()) }

// last is the time of the database's last answer.
func (c *talk) last() (at time.Time) {
	for _, line := range c.lines() {
		if seconds, err := strconv.ParseFloat(line, 64); err == nil {
			at = time.UnixMicro(int64(seconds * 1e6))
		}
	}
	return at
}
