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
func processes(token string) (snapshot, error) {
	all, err := table(token)
	s := snapshot{}
	for _, p := range all {
		if p.mine && p.pid != os.Getpid() {
			s[object{"process", strconv.Itoa(p.pid)}] = p.name()
		}
	}
	return s, err
}

// dropForeign takes out of s the objects of a kind that another live process holds by a descriptor
// and none of ours does. key is the word for the object's id in fdinfo.
func (s snapshot) dropForeign(kind, key, token string) error {
	if len(s) == 0 {
		return nil
	}
	all, err := table(token)
	if err != nil {
		return err
	}
	mine, foreign := map[string]bool{}, map[string]bool{}
	for _, p := range all {
		for _, id := range p.held(key) {
			if p.mine {
				mine[id] = true
			} else {
				foreign[id] = true
			}
		}
	}
	for id := range foreign {
		if !mine[id] {
			delete(s, object{kind, id})
		}
	}
	return nil
}

// held lists the ids that the process's descriptors show under that key of fdinfo.
func (p process) held(key string) []string {
	files, err := filepath.Glob(p.path("fdinfo/*"))
	if err != nil {
		return nil
	}
	var ids []string
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // closed since
		}
		for line := range strings.Lines(string(b)) {
			if name, value, ok := strings.Cut(line, ":"); ok && name == key {
				ids = append(ids, strings.TrimSpace(value))
			}
		}
	}
	return ids
}
