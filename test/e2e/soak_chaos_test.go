package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// chaos does to the programs what happens to them in their lives, one thing at a time: the pins, the
// guard and the agent each hold the hooks, and all else may be lost while one of them is left.
type chaos struct {
	*world
	bins  [2]string // folders of the two builds
	build int       // the one that runs
	dice  *rand.Rand
	judge *leakJudge
	pins  []string // those that have to be there when all is well

	mu     sync.Mutex // guards counts
	counts map[string]int
}

// event is one kind of thing that happens.
type event struct {
	name   string
	weight int
	do     func(*chaos, context.Context) error
}

var events = []event{
	{"kill-agent", 4, func(c *chaos, ctx context.Context) error { return c.kill(ctx, c.agent) }},
	{"kill-guard", 3, func(c *chaos, ctx context.Context) error { return c.kill(ctx, c.guard) }},
	{"kill-proxy", 4, func(c *chaos, ctx context.Context) error { return c.kill(ctx, c.proxy) }},
	{"stop-agent", 2, func(c *chaos, ctx context.Context) error { return c.restart(ctx, c.agent) }},
	{"stop-proxy", 2, func(c *chaos, ctx context.Context) error { return c.restart(ctx, c.proxy) }},
	{"kill-all", 3, (*chaos).crash},
	{"replace", 4, (*chaos).replace},
	{"unpin", 2, (*chaos).unpin},
	{"unmount", 2, (*chaos).unmount},
}

// run goes on until ctx ends, and leaves everything running.
func (c *chaos) run(ctx context.Context) error {
	var all []event
	for _, e := range events {
		for range e.weight {
			all = append(all, e)
		}
	}
	for ctx.Err() == nil {
		e := all[c.dice.IntN(len(all))]
		c.happened(e.name)
		// What has begun is brought to its end: the next thing finds all well.
		if err := e.do(c, context.WithoutCancel(ctx)); err != nil {
			return fmt.Errorf("%s: %w", e.name, err)
		}
		pause(ctx, c.dice, 300*time.Millisecond)
	}
	return nil
}

func (c *chaos) happened(name string) {
	c.judge.begin(name)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.counts[name]++
}

func (c *chaos) moment(ctx context.Context) { pause(ctx, c.dice, 400*time.Millisecond) }

// kill is SIGKILL at a random moment, sometimes again in the middle of the start.
func (c *chaos) kill(ctx context.Context, d *daemon) error {
	for range 1 + c.dice.IntN(2) {
		if err := d.proc.Kill(); err != nil {
			return err
		}
		c.moment(ctx)
		if err := d.launch(); err != nil {
			return err
		}
		c.moment(ctx)
	}
	return d.wait()
}

// crash kills all three, so that nothing but pins hold the hooks.
func (c *chaos) crash(ctx context.Context) error {
	all := []*daemon{c.agent, c.guard, c.proxy}
	c.dice.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	for _, d := range all {
		if err := d.proc.Kill(); err != nil {
			return err
		}
	}
	c.moment(ctx)
	for _, d := range all {
		if err := d.launch(); err != nil {
			return err
		}
	}
	for _, d := range all {
		if err := d.wait(); err != nil {
			return err
		}
	}
	return nil
}

func (c *chaos) restart(ctx context.Context, d *daemon) error {
	if err := d.proc.Stop(startTime); err != nil {
		return fmt.Errorf("%w\n%s", err, d.proc.Output())
	}
	c.moment(ctx)
	if err := d.launch(); err != nil {
		return err
	}
	return d.wait()
}

// replace puts the other build into the place of this one, a program after the other: to the second
// build it is an upgrade, back a downgrade.
func (c *chaos) replace(ctx context.Context) error {
	c.build = 1 - c.build
	c.happened([]string{"downgrade", "upgrade"}[c.build])
	programs := []*daemon{c.agent, c.guard, c.proxy}
	c.dice.Shuffle(len(programs), func(i, j int) { programs[i], programs[j] = programs[j], programs[i] })
	for _, d := range programs {
		d.name = filepath.Join(c.bins[c.build], filepath.Base(d.name))
		end := c.restart
		if c.dice.IntN(2) == 0 {
			end = c.kill
		}
		if err := end(ctx, d); err != nil {
			return err
		}
	}
	return nil
}

// unpin removes what is below the bpffs. Agent and guard hold on, and the agent puts it back.
func (c *chaos) unpin(context.Context) error {
	if err := os.RemoveAll(filepath.Join(c.bpffs, "sallyport")); err != nil {
		return err
	}
	return c.repaired()
}

// unmount takes the bpffs away with all pins, and mounts an empty one in its place, as an operator would.
func (c *chaos) unmount(ctx context.Context) error {
	if err := unix.Unmount(c.bpffs, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount bpffs: %w", err)
	}
	pause(ctx, c.dice, 2*time.Second)
	if err := unix.Mount("bpffs", c.bpffs, "bpf", 0, ""); err != nil {
		return fmt.Errorf("mount bpffs: %w", err)
	}
	return c.repaired()
}

// lastingPins lists the pinned links as they are before pods come and go.
func (w *world) lastingPins() ([]string, error) {
	pins, err := filepath.Glob(filepath.Join(w.bpffs, "*", "v*", "links", "*"))
	if err == nil && len(pins) == 0 {
		err = errors.New("no link is pinned")
	}
	return pins, err
}

// repaired waits until the agent has put the pins back, and the guard has had its look at them.
func (c *chaos) repaired() error {
	began := time.Now()
	for missing := ""; ; time.Sleep(10 * time.Millisecond) { // between two looks at the condition
		missing = ""
		for _, pin := range c.pins {
			if _, err := os.Lstat(pin); errors.Is(err, fs.ErrNotExist) {
				missing = pin
			}
		}
		if missing == "" {
			return nil
		}
		if time.Since(began) > patience {
			return fmt.Errorf("%s is not back after %v", missing, patience)
		}
	}
}
