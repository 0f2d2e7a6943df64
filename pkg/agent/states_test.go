package agent

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

const stateHeader = "| state | activate |"

// stateTable is the life of a grant on a node, as ARCHITECTURE.md has it: what each event makes of each state.
func stateTable(t *testing.T) (events []string, states [][]string) {
	t.Helper()
	text, err := os.ReadFile("../../ARCHITECTURE.md")
	must(t, err)
	_, table, found := strings.Cut(string(text), stateHeader)
	if !found {
		t.Fatalf("ARCHITECTURE.md has no table that begins with %s", stateHeader)
	}
	for line := range strings.Lines(stateHeader + table) {
		if !strings.HasPrefix(line, "|") {
			break
		}
		states = append(states, strings.Fields(strings.ReplaceAll(line, "|", " ")))
	}
	return states[0][1:], states[2:]
}

// stateWorld is a node on which one grant after the other is brought into a state.
type stateWorld struct {
	*life
	crew     crew
	envelope []byte
	id       string
}

// bring makes a new grant that is in a state.
func (w *stateWorld) bring(state string) {
	w.t.Helper()
	people := "alice bob"
	if state == "requested" {
		people = "alice"
	}
	w.envelope = w.asked(w.crew, people, nil)
	p, err := grant.Peek(w.envelope)
	must(w.t, err)
	w.id = p.ID
	for _, event := range map[string][]string{
		"withdrawn": {"withdraw"}, "denied": {"deny"}, "active": {"activate"}, "revoked": {"activate", "revoke"},
		"expired": {"activate", "deadline"}, "ended": {"activate", "reboot"}, "reviewed": {"activate", "revoke", "review"},
	}[state] {
		must(w.t, w.happen(event))
	}
}

// happen has one event happen.
func (w *stateWorld) happen(event string) (err error) {
	switch event {
	case "activate":
		_, err = w.Activate(w.t.Context(), w.envelope, "uid:0")
	case "revoke":
		_, err = w.Revoke(w.t.Context(), w.id, "", "uid:0")
	case "withdraw":
		err = w.say("alice", grant.StepWithdrawn)
	case "deny":
		err = w.say("carol", grant.StepDenied)
	case "review":
		err = w.say("carol", grant.StepReviewed)
	case "deadline":
		w.testbed.clock.wall += 2 * time.Minute
		w.testbed.clock.boot += 2 * time.Minute
		w.truth += 2 * time.Minute
		_, err = w.tick(w.t.Context())
	case "reboot":
		w.testbed.bootID = "boot of " + w.id
		fallthrough
	case "restart":
		must(w.t, w.store.Close())
		w.life = w.beginOn(w.datapath)
		err = w.adopt(w.t.Context())
	default:
		w.t.Fatalf("no event %q", event)
	}
	return err
}

func (w *stateWorld) say(who string, step grant.Step) error {
	_, err := w.State(w.t.Context(), w.says(w.crew, who, step, w.envelope), w.envelope, "uid:0")
	return err
}

// look tells the state as the store has it, and how many paths are open.
func (w *stateWorld) look() (state string, open int) {
	w.t.Helper()
	states, paths := w.states()
	row := states[w.id]
	if row == "" {
		row = "none"
	}
	all, err := w.store.Statements(w.t.Context())
	must(w.t, err)
	var said []string
	for _, s := range all {
		if s.Grant == w.id {
			said = append(said, s.Step)
		}
	}
	slices.Sort(said)
	return strings.Join(append([]string{row}, said...), "+"), paths[w.id]
}

// TestEveryStateAndEvent walks through the table of ARCHITECTURE.md.
func TestEveryStateAndEvent(t *testing.T) {
	b, c := crewed(t)
	w := &stateWorld{life: b.begin(), crew: c}
	defer func() { w.kill() }()
	events, states := stateTable(t)
	for _, cells := range states {
		for i, event := range events {
			w.bring(cells[0])
			before, _ := w.look()
			err := w.happen(event)
			want := cells[1+i]
			if (err != nil) != (want == "no") {
				t.Errorf("%s in %s: %v, want %s", event, cells[0], err, want)
			}
			if want == "no" || want == "=" {
				want = before
			}
			got, open := w.look()
			if got != want {
				t.Errorf("%s in %s: %s becomes %s, want %s", event, cells[0], before, got, want)
			}
			if (open == 1) != (got == store.StateActive) {
				t.Errorf("%s in %s: %s with %d open paths", event, cells[0], got, open)
			}
			must(t, w.endAll(t.Context(), stepRevoked, "next", "test"))
			_, err = w.tick(t.Context()) // ended slots are known, and given back when they are needed
			must(t, err)
		}
	}
}
