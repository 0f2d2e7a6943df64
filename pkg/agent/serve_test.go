package agent

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// callerEnv makes the test binary a client of the socket that it names.
const callerEnv = "SALLYPORT_TEST_CALL"

func TestMain(m *testing.M) {
	// A thread that entered a namespace ends with its goroutine; the main thread cannot end, and would stay there.
	runtime.LockOSThread()
	if socket := os.Getenv(callerEnv); socket != "" {
		fmt.Println(callStatus(context.Background(), socket))
		return
	}
	if command := os.Getenv(agentEnv); command != "" {
		os.Exit(runAgentProcess(command))
	}
	os.Exit(m.Run())
}

// whoami answers with what the server knows of the caller.
type whoami struct{ api.UnimplementedAgentServer }

func (whoami) Status(ctx context.Context, _ *api.StatusRequest) (*api.StatusReply, error) {
	return &api.StatusReply{Node: caller(ctx)}, nil
}

func callStatus(ctx context.Context, socket string) string {
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err.Error()
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	reply, err := api.NewAgentClient(conn).Status(ctx, &api.StatusRequest{})
	if err != nil {
		return status.Code(err).String()
	}
	return reply.Node
}

// callAs makes the call as another user, in a process of its own.
func callAs(t *testing.T, socket string, uid, gid uint32, groups ...uint32) string {
	t.Helper()
	self, err := os.Open("/proc/self/exe")
	must(t, err)
	defer self.Close()
	cmd := exec.CommandContext(t.Context(), "/proc/self/fd/3")
	cmd.ExtraFiles = []*os.File{self}
	cmd.Env = []string{callerEnv + "=" + socket}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid, Groups: groups}}
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("call as %d: %v", uid, err)
	}
	return string(out[:len(out)-1])
}

func TestPeerCredentialsDecide(t *testing.T) {
	dir, err := os.MkdirTemp("/tmp", "sallyport-agent-*") // t.TempDir() is closed to other users
	must(t, err)
	defer os.RemoveAll(dir)
	must(t, os.Chmod(dir, 0o755))
	path := filepath.Join(dir, "agent.sock")
	must(t, os.WriteFile(path, nil, 0o600)) // as a dead agent leaves it
	ep, err := newEndpoint(path, callers{uids: []uint32{0, 4001}, gids: []uint32{5005}},
		func(r grpc.ServiceRegistrar) { api.RegisterAgentServer(r, whoami{}) })
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- ep.Run(ctx) }()
	for _, c := range []struct {
		name     string
		uid, gid uint32
		groups   []uint32
		want     string
	}{
		{"operator by uid", 4001, 4001, nil, "uid:4001"},
		{"operator by group", 4002, 5005, nil, "uid:4002"},
		{"operator by supplementary group", 4003, 4003, []uint32{7, 5005}, "uid:4003"},
		{"nobody", 4004, 4004, []uint32{7}, codes.Unavailable.String()},
	} {
		if got := callAs(t, path, c.uid, c.gid, c.groups...); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
	if got := callStatus(ctx, path); got != "uid:0" {
		t.Errorf("root: %s", got)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("socket is left: %v", err)
	}
}

func TestFence(t *testing.T) {
	for _, c := range []struct {
		allow callers
		mode  os.FileMode
		owner uint32
	}{
		{callers{uids: []uint32{0}}, 0o600, 0},
		{callers{uids: []uint32{65532}}, 0o600, 65532},
		{callers{uids: []uint32{0, 1000}}, 0o666, 0},
		{callers{uids: []uint32{0}, gids: []uint32{10}}, 0o666, 0},
	} {
		path := filepath.Join(t.TempDir(), "sock")
		must(t, os.WriteFile(path, nil, 0o644))
		must(t, fence(path, c.allow))
		info, err := os.Stat(path)
		must(t, err)
		if owner := info.Sys().(*syscall.Stat_t).Uid; info.Mode().Perm() != c.mode || owner != c.owner {
			t.Errorf("%+v: %04o owner %d", c.allow, info.Mode().Perm(), owner)
		}
	}
}
