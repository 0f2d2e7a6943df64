package inventory

import (
	"bytes"
	"fmt"
	"os"
	"os/user"
	"path"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// Process is whose socket it is. All of it but PID and UID is text of somebody else's making; nothing is decided by it.
type Process struct {
	PID  int32  `json:"pid,omitempty"`
	Name string `json:"name,omitempty"` // of its program's file, or its own word where that cannot be read
	UID  uint32 `json:"uid"`
	User string `json:"user,omitempty"`
	// Unit of systemd, Pod and Container are read from the path of its control group.
	Unit      string `json:"unit,omitempty"`
	Pod       string `json:"pod,omitempty"`
	Container string `json:"container,omitempty"`
	Cgroup    string `json:"cgroup,omitempty"`
}

// processes finds the owners of sockets. A socket that several processes have belongs to the one that was there first.
type processes struct {
	owners  map[uint32]int32 // by inode of the socket; 0: nobody was found
	started map[int32]uint64
	known   map[int32]Process
}

func newProcesses() *processes {
	return &processes{owners: map[uint32]int32{}, started: map[int32]uint64{}, known: map[int32]Process{}}
}

// find makes the owners of these sockets known; it goes through the files of all processes only if one of them is new.
func (p *processes) find(inodes map[uint32]bool) {
	news := map[uint32]bool{}
	for inode := range inodes {
		if _, ok := p.owners[inode]; !ok && inode != 0 {
			news[inode] = true
			p.owners[inode] = 0
		}
	}
	if len(news) == 0 {
		return
	}
	dirs, _ := filepath.Glob("/proc/[0-9]*/fd") // the pattern is right
	for _, dir := range dirs {
		pid, err := strconv.ParseInt(strings.Split(dir, "/")[2], 10, 32)
		if err == nil {
			p.scan(dir, int32(pid), news)
		}
	}
}

func (p *processes) scan(dir string, pid int32, news map[uint32]bool) {
	files, err := os.ReadDir(dir)
	if err != nil {
		return // it ended
	}
	for _, f := range files {
		name, err := os.Readlink(filepath.Join(dir, f.Name()))
		if err != nil {
			continue
		}
		text, ok := strings.CutPrefix(name, "socket:[")
		inode, err := strconv.ParseUint(strings.TrimSuffix(text, "]"), 10, 32)
		if ok && err == nil && news[uint32(inode)] && p.before(pid, p.owners[uint32(inode)]) {
			p.owners[uint32(inode)] = pid
		}
	}
}

// before says whether a process is more of an owner than another. Systemd has the sockets that it made for others.
func (p *processes) before(pid, than int32) bool {
	if than == 0 || than == 1 {
		return true
	}
	return pid != 1 && p.begun(pid) < p.begun(than)
}

// begun is when a process started, in clock ticks after boot (proc(5), starttime).
func (p *processes) begun(pid int32) uint64 {
	if t, ok := p.started[pid]; ok {
		return t
	}
	data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := strings.Cut(string(data[bytes.LastIndexByte(data, ')')+1:]), " ")
	ticks := ^uint64(0) // who is gone owns nothing
	if fields := strings.Fields(rest); len(fields) > 19 {
		ticks, _ = strconv.ParseUint(fields[19], 10, 64)
	}
	p.started[pid] = ticks
	return ticks
}

// owner is the process that has the socket; the zero Process if none was found.
func (p *processes) owner(inode uint32) Process {
	pid := p.owners[inode]
	if pid == 0 {
		return Process{}
	}
	if known, ok := p.known[pid]; ok {
		return known
	}
	p.known[pid] = readProcess(pid)
	return p.known[pid]
}

func readProcess(pid int32) Process {
	dir := fmt.Sprintf("/proc/%d", pid)
	p := Process{PID: pid}
	comm, _ := os.ReadFile(dir + "/comm")
	p.Name = strings.TrimSpace(string(comm))
	if exe, err := os.Readlink(dir + "/exe"); err == nil {
		p.Name = path.Base(strings.TrimSuffix(exe, " (deleted)"))
	}
	status, _ := os.ReadFile(dir + "/status")
	p.UID = effectiveUID(string(status))
	if u, err := user.LookupId(strconv.FormatUint(uint64(p.UID), 10)); err == nil {
		p.User = u.Username
	}
	groups, _ := os.ReadFile(dir + "/cgroup")
	p.Cgroup = cgroupPath(string(groups))
	p.Unit, p.Pod, p.Container = membership(p.Cgroup)
	return p
}

func effectiveUID(status string) uint32 {
	for line := range strings.Lines(status) {
		if fields := strings.Fields(line); len(fields) > 2 && fields[0] == "Uid:" {
			uid, _ := strconv.ParseUint(fields[2], 10, 32)
			return uint32(uid)
		}
	}
	return 0
}

// cgroupPath chooses the path of version 2, or what says most where only version 1 is used.
func cgroupPath(table string) string {
	longest := ""
	for line := range strings.Lines(table) {
		parts := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(parts) != 3 {
			continue
		}
		if parts[0] == "0" && parts[2] != "/" {
			return parts[2]
		}
		if len(parts[2]) > len(longest) {
			longest = parts[2]
		}
	}
	return longest
}

var (
	podOf       = regexp.MustCompile(`pod([0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12}|[0-9a-f]{32})`)
	containerOf = regexp.MustCompile(`[0-9a-f]{64}`)
	unitSuffix  = regexp.MustCompile(`\.(service|scope|socket)$`)
)

// membership reads what the path of a control group claims. It is for people: the agent has a stricter reading where it counts.
func membership(cgroup string) (unit, pod, container string) {
	if found := podOf.FindStringSubmatch(cgroup); found != nil {
		pod = strings.ReplaceAll(found[1], "_", "-")
	}
	container = containerOf.FindString(cgroup)
	for name := range strings.SplitSeq(cgroup, "/") {
		if unitSuffix.MatchString(name) {
			unit = name
		}
	}
	return unit, pod, container
}

// Home is what the process runs in, in a word: its pod, its unit, or nothing.
func (p Process) Home() string {
	switch {
	case p.Pod != "":
		return "pod " + p.Pod
	case p.Unit != "":
		return p.Unit
	}
	return ""
}
