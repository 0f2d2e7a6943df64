package px

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

const threadNetns = "/proc/thread-self/ns/net"

// current opens the network namespace of the calling thread.
func current() (*os.File, error) {
	f, err := os.Open(threadNetns)
	if err != nil {
		return nil, fmt.Errorf("open own network namespace: %w", err)
	}
	return f, nil
}

// within runs f on a thread of its own in the given namespace.
func within(ns *os.File, f func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return f()
	})
}

// unshared makes a new network namespace that lives as long as the file or what is pinned of it.
func unshared() (ns *os.File, err error) {
	err = onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make network namespace: %w", err)
		}
		ns, err = current()
		return err
	})
	return ns, err
}

// onThread runs f on a locked thread and takes the thread back to its namespace. A thread that cannot
// go back is never unlocked and ends with its goroutine, so that no other goroutine is ever scheduled in
// the wrong namespace; the first thread of a process cannot end, and would hold on to the namespace.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := current()
		if err != nil {
			runtime.UnlockOSThread()
			done <- err
			return
		}
		defer home.Close()
		err = f()
		if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// openPinned opens the namespace mounted at path. An empty file or none is ErrNotThere.
func openPinned(path string) (*os.File, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("open %s: %w", path, ErrNotThere)
	}
	if err != nil {
		return nil, fmt.Errorf("open namespace file: %w", err)
	}
	if err := isNetns(f); err != nil {
		f.Close()
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return f, nil
}

func isNetns(f *os.File) error {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return fmt.Errorf("stat file system: %w", err)
	}
	if fs.Type != unix.NSFS_MAGIC {
		return emptyFile(f)
	}
	kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE)
	if err != nil {
		return fmt.Errorf("ask kind of namespace: %w", err)
	}
	if kind != unix.CLONE_NEWNET {
		return fmt.Errorf("namespace of another kind: %w", ErrForeign)
	}
	return nil
}

// emptyFile tells a left-over mount point, which may be used again, from a file with content.
func emptyFile(f *os.File) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() || st.Size() > 0 {
		return fmt.Errorf("file in the way: %w", ErrForeign)
	}
	return ErrNotThere
}

// pin bind-mounts the namespace at path.
func pin(ns *os.File, path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o444)
	if err != nil {
		return fmt.Errorf("make namespace file: %w", err)
	}
	f.Close()
	source := fmt.Sprintf("/proc/self/fd/%d", ns.Fd())
	if err := unix.Mount(source, path, "", unix.MS_BIND, ""); err != nil {
		return errors.Join(fmt.Errorf("mount namespace at %s: %w", path, err), os.Remove(path))
	}
	return nil
}

// unpin unmounts what is mounted at path and removes the file. A file with content stays.
func unpin(path string) error {
	f, err := openPinned(path)
	switch {
	case err == nil:
		f.Close()
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	case !errors.Is(err, ErrNotThere):
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove namespace file: %w", err)
	}
	return nil
}
