/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef SP_PX_H
#define SP_PX_H

/* The hooks of the px pair: what reaches the proxy, and where what it sends is put back. */

#include "device.h"

#define SP_PX_MARK 1		/* in px: routed to the local table, see pkg/px */

/* A packet on the px pair. Everything there has an Ethernet header. NULL: no scratch, never seen. */
static __always_inline struct sp_packet *sp_packet_of(struct __sk_buff *skb, enum sp_parse *parsed)
{
	struct sp_scratch *scratch = sp_get_scratch();
	struct sp_head head = {};

	if (!scratch)
		return NULL;
	*parsed = sp_parse(skb, &head, ETH_HLEN);
	sp_packet_begin(skb, &scratch->packet, &head);
	return &scratch->packet;
}

/* ---- px0 ingress, host namespace: packets of the proxy ---- */

/* The proxy dials a service: allowed for a client that came by a known device, with a tuple that no
 * bypassed flow has.
 */
__noinline int sp_register_up(const struct sp_packet *p, __u32 service_id)
{
	__u64 now = bpf_ktime_get_boot_ns();
	struct sp_origin_key who = {};
	struct sp_origin *origin;
	struct sp_flow_key key;
	struct sp_leg_key at;
	struct sp_leg leg = {};

	if (!p)
		return SP_REASON_PX_UNEXPECTED;
	who.client = p->src;
	who.server = p->dst;
	who.server_port = p->dport;
	origin = bpf_map_lookup_elem(&sp_origins, &who);
	if (!origin)
		return SP_REASON_PX_NO_ORIGIN;
	key = sp_key_towards(p);
	if (bpf_map_lookup_elem(&sp_flows, &key))
		return SP_REASON_PX_TUPLE_HELD;
	leg.hook = origin->hook;
	leg.ifindex = origin->ifindex;
	leg.service_id = service_id;
	leg.opened_ns = now;
	leg.last_ns = now;
	leg.ether = origin->ether;
	at = sp_leg_key(&p->src, p->sport, &p->dst, p->dport, SP_LEG_UP);
	if (bpf_map_update_elem(&sp_legs, &at, &leg, BPF_ANY))
		return SP_REASON_LEGS_FULL;
	return SP_REASON_PX_UP;
}

/* Finds where a packet of the proxy belongs: a live client leg, a service leg, a new dial, or the RST
 * that answers a stray. `at` becomes the key that its mark is made of.
 */
static __always_inline enum sp_reason sp_decide_px0(struct __sk_buff *skb, const struct sp_packet *p,
						    struct sp_leg_key *at, struct sp_leg **leg)
{
	struct sp_leg_key down = sp_leg_key(&p->dst, p->dport, &p->src, p->sport, SP_LEG_DOWN);
	struct sp_leg_key up = sp_leg_key(&p->src, p->sport, &p->dst, p->dport, SP_LEG_UP);
	struct sp_service *svc;
	enum sp_reason reason;

	*at = down;
	*leg = bpf_map_lookup_elem(&sp_legs, &down);
	if (*leg)
		return SP_REASON_PX_DOWN;
	if (p->tcp_flags & SP_TCP_RST) {
		*leg = bpf_map_lookup_elem(&sp_strays, &down);
		if (*leg)
			return SP_REASON_PX_RESET;
	}
	*at = up;
	if (sp_syn_only(p)) {
		svc = sp_find_here(skb, &p->dst, &p->src, p->dport, p->protocol, p->version);
		if (!svc)
			return SP_REASON_PX_UNEXPECTED;
		reason = sp_register_up(p, svc->id);
		*leg = bpf_map_lookup_elem(&sp_legs, &up);
		return reason == SP_REASON_PX_UP && !*leg ? SP_REASON_LEGS_FULL : reason;
	}
	*leg = bpf_map_lookup_elem(&sp_legs, &up);
	if (*leg)
		return SP_REASON_PX_UP;
	*leg = p->tcp_flags & SP_TCP_RST ? bpf_map_lookup_elem(&sp_strays, &up) : NULL;
	return *leg ? SP_REASON_PX_RESET : SP_REASON_PX_UNEXPECTED;
}

/*
 * Puts the packet where the other party would have produced it. Towards a device it leaves through
 * the neighbour layer; from a device it comes in there; lo takes both through an output route,
 * because a packet that keeps its route is not validated again. At a bridge's port it bears the
 * addresses of the two parties, as if the bridge had been asked.
 */
