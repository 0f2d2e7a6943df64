package datapath_test

import (
	"net/netip"
	"testing"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
)

const (
	uplinkFact = bpf.SallyportSpFactSP_DEVICE_UPLINK
	podFact    = bpf.SallyportSpFactSP_DEVICE_POD
	bound      = podFact | bpf.SallyportSpFactSP_DEVICE_BOUND4 | bpf.SallyportSpFactSP_DEVICE_BOUND6
)

// known says what the agent knows of the lab's devices: the uplink, and the pods.
func known(uplink, pod bpf.SallyportSpFact) given {
	return func(t testing.TB, r *rig, _ scene, _ *probe) {
		for name, facts := range map[string]bpf.SallyportSpFact{lab.Uplink: uplink, lab.PodDevice(0): pod, lab.PodDevice(1): pod} {
			check(t, r.m.SpDevices.Put(uint32(r.device(t, name)), &bpf.Device{Facts: facts}))
		}
	}
}

// sourced is a SYN to the scene's service that comes in by a device with a source.
func sourced(device string, source func(r *rig, f lab.Family) netip.Addr) func(*rig) func(scene) probe {
	return func(r *rig) func(scene) probe {
		return func(s scene) probe {
			if r.Lab == nil {
				return at("sp_dev_in", s.device, tcp(s.client, s.server, syn)) // only its program is looked at
			}
			from := netip.AddrPortFrom(source(r, s.family), clientPort)
			i, _ := r.Node.Ifindex(device)
			return at("sp_dev_in", i, tcp(from, s.server, syn))
		}
	}
}

// truthCases: what comes in has the source that its device can have. The scenes are those of services elsewhere: what passes
// goes on untouched.
func truthCases(r *rig) []progCase {
	pod := func(i int) func(*rig, lab.Family) netip.Addr {
		return func(r *rig, f lab.Family) netip.Addr { return r.Pods[i].Addr(f) }
	}
	node := func(r *rig, f lab.Family) netip.Addr { return r.Node.Addr(f) }
	client := func(r *rig, f lab.Family) netip.Addr { return r.Client.Addr(f) }
	loopback := func(_ *rig, f lab.Family) netip.Addr { return f.Loopback() }
	linkLocal := func(_ *rig, f lab.Family) netip.Addr {
		if f == lab.IPv4 {
			return netip.MustParseAddr("169.254.7.7")
		}
		return netip.MustParseAddr("fe80::7")
	}
	nowhere := func(_ *rig, f lab.Family) netip.Addr {
		if f == lab.IPv4 {
			return netip.MustParseAddr("198.51.100.7")
		}
		return netip.MustParseAddr("2001:db8::7")
	}
	passes := want{verdict: actNext}
	lies := func(reason flow.Reason) want { return want{verdict: actDrop, counts: one(reason)} }
	all := known(uplinkFact, bound)
	of := func(name, device string, source func(*rig, lab.Family) netip.Addr, w want, g ...given) progCase {
		return progCase{name: "source/" + name, scenes: []string{"pod"}, packet: sourced(device, source)(r), given: g, want: w, unread: true}
	}
	up, pod1 := lab.Uplink, lab.PodDevice(1)
	return []progCase{
		of("pod, its own", pod1, pod(1), passes, all),
		of("pod, another pod's", pod1, pod(0), lies(flow.ReasonSourceForeign), all),
		of("pod, a client's", pod1, client, lies(flow.ReasonSourceForeign), all),
		of("pod, the node's", pod1, node, lies(flow.ReasonSourceForeign), all),
		of("pod, loopback", pod1, loopback, lies(flow.ReasonSourceForeign), all),
		of("pod, nobody's", pod1, nowhere, lies(flow.ReasonSourceForeign), all),
		of("pod, link-local", pod1, linkLocal, passes, all),
		of("pod, not bound", pod1, pod(0), passes, known(uplinkFact, podFact)),
		of("pod, not known", pod1, pod(0), passes),
		of("uplink, a client's", up, client, passes, all),
		of("uplink, the node's", up, node, lies(flow.ReasonSourceOwn), all),
		of("uplink, loopback", up, loopback, lies(flow.ReasonSourceOwn), all),
		of("uplink, a pod's", up, pod(1), lies(flow.ReasonSourceOwn), all),
		of("uplink, of a pod that is not bound", up, pod(1), passes, known(uplinkFact, podFact)),
		of("uplink, not known", up, node, passes),
	}
}

