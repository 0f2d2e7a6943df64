/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef SP_UNREACHABLE_H
#define SP_UNREACHABLE_H

/*
 * ICMP "port unreachable" for a refused datagram, made of the datagram itself, so that its sender fails
 * at once and QUIC falls back to TCP. It leaves where the datagram came from, at a bounded rate, and only
 * for datagrams without options to an address of one host (RFC 1122, 3.2.2; RFC 4443, 2.4).
 *
 * It quotes the IP header, the UDP header and two bytes. The checksum of the quoted header may be left to
 * a device (CHECKSUM_PARTIAL), which would still fill it in, at its new place, after ours was made. So the
 * quote says 0xffff there, and the two bytes make its sum zero: what a device computes then is 0xffff or
 * 0, which are the same in a sum of ones' complement.
 */

#include "hook.h"

#define SP_ICMP_RATE 1000	/* a second and CPU */
#define SP_ICMP_BURST 200
#define SP_QUOTED_UDP (sizeof(struct udphdr) + 2)
#define SP_IP_DF 0x4000
#define SP_TOS_CONTROL 0xc0	/* as Linux sends its ICMP errors */
#define SP_HOP_LIMIT 64
#define SP_PACKET_BROADCAST 1
#define SP_PACKET_MULTICAST 2

static __always_inline bool sp_take_token(void)
{
	__u64 now = bpf_ktime_get_boot_ns(), fresh;
	__u32 zero = 0;
	struct sp_tokens *t = bpf_map_lookup_elem(&sp_tokens, &zero);

	if (!t)
		return false;
	fresh = (now - t->refilled_ns) / (SP_SECOND_NS / SP_ICMP_RATE);
	if (fresh) {
		t->left = t->left + fresh < SP_ICMP_BURST ? t->left + fresh : SP_ICMP_BURST;
		t->refilled_ns = now;
	}
	if (!t->left)
		return false;
	t->left--;
	return true;
}

/* Is it an address that one host may have? */
static __always_inline bool sp_is_unicast(const struct sp_addr *a, __u32 version)
{
	__u8 first = version == 4 ? a->bytes[12] : a->bytes[0];
	const __u64 *words = (const __u64 *)a;

	if (version == 4)
		return first && first < 224;
	return first != 0xff && (words[0] || words[1]);
}

static __always_inline bool sp_may_answer(const struct __sk_buff *skb, const struct sp_packet *p)
{
	__u32 headers = p->version == 4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);

	return skb->pkt_type != SP_PACKET_BROADCAST && skb->pkt_type != SP_PACKET_MULTICAST &&
	       p->l4 - p->l3 == headers && sp_is_unicast(&p->src, p->version) &&
	       sp_is_unicast(&p->dst, p->version);
}

/* Ends the quote such that its UDP part sums to nothing. */
static __always_inline long sp_quote_udp(struct __sk_buff *skb, const struct sp_packet *p, __u32 l4)
{
	__be16 tail[2] = { 0xffff };
	__be16 len;

	if (bpf_skb_load_bytes(skb, l4 + offsetof(struct udphdr, len), &len, sizeof(len)))
		return -1;
	tail[1] = bpf_htons(~sp_fold(p->sport + p->dport + bpf_ntohs(len)));
	return bpf_skb_store_bytes(skb, l4 + offsetof(struct udphdr, check), tail, sizeof(tail),
				   BPF_F_RECOMPUTE_CSUM);
}

