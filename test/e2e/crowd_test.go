package e2e_test

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/identity"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// crowdCommand makes the test binary a crowd of workloads: each has an address and a connection of its own, and holds a path
// until the process is ended. Its arguments are the socket of the Workload API, the agent's address and how many they are.
const crowdCommand = "hold-paths"

// crowdOpen is what the crowd says when all of its paths are open.
const crowdOpen = "open"

// holdPaths has a process beside this one hold paths from then on. It gives way to everyone else on the machine: the crowd
// stands for other machines, whose work is not the agent's.
func (w *world) holdPaths(t *testing.T, n int) {
	t.Helper()
	w.routeCrowd(t)
	self, err := os.Executable()
	must(t, err)
	said, says, err := os.Pipe()
	must(t, err)
	defer said.Close()
	cmd := exec.Command(self, crowdCommand, w.socket(nightly), w.automationAt().String(), strconv.Itoa(n))
	cmd.Stdout = says
	crowd, err := w.Client.Start(cmd)
	must(t, err)
	must(t, says.Close())
	if lines := bufio.NewScanner(said); !lines.Scan() || lines.Text() != crowdOpen {
		t.Fatalf("the crowd did not open its paths: %s", crowd.Output())
	}
	must(t, unix.Setpriority(unix.PRIO_PGRP, crowd.Pid(), 19))
}

// automationAt is where the agent takes requests of workloads.
func (w *world) automationAt() netip.AddrPort { return netip.AddrPortFrom(w.Node.Addr(lab.IPv4), 9470) }

// routeCrowd gives the client the addresses of all members.
func (w *world) routeCrowd(t *testing.T) {
	t.Helper()
	_, behind, _ := net.ParseCIDR("10.64.0.0/12")
	lo, err := w.Client.Netlink.LinkByName("lo")
	must(t, err)
	must(t, w.Client.Netlink.LinkSetUp(lo))
	must(t, w.Client.Netlink.RouteAdd(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: behind, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: unix.RT_SCOPE_HOST}))
	must(t, w.Node.Netlink.RouteAdd(&netlink.Route{Dst: behind, Gw: w.Client.Addr(lab.IPv4).AsSlice()}))
}

// member is the i-th of the crowd, in this process.
func (w *world) member(t *testing.T, i int) *member {
	t.Helper()
	source, err := crowdIdentity(w.socket(nightly))
	must(t, err)
	background(t, source.Run)
	must(t, source.Wait(within(t, patience)))
	m, err := connectMember(t.Context(), source, w.automationAt(), func(ctx context.Context) (net.Conn, error) {
		return w.Client.Dial(ctx, memberAt(i), w.automationAt())
	})
	must(t, err)
	t.Cleanup(func() { must(t, m.conn.Close()) })
	return m
}

func crowdIdentity(socket string) (*identity.Source, error) {
	return identity.New(identity.Config{Address: "unix://" + socket, MinRetry: 10 * time.Millisecond})
}

// memberAt is the address of the i-th.
func memberAt(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(64 + i>>16), byte(i >> 8), byte(i)}), 0)
}

// runCrowd is what the test binary does as a crowd.
func runCrowd(args []string) int {
	if err := crowd(context.Background(), args[0], netip.MustParseAddrPort(args[1]), args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "crowd:", err)
		return 1
	}
	fmt.Println(crowdOpen)
	select {} // until it is killed
}

func crowd(ctx context.Context, socket string, agent netip.AddrPort, count string) error {
	n, err := strconv.Atoi(count)
	if err != nil {
		return err
	}
	source, err := crowdIdentity(socket)
	if err != nil {
		return err
	}
	go func() { _ = source.Run(ctx) }()
	if err := source.Wait(ctx); err != nil {
		return err
	}
	var all errgroup.Group
	all.SetLimit(32)
	for i := range n {
		all.Go(func() error {
			m, err := connectMember(ctx, source, agent, func(ctx context.Context) (net.Conn, error) {
				from := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(memberAt(i))}
				return from.DialContext(ctx, "tcp", agent.String())
			})
			if err == nil {
				_, err = m.open(ctx)
			}
			if err != nil {
				return fmt.Errorf("path %d: %w", i, err)
			}
			return nil
		})
	}
	return all.Wait()
}

// member is one workload with its connection.
type member struct {
	conn *grpc.ClientConn
	rpc  api.AutomationClient
}

// connectMember returns after the handshake.
func connectMember(ctx context.Context, source *identity.Source, to netip.AddrPort, dial func(context.Context) (net.Conn, error)) (*member, error) {
	agent := spiffeid.RequireFromPath(domain, "/sallyport/agent/"+nodeName)
	conn, err := grpc.NewClient("passthrough:///"+to.String(),
		grpc.WithTransportCredentials(credentials.NewTLS(tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(agent)))),
		grpc.WithReadBufferSize(1<<10), grpc.WithWriteBufferSize(1<<10),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return dial(ctx) }))
	if err != nil {
		return nil, err
	}
	conn.Connect()
	for state := conn.GetState(); state != connectivity.Ready; state = conn.GetState() {
		if !conn.WaitForStateChange(ctx, state) {
			_ = conn.Close()
			return nil, ctx.Err()
		}
	}
	return &member{conn, api.NewAutomationClient(conn)}, nil
}

func (m *member) open(ctx context.Context) (api.Automation_HoldClient, error) {
	stream, err := m.rpc.Hold(ctx)
	if err != nil {
		return nil, err
	}
	err = stream.Send(&api.HoldRequest{Want: &api.HoldRequest_Path{Path: &api.PathRequest{Service: "host-echo",
		Duration: durationpb.New(10 * time.Minute), Reason: "measured"}}})
	if err != nil {
		return nil, err
	}
	_, err = stream.Recv()
	return stream, err
}

func (m *member) close(stream api.Automation_HoldClient) error {
	if err := stream.CloseSend(); err != nil {
		return err
	}
	if _, err := stream.Recv(); err == nil {
		return fmt.Errorf("another word after the path was given back")
	}
	return nil
}
