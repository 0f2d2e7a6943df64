package agent

import (
	"errors"
	"io/fs"
	"strings"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/store"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// known are the causes that have a next step of their own.
var known = []struct {
	is   error
	code codes.Code
	hint string
}{
	{store.ErrReplayed, codes.AlreadyExists, "a grant is used once: issue a new one"},
	{store.ErrOther, codes.AlreadyExists, "`sallyport grants` shows that one: issue a new one, which gets an id of its own"},
	{store.ErrForgotten, codes.FailedPrecondition, "issue a new one"},
	{store.ErrFinal, codes.FailedPrecondition, "that is final: ask for a new grant, if it is still needed"},
	{store.ErrStated, codes.AlreadyExists, "nothing is left to do"},
	{store.ErrClockBehind, codes.FailedPrecondition, hintVouch},
	{store.ErrDoubt, codes.FailedPrecondition, "have " + vouching},
	{ErrOverlap, codes.AlreadyExists, "wait for its end, or revoke it first"},
	{ErrNoGrant, codes.NotFound, "`sallyport grants` lists the grants of this node"},
	{store.ErrEnded, codes.AlreadyExists, "nothing is left to do: it has no open path"},
	{ErrMayNotRevoke, codes.FailedPrecondition, "revoke it on the node, have it withdrawn or denied by a signed statement, or have root of the node set spec.collector.mayRevoke: true in the agent's configuration"},
	{ErrStarting, codes.FailedPrecondition, "ask again in a moment"},
	{ErrHeld, codes.Unavailable, "ask again: a stream that broke is noticed within 15 s, and its path is closed then"},
	{ErrTooMany, codes.ResourceExhausted, "ask less often, give back what is not needed, or have spec.automation raised in the agent's configuration"},
	{ErrKept, codes.ResourceExhausted, "give back paths that are not needed"},
	{ErrNoService, codes.NotFound, "`sallyport services` lists the services of this node"},
	{ErrSignalled, codes.FailedPrecondition, "mend what they say, or ask who gave them"},
	{ErrNotBelieved, codes.PermissionDenied, "name the source, and the uid of who speaks for it, in `signals` of a BypassPolicy or of an access rule"},
	{ErrManySignals, codes.ResourceExhausted, "wait until some lapse, or speak of services and networks instead of single grants"},
	{ErrPanic, codes.FailedPrecondition, "ask who called it; root lifts it: `sallyport panic --lift --why TEXT`"},
	{ErrNoPanic, codes.NotFound, "`sallyport status` tells of one that stands"},
	{ErrNotRoot, codes.PermissionDenied, "ask root of this node"},
	{ErrNoResources, codes.FailedPrecondition, "`sallyport status` tells what is wrong with the resources"},
	{datapath.ErrPathsFull, codes.ResourceExhausted, "revoke a grant that is no longer needed"},
	{datapath.ErrPathExists, codes.AlreadyExists, "revoke the grant that serves this client first"},
	{datapath.ErrDeadline, codes.FailedPrecondition, "issue a grant that ends later, and within the node's cap"},
	{store.ErrFull, codes.ResourceExhausted, "make room on the disk of stateDir, or bring the collector back"},
	{store.ErrUnwritable, codes.FailedPrecondition, "see why the disk of stateDir takes nothing (dmesg, mount), and mend that; the agent goes on by itself"},
	{store.ErrDamaged, codes.Internal, "start the agent: it sets the damaged file aside and goes on with what holds; if it cannot, see why the disk of stateDir fails (dmesg), and mend that first"},
	{datapath.ErrBPFFS, codes.FailedPrecondition, "mount bpffs where the host sees it (mount -t bpf bpf /sys/fs/bpf); in a container, mount the host's"},
	{datapath.ErrCgroup, codes.FailedPrecondition, "mount it (mount -t cgroup2 none /sys/fs/cgroup/unified) or boot with systemd.unified_cgroup_hierarchy=1; in a container, share the host's cgroup namespace and mount its /sys/fs/cgroup"},
	{datapath.ErrKernel, codes.FailedPrecondition, "run a kernel that has it: Linux 5.15 or later, 6.6 or later for hooks: tcx"},
	{datapath.ErrOwned, codes.FailedPrecondition, "move the other program to a later priority, or run Linux 6.6 and hooks: tcx"},
	{datapath.ErrNoPrevious, codes.FailedPrecondition, "start the older version: it takes over what is pinned"},
	{datapath.ErrLayout, codes.FailedPrecondition, "run `sallyport-agent uninstall` of the version that made the maps, then start this one"},
	{ErrRunning, codes.FailedPrecondition, "stop it first: systemctl stop sallyport-agent"},
	{ErrUntrusted, codes.FailedPrecondition, "chown root: and chmod go-w it, and look at who wrote it"},
	{unix.EROFS, codes.FailedPrecondition, "mount it read-write, or name another directory in the configuration"},
	{fs.ErrNotExist, codes.FailedPrecondition, "create it, or name another one in the configuration"},
}

const (
	hintVouch = "set the clock right, and if that does not end it, have " + vouching
	vouching  = "somebody with a key of the use resources vouch for the node: `sallyport grant vouch --key KEY --why TEXT`"
)

// Describe tells an error of this package in lines: each problem, and after it "hint: " with its next step.
func Describe(err error) string {
	var lines []string
	for _, e := range policy.Errors(err) {
		lines = append(lines, e.Error())
		if hint := hintOf(e); hint != "" {
			lines = append(lines, "hint: "+hint)
		}
	}
	return strings.Join(lines, "\n")
}

func hintOf(e *policy.Error) string {
	if e.Hint != "" {
		return e.Hint
	}
	return hintFor(e)
}

// hintFor is the next step of a known cause.
func hintFor(err error) string {
	for _, k := range known {
		if errors.Is(err, k.is) {
			return k.hint
		}
	}
	return ""
}

// toStatus makes of an error what a caller sees. A wrong field is the caller's; anything else has the code of its cause.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	return status.Error(codeOf(err), Describe(err))
}

func codeOf(err error) codes.Code {
	for _, e := range policy.Errors(err) {
		if e.Field != "" {
			return codes.InvalidArgument
		}
	}
	for _, k := range known {
		if errors.Is(err, k.is) {
			return k.code
		}
	}
	return codes.Internal
}
