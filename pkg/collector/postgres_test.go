package collector

import (
	"bytes"
	"database/sql/driver"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
)

// postgres is a server of the test's own, which listens at a socket in its directory.
type postgres struct {
	dir    string
	as     *syscall.SysProcAttr
	server *exec.Cmd
}

// shared is the server of all tests, of which each has a database.
var shared struct {
	sync.Mutex
	*postgres
	databases atomic.Int64
}

// newDatabase makes one, and returns where it is.
func newDatabase(t *testing.T) string {
	t.Helper()
	shared.Lock()
	if shared.postgres == nil {
		shared.postgres = newPostgres(t)
		if err := shared.run(); err != nil {
			t.Fatal(err)
		}
	}
	shared.Unlock()
	name := fmt.Sprint("test", shared.databases.Add(1))
	shared.sql(t, "postgres", "CREATE DATABASE "+name)
	return shared.address(name)
}

func stopShared() {
	if shared.postgres != nil {
		shared.stop(syscall.SIGQUIT)
		os.RemoveAll(shared.dir)
	}
}

func postgresTool(t *testing.T, name string) string {
	t.Helper()
	found := must(filepath.Glob("/usr/lib/postgresql/*/bin/" + name))(t)
	if len(found) == 0 {
		t.Skip("needs PostgreSQL 13 or later: apt-get install postgresql")
	}
	return found[len(found)-1]
}

// newPostgres makes a cluster, and does not run it.
func newPostgres(t *testing.T) *postgres {
	t.Helper()
	initdb := postgresTool(t, "initdb")
	p := &postgres{dir: must(os.MkdirTemp("/tmp", "sallyport-pg-"))(t), as: &syscall.SysProcAttr{}}
	if os.Getuid() == 0 { // the server does not run as root
		u := must(user.Lookup("postgres"))(t)
		uid, gid := must(strconv.Atoi(u.Uid))(t), must(strconv.Atoi(u.Gid))(t)
		p.as.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		if err := os.Chown(p.dir, uid, gid); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(initdb, "-D", p.data(), "-A", "trust", "-U", "postgres", "--no-sync", "-E", "UTF8", "--locale=C")
	cmd.Dir, cmd.SysProcAttr = p.dir, p.as
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v\n%s", err, out)
	}
	return p
}

func (p *postgres) data() string { return filepath.Join(p.dir, "data") }

func (p *postgres) address(name string) string {
	return fmt.Sprintf("host=%s user=postgres dbname=%s", p.dir, name)
}

// run returns when the server answers. After a kill what is left of the one before may take a moment to go.
func (p *postgres) run() error {
	postgres, err := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	if err != nil || len(postgres) == 0 {
		return fmt.Errorf("no server: %w", err)
	}
	var out bytes.Buffer
	for deadline := time.Now().Add(30 * time.Second); ; {
		p.server = exec.Command(postgres[len(postgres)-1], "-D", p.data(), "-k", p.dir, "-F", "-c", "listen_addresses=", "-c", "max_connections=200", "-c", "shared_buffers=16MB")
		p.server.Dir, p.server.SysProcAttr = p.dir, &syscall.SysProcAttr{Credential: p.as.Credential, Pdeathsig: syscall.SIGQUIT} // a test that is killed leaves none behind
		p.server.Stdout, p.server.Stderr = &out, &out
		if err := p.server.Start(); err != nil {
			return err
		}
		ended := make(chan struct{})
		go func() { p.server.Wait(); close(ended) }()
		if p.answers(ended) {
			return nil
		}
		p.stop(syscall.SIGKILL)
		if time.Now().After(deadline) {
			return fmt.Errorf("server does not answer:\n%s", &out)
		}
	}
}

func (p *postgres) answers(ended <-chan struct{}) bool {
	isready := filepath.Join(filepath.Dir(p.server.Path), "pg_isready")
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
		if exec.Command(isready, "-q", "-h", p.dir).Run() == nil {
			return true
		}
		select {
		case <-ended:
			return false
		case <-time.After(20 * time.Millisecond):
		}
	}
	return false
}

// stop ends the server by a signal: it takes its workers with it, but for SIGKILL.
func (p *postgres) stop(s syscall.Signal) {
	p.server.Process.Signal(s)
	for p.server.Process.Signal(syscall.Signal(0)) == nil {
		<-time.After(5 * time.Millisecond)
	}
}

// sql runs statements in a database.
func (p *postgres) sql(t *testing.T, database string, statements ...string) {
	t.Helper()
	conn := must(pgx.Connect(t.Context(), p.address(database)))(t)
	defer conn.Close(t.Context())
	for _, s := range statements {
		if _, err := conn.Exec(t.Context(), s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
}

func sqlConnector(address string) (driver.Connector, error) {
	c, err := pgx.ParseConfig(address)
	if err != nil {
		return nil, err
	}
	return stdlib.GetConnector(*c), nil
}
