package inventory_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/inventory"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// TestInventory has it find PostgreSQL and sshd of the node, Redis and nginx in pods, and who talks to them: a client that stays from
// another machine, one of the node, one of a pod, and one that has gone already.
func TestInventory(t *testing.T) {
	w := newWorld(t)
	w.startPostgres(t)
	w.startSSH(t)
	w.start(t, w.Pods[0], 6379, "redis-server", "--port", "6379", "--protected-mode", "no", "--save", "", "--dir", w.Dir)
	w.startNginx(t)
	hidden, err := w.Pods[0].Listen(netip.MustParseAddrPort("127.0.0.1:6390"))
	must(t, err)
	defer hidden.Close()
	datagrams := w.listenUDP(t, 4500)
	defer datagrams.Close()

	host, redis, nginx := w.Node.Addr(lab.IPv4), w.Pods[0].Addr(lab.IPv4), w.Pods[1].Addr(lab.IPv6)
	w.client(t, w.Client, "psql", fmt.Sprintf("host=%s user=postgres dbname=postgres sslmode=disable", host), "-c", "SELECT pg_sleep(600)")
	w.client(t, w.Node, "redis-cli", "-h", redis.String(), "MONITOR")
	ssh, err := w.Pods[1].Dial(t.Context(), netip.AddrPort{}, netip.AddrPortFrom(w.Node.Addr(lab.IPv6), 22))
	must(t, err)
	defer ssh.Close()
	_, err = w.Client.Run(t.Context(), "curl", "-sS", "-o", "/dev/null", fmt.Sprintf("http://[%s]:8080/", nginx))
	must(t, err)

	found := w.lookUntil(t, func(v *inventory.Inventory) bool {
		return len(v.Listeners) > 0 && len(w.at(v, 5432).Clients) > 0 && len(w.at(v, 6379).Clients) > 0
	})
	self := filepath.Base(os.Args[0])
	for _, want := range []struct {
		port    uint16
		where   inventory.Where
		kind    inventory.Kind
		user    string
		client  netip.Addr
		process string // of the client; empty: it has gone
	}{
		{5432, inventory.Host, inventory.PostgreSQL, "postgres", w.Client.Addr(lab.IPv4), "psql"},
		{22, inventory.Host, inventory.SSH, "root", w.Pods[1].Addr(lab.IPv6), self},
		{6379, inventory.Pod, inventory.Redis, "root", netip.Addr{}, "redis-cli"},
		{8080, inventory.Pod, inventory.HTTP, "root", w.Client.Addr(lab.IPv6), ""},
	} {
		l := w.at(found, want.port)
		if l.Where != want.where || l.Kind != want.kind || l.Process.User != want.user || l.Process.PID == 0 {
			t.Errorf("port %d: %+v", want.port, l)
		}
		if len(l.Clients) != 1 {
			t.Errorf("port %d: clients %+v, want one", want.port, l.Clients)
			continue
		}
		c := l.Clients[0]
		if want.client.IsValid() && c.Address != want.client || c.Connections != 1 {
			t.Errorf("port %d: client %+v, want %s once", want.port, c, want.client)
		}
		if (c.Process == nil) != (want.process == "") || c.Process != nil && !isProgram(c.Process.Name, want.process) {
			t.Errorf("port %d: client's process %+v, want %q", want.port, c.Process, want.process)
		}
	}
	w.checkCautions(t, found)
	w.checkProposals(t, found)
}

// isProgram knows what Debian runs for a name: psql is a script of Perl's that becomes the real one, redis-cli a program.
func isProgram(have, want string) bool { return have == want || strings.HasPrefix(have, want) }

func (w *world) checkCautions(t *testing.T, v *inventory.Inventory) {
	t.Helper()
	for port, words := range map[uint16]string{
		5432: ".s.PGSQL.5432", 6390: "loopback only", 4500: "nothing proves who sends", 22: "usual way onto the machine",
	} {
		if all := strings.Join(w.at(v, port).Cautions, "\n"); !strings.Contains(all, words) {
			t.Errorf("port %d: nothing about %q in %q", port, words, all)
		}
	}
}

