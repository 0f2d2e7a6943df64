//go:build k8s

package scale

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/test/apiserver"
)

// usage is what the API server and etcd say of themselves, and what goes over the wire, from some moment on.
type usage struct {
	at             time.Time
	api, etcd      time.Duration // CPU time
	apiMemory      float64       // resident, in bytes, as is the next
	etcdMemory     float64
	watches        float64 // now, of agents
	events         float64 // that watches were sent, of our kinds and of pods
	eventBytes     float64
	begun          float64 // lists and watches that have ended or were refused, of our kinds and of pods
	patches        float64 // of statuses of our kinds
	conflicts      float64 // of these
	refused        float64 // requests answered with 429
	sent, received float64 // bytes on the wire from and to the API server's port, headers included
	kept           float64 // bytes between API server and etcd, both ways
}

// agentsKinds begin the names of all that agents ask for.
func agentsKinds(s sample) bool {
	return s.labels["group"] == "sallyport.dev" || s.labels["resource"] == "pods"
}

// usage reads it. What reading costs itself is not in bytes, and some hundredths of a second of CPU time.
func (b *bench) usage() usage {
	b.t.Helper()
	u := b.usageWithout()
	b.metrics("https://127.0.0.1:6443/metrics", func(s sample) { u.take(s) })
	return u
}

// usageWithout is that of etcd alone, and what counters begin with in a new API server.
func (b *bench) usageWithout() usage {
	b.t.Helper()
	u := usage{at: time.Now()}
	b.bytes(&u)
	b.metrics("http://127.0.0.1:2379/metrics", func(s sample) {
		switch s.name {
		case "etcd_server_version":
			b.storage = s.labels["server_version"]
		case "process_cpu_seconds_total":
			u.etcd = seconds(s.value)
		case "process_resident_memory_bytes":
			u.etcdMemory = s.value
		}
	})
	return u
}

func (u *usage) take(s sample) {
	switch s.name {
	case "process_cpu_seconds_total":
		u.api = seconds(s.value)
	case "process_resident_memory_bytes":
		u.apiMemory = s.value
	case "apiserver_longrunning_requests":
		if agentsKinds(s) && s.labels["verb"] == "WATCH" {
			u.watches += s.value
		}
	case "apiserver_watch_events_total":
		if agentsKinds(s) {
			u.events += s.value
		}
	case "apiserver_watch_events_sizes_sum":
		if agentsKinds(s) {
			u.eventBytes += s.value
		}
	case "apiserver_request_total":
		u.takeRequests(s)
	}
}

func (u *usage) takeRequests(s sample) {
	if s.labels["code"] == "429" {
		u.refused += s.value
	}
	if !agentsKinds(s) {
		return
	}
	switch verb := s.labels["verb"]; {
	case verb == "LIST" || verb == "WATCH":
		u.begun += s.value
	case s.labels["subresource"] == "status":
		u.patches += s.value
		if s.labels["code"] == "409" {
			u.conflicts += s.value
		}
	}
}

func seconds(v float64) time.Duration { return time.Duration(v * float64(time.Second)) }

// since is what was used from before on; memory and watches are those of now.
func (u usage) since(before usage) usage {
	d := u
	d.api, d.etcd = u.api-before.api, u.etcd-before.etcd
	d.events, d.eventBytes, d.begun = u.events-before.events, u.eventBytes-before.eventBytes, u.begun-before.begun
	d.patches, d.conflicts, d.refused = u.patches-before.patches, u.conflicts-before.conflicts, u.refused-before.refused
	d.sent, d.received, d.kept = u.sent-before.sent, u.received-before.received, u.kept-before.kept
	return d
}

// sample is one line of metrics.
type sample struct {
	name   string
	labels map[string]string
	value  float64
}

func (b *bench) metrics(url string, take func(sample)) {
	b.t.Helper()
	r, err := http.NewRequestWithContext(b.t.Context(), http.MethodGet, url, nil)
	b.must(err)
	r.Header.Set("Authorization", "Bearer token-"+apiserver.Admin)
	client := http.Client{Transport: &http.Transport{DialContext: b.dial, DisableKeepAlives: true,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}} // it is read from a namespace of our own
	answer, err := client.Do(r)
	b.must(err)
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		b.t.Fatalf("%s: %s", url, answer.Status)
	}
	lines := bufio.NewReaderSize(answer.Body, 1<<16)
	for {
		line, err := lines.ReadString('\n')
		if s, ok := parseSample(line); ok {
			take(s)
		}
		if err == io.EOF {
			return
		}
		b.must(err)
	}
}

// parseSample reads a line of the text format. Values of labels that have quotes or commas are none that we look at.
func parseSample(line string) (s sample, ok bool) {
	at := strings.LastIndexByte(line, ' ')
	if at < 0 || line[0] == '#' {
		return s, false
	}
	v, err := strconv.ParseFloat(strings.TrimSpace(line[at:]), 64)
	if err != nil {
		return s, false
	}
	name, rest, _ := strings.Cut(line[:at], "{")
	s = sample{name: name, value: v, labels: make(map[string]string)}
	for _, pair := range strings.Split(strings.TrimSuffix(rest, "}"), ",") {
		if key, value, ok := strings.Cut(pair, "="); ok {
			s.labels[key] = strings.Trim(value, `"`)
		}
	}
	return s, true
}

func (b *bench) dial(ctx context.Context, _, addr string) (net.Conn, error) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, err
	}
	return b.lab.Node.Dial(ctx, netip.AddrPort{}, to)
}

// counters count bytes on the loopback device that all of it speaks over.
const counters = `table inet scale {
	counter sent {}
	counter received {}
	counter kept {}
	chain out {
		type filter hook output priority 0; policy accept;
		tcp sport 6443 counter name sent
		tcp dport 6443 counter name received
		tcp sport 2379 counter name kept
		tcp dport 2379 counter name kept
	}
}
`

func (b *bench) count() {
	b.t.Helper()
	file := b.file("counters.nft")
	b.must(os.WriteFile(file, []byte(counters), 0o600))
	_, err := b.lab.Node.Run(b.t.Context(), "nft", "-f", file)
	b.must(err)
}

func (b *bench) bytes(u *usage) {
	b.t.Helper()
	out, err := b.lab.Node.Run(b.t.Context(), "nft", "-j", "list", "counters")
	b.must(err)
	var list struct {
		Nftables []struct {
			Counter *struct {
				Name  string
				Bytes float64
			}
		}
	}
	b.must(json.Unmarshal([]byte(out), &list))
	for _, l := range list.Nftables {
		if l.Counter != nil {
			*map[string]*float64{"sent": &u.sent, "received": &u.received, "kept": &u.kept}[l.Counter.Name] = l.Counter.Bytes
		}
	}
}

// residentOf is a line of a process's status, in bytes.
func residentOf(pid int, name string) int64 {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid)) // one that has ended has nothing
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, name); ok {
			n, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			return n << 10
		}
	}
	return 0
}
