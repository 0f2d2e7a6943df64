package identity

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/sallyport-dev/sallyport/pkg/devauthority"
)

var (
	own    = spiffeid.RequireFromPath(domain, "/sallyport/agent/node-1")
	server = spiffeid.RequireFromPath(domain, "/spire/agent/node-1")
	web    = spiffeid.RequireFromPath(domain, "/app/web")
	db     = spiffeid.RequireFromPath(domain, "/app/db")

	partner = spiffeid.RequireTrustDomainFromString("partner.example")
)

// office is an authority that serves brokers, and a client of one of them.
type office struct {
	*bench
	path   string // where the client asks
	served string // where the broker is, which is there but for a test in between
	Broker
	serveBroker func(context.Context) error
}

// eachBroker runs a test with either API.
func eachBroker(t *testing.T, ttl time.Duration, test func(*testing.T, *office)) {
	t.Helper()
	for name, open := range map[string]func(*office, *testing.T){"broker": (*office).openSPIFFE, "delegated": (*office).openDelegated} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := newOffice(t, ttl)
			open(o, t)
			test(t, o)
		})
	}
}

func newOffice(t *testing.T, ttl time.Duration) *office {
	t.Helper()
	o := &office{bench: newBench(t, ttl, func(c *Config) { c.ID = own }), path: filepath.Join(t.TempDir(), "b.sock")}
	o.served = o.path
	o.start(func(ctx context.Context) error { return o.authority.Serve(ctx, o.socket, own) })
	return o
}

func (o *office) config() BrokerConfig {
	return BrokerConfig{Address: "unix://" + o.path, MinRetry: 5 * time.Millisecond, MaxRetry: 20 * time.Millisecond,
		Confirm: Confirm{Answers: 2, Window: 50 * time.Millisecond}}
}

func (o *office) openSPIFFE(t *testing.T) {
	b, err := NewSPIFFEBroker(o.config(), o.Source, domain)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	o.Broker, o.serveBroker = b, func(ctx context.Context) error { return o.authority.ServeBroker(ctx, o.served, server, own) }
}

func (o *office) openDelegated(t *testing.T) {
	b, err := NewSPIREDelegated(o.config())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	o.Broker, o.serveBroker = b, func(ctx context.Context) error { return o.authority.ServeDelegated(ctx, o.served, own) }
}

// watched is what a watch has told.
type watched struct {
	t    *testing.T
	told chan Attested
	last Attested
	ever []spiffeid.ID // all that were read of it
	end  chan error
	stop func()
}

func watching(t *testing.T, b Broker, w Workload) *watched {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	n := &watched{t: t, told: make(chan Attested, 1024), end: make(chan error, 1), stop: cancel}
	go func() {
		n.end <- b.Watch(ctx, w, func(a Attested) { n.told <- a })
		close(n.end)
	}()
	t.Cleanup(func() { cancel(); <-n.end })
	return n
}

func (n *watched) read(a Attested) { n.last, n.ever = a, append(n.ever, a.IDs...) }

// until waits for a state with these identities.
func (n *watched) until(state State, ids ...spiffeid.ID) Attested {
	n.t.Helper()
	n.when(func(a Attested) bool { return a.State == state && slices.Equal(a.IDs, ids) }, state, ids)
	return n.last
}

func (n *watched) when(good func(Attested) bool, want ...any) {
	n.t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		select {
		case a := <-n.told:
			n.read(a)
			if len(n.last.IDs) != len(n.last.SVIDs) || len(n.last.IDs) > 0 && !n.last.State.Usable() {
				n.t.Fatalf("told %+v", n.last)
			}
			if good(n.last) {
				return
			}
		case <-deadline:
			n.t.Fatalf("last told %s %v (%v), want %v", n.last.State, n.last.IDs, n.last.Err, want)
		}
	}
}

// ended wants the end of the process told, and nothing kept.
func (n *watched) ended() {
	n.t.Helper()
	select {
	case err := <-n.end:
		if !errors.Is(err, ErrEnded) {
			n.t.Errorf("watch ended with %v, want %v", err, ErrEnded)
		}
	case <-time.After(20 * time.Second):
		n.t.Fatal("the watch outlives its process")
	}
	for len(n.told) > 0 {
		n.read(<-n.told)
	}
	if n.last.State != Unreachable || len(n.last.IDs)+len(n.last.SVIDs) > 0 {
		n.t.Errorf("left behind: %+v", n.last)
	}
}

func sleeper(t *testing.T, before string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sh", "-c", before+"exec sleep 1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd
}

func process(cmd *exec.Cmd) Workload { return Workload{PID: int32(cmd.Process.Pid)} }