// checkProposals holds that the policy's own reader takes them, that they close nothing and open nothing, and that each says whom it
// would deny.
func (w *world) checkProposals(t *testing.T, v *inventory.Inventory) {
	t.Helper()
	v.LeaveOut(inventory.Apart)
	dir := t.TempDir()
	denied := map[uint16]int{}
	for _, p := range v.Propose(policy.ModeObserve) {
		data, err := p.Document(time.Now(), v.Looked)
		must(t, err)
		must(t, os.WriteFile(filepath.Join(dir, p.Name+".yaml"), data, 0o644))
		for _, port := range p.Service.Spec.Ports {
			denied[port] = len(p.Denied)
		}
		for _, c := range p.Denied {
			if !strings.Contains(string(data), c.Address.String()) {
				t.Errorf("%s does not tell of %s:\n%s", p.Name, c.Address, data)
			}
		}
	}
	set, err := policy.LoadDir(dir)
	must(t, err)
	have := map[string]policy.ProtectedServiceSpec{}
	for _, s := range set.Services() {
		have[s.Name] = s.Spec
		if s.Spec.Mode != policy.ModeObserve || len(s.Spec.Access) > 0 {
			t.Errorf("%s is proposed as %+v", s.Name, s.Spec)
		}
	}
	redis := w.Pods[0].Addr(lab.IPv4)
	if got := have["pod-redis-6379"]; got.Target != policy.TargetPod || !slices.Contains(got.Addresses, redis) {
		t.Errorf("Redis is proposed as %+v, want it in the pod at %s", got, redis)
	}
	if got := have["pod-nginx-8080"]; !slices.Equal(got.Ports, []uint16{8080, 8081}) {
		t.Errorf("nginx is proposed as %+v, want both of its ports", got)
	}
	for _, port := range []uint16{5432, 22, 6379, 8080} {
		if denied[port] != 1 {
			t.Errorf("port %d: %d clients would have been denied, want 1", port, denied[port])
		}
	}
	for _, port := range []uint16{6390, 4500} {
		if _, ok := denied[port]; ok {
			t.Errorf("port %d is proposed, and cannot be protected like that", port)
		}
	}
}

type world struct{ *lab.Lab }

func newWorld(t *testing.T) *world { return &world{lab.New(t, lab.Options{Pods: 2})} }

// look takes the inventory from the node, as the command does.
func (w *world) look(t *testing.T) (v *inventory.Inventory) {
	t.Helper()
	must(t, w.Node.Do(func() (err error) {
		v, err = inventory.Look(t.Context(), inventory.Config{})
		return err
	}))
	return v
}

// lookUntil waits for what other processes do.
func (w *world) lookUntil(t *testing.T, done func(*inventory.Inventory) bool) *inventory.Inventory {
	t.Helper()
	for end := time.Now().Add(patience); ; {
		v := w.look(t)
		if done(v) {
			return v
		}
		if time.Now().After(end) {
			t.Fatalf("waited %v for clients; have %+v", patience, v)
		}
	}
}

// at is the only listener at a port in this lab.
func (w *world) at(v *inventory.Inventory, port uint16) inventory.Listener {
	for _, l := range v.Listeners {
		if l.Port == port && l.Where != inventory.Apart {
			return l
		}
	}
	return inventory.Listener{}
}

// start runs a server and waits until its port is taken.
func (w *world) start(t *testing.T, where *lab.Namespace, port uint16, program string, args ...string) {
	t.Helper()
	w.await(t, where, port, exec.Command(program, args...))
}

