package leak

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/pin"
	"golang.org/x/sys/unix"
)

// Kinds of objects that another process can hold.
const (
	kindProgram = "program"
	kindMap     = "map"
	kindLink    = "link"
)

// kindOf reads fdinfo.
var kindOf = map[string]string{"prog_id": kindProgram, "map_id": kindMap, "link_id": kindLink}

// view is the machine at one look: its processes, and what of BPF they hold.
type view struct {
	procs []process
	// mine and foreign are held by a process of this test, and by another one or by its pins.
	mine, foreign map[object]bool
}

func newView(token string) (*view, error) {
	procs, err := table(token)
	if err != nil {
		return nil, err
	}
	v := &view{procs: procs, mine: map[object]bool{}, foreign: map[object]bool{}}
	for _, p := range procs {
		for _, o := range p.held() {
			if p.mine {
				v.mine[o] = true
			} else {
				v.foreign[o] = true
			}
		}
	}
	return v, v.foreignPins()
}

// instance is how labs and demos name their directories; a lab's has its process in it.
var instance = regexp.MustCompile(`/(sallyport-(lab|demo)-(\d+)[^/]*)(/|$)`)

// isForeign says whether a path is in a lab or a demo of other processes that are alive.
func (v *view) isForeign(path string) bool {
	m := instance.FindStringSubmatch(path)
	if m == nil {
		return false
	}
	if m[2] == "lab" {
		pid, err := strconv.Atoi(m[3])
		return err == nil && pid != os.Getpid() && !errors.Is(unix.Kill(pid, 0), unix.ESRCH)
	}
	for _, p := range v.procs {
		if !p.mine && strings.Contains(p.arguments(), "/"+m[1]+"/") {
			return true
		}
	}
	return false
}

// foreignPins notes what is pinned in foreign places, and what hangs on it.
func (v *view) foreignPins() error {
	mounts, err := mountTable()
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if m.kind != "bpf" || !v.isForeign(m.point) {
			continue
		}
		err := filepath.WalkDir(m.point, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return nil // unmounted or unpinned since
			}
			if p, err := pin.Load(path, nil); err == nil {
				v.note(p)
				_ = p.Close()
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("walk %s: %w", m.point, err)
		}
	}
	return nil
}

// note takes down a foreign object: a link with its program, a program with its maps, a map with the maps in it.
func (v *view) note(p pin.Pinner) {
	switch p := p.(type) {
	case link.Link:
		if info, err := p.Info(); err == nil {
			v.foreign[object{kindLink, fmt.Sprint(info.ID)}] = true
			v.noteProgram(info.Program)
		}
	case *ebpf.Program:
		if info, err := p.Info(); err == nil {
			if id, ok := info.ID(); ok {
				v.noteProgram(id)
			}
		}
	case *ebpf.Map:
		info, err := p.Info()
		if err != nil {
			return
		}
		if id, ok := info.ID(); ok {
			v.foreign[object{kindMap, fmt.Sprint(id)}] = true
		}
		if info.Type != ebpf.ArrayOfMaps {
			return
		}
		var key, inner uint32
		for it := p.Iterate(); it.Next(&key, &inner); {
			v.foreign[object{kindMap, fmt.Sprint(inner)}] = true
		}
	}
}

func (v *view) noteProgram(id ebpf.ProgramID) {
	v.foreign[object{kindProgram, fmt.Sprint(id)}] = true
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return // it is gone
	}
	defer p.Close()
	if info, err := p.Info(); err == nil {
		ids, _ := info.MapIDs()
		for _, m := range ids {
			v.foreign[object{kindMap, fmt.Sprint(m)}] = true
		}
	}
}