func TestBrokerTellsWhoAProcessIs(t *testing.T) {
	t.Parallel()
	eachBroker(t, time.Hour, func(t *testing.T, o *office) {
		cmd := sleeper(t, "")
		pid := int32(cmd.Process.Pid)
		o.authority.SetEntries(devauthority.Entry{ID: web, PID: pid}, devauthority.Entry{ID: db, PID: 1})
		o.start(o.serveBroker)
		n := watching(t, o, process(cmd))
		first := n.until(Fresh, web)
		if id, _, err := x509svid.Verify(first.SVIDs[0].Certificates, first.Bundles); err != nil || id != web {
			t.Errorf("its certificate is of %s: %v", id, err)
		}

		o.authority.SetEntries(devauthority.Entry{ID: web, PID: pid}, devauthority.Entry{ID: db, PID: pid})
		n.until(Fresh, web, db)
		o.authority.SetEntries(devauthority.Entry{ID: db, PID: pid}) // each answer is all that counts
		before := n.until(Fresh, db)
		o.authority.Rotate()
		n.when(func(a Attested) bool {
			return a.State == Fresh && !a.SVIDs[0].Certificates[0].Equal(before.SVIDs[0].Certificates[0])
		}, "another certificate")

		o.authority.SetEntries()
		n.until(StaleValid, db) // not confirmed yet
		if n.until(Withdrawn); !errors.Is(n.last.Err, ErrUnissued) {
			t.Errorf("told %v, want %v", n.last.Err, ErrUnissued)
		}
		o.authority.SetEntries(devauthority.Entry{ID: web, PID: pid})
		n.until(Fresh, web)

		cmd.Process.Kill()
		n.ended()
	})
}

// TestBrokerAwayAndDenying: what is said by a broker that is away is nothing; what one denies counts.
func TestBrokerAwayAndDenying(t *testing.T) {
	t.Parallel()
	eachBroker(t, time.Hour, func(t *testing.T, o *office) {
		cmd := sleeper(t, "")
		o.authority.SetEntries(devauthority.Entry{ID: web, PID: int32(cmd.Process.Pid)})
		n := watching(t, o, process(cmd))
		n.until(Unreachable)
		stop := o.start(o.serveBroker)
		n.until(Fresh, web)
		stop()
		n.until(StaleValid, web)
		for range 5 { // and each further attempt
			n.when(func(a Attested) bool { return a.State == StaleValid && len(a.IDs) == 1 && a.Err != nil }, StaleValid)
		}
		o.start(o.serveBroker)
		n.until(Fresh, web)

		o.authority.Withdraw(own) // who is no broker any more may act for nobody
		n.until(Withdrawn)
		o.authority.Restore(own)
		n.until(Fresh, web)
	})
}

func TestBrokerAwayUntilExpiry(t *testing.T) {
	t.Parallel()
	eachBroker(t, 2*time.Second, func(t *testing.T, o *office) {
		cmd := sleeper(t, "")
		o.authority.SetEntries(devauthority.Entry{ID: web, PID: int32(cmd.Process.Pid)})
		stop := o.start(o.serveBroker)
		n := watching(t, o, process(cmd))
		n.until(Fresh, web)
		stop()
		n.until(StaleValid, web)
		n.until(Expired)
		o.start(o.serveBroker)
		n.until(Fresh, web)
	})
}

func TestBrokerTellsAPod(t *testing.T) {
	t.Parallel()
	pod := Workload{PodUID: "6f9c2c7e-6ff4-4d3c-9a1f-4f0a1a3e6f10"}
	eachBroker(t, time.Hour, func(t *testing.T, o *office) {
		o.authority.SetEntries(devauthority.Entry{ID: web, PodUID: pod.PodUID}, devauthority.Entry{ID: db, PodUID: "other"})
		o.start(o.serveBroker)
		if _, delegated := o.Broker.(*SPIREDelegated); delegated {
			if err := o.Watch(t.Context(), pod, func(Attested) { t.Error("told something") }); err == nil {
				t.Error("asked for a pod by a process's number")
			}
			return
		}
		n := watching(t, o, pod)
		n.until(Fresh, web)
		n.stop()
		if err := <-n.end; err != nil {
			t.Errorf("ended with %v", err)
		}
	})
}

func TestBrokerWantsOneName(t *testing.T) {
	t.Parallel()
	b, err := NewSPIREDelegated(BrokerConfig{Address: "unix:///nowhere"})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	for _, w := range []Workload{{}, {PID: 1, PodUID: "x"}, {PID: -1}} {
		if err := b.Watch(t.Context(), w, func(Attested) { t.Error("told something") }); err == nil {
			t.Errorf("watched %+v", w)
		}
	}
	if _, err := NewSPIREDelegated(BrokerConfig{}); err == nil {
		t.Error("made without an address")
	}
}

