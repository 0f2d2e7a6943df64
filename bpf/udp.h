/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef SP_UDP_H
#define SP_UDP_H

/*
 * Datagrams. There is no proxy for them: a datagram to a UDP service goes straight on under a live path,
 * or it is refused. The first opens a flow; silence, the path's end or its deadline closes it. To a port
 * that is protected for TCP alone every datagram is refused, so that QUIC does not go around the proxy.
 */

#include "hook.h"

static __always_inline bool sp_udp_idle(const struct sp_flow *flow, __u64 now)
{
	return flow->udp_idle_s && now > flow->last_ns + flow->udp_idle_s * SP_SECOND_NS;
}

/* A flow of datagrams that was silent for too long is over, for good. Its path is not. */
static __always_inline void sp_udp_touch(struct sp_flow *flow)
{
	if (sp_udp_idle(flow, bpf_ktime_get_boot_ns()))
		__sync_val_compare_and_swap((__u32 *)&flow->ended, SP_REASON_NONE, SP_REASON_UDP_IDLE);
}

static __noinline int sp_open_udp(const struct sp_flow_key *key, const struct sp_packet *p,
				  const struct sp_service *svc, __u32 hook)
{
	struct sp_flow *flow;
	int reason;

	if (!key || !p || !svc)
		return SP_REASON_UDP_NO_PATH;
	reason = sp_open_flow(key, p, svc->id, hook << 24 | (p->ifindex & 0xffffff));
	if (reason == SP_REASON_NO_PATH)
		return SP_REASON_UDP_NO_PATH;
	if (reason != SP_REASON_PATH_OPEN)
		return reason;
	flow = bpf_map_lookup_elem(&sp_flows, key);
	if (flow)
		flow->udp_idle_s = svc->udp_idle_s;
	return reason;
}

/* A datagram towards a service, by the flow that it belongs to. NO_PATH: there is none, and may be one. */
static __noinline int sp_udp_known(struct __sk_buff *skb, const struct sp_packet *p,
				   const struct sp_flow_key *key, const struct sp_service *svc,
				   __u32 hook)
{
	struct sp_config *cfg = sp_get_config();
	struct sp_flow *flow;
	enum sp_reason reason;

	if (!cfg || !p || !key || !svc)
		return SP_REASON_NO_CONFIG;
	flow = bpf_map_lookup_elem(&sp_flows, key);
	if (!flow && sp_may_be_foreign(svc, hook) && !sp_is_local(skb, &p->dst, &p->src, p->version))
		return SP_REASON_NONE;
	if (!svc->udp_idle_s)
		return SP_REASON_UDP_DENIED;
	if (flow && !sp_is_instance(svc, p->ifindex)) {
		sp_end_flow(key, flow, SP_REASON_PATH_STALE);
		return SP_REASON_PATH_STALE;
	}
	if (flow) {
		sp_udp_touch(flow);
		reason = sp_flow_packet(cfg, key, flow, p, svc->id, true);
		if (reason == SP_REASON_PATH_LIVE)
			return reason;
		if (!sp_replace_flow(key))
			return SP_REASON_RING_FULL;
	}
	if (!sp_is_instance(svc, p->ifindex))
		return SP_REASON_UDP_NO_PATH;
	return SP_REASON_NO_PATH;
}

/*
 * A datagram towards a service: PATH_OPEN or PATH_LIVE when a path serves it, NONE when it is none of
 * ours; any other reason refuses it. One after the other and not one in the other: the stack of kernels
 * before 6.8 has no room for both.
 */
static __always_inline int sp_udp_towards(struct __sk_buff *skb, const struct sp_packet *p,
					  const struct sp_flow_key *key,
					  const struct sp_service *svc, __u32 hook)
{
	int reason = sp_udp_known(skb, p, key, svc, hook);

	return reason == SP_REASON_NO_PATH ? sp_open_udp(key, p, svc, hook) : reason;
}

/* A datagram from a service, as above. What leaves from a port of TCP alone is somebody's client. */
static __noinline int sp_udp_from(struct __sk_buff *skb, const struct sp_packet *p,
				  const struct sp_flow_key *key, const struct sp_service *svc, __u32 hook)
{
	struct sp_config *cfg = sp_get_config();
	struct sp_flow *flow;

	if (!cfg || !p || !key || !svc)
		return SP_REASON_NO_CONFIG;
	if (!svc->udp_idle_s)
		return SP_REASON_NONE;
	flow = bpf_map_lookup_elem(&sp_flows, key);
	if (flow) {
		sp_udp_touch(flow);
		return sp_flow_packet(cfg, key, flow, p, svc->id, false);
	}
	if (sp_may_be_foreign(svc, hook) && !sp_is_local(skb, &p->src, &p->dst, p->version))
		return SP_REASON_NONE;
	return SP_REASON_UDP_NO_FLOW;
}

static __always_inline bool sp_udp_passes(enum sp_reason reason)
{
	return reason == SP_REASON_NONE || reason == SP_REASON_PATH_OPEN || reason == SP_REASON_PATH_LIVE;
}

#endif
