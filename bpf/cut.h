/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef SP_CUT_H
#define SP_CUT_H

/*
 * Ends that cut. The first packet of either party after the end of its path ends both halves: a clone of it
 * goes to the proxy's listener, which resets the sender, and the packet itself becomes the RST that
 * resets the other party, with its tuple, its sequence number and nothing else of it. The receiver takes
 * it if it has lost nothing (RFC 5961); else it answers with an ACK, which meets the same treatment.
 * Once for each direction of a flow: a packet of anybody who comes later is a stray.
 */

#include "path.h"

#define SP_TCP_BARE sizeof(struct tcphdr)	/* a TCP header without options */

static __always_inline bool sp_is_path_end(enum sp_reason reason)
{
	return reason >= SP_REASON_PATH_EXPIRED && reason <= SP_REASON_PATH_STALE;
}

/* Is this the packet that tells the other party? True once for each direction. */
static __always_inline bool sp_cuts(struct sp_flow *flow, enum sp_reason reason, bool from_client)
{
	__u32 bit = from_client ? SP_CUT_SERVER : SP_CUT_CLIENT;

	if (!flow || !sp_is_path_end(reason) || (flow->flags & bit))
		return false;
	return !(__sync_fetch_and_or(&flow->flags, bit) & bit);
}

/* The pseudo header of either family: what an IPv4 address has in front of it in its mapped form adds up to
 * nothing.
 */
struct sp_pseudo {
	struct sp_addr src, dst;
	__be32 length;
	__be32 protocol;
};

static __always_inline __u32 sp_pseudo_sum(const struct sp_pseudo *pseudo)
{
	return bpf_csum_diff(NULL, 0, (__be32 *)pseudo, sizeof(*pseudo), 0);
}

/* The length in the IP header becomes that of a bare TCP header behind `l4`. */
static __always_inline bool sp_shorten_ip(struct __sk_buff *skb, __u32 version, __u32 l3, __u32 l4)
{
	__be16 old, new = bpf_htons(l4 - l3 + SP_TCP_BARE);

	if (version == 6) {
		new = bpf_htons(l4 - l3 - sizeof(struct ipv6hdr) + SP_TCP_BARE);
		return !bpf_skb_store_bytes(skb, l3 + offsetof(struct ipv6hdr, payload_len), &new,
					    sizeof(new), BPF_F_RECOMPUTE_CSUM);
	}
	return !bpf_skb_load_bytes(skb, l3 + offsetof(struct iphdr, tot_len), &old, sizeof(old)) &&
	       !bpf_l3_csum_replace(skb, l3 + offsetof(struct iphdr, check), old, new, sizeof(new)) &&
	       !bpf_skb_store_bytes(skb, l3 + offsetof(struct iphdr, tot_len), &new, sizeof(new), 0);
}

/*
 * Makes the packet the RST of its sender. Whether its checksum is complete, or is the sum of the pseudo header
 * that a device completes, shows in its value: where both agree by chance the receiver drops the RST.
 */
__noinline int sp_make_reset(struct __sk_buff *skb, const struct sp_packet *p)
{
	struct sp_pseudo pseudo = { .protocol = bpf_htonl(IPPROTO_TCP) };
	__u32 version, l3, l4, sum;
	struct tcphdr tcp;
	bool partial;

	if (!p)
		return 0;
	version = p->version;
	l3 = p->l3;
	l4 = p->l4;
	pseudo.src = p->src;
	pseudo.dst = p->dst;
	if (bpf_skb_load_bytes(skb, l4, &tcp, sizeof(tcp)))
		return 0;
	pseudo.length = bpf_htonl(skb->len - l4);
	partial = tcp.check == sp_fold(sp_pseudo_sum(&pseudo));
	if (bpf_skb_change_tail(skb, l4 + SP_TCP_BARE, 0))
		return 0;
	pseudo.length = bpf_htonl(SP_TCP_BARE);
	sum = sp_pseudo_sum(&pseudo);
	((__u8 *)&tcp)[12] = SP_TCP_BARE / 4 << 4;
	((__u8 *)&tcp)[13] = SP_TCP_RST | (((__u8 *)&tcp)[13] & SP_TCP_ACK);
	tcp.urg_ptr = 0;
	tcp.check = 0;
	if (!partial)
		sum = bpf_csum_diff(NULL, 0, (__be32 *)&tcp, sizeof(tcp), sum);
	tcp.check = partial ? sp_fold(sum) : ~sp_fold(sum);
	return !bpf_skb_store_bytes(skb, l4, &tcp, sizeof(tcp), BPF_F_RECOMPUTE_CSUM) &&
	       sp_shorten_ip(skb, version, l3, l4);
}

/*
 * A clone for the proxy's listener; the sender that it does not reach is reset at its next packet. Without an Ethernet
 * header it cannot go there at once: it passes the same hook again, as the stray that it now is. That may
 * run this program within itself: nothing in the scratch outlives this call. 0: the packet is spoilt.
 */
__noinline int sp_clone_to_proxy(struct __sk_buff *skb, __u32 l3, bool in)
{
	struct sp_config *cfg = sp_get_config();
	struct ethhdr eth, kept;

	if (!cfg)
		return 0;
	if (!l3) {
		bpf_clone_redirect(skb, skb->ifindex, in ? BPF_F_INGRESS : 0);
		return 1;
	}
	if (bpf_skb_load_bytes(skb, 0, &kept, sizeof(kept)))
		return 0;
	__builtin_memset(&eth, 0, sizeof(eth));
	__builtin_memcpy(eth.h_source, cfg->stamp, sizeof(eth.h_source));
	eth.h_proto = skb->protocol;
	if (bpf_skb_store_bytes(skb, 0, &eth, sizeof(eth), 0))
		return 0;
	bpf_clone_redirect(skb, cfg->px0_ifindex, 0);
	return !bpf_skb_store_bytes(skb, 0, &kept, sizeof(kept), 0);
}

/* Ends both halves with one packet. An RST is told to the other party and answered by nobody. */
__noinline int sp_cut(struct __sk_buff *skb, const struct sp_packet *p, bool in)
{
	struct sp_packet own;

	if (!p)
		return TC_ACT_SHOT;
	own = *p;
	if (!(own.tcp_flags & SP_TCP_RST) && !sp_clone_to_proxy(skb, own.l3, in))
		return TC_ACT_SHOT;
	if (!sp_make_reset(skb, &own))
		return TC_ACT_SHOT;
	sp_count(SP_REASON_PATH_RESET, 1, skb->len - own.l3);
	return TC_ACT_UNSPEC;
}

#endif
