package leak

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// process is one row of /proc.
type process struct {
	pid  int
	mine bool // this process, its child, or one that carries the token
}

func (p process) path(name string) string { return filepath.Join("/proc", strconv.Itoa(p.pid), name) }

func (p process) name() string {
	b, err := os.ReadFile(p.path("comm"))
	if err != nil {
		return "gone"
	}
	return strings.TrimSpace(string(b))
}

// parent is the parent's process id, or 0.
func (p process) parent() int {
	b, err := os.ReadFile(p.path("stat"))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(b[bytes.LastIndexByte(b, ')')+1:]), " ") // state and parent follow the name
	fields := strings.Fields(rest)
	if len(fields) < 2 {
		return 0
	}
	n, _ := strconv.Atoi(fields[1])
	return n
}

// table lists the processes of the machine. Those that end while it reads are left out.
func table(token string) ([]process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var all []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		env, err := os.ReadFile(filepath.Join("/proc", e.Name(), "environ"))
		if err != nil {
			continue
		}
		carries := bytes.Contains(append([]byte{0}, env...), []byte("\x00"+marker+"="+token+"\x00"))
		p := process{pid: pid}
		p.mine = carries || pid == os.Getpid() || p.parent() == os.Getpid()
		all = append(all, p)
	}
	return all, nil
}

// processes lists the processes that the test started and that still run, but not this one.
func (v *view) processes() (snapshot, error) {
	s := snapshot{}
	for _, p := range v.procs {
		if p.mine && p.pid != os.Getpid() {
			s[object{"process", strconv.Itoa(p.pid)}] = p.name()
		}
	}
	return s, nil
}

// held lists the objects of BPF that the process's descriptors show in fdinfo.
func (p process) held() []object {
	files, err := filepath.Glob(p.path("fdinfo/*"))
	if err != nil {
		return nil
	}
	var all []object
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // closed since
		}
		for line := range strings.Lines(string(b)) {
			key, value, _ := strings.Cut(line, ":")
			if kind, ok := kindOf[key]; ok {
				all = append(all, object{kind, strings.TrimSpace(value)})
			}
		}
	}
	return all
}

// arguments are the command line.
func (p process) arguments() string {
	b, err := os.ReadFile(p.path("cmdline"))
	if err != nil {
		return ""
	}
	return strings.ReplaceAll(string(b), "\x00", " ")
}
