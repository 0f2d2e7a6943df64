package identity

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

// workloadSet is all that a broker told of a workload at once.
type workloadSet struct {
	svids   []*x509svid.SVID
	bundles *x509bundle.Set
}

// subscribe asks a broker for a workload and hands on each full set, until something goes wrong.
type subscribe func(ctx context.Context, w Workload, take func(workloadSet)) error

// lookAgain is how often a pinned process is compared with what was attested.
const lookAgain = 2 * time.Second

// watch is one workload as a broker knows it. It is owned by run.
type watch struct {
	cfg       BrokerConfig
	subscribe subscribe
	workload  Workload
	pin       *Pin // nil of a pod
	tell      func(Attested)

	evidence evidence
	set      workloadSet
	err      error
	told     State
	toldIDs  int
}

// answer is what a subscription brings: a set, or why it ended.
type answer struct {
	set workloadSet
	err error
}

func watchWorkload(ctx context.Context, cfg BrokerConfig, s subscribe, w Workload, tell func(Attested)) (err error) {
	if err := w.check(); err != nil {
		return err
	}
	n := &watch{cfg: cfg, subscribe: s, workload: w, tell: tell}
	var ended <-chan struct{}
	if w.PID != 0 {
		if n.pin, err = NewPin(w.PID); err != nil {
			return err
		}
		defer n.pin.Close()
		ended = n.pin.Ended()
	}
	defer n.forget()
	return n.run(ctx, ended)
}

// run follows one subscription after the other: one ends when the broker does, or when the process is to be
// attested anew.
func (n *watch) run(ctx context.Context, ended <-chan struct{}) error {
	again := retry{n.cfg.MinRetry, n.cfg.MaxRetry}.NewBackoff()
	for {
		err := n.follow(ctx, ended, again.Reset)
		pause := again.Next()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, ErrEnded):
			return ErrEnded
		case errors.Is(err, ErrBecameAnother):
			if err := n.pin.Renew(); err != nil {
				return err
			}
			n.evidence, n.set, pause = evidence{}, workloadSet{}, 0
		}
		n.trouble(err)
		if done := n.pause(ctx, ended, pause); done {
			continue // follow tells which of both
		}
	}
}

// pause waits, and tells states that change by time alone meanwhile.
func (n *watch) pause(ctx context.Context, ended <-chan struct{}, d time.Duration) (done bool) {
	over := time.After(d)
	for {
		select {
		case <-over:
			return false
		case <-n.turn():
			n.report(false)
		case <-ended:
			return true
		case <-ctx.Done():
			return true
		}
	}
}

// follow keeps one subscription until it ends, and says why.
func (n *watch) follow(ctx context.Context, ended <-chan struct{}, well func()) error {
	ctx, cancel := context.WithCancel(ctx)
	answers := make(chan answer)
	defer func() {
		cancel()
		for range answers { // the subscription ends before the next one begins
		}
	}()
	go n.ask(ctx, answers)
	look := n.looks()
	defer look.Stop()
	for {
		select {
		case <-ended:
			return ErrEnded
		case <-look.C:
			if err := n.check(); err != nil {
				return err
			}
		case <-n.turn():
			n.report(false)
		case a, more := <-answers:
			if !more {
				return ctx.Err()
			}
			if a.err != nil {
				return a.err
			}
			if err := n.check(); err != nil {
				return err
			}
			well()
			n.take(a.set)
		}
	}
}

// ask has the broker answer until the subscription ends, which is the last answer.
func (n *watch) ask(ctx context.Context, answers chan<- answer) {
	defer close(answers)
	hand := func(a answer) {
		select {
		case answers <- a:
		case <-ctx.Done():
		}
	}
	err := n.subscribe(ctx, n.workload, func(s workloadSet) { hand(answer{set: s}) })
	if err == nil {
		err = errors.New("the broker ended the subscription")
	}
	hand(answer{err: err})
}

func (n *watch) looks() *time.Ticker {
	t := time.NewTicker(lookAgain)
	if n.pin == nil {
		t.Stop()
	}
	return t
}

func (n *watch) check() error {
	if n.pin == nil {
		return nil
	}
	return n.pin.Check()
}

func (n *watch) take(s workloadSet) {
	now := n.cfg.Clock()
	n.set, n.err = workloadSet{n.set.svids, s.bundles}, nil
	if len(s.svids) == 0 {
		n.err = fmt.Errorf("ask for %s: %w", n.workload, ErrUnissued)
		n.evidence = n.evidence.missing(now, n.cfg.Confirm)
	} else {
		n.set = s
		n.evidence = n.evidence.updated(now, latest(s.svids))
		for _, svid := range s.svids { // each is renewed on its own
			if one := (evidence{}).updated(now, notAfter(svid)); one.renewal.Before(n.evidence.renewal) {
				n.evidence.renewal = one.renewal
			}
		}
	}
	n.report(true)
}

