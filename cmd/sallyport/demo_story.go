package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/identity"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

const (
	demoGrant   = 5 * time.Second        // duration of the grant
	stepLimit   = 20 * time.Second       // for one step
	demoPing    = 10 * time.Millisecond  // between question and answer and the next on the bypassed connection
	demoUrgency = 100 * time.Millisecond // so long before the deadline the client stops waiting for answers
	demoRush    = 50 * time.Microsecond  // between its lines from then on
)

// demoStory tells the main job. Its steps rely on each other: the first that fails is the last.
type demoStory struct {
	w   *demoWorld
	say func(demoStep)

	figures   demoFigures
	agent     *demoProcess
	proxy     *demoProcess
	identity  *identity.Source
	direct    net.Conn // the plain client's connection under the grant
	reader    *bufio.Reader
	grant     string
	deadline  time.Duration // of its path, CLOCK_BOOTTIME
	resetTime time.Time
}

// demoChapter is a step before it was told.
type demoChapter struct {
	name string
	tell func(context.Context) (string, error)
}

func (s *demoStory) tell(ctx context.Context) *demoReport {
	chapters := []demoChapter{
		{"collector, agent and proxy run, and the hooks are proven", s.begin},
		{"a plain client is refused at the protected port", s.plainRefused},
		{"a client with a SPIFFE identity is served through the proxy", s.identityServed},
		{"a signed 5-second grant, begun by whoever asked for it, lets the plain client go around it", s.grantOpens},
		{"the agent is killed with SIGKILL", s.agentKilled},
		{"at the deadline the kernel resets the connection, and the retry is on the proxy", s.deadlineCuts},
		{"a restarted agent adopts, and log and kernel agree to the byte", s.bytesAgree},
		{"uninstall leaves nothing attached", s.uninstalled},
	}
	if s.w.spire != nil {
		chapters = slices.Insert(chapters, 0, demoChapter{"a real spire-server and spire-agent know the demo's programs", s.spireKnows})
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	report := &demoReport{}
	for _, c := range chapters {
		step := demoStep{Name: c.name}
		detail, err := c.tell(ctx)
		step.OK, step.Detail = err == nil, detail
		if err != nil {
			step.Detail = err.Error()
		}
		report.Steps = append(report.Steps, step)
		s.say(step)
		if err != nil {
			break
		}
	}
	report.Figures = s.figures
	return report
}

func (s *demoStory) begin(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	var err error
	if _, err = s.w.start(ctx, "sallyport-collector", "--config", s.w.path("collector.yaml")); err != nil {
		return "", err
	}
	if s.agent, err = s.w.start(ctx, "sallyport-agent", "run", "--config", s.w.path("agent.yaml")); err != nil {
		return "", err
	}
	if s.proxy, err = s.w.start(ctx, "sallyport-proxy", "--config", s.w.path("proxy.yaml")); err != nil {
		return "", err
	}
	if s.w.agent, err = client.NewAgent(s.w.path("run/agent.sock")); err != nil {
		return "", err
	}
	if s.w.audit, err = client.NewAudit("unix:"+s.w.path("collector.sock"), nil); err != nil {
		return "", errors.Join(err, s.w.agent.Close())
	}
	st, err := s.w.agent.Status(ctx)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d hooks on the node, port %d protected", len(st.GetHooks()), demoPort), nil
}

func demoTarget() string { return fmt.Sprintf("%s:%d", demoNode, demoPort) }

func (s *demoStory) dial(ctx context.Context) (c net.Conn, err error) {
	err = s.w.client.do(func() error {
		d := net.Dialer{Timeout: 5 * time.Second}
		c, err = d.DialContext(ctx, "tcp4", demoTarget())
		return err
	})
	return c, err
}

// plainRefused wants a reset and no answer, and the denial in the log with its reason.
func (s *demoStory) plainRefused(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	c, err := s.dial(ctx)
	if err != nil {
		return "", err
	}
	defer c.Close()
	answer, err := ask(c, bufio.NewReader(c))
	if !wasReset(err) {
		return "", fmt.Errorf("got %q and %v, want a reset", answer, err)
	}
	r, err := s.record(ctx, &api.FlowQuery{Verdict: "DENIED", Client: demoClient}, func(r *api.FlowRecord) bool {
		return r.GetClient() == c.LocalAddr().String()
	})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("connection reset; in the log: %s %s, %s to %s", r.GetVerdict(), r.GetReason(), r.GetClient(), r.GetService()), nil
}

func wasReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// ask sends a line and reads the service's answer.
func ask(c net.Conn, r *bufio.Reader) (string, error) {
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(c, "hello\n"); err != nil {
		return "", err
	}
	line, err := r.ReadString('\n')
	return strings.TrimSpace(line), err
}

// saw reads the address from the service's answer.
func saw(answer string) (netip.AddrPort, error) {
	text, ok := strings.CutPrefix(answer, "service saw ")
	if !ok {
		return netip.AddrPort{}, fmt.Errorf("%q is not the service's answer", answer)
	}
	return netip.ParseAddrPort(text)
}

// record waits for a flow record at the collector.
func (s *demoStory) record(ctx context.Context, q *api.FlowQuery, match func(*api.FlowRecord) bool) (*api.FlowRecord, error) {
	q.Follow = true
	return firstRecord(s.w.audit.Flows(ctx, q), match)
}

func firstRecord(records iter.Seq2[*api.StoredFlow, error], match func(*api.FlowRecord) bool) (*api.FlowRecord, error) {
	for r, err := range records {
		if err != nil {
			return nil, fmt.Errorf("wait for the record at the collector: %w", err)
		}
		if match(r.GetFlow()) {
			return r.GetFlow(), nil
		}
	}
	return nil, errors.New("the record did not come to the collector")
}

func (s *demoStory) identityServed(ctx context.Context) (string, error) {
	source, err := identity.New(identity.Config{Address: s.w.workloadAPI("app")})
	if err != nil {
		return "", err
	}
	s.identity = source
	go func() { _ = source.Run(ctx) }() // its failure shows in Wait
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	if err := source.Wait(ctx); err != nil {
		return "", fmt.Errorf("get the client's identity: %w", err)
	}
	answer, local, err := s.proxied(ctx)
	if err != nil {
		return "", err
	}
	seen, err := saw(answer)
	if err != nil {
		return "", err
	}
	if seen.Addr().String() != demoClient || seen.Port() == local.Port() {
		return "", fmt.Errorf("service saw %s for the client's %s: not through the proxy", seen, local)
	}
	r, err := s.record(ctx, &api.FlowQuery{Verdict: "PROXIED", Event: "CLOSE"}, func(r *api.FlowRecord) bool {
		return r.GetClient() == local.String()
	})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s; in the log: %s %s as %s", answer, r.GetVerdict(), r.GetReason(), r.GetIdentity()), nil
}

// proxied asks the service through mTLS, trusting the node's proxy and nobody else.
func (s *demoStory) proxied(ctx context.Context) (answer string, local netip.AddrPort, err error) {
	id, err := spiffeid.FromString("spiffe://" + demoDomain + demoIdentities["proxy"])
	if err != nil {
		return "", local, err
	}
	var c client.Stream
	err = s.w.client.do(func() error {
		tunnel, err := client.NewTunnel(client.TunnelConfig{
			Server: demoTarget(), TLS: tlsconfig.MTLSClientConfig(s.identity, s.identity, tlsconfig.AuthorizeID(id)), DialTimeout: 5 * time.Second,
		})
		if err != nil {
			return err
		}
		c, err = tunnel.Dial(ctx)
		return err
	})
	if err != nil {
		return "", local, err
	}
	defer c.Close()
	conn, ok := c.(net.Conn)
	if !ok {
		return "", local, errors.New("tunnel is no connection")
	}
	answer, err = ask(conn, bufio.NewReader(conn))
	return answer, conn.LocalAddr().(*net.TCPAddr).AddrPort(), err
}

func (s *demoStory) grantOpens(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	envelope, err := s.sign(ctx)
	if err != nil {
		return "", err
	}
	challenge, err := s.w.agent.Challenge(ctx)
	if err != nil {
		return "", err
	}
	begun, err := grant.Answer(ctx, envelope, challenge, s.w.key, time.Now())
	if err != nil {
		return "", err
	}
	if _, err := s.w.agent.Activate(ctx, envelope, begun); err != nil {
		return "", err
	}
	p, err := s.path()
	if err != nil {
		return "", err
	}
	s.deadline = p.Deadline
	if s.direct, err = s.dial(ctx); err != nil {
		return "", err
	}
	s.reader = bufio.NewReader(s.direct)
	answer, err := ask(s.direct, s.reader)
	if err != nil {
		return "", err
	}
	if seen, err := saw(answer); err != nil || seen.String() != s.direct.LocalAddr().String() {
		return "", fmt.Errorf("%s (%w), want the client's own %s", answer, err, s.direct.LocalAddr())
	}
	r, err := s.record(ctx, &api.FlowQuery{Verdict: "BYPASSED", Grant: s.grant}, func(r *api.FlowRecord) bool { return r.GetEvent() == "OPEN" })
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s; in the log: %s %s under grant %s", answer, r.GetVerdict(), r.GetReason(), r.GetGrant()), nil
}

func (s *demoStory) sign(ctx context.Context) ([]byte, error) {
	now := time.Now()
	p, err := grant.Payload{
		Requester: "alice", Service: "demo", Binding: policy.BindingAddress,
		Addresses: []netip.Addr{netip.MustParseAddr(demoClient)}, NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Hour),
		Duration: demoGrant, Reason: "to show a path", Audience: demoName,
	}.Named(now)
	if err != nil {
		return nil, err
	}
	s.grant = p.ID
	return grant.Sign(ctx, p, s.w.key)
}

