package hostile

import (
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/test/lab"
)

const (
	port       = 8080 // protected, TCP and UDP, of the host and of the pod
	markerPort = 9    // protected by nobody
)

// rules count what the IP stack of a namespace takes in for its own sockets: behind every program, before
// TCP and UDP. IPv4 fragments are whole there, IPv6 fragments are not.
var rules = fmt.Sprintf(`table inet judge {
	counter arrived { }
	counter marker { }
	counter answered { }
	chain out {
		type filter hook output priority -400; policy accept;
		tcp sport %[1]d tcp flags & (syn | ack) == syn | ack counter name answered
	}
	chain in {
		type filter hook input priority -400; policy accept;
		tcp dport %[1]d counter name arrived
		udp dport %[1]d counter name arrived
		meta l4proto { ah, esp } counter name arrived
		icmp type redirect counter name arrived
		udp dport %[2]d counter name marker
	}
}`, port, markerPort)

// judge is the counter behind enforcement: in the node for its own services, in the pod for the pod's.
type judge struct{ in *lab.Namespace }

func newJudge(t *testing.T, n *lab.Namespace) judge {
	t.Helper()
	j := judge{n}
	j.nft(t, "--", rules)
	return j
}

// nft runs the command in the judge's namespace.
func (j judge) nft(t *testing.T, args ...string) []byte {
	t.Helper()
	var out []byte
	err := j.in.Do(func() (err error) {
		out, err = exec.CommandContext(t.Context(), "nft", args...).Output()
		return err
	})
	if failed, ok := errors.AsType[*exec.ExitError](err); ok {
		t.Fatalf("nft %q: %v: %s", args, err, failed.Stderr)
	}
	check(t, err)
	return out
}

// since is what has come since the last call, up to the marker that the attacker has sent last.
func (j judge) since(t *testing.T) map[string]int {
	t.Helper()
	total := map[string]int{}
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); {
		for name, n := range j.read(t) {
			total[name] += n
		}
		if total["marker"] > 0 {
			return total
		}
	}
	t.Fatal("the marker has not arrived")
	return total
}

// read takes the counters and sets them to zero in one step.
func (j judge) read(t *testing.T) map[string]int {
	t.Helper()
	out := j.nft(t, "-j", "reset", "counters", "table", "inet", "judge")
	var list struct {
		Nftables []struct {
			Counter struct {
				Name    string
				Packets int
			}
		}
	}
	check(t, json.Unmarshal(out, &list))
	counts := map[string]int{}
	for _, c := range list.Nftables {
		counts[c.Counter.Name] = c.Counter.Packets
	}
	return counts
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
