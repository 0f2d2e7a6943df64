package identity

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrEnded tells that the process that was meant is no more.
var ErrEnded = errors.New("workload has ended")

// ErrBecameAnother tells that the process has changed in what it is attested by: program, user or control group.
var ErrBecameAnother = errors.New("workload has changed its program, user or control group")

// Pin holds on to one process, whatever becomes of its number: attestors of SPIRE go by numbers, and a number
// that was asked about can be another's when the answer comes.
type Pin struct {
	pid   int32
	file  *os.File // pidfd
	ended chan struct{}

	mu    sync.Mutex
	facts facts // guarded by mu; as of Pin or the last Renew
}

// facts are what attestation goes by. A process is told from a later one of its number by its start.
type facts struct{ start, cgroup, program, user string }

// NewPin pins the process that has the number now. Close frees it. Errors: ErrEnded.
func NewPin(pid int32) (*Pin, error) {
	if pid <= 0 {
		return nil, fmt.Errorf("pin process %d: no number of a process", pid)
	}
	fd, err := unix.PidfdOpen(int(pid), unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return nil, fmt.Errorf("pin process %d: %w", pid, ErrEnded)
	}
	if err != nil {
		return nil, fmt.Errorf("pin process %d: %w", pid, err)
	}
	p := &Pin{pid: pid, file: os.NewFile(uintptr(fd), "pidfd"), ended: make(chan struct{})}
	if err := p.Renew(); err != nil {
		p.Close()
		return nil, err
	}
	go p.wait()
	return p, nil
}

// wait is woken by the kernel when the process ends, and by Close.
func (p *Pin) wait() {
	defer close(p.ended)
	conn, err := p.file.SyscallConn()
	if err == nil {
		_ = conn.Read(hasEnded)
	}
}

func hasEnded(fd uintptr) bool {
	look := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(look, 0)
	return n > 0 || err != nil && !errors.Is(err, unix.EINTR)
}

// Ended is closed when the process has ended (it may be a zombie yet) or the pin was closed.
func (p *Pin) Ended() <-chan struct{} { return p.ended }

// Close lets the process go.
func (p *Pin) Close() error { return p.file.Close() }

// Check tells whether the number still stands for the process that was pinned, as it was then. What was learnt
// by the number between NewPin and a Check without error is about that process. Errors: ErrEnded, ErrBecameAnother.
func (p *Pin) Check() error {
	now, err := p.look()
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if now != p.facts {
		return fmt.Errorf("process %d: %w", p.pid, ErrBecameAnother)
	}
	return nil
}

// Renew takes the process as what it has become. Errors: ErrEnded.
func (p *Pin) Renew() error {
	now, err := p.look()
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.facts = now
	return nil
}

// look reads what the number stands for, and then makes sure that it was the pinned process all along.
func (p *Pin) look() (facts, error) {
	f, err := readFacts(p.pid)
	alive, dead := p.alive()
	if dead != nil {
		return facts{}, dead
	}
	if !alive {
		return facts{}, fmt.Errorf("process %d: %w", p.pid, ErrEnded)
	}
	return f, err
}

func (p *Pin) alive() (alive bool, err error) {
	conn, err := p.file.SyscallConn()
	if err == nil {
		err = conn.Control(func(fd uintptr) { alive = !hasEnded(fd) })
	}
	if err != nil {
		return false, fmt.Errorf("look at process %d: %w", p.pid, err)
	}
	return alive, nil
}

func readFacts(pid int32) (facts, error) {
	dir := fmt.Sprintf("/proc/%d/", pid)
	stat, err := os.ReadFile(dir + "stat")
	if err != nil {
		return facts{}, fmt.Errorf("look at process %d: %w", pid, err)
	}
	cgroup, err := os.ReadFile(dir + "cgroup")
	if err != nil {
		return facts{}, fmt.Errorf("look at process %d: %w", pid, err)
	}
	status, err := os.ReadFile(dir + "status")
	if err != nil {
		return facts{}, fmt.Errorf("look at process %d: %w", pid, err)
	}
	program, _ := os.Readlink(dir + "exe") // none of a process that is on its way out, or that we may not look into
	return facts{start: startTime(string(stat)), cgroup: string(cgroup), program: program, user: users(string(status))}, nil
}

// startTime is field 22; the name of the program, in brackets, may have anything in it.
func startTime(stat string) string {
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(fields) < 20 {
		return ""
	}
	return fields[19]
}

// users are the lines of a process's users and groups.
func users(status string) string {
	var b strings.Builder
	for line := range strings.Lines(status) {
		if strings.HasPrefix(line, "Uid:") || strings.HasPrefix(line, "Gid:") || strings.HasPrefix(line, "Groups:") {
			b.WriteString(line)
		}
	}
	return b.String()
}
