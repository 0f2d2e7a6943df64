package datapath

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/sallyport-dev/sallyport/bpf"
)

// ReadPaths reads every slot that is not free of the datapath pinned under dir, with no agent and
// without changing anything.
func ReadPaths(dir string) ([]PathStatus, error) {
	opts := &ebpf.LoadPinOptions{ReadOnly: true}
	paths, err := ebpf.LoadPinnedMap(filepath.Join(mapsDir(dir), "sp_paths"), opts)
	if err != nil {
		return nil, fmt.Errorf("open paths: %w", err)
	}
	defer paths.Close()
	states, err := ebpf.LoadPinnedMap(filepath.Join(mapsDir(dir), "sp_path_state"), opts)
	if err != nil {
		return nil, fmt.Errorf("open path states: %w", err)
	}
	defer states.Close()
	var out []PathStatus
	var slot uint32
	var state bpf.PathStatus
	it := states.Iterate()
	for it.Next(&slot, &state) {
		if PathState(state.State) == PathFree {
			continue
		}
		var p bpf.Path
		if err := paths.Lookup(slot, &p); err != nil {
			return nil, fmt.Errorf("read path %d: %w", slot, err)
		}
		out = append(out, fromPath(slot, PathState(state.State), &p))
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("read path states: %w", err)
	}
	return out, nil
}

func fromPath(slot uint32, state PathState, p *bpf.Path) PathStatus {
	return PathStatus{
		Slot: slot, State: state,
		Path: Path{Grant: fromLabel(p.Grant), Client: fromAddr(p.Client), ServiceID: p.ServiceId,
			Service: fromLabel(p.Service), Deadline: time.Duration(p.DeadlineNs),
			Budget: Budget{p.BytesLimit, p.PacketsLimit, p.ConnectionsLimit, p.RateLimit}},
		Flows: p.Flows, BytesToServer: p.BytesToServer, BytesToClient: p.BytesToClient,
		PacketsToServer: p.PacketsToServer, PacketsToClient: p.PacketsToClient,
	}
}

// Attached lists the programs of Sallyport on the devices of the current network namespace, as
// "device/program", whoever attached them.
func Attached() ([]string, error) {
	devices, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	var out []string
	for _, dev := range devices {
		for _, attach := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
			found, err := attachedTo(dev.Index, attach)
			if err != nil {
				return nil, fmt.Errorf("query %s: %w", dev.Name, err)
			}
			for _, a := range found {
				out = append(out, dev.Name+"/"+a.name)
			}
		}
	}
	return out, nil
}

// attachedProgram is a program of ours in a device's chain. The link is 0 if there is none.
type attachedProgram struct {
	name string
	link link.ID
}

func attachedTo(ifindex int, attach ebpf.AttachType) ([]attachedProgram, error) {
	result, err := link.QueryPrograms(link.QueryOptions{Target: ifindex, Attach: attach})
	if err != nil {
		return nil, err
	}
	var found []attachedProgram
	for _, p := range result.Programs {
		name, err := programName(p.ID)
		if err != nil {
			return nil, err
		}
		if slices.Contains(programNames(), name) {
			id, _ := p.LinkID()
			found = append(found, attachedProgram{name, id})
		}
	}
	return found, nil
}

// programName is empty for a program that is gone since it was listed.
func programName(id ebpf.ProgramID) (string, error) {
	prog, err := ebpf.NewProgramFromID(id)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer prog.Close()
	info, err := prog.Info()
	if err != nil {
		return "", err
	}
	return info.Name, nil
}
