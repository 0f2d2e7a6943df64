/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef SP_FRAGMENT_H
#define SP_FRAGMENT_H

/*
 * Datagrams in fragments. The first fragment is decided like a whole datagram; if it passes, what it was
 * is kept for the others, for a short time. Without it they are dropped towards addresses that own
 * a protected port, also when they overtook it. One that is refused takes back what an earlier datagram of the
 * same identification left.
 */

#include "hook.h"

#define SP_FRAGMENT_LIFE_NS (10 * SP_SECOND_NS)

static __always_inline struct sp_fragment_key sp_fragment_key(const struct sp_packet *p, enum sp_hook hook)
{
	return (struct sp_fragment_key){
		.src = p->src, .dst = p->dst, .id = p->fragment, .hook = hook,
		.ifindex = hook == SP_HOOK_OUT ? p->ifindex : 0,
	};
}

static __always_inline bool sp_is_client(const struct sp_flow_key *flow, const struct sp_packet *p)
{
	return flow->client_port == p->sport &&
	       !__builtin_memcmp(&flow->client, &p->src, sizeof(p->src));
}

/* Keeps what a first fragment was, by the reason that it was given. `flow` counts if that is a flow's. */
__noinline int sp_keep_first(struct __sk_buff *skb, const struct sp_packet *p,
				    const struct sp_flow_key *flow, __u32 hook, __u32 reason)
{
	struct sp_fragment first = { .kind = SP_FRAGMENT_FREE };
	struct sp_fragment_key key;

	if (!p || !flow)
		return 0;
	key = sp_fragment_key(p, hook);
	if (!sp_udp_passes(reason))
		return !bpf_map_delete_elem(&sp_fragments, &key);
	if (reason == SP_REASON_NONE && !sp_towards_owner(skb, p))
		return 0; /* nobody will ask */
	if (reason != SP_REASON_NONE) {
		first.kind = sp_is_client(flow, p) ? SP_FRAGMENT_TO_SERVER : SP_FRAGMENT_TO_CLIENT;
		first.client_port = flow->client_port;
		first.server_port = flow->server_port;
	}
	first.seen_ns = bpf_ktime_get_boot_ns();
	return !bpf_map_update_elem(&sp_fragments, &key, &first, BPF_ANY);
}

/* The flow that a first fragment was of. The others have no ports. */
static __always_inline struct sp_flow_key sp_flow_of_first(const struct sp_packet *p,
							   const struct sp_fragment *first)
{
	bool to_server = first->kind == SP_FRAGMENT_TO_SERVER;

	return (struct sp_flow_key){
		.client = to_server ? p->src : p->dst, .server = to_server ? p->dst : p->src,
		.client_port = first->client_port, .server_port = first->server_port,
		.protocol = IPPROTO_UDP,
	};
}

/* A fragment but the first: NONE or PATH_LIVE, or why it is dropped. `flow` is filled for records. */
static __noinline int sp_rest(struct __sk_buff *skb, const struct sp_packet *p, struct sp_flow_key *flow,
			      __u32 hook)
{
	struct sp_config *cfg = sp_get_config();
	struct sp_fragment_key key;
	struct sp_fragment *first;
	struct sp_flow *entry;

	if (!p || !flow)
		return SP_REASON_ORPHAN;
	key = sp_fragment_key(p, hook);
	first = bpf_map_lookup_elem(&sp_fragments, &key);
	if (!first || bpf_ktime_get_boot_ns() > first->seen_ns + SP_FRAGMENT_LIFE_NS)
		return sp_towards_owner(skb, p) ? SP_REASON_ORPHAN : SP_REASON_NONE;
	if (first->kind == SP_FRAGMENT_FREE)
		return SP_REASON_NONE;
	*flow = sp_flow_of_first(p, first);
	entry = bpf_map_lookup_elem(&sp_flows, flow);
	if (!cfg || !entry)
		return SP_REASON_ORPHAN;
	return sp_flow_packet(cfg, flow, entry, p, entry->service_id,
			      first->kind == SP_FRAGMENT_TO_SERVER);
}

#endif
