package agent

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

const (
	// challengeLife is how long a challenge can be answered: a file may have to travel there and back.
	challengeLife = 15 * time.Minute
	// maxChallenges is how many can wait for an answer. One more takes the place of the oldest.
	maxChallenges = 64
)

// challenges are those that the node waits for, in memory alone: a restart forgets them, and they are asked for again. Safe
// for concurrent use.
type challenges struct {
	node, boot string
	clock      clock

	mu      sync.Mutex
	waiting []waiting // guarded by mu; oldest first
}

type waiting struct {
	grant.Challenge
	until time.Duration // CLOCK_BOOTTIME
}

// mint makes one more.
func (c *challenges) mint() grant.Challenge {
	wall, boot := c.clock.read()
	made := grant.NewChallenge(c.node, c.boot, wall.Add(challengeLife))
	c.mu.Lock()
	defer c.mu.Unlock()
	c.waiting = slices.DeleteFunc(c.waiting, func(w waiting) bool { return w.until <= boot })
	if len(c.waiting) == maxChallenges {
		c.waiting = slices.Delete(c.waiting, 0, 1)
	}
	c.waiting = append(c.waiting, waiting{made, boot + challengeLife})
	return made
}

// check tells whether the node waits for an answer to it: grant.ErrChallenge if not.
func (c *challenges) check(answered grant.Challenge) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	boot := c.clock.boot()
	switch {
	case answered.Node != c.node:
		return challengeRefused("it is one of the node %q, and this is %q", answered.Node, c.node)
	case answered.Boot != c.boot:
		return challengeRefused("the node has been rebooted since")
	case !slices.ContainsFunc(c.waiting, func(w waiting) bool { return w.Challenge == answered && boot < w.until }):
		return challengeRefused("it was answered before, it is over (%s), or the agent was restarted since", answered.Expires.Format(time.RFC3339))
	}
	return nil
}

// use is check, and nobody can answer it again.
func (c *challenges) use(answered grant.Challenge) error {
	if err := c.check(answered); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	before := len(c.waiting)
	c.waiting = slices.DeleteFunc(c.waiting, func(w waiting) bool { return w.Challenge == answered })
	if len(c.waiting) == before {
		return challengeRefused("it was answered just now")
	}
	return nil
}

func challengeRefused(format string, args ...any) error {
	return &policy.Error{Field: "challenge", Msg: fmt.Sprintf(format, args...), Hint: "answer a new one: `sallyport grant challenge` asks the node for it", Err: grant.ErrChallenge}
}
