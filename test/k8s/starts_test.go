//go:build k8s

package k8s

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"golang.org/x/sys/unix"
)

const (
	probeImage = "localhost/probe:1"
	atOnce     = 4 // pods that a node starts in one round
	spare      = 2 // addresses that are probed beyond those, should others take one
)

// starts is a cluster in which pods of a protected service start while strangers probe the addresses that they will have.
type starts struct {
	*inCluster
	secret    string
	strangers []*stranger
	number    int // of pods that were started
}

// served is an address of a pod that has answered.
type served struct {
	pod       string
	address   netip.Addr
	given     time.Time // to the pod, by the CNI
	listening time.Time
	reached   time.Time
	probes    int      // of strangers, from the moment that it listened until it was reached
	early     int      // and before that, since it had the address
	leaked    []string // to whom
}

// TestPodStarts: pods of a service that chooses them start, each with a listener from its first moment on, while strangers on both nodes, in pods and
// beside them, connect to the addresses that they will have. Nobody is told the secret but who comes with an identity. Without us everybody is.
func TestPodStarts(t *testing.T) {
	total := 200
	if text := os.Getenv("SALLYPORT_POD_STARTS"); text != "" {
		var err error
		total, err = strconv.Atoi(text)
		must(t, err)
	}
	s := &starts{inCluster: newInCluster(t), secret: "secret-" + rand.Text()}
	s.comeStrangers()
	s.open(s.round("without us", plainly))
	s.define()
	s.install(s.values())
	s.healthy()
	proven := s.identify()
	var all []served
	for s.number = 0; s.number < total; {
		all = append(all, s.round("installed", proven)...)
	}
	s.closed(all)
}

// open holds that each stranger was told the secret by each pod: their probes find a service that is open.
func (s *starts) open(all []served) {
	s.t.Helper()
	for _, a := range all {
		if len(a.leaked) != len(s.strangers) {
			s.t.Fatalf("without us %s at %s told its secret to %v, want %d strangers", a.pod, a.address, a.leaked, len(s.strangers))
		}
	}
	s.t.Logf("without us: each of %d addresses told its secret to each of %d strangers", len(all), len(s.strangers))
}

// closed holds that nobody was told, and that each pod was probed while that could have been.
func (s *starts) closed(all []served) {
	var early, leaked int
	var took, hidden []time.Duration
	probes := map[string]int{}
	for _, a := range all {
		if len(a.leaked) > 0 {
			leaked++
			s.t.Errorf("LEAKED: %s at %s told its secret to %v", a.pod, a.address, a.leaked)
		}
		early += a.early
		probes[a.pod] += a.probes
		took, hidden = append(took, a.reached.Sub(a.given)), append(hidden, a.reached.Sub(a.listening))
	}
	for pod, n := range probes {
		if n == 0 {
			s.t.Errorf("%s was not probed between its first moment and the one in which it was reached by identity: nothing is shown", pod)
		}
	}
	of := slices.Sorted(maps.Values(probes))
	s.t.Logf("%d pods were started, %d addresses reached by identity, %d leaked", len(probes), len(all), leaked)
	s.t.Logf("%d probes before the listeners, since the addresses were given; behind that, until they were reached, %d to %d of a pod, p50 %d", early, of[0], of[len(of)-1], of[len(of)/2])
	s.t.Logf("from address to reached by identity: p50 %s, p99 %s; from listener: p50 %s, p99 %s", at(took, 50), at(took, 99), at(hidden, 50), at(hidden, 99))
}

// at is a percentile.
func at(all []time.Duration, percent int) time.Duration {
	slices.Sort(all)
	return all[min(len(all)-1, len(all)*percent/100)].Round(time.Millisecond)
}

// round starts pods on both nodes while strangers probe, and ends them when each of their addresses has answered.
func (s *starts) round(when string, connect dial) (all []served) {
	s.t.Helper()
	var addresses []netip.Addr
	var manifests strings.Builder
	var pods []string
	for _, n := range s.nodes {
		addresses = append(addresses, s.next(n)...)
		for range atOnce {
			s.number++
			name := fmt.Sprintf("start-%d", s.number)
			pods = append(pods, "pod/"+name)
			manifests.WriteString(probePod(name, n, "{app: db}", fmt.Sprintf("[/probe, serve, \"5432\", %q]", s.secret+" "+name)))
		}
	}
	s.tell("+", addresses)
	s.apply(manifests.String())
	all = s.reachAll(addresses, 2*len(pods), connect)
	reports := s.tell("-", addresses)
	for i := range all {
		all[i].judge(reports[all[i].address])
	}
	s.do(append([]string{"delete", "--wait=false", "--grace-period=1"}, pods...)...)
	s.t.Logf("%s: %d pods, %d addresses reached", when, len(pods), len(all))
	return all
}