// TestBrokerBundlesAreTheWorkloads: what one workload trusts is no business of another.
func TestBrokerBundlesAreTheWorkloads(t *testing.T) {
	t.Parallel()
	eachBroker(t, time.Hour, func(t *testing.T, o *office) {
		foreign, err := devauthority.New(partner, devauthority.Options{})
		if err != nil {
			t.Fatal(err)
		}
		o.authority.Federate(foreign.TrustBundle())
		a, b := sleeper(t, ""), sleeper(t, "")
		o.authority.SetEntries(
			devauthority.Entry{ID: web, PID: int32(a.Process.Pid), Federates: []spiffeid.TrustDomain{partner}},
			devauthority.Entry{ID: db, PID: int32(b.Process.Pid)})
		o.start(o.serveBroker)
		federated, alone := watching(t, o, process(a)), watching(t, o, process(b))
		if _, err := federated.until(Fresh, web).Bundles.GetX509BundleForTrustDomain(partner); err != nil {
			t.Error(err)
		}
		if _, err := alone.until(Fresh, db).Bundles.GetX509BundleForTrustDomain(partner); err == nil {
			t.Error("a workload trusts what only another is federated with")
		}
		o.authority.Unfederate(partner)
		federated.when(func(a Attested) bool {
			_, err := a.Bundles.GetX509BundleForTrustDomain(partner)
			return err != nil
		}, "no bundle of "+partner.Name())
	})
}

// TestBrokerMustBeSPIREsAgent: a workload that sits at the broker's socket gets nothing said and tells nothing.
func TestBrokerMustBeSPIREsAgent(t *testing.T) {
	t.Parallel()
	for _, poser := range []string{"/app/web", "/spire/agentless", "/sallyport/spire/agent/x"} {
		t.Run(poser, func(t *testing.T) {
			t.Parallel()
			o := newOffice(t, time.Hour)
			o.openSPIFFE(t)
			o.authority.SetEntries(devauthority.Entry{ID: web, PodUID: "x"})
			o.start(func(ctx context.Context) error {
				return o.authority.ServeBroker(ctx, o.served, spiffeid.RequireFromPath(domain, poser), own)
			})
			n := watching(t, o, Workload{PodUID: "x"})
			n.when(func(a Attested) bool { return a.Err != nil && strings.Contains(a.Err.Error(), "unexpected ID") }, "unexpected ID")
			if n.last.State != Unreachable {
				t.Errorf("state %s", n.last.State)
			}
		})
	}
}

// TestBecomesAnother: SPIRE attests a process once. One that runs another program since is asked about anew, and
// has nothing meanwhile.
func TestBecomesAnother(t *testing.T) {
	t.Parallel()
	eachBroker(t, time.Hour, func(t *testing.T, o *office) {
		cmd := exec.Command("sh", "-c", "read line; exec sleep 1000")
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		o.authority.SetEntries(devauthority.Entry{ID: web, PID: int32(cmd.Process.Pid)})
		o.start(o.serveBroker)
		n := watching(t, o, process(cmd))
		n.until(Fresh, web)
		in.Write([]byte("\n"))
		n.when(func(a Attested) bool { return errors.Is(a.Err, ErrBecameAnother) }, ErrBecameAnother)
		if n.last.State != Unreachable || len(n.last.IDs) > 0 {
			t.Errorf("told %+v", n.last)
		}
		n.until(Fresh, web)
	})
}

// TestMovesToAnotherGroup: the identity of a control group ends for a process that has left it.
func TestMovesToAnotherGroup(t *testing.T) {
	t.Parallel()
	base := cgroups(t)
	eachBroker(t, time.Hour, func(t *testing.T, o *office) {
		first, second := newGroup(t, base), newGroup(t, base)
		o.authority.SetEntries(
			devauthority.Entry{ID: web, Cgroup: strings.TrimPrefix(first, base)},
			devauthority.Entry{ID: db, Cgroup: strings.TrimPrefix(second, base)})
		cmd := sleeper(t, "")
		join(t, first, cmd)
		o.start(o.serveBroker)
		n := watching(t, o, process(cmd))
		n.until(Fresh, web)
		join(t, second, cmd)
		n.until(Fresh, db)
	})
}

// cgroups is where control groups of version 2 are.
func cgroups(t *testing.T) string {
	t.Helper()
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		if _, err := os.Stat(filepath.Join(dir, "cgroup.controllers")); err == nil {
			return dir
		}
	}
	t.Fatal("no control groups (version 2) are mounted\nhint: mount -t cgroup2 none /sys/fs/cgroup")
	return ""
}

func newGroup(t *testing.T, base string) string {
	t.Helper()
	dir, err := os.MkdirTemp(base, "sallyport-identity-")
	if err != nil {
		t.Fatalf("make a control group: %v\nhint: run as root", err)
	}
	t.Cleanup(func() {
		for os.Remove(dir) != nil && t.Context().Err() == nil {
		}
		if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
	})
	return dir
}

func join(t *testing.T, group string, cmd *exec.Cmd) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte(pidText(cmd)), 0o600); err != nil {
		t.Fatal(err)
	}
}
