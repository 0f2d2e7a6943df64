package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"golang.org/x/sync/errgroup"
)

// settle is how long an origin must be quiet before it is read: an editor writes in several steps, and so does kubectl.
const settle = 100 * time.Millisecond

// enforced is what the node enforces: a verified set and the table made of it. It does not change.
type enforced struct {
	verified   *policy.Set // as it was read
	set        *policy.Set // with the modes that roll-outs have reached on this node
	handed     *policy.Set // to the proxy: without the addresses of remote services that are here, and with those of pods that are chosen
	services   []datapath.Service
	generation uint32 // of the kernel's table
}

// service finds a service's row group by name.
func (e *enforced) service(name string) (datapath.Service, bool) {
	i := slices.IndexFunc(e.services, func(s datapath.Service) bool { return s.Name == name })
	if i < 0 {
		return datapath.Service{}, false
	}
	return e.services[i], true
}

// resources makes the kernel's table and the proxy's file follow the set of resources of an origin. A set that is bad in any
// way changes nothing: the last verified one stays, over a restart too.
type resources struct {
	from     origin
	verified string      // the last set that was put to work, for the next start
	proxy    string      // the file that the proxy reads
	signed   *signedSets // nil where nothing has to be signed
	ids      *serviceIDs
	apply    func([]datapath.Service) (generation uint32, err error)
	decide   func(pods map[uint64]string) error // in which namespaces it is known what is there
	pods     *pods                              // nil: none are chosen here
	classify classifier                         // of the pods' devices
	locate   func(policy.ProtectedService) (place, error)
	isHere   func(netip.Addr) (bool, error)           // is it an address of the node or of a pod on it? nil: none is
	modes    func(*policy.Set) map[string]policy.Mode // that roll-outs have reached; nil: none have
	fits     func(*policy.Set) error                  // the node's configuration; nil: whatever is valid does
	closed   func(policy.RemoteService) error         // why it serves nobody on this node; nil: none does
	problems *problems
	loosened func(looser []error)  // tells what nobody has signed, where nothing has to be
	changed  func(*enforced) error // called after a change has been put to work, and again with the next look if it fails
	owed     bool                  // it has failed; owned by whoever puts sets to work

	kick chan struct{}
	mu   sync.Mutex
	now  *enforced // guarded by mu; nil until load
	// before is what was decided before; guarded by mu; nil: not known.
	before map[uint64]string
	moved  chan struct{} // pods came or went
}

// current is what is enforced now; nil before the first load.
func (r *resources) current() *enforced {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.now
}

// load puts the origin's set to work, or else the last verified one. Without either it fails, and the kernel keeps what
// it has.
func (r *resources) load() error {
	last, lastErr := r.last()
	if lastErr != nil && r.signed != nil {
		// A node that has forgotten what was signed must not begin anew with less.
		return fmt.Errorf("load last verified resources: %w", lastErr)
	}
	set, err := r.read(last)
	r.problems.report(problemResources, "", err)
	switch {
	case err == nil:
		return r.begin(set, last)
	case lastErr != nil:
		return errors.Join(fmt.Errorf("load resources: %w", err), fmt.Errorf("load last verified resources: %w", lastErr))
	case last == nil:
		return fmt.Errorf("load resources: %w", err)
	}
	return r.begin(last, nil)
}

// begin puts a set to work at the start, and the last one in the place of one that must be kept first and cannot be. What
// the disk does not take is a problem, and tried again with the next look: the kernel has the set by then.
func (r *resources) begin(set, last *policy.Set) error {
	err := r.put(set, last)
	if r.current() == nil && last != nil {
		err = errors.Join(err, r.put(last, last))
	}
	if r.current() == nil {
		return err
	}
	if err != nil {
		r.problems.report(problemResources, "", err)
	}
	return nil
}

// last is the last verified set; nil if there never was one.
func (r *resources) last() (*policy.Set, error) {
	data, err := os.ReadFile(r.verified)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if err := checkSum(r.verified, data); err != nil {
		return nil, err
	}
	return policy.Parse(r.verified, data)
}

// sumMark begins the first line of a verified set, which has the SHA-256 of what follows: a bit that the disk has turned may make
// another valid set of it. Older agents wrote none.
const sumMark = "# sha256:"

func summed(yaml []byte) []byte {
	return fmt.Appendf(nil, "%s %x\n%s", sumMark, sha256.Sum256(yaml), yaml)
}

func checkSum(file string, data []byte) error {
	if _, yaml, _ := bytes.Cut(data, []byte("\n")); bytes.HasPrefix(data, []byte(sumMark)) && !bytes.Equal(summed(yaml), data) {
		return &policy.Error{File: file, Line: 1, Msg: "is damaged: it is not what the agent wrote",
			Hint: "bring back a copy of it; only where there is none, remove it: then this node begins with the set that it is given"}
	}
	return nil
}