func probePod(name string, n *node, labels, command string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s, labels: %s}
spec:
  nodeName: %s
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 1
  containers: [{name: probe, image: %s, imagePullPolicy: Never, command: %s}]
---
`, name, labels, n.name, probeImage, command)
}

// judge counts what strangers say.
func (a *served) judge(reports map[string]report) {
	for who, r := range reports {
		if r.Read > 0 {
			a.leaked = append(a.leaked, who)
		}
		for _, micros := range r.Probes {
			switch sent := time.UnixMicro(micros); {
			case sent.Before(a.given) || sent.After(a.reached):
			case sent.Before(a.listening):
				a.early++
			default:
				a.probes++
			}
		}
	}
}

// lease is where the CNI of a node notes that it has given the address.
func (n *node) lease(a netip.Addr) string {
	return filepath.Join(n.dir, "lib/cni/networks/br", a.String())
}

// next are the addresses of both families that the node's CNI will give next, as anybody can foretell.
func (s *starts) next(n *node) (all []netip.Addr) {
	for i, network := range []string{n.pods + ".0/24", n.net6 + "::/64"} {
		last, err := os.ReadFile(filepath.Join(n.dir, fmt.Sprintf("lib/cni/networks/br/last_reserved_ip.%d", i)))
		must(s.t, err)
		a := netip.MustParseAddr(strings.TrimSpace(string(last)))
		for found := 0; found < atOnce+spare; {
			if a = a.Next(); a.Is4() && a.As4()[3] == 255 {
				a = netip.MustParsePrefix(network).Addr().Next().Next() // behind the gateway
			}
			if _, err := os.Stat(n.lease(a)); errors.Is(err, fs.ErrNotExist) {
				all = append(all, a)
				found++
			}
		}
	}
	return all
}

// reachAll tries all addresses from the second node until so many of them have answered.
func (s *starts) reachAll(addresses []netip.Addr, want int, connect dial) (all []served) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	answers := make(chan served, len(addresses))
	var trying sync.WaitGroup
	for _, a := range addresses {
		trying.Go(func() { s.reach(ctx, a, connect, answers) })
	}
	for len(all) < want && ctx.Err() == nil {
		select {
		case r := <-answers:
			all = append(all, r)
		case <-ctx.Done():
		}
	}
	cancel()
	trying.Wait()
	if len(all) < want {
		s.t.Fatalf("%d of %d addresses have answered: %v", len(all), want, all)
	}
	return all
}

// reach tries one address until it answers. Its thread stays in the node's network, and ends with it.
func (s *starts) reach(ctx context.Context, to netip.Addr, connect dial, answers chan<- served) {
	runtime.LockOSThread()
	if err := s.nodes[1].enter(); err != nil {
		s.t.Error(err)
		return
	}
	for ctx.Err() == nil {
		if r, err := s.told(ctx, to, connect); err == nil {
			answers <- r
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// enter brings the thread into the node's network.
func (n *node) enter() error {
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", n.pid))
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
}

// dial is how somebody connects.
type dial func(ctx context.Context, network, to string) (net.Conn, error)

func plainly(ctx context.Context, network, to string) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, network, to)
}

// identify gives the way of whoever has the identity app/web. Nobody but a proxy of the nodes ends it, so what it reads came through one.
func (s *inCluster) identify() dial {
	s.t.Helper()
	source, err := workloadapi.NewX509Source(s.t.Context(), workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+filepath.Join(s.nodes[1].dir, "run/spire/app/app.sock"))))
	must(s.t, err)
	s.t.Cleanup(func() { _ = source.Close() })
	proven := tls.Dialer{Config: tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeMemberOf(spiffeid.RequireTrustDomainFromString(domain)))}
	return proven.DialContext
}

// told reads what a service tells: the secret, its pod, and since when it listens.
func (s *starts) told(ctx context.Context, by netip.Addr, connect dial) (r served, err error) {
	connecting, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	conn, err := connect(connecting, "tcp", net.JoinHostPort(by.String(), "5432"))
	if err != nil {
		return r, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return r, err
	}
	answer, err := io.ReadAll(conn)
	r = served{address: by, reached: time.Now()}
	var secret string
	var since int64
	if _, scan := fmt.Sscan(string(answer), &secret, &r.pod, &since); scan != nil || secret != s.secret {
		return r, fmt.Errorf("%w: %q", errors.Join(err, errNoAnswer), answer)
	}
	r.listening = time.UnixMicro(since)
	for _, n := range s.nodes {
		if lease, err := os.Stat(n.lease(by)); err == nil {
			r.given = lease.ModTime()
			return r, nil
		}
	}
	return r, fmt.Errorf("%s was given to no pod", by)
}
