package datapath

import (
	"bufio"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// errNoNamespace says that no mount and no process shows the network namespace at a device's other end.
var errNoNamespace = errors.New("the namespace behind it was not found")

// namespaceBehind opens the network namespace that the other end of a device is in. The caller closes it; it is
// looked for each time, because one that is held open would outlive its pod.
func namespaceBehind(ifindex int) (netns.NsHandle, error) {
	dev, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		return netns.None(), fmt.Errorf("find device %d: %w", ifindex, err)
	}
	id := dev.Attrs().NetNsID
	if id < 0 {
		return netns.None(), fmt.Errorf("%s: %w", dev.Attrs().Name, errNoNamespace)
	}
	for file := range namespaceFiles() {
		ns, err := netns.GetFromPath(file)
		if err != nil {
			continue // it ended, or is not ours to open
		}
		if have, err := netlink.GetNetNsIdByFd(int(ns)); err == nil && have == id {
			return ns, nil
		}
		_ = ns.Close()
	}
	return netns.None(), fmt.Errorf("%s: %w", dev.Attrs().Name, errNoNamespace)
}

// namespaceFiles are the files of network namespaces that this process can see: those that a mount keeps, as
// container runtimes do, and then those of processes.
func namespaceFiles() iter.Seq[string] {
	return func(yield func(string) bool) {
		for _, file := range mountedNamespaces() {
			if !yield(file) {
				return
			}
		}
		processes, _ := filepath.Glob("/proc/[0-9]*/ns/net") // the pattern is right
		seen := map[string]bool{}
		for _, file := range processes {
			name, err := os.Readlink(file)
			if err != nil || seen[name] {
				continue
			}
			seen[name] = true
			if !yield(file) {
				return
			}
		}
	}
}

// mountedNamespaces reads them from the table of mounts (proc_pid_mountinfo(5)).
func mountedNamespaces() []string {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	defer f.Close()
	var files []string
	for lines := bufio.NewScanner(f); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) > 4 && strings.HasPrefix(fields[3], "net:[") {
			files = append(files, unescape(fields[4]))
		}
	}
	return files
}

// unescape takes the octal escapes for blanks out of a path of mountinfo.
func unescape(path string) string {
	var b strings.Builder
	for i := 0; i < len(path); i++ {
		if path[i] == '\\' && i+3 < len(path) {
			if c, err := strconv.ParseUint(path[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(path[i])
	}
	return b.String()
}
