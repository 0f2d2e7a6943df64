package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
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
		Slot: slot, Epoch: p.Epoch, State: state,
		Path: Path{Grant: fromLabel(p.Grant), Client: fromAddr(p.Client), ServiceID: p.ServiceId,
			Service: fromLabel(p.Service), Deadline: time.Duration(p.DeadlineNs),
			Budget: Budget{p.BytesLimit, p.PacketsLimit, p.ConnectionsLimit, p.RateLimit}, Ingress: Ingress(p.Ingress),
			ClientPort: uint16(p.ClientPort), Cgroup: p.Cgroup},
		Flows: p.Flows, BytesToServer: p.BytesToServer, BytesToClient: p.BytesToClient,
		PacketsToServer: p.PacketsToServer, PacketsToClient: p.PacketsToClient,
	}
}

// Attached lists the programs of Sallyport on the current network namespace and its devices, and on a
// control group (empty: on none), as "device/program", whoever attached them.
func Attached(cgroup string) ([]string, error) {
	var out []string
	err := eachPlace(func(p place) error {
		ours, err := findOurs(p)
		for _, f := range ours {
			out = append(out, p.device+"/"+f.name)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	filtered, err := xdpDevices()
	if err != nil {
		return nil, err
	}
	for dev, there := range filtered {
		out = append(out, dev.Attrs().Name+"/"+there.name)
	}
	err = backstopAt(cgroup, func(_ link.Link, name string) error {
		out = append(out, map[string]string{cgroupHook: cgroup, senderHook: cgroup, sklookupHook: "netns"}[name]+"/"+name)
		return nil
	})
	return out, err
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
