package inventory

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
)

// checkers are programs that look after services by connecting to them. They prove no identity.
var checkers = []string{"kubelet", "haproxy", "keepalived", "consul", "envoy", "prometheus", "blackbox_exporter", "monit"}

// cautions says what about a listener cannot be protected, or has to be thought of before it is. sockets are the unix
// sockets of the same process.
func cautions(l Listener, sockets []string) []string {
	var all []string
	add := func(format string, args ...any) { all = append(all, fmt.Sprintf(format, args...)) }
	switch {
	case l.Where == Apart:
		add("no device of the node leads into its network namespace: nothing of this node can protect it")
	case l.loopbackOnly() && l.Where == Pod:
		add("it listens on loopback only: a pod's own loopback meets no hook of the node")
	case l.loopbackOnly():
		add("it listens on loopback only: protecting it is about processes of this node, and all of them then need the proxy")
	case l.Where == Pod && len(l.Reach) == 0:
		add("its network namespace has no address by which others reach it")
	}
	if l.Protocol == UDP {
		add("nothing proves who sends a datagram: as a UDP service it is reached under a grant's path or not at all")
	}
	for _, path := range sockets {
		add("the same process is reached by unix socket %q: no hook sees that, file permissions alone guard it", path)
	}
	if l.Kind == SSH {
		add("enforced, it closes the usual way onto the machine: have another one, and try `sallyport connect` first")
	}
	if l.Process.PID == 0 && l.Protocol == TCP {
		add("no process was found that has the socket: the kernel's own, or of another PID namespace")
	}
	return append(all, checked(l.Clients)...)
}

// checked names clients that look like health checks.
func checked(clients []Client) []string {
	var all []string
	for _, c := range clients {
		if !slices.Contains(checkers, c.name()) {
			continue
		}
		says := fmt.Sprintf("%s of this node connects to it: a health check would be denied, it proves no identity", c.name())
		if c.name() == "kubelet" {
			says = "kubelet of this node connects to it: before Enforce, have its probe run in the pod (exec), or try another port"
		}
		if !slices.Contains(all, says) {
			all = append(all, says)
		}
	}
	return all
}

// unixListeners finds where the processes of listeners also wait: paths by PID.
func unixListeners(listeners map[listenerKey]*found) map[int32][]string {
	paths := map[int32][]string{}
	tables := map[uint64]map[uint64]string{}
	for _, f := range listeners {
		pid := f.Process.PID
		if pid == 0 || f.Kind == Unknown || paths[pid] != nil { // of others it would be noise
			continue
		}
		if tables[f.Namespace] == nil {
			text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/unix", pid))
			if err != nil {
				continue // it ended
			}
			tables[f.Namespace] = waitingUnix(string(text))
		}
		paths[pid] = unixOf(pid, tables[f.Namespace])
	}
	return paths
}

// waitingUnix reads the listeners of /proc/net/unix (proc(5)): their paths by inode. Paths with an @ are of the abstract space.
func waitingUnix(table string) map[uint64]string {
	const acceptsConnections = 1 << 16
	found := map[uint64]string{}
	for line := range strings.Lines(table) {
		fields := strings.SplitN(strings.Join(strings.Fields(line), " "), " ", 8)
		if len(fields) < 8 {
			continue
		}
		flags, err := strconv.ParseUint(fields[3], 16, 64)
		inode, err2 := strconv.ParseUint(fields[6], 10, 64)
		if err == nil && err2 == nil && flags&acceptsConnections != 0 {
			found[inode] = fields[7]
		}
	}
	return found
}

func unixOf(pid int32, waiting map[uint64]string) []string {
	paths := []string{}
	files, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid)) // who ended has none
	for _, f := range files {
		name, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, f.Name()))
		inode, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimPrefix(name, "socket:["), "]"), 10, 64)
		if path := waiting[inode]; err == nil && path != "" && !slices.Contains(paths, path) {
			paths = append(paths, path)
		}
	}
	slices.Sort(paths)
	return paths
}