static __always_inline int sp_inject_port(struct __sk_buff *skb, const struct sp_leg *leg,
					  enum sp_leg_side side)
{
	bool leaves = side == SP_LEG_UP;
	__u8 macs[2 * ETH_ALEN]; /* destination, source */

	__builtin_memcpy(macs, leaves ? leg->ether.server : leg->ether.client, ETH_ALEN);
	__builtin_memcpy(macs + ETH_ALEN, leaves ? leg->ether.client : leg->ether.server, ETH_ALEN);
	if (bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0))
		return TC_ACT_SHOT;
	return bpf_redirect(leg->ifindex, leaves ? 0 : BPF_F_INGRESS);
}

static __always_inline int sp_inject(struct __sk_buff *skb, const struct sp_leg *leg,
				     enum sp_leg_side side)
{
	bool leaves = (leg->hook == SP_HOOK_IN) == (side == SP_LEG_DOWN);

	if (leg->hook == SP_HOOK_PORT)
		return sp_inject_port(skb, leg, side);
	if (leg->hook == SP_HOOK_LO)
		return bpf_redirect_neigh(SP_LO_IFINDEX, NULL, 0, 0);
	if (leaves)
		return bpf_redirect_neigh(leg->ifindex, NULL, 0, 0);
	return bpf_redirect(leg->ifindex, BPF_F_INGRESS);
}

static __always_inline bool sp_px0_passes(enum sp_reason reason)
{
	return reason == SP_REASON_PX_DOWN || reason == SP_REASON_PX_UP ||
	       reason == SP_REASON_PX_RESET;
}

/* A proxy that goes on speaking to a client did not take the RST that was seen: it was forged. */
static __always_inline void sp_touch_leg(struct sp_leg *leg, const struct sp_packet *p, enum sp_leg_side side)
{
	if (side == SP_LEG_DOWN && (leg->flags & SP_RST) && !(p->tcp_flags & (SP_TCP_RST | SP_TCP_SYN)))
		__sync_fetch_and_and(&leg->flags, ~SP_RST);
	sp_touch(&leg->flags, &leg->last_ns, sp_seen(p, side == SP_LEG_UP), bpf_ktime_get_boot_ns());
}

static __always_inline int sp_px0(struct __sk_buff *skb)
{
	struct sp_packet *p;
	struct sp_leg_key at = {};
	struct sp_leg *leg = NULL;
	struct sp_config *cfg = sp_get_config();
	enum sp_reason reason = SP_REASON_PX_UNEXPECTED;
	enum sp_parse parsed;
	bool tcp;

	p = sp_packet_of(skb, &parsed);
	if (!p)
		return TC_ACT_SHOT;
	tcp = parsed == SP_PARSE_TCP && sp_parse_addresses(skb, p);
	sp_parse_volume(skb, p);
	if (!cfg)
		reason = SP_REASON_NO_CONFIG;
	else if (tcp)
		reason = sp_decide_px0(skb, p, &at, &leg);
	sp_count(reason, p->segments, p->bytes);
	if (!cfg || !leg || !sp_px0_passes(reason))
		return TC_ACT_SHOT;
	if (reason != SP_REASON_PX_RESET)
		sp_touch_leg(leg, p, at.side);
	if ((p->tcp_flags & SP_TCP_SYN) && sp_edit_syn(skb, p, sp_mss_of(skb, p, leg->ifindex)))
		return TC_ACT_SHOT;
	if (reason == SP_REASON_PX_UP)
		sp_count_hook(skb, p, leg->service_id, true);
	skb->mark = sp_mark(&at, cfg->secret[0]);
	return sp_inject(skb, leg, at.side);
}

/* ---- px1 ingress, px namespace: packets for the proxy ---- */

/*
 * Gives the packet to the socket that has its tuple, else to the transparent listener: a SYN is
 * accepted there, anything else makes the kernel answer with RST from the original destination.
 * A listener found by the tuple is not the packet's. A TIME_WAIT keeps even a SYN: a listener drops
 * one whose tuple is in use (measured on Linux 6.18), but the answer of the TIME_WAIT makes the
 * client reset it and send its SYN again at once.
 */