func (w *world) await(t *testing.T, where *lab.Namespace, port uint16, cmd *exec.Cmd) {
	t.Helper()
	p, err := where.Start(cmd)
	must(t, err)
	for end := time.Now().Add(patience); ; {
		if l := w.at(w.look(t), port); l.Port == port {
			return
		}
		select {
		case <-p.Exited():
			t.Fatalf("%s ended:\n%s", cmd, p.Output())
		default:
		}
		if time.Now().After(end) {
			t.Fatalf("waited %v for %s:\n%s", patience, cmd, p.Output())
		}
	}
}

// client runs a program that stays connected.
func (w *world) client(t *testing.T, where *lab.Namespace, program string, args ...string) {
	t.Helper()
	_, err := where.Start(exec.Command(program, args...))
	must(t, err)
}

func (w *world) listenUDP(t *testing.T, port uint16) (c net.PacketConn) {
	t.Helper()
	must(t, w.Node.Do(func() (err error) {
		c, err = (&net.ListenConfig{}).ListenPacket(context.Background(), "udp4", fmt.Sprintf(":%d", port))
		return err
	}))
	return c
}

func (w *world) startPostgres(t *testing.T) {
	t.Helper()
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	must(t, err)
	if len(found) == 0 {
		t.Fatal("needs PostgreSQL: go run ./tools/needs test")
	}
	bin := filepath.Dir(found[len(found)-1])
	must(t, os.Chmod(w.Dir, 0o755)) // its user goes through
	dir := filepath.Join(w.Dir, "pg")
	must(t, os.Mkdir(dir, 0o700))
	u, err := user.Lookup("postgres")
	must(t, err)
	uid, _ := strconv.Atoi(u.Uid)
	gid, _ := strconv.Atoi(u.Gid)
	must(t, os.Chown(dir, uid, gid))
	as := func(program string, args ...string) *exec.Cmd {
		cmd := exec.Command(filepath.Join(bin, program), args...)
		cmd.Dir, cmd.SysProcAttr = dir, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
		return cmd
	}
	data := filepath.Join(dir, "data")
	if out, err := as("initdb", "-D", data, "-A", "trust", "-U", "postgres", "--no-sync", "-E", "UTF8", "--locale=C").CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v\n%s", err, out)
	}
	must(t, os.WriteFile(filepath.Join(data, "pg_hba.conf"), []byte("host all all all trust\n"), 0o600))
	w.await(t, w.Node, 5432, as("postgres", "-D", data, "-k", dir, "-c", "listen_addresses=*"))
}

func (w *world) startSSH(t *testing.T) {
	t.Helper()
	if err := os.Mkdir("/run/sshd", 0o755); err != nil && !os.IsExist(err) { // its package makes it at boot; other tests want it too
		t.Fatal(err)
	}
	key := filepath.Join(w.Dir, "ssh-host")
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen: %v\n%s", err, out)
	}
	w.start(t, w.Node, 22, "/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", "-h", key, "-o", "PidFile=none", "-o", "LoginGraceTime=0")
}

const nginxConfig = `pid %[1]s/nginx.pid;
error_log stderr;
daemon off;
worker_processes 2;
events {}
http {
  access_log off;
  client_body_temp_path %[1]s; proxy_temp_path %[1]s; fastcgi_temp_path %[1]s; uwsgi_temp_path %[1]s; scgi_temp_path %[1]s;
  server {
    listen 8080; listen [::]:8080 ipv6only=on; listen 8081;
    return 200 "here\n";
  }
}
`

func (w *world) startNginx(t *testing.T) {
	t.Helper()
	dir := filepath.Join(w.Dir, "nginx")
	must(t, os.Mkdir(dir, 0o755))
	file := filepath.Join(dir, "nginx.conf")
	must(t, os.WriteFile(file, fmt.Appendf(nil, nginxConfig, dir), 0o644))
	w.start(t, w.Pods[1], 8080, "/usr/sbin/nginx", "-e", "stderr", "-c", file)
}

const patience = 30 * time.Second

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
