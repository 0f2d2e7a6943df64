package e2e_test

import (
	"encoding/json"
	"fmt"
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

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

const postgresPort = 5432

// TestPostgres: an unchanged PostgreSQL and an unchanged psql, which know nothing of identities. psql works through
// `sallyport forward` and over a path, and not otherwise; the database sees the client's own address each time.
func TestPostgres(t *testing.T) {
	leak.Check(t)
	w := newWorld(t, options{resource: postgresResources(t)})
	for _, where := range []*lab.Namespace{w.Node, w.Pod} {
		w.startPostgres(t, where, "-h", "*", "-F")
	}
	for _, d := range []*daemon{w.collector, w.agent, w.guard, w.proxy} {
		d.start(t)
	}
	for service, where := range map[string]*lab.Namespace{"pg-host": w.Node, "pg-pod": w.Pod} {
		for _, f := range lab.Families() {
			t.Run(fmt.Sprintf("%s/%s", service, f), func(t *testing.T) {
				w.database(t, service, f, netip.AddrPortFrom(where.Addr(f), postgresPort))
			})
		}
	}
}

func postgresResources(t *testing.T) string {
	t.Helper()
	return fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: pg-host}
spec:
  target: Host
  ports: [%[1]d]
  access: [{identities: [%[2]q]}]
---
apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: pg-pod}
spec:
  target: Pod
  ports: [%[1]d]
  addresses: ["10.2.0.2", "fd00:2::2"]
  access: [{identities: [%[2]q]}]
---
`, postgresPort, web) + bypassPolicy("pg", "pg-host, pg-pod")
}

// postgresBin is the folder of Debian's newest PostgreSQL.
func postgresBin(t *testing.T) string {
	t.Helper()
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	must(t, err)
	if len(found) == 0 {
		t.Skip("needs PostgreSQL 11 or later: apt-get install postgresql")
	}
	return filepath.Dir(found[len(found)-1])
}

// startPostgres makes a cluster of its own in the lab's directory, and runs it in the namespace as Debian's user. Its socket is in the
// folder that comes back.
func (w *world) startPostgres(t *testing.T, where *lab.Namespace, flags ...string) (*lab.Process, string) {
	t.Helper()
	bin, owner := postgresBin(t), postgresUser(t)
	dir := filepath.Join(w.Dir, "pg-"+where.Name)
	must(t, os.Mkdir(dir, 0o700))
	must(t, os.Chown(dir, int(owner.Uid), int(owner.Gid)))
	data := filepath.Join(dir, "data")
	as := &syscall.SysProcAttr{Credential: owner}
	initdb := exec.Command(filepath.Join(bin, "initdb"), "-D", data, "-A", "trust", "-U", "postgres", "--no-sync", "-E", "UTF8", "--locale=C")
	initdb.Dir, initdb.SysProcAttr = dir, as
	if s := capture(initdb); s.err != nil {
		t.Fatalf("initdb: %s", s)
	}
	must(t, os.WriteFile(filepath.Join(data, "pg_hba.conf"), []byte("local all all trust\nhost all all all trust\n"), 0o600))
	server := exec.Command(filepath.Join(bin, "postgres"), append([]string{"-D", data, "-p", strconv.Itoa(postgresPort), "-k", dir}, flags...)...)
	server.Dir, server.SysProcAttr = dir, &syscall.SysProcAttr{Credential: owner}
	p, err := where.Start(server)
	must(t, err)
	t.Cleanup(func() { must(t, p.Signal(syscall.SIGQUIT)); <-p.Exited() }) // it takes its workers with it
	waitUntil(t, "PostgreSQL in "+where.Name, func() bool {
		return exec.Command(filepath.Join(bin, "pg_isready"), "-h", dir, "-p", strconv.Itoa(postgresPort)).Run() == nil
	})
	return p, dir
}

func postgresUser(t *testing.T) *syscall.Credential {
	t.Helper()
	u, err := user.Lookup("postgres")
	must(t, err)
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	must(t, err)
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	must(t, err)
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
}

// whoAndMuch asks the database whom it sees, and for enough rows to fill many packets.
const whoAndMuch = "SELECT host(inet_client_addr()) UNION ALL SELECT 'row ' || n FROM generate_series(1, 20000) n"

const rows = 20000

// psql runs in the client's namespace. It gives whom the database saw.
func (w *world) psql(t *testing.T, to netip.AddrPort, mode string) (seen string, err error) {
	t.Helper()
	out, err := w.Client.Run(within(t, patience), "psql", "-X", "-A", "-t", "-c", whoAndMuch,
		fmt.Sprintf("host=%s port=%d user=postgres dbname=postgres sslmode=%s connect_timeout=5", to.Addr(), to.Port(), mode))
	if err != nil {
		return "", err
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) != rows+1 || lines[rows] != fmt.Sprintf("row %d", rows) {
		t.Errorf("psql got %d lines, the last %q", len(lines), lines[len(lines)-1])
	}
	return lines[0], nil
}

func (w *world) database(t *testing.T, service string, f lab.Family, at netip.AddrPort) {
	client := w.Client.Addr(f)
	refused := func(when string) {
		t.Helper()
		for _, mode := range []string{"disable", "prefer"} {
			if seen, err := w.psql(t, at, mode); err == nil {
				t.Errorf("%s: psql (sslmode=%s) was answered as %s", when, mode, seen)
			}
		}
	}
	answered := func(when string, to netip.AddrPort) {
		t.Helper()
		if seen, err := w.psql(t, to, "prefer"); err != nil || seen != client.String() {
			t.Errorf("%s: database saw %q, %v; want %s", when, seen, err, client)
		}
	}
	refused("no path")
	stop, local := w.forward(t, at, web)
	answered("forward", local)
	stop()
	stop, local = w.forward(t, at, mallory)
	if seen, err := w.psql(t, local, "disable"); err == nil {
		t.Errorf("forward of an identity that may not come: psql was answered as %s", seen)
	}
	stop()
	g := w.open(t, wanted{service, client, "5m"})
	answered("path", at)
	w.revoke(t, g)
	refused("revoked")
}

// forward runs `sallyport forward` in the client's namespace and gives where it listens.
func (w *world) forward(t *testing.T, to netip.AddrPort, id spiffeid.ID) (stop func(), local netip.AddrPort) {
	t.Helper()
	p, err := w.Client.Start(exec.Command(filepath.Join(w.bin, "sallyport"), "forward", "-o", "json", "--listen", "127.0.0.1:0",
		"--to", to.String(), "--server-id", proxyID.String(), "--workload-api", "unix://"+w.socket(id)))
	must(t, err)
	waitUntil(t, "the tunnel", func() bool {
		out := p.Output()
		i := slices.Index([]byte(out), '\n')
		var ready struct{ Listen netip.AddrPort }
		if i < 0 || json.Unmarshal([]byte(out[:i]), &ready) != nil {
			return false
		}
		local = ready.Listen
		return true
	})
	return func() {
		t.Helper()
		if err := p.Stop(5 * time.Second); err != nil {
			t.Errorf("stop forward: %v\n%s", err, p.Output())
		}
	}, local
}
