package agent

import (
	"errors"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// problemClass groups problems under a bounded metric label.
type problemClass string

// Classes of problems.
const (
	problemResources problemClass = "resources"
	problemPx        problemClass = "px"
	problemDevice    problemClass = "device"
	problemIgnored   problemClass = "ignored_device"
	problemService   problemClass = "service"
	problemPods      problemClass = "pods"
	problemLease     problemClass = "lease"
	problemGrants    problemClass = "grants"
	problemEvents    problemClass = "events"
	problemProbe     problemClass = "probe"
	problemMetrics   problemClass = "metrics"
	problemAudit     problemClass = "audit"
	problemPins      problemClass = "pins"
	problemBackstop  problemClass = "backstop"
	problemAlarms    problemClass = "alarms"
	problemXDP       problemClass = "xdp"
	problemSources   problemClass = "sources"
	problemSockets   problemClass = "sockets"
	problemGuard     problemClass = "guard"
	problemCandidate problemClass = "candidate"
	problemAsking    problemClass = "automation"
	problemMemory    problemClass = "memory"
	problemRollouts  problemClass = "rollouts"
	problemCluster   problemClass = "cluster"
	problemCanary    problemClass = "canary"

	problemKubelet problemClass = "kubelet"

	problemBreakGlass problemClass = "break_glass"
)

var problemClasses = []problemClass{problemResources, problemPx, problemDevice, problemIgnored, problemService, problemPods, problemLease,
	problemGrants, problemEvents, problemProbe, problemMetrics, problemAudit, problemPins, problemBackstop, problemAlarms,
	problemXDP, problemSources, problemSockets, problemGuard, problemCandidate, problemAsking, problemMemory, problemCluster, problemCanary, problemRollouts, problemKubelet, problemBreakGlass}

type problemKey struct {
	class   problemClass
	subject string
}

// problems are what is wrong now, by class and subject. Each change is logged once, by who found it and without the lock: a log
// that takes nothing keeps nobody else waiting. Safe for concurrent use.
type problems struct {
	log *slog.Logger
	mu  sync.Mutex
	now map[problemKey]string // guarded by mu
}

func newProblems(log *slog.Logger) *problems {
	return &problems{log: log, now: make(map[problemKey]string)}
}

// report notes err as the state of the subject; nil says that it is well again.
func (p *problems) report(class problemClass, subject string, err error) {
	switch changed := p.change(problemKey{class, subject}, err); {
	case changed && err == nil:
		p.log.Info("problem is over", "class", class, "subject", subject)
	case changed:
		p.log.Error("problem", "class", class, "subject", subject, "error", err)
	}
}

// change notes the state of a subject, and tells whether it is another than before.
func (p *problems) change(key problemKey, err error) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	before, was := p.now[key]
	if err == nil {
		delete(p.now, key)
		return was
	}
	words := plainLines(inWords(err))
	p.now[key] = words
	return !was || before != words
}

// plainLines drops what a terminal would obey: an API server, and names of resources that it tells, may say anything.
func plainLines(words string) string {
	lines := strings.Split(words, "\n")
	for i := range lines {
		lines[i] = plain(lines[i])
	}
	return strings.Join(lines, "\n")
}

// inWords is a line for each cause, with the next step where it has one.
func inWords(err error) string {
	if _, ok := errors.AsType[*policy.Error](err); !ok {
		return err.Error()
	}
	var lines []string
	for _, e := range policy.Errors(err) {
		line := e.Error()
		if e.Hint != "" {
			line += " (" + e.Hint + ")"
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n")
}

// keep forgets the problems of a class whose subject is not among those that still exist.
func (p *problems) keep(class problemClass, exists func(subject string) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	maps.DeleteFunc(p.now, func(k problemKey, _ string) bool { return k.class == class && !exists(k.subject) })
}

// lines tells every problem, sorted. One that has several causes has a line for each.
func (p *problems) lines() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []string
	for k, msg := range p.now {
		name := string(k.class)
		if k.subject != "" {
			name += " " + k.subject
		}
		for cause := range strings.SplitSeq(msg, "\n") {
			out = append(out, name+": "+cause)
		}
	}
	slices.Sort(out)
	return out
}

// counts tells how many problems each class has, zero included.
func (p *problems) counts() map[problemClass]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make(map[problemClass]int, len(problemClasses))
	for _, c := range problemClasses {
		out[c] = 0
	}
	for k := range p.now {
		out[k.class]++
	}
	return out
}