// path reads the grant's path from the pinned maps: it needs no agent.
func (s *demoStory) path() (datapath.PathStatus, error) {
	paths, err := datapath.ReadPaths(s.w.path("bpf/sallyport"))
	if err != nil {
		return datapath.PathStatus{}, err
	}
	for _, p := range paths {
		if p.Grant == s.grant {
			return p, nil
		}
	}
	return datapath.PathStatus{}, fmt.Errorf("no path of grant %s in the kernel", s.grant)
}

func (s *demoStory) agentKilled(context.Context) (string, error) {
	if err := s.agent.kill(); err != nil {
		return "", err
	}
	answer, err := ask(s.direct, s.reader)
	if err != nil {
		return "", fmt.Errorf("the live connection ended with the agent: %w", err)
	}
	return fmt.Sprintf("the path goes on without it: %s", answer), nil
}

// deadlineCuts talks on the bypassed connection until it is reset, then asks again by the proxy.
func (s *demoStory) deadlineCuts(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	defer s.direct.Close()
	at, err := s.talkUntilReset(ctx)
	if err != nil {
		return "", err
	}
	s.figures.DeadlineToResetUs = (at - s.deadline).Microseconds()
	answer, _, err := s.proxied(ctx)
	if err != nil {
		return "", fmt.Errorf("retry through the proxy: %w", err)
	}
	s.figures.ResetToProxiedUs = time.Since(s.resetTime).Microseconds()
	from := s.direct.LocalAddr().(*net.TCPAddr).AddrPort()
	all, late := s.w.service.count(from, s.deadline)
	s.figures.LatePackets = late
	if late > 0 {
		return "", fmt.Errorf("%d of %d packets reached the service after the deadline", late, all)
	}
	return fmt.Sprintf("reset %d µs after the deadline, none of %d packets late; then %s", s.figures.DeadlineToResetUs, all, answer), nil
}