// ownTruthCases are those lies towards services of the node, which this hook decides about.
func ownTruthCases(r *rig) []progCase {
	another := func(r *rig, f lab.Family) netip.Addr { return r.Pods[0].Addr(f) }
	node := func(r *rig, f lab.Family) netip.Addr { return r.Node.Addr(f) }
	of := func(device string, source func(*rig, lab.Family) netip.Addr, reason flow.Reason) progCase {
		return progCase{name: "own source/" + device, scenes: []string{"host"}, packet: sourced(device, source)(r), given: []given{known(uplinkFact, bound)},
			want: want{verdict: actDrop, counts: one(reason)}, unread: true}
	}
	return []progCase{of(lab.PodDevice(1), another, flow.ReasonSourceForeign), of(lab.Uplink, node, flow.ReasonSourceOwn)}
}

func TestSourceTruth(t *testing.T) {
	r := newRig(t, 0, 0)
	runCases(t, r, append(truthCases(r), ownTruthCases(r)...))
}

// ingressCases: a path for one kind of device takes no client of another.
func ingressCases() []progCase {
	only := func(i datapath.Ingress) given {
		return path(datapath.PathActive, func(_ *bpf.PathKey, _ *bpf.PathRef, v *bpf.Path) { v.Ingress = bpf.SallyportSpIngress(i) })
	}
	opened := pass(flow.ReasonPathOpen, "flow 1/0").recorded("OPEN PATH_OPEN 1/0")
	toProxy := steer(flow.ReasonPathIngress, "leg down", "origin")
	all := known(uplinkFact, bound)
	by := func(device string) given {
		return func(t testing.TB, r *rig, _ scene, p *probe) { p.ctx.IngressIfindex = uint32(r.device(t, device)) }
	}
	of := func(name string, scenes []string, send func(scene) probe, w want, g ...given) progCase {
		return progCase{name: "ingress/" + name, scenes: scenes, packet: send, given: g, want: w}
	}
	host, pod, lo := []string{"host"}, []string{"pod"}, []string{"lo"}
	return []progCase{
		of("uplink, by it", host, towards(syn), opened, all, only(datapath.IngressUplink)),
		of("pods, by an uplink", host, towards(syn), toProxy, all, only(datapath.IngressPod)),
		of("local, by an uplink", host, towards(syn), toProxy, all, only(datapath.IngressLocal)),
		of("uplink, by a device that is not known", host, towards(syn), toProxy, only(datapath.IngressUplink)),
		of("local, on the node", lo, towards(syn), opened, all, only(datapath.IngressLocal)),
		of("uplink, on the node", lo, towards(syn), toProxy, all, only(datapath.IngressUplink)),
		of("uplink to a pod", pod, towards(syn), opened, by(lab.Uplink), all, only(datapath.IngressUplink)),
		of("pod to a pod", pod, towards(syn), opened, by(lab.PodDevice(1)), all, only(datapath.IngressPod)),
		of("pods, uplink to a pod", pod, towards(syn), toProxy, by(lab.Uplink), all, only(datapath.IngressPod)),
		of("local to a pod", pod, towards(syn), opened, all, only(datapath.IngressLocal)),
		of("uplink, local to a pod", pod, towards(syn), toProxy, all, only(datapath.IngressUplink)),
	}
}

func TestIngress(t *testing.T) {
	r := newRig(t, 0, 0)
	runCases(t, r, ingressCases())
}
