//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The tc programs of Sallyport. Each is attached by a tcx link at the head of its chain and returns
 * TCX_NEXT (TC_ACT_UNSPEC) for everything that is not ours or goes on under a path.
 */
#include "px.h"
#include "xdp.h"
#include "backstop.h"

/* Uplinks and the host side of pod devices: ingress and egress. */
SEC("tcx/ingress")
int sp_dev_in(struct __sk_buff *skb)
{
	return sp_device(skb, SP_HOOK_IN, SP_BEHIND_ANY, ETH_HLEN);
}

SEC("tcx/egress")
int sp_dev_out(struct __sk_buff *skb)
{
	return sp_device(skb, SP_HOOK_OUT, SP_BEHIND_ANY, ETH_HLEN);
}

/* The host side of a pod's device, egress. */
SEC("tcx/egress")
int sp_pod_out(struct __sk_buff *skb)
{
	return sp_device(skb, SP_HOOK_OUT, SP_BEHIND_POD, ETH_HLEN);
}

/* Ports of a bridge, and the bridge. */
SEC("tcx/ingress")
int sp_port_in(struct __sk_buff *skb)
{
	return sp_device(skb, SP_HOOK_IN, SP_BEHIND_PORT, ETH_HLEN);
}

SEC("tcx/egress")
int sp_port_out(struct __sk_buff *skb)
{
	return sp_device(skb, SP_HOOK_OUT, SP_BEHIND_PORT, ETH_HLEN);
}

SEC("tcx/egress")
int sp_pod_port_out(struct __sk_buff *skb)
{
	return sp_device(skb, SP_HOOK_OUT, SP_BEHIND_POD_PORT, ETH_HLEN);
}

SEC("tcx/ingress")
int sp_bridge_in(struct __sk_buff *skb)
{
	return sp_device(skb, SP_HOOK_IN, SP_BEHIND_BRIDGE, ETH_HLEN);
}

SEC("tcx/egress")
int sp_bridge_out(struct __sk_buff *skb)
{
	return sp_device(skb, SP_HOOK_OUT, SP_BEHIND_BRIDGE, ETH_HLEN);
}

/* The same on devices without an Ethernet header: tun, IP tunnels, WireGuard. */
SEC("tcx/ingress")
int sp_l3_in(struct __sk_buff *skb)
{
	return sp_device(skb, SP_HOOK_IN, SP_BEHIND_ANY, 0);
}

SEC("tcx/egress")
int sp_l3_out(struct __sk_buff *skb)
{
	return sp_device(skb, SP_HOOK_OUT, SP_BEHIND_ANY, 0);
}

/* Loopback: clients on the node, 127/8, ::1 and the node's own addresses. */
SEC("tcx/ingress")
int sp_lo_in(struct __sk_buff *skb)
{
	return sp_device(skb, SP_HOOK_LO, SP_BEHIND_ANY, ETH_HLEN);
}

/* The host end of the px pair. */
SEC("tcx/ingress")
int sp_px0_in(struct __sk_buff *skb)
{
	return sp_px0(skb);
}

/* The proxy's end of the px pair, and its lo. */
SEC("tcx/ingress")
int sp_px1_in(struct __sk_buff *skb)
{
	return sp_px_in(skb, false);
}

SEC("tcx/ingress")
int sp_px_lo_in(struct __sk_buff *skb)
{
	return sp_px_in(skb, true);
}

SEC("tcx/egress")
int sp_px_lo_out(struct __sk_buff *skb __attribute__((unused)))
{
	return sp_px_to_node();
}

/* The filter in front of an uplink, in its driver. The same for generic XDP is not aware of frames in several
 * buffers: the kernel then makes the packet linear, where it would otherwise hand it on to tc without
 * its Ethernet header (6.18).
 */
SEC("xdp.frags")
int sp_xdp_up(struct xdp_md *ctx)
{
	return sp_xdp(ctx, false);
}

SEC("xdp")
int sp_xdp_generic(struct xdp_md *ctx)
{
	return sp_xdp(ctx, true);
}

/* Every socket below a control group, in all network namespaces. */
SEC("cgroup_skb/ingress")
int sp_cg_in(struct __sk_buff *skb)
{
	return sp_backstop_in(skb);
}

/* The same sockets, as they send. */
SEC("cgroup_skb/egress")
int sp_cg_out(struct __sk_buff *skb)
{
	return sp_note_speaker(skb);
}

/* Every look-up of a socket in the host's network namespace. */
SEC("sk_lookup")
int sp_sklookup(struct bpf_sk_lookup *ctx)
{
	return sp_look_up(ctx);
}

/* Types that no map names, kept in the BTF for Go. */
const struct sp_event *sp_btf_event __attribute__((unused));
const enum sp_flags *sp_btf_flags __attribute__((unused));

char _license[] SEC("license") = "Dual BSD/GPL";
