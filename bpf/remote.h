/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef SP_REMOTE_H
#define SP_REMOTE_H

/*
 * Services on other nodes. The proxy speaks to them for this node's workloads alone, where these send: IN of a pod's
 * device, or of a bridge that has nothing but pods; OUT of any other device, for sockets of the node. What is
 * forwarded for others goes its way, and so do the answers to it: a packet from such a service is ours if it answers the
 * proxy, and where what it answers came from, so that other programs and conntrack see either all of a connection or nothing.
 * A host's connection may leave by one device and be answered by another.
 */

#include "hook.h"
#include "socket.h"

/* Hooks where a workload of this node may ask, and where it may be answered: known when a program is built. */
static __always_inline bool sp_may_ask(enum sp_hook hook, enum sp_behind behind)
{
	return hook != SP_HOOK_LO && !sp_is_port(behind) && !sp_ends_at_pod(hook, behind);
}

static __always_inline bool sp_may_be_answered(enum sp_hook hook, enum sp_behind behind)
{
	return hook != SP_HOOK_LO && !sp_is_port(behind);
}

/* Is it a workload of this node that asks a service on another one? */
__noinline int sp_asks_remote(struct __sk_buff *skb, const struct sp_service *svc, __u32 hook)
{
	bool pods;

	if (!svc || svc->target != SP_TARGET_REMOTE)
		return 0;
	pods = sp_device_facts(skb->ifindex) & (SP_DEVICE_POD | SP_DEVICE_PODS);
	return hook == SP_HOOK_IN ? pods : !pods && sp_sent_by_host(skb);
}

/* Is it the answer of such a service to the proxy, and is it taken here? */
__noinline int sp_answers_remote(const struct sp_flow_key *key, const struct sp_service *svc, __u32 hook, __u32 ifindex)
{
	struct sp_leg *leg;

	if (!key || !svc || svc->target != SP_TARGET_REMOTE)
		return 0;
	leg = sp_find_leg(key, SP_LEG_UP, 0);
	if (!leg)
		return 0;
	if (hook == SP_HOOK_IN)
		return leg->hook == SP_HOOK_OUT;
	return leg->hook == SP_HOOK_IN && leg->ifindex == ifindex;
}

#endif