static __always_inline enum sp_reason sp_accept(struct __sk_buff *skb, const struct sp_packet *p,
						const struct sp_config *cfg)
{
	struct bpf_sock_tuple t = {};
	struct bpf_sock *sk;
	__u32 size, state;
	long assigned;

	if (p->version == 4) {
		size = sizeof(t.ipv4);
		__builtin_memcpy(&t.ipv4.saddr, &p->src.bytes[12], 4);
		__builtin_memcpy(&t.ipv4.daddr, &p->dst.bytes[12], 4);
		t.ipv4.sport = bpf_htons(p->sport);
		t.ipv4.dport = bpf_htons(p->dport);
	} else {
		size = sizeof(t.ipv6);
		__builtin_memcpy(t.ipv6.saddr, &p->src, 16);
		__builtin_memcpy(t.ipv6.daddr, &p->dst, 16);
		t.ipv6.sport = bpf_htons(p->sport);
		t.ipv6.dport = bpf_htons(p->dport);
	}
	sk = bpf_skc_lookup_tcp(skb, &t, size, BPF_F_CURRENT_NETNS, 0);
	if (sk) {
		state = sk->state;
		bpf_sk_release(sk);
		if (state != SP_TCP_LISTEN)
			return SP_REASON_PX_ACCEPT;
	}
	if (p->version == 4) {
		t.ipv4.saddr = 0;
		t.ipv4.sport = 0;
		t.ipv4.dport = bpf_htons(cfg->listen_port);
	} else {
		__builtin_memset(t.ipv6.saddr, 0, 16);
		t.ipv6.sport = 0;
		t.ipv6.dport = bpf_htons(cfg->listen_port);
	}
	sk = bpf_skc_lookup_tcp(skb, &t, size, BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return SP_REASON_NO_LISTENER;
	assigned = sk->state == SP_TCP_LISTEN ? bpf_sk_assign(skb, sk, 0) : -1;
	bpf_sk_release(sk);
	return assigned ? SP_REASON_NO_LISTENER : SP_REASON_PX_ACCEPT;
}

static __always_inline bool sp_is_loopback6(const struct sp_packet *p)
{
	const __u64 *a = (const __u64 *)&p->dst;

	return p->version == 6 && !a[0] && a[1] == bpf_cpu_to_be64(1);
}

static __always_inline bool sp_stamped(struct __sk_buff *skb, const struct sp_config *cfg)
{
	__u8 mac[6];

	return !bpf_skb_load_bytes(skb, 6, mac, sizeof(mac)) &&
	       !__builtin_memcmp(mac, cfg->stamp, sizeof(mac));
}

static __always_inline int sp_refuse_px(const struct sp_packet *p, enum sp_reason reason)
{
	struct sp_flow_key key = sp_key_towards(p);

	sp_count(reason, p->segments, p->bytes);
	sp_record_deny(&key, reason, 0);
	return TC_ACT_SHOT;
}

/* On px1 and, for ::1, on px's lo: IPv6 takes ::1 from a loopback device only. */
static __always_inline int sp_px_in(struct __sk_buff *skb, bool lo)
{
	struct sp_config *cfg = sp_get_config();
	enum sp_reason reason;
	enum sp_parse parsed;
	struct sp_packet *p;
	bool known;

	p = sp_packet_of(skb, &parsed);
	if (!p)
		return TC_ACT_SHOT;
	known = parsed == SP_PARSE_TCP || parsed == SP_PARSE_ICMP;
	if (p->version && !sp_parse_addresses(skb, p))
		known = false;
	sp_parse_volume(skb, p); /* before the first refusal: it counts, and its record has the tuple */
	if (!cfg)
		return sp_refuse_px(p, SP_REASON_NO_CONFIG);
	if (!sp_stamped(skb, cfg))
		return sp_refuse_px(p, SP_REASON_NO_STAMP);
	if (!known)
		return sp_refuse_px(p, SP_REASON_PX_UNEXPECTED);
	if (!lo && sp_is_loopback6(p))
		return bpf_redirect(SP_LO_IFINDEX, BPF_F_INGRESS);
	/* An ICMP error comes here for a leg only, and finds its socket by what it quotes. */
	reason = parsed == SP_PARSE_ICMP ? SP_REASON_PX_ACCEPT : sp_accept(skb, p, cfg);
	if (reason != SP_REASON_PX_ACCEPT)
		return sp_refuse_px(p, reason);
	sp_count(reason, p->segments, p->bytes);
	bpf_skb_change_type(skb, 0 /* PACKET_HOST */);
	if (lo)
		skb->mark = SP_PX_MARK;
	return TC_ACT_UNSPEC;
}

/* px's lo, egress: what the proxy sends to ::1 belongs to the node. */
static __always_inline int sp_px_to_node(void)
{
	struct sp_config *cfg = sp_get_config();

	return cfg ? bpf_redirect(cfg->px1_ifindex, 0) : TC_ACT_SHOT;
}

#endif
