//go:build k8s

package k8s

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/test/packet"
	"github.com/sallyport-dev/sallyport/test/shape"
)

// hostAccess is the service of the node, for those who prove themselves.
const hostAccess = `---
apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: host}
spec: {target: Host, ports: [7000], access: [{identities: ["spiffe://` + domain + `/app/web"]}]}
`

// besieged is a cluster with two attackers on the node of the database: a pod with CAP_NET_RAW, and one that has the node's network, too.
type besieged struct {
	*inCluster
	database string           // its network
	device   string           // the node's end of its device
	mac      [6]byte          // of the database
	gateway  [6]byte          // of the bridge
	raw      *wire            // of the pod
	inside   map[string]*wire // of the pod in the node's network, by device and whether it shuns egress hooks
	sides    [2]*side         // IPv4, IPv6
	port     uint16           // of the last attack
}

// side is who has which address of a family. nobody has the last.
type side struct {
	name                                              string
	db, gateway, node, far, neighbour, client, nobody netip.Addr
}

// TestAttackPods: what a pod that may send any frame can do to the database beside it, and one in the network of the node. What SECURITY.md says
// that they can, they can here, and nothing else.
func TestAttackPods(t *testing.T) {
	b := &besieged{inCluster: newInCluster(t), inside: map[string]*wire{}}
	b.apply(attackPod("raw", b.nodes[0], false))
	b.apply(attackPod("host", b.nodes[0], true))
	b.wait(2*time.Minute, "condition=Ready", "pod/raw")
	b.wait(2*time.Minute, "condition=Ready", "pod/host")
	b.survey()
	for _, s := range b.sides {
		b.attack("without us/pod/"+s.name, true, func() (answer, error) { return b.raw.shake(b.syn(b.raw, s, s.nobody), b.claims(b.raw, s, s.nobody)) })
	}
	b.marks("without us", true)
	if arrived := b.shapes("without us/shapes", b.sides[0]); len(arrived) < 20 {
		t.Errorf("without us few shapes of packets reach the database's network: %v", arrived)
	}
	b.define(hostAccess)
	b.install(b.values())
	b.healthy()
	for _, s := range b.sides {
		b.onBridge(s)
		if arrived := b.shapes("shapes", s); len(arrived) > 0 {
			t.Errorf("LEAKED: shapes of %s: %v", s.name, arrived)
		}
		b.inNode(s)
	}
	b.marks("marks", false)
	b.besideLeg()
	b.byPath()
	b.impostor()
	b.unseen()
}

func attackPod(name string, n *node, hostNetwork bool) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  nodeName: %s
  hostNetwork: %v
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 1
  containers:
    - name: probe
      image: %s
      imagePullPolicy: Never
      command: [/pause]
      securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL], add: [NET_RAW]}}
