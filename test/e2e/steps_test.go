package e2e_test

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// traceCommand makes the test binary a tracer: it runs a program and kills it right before the n-th of its steps of one
// kind. A step is a system call by which the agent changes what outlives it, or asks for such a change. The program knows
// nothing of it, and what the step would have changed has not been.
const traceCommand = "trace-steps"

// stepPrefix begins the line that the tracer writes for each step.
const stepPrefix = "step: "

// bpfSteps are commands of bpf(2) that change something.
var bpfSteps = map[uint64]string{
	unix.BPF_MAP_CREATE: "map create", unix.BPF_MAP_UPDATE_ELEM: "map update", unix.BPF_MAP_DELETE_ELEM: "map delete",
	unix.BPF_MAP_UPDATE_BATCH: "map update batch", unix.BPF_MAP_DELETE_BATCH: "map delete batch", unix.BPF_MAP_FREEZE: "map freeze",
	unix.BPF_PROG_LOAD: "program load", unix.BPF_OBJ_PIN: "pin", unix.BPF_LINK_CREATE: "link create",
	unix.BPF_LINK_UPDATE: "link update", unix.BPF_LINK_DETACH: "link detach",
}

// otherSteps are the other system calls.
var otherSteps = map[uint64]string{
	unix.SYS_RENAMEAT: "rename", unix.SYS_RENAMEAT2: "rename", unix.SYS_UNLINKAT: "unlink", unix.SYS_MKDIRAT: "mkdir",
	unix.SYS_MOUNT: "mount", unix.SYS_UNSHARE: "unshare", unix.SYS_SETNS: "setns", unix.SYS_SENDTO: "netlink", unix.SYS_FSYNC: "fsync",
	unix.SYS_BIND: "bind",
}

// syscallInfo is struct ptrace_syscall_info at the entry of a system call, where a filter of seccomp stopped it.
type syscallInfo struct {
	op   uint8
	_    [3]byte
	_    uint32 // architecture
	_    [2]uint64
	nr   uint64
	args [6]uint64
}

const (
	ptraceGetSyscallInfo = 0x420e
	stoppedBySeccomp     = 3 // PTRACE_SYSCALL_INFO_SECCOMP
	optionTraceSeccomp   = 0x80
)

// step names the step that a stopped thread is about to make; empty for none.
func step(tid int) string {
	var info syscallInfo
	size := unsafe.Sizeof(info)
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, ptraceGetSyscallInfo, uintptr(tid), size, uintptr(unsafe.Pointer(&info)), 0, 0)
	switch {
	case errno != 0 || info.op != stoppedBySeccomp:
		return ""
	case info.nr == unix.SYS_BPF:
		return bpfSteps[info.args[0]]
	}
	return otherSteps[info.nr]
}

// stopAtSteps has the kernel stop what this thread starts, and only that, at system calls that may be steps: all others
// go on undisturbed. The thread itself must not make such a call any more.
func stopAtSteps() error {
	calls := slices.Sorted(maps.Keys(otherSteps))
	calls = append(calls, unix.SYS_BPF)
	filter := []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS}} // the number of the call
	for i, nr := range calls {
		filter = append(filter, unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: uint32(nr), Jt: uint8(len(calls) - i)})
	}
	filter = append(filter, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_TRACE})
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	return unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program)), 0, 0)
}

// runTracer has the arguments KIND N PROGRAM ARGUMENTS.... Without a kind it only tells the steps.
func runTracer(args []string) int {
	nth, err := strconv.Atoi(args[1])
	if err == nil {
		err = trace(args[0], nth, exec.Command(args[2], args[3:]...))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "trace:", err)
		return 1
	}
	return 0
}

// trace returns when the program has ended.
func trace(kind string, nth int, cmd *exec.Cmd) error {
	runtime.LockOSThread() // all of ptrace is by one thread
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	if err := errors.Join(stopAtSteps(), cmd.Start()); err != nil {
		return err
	}
	leader := cmd.Process.Pid
	var status unix.WaitStatus
	if _, err := unix.Wait4(leader, &status, 0, nil); err != nil {
		return err
	}
	if err := unix.PtraceSetOptions(leader, optionTraceSeccomp|unix.PTRACE_O_TRACECLONE|unix.PTRACE_O_EXITKILL); err != nil {
		return err
	}
	seen := map[string]int{}
	signal := 0
	for tid := leader; ; {
		if err := unix.PtraceCont(tid, signal); err != nil && err != unix.ESRCH {
			return err
		}
		var err error
		for tid, err = unix.Wait4(-1, &status, unix.WALL, nil); err == unix.EINTR; {
			tid, err = unix.Wait4(-1, &status, unix.WALL, nil)
		}
		if err == unix.ECHILD {
			return nil
		}
		if err != nil {
			return err
		}
		if tid == leader && (status.Exited() || status.Signaled()) {
			return nil
		}
		if signal = passOn(status); status.TrapCause() != unix.PTRACE_EVENT_SECCOMP {
			continue
		}
		name := step(tid)
		if name == "" {
			continue
		}
		fmt.Println(stepPrefix + name)
		if seen[name]++; name == kind && seen[name] == nth {
			if err := unix.Kill(leader, unix.SIGKILL); err != nil {
				return err
			}
		}
	}
}

// passOn is the signal that the thread stopped for, and gets; 0 for the tracer's own stops.
func passOn(status unix.WaitStatus) int {
	if !status.Stopped() {
		return 0
	}
	switch s := status.StopSignal(); s {
	case syscall.SIGTRAP, syscall.SIGSTOP:
		return 0
	default:
		return int(s)
	}
}
