package agent

import (
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
)

// maxThreads is how many threads of a control group are asked for their network namespace before it is left for later.
const maxThreads = 16

// podGroup is a control group in which containers of a pod run.
type podGroup struct {
	path   string
	number uint64
}

// ofPods lists the control groups of pods' containers that are there, by the pods' UIDs.
func (g *cgroups) ofPods() map[string][]podGroup {
	g.rewalk()
	g.mu.Lock()
	defer g.mu.Unlock()
	all := make(map[string][]podGroup)
	for path, number := range g.numbers {
		if c := containerOf(path); c.pod != "" {
			all[c.pod] = append(all[c.pod], podGroup{path, number})
		}
	}
	return all
}

// namespace finds the network namespace that the threads of a control group are in, but for the node's own. What a process is in says
// whose the namespace is: an address would not, for it may have had another pod before.
func (g *cgroups) namespace(of podGroup) (ns datapath.Namespace, found bool) {
	own, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		return ns, false
	}
	threads := g.threads(of)
	for _, id := range threads[:min(len(threads), maxThreads)] {
		file := filepath.Join("/proc", id, "ns/net")
		if name, err := os.Readlink(file); err != nil || name == own {
			continue
		}
		ns, err := datapath.OpenNamespace(file)
		// A number may go to another process: it still is a thread of this group, or nothing was learnt.
		if err == nil && slices.Contains(g.threads(of), id) && g.is(of.path, of.number) {
			return ns, true
		}
	}
	return ns, false
}

func (g *cgroups) threads(of podGroup) []string {
	data, err := os.ReadFile(filepath.Join(g.root, of.path, "cgroup.threads"))
	if err != nil {
		return nil // it has ended
	}
	return strings.Fields(string(data))
}
