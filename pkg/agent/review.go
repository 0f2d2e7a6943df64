package agent

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// reviewAgain is how often an open review is an alarm again, in the log too.
const reviewAgain = 10 * time.Minute

// reviews are the break-glass grants that nobody has reviewed: those that are live, and those that were. They are what the
// store has of them, so that none is lost. Nothing switches their alarm off but a review. Safe for concurrent use.
type reviews struct {
	clock    clock
	problems *problems
	alarm    func(alarmName, string)

	mu   sync.Mutex
	open map[string]openReview // guarded by mu; by the id of the grant
}

type openReview struct {
	people   []string
	service  string
	clients  []string
	deadline time.Time
	live     bool
	told     time.Duration // boot time of its last alarm
}

func (r openReview) String() string {
	who := fmt.Sprintf("%s broke the glass to %s for %s", strings.Join(r.people, ", "), r.service, strings.Join(r.clients, ", "))
	if r.live {
		return fmt.Sprintf("%s, until %s", who, r.deadline.UTC().Format(time.RFC3339))
	}
	return who + "; it is over, and nobody has reviewed it"
}

// note takes over what is known of a grant, and tells of it at once. Ordinary grants are not its business.
func (r *reviews) note(row store.GrantRow, p grant.Payload, live bool) {
	if row.Kind != string(grant.BreakGlass) {
		return
	}
	r.mu.Lock()
	review, known := r.open[row.ID]
	now := openReview{people: row.People, service: p.Service, clients: texts(p.Addresses), deadline: row.Deadline, live: live, told: review.told}
	if !known || review.live != live {
		now.told = r.clock.boot()
	}
	if r.open == nil {
		r.open = make(map[string]openReview)
	}
	r.open[row.ID] = now
	r.mu.Unlock()
	if !known || review.live != live {
		r.alarm(alarmBreakGlass, "grant "+row.ID+": "+now.String())
	}
	r.report(row.ID, now)
}

// close ends a review and its alarm.
func (r *reviews) close(id string) {
	r.mu.Lock()
	delete(r.open, id)
	r.mu.Unlock()
	r.problems.report(problemBreakGlass, id, nil)
}

// remind raises the alarm of each open review again, when it is time.
func (r *reviews) remind() {
	now := r.clock.boot()
	r.mu.Lock()
	var due []string
	for _, id := range slices.Sorted(maps.Keys(r.open)) {
		review := r.open[id]
		if now-review.told < reviewAgain {
			continue
		}
		review.told = now
		r.open[id] = review
		due = append(due, "grant "+id+": "+review.String())
	}
	r.mu.Unlock()
	for _, text := range due {
		r.alarm(alarmBreakGlass, text)
	}
}

func (r *reviews) report(id string, review openReview) {
	hint := "when it is over, have it reviewed: `sallyport grant review " + id + " --key KEY --why TEXT`"
	r.problems.report(problemBreakGlass, id, &policy.Error{Msg: review.String(), Hint: hint})
}

// counts tells how many are live, and how many are over.
func (r *reviews) counts() (live, over int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, review := range r.open {
		if review.live {
			live++
		} else {
			over++
		}
	}
	return live, over
}

// check refuses break-glass to people who have a part in one that nobody has reviewed.
func (r *reviews) check(v grant.Verified) error {
	if v.Payload.Kind != grant.BreakGlass {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(r.open)) {
		if id == v.Payload.ID {
			continue // the store knows it, and says so
		}
		for _, by := range v.Signers {
			if slices.Contains(r.open[id].people, by.Person) {
				return &policy.Error{Field: "signatures", Msg: fmt.Sprintf("%s has a part in the break-glass grant %s, which nobody has reviewed", by.Person, id),
					Hint: "have that one reviewed first, by somebody else (`sallyport grant review " + id + " --key KEY --why TEXT`), or have others ask and approve", Err: ErrReviewOpen}
			}
		}
	}
	return nil
}
