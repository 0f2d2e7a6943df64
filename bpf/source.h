/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef SP_SOURCE_H
#define SP_SOURCE_H

/*
 * Source truth. What comes out of a pod has an address that the node's routes send back to the same device;
 * what comes in by an uplink has none that is the node's own or behind a pod's device. The routing
 * table is asked for each packet with a flagged port, so that a new address needs nobody to tell us.
 * Which devices are held to that the agent says: those whose pods the routes know.
 */

#include "state.h"

static __always_inline __u32 sp_device_facts(__u32 ifindex)
{
	struct sp_device *dev = bpf_map_lookup_elem(&sp_devices, &ifindex);

	return dev ? dev->facts : 0;
}

static __always_inline bool sp_is_bound(__u32 facts, __u32 version)
{
	return facts & (version == 4 ? SP_DEVICE_BOUND4 : SP_DEVICE_BOUND6);
}

/* Link-local addresses and the unspecified one are not routed: they reach nobody but the node itself. */
static __always_inline bool sp_is_link_scope(const struct sp_addr *a, __u32 version)
{
	if (version == 4)
		return (a->bytes[12] == 169 && a->bytes[13] == 254);
	return a->bytes[0] == 0xfe && (a->bytes[1] & 0xc0) == 0x80;
}

/* The device by which the node would answer; 0: by none, -1: the address is the node's own. */
__noinline int sp_way_back(struct __sk_buff *skb, const struct sp_packet *p)
{
	struct sp_scratch *scratch = sp_get_scratch();
	struct bpf_fib_lookup *fib;
	long r;

	if (!scratch || !p)
		return 0;
	fib = &scratch->fib;
	__builtin_memset(fib, 0, sizeof(*fib));
	fib->ifindex = skb->ifindex;
	if (p->version == 4) {
		fib->family = SP_AF_INET;
		__builtin_memcpy(&fib->ipv4_src, &p->dst.bytes[12], 4);
		__builtin_memcpy(&fib->ipv4_dst, &p->src.bytes[12], 4);
	} else {
		fib->family = SP_AF_INET6;
		__builtin_memcpy(fib->ipv6_src, &p->dst, 16);
		__builtin_memcpy(fib->ipv6_dst, &p->src, 16);
	}
	r = bpf_fib_lookup(skb, fib, sizeof(*fib), 0);
	if (r == BPF_FIB_LKUP_RET_NOT_FWDED)
		return -1;
	if (r == BPF_FIB_LKUP_RET_FWD_DISABLED) /* nothing goes on from there, and nothing can be told */
		return p->ifindex;
	return r == BPF_FIB_LKUP_RET_SUCCESS || r == BPF_FIB_LKUP_RET_NO_NEIGH ||
	       r == BPF_FIB_LKUP_RET_FRAG_NEEDED ? (int)fib->ifindex : 0;
}

/* Why a packet that came in lies about its source, or NONE. */
__noinline int sp_source_lies(struct __sk_buff *skb, const struct sp_packet *p)
{
	__u32 facts;
	int back;

	if (!p)
		return SP_REASON_SOURCE_FOREIGN;
	facts = sp_device_facts(p->ifindex);
	if (!(facts & SP_DEVICE_UPLINK) && !sp_is_bound(facts, p->version))
		return SP_REASON_NONE;
	if (sp_is_link_scope(&p->src, p->version))
		return SP_REASON_NONE;
	back = sp_way_back(skb, p);
	if (facts & SP_DEVICE_UPLINK)
		return back < 0 || (back > 0 && sp_is_bound(sp_device_facts(back), p->version)) ?
		       SP_REASON_SOURCE_OWN : SP_REASON_NONE;
	return back == (int)p->ifindex ? SP_REASON_NONE : SP_REASON_SOURCE_FOREIGN;
}

/* By what kind of device the sender of a packet is reached. */
static __always_inline enum sp_ingress sp_ingress_of(const struct sp_packet *p, enum sp_hook hook)
{
	__u32 facts;

	if (hook == SP_HOOK_LO || (hook == SP_HOOK_OUT && !p->came_by))
		return SP_INGRESS_LOCAL;
	facts = sp_device_facts(hook == SP_HOOK_OUT ? p->came_by : p->ifindex);
	if (facts & SP_DEVICE_POD)
		return SP_INGRESS_POD;
	return facts & SP_DEVICE_UPLINK ? SP_INGRESS_UPLINK : SP_INGRESS_ANY;
}

#endif
