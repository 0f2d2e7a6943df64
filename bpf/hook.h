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
 * so a flow meets exactly one hook in each direction, for its whole life.
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
};

/* A pod whose device is not known yet is seen everywhere: closed, rather than passed. */
static __always_inline bool sp_pod_at(const struct sp_service *svc, __u32 ifindex)
{
	return svc->target == SP_TARGET_POD && (!svc->ifindex || svc->ifindex == ifindex);
}

static __always_inline bool sp_sees_towards(enum sp_hook hook, enum sp_behind behind,
					    const struct sp_service *svc, __u32 ifindex)
{
	if (hook == SP_HOOK_OUT)
		return behind == SP_BEHIND_POD ? svc->target == SP_TARGET_POD : sp_pod_at(svc, ifindex);
	return svc->target == SP_TARGET_HOST;
}

/* Is this the device that the service's paths are for? */
static __always_inline bool sp_is_instance(const struct sp_service *svc, __u32 ifindex)
{
	return svc->target == SP_TARGET_HOST || svc->ifindex == ifindex;
}

static __always_inline bool sp_sees_from(enum sp_hook hook, const struct sp_service *svc,
					 __u32 ifindex)
{
	if (hook == SP_HOOK_IN)
		return sp_pod_at(svc, ifindex);
	return svc->target == SP_TARGET_HOST;
}

/* Host services are found by port: the packet may be of another machine. Not on lo. */
static __always_inline bool sp_may_be_foreign(const struct sp_service *svc, enum sp_hook hook)
{
	return svc->target == SP_TARGET_HOST && hook != SP_HOOK_LO;
}

#endif
