package leak

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// ours begins the name of every program and map of Sallyport.
const ours = "sp_"

// programs lists our programs by id.
func (v *view) programs() (snapshot, error) {
	s := snapshot{}
	var id ebpf.ProgramID
	for {
		next, err := ebpf.ProgramGetNextID(id)
		if errors.Is(err, os.ErrNotExist) {
			return s, nil
		}
		if err != nil {
			return s, fmt.Errorf("list programs: %w", err)
		}
		id = next
		info, err := aboutProgram(id)
		if errors.Is(err, os.ErrNotExist) || err == nil && !strings.HasPrefix(info.Name, ours) {
			continue // freed since, or not ours
		}
		if err != nil {
			return s, err
		}
		o := object{kindProgram, fmt.Sprint(id)}
		s[o] = fmt.Sprintf("%s (%v)", info.Name, info.Type)
		used, _ := info.MapIDs()
		for _, m := range used {
			v.uses[o] = append(v.uses[o], object{kindMap, fmt.Sprint(m)})
		}
	}
}

func aboutProgram(id ebpf.ProgramID) (*ebpf.ProgramInfo, error) {
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return nil, fmt.Errorf("open program %d: %w", id, err)
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil {
		return nil, fmt.Errorf("ask about program %d: %w", id, err)
	}
	return info, nil
}

// bpfMaps lists our maps by id.
func (v *view) bpfMaps() (snapshot, error) {
	s := snapshot{}
	var id ebpf.MapID
	for {
		next, err := ebpf.MapGetNextID(id)
		if errors.Is(err, os.ErrNotExist) {
			return s, nil
		}
		if err != nil {
			return s, fmt.Errorf("list maps: %w", err)
		}
		id = next
		m, err := ebpf.NewMapFromID(id)
		if errors.Is(err, os.ErrNotExist) {
			continue // freed since
		}
		if err != nil {
			return s, fmt.Errorf("open map %d: %w", id, err)
		}
		o := object{kindMap, fmt.Sprint(id)}
		line, inner, err := aboutMap(m)
		if err = errors.Join(err, m.Close()); err != nil {
			return s, fmt.Errorf("ask about map %d: %w", id, err)
		}
		if strings.HasPrefix(line, ours) {
			s[o], v.uses[o] = line, inner
		}
	}
}

// aboutMap describes a map, and gives the maps that are in it.
func aboutMap(m *ebpf.Map) (line string, inner []object, err error) {
	info, err := m.Info()
	if err != nil {
		return "", nil, err
	}
	if info.Type == ebpf.ArrayOfMaps {
		var key, id uint32
		for it := m.Iterate(); it.Next(&key, &id); {
			inner = append(inner, object{kindMap, fmt.Sprint(id)})
		}
	}
	return fmt.Sprintf("%s (%v)", info.Name, info.Type), inner, nil
}

// links lists the links that hold one of our programs, whatever they are attached to.
func (v *view) links() (snapshot, error) {
	for {
		s, err := v.listLinks()
		if !errors.Is(err, unix.EAGAIN) {
			return s, err
		}
		// Somebody is just making one: the kernel knows its id, and does not give it out yet.
	}
}

func (v *view) listLinks() (snapshot, error) {
	s := snapshot{}
	it := new(link.Iterator)
	defer it.Close()
	for it.Next() {
		info, err := it.Link.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return s, fmt.Errorf("ask about link %d: %w", it.ID, err)
		}
		about, err := aboutProgram(info.Program)
		if err != nil || !strings.HasPrefix(about.Name, ours) {
			continue // a link without a program to open is not one of ours
		}
		o, name := object{kindLink, fmt.Sprint(it.ID)}, about.Name
		line := fmt.Sprintf("type %d of program %s", info.Type, name)
		if tcx := info.TCX(); tcx != nil {
			line = fmt.Sprintf("tcx on device %d of program %s", tcx.Ifindex, name)
		} else if cg := info.Cgroup(); cg != nil {
			line = fmt.Sprintf("on control group %d of program %s", cg.CgroupId, name)
		} else if ns := info.NetNs(); ns != nil {
			line = fmt.Sprintf("on namespace net:[%d] of program %s", ns.NetnsInode, name)
		}
		if xdp := info.XDP(); xdp != nil {
			line = fmt.Sprintf("XDP on device %d of program %s", xdp.Ifindex, name)
		}
		s[o], v.uses[o] = line, []object{{kindProgram, fmt.Sprint(info.Program)}}
	}
	if err := it.Err(); err != nil {
		return s, fmt.Errorf("list links: %w", err)
	}
	return s, nil
}
