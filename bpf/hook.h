/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef SP_HOOK_H
#define SP_HOOK_H

/*
 * Which services a hook of the host namespace can see:
 *
 *   hook   packets towards    packets from
 *   IN     host services      pod services
 *   OUT    pod services       host services
 *   LO     host services      host services
 *
 * A bridge and its ports share the work, because a packet meets both: the ports see the pod services,
 * the bridge the host services. So a flow meets exactly one hook in each direction, for its whole life.
 *
 * A pod's service is behind one device, and OUT of an uplink leaves the packets of a known one alone:
 * they may go to another node. But what goes out to a pod has arrived. There a protected address is
 * closed whatever device the table has, and a path serves only on the one that it has.
 */

#include "path.h"

/* What is behind a device. */
enum sp_behind {
	SP_BEHIND_ANY = 0,	/* the network, or the node itself */
	SP_BEHIND_POD,
	SP_BEHIND_PORT,		/* of a bridge: the network, or a pod that is not known for one */
	SP_BEHIND_POD_PORT,
	SP_BEHIND_BRIDGE,	/* the bridge itself: what is behind its ports */
};

static __always_inline bool sp_is_port(enum sp_behind behind)
{
	return behind == SP_BEHIND_PORT || behind == SP_BEHIND_POD_PORT;
}

/* What goes out here has arrived at a pod. */
static __always_inline bool sp_ends_at_pod(enum sp_hook hook, enum sp_behind behind)
{
	return hook == SP_HOOK_OUT && (behind == SP_BEHIND_POD || behind == SP_BEHIND_POD_PORT);
}

/* A pod whose device is not known yet is seen everywhere: closed, rather than passed. */
static __always_inline bool sp_pod_at(const struct sp_service *svc, __u32 ifindex)
{
	return svc->target == SP_TARGET_POD && (!svc->ifindex || svc->ifindex == ifindex);
}

static __always_inline bool sp_sees_towards(enum sp_hook hook, enum sp_behind behind,
					    const struct sp_service *svc, __u32 ifindex)
{
	if (hook != SP_HOOK_OUT)
		return svc->target == SP_TARGET_HOST && !sp_is_port(behind);
	if (sp_ends_at_pod(hook, behind))
		return svc->target == SP_TARGET_POD;
	return behind != SP_BEHIND_BRIDGE && sp_pod_at(svc, ifindex);
}

/* Is this the device that the service's paths are for? */
static __always_inline bool sp_is_instance(const struct sp_service *svc, __u32 ifindex)
{
	return svc->target == SP_TARGET_HOST || svc->ifindex == ifindex;
}

static __always_inline bool sp_sees_from(enum sp_hook hook, enum sp_behind behind,
					 const struct sp_service *svc, __u32 ifindex)
{
	if (hook == SP_HOOK_IN)
		return behind != SP_BEHIND_BRIDGE && sp_pod_at(svc, ifindex);
	return svc->target == SP_TARGET_HOST && !sp_is_port(behind);
}

/* Host services are found by port: the packet may be of another machine. Not on lo. */
static __always_inline bool sp_may_be_foreign(const struct sp_service *svc, enum sp_hook hook)
{
	return svc->target == SP_TARGET_HOST && hook != SP_HOOK_LO;
}

#endif
