package leak

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/pin"
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
	uses          map[object][]object // a link its program, a program its maps, a map those that are in it
	instances     map[string]bool     // labs and demos that were asked about: whether they are foreign
}

func newView(token string) (*view, error) {
	procs, err := table(token)
	if err != nil {
		return nil, err
	}
	v := &view{procs: procs, mine: map[object]bool{}, foreign: map[object]bool{}, uses: map[object][]object{}, instances: map[string]bool{}}
	for _, p := range procs {
		for _, o := range p.held() {
			if p.mine {
				v.mine[o] = true
			} else {
				v.foreign[o] = true
			}
		}
	}
	return v, nil
}

// instance is how labs and demos name their directories; a lab's has its process in it.
var instance = regexp.MustCompile(`/(sallyport-(lab|demo)-(\d+)[^/]*)(/|$)`)

// isForeign says whether a path is in a lab of another process, or in a demo that another one is at.
func (v *view) isForeign(path string) bool {
	m := instance.FindStringSubmatch(path)
	if m == nil {
		return false
	}
	foreign, known := v.instances[m[1]]
	if !known {
		foreign = v.isOthers(m[1], m[2], m[3])
		v.instances[m[1]] = foreign
	}
	return foreign
}

func (v *view) isOthers(name, kind, number string) bool {
	if kind == "lab" { // of one that was killed, too: whoever makes the next lab sweeps it
		pid, err := strconv.Atoi(number)
		return err == nil && !slices.ContainsFunc(v.procs, func(p process) bool { return p.mine && p.pid == pid })
	}
	return slices.ContainsFunc(v.procs, func(p process) bool { return !p.mine && strings.Contains(p.arguments(), "/"+name+"/") })
}

// notePin takes down what is pinned in a foreign place.
func (v *view) notePin(path string) {
	pinned, err := pin.Load(path, nil)
	if err != nil {
		return // unpinned since
	}
	defer pinned.Close()
	switch p := pinned.(type) {
	case link.Link:
		if info, err := p.Info(); err == nil {
			v.foreign[object{kindLink, fmt.Sprint(info.ID)}] = true
		}
	case *ebpf.Program:
		if info, err := p.Info(); err == nil {
			id, _ := info.ID()
			v.foreign[object{kindProgram, fmt.Sprint(id)}] = true
		}
	case *ebpf.Map:
		if info, err := p.Info(); err == nil {
			id, _ := info.ID()
			v.foreign[object{kindMap, fmt.Sprint(id)}] = true
		}
	}
}

// others are the objects of other processes: what they hold, and what uses that or is used by it, which nothing but a filter on a device
// or the pin of a lost bpffs may hold.
func (v *view) others() map[object]bool {
	all := maps.Clone(v.foreign)
	maps.DeleteFunc(all, func(o object, _ bool) bool { return v.mine[o] })
	for grown := true; grown; {
		grown = false
		for o, used := range v.uses {
			related := append([]object{o}, used...)
			if !slices.ContainsFunc(related, func(r object) bool { return all[r] }) {
				continue
			}
			for _, r := range related {
				if !all[r] && !v.mine[r] {
					all[r], grown = true, true
				}
			}
		}
	}
	return all
}