// talkUntilReset returns the boot time at which the reset was seen. Near the deadline the client sends
// without waiting, so that what is measured is the reset of its next packet: had it waited for an
// answer that the deadline cut off, it would learn of it by its own retransmission.
func (s *demoStory) talkUntilReset(ctx context.Context) (time.Duration, error) {
	pace := time.NewTicker(demoPing)
	defer pace.Stop()
	for s.deadline-datapath.BootTime() > demoUrgency {
		if _, err := ask(s.direct, s.reader); err != nil {
			return 0, fmt.Errorf("bypassed connection, %s before its deadline: %w", s.deadline-datapath.BootTime(), err)
		}
		<-pace.C
	}
	reset := make(chan error, 1)
	var at time.Duration
	go func() {
		_, err := io.Copy(io.Discard, s.reader)
		at, s.resetTime = datapath.BootTime(), time.Now()
		reset <- err
	}()
	pace.Reset(demoRush)
	var writing error // the kernel tells of a reset once, to whoever asks first
	for {
		select {
		case err := <-reset:
			return at, s.checkReset(at, errors.Join(err, writing))
		case <-ctx.Done():
			return 0, fmt.Errorf("the connection outlived its deadline by %s", datapath.BootTime()-s.deadline)
		case <-pace.C:
			if writing == nil {
				_, writing = io.WriteString(s.direct, "hello\n")
			}
		}
	}
}