`, name, n.name, hostNetwork, probeImage)
}

// survey finds out what an attacker on the bridge can, and opens packet sockets.
func (b *besieged) survey() {
	first, second := b.nodes[0], b.nodes[1]
	b.database = b.network(first, b.db)
	pod := first.run("nsenter", "--net="+b.database, "ip", "-o", "link", "show", "eth0")
	peer := regexp.MustCompile(`eth0@if(\d+)`).FindStringSubmatch(pod)
	if peer == nil {
		b.t.Fatalf("no device of a pair: %s", pod)
	}
	b.device = regexp.MustCompile(`(?m)^` + peer[1] + `: ([^@:]+)`).FindStringSubmatch(first.run("ip", "-o", "link", "show"))[1]
	b.mac, b.gateway = macIn(pod), macIn(first.run("ip", "-o", "link", "show", "cni0"))
	addr := netip.MustParseAddr
	neighbour, neighbour6 := b.addresses("client-" + first.name)
	client, client6 := b.addresses("client-" + second.name)
	b.sides = [2]*side{
		{name: "IPv4", db: addr(b.db), gateway: addr(first.pods + ".1"), node: addr(first.ip), far: addr(second.ip), neighbour: addr(neighbour), client: addr(client), nobody: addr(first.pods + ".250")},
		{name: "IPv6", db: addr(b.db6), gateway: addr(first.net6 + "::1"), node: addr(first.ip6), far: addr(second.ip6), neighbour: addr(neighbour6), client: addr(client6), nobody: addr(first.net6 + "::250")},
	}
	b.raw = b.wire("raw", "eth0", "through")
	for _, device := range []string{b.device, "cni0"} {
		for _, how := range []string{"through", "past"} {
			b.inside[device+" "+how] = b.wire("host", device, how)
		}
	}
}

// macIn is the first hardware address in what ip says.
func macIn(text string) [6]byte {
	hw, _ := net.ParseMAC(regexp.MustCompile(`link/ether (\S+)`).FindStringSubmatch(text)[1]) // ip writes them
	return [6]byte(hw)
}

// syn is that of a connection from an address to the database, straight to its hardware address.
func (b *besieged) syn(w *wire, s *side, from netip.Addr) packet.Packet {
	b.port++
	var seq [4]byte
	_, _ = rand.Read(seq[:]) // never fails
	return packet.Packet{SrcMAC: w.mac, DstMAC: b.mac, Src: netip.AddrPortFrom(from, 20000+b.port), Dst: netip.AddrPortFrom(s.db, 5432),
		Flags: packet.SYN, Seq: binary.BigEndian.Uint32(seq[:]), Window: 65535}
}

// claims has the database send what is for the address to us: it, or the gateway that leads there.
func (b *besieged) claims(w *wire, s *side, address netip.Addr) []byte {
	if address == s.far || address == s.node || address == s.client {
		address = s.gateway
	}
	return claim(address, w.mac, s.db, b.mac)
}

// attack holds that the database answers if SECURITY.md says so, and else does not.
func (b *besieged) attack(name string, open bool, try func() (answer, error)) {
	b.t.Run(name, func(t *testing.T) {
		before := b.heard()
		got, err := try()
		must(t, err)
		t.Logf("%s; %d packets reached the database's network", got, b.heard()-before)
		if got == breached && !open {
			t.Error("LEAKED")
		} else if got != breached && open {
			t.Error("closed: SECURITY.md says that it is open")
		}
		b.nodes[0].run("nsenter", "--net="+b.database, "ip", "neigh", "flush", "dev", "eth0")
	})
}

// heard counts segments and datagrams that came to the input of the database's network.
func (b *besieged) heard() int {
	return b.count("Tcp:InSegs", "Udp:InDatagrams", "Udp:NoPorts", "Udp6InDatagrams", "Udp6NoPorts")
}

// count is the sum of counters of the database's network.
func (b *besieged) count(names ...string) (n int) {
	all := map[string]string{}
	var titles []string
	for line := range strings.Lines(b.nodes[0].run("nsenter", "--net="+b.database, "cat", "/proc/net/snmp", "/proc/net/snmp6")) {
		fields := strings.Fields(line)
		switch {
		case len(fields) == 2:
			all[fields[0]] = fields[1]
		case len(titles) == len(fields) && titles[0] == fields[0]:
			for i, value := range fields[1:] {
				all[titles[0]+titles[i+1]] = value
			}
		}
		titles = fields
	}
	for _, name := range names {
		value, err := strconv.Atoi(all[name])
		must(b.t, err)
		n += value
	}
	return n
}

// onBridge: the pod on the database's bridge, by addresses that are not its own, in the place of whoever has them.
func (b *besieged) onBridge(s *side) {
	for _, who := range []struct {
		name string
		from netip.Addr
	}{{"nobody", s.nobody}, {"the gateway", s.gateway}, {"the node", s.node}, {"the other node", s.far}, {"a neighbour", s.neighbour}, {"a pod of the other node", s.client}} {
		b.attack("pod/as "+who.name+"/"+s.name, false, func() (answer, error) {
			return b.raw.shake(b.syn(b.raw, s, who.from), b.claims(b.raw, s, who.from))
		})
	}
	for name, change := range map[string]func(*packet.Packet){
		"with a priority tag": func(p *packet.Packet) { p.VLANs = []uint16{0} },
		"with a tag":          func(p *packet.Packet) { p.VLANs = []uint16{1} },
		"with two tags":       func(p *packet.Packet) { p.VLANs, p.QinQ = []uint16{0, 0}, true },
		"by the gateway":      func(p *packet.Packet) { p.DstMAC = b.gateway },
	} {
		b.attack("pod/"+name+"/"+s.name, false, func() (answer, error) {
			p := b.syn(b.raw, s, s.nobody)
			change(&p)
			return b.raw.shake(p, b.claims(b.raw, s, s.nobody))
		})
	}
}

// shapes sends every shape of packet, and tunnels that end at the node, and gives those of which something reached the database's network.
func (b *besieged) shapes(when string, s *side) (arrived []string) {
	b.t.Run(when+"/"+s.name, func(t *testing.T) {
		all := 0
		for _, shape := range shape.All() {
			p := b.syn(b.raw, s, s.nobody)
			if !shape.Fits(p) || shape.Name == "tunnel/VXLAN" || shape.Name == "tunnel/Geneve" { // for a pod these are datagrams to ports that nobody protects
				continue
			}
			all++
			if b.arrives(shape.Frames(p)) {
				arrived = append(arrived, shape.Name)
			}
		}
		outer := packet.Packet{SrcMAC: b.raw.mac, DstMAC: b.gateway, Src: netip.AddrPortFrom(s.nobody, 20000), Dst: netip.AddrPortFrom(s.node, 0)}
		inner := b.syn(b.raw, s, s.node)
		for name, p := range map[string]packet.Packet{"IP": inner.InIP(outer), "GRE": inner.InGRE(outer), "VXLAN": inner.InVXLAN(outer, 1), "Geneve": inner.InGeneve(outer, 1)} {
			all++
			if b.arrives([][]byte{p.Bytes()}) {
				arrived = append(arrived, "in "+name+" to the node")
			}
		}
		t.Logf("%d shapes, of %d something reached the database's network: %s", all, len(arrived), strings.Join(arrived, ", "))
	})
	return arrived
}

// arrives sends frames, and behind them in the same queue an echo request. When that has arrived, the others had the time to.
func (b *besieged) arrives(frames [][]byte) bool {
	s := b.sides[0]
	before, echos := b.heard(), b.count("Icmp:InEchos")
	for _, f := range frames {
		if len(f) <= 1514 {
			must(b.t, b.raw.send(f))
		}
	}
	must(b.t, b.raw.send(b.syn(b.raw, s, s.nobody).ICMPErrorQuoting(s.nobody, s.db, 8, 0, 1, nil)))
	eventually(b.t, 20*time.Second, "the echo request behind a shape arrives", func() error {
		if b.count("Icmp:InEchos") == echos {
			return errors.New("not yet")
		}
		return nil
	})
	return b.heard() > before
}

// inNode: the pod in the network of the node, by frames of its own, which it sees the answers to before any hook does.
func (b *besieged) inNode(s *side) {
	for name, w := range b.inside {
		for who, from := range map[string]netip.Addr{"nobody": s.nobody, "the other node": s.far, "a pod of the other node": s.client} {
			b.attack("host/"+strings.Replace(name, b.device, "device", 1)+" as "+who+"/"+s.name, false, func() (answer, error) { return w.shake(b.syn(w, s, from)) })
		}
	}
}

// marks: both attackers, with the mark that px has, those of Kubernetes, and any. That of a tuple nobody without the node's secret can tell.
func (b *besieged) marks(when string, open bool) {
	marks := []string{"1", "0x4000", "0x8000", "0xffffffff"}
	for range 60 {
		var m [4]byte
		_, _ = rand.Read(m[:]) // never fails
		marks = append(marks, strconv.FormatUint(uint64(binary.BigEndian.Uint32(m[:])), 10))
	}
	for _, s := range b.sides {
		for _, pod := range []string{"raw", "host"} {
			b.attack(when+"/"+pod+" with marks/"+s.name, open, func() (answer, error) {
				out, err := b.kubectl(append([]string{"exec", pod, "--", "/probe", "marked", netip.AddrPortFrom(s.db, 5432).String()}, marks...)...).CombinedOutput()
				if err != nil || strings.TrimSpace(string(out)) != "0" {
					return breached, err
				}
				return nobody, nil
			})
		}
	}
}

// besideLeg: the tuple of a connection that the proxy carries, while it lives. It lives on.
func (b *besieged) besideLeg() {
	second := b.nodes[1]
	conn := b.talk(b.beside(second)("psql", "-X", "-A", "-t", "-U", "postgres", "host=127.0.0.1 port=5433 dbname=postgres sslmode=disable connect_timeout=20"))
	s := b.sides[0]
	var port uint64
	eventually(b.t, 20*time.Second, "the database has the connection", func() error {
		out := b.nodes[0].run("nsenter", "--net="+b.database, "ss", "-Htn", "state", "established", "sport", "=", ":5432")
		m := regexp.MustCompile(regexp.QuoteMeta(s.client.String()) + `\]?:(\d+)`).FindStringSubmatch(out)
		if m == nil {
			return errors.New(out)
		}
		var err error
		port, err = strconv.ParseUint(m[1], 10, 16)
		return err
	})
	for name, w := range map[string]*wire{"pod": b.raw, "host": b.inside[b.device+" past"]} {
		b.attack(name+"/as a leg of the proxy", false, func() (answer, error) {
			p := b.syn(w, s, s.client)
			p.Src = netip.AddrPortFrom(s.client, uint16(port))
			return w.shake(p, b.claims(w, s, s.client))
		})
	}
	if err := conn.hangUp(); err != nil {
		b.t.Errorf("the connection whose tuple was forged: %v", err)
	}
}

// byPath: in the name of clients that have a path, which do not say that they know nothing of it.
func (b *besieged) byPath() {
	for _, n := range b.nodes {
		b.open(b.bypass("path-"+n.name, "10m", n), outputOf(b.beside(n)))
		address, _ := b.addresses("client-" + n.name)
		for _, iptables := range []string{"iptables", "ip6tables"} {
			n.run("nsenter", "--net="+b.network(n, address), iptables, "-I", "OUTPUT", "-p", "tcp", "--tcp-flags", "RST", "RST", "-j", "DROP")
		}
	}
	for _, s := range b.sides {
		b.attack("path/blind/"+s.name, false, func() (answer, error) { return b.raw.shake(b.syn(b.raw, s, s.client)) })
		b.attack("path/in the place of a neighbour/"+s.name, true, func() (answer, error) {
			return b.raw.shake(b.syn(b.raw, s, s.neighbour), b.claims(b.raw, s, s.neighbour))
		})
		b.attack("path/in the place of the gateway/"+s.name, true, func() (answer, error) {
			return b.raw.shake(b.syn(b.raw, s, s.client), b.claims(b.raw, s, s.client))
		})
		for name, w := range b.inside {
			// Past the hooks of the bridge are still those of the device.
			b.attack("path/host "+strings.Replace(name, b.device, "device", 1)+"/"+s.name, name != b.device+" past", func() (answer, error) {
				return w.shake(b.syn(w, s, s.client))
			})
		}
	}
}

// impostor: the pod in the node's network listens at the database's port there, and at that of the node's service, which nobody else does.
func (b *besieged) impostor() {
	const word = "impostor"
	for _, port := range []string{"5432", "7000"} {
		cmd := b.nodes[0].inside(context.Background(), filepath.Join(b.bin, "kubectl"), "--kubeconfig", b.kubeconfig("admin"), "exec", "host", "--", "/probe", "serve", port, word)
		must(b.t, cmd.Start())
		b.t.Cleanup(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		})
	}
	node := b.nodes[0].ip
	says := func(connect dial, to string) error {
		got := b.readFrom(b.nodes[1], connect, to)
		if !strings.HasPrefix(got, word) {
			return fmt.Errorf("%w: %q", errNoAnswer, got)
		}
		return nil
	}
	eventually(b.t, 20*time.Second, "the impostor is reached at the database's port on the node, which is no service's", func() error { return says(plainly, node+":5432") })
	eventually(b.t, 20*time.Second, "who has the port of a service of the node is that service, to those who prove themselves", func() error { return says(b.identify(), node+":7000") })
	if err := says(plainly, node+":7000"); err == nil {
		b.t.Error("LEAKED: the impostor at the port of the node's service, without identity")
	}
	if err := says(plainly, netip.AddrPortFrom(b.sides[0].db, 5432).String()); err == nil {
		b.t.Error("the impostor answers for the database")
	}
}

// readFrom is what is read from an address, by a thread in the node's network.
func (b *besieged) readFrom(n *node, connect dial, to string) string {
	got := make(chan string, 1)
	go func() {
		runtime.LockOSThread() // and ends with the thread
		if err := n.enter(); err != nil {
			got <- err.Error()
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		conn, err := connect(ctx, "tcp", to)
		if err != nil {
			got <- err.Error()
			return
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(3 * time.Second)) // a live socket takes one
		answer, _ := io.ReadAll(conn)                         // what was read counts
		got <- string(answer)
	}()
	return <-got
}

// unseen: our sockets and files are in no pod, and none of them has a name that is the network's.
func (b *besieged) unseen() {
	for _, pod := range []string{"raw", "host"} {
		if out, err := b.kubectl("exec", pod, "--", "/probe", "stat", "/run/sallyport").CombinedOutput(); err == nil || !strings.Contains(string(out), "no such file") {
			b.t.Errorf("pod %s has /run/sallyport: %v: %s", pod, err, out)
		}
	}
	if names := b.nodes[0].run("cat", "/proc/net/unix"); regexp.MustCompile(`@\S*sallyport`).MatchString(names) {
		b.t.Errorf("sockets with abstract names:\n%s", names)
	}
}
