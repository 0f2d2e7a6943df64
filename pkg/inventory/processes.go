package inventory

import (
	"bytes"
	"fmt"
	"maps"
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
	owners map[uint32]*Process // by inode of the socket; nil: nobody was found
	known  map[birth]*Process
}

// birth tells a process from a later one with its number.
type birth struct {
	pid     int32
	started uint64 // in clock ticks after boot (proc(5), starttime)
}

func newProcesses() *processes {
	return &processes{owners: map[uint32]*Process{}, known: map[birth]*Process{}}
}

// find makes the owners of these sockets known; it goes through the files of all processes only if one of them is new.
func (p *processes) find(inodes map[uint32]bool) {
	news := map[uint32]birth{}
	for inode := range inodes {
		if _, ok := p.owners[inode]; !ok && inode != 0 {
			news[inode], p.owners[inode] = birth{}, nil
		}
	}
	if len(news) == 0 {
		return
	}
	dirs, _ := filepath.Glob("/proc/[0-9]*/fd") // the pattern is right
	for _, dir := range dirs {
		pid, err := strconv.ParseInt(strings.Split(dir, "/")[2], 10, 32)
		if err == nil {
			scan(dir, birthOf(int32(pid)), news)
		}
	}
	for inode, b := range news {
		if b.pid == 0 {
			continue
		}
		if p.known[b] == nil {
			p.known[b] = readProcess(b.pid)
		}
		p.owners[inode] = p.known[b]
	}
}

// forget drops what is known of sockets that are gone, and of processes that have none any more.
func (p *processes) forget(there map[uint32]bool) {
	maps.DeleteFunc(p.owners, func(inode uint32, _ *Process) bool { return !there[inode] })
	used := map[*Process]bool{}
	for _, owner := range p.owners {
		used[owner] = true
	}
	maps.DeleteFunc(p.known, func(_ birth, one *Process) bool { return !used[one] })
}

func scan(dir string, b birth, news map[uint32]birth) {
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
		if !ok || err != nil {
			continue
		}
		if than, wanted := news[uint32(inode)]; wanted && b.before(than) {
			news[uint32(inode)] = b
		}
	}
}

// before says whether a process is more of an owner than another. Systemd has the sockets that it made for others.
func (b birth) before(than birth) bool {
	if than.pid == 0 || than.pid == 1 {
		return true
	}
	return b.pid != 1 && b.started < than.started
}

func birthOf(pid int32) birth {
	data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := strings.Cut(string(data[bytes.LastIndexByte(data, ')')+1:]), " ")
	b := birth{pid: pid, started: ^uint64(0)} // who is gone owns nothing
	if fields := strings.Fields(rest); len(fields) > 19 {
		b.started, _ = strconv.ParseUint(fields[19], 10, 64)
	}
	return b
}

// owner is the process that has the socket; nil if none was found.
func (p *processes) owner(inode uint32) *Process { return p.owners[inode] }

func readProcess(pid int32) *Process {
	dir := fmt.Sprintf("/proc/%d", pid)
	p := &Process{PID: pid}
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
