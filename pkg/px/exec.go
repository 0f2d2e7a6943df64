package px

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrConfinement is returned by CheckConfined for a process that could do more than it should.
var ErrConfinement = errors.New("process is not confined")

// Command is what Exec turns the process into.
type Command struct {
	Path     string   // namespace file of px
	UID, GID int      // neither may be 0
	Program  string   // file of the program; empty: the calling process' own
	Args     []string // first one is the name of the program
	Env      []string
	// Inside, if it is set, is called inside px before any privilege is given up. What it gives is added to Env.
	Inside func() (env []string, err error)
}

// Exec turns the calling process into a program inside px, as the given user, with CAP_NET_RAW as its
// only capability in every set and no way to gain another. Without a name that is a new run of its own
// executable. It needs root and returns only with an error, after which the process should end.
func Exec(c Command) error {
	if c.UID <= 0 || c.GID <= 0 {
		return fmt.Errorf("confine to uid %d, gid %d: neither may be 0", c.UID, c.GID)
	}
	ns, err := openPinned(c.Path)
	if err != nil {
		return err
	}
	defer ns.Close()
	return onThread(func() error { // exec makes this one thread the whole process
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter %s: %w", c.Path, err)
		}
		env, err := c.environment()
		if err != nil {
			return err
		}
		if err := confine(c.UID, c.GID); err != nil {
			return err
		}
		// By this link the folders above the own executable need not be open to the user.
		program := cmp.Or(c.Program, "/proc/self/exe")
		err = syscall.Exec(program, c.Args, env)
		return fmt.Errorf("execute %s as uid %d: %w", program, c.UID, err)
	})
}

func (c Command) environment() ([]string, error) {
	if c.Inside == nil {
		return c.Env, nil
	}
	more, err := c.Inside()
	return slices.Concat(c.Env, more), err
}

// confine changes the calling thread alone: everything is a raw system call.
func confine(uid, gid int) error {
	steps := []struct {
		what string
		do   func() error
	}{
		{"reduce bounding set", dropBounding},
		{"set securebits", setSecurebits},
		{"drop groups", func() error { return raw(unix.SYS_SETGROUPS, 0, 0, 0) }},
		{"set gid", func() error { return raw(unix.SYS_SETRESGID, gid, gid, gid) }},
		{"set uid", func() error { return raw(unix.SYS_SETRESUID, uid, uid, uid) }},
		{"set capabilities", setCapabilities},
		{"clear ambient set", func() error { return prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0) }},
		{"raise ambient capability", func() error {
			return prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, unix.CAP_NET_RAW)
		}},
		{"set no_new_privs", func() error { return prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0) }},
	}
	for _, s := range steps {
		if err := s.do(); err != nil {
			return fmt.Errorf("%s: %w", s.what, err)
		}
	}
	return nil
}

func dropBounding() error {
	for c := 0; ; c++ {
		if c == unix.CAP_NET_RAW {
			continue
		}
		err := prctl(unix.PR_CAPBSET_DROP, c, 0)
		if errors.Is(err, unix.EINVAL) && c > unix.CAP_BLOCK_SUSPEND {
			return nil // beyond the last that this kernel knows
		}
		if err != nil {
			return err
		}
	}
}

// Securebits of linux/securebits.h: uid 0 means nothing, and changing the uid keeps capabilities
// for setCapabilities to reduce. Each is locked.
const (
	secbitNoRoot              = 1<<0 | 1<<1
	secbitNoSetuidFixup       = 1<<2 | 1<<3
	secbitKeepCapsLocked      = 1 << 5
	securebits           uint = secbitNoRoot | secbitNoSetuidFixup | secbitKeepCapsLocked
)

func setSecurebits() error { return prctl(unix.PR_SET_SECUREBITS, int(securebits), 0) }

func setCapabilities() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	const only = 1 << unix.CAP_NET_RAW
	data := [2]unix.CapUserData{{Effective: only, Permitted: only, Inheritable: only}}
	_, _, errno := unix.RawSyscall(unix.SYS_CAPSET,
		uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&data)), 0)
	return errnoErr(errno)
}

func prctl(option, a, b int) error { return raw(unix.SYS_PRCTL, option, a, b) }

func raw(number uintptr, a, b, c int) error {
	_, _, errno := unix.RawSyscall6(number, uintptr(a), uintptr(b), uintptr(c), 0, 0, 0)
	return errnoErr(errno)
}

func errnoErr(errno syscall.Errno) error {
	if errno != 0 {
		return errno
	}
	return nil
}

// CheckConfined tells everything in which the calling process, after Exec, is less confined than
// it must be: it has another capability than CAP_NET_RAW in any set, could gain one, or is root.
func CheckConfined() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	data, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		return fmt.Errorf("read own status: %w", err)
	}
	return confined(string(data))
}

func confined(status string) error {
	netRaw := strconv.FormatUint(1<<unix.CAP_NET_RAW, 16)
	want := map[string]string{
		"CapInh": netRaw, "CapPrm": netRaw, "CapEff": netRaw, "CapBnd": netRaw, "CapAmb": netRaw,
		"NoNewPrivs": "1", "Groups": "",
	}
	var errs []error
	for line := range strings.Lines(status) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		value = strings.TrimSpace(value)
		if key == "Uid" || key == "Gid" {
			errs = append(errs, notRoot(key, value))
		}
		expected, checked := want[key]
		if !checked {
			continue
		}
		delete(want, key)
		if strings.HasPrefix(key, "Cap") {
			value = strings.TrimLeft(value, "0")
		}
		if value != expected {
			errs = append(errs, fmt.Errorf("%w: %s is %q, want %q", ErrConfinement, key, value, expected))
		}
	}
	for key := range want {
		errs = append(errs, fmt.Errorf("%w: %s is not told", ErrConfinement, key))
	}
	return errors.Join(errs...)
}

func notRoot(key, ids string) error {
	for id := range strings.FieldsSeq(ids) {
		if id == "0" {
			return fmt.Errorf("%w: %s is %q", ErrConfinement, key, ids)
		}
	}
	return nil
}

// CheckInside tells whether the calling process is in the px at path. Errors: ErrNotThere when px
// is gone or another one is there now.
func CheckInside(path string) error {
	var own, px unix.Stat_t
	if err := unix.Stat(threadNetns, &own); err != nil {
		return fmt.Errorf("look at own network namespace: %w", err)
	}
	if err := unix.Stat(path, &px); err != nil {
		return fmt.Errorf("look at %s: %w: %w", path, ErrNotThere, err)
	}
	if own.Dev != px.Dev || own.Ino != px.Ino {
		return fmt.Errorf("%s is another namespace than this process has: %w", path, ErrNotThere)
	}
	return nil
}
