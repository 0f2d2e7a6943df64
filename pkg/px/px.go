// Package px makes, repairs, enters and removes the private network namespace of the proxy.
//
// The namespace is joined to the host's by one veth pair: px0 in the host namespace, px1 inside.
// Everything that steering needs (rules, routes, sysctls) is inside; the host gets px0 and nothing
// else. "Host" is the network namespace of the thread that calls Create, Open or Remove.
package px

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Names of the two ends of the veth pair.
const (
	HostDevice  = "px0"
	InnerDevice = "px1"
)

// alias marks px0 as ours: a device called px0 without it is never touched.
const alias = "sallyport px"

// Errors that callers match.
var (
	// ErrNotThere is returned by Open when the path holds no namespace (yet).
	ErrNotThere = errors.New("no network namespace there")
	// ErrForeign is returned when a device or a file of the wanted name belongs to somebody else.
	ErrForeign = errors.New("not made by sallyport")
)

// Config says where px is.
type Config struct {
	// Path is the file at which the namespace is bind-mounted. Its folder is made if it is missing.
	Path string
}

// Namespace is an open px. Close frees the handles and removes nothing.
type Namespace struct {
	path string
	host *os.File // network namespace in which px0 is
	px   *os.File
	px0  atomic.Int64
}

// Create makes px, or adopts and repairs what is there; a second call changes nothing. Sockets and
// processes inside an adopted namespace stay as they are. The namespace appears at cfg.Path only
// when it is complete. After an error nothing half-made is left. Errors: ErrForeign.
func Create(cfg Config) (*Namespace, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	n, err := openFiles(cfg.Path)
	fresh := errors.Is(err, ErrNotThere)
	if fresh {
		n, err = newFiles(cfg.Path)
	}
	if err != nil {
		return nil, err
	}
	if err := n.complete(fresh); err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

// complete brings about what is missing of px; a pair that it made does not outlive its failure.
func (n *Namespace) complete(fresh bool) error {
	made, err := n.connect()
	if err != nil {
		return err
	}
	if err = n.each(apply); err != nil {
		err = fmt.Errorf("set up %s: %w", n.path, err)
	} else if fresh {
		err = pin(n.px, n.path)
	}
	if err != nil && made {
		err = errors.Join(err, n.removeLink())
	}
	return err
}

// Open opens the px that Create made. Errors: ErrNotThere, also when px0 is gone.
func Open(path string) (*Namespace, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	n, err := openFiles(path)
	if err != nil {
		return nil, err
	}
	link, err := n.findPx0()
	if err == nil && link == nil {
		err = fmt.Errorf("find %s: %w", HostDevice, ErrNotThere)
	}
	if err != nil {
		n.Close()
		return nil, err
	}
	n.px0.Store(int64(link.Attrs().Index))
	return n, nil
}

// Px0 is the index of px0 in the host namespace.
func (n *Namespace) Px0() int { return int(n.px0.Load()) }

// Path is the file at which the namespace is bind-mounted.
func (n *Namespace) Path() string { return n.path }

// Do runs f inside px, on a thread of its own that ends with f. Sockets and files that f opens stay
// usable outside; goroutines that f starts are not inside px.
func (n *Namespace) Do(f func() error) error { return within(n.px, f) }

// Repair brings about what is missing of px, in the namespace that is open: what runs in it stays. It says
// whether a device or the file was missing; px0 has another index then. Errors: ErrForeign.
func (n *Namespace) Repair() (missing bool, err error) {
	missing, err = n.connect()
	if err != nil {
		return missing, err
	}
	if err := n.each(apply); err != nil {
		return missing, fmt.Errorf("set up %s: %w", n.path, err)
	}
	f, err := openPinned(n.path)
	if errors.Is(err, ErrNotThere) {
		return true, pin(n.px, n.path)
	}
	if err != nil {
		return missing, err
	}
	return missing, f.Close()
}

// Check compares px with what Create makes and tells every difference at once.
func (n *Namespace) Check() error { return n.each(check) }

// Close frees the handles; px stays.
func (n *Namespace) Close() error { return errors.Join(n.host.Close(), n.px.Close()) }

// Remove takes away px0, px1 and the namespace file, and closes n. The namespace itself ends with
// the last process in it. Removing what is already gone is no error.
func (n *Namespace) Remove() error {
	return errors.Join(n.removeLink(), unpin(n.path), n.Close())
}

// Remove takes away whatever of px is there, complete or not. Nothing there is no error.
func Remove(cfg Config) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	host, err := current()
	if err != nil {
		return err
	}
	defer host.Close()
	n := &Namespace{host: host}
	return errors.Join(n.removeLink(), unpin(cfg.Path))
}

// each runs one pass over the recipe: the host's part and the part inside px.
func (n *Namespace) each(pass func([]want) error) error {
	host := within(n.host, func() error { return withHandle(hostRecipe, pass) })
	return errors.Join(host, n.Do(func() error { return withHandle(innerRecipe, pass) }))
}

func withHandle(recipe func(*netlink.Handle) ([]want, error), pass func([]want) error) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink socket: %w", err)
	}
	defer h.Close()
	wants, err := recipe(h)
	if err != nil {
		return err
	}
	return pass(wants)
}

func openFiles(path string) (*Namespace, error) {
	px, err := openPinned(path)
	if err != nil {
		return nil, err
	}
	host, err := current()
	if err != nil {
		px.Close()
		return nil, err
	}
	return &Namespace{path: path, host: host, px: px}, nil
}

func newFiles(path string) (*Namespace, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("make folder of namespace file: %w", err)
	}
	host, err := current()
	if err != nil {
		return nil, err
	}
	px, err := unshared()
	if err != nil {
		host.Close()
		return nil, err
	}
	return &Namespace{path: path, host: host, px: px}, nil
}