// reload looks at the origin again. What is wrong with it is a problem, and nothing else happens.
func (r *resources) reload() {
	before := r.current()
	var last *policy.Set
	if before != nil {
		last = before.verified
		if r.owed { // whatever becomes of what the origin has
			r.owed = r.changed(before) != nil
		}
	}
	set, err := r.read(last)
	if err == nil {
		err = r.put(set, last)
	} else if before != nil {
		// Devices may have come: the table is made anew of the set that stays.
		err = errors.Join(err, r.put(before.verified, before.verified))
	}
	r.problems.report(problemResources, "", err)
	if now := r.current(); now != nil {
		r.from.tell(now.verified, err)
	}
}

// read gives the origin's set, if it may take the place of the last one.
func (r *resources) read(last *policy.Set) (*policy.Set, error) {
	offered, err := r.from.read()
	if err == nil && r.fits != nil {
		err = r.fits(offered.set)
	}
	switch {
	case err != nil:
		return nil, err
	case r.signed != nil:
		return r.signed.admit(last, offered)
	}
	return offered.set, olderKeyrings(last, offered.set)
}

// olderKeyrings refuses a keyring with a lower version than the one of its name in force: where nothing is signed, this is what tells
// a file that was restored from one that was changed.
func olderKeyrings(last, next *policy.Set) error {
	had := make(map[string]uint64)
	for _, k := range last.Keyrings() {
		had[k.Name] = k.Spec.Version
	}
	var errs []error
	for _, k := range next.Keyrings() {
		if v := k.Spec.Version; v < had[k.Name] {
			errs = append(errs, &policy.Error{File: k.Source.File, Line: k.Source.Line, Field: "spec.version",
				Msg:  fmt.Sprintf("Keyring %s has version %d, and version %d is in force", k.Name, v, had[k.Name]),
				Hint: "bring the newer one back, or, if this one is meant, give it a higher version"})
		}
	}
	return errors.Join(errs...)
}

// put makes the kernel, the proxy, the active grants and the next start follow the set, in this order: a set that the kernel
// refuses goes no further, the proxy admits where the kernel only steers, and the disk, which may hang, keeps nobody from ending
// what the set refuses. last is the set whose place it takes.
func (r *resources) put(set, last *policy.Set) error {
	if r.signed != nil && len(policy.Loosenings(last, set)) > 0 {
		// What was signed is remembered before it counts, or an older signed set could be put in its place after a restart.
		if err := r.keep(set); err != nil {
			return err
		}
	}
	changed, err := r.enforce(set)
	if err != nil {
		return err
	}
	if looser := policy.Loosenings(last, set); r.loosened != nil && r.signed == nil && last != nil && len(looser) > 0 {
		r.loosened(told(looser))
	}
	handed := keepFile(r.proxy, r.current().handed.YAML(), 0o644)
	if handed != nil {
		handed = fmt.Errorf("hand resources to the proxy: %w", handed)
	}
	if changed {
		r.owed = r.changed(r.current()) != nil
	}
	return errors.Join(handed, r.keep(set))
}

// enforce makes the kernel's table follow the set, and tells whether anything changed. A pod is decided when all that it has to have
// protected is in the table; one that nothing of the table concerns, before: what it has going on is not held up.
func (r *resources) enforce(set *policy.Set) (changed bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	at := set
	if r.modes != nil {
		at = set.AtModes(r.modes(set))
	}
	plan := r.plan(at)
	r.setDecided(plan.first(r.before))
	changed, err = r.tabulate(set, at, plan)
	if err == nil {
		r.setDecided(plan.decided)
	}
	if plan.waits {
		time.AfterFunc(podsAgain, r.podsMoved)
	}
	return changed, err
}

// setDecided tells the kernel. What it does not take stays closed. r.mu is held.
func (r *resources) setDecided(pods map[uint64]string) {
	if r.decide == nil || r.before != nil && maps.Equal(pods, r.before) {
		return // the first time, an earlier agent may have left others
	}
	err := r.decide(pods)
	r.problems.report(problemPods, podsDecided, err)
	if r.before = pods; err != nil {
		r.before = nil // tried again with the next look
	}
}

// tabulate makes the table of the set, at the modes that roll-outs have reached, where the pods are as planned. r.mu is held.
func (r *resources) tabulate(set, at *policy.Set, plan podPlan) (changed bool, err error) {
	handed := r.elsewhere(at.WithPods(plan.addresses))
	services := r.compile(handed, plan)
	if r.now == nil || !slices.EqualFunc(r.now.services, services, sameService) {
		generation, err := r.apply(services)
		if err != nil {
			return false, fmt.Errorf("write services table: %w", err)
		}
		r.now = &enforced{verified: set, set: at, handed: handed, services: services, generation: generation}
		return true, nil
	}
	if r.now.verified.Digest() == set.Digest() && r.now.handed.Digest() == handed.Digest() {
		return false, nil
	}
	r.now = &enforced{verified: set, set: at, handed: handed, services: services, generation: r.now.generation}
	return true, nil
}

// keep makes the set durable, for the next start.
func (r *resources) keep(set *policy.Set) error {
	if err := keepFile(r.verified, summed(set.YAML()), 0o600); err != nil {
		return fmt.Errorf("keep verified resources: %w", err)
	}
	return nil
}