// trouble sorts what ended a subscription. A broker that is away says nothing about the workload.
func (n *watch) trouble(err error) {
	n.err = err
	if isDenial(err) {
		n.evidence = n.evidence.denied(n.cfg.Clock(), n.cfg.Confirm)
	} else {
		n.evidence = n.evidence.unreachable()
	}
	n.report(true)
}

// forget takes all away, as the last word.
func (n *watch) forget() {
	n.evidence, n.set, n.err = evidence{}, workloadSet{}, ErrEnded
	n.report(true)
}

// report tells what is known now; unless it must, only when that changed by time.
func (n *watch) report(must bool) {
	now := n.cfg.Clock()
	a := Attested{State: n.evidence.state(now, n.cfg.Confirm), Err: n.err, Bundles: n.set.bundles}
	if n.set.bundles == nil {
		a.Bundles = x509bundle.NewSet()
	}
	if a.State == Withdrawn {
		n.set.svids = nil // and with them the private keys
	}
	if a.State.Usable() {
		for _, svid := range n.set.svids {
			if now.Before(notAfter(svid)) {
				a.IDs, a.SVIDs = append(a.IDs, svid.ID), append(a.SVIDs, svid)
			}
		}
	}
	if a.Err == nil && n.evidence.overdue(now) {
		a.Err = errOverdue
	}
	if !must && a.State == n.told && len(a.IDs) == n.toldIDs {
		return
	}
	if a.State != n.told {
		n.cfg.Logger.Info("workload state", "workload", n.workload, "state", a.State, "before", n.told, "error", a.Err)
	}
	n.told, n.toldIDs = a.State, len(a.IDs)
	n.tell(a)
}

// turn comes when the state may have changed by time alone; the wall clock may be set meanwhile, so that it also
// comes now and then.
func (n *watch) turn() <-chan time.Time {
	now := n.cfg.Clock()
	next := now.Add(time.Minute)
	sooner := func(t time.Time) {
		if t.After(now) && t.Before(next) {
			next = t
		}
	}
	sooner(n.evidence.renewal)
	if n.evidence.absent {
		sooner(n.evidence.firstDenied.Add(n.cfg.Confirm.Window))
	}
	for _, svid := range n.set.svids {
		sooner(notAfter(svid))
	}
	return time.After(next.Sub(now))
}

func notAfter(svid *x509svid.SVID) time.Time { return svid.Certificates[0].NotAfter }

func latest(svids []*x509svid.SVID) time.Time {
	last := slices.MaxFunc(svids, func(a, b *x509svid.SVID) int { return notAfter(a).Compare(notAfter(b)) })
	return notAfter(last)
}

// readSVID takes a certificate chain and a key, both DER, and holds it to be the identity that it is said to be.
func readSVID(id string, chain, key []byte) (*x509svid.SVID, error) {
	svid, err := x509svid.ParseRaw(chain, key)
	if err != nil {
		return nil, fmt.Errorf("read identity %s: %w", id, err)
	}
	if said, err := spiffeid.FromString(id); err != nil || said != svid.ID {
		return nil, fmt.Errorf("read identity %s: its certificate is of %s", id, svid.ID)
	}
	return svid, nil
}

// addBundle takes certificates of a trust domain, DER, one after the other.
func addBundle(set *x509bundle.Set, domain string, raw []byte) error {
	td, err := spiffeid.TrustDomainFromString(domain)
	if err != nil {
		return fmt.Errorf("read bundle: %w", err)
	}
	bundle, err := x509bundle.ParseRaw(td, raw)
	if err != nil {
		return fmt.Errorf("read bundle of %s: %w", td, err)
	}
	set.Add(bundle)
	return nil
}

// complete checks a configuration and fills in what was left out.
func (c *BrokerConfig) complete() error {
	if c.Address == "" {
		return errors.New("no address of a broker")
	}
	own := Config{Confirm: c.Confirm, MinRetry: c.MinRetry, MaxRetry: c.MaxRetry, Clock: c.Clock, Logger: c.Logger}
	own.complete()
	c.Confirm, c.MinRetry, c.MaxRetry, c.Clock, c.Logger = own.Confirm, own.MinRetry, own.MaxRetry, own.Clock, own.Logger
	return nil
}

// connect options hold gRPC's own back-off, which grows to two minutes in which every attempt of ours would fail unasked.
func (r retry) connect() grpc.DialOption {
	return grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{
		BaseDelay: r.min, Multiplier: 2, Jitter: 0.2, MaxDelay: r.max,
	}})
}
