/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef SP_TRAFFIC_H
#define SP_TRAFFIC_H

/* Volumes that the hooks and the sockets must agree on: see struct sp_volume. */

#include "state.h"

/* Payload by the IP header, as the receiving stack trims it: behind it a frame may have padding. The
 * length is 0 in segments too large for the field (BIG TCP, jumbograms): then it is all there is.
 */
static __always_inline __u32 sp_payload(struct __sk_buff *skb, const struct sp_packet *p)
{
	__u32 headers = p->l4 - p->l3 + p->l4_len;
	__u32 total = skb->len - p->l3;
	__be16 field = 0;

	if (p->version == 4) {
		bpf_skb_load_bytes(skb, p->l3 + offsetof(struct iphdr, tot_len), &field, 2);
		total = field ? bpf_ntohs(field) : total;
	} else {
		bpf_skb_load_bytes(skb, p->l3 + offsetof(struct ipv6hdr, payload_len), &field, 2);
		total = field ? bpf_ntohs(field) + sizeof(struct ipv6hdr) : total;
	}
	return total > headers ? total - headers : 0;
}

static __always_inline void sp_add_volume(struct sp_volume *v, const struct sp_packet *p,
					  __u32 payload)
{
	if (p->protocol == IPPROTO_UDP) {
		v->packets += p->segments;
		return;
	}
	if (sp_syn_only(p))
		v->opens++;
	else if (!payload)
		v->packets++;
	v->bytes += payload;
}

static __always_inline struct sp_traffic *sp_get_traffic(__u32 service_id)
{
	return bpf_map_lookup_elem(&sp_traffic, &service_id);
}

/* At the hooks: a packet goes on to the service, by a leg or under a path. */
__noinline int sp_count_hook(struct __sk_buff *skb, const struct sp_packet *p,
				    __u32 service_id, __u32 leg)
{
	struct sp_traffic *t = sp_get_traffic(service_id);

	if (t && p)
		sp_add_volume(leg ? &t->hook_leg : &t->hook_path, p, sp_payload(skb, p));
	return 0;
}

#endif
