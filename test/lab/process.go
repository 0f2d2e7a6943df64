package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

// Process is a program that runs inside a namespace, in a process group of its own. It dies with
// the test process.
type Process struct {
	cmd  *exec.Cmd
	out  output
	done chan struct{}
	err  error // of Wait; read after done is closed
}

// Start runs cmd inside the namespace. Output that cmd does not direct elsewhere is kept (see
// Output). Close of the Lab kills the whole process group.
func (n *Namespace) Start(cmd *exec.Cmd) (*Process, error) { return n.start(cmd, n.Do) }

// start has do bring the thread to where the process is to be born.
func (n *Namespace) start(cmd *exec.Cmd, do func(func() error) error) (*Process, error) {
	p := &Process{cmd: cmd, done: make(chan struct{})}
	if cmd.Stdout == nil {
		cmd.Stdout = &p.out
	}
	if cmd.Stderr == nil {
		cmd.Stderr = &p.out
	}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.WaitDelay = time.Second // a grandchild may hold the output open
	cmd.SysProcAttr.Setpgid = true
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	started := make(chan error, 1)
	// One thread forks and waits: the parent-death signal comes when the forking thread ends, so
	// that thread has to last as long as the child.
	go func() {
		defer close(p.done)
		var once sync.Once
		report := func(err error) { once.Do(func() { started <- err }) }
		err := do(func() error {
			if err := cmd.Start(); err != nil {
				return err
			}
			report(nil)
			p.err = cmd.Wait()
			return nil
		})
		report(err)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s in %s: %w", cmd.Path, n.Name, err)
	}
	n.lab.mu.Lock()
	defer n.lab.mu.Unlock()
	n.lab.procs = append(n.lab.procs, p)
	return p, nil
}

// Run runs a program inside the namespace to its end and returns what it wrote.
func (n *Namespace) Run(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	p, err := n.Start(cmd)
	if err != nil {
		return "", err
	}
	<-p.done
	if p.err != nil {
		return p.Output(), fmt.Errorf("run %s: %w: %s", cmd, p.err, p.Output())
	}
	return p.Output(), nil
}

// Pid is the process id.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Output is what the process has written so far, stdout and stderr together.
func (p *Process) Output() string { return p.out.String() }

// Exited is closed when the process has ended.
func (p *Process) Exited() <-chan struct{} { return p.done }

// Wait waits for the end of the process and returns its error, as exec.Cmd.Wait does.
func (p *Process) Wait(ctx context.Context) error {
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		return fmt.Errorf("wait for pid %d: %w", p.Pid(), ctx.Err())
	}
}

// Signal sends a signal to the process alone. A process that has ended is no error.
func (p *Process) Signal(s syscall.Signal) error {
	err := p.cmd.Process.Signal(s)
	if errors.Is(err, syscall.ESRCH) || p.exited() {
		return nil
	}
	return err
}

// Kill ends the process by SIGKILL and waits until it is gone.
func (p *Process) Kill() error {
	if err := p.Signal(syscall.SIGKILL); err != nil {
		return fmt.Errorf("kill pid %d: %w", p.Pid(), err)
	}
	<-p.done
	return nil
}

// Stop asks the process to end by SIGTERM and returns its error. After grace it kills and says so.
func (p *Process) Stop(grace time.Duration) error {
	if err := p.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop pid %d: %w", p.Pid(), err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	if err := p.Wait(ctx); ctx.Err() != nil && !p.exited() {
		return errors.Join(err, p.end())
	} else if err != nil {
		return err
	}
	return nil
}

// groupGrace is how long the members of a killed group may take to be reaped by whoever inherits them.
const groupGrace = 5 * time.Second

// end kills the whole group, which may outlive its leader, and waits until it is gone.
func (p *Process) end() error {
	group := -p.Pid()
	err := syscall.Kill(group, syscall.SIGKILL)
	<-p.done
	for deadline := time.Now().Add(groupGrace); err == nil; err = syscall.Kill(group, 0) {
		if time.Now().After(deadline) {
			return fmt.Errorf("kill group %d: members are left after %v", p.Pid(), groupGrace)
		}
		time.Sleep(time.Millisecond) // between two looks at the condition
	}
	if errors.Is(err, syscall.ESRCH) {
		return nil
	}
	return fmt.Errorf("kill group %d: %w", p.Pid(), err)
}

func (p *Process) exited() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// output is a buffer for one writer and many readers.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}