__noinline int sp_make_unreachable4(struct __sk_buff *skb, const struct sp_packet *p)
{
	const __u32 added = sizeof(struct iphdr) + sizeof(struct sp_icmp);
	struct {
		struct iphdr ip;
		struct sp_icmp icmp;
		struct iphdr quoted;
	} r = {};

	if (!p || bpf_skb_load_bytes(skb, p->l3, &r.quoted, sizeof(r.quoted)) ||
	    bpf_skb_change_tail(skb, p->l4 + SP_QUOTED_UDP, 0) ||
	    bpf_skb_adjust_room(skb, added, BPF_ADJ_ROOM_MAC, 0))
		return -1;
	r.ip.version = 4;
	r.ip.ihl = sizeof(r.ip) / 4;
	r.ip.tos = SP_TOS_CONTROL;
	r.ip.tot_len = bpf_htons(added + sizeof(r.quoted) + SP_QUOTED_UDP);
	r.ip.frag_off = bpf_htons(SP_IP_DF);
	r.ip.ttl = SP_HOP_LIMIT;
	r.ip.protocol = IPPROTO_ICMP;
	r.ip.saddr = r.quoted.daddr;
	r.ip.daddr = r.quoted.saddr;
	r.ip.check = ~sp_fold(bpf_csum_diff(NULL, 0, (__be32 *)&r.ip, sizeof(r.ip), 0));
	r.icmp.type = SP_ICMP_UNREACHABLE;
	r.icmp.code = SP_ICMP_PORT;
	r.icmp.checksum = ~sp_fold(bpf_csum_diff(NULL, 0, (__be32 *)&r.icmp,
						sizeof(r.icmp) + sizeof(r.quoted), 0));
	if (bpf_skb_store_bytes(skb, p->l3, &r, added, BPF_F_RECOMPUTE_CSUM))
		return -1;
	return sp_quote_udp(skb, p, p->l4 + added);
}

__noinline int sp_make_unreachable6(struct __sk_buff *skb, const struct sp_packet *p)
{
	const __u32 added = sizeof(struct ipv6hdr) + sizeof(struct sp_icmp);
	const __u16 len = added + SP_QUOTED_UDP; /* of ICMP: the two IPv6 headers are of one size */
	struct {
		struct ipv6hdr ip;
		struct sp_icmp icmp;
		struct ipv6hdr quoted;
	} r = {};

	if (!p || bpf_skb_load_bytes(skb, p->l3, &r.quoted, sizeof(r.quoted)) ||
	    bpf_skb_change_tail(skb, p->l4 + SP_QUOTED_UDP, 0) ||
	    bpf_skb_adjust_room(skb, added, BPF_ADJ_ROOM_MAC, 0))
		return -1;
	r.ip.version = 6;
	r.ip.payload_len = bpf_htons(len);
	r.ip.nexthdr = IPPROTO_ICMPV6;
	r.ip.hop_limit = SP_HOP_LIMIT;
	r.ip.saddr = r.quoted.daddr;
	r.ip.daddr = r.quoted.saddr;
	r.icmp.type = SP_ICMP6_UNREACHABLE;
	r.icmp.code = SP_ICMP6_PORT;
	r.icmp.checksum = ~sp_fold(bpf_csum_diff(NULL, 0, (__be32 *)&r.ip.saddr,
						   sizeof(r) - offsetof(struct ipv6hdr, saddr),
						   bpf_htons(len) + bpf_htons(IPPROTO_ICMPV6)));
	if (bpf_skb_store_bytes(skb, p->l3, &r, added, BPF_F_RECOMPUTE_CSUM))
		return -1;
	return sp_quote_udp(skb, p, p->l4 + added);
}

static __always_inline long sp_swap_macs(struct __sk_buff *skb)
{
	__u8 was[2 * ETH_ALEN], now[2 * ETH_ALEN];

	if (bpf_skb_load_bytes(skb, 0, was, sizeof(was)))
		return -1;
	__builtin_memcpy(now, was + ETH_ALEN, ETH_ALEN);
	__builtin_memcpy(now + ETH_ALEN, was, ETH_ALEN);
	return bpf_skb_store_bytes(skb, 0, now, sizeof(now), 0);
}

/* Drops the datagram, and tells its sender if it may. */
static __always_inline int sp_refuse(struct __sk_buff *skb, const struct sp_packet *p,
				     enum sp_hook hook, __u32 l3)
{
	if (!sp_may_answer(skb, p) || !sp_take_token())
		return TC_ACT_SHOT;
	if (p->version == 4 ? sp_make_unreachable4(skb, p) : sp_make_unreachable6(skb, p))
		return TC_ACT_SHOT;
	if (l3 == ETH_HLEN && sp_swap_macs(skb))
		return TC_ACT_SHOT;
	skb->mark = 0;
	if (hook == SP_HOOK_LO) /* through an output route, as px0 does: 127/8 is not validated again */
		return bpf_redirect_neigh(SP_LO_IFINDEX, NULL, 0, 0);
	return bpf_redirect(skb->ifindex, hook == SP_HOOK_OUT ? BPF_F_INGRESS : 0);
}

#endif