func (s *demoStory) checkReset(at time.Duration, err error) error {
	if !wasReset(err) {
		return fmt.Errorf("bypassed connection ended with %v, want a reset", err)
	}
	if at < s.deadline {
		return fmt.Errorf("reset %s before the deadline", s.deadline-at)
	}
	return nil
}

// bytesAgree reads the kernel's counters while no agent runs, then starts one and waits for its record.
func (s *demoStory) bytesAgree(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	p, err := s.path()
	if err != nil {
		return "", err
	}
	s.figures.BytesKernel = p.BytesToServer + p.BytesToClient
	if s.agent, err = s.w.start(ctx, "sallyport-agent", "run", "--config", s.w.path("agent.yaml")); err != nil {
		return "", err
	}
	since := timestamppb.New(time.Now().Add(-time.Minute))
	r, err := s.record(ctx, &api.FlowQuery{Grant: s.grant, Event: "CLOSE", Since: since}, func(*api.FlowRecord) bool { return true })
	if err != nil {
		return "", err
	}
	s.figures.BytesLog = r.GetBytesToServer() + r.GetBytesToClient()
	if s.figures.BytesLog != s.figures.BytesKernel {
		return "", fmt.Errorf("the kernel counted %d bytes, the log has %d", s.figures.BytesKernel, s.figures.BytesLog)
	}
	return fmt.Sprintf("%d bytes in the kernel and in the log; in the log: %s %s", s.figures.BytesLog, r.GetVerdict(), r.GetReason()), nil
}

func (s *demoStory) uninstalled(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	if err := errors.Join(s.proxy.stop(), s.agent.stop()); err != nil {
		return "", err
	}
	p, err := s.w.spawn("sallyport-agent", "", exec.Command(filepath.Join(s.w.bin, "sallyport-agent"), "uninstall", "--config", s.w.path("agent.yaml")))
	if err != nil {
		return "", err
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		return "", errors.New("uninstall did not end")
	}
	if !p.cmd.ProcessState.Success() {
		return "", fmt.Errorf("uninstall: %s: %s", p.cmd.ProcessState, p.log().tail)
	}
	return "no program, pin or namespace of ours is left", s.left()
}

// left looks for itself: at the devices, the pins and the namespace.
func (s *demoStory) left() error {
	var hooks []string
	if err := s.w.node.do(func() (err error) {
		hooks, err = datapath.Attached(s.w.cgroup)
		return err
	}); err != nil {
		return err
	}
	if len(hooks) > 0 {
		return fmt.Errorf("still attached: %s", strings.Join(hooks, ", "))
	}
	for _, path := range []string{"bpf/sallyport", "run/px"} {
		if _, err := os.Stat(s.w.path(path)); !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("still there: %s (%w)", path, err)
		}
	}
	return nil
}
