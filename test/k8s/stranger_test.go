//go:build k8s

package k8s

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os/exec"
	"path/filepath"
	"time"
)

// stranger connects to addresses from one place, all the time.
type stranger struct {
	name    string
	in      io.WriteCloser
	reports <-chan report
}

// report is what test/k8s/probe says of an address.
type report struct {
	Address netip.Addr
	Begun   bool
	Probes  []int64 // when each was sent, Unix time in microseconds
	Read    int     // those that were told the secret
}

// comeStrangers begins one in a pod of each node, and one beside pods. A neighbour that does not answer is asked again at once there, so that
// no probe waits for long to be sent.
func (s *starts) comeStrangers() {
	eager := []string{"sh", "-c", `for v in 4 6; do echo 50 > /proc/sys/net/ipv$v/neigh/$0/retrans_time_ms; done`}
	for _, n := range s.nodes {
		name := "stranger-" + n.name
		s.apply(probePod(name, n, "{}", "[/pause]"))
		s.wait(2*time.Minute, "condition=Ready", "pod/"+name)
		address, _ := s.addresses(name)
		n.run(append(eager, "cni0")...)
		n.run(append(append([]string{"nsenter", "--net=" + s.network(n, address)}, eager...), "eth0")...)
		s.begin("a pod of "+n.name, s.nodes[0].inside(context.Background(), filepath.Join(s.bin, "kubectl"), "--kubeconfig", s.kubeconfig("admin"), "exec", "-i", name, "--", "/probe", "reach", s.secret))
		s.begin(n.name, n.inside(context.Background(), filepath.Join(s.dir, "bin/probe"), "reach", s.secret))
	}
}

func (s *starts) begin(name string, cmd *exec.Cmd) {
	s.t.Helper()
	in, err := cmd.StdinPipe()
	must(s.t, err)
	out, err := cmd.StdoutPipe()
	must(s.t, err)
	must(s.t, cmd.Start())
	reports := make(chan report, 1000)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer close(reports)
		for d := json.NewDecoder(out); ; {
			var r report
			if d.Decode(&r) != nil {
				return // whoever waits for more says so
			}
			reports <- r
		}
	}()
	s.t.Cleanup(func() {
		_ = in.Close()
		<-ended
		_ = cmd.Wait()
	})
	s.strangers = append(s.strangers, &stranger{name, in, reports})
}

// tell has all strangers begin with addresses (+) or end (-), and gives what each says of each.
func (s *starts) tell(what string, addresses []netip.Addr) map[netip.Addr]map[string]report {
	s.t.Helper()
	all := map[netip.Addr]map[string]report{}
	for _, a := range addresses {
		all[a] = map[string]report{}
		for _, st := range s.strangers {
			_, err := fmt.Fprintf(st.in, "%s%s\n", what, a)
			must(s.t, err)
		}
	}
	for _, st := range s.strangers {
		for range addresses {
			select {
			case r, ok := <-st.reports:
				if !ok || r.Begun != (what == "+") {
					s.t.Fatalf("the stranger in %s has ended, or says %v", st.name, r)
				}
				all[r.Address][st.name] = r
			case <-time.After(time.Minute):
				s.t.Fatalf("the stranger in %s says nothing", st.name)
			}
		}
	}
	return all
}
