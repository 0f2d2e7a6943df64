// Package lab builds the network that tests run in: a remote client, a node and its pods, each in
// a network namespace of its own, with instruments that do not depend on Sallyport.
package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
)

// Options choose the shape of a Lab. The zero value is one pod and an uplink of MTU 1500.
type Options struct {
	// Pods is how many pods the node has, 1 to 7. 0 means 1; the second serves as a same-node client.
	Pods int
	// UplinkMTU is the MTU of the link between client and node. 0 means 1500.
	UplinkMTU int
	// Unplugged leaves out all devices but lo until Plug is called, as on a machine that is just starting.
	Unplugged bool
	// Beside is a lab whose client is this one's, too, and forwards between the two nodes: what goes from one to the other
	// passes there. It is to be closed after this one.
	Beside *Lab
}

// Lab is one topology:
//
//	client eth0 ── up0 node vethpod ── eth0 pod
//	                        vethpod2 ── eth0 second pod, if there is one
//	       eth1 ── up0 node of a lab that is beside this one
//
// The node forwards, and has rp_filter=1 on each device. All devices have IPv4 and IPv6 addresses
// from the start, with no duplicate address detection. The namespaces have no names in the file
// system: they are held by descriptors, and vanish with the process, however it ends. The sockets of
// the lab are in a control group of its own, if the machine has such of version 2.
type Lab struct {
	Client *Namespace
	Node   *Namespace
	Pod    *Namespace   // Pods[0]
	Pods   []*Namespace // services or clients behind a veth of the node
	// Dir is a short, host-visible directory for sockets, state and mounts. Close unmounts what is
	// mounted below it and removes it.
	Dir string

	beside *Lab   // of Options
	links  []link // of Plug
	cgroup cgroup

	mu      sync.Mutex // guards closers and procs
	closers []func() error
	procs   []*Process
	once    sync.Once
	closed  error
}

// New builds a Lab and removes it when the test ends. It skips the test when not root. When the
// test has failed, it logs what the processes of the lab wrote.
func New(t testing.TB, o Options) *Lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces (CAP_SYS_ADMIN and CAP_NET_ADMIN)")
	}
	l, err := Build(o)
	if err != nil {
		t.Fatalf("build lab: %v", err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("close lab: %v", err)
		}
		if t.Failed() {
			l.logProcesses(t)
		}
	})
	return l
}

// Build makes a Lab, or leaves nothing behind. The caller closes it.
func Build(o Options) (l *Lab, err error) {
	if o.Pods == 0 {
		o.Pods = 1
	}
	if o.UplinkMTU == 0 {
		o.UplinkMTU = 1500
	}
	if o.Pods < 1 || o.Pods > 7 {
		return nil, fmt.Errorf("build lab: %d pods, want 1 to 7", o.Pods)
	}
	sweep(os.TempDir())
	l = &Lab{}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
			l = nil
		}
	}()
	if l.Dir, err = os.MkdirTemp("", dirPrefix(os.Getpid())); err != nil {
		return l, fmt.Errorf("make directory: %w", err)
	}
	if err := l.newCgroup(); err != nil {
		return l, err
	}
	return l, l.build(o)
}

// Close stops the processes, closes listeners, taps and namespaces, unmounts and removes Dir.
// Calls after the first return the first one's error.
func (l *Lab) Close() error {
	l.once.Do(func() { l.closed = l.close() })
	return l.closed
}

func (l *Lab) close() error {
	l.mu.Lock()
	procs, closers := l.procs, l.closers
	l.closers = nil
	l.mu.Unlock()

	var errs []error
	for _, p := range slices.Backward(procs) {
		errs = append(errs, p.end())
	}
	for _, f := range slices.Backward(closers) {
		errs = append(errs, f())
	}
	if l.Dir != "" {
		errs = append(errs, removeDir(l.Dir))
	}
	return errors.Join(errs...)
}

// onClose has f run by Close, last registered first.
func (l *Lab) onClose(f func() error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closers = append(l.closers, f)
}

func (l *Lab) logProcesses(t testing.TB) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range l.procs {
		t.Logf("output of %s (pid %d):\n%s", filepath.Base(p.cmd.Path), p.Pid(), p.Output())
	}
}
