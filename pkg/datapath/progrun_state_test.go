package datapath_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// The entries and records that a packet leaves, in words:
//
//	flow 1/0            packets to server and to client; every packet of a case has one size
//	flow 1/0 ended=PATH_REVOKED FIN_CLIENT
//	leg down | leg up | stray down | stray up      with their flags
//	origin
//	path SPENT          a path with a budget of bytes or packets
//	OPEN PATH_OPEN | DENY STRAY | DENY STRAY x3
//	DENY FRAGMENT *     ports unknown
//
// What is as the scene has it is left out: tuple, hook, device, service, epoch 1, slot 0, the grant's
// name. What differs is written behind it.

const grantName = "01TESTGRANT"

func (r *rig) renderState(t testing.TB, s scene, p probe) []string {
	t.Helper()
	var out []string
	for k, v := range all[bpf.FlowKey, bpf.Flow](t, r.m.SpFlows) {
		if v.OpenedNs != 0 { // else it only fills the table
			out = append(out, renderFlow(s, p, k, v))
		}
	}
	for k, v := range all[bpf.LegKey, bpf.Leg](t, r.m.SpLegs) {
		if v.OpenedNs != 0 {
			out = append(out, "leg "+renderLeg(s, k, v, s.service))
		}
	}
	for k, v := range all[bpf.LegKey, bpf.Leg](t, r.m.SpStrays) {
		out = append(out, "stray "+renderLeg(s, k, v, 0))
	}
	for k, v := range all[bpf.OriginKey, bpf.Origin](t, r.m.SpOrigins) {
		out = append(out, "origin"+tuple(s, k.Client, k.Server, s.client.Port(), uint16(k.ServerPort))+placed(s, v.Hook, v.Ifindex))
	}
	for _, v := range all[bpf.FragmentKey, bpf.Fragment](t, r.m.SpFragments) {
		out = append(out, "fragment "+map[bpf.SallyportSpFragmentKind]string{asFree: "free", toServer: "to server", toClient: "to client"}[v.Kind])
		if v.Kind != asFree && (v.ClientPort != s.client.Port() || v.ServerPort != s.server.Port()) {
			t.Errorf("fragment of %d to %d", v.ClientPort, v.ServerPort)
		}
	}
	var v bpf.Path
	var state bpf.PathStatus
	check(t, r.m.SpPaths.Lookup(uint32(0), &v))
	check(t, r.m.SpPathState.Lookup(uint32(0), &state))
	if budget := v.BytesLimit != 0 || v.PacketsLimit != 0; budget && datapath.PathState(state.State) == datapath.PathSpent {
		out = append(out, "path SPENT")
	}
	return out
}

func renderFlow(s scene, p probe, k bpf.FlowKey, v bpf.Flow) string {
	line := fmt.Sprintf("flow %d/%d", v.PacketsToServer, v.PacketsToClient)
	per := p.bytes / p.segs
	if v.BytesToServer != v.PacketsToServer*per || v.BytesToClient != v.PacketsToClient*per {
		line += fmt.Sprintf(" %d/%d bytes", v.BytesToServer, v.BytesToClient)
	}
	line += tuple(s, k.Client, k.Server, k.ClientPort, k.ServerPort) + placed(s, v.Hook, v.Ifindex)
	if v.Slot != 0 || v.Epoch != 1 {
		line += fmt.Sprintf(" slot=%d epoch=%d", v.Slot, v.Epoch)
	}
	if v.ServiceId != s.service {
		line += fmt.Sprintf(" service=%d", v.ServiceId)
	}
	if v.Ended != 0 {
		line += " ended=" + flow.Reason(v.Ended).String()
	}
	if v.LastNs < v.OpenedNs {
		line += fmt.Sprintf(" opened=%d last=%d", v.OpenedNs, v.LastNs)
	}
	return line + flagNames(v.Flags)
}

func renderLeg(s scene, k bpf.LegKey, v bpf.Leg, service uint32) string {
	side := map[bpf.SallyportSpLegSide]string{bpf.SallyportSpLegSideSP_LEG_DOWN: "down", bpf.SallyportSpLegSideSP_LEG_UP: "up"}[k.Side]
	line := side + tuple(s, k.Client, k.Server, k.ClientPort, k.ServerPort) + placed(s, v.Hook, v.Ifindex)
	if v.ServiceId != service {
		line += fmt.Sprintf(" service=%d", v.ServiceId)
	}
	if v.LastNs < v.OpenedNs {
		line += fmt.Sprintf(" opened=%d last=%d", v.OpenedNs, v.LastNs)
	}
	return line + flagNames(v.Flags)
}