// compile makes rows of a set, of listed places before chosen ones. A pod whose device is not there yet has rows without one, and is a
// problem.
func (r *resources) compile(set *policy.Set, plan podPlan) []datapath.Service {
	all := set.Services()
	services := make([]datapath.Service, 0, len(all))
	var chosen []datapath.Service
	for _, s := range all {
		if row := rowOf(s); s.Spec.PodSelector != nil || plan.places[s.Name] != nil {
			row.Selected, row.Pods = true, plan.places[s.Name]
			chosen = append(chosen, row)
		} else {
			services = append(services, r.locatedRow(row, s))
		}
	}
	services = append(services, chosen...)
	services = append(services, plan.contested...)
	for _, s := range set.RemoteServices() {
		services = append(services, remoteRow(s))
	}
	r.ids.assign(services)
	return services
}

// rowOf is the row group of a service, without where it is.
func rowOf(s policy.ProtectedService) datapath.Service {
	row := datapath.Service{Name: s.Name, Target: datapath.TargetHost, Ports: s.Spec.Ports, Protocol: datapath.TCP,
		Mode: modeOf(s), DenyUDP: s.Spec.UDP != policy.UDPAllow}
	if s.Spec.Protocol == policy.ProtocolUDP {
		row.Protocol, row.Idle, row.DenyUDP = datapath.UDP, s.Spec.Idle.Duration, false
	}
	if s.Spec.Target == policy.TargetPod {
		row.Target = datapath.TargetPod
	}
	return row
}

// locatedRow is the row group where the service lists its places.
func (r *resources) locatedRow(row datapath.Service, s policy.ProtectedService) datapath.Service {
	if s.Spec.Target != policy.TargetPod {
		return row
	}
	where, err := r.locate(s)
	r.problems.report(problemService, s.Name, err)
	row.Addresses, row.Ifindex, row.Besides = s.Spec.Addresses, where.device, where.besides
	return row
}

func sameService(a, b datapath.Service) bool {
	return a.ID == b.ID && a.Name == b.Name && a.Target == b.Target && a.Ifindex == b.Ifindex &&
		a.Protocol == b.Protocol && a.Idle == b.Idle && a.DenyUDP == b.DenyUDP && a.Mode == b.Mode && a.Selected == b.Selected &&
		slices.Equal(a.Besides, b.Besides) && slices.Equal(a.Addresses, b.Addresses) && slices.Equal(a.Ports, b.Ports) &&
		slices.EqualFunc(a.Pods, b.Pods, datapath.Place.Same)
}

// podsMoved asks Run to look at the pods again, and at nothing else.
func (r *resources) podsMoved() {
	select {
	case r.moved <- struct{}{}:
	default:
	}
}

// settle puts the set in force to work with the pods as they are now.
func (r *resources) settle() {
	if now := r.current(); now != nil {
		r.problems.report(problemPods, podsTable, r.put(now.verified, now.verified))
	}
}

// poke asks Run to look at once: a device came or went.
func (r *resources) poke() {
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

// Run follows the origin until ctx ends. It also looks every resyncEvery.
func (r *resources) Run(ctx context.Context) error {
	stirred := make(chan struct{}, 1)
	both, ctx := errgroup.WithContext(ctx)
	both.Go(func() error {
		return r.from.watch(ctx, func() {
			select {
			case stirred <- struct{}{}:
			default: // it has not looked yet
			}
		})
	})
	both.Go(func() error {
		r.follow(ctx, stirred)
		return nil
	})
	return both.Wait()
}

// follow looks when the origin has been quiet for a while, when it is poked, and every resyncEvery.
func (r *resources) follow(ctx context.Context, stirred <-chan struct{}) {
	resync := time.NewTicker(resyncEvery)
	defer resync.Stop()
	quiet := time.NewTimer(0)
	defer quiet.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-stirred:
			quiet.Reset(settle)
		case <-r.kick:
			quiet.Reset(0)
		case <-r.moved:
			r.settle()
		case <-resync.C:
			quiet.Reset(0)
		case <-quiet.C:
			r.reload()
		}
	}
}

// keepFile makes a file's content durable as a whole, unless it has it already.
func keepFile(path string, data []byte, mode os.FileMode) error {
	if err := removeHalfWritten(path); err != nil {
		return err
	}
	if old, err := os.ReadFile(path); err == nil && slices.Equal(old, data) {
		return nil
	}
	return replaceFile(path, data, mode)
}

// besideFile is the pattern of what is written before it gets the file's name.
func besideFile(path string) string { return "." + filepath.Base(path) + "-*" }

// removeHalfWritten removes what a killed agent has left beside the file. Nobody else writes it.
func removeHalfWritten(path string) error {
	left, err := filepath.Glob(filepath.Join(filepath.Dir(path), besideFile(path)))
	errs := []error{err}
	for _, half := range left {
		errs = append(errs, os.Remove(half))
	}
	return errors.Join(errs...)
}

// replaceFile writes beside the file, syncs and renames: a reader and a crash see the old content or the new.
func replaceFile(path string, data []byte, mode os.FileMode) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), besideFile(path))
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	_, err = f.Write(data)
	if err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