func tuple(s scene, client, server bpf.Addr, cport, sport uint16) string {
	if datapath.FromAddr(client) == s.client.Addr() && datapath.FromAddr(server) == s.server.Addr() &&
		cport == s.client.Port() && sport == s.server.Port() {
		return ""
	}
	if datapath.FromAddr(client) == s.server.Addr() && datapath.FromAddr(server) == s.client.Addr() &&
		cport == s.server.Port() && sport == s.client.Port() {
		return " reversed"
	}
	if datapath.FromAddr(client) == s.client.Addr() && datapath.FromAddr(server) == foreign(s) &&
		cport == s.client.Port() && sport == s.server.Port() {
		return " elsewhere"
	}
	if datapath.FromAddr(client) == s.client.Addr() && cport == s.client.Port() {
		switch {
		case datapath.FromAddr(server).IsMulticast():
			return " group"
		case datapath.FromAddr(server).IsLinkLocalUnicast():
			return " link"
		case datapath.FromAddr(server) == s.server.Addr() && (sport == hostWebPort || sport == podWebPort):
			return " web"
		}
	}
	return fmt.Sprintf(" of %v:%d to %v:%d", datapath.FromAddr(client), cport, datapath.FromAddr(server), sport)
}

func placed(s scene, hook bpf.SallyportSpHook, device uint32) string {
	if hook == s.hook && int(device) == s.device {
		return ""
	}
	return fmt.Sprintf(" at hook %d device %d", hook, device)
}

func flagNames(flags uint32) string {
	var out strings.Builder
	for i, name := range []string{"FIN_CLIENT", "FIN_SERVER", "RST", "ANSWERED", "CUT_SERVER", "CUT_CLIENT", "AGAIN"} {
		if flags&(1<<i) != 0 {
			out.WriteString(" " + name)
		}
	}
	return out.String()
}

// renderEvents also holds that the records are numbered without gaps but losses.
func (r *rig) renderEvents(t testing.TB, events []*bpf.Event, s scene) []string {
	t.Helper()
	var out []string
	for _, e := range events {
		out = append(out, renderEvent(t, s, e))
	}
	return out
}

func renderEvent(t testing.TB, s scene, e *bpf.Event) string {
	t.Helper()
	line := flow.Event(e.Kind).String() + " " + flow.Reason(e.Reason).String()
	if e.ClientPort == 0 && e.ServerPort == 0 && datapath.FromAddr(e.Client) == s.server.Addr() && s.client.Addr() != s.server.Addr() {
		line += " of the service"
	} else if e.ClientPort == 0 && e.ServerPort == 0 && datapath.FromAddr(e.Server) == s.server.Addr() {
		line += " *" // the ports were not read
	} else if e.ClientPort == 0 && e.ServerPort == 0 && datapath.FromAddr(e.Server) == foreign(s) {
		line += " elsewhere *"
	} else {
		line += tuple(s, e.Client, e.Server, e.ClientPort, e.ServerPort)
	}
	unread := e.Client == bpf.Addr{} && e.Server == bpf.Addr{}
	if e.BootNs == 0 || e.BootNs > uint64(datapath.BootTime()) || e.Seq == 0 || e.Protocol == 0 && !unread {
		t.Errorf("record of %s has boot time %d, sequence %d, protocol %d", line, e.BootNs, e.Seq, e.Protocol)
	}
	if kind := flow.Event(e.Kind); kind == flow.EventDeny || kind == flow.EventBackstop {
		if flow.Verdict(e.Verdict) != flow.VerdictDenied {
			line += " " + flow.Verdict(e.Verdict).String()
		}
		if int(e.Ifindex) != s.device {
			line += fmt.Sprintf(" device %d", e.Ifindex)
		}
		if e.Count != 1 {
			line += fmt.Sprintf(" x%d", e.Count)
		}
		return line
	}
	if flow.Verdict(e.Verdict) != flow.VerdictBypassed || e.Count != 1 || e.FlowId == 0 {
		t.Errorf("record of %s has verdict %d, count %d, flow %d", line, e.Verdict, e.Count, e.FlowId)
	}
	line += placed(s, e.Hook, e.Ifindex) + fmt.Sprintf(" %d/%d", e.PacketsToServer, e.PacketsToClient)
	if e.ServiceId != s.service {
		line += fmt.Sprintf(" service=%d", e.ServiceId)
	}
	if name := datapath.FromLabel(e.Grant); name != grantName {
		line += fmt.Sprintf(" grant %q", name)
	}
	return line
}
