/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef SP_DEVICE_H
#define SP_DEVICE_H

/* The hooks of the host namespace: devices in and out, and lo. One decision for all. */

#include "mark.h"
#include "remote.h"
#include "cut.h"
#include "traffic.h"
#include "icmp.h"
#include "options.h"
#include "udp.h"
#include "fragment.h"
#include "unreachable.h"
#include "watch.h"

enum sp_action {
	SP_ACT_NEXT = 0,	/* not ours, or bypassed: on down the chain */
	SP_ACT_STEER,		/* to the proxy */
	SP_ACT_DROP,
	SP_ACT_CUT,		/* the path of its flow is over: both halves end */
	SP_ACT_REFUSE,		/* dropped, and the sender of the datagram is told */
};

struct sp_decision {
	enum sp_action action;
	enum sp_reason reason;
};

static __always_inline struct sp_decision sp_decide(enum sp_action action, enum sp_reason reason)
{
	return (struct sp_decision){ .action = action, .reason = reason };
}

/* Who speaks to whom on the wire of a bridge's port: `towards` the service, or from it. */
static __always_inline void sp_note_ether(struct __sk_buff *skb, bool towards)
{
	struct sp_scratch *scratch = sp_get_scratch();
	struct ethhdr eth = {};

	if (!scratch || bpf_skb_load_bytes(skb, 0, &eth, sizeof(eth)))
		return;
	__builtin_memcpy(scratch->ether.client, towards ? eth.h_source : eth.h_dest, ETH_ALEN);
	__builtin_memcpy(scratch->ether.server, towards ? eth.h_dest : eth.h_source, ETH_ALEN);
}

static __always_inline void sp_get_ether(struct sp_ether *ether, enum sp_hook hook)
{
	struct sp_scratch *scratch = sp_get_scratch();

	if (hook == SP_HOOK_PORT && scratch)
		*ether = scratch->ether;
}

__noinline int sp_remember_stray(const struct sp_flow_key *key, enum sp_leg_side side,
					enum sp_hook hook, __u32 ifindex)
{
	struct sp_leg leg = {};
	struct sp_leg_key at;

	if (!key)
		return 0;
	leg.hook = hook;
	leg.ifindex = ifindex;
	leg.opened_ns = leg.last_ns = bpf_ktime_get_boot_ns();
	sp_get_ether(&leg.ether, hook);
	at = sp_leg_key(&key->client, key->client_port, &key->server, key->server_port, side);
	return !bpf_map_update_elem(&sp_strays, &at, &leg, BPF_ANY);
}

/* Is it the leg of a connection that lives, of a client behind another device? Whoever forges a SYN with its tuple
 * there would draw the answers to himself.
 */
static __always_inline bool sp_lives_elsewhere(const struct sp_leg *leg, __u32 hook, __u32 ifindex)
{
	return (leg->flags & SP_ANSWERED) && !sp_closed(leg->flags) &&
	       (leg->hook != hook || leg->ifindex != ifindex);
}

/* A SYN that goes to the proxy: where the answer goes, and by which device the client came. */
__noinline int sp_register_down(const struct sp_flow_key *key, __u32 service_id,
				       __u32 hook, __u32 ifindex)
{
	__u64 now = bpf_ktime_get_boot_ns();
	struct sp_leg leg = {};
	struct sp_origin origin = {};
	struct sp_origin_key who = {};
	struct sp_leg_key at;
	struct sp_leg *old;

	if (!key)
		return 0;
	at = sp_leg_key(&key->client, key->client_port, &key->server, key->server_port, SP_LEG_DOWN);
	old = bpf_map_lookup_elem(&sp_legs, &at);
	if (old && sp_lives_elsewhere(old, hook, ifindex))
		return 1;
	leg.hook = hook;
	leg.ifindex = ifindex;
	leg.service_id = service_id;
	leg.opened_ns = now;
	leg.last_ns = now;
	sp_get_ether(&leg.ether, hook);
	if (bpf_map_update_elem(&sp_legs, &at, &leg, BPF_ANY))
		return 0;
	who.client = key->client;
	who.server = key->server;
	who.server_port = key->server_port;
	origin.hook = hook;
	origin.ifindex = ifindex;
	origin.ether = leg.ether;
	return !bpf_map_update_elem(&sp_origins, &who, &origin, BPF_ANY);
}

/* A packet from a client towards a protected service. */
static __always_inline struct sp_decision
sp_decide_towards(struct __sk_buff *skb, const struct sp_config *cfg, const struct sp_packet *p,
		  enum sp_hook hook, const struct sp_service *svc, const struct sp_flow_key *key)
{
	enum sp_reason reason = SP_REASON_STRAY;
	struct sp_flow *flow;
	struct sp_leg *leg;

	flow = bpf_map_lookup_elem(&sp_flows, key);
	if (flow && !sp_is_instance(svc, p->ifindex)) {
		sp_end_flow(key, flow, SP_REASON_PATH_STALE);
		reason = flow->ended;
	} else if (flow && !(sp_syn_only(p) && (flow->ended || sp_closed(flow->flags)))) {
		if (sp_syn_only(p) && (flow->flags & SP_ANSWERED))
			__sync_fetch_and_or(&flow->flags, SP_AGAIN);
		reason = sp_flow_packet(cfg, key, flow, p, svc->id, true);
		if (reason == SP_REASON_PATH_LIVE) {
			sp_count_hook(skb, p, svc->id, false);
			return sp_decide(SP_ACT_NEXT, reason);
		}
	}
	if (!sp_syn_only(p)) {
		leg = sp_find_leg(key, SP_LEG_DOWN, flow ? flow->opened_ns : 0);
		if (leg) {
			sp_touch(&leg->flags, &leg->last_ns, sp_seen(p, true), bpf_ktime_get_boot_ns());
			return sp_decide(SP_ACT_STEER, SP_REASON_LEG);
		}
	}
	if (!flow && sp_may_be_foreign(svc, hook) &&
	    !sp_is_local(skb, &p->dst, &p->src, p->version))
		return sp_decide(SP_ACT_NEXT, SP_REASON_NONE);
	if (svc->target == SP_TARGET_REMOTE && (p->tcp_flags & SP_TCP_RST)) /* it ends what the proxy has no part in */
		return sp_decide(SP_ACT_NEXT, SP_REASON_NONE);
	if (!sp_syn_only(p)) {
		sp_remember_stray(key, SP_LEG_DOWN, hook, p->ifindex);
		if (sp_is_instance(svc, p->ifindex) && sp_cuts(flow, reason, true))
			return sp_decide(SP_ACT_CUT, reason);
		return sp_decide(SP_ACT_STEER, reason);
	}
	sp_take_caller(skb, p, key);
	reason = flow && !sp_replace_flow(key) ? SP_REASON_RING_FULL :
		 !sp_is_instance(svc, p->ifindex) ? SP_REASON_NO_PATH :
		 sp_open_flow(key, p, svc->id, (__u32)hook << 24 | (p->ifindex & 0xffffff));
	if (reason == SP_REASON_PATH_OPEN) {
		sp_count_hook(skb, p, svc->id, false);
		return sp_decide(SP_ACT_NEXT, reason);
	}
	if (!sp_register_down(key, svc->id, hook, p->ifindex))
		return sp_decide(SP_ACT_DROP, SP_REASON_LEGS_FULL);
	return sp_decide(SP_ACT_STEER, reason);
}

/* The hook that the flow of a packet from a service lives at: the other one of the same device. */
static __always_inline enum sp_hook sp_home_hook(enum sp_hook hook)
{
	if (hook == SP_HOOK_LO || hook == SP_HOOK_PORT)
		return hook;
	return hook == SP_HOOK_OUT ? SP_HOOK_IN : SP_HOOK_OUT;
}

/*
 * Does the service take a second connection with the tuple of a flow that never closed? It had given up the
 * first in silence; a SYN alone would prove nothing, for it may be forged. The answer is reset as a stray, and the
 * client's next SYN finds a flow that is over.
 */
static __always_inline bool sp_is_another(const struct sp_flow *flow, const struct sp_packet *p)
{
	return (p->tcp_flags & (SP_TCP_SYN | SP_TCP_ACK)) == (SP_TCP_SYN | SP_TCP_ACK) &&
	       (flow->flags & SP_AGAIN) && !flow->ended;
}

/* A packet from a protected service towards a client. */
static __always_inline struct sp_decision
sp_decide_from(struct __sk_buff *skb, const struct sp_config *cfg, const struct sp_packet *p,
	       enum sp_hook hook, const struct sp_service *svc, const struct sp_flow_key *key)
{
	struct sp_leg *leg = sp_find_leg(key, SP_LEG_UP, 0);
	enum sp_reason reason = SP_REASON_STRAY;
	struct sp_flow *flow;

	if (leg) {
		sp_touch(&leg->flags, &leg->last_ns, sp_seen(p, false), bpf_ktime_get_boot_ns());
		return sp_decide(SP_ACT_STEER, SP_REASON_LEG);
	}
	flow = bpf_map_lookup_elem(&sp_flows, key);
	if (flow && sp_is_another(flow, p)) {
		__sync_fetch_and_or(&flow->flags, SP_RST);
	} else if (flow) {
		reason = sp_flow_packet(cfg, key, flow, p, svc->id, false);
		if (reason == SP_REASON_PATH_LIVE)
			return sp_decide(SP_ACT_NEXT, reason);
	} else if (sp_may_be_foreign(svc, hook) &&
		   !sp_is_local(skb, &p->src, &p->dst, p->version)) {
		return sp_decide(SP_ACT_NEXT, SP_REASON_NONE);
	}
	if (sp_syn_only(p))
		return sp_decide(SP_ACT_DROP, SP_REASON_REVERSE_OPEN);
	sp_remember_stray(key, SP_LEG_UP, sp_home_hook(hook), p->ifindex);
	return sp_decide(sp_cuts(flow, reason, false) ? SP_ACT_CUT : SP_ACT_STEER, reason);
}

/*
 * Second pass of a packet that px0 put back: our mark for this tuple and a leg or stray that explains
 * it. Returns the reason to let it pass or drop it, or NONE for a packet with a mark of somebody else.
 */
__noinline int sp_reinjected(struct __sk_buff *skb, const struct sp_packet *p, __u64 secret)
{
	struct sp_leg_key up, down;
	struct sp_leg_key *at;

	if (!p)
		return SP_REASON_NO_LEG;
	up = sp_leg_key(&p->src, p->sport, &p->dst, p->dport, SP_LEG_UP);
	down = sp_leg_key(&p->dst, p->dport, &p->src, p->sport, SP_LEG_DOWN);
	if (sp_mark(&up, secret) == skb->mark)
		at = &up;
	else if (sp_mark(&down, secret) == skb->mark)
		at = &down;
	else
		return SP_REASON_NONE;
	if (bpf_map_lookup_elem(&sp_legs, at) || bpf_map_lookup_elem(&sp_strays, at))
		return SP_REASON_REINJECTED;
	return SP_REASON_NO_LEG;
}

/* What stands behind a parse failure: dropped towards an address that owns a protected port. */
static __always_inline struct sp_decision sp_decide_unparsed(struct __sk_buff *skb,
							     struct sp_packet *p,
							     enum sp_parse parsed)
{
	enum sp_reason reason = parsed == SP_PARSE_FRAGMENT ? SP_REASON_FRAGMENT :
				parsed == SP_PARSE_EXT_HEADERS ? SP_REASON_EXT_HEADERS :
				parsed == SP_PARSE_SOURCE_ROUTE ? SP_REASON_SOURCE_ROUTE :
				SP_REASON_MALFORMED;

	if (parsed == SP_PARSE_HIDDEN)
		return sp_decide(SP_ACT_DROP, reason);
	if (parsed == SP_PARSE_MISPLACED) /* its addresses are not where we would read them */
		return sp_anything_protected() ? sp_decide(SP_ACT_DROP, SP_REASON_MALFORMED) :
						 sp_decide(SP_ACT_NEXT, SP_REASON_NONE);
	if (p->version && (!sp_parse_addresses(skb, p) || sp_towards_owner(skb, p)))
		return sp_decide(SP_ACT_DROP, reason);
	if (parsed == SP_PARSE_SOURCE_ROUTE && sp_from_owner(skb, p))
		return sp_decide(SP_ACT_DROP, reason);
	return sp_decide(SP_ACT_NEXT, SP_REASON_NONE);
}

static __always_inline bool sp_hook_is_in(enum sp_hook hook)
{
	return hook != SP_HOOK_OUT;
}

static __always_inline struct sp_decision sp_decide_udp(int reason, bool towards)
{
	if (sp_udp_passes(reason))
		return sp_decide(SP_ACT_NEXT, reason);
	return sp_decide(towards ? SP_ACT_REFUSE : SP_ACT_DROP, reason);
}

/* A datagram that goes on to its service is compared with what arrives there. */
static __always_inline int sp_count_udp(struct __sk_buff *skb, const struct sp_packet *p, __u32 service_id,
					int reason)
{
	if (reason == SP_REASON_PATH_OPEN || reason == SP_REASON_PATH_LIVE)
		sp_count_hook(skb, p, service_id, false);
	return reason;
}

/* Flags that no connection has, to or from the service at `address`. */
static __always_inline struct sp_decision
sp_decide_bad(struct __sk_buff *skb, const struct sp_packet *p, enum sp_hook hook,
	      const struct sp_service *svc, const struct sp_addr *address, const struct sp_addr *peer)
{
	if (sp_may_be_foreign(svc, hook) && !sp_is_local(skb, address, peer, p->version))
		return sp_decide(SP_ACT_NEXT, SP_REASON_NONE);
	return sp_decide(SP_ACT_DROP, SP_REASON_BAD_FLAGS);
}

/*
 * Why a pod does not get what is for an address that no table lists, or NONE. A port of its own services is
 * closed at each address that it has. Where a pod is for certain, protected ports are closed at those that are
 * everybody's, or the link's: its services may not be known yet. Of TCP the SYN is enough there, for a client may have
 * the port by chance.
 */
static __always_inline enum sp_reason sp_unlisted(struct __sk_buff *skb, const struct sp_packet *p, bool ends)
{
	bool serves = sp_pod_serves(p->leaves_by, p->dport, p->protocol);

	if (p->protocol == IPPROTO_UDP) {
		serves = serves || (ends && sp_is_local(skb, &p->dst, &p->src, p->version));
		return serves ? SP_REASON_UDP_DENIED : SP_REASON_NONE;
	}
	if (ends && sp_syn_only(p) && sp_is_link_scope(&p->dst, p->version))
		return SP_REASON_LINK_LOCAL;
	return serves ? SP_REASON_UNLISTED : SP_REASON_NONE;
}

/* Is this where packets towards the service are seen? */
static __always_inline bool sp_is_towards(struct __sk_buff *skb, const struct sp_packet *p, const struct sp_service *svc,
					  enum sp_hook hook, enum sp_behind behind)
{
	return sp_sees_towards(hook, behind, svc, p->ifindex) ||
	       (sp_may_ask(hook, behind) && sp_asks_remote(skb, svc, hook));
}

/* The same for those from it. */
static __always_inline bool sp_is_from(const struct sp_packet *p, const struct sp_flow_key *key,
				       const struct sp_service *svc, enum sp_hook hook, enum sp_behind behind)
{
	return sp_sees_from(hook, behind, svc, p->ifindex) ||
	       (sp_may_be_answered(hook, behind) && sp_answers_remote(key, svc, hook, p->ifindex));
}

/* What the ports of a packet are flagged for, and whose they are. `key` is filled for records. */
static __always_inline struct sp_decision sp_decide_ports(struct __sk_buff *skb,
							  struct sp_packet *p, enum sp_hook hook,
							  enum sp_behind behind, bool to, bool from,
							  struct sp_flow_key *key)
{
	const struct sp_config *cfg;
	struct sp_service *svc;
	enum sp_reason reason;

	if (!sp_parse_addresses(skb, p))
		return sp_decide(SP_ACT_DROP, SP_REASON_MALFORMED);
	sp_parse_volume(skb, p);
	if (sp_lengths_lie(skb, p) && sp_towards_owner(skb, p))
		return sp_decide(SP_ACT_DROP, SP_REASON_MALFORMED);
	cfg = sp_get_config();
	if (!cfg)
		return sp_decide(SP_ACT_DROP, SP_REASON_NO_CONFIG);
	if (skb->mark && p->protocol == IPPROTO_TCP) {
		reason = sp_reinjected(skb, p, cfg->secret[0]);
		if (reason != SP_REASON_NONE)
			return sp_decide(reason == SP_REASON_REINJECTED ? SP_ACT_NEXT : SP_ACT_DROP, reason);
	}
	if (hook == SP_HOOK_IN) {
		reason = sp_source_lies(skb, p);
		if (reason != SP_REASON_NONE)
			return sp_decide(SP_ACT_DROP, reason);
	}
	svc = to ? sp_find_here(skb, &p->dst, &p->src, p->dport, p->protocol, p->version) : NULL;
	if (svc && sp_is_towards(skb, p, svc, hook, behind)) {
		*key = sp_key_towards(p);
		if (p->protocol == IPPROTO_UDP)
			return sp_decide_udp(sp_count_udp(skb, p, svc->id, sp_udp_towards(skb, p, key, svc, hook)), true);
		if (sp_bad_flags(p))
			return sp_decide_bad(skb, p, hook, svc, &p->dst, &p->src);
		if (sp_is_port(behind))
			sp_note_ether(skb, true);
		return sp_decide_towards(skb, cfg, p, sp_is_port(behind) ? SP_HOOK_PORT : hook, svc, key);
	}
	reason = to && p->leaves_by ? sp_unlisted(skb, p, sp_ends_at_pod(hook, behind)) : SP_REASON_NONE;
	if (reason != SP_REASON_NONE) {
		*key = sp_key_towards(p);
		return sp_decide(SP_ACT_DROP, reason);
	}
	svc = from ? sp_find_here(skb, &p->src, &p->dst, p->sport, p->protocol, p->version) : NULL;
	*key = sp_key_from(p);
	if (svc && sp_is_from(p, key, svc, hook, behind)) {
		if (p->protocol == IPPROTO_UDP)
			return sp_decide_udp(sp_udp_from(skb, p, key, svc, hook), false);
		if (sp_bad_flags(p))
			return sp_decide_bad(skb, p, hook, svc, &p->src, &p->dst);
		if (sp_is_port(behind))
			sp_note_ether(skb, false);
		return sp_decide_from(skb, cfg, p, sp_is_port(behind) ? SP_HOOK_PORT : hook, svc, key);
	}
	return sp_decide(SP_ACT_NEXT, SP_REASON_NONE);
}

static __always_inline struct sp_decision sp_decide_icmp_reason(int reason)
{
	return sp_decide(reason == SP_REASON_ICMP_LEG ? SP_ACT_STEER :
			 reason == SP_REASON_ICMP_STRAY ? SP_ACT_DROP : SP_ACT_NEXT, reason);
}

/* Whose packet an ICMP error is about. */
static __always_inline struct sp_decision sp_decide_icmp(struct __sk_buff *skb, struct sp_packet *p,
							 struct sp_packet *q, enum sp_hook hook,
							 enum sp_behind behind, struct sp_flow_key *key)
{
	struct sp_service *svc = NULL;
	int parsed;

	if (!sp_parse_addresses(skb, p))
		return sp_decide(SP_ACT_DROP, SP_REASON_MALFORMED);
	sp_parse_volume(skb, p);
	parsed = sp_parse_quote(skb, p, q);
	if (!sp_ports_read(parsed))
		return sp_decide_icmp_reason(!sp_quotes_none(parsed) && sp_towards_owner(skb, p) ?
					     SP_REASON_ICMP_STRAY : SP_REASON_NONE);
	if (sp_port_flagged(q->protocol, q->sport))
		svc = sp_find_here(skb, &q->src, &q->dst, q->sport, q->protocol, q->version);
	if (svc && sp_is_towards(skb, p, svc, hook, behind)) {
		*key = sp_key_from(q);
		return sp_decide_icmp_reason(sp_icmp_towards(skb, p, key, svc, hook));
	}
	svc = sp_port_flagged(q->protocol, q->dport) ?
		sp_find_here(skb, &q->dst, &q->src, q->dport, q->protocol, q->version) : NULL;
	*key = sp_key_towards(q);
	if (svc && sp_is_from(p, key, svc, hook, behind))
		return sp_decide_icmp_reason(sp_icmp_from(p, key, svc));
	return sp_decide(SP_ACT_NEXT, SP_REASON_NONE);
}

static __always_inline struct sp_decision sp_decide_rest(struct __sk_buff *skb, struct sp_packet *p,
							 enum sp_hook hook, struct sp_flow_key *key)
{
	if (!sp_parse_addresses(skb, p))
		return sp_decide(SP_ACT_DROP, SP_REASON_MALFORMED);
	sp_parse_volume(skb, p);
	return sp_decide_udp(sp_rest(skb, p, key, hook), false);
}

/* What the first stage says of a packet before anything is looked up but the flags of its ports. */
struct sp_glance {
	struct sp_head head;
	enum sp_parse parsed;
	bool to, from;		/* a flagged port */
	__u8 watched;		/* the same, of services that are not enforced: SP_WATCHED_* */
};

/* False: the packet is none of our business. This is all that unprotected traffic costs. */
static __always_inline bool sp_glance(struct __sk_buff *skb, struct sp_glance *g, enum sp_hook hook,
				      enum sp_behind behind, __u32 l3)
{
	struct sp_ports *to, *from;

	/* On the way out the VLAN's own device had it before; but a pod may take tags off itself. */
	if ((sp_hook_is_in(hook) || behind == SP_BEHIND_ANY) && sp_other_vlan(skb))
		return false;
	g->parsed = sp_parse(skb, &g->head, l3);
	if (g->parsed == SP_PARSE_OTHER && sp_ends_at_pod(hook, behind) && sp_tagged_inside(skb)) {
		g->parsed = SP_PARSE_MISPLACED; /* a pod may read any tag */
		return true;
	}
	if (g->parsed == SP_PARSE_OTHER && !g->head.first) {
		g->parsed = SP_PARSE_HIDDEN;
		return sp_hook_is_in(hook) && sp_hidden_by_tags(skb);
	}
	if (!sp_ports_read(g->parsed))
		return true;
	to = sp_ports_with(g->head.protocol, g->head.dport);
	from = sp_ports_with(g->head.protocol, g->head.sport);
	if (!to || !from ||
	    !((sp_any_of(to, g->head.dport) | sp_any_of(from, g->head.sport)) & 1))
		return g->head.first;
	g->to = (to->bits >> (g->head.dport & 63)) & 1;
	g->from = (from->bits >> (g->head.sport & 63)) & 1;
	g->watched = ((to->watched >> (g->head.dport & 63)) & 1 ? SP_WATCHED_TO : 0) |
		     ((from->watched >> (g->head.sport & 63)) & 1 ? SP_WATCHED_FROM : 0);
	return true;
}

/* Sends the packet to the proxy, stamped so that px1 knows it is from here. */
static __always_inline int sp_steer(struct __sk_buff *skb, __u32 l3)
{
	struct sp_config *cfg = sp_get_config();
	struct ethhdr eth = {};

	if (!cfg)
		return TC_ACT_SHOT;
	__builtin_memcpy(eth.h_source, cfg->stamp, sizeof(eth.h_source));
	eth.h_proto = skb->protocol;
	if (!l3 && bpf_skb_change_head(skb, ETH_HLEN, 0))
		return TC_ACT_SHOT;
	if (bpf_skb_store_bytes(skb, 0, &eth, sizeof(eth), 0))
		return TC_ACT_SHOT;
	return bpf_redirect(cfg->px0_ifindex, 0);
}

/* On the way to the proxy, or straight on: what a SYN may ask for. */
static __always_inline bool sp_syn_edited(struct __sk_buff *skb, const struct sp_packet *p,
					  struct sp_decision d)
{
	if (!(p->tcp_flags & SP_TCP_SYN) || d.reason == SP_REASON_REINJECTED)
		return true;
	return !sp_edit_syn(skb, p, d.action == SP_ACT_STEER ? sp_mss_of(skb, p, p->ifindex) : SP_MSS_ANY);
}

static __always_inline int sp_act_device(struct __sk_buff *skb, const struct sp_packet *p,
					 struct sp_decision d, enum sp_hook hook, __u32 l3)
{
	if (d.action == SP_ACT_DROP)
		return TC_ACT_SHOT;
	if (d.action == SP_ACT_REFUSE)
		return sp_refuse(skb, p, hook, l3);
	if (!sp_syn_edited(skb, p, d))
		return TC_ACT_SHOT;
	if (d.action == SP_ACT_STEER)
		return sp_steer(skb, l3);
	if (d.reason == SP_REASON_REINJECTED) {
		skb->mark = 0;
		if (sp_hook_is_in(hook))
			bpf_skb_change_type(skb, 0 /* PACKET_HOST */);
	}
	return TC_ACT_UNSPEC;
}

static __always_inline bool sp_is_denial(struct sp_decision d)
{
	return d.action == SP_ACT_DROP || d.action == SP_ACT_REFUSE || d.reason == SP_REASON_STRAY;
}

/* Parse, decide, account, act. `l3` is where the IP header begins. */
static __always_inline int sp_device(struct __sk_buff *skb, enum sp_hook hook, enum sp_behind behind,
				     __u32 l3)
{
	struct sp_glance g = {};
	struct sp_scratch *scratch;
	struct sp_decision d;
	struct sp_packet *p;

	if (!sp_glance(skb, &g, hook, behind, l3))
		return TC_ACT_UNSPEC;
	scratch = sp_get_scratch();
	if (!scratch)
		return TC_ACT_SHOT;
	p = &scratch->packet;
	sp_packet_begin(skb, p, &g.head);
	p->leaves_by = hook == SP_HOOK_OUT ? p->ifindex : 0;
	__builtin_memset(&scratch->key, 0, sizeof(scratch->key));
	if (g.to || g.from)
		d = sp_decide_ports(skb, p, hook, behind, g.to, g.from, &scratch->key);
	else if (g.parsed == SP_PARSE_ICMP)
		d = sp_decide_icmp(skb, p, &scratch->quoted, hook, behind, &scratch->key);
	else if (g.parsed == SP_PARSE_REST)
		d = sp_decide_rest(skb, p, hook, &scratch->key);
	else if (sp_ports_read(g.parsed) || g.parsed == SP_PARSE_OTHER) /* none of ours: a first fragment, or watched */
		d = sp_decide(sp_parse_addresses(skb, p) ? SP_ACT_NEXT : SP_ACT_DROP, SP_REASON_NONE);
	else
		d = sp_decide_unparsed(skb, p, g.parsed);
	if (p->first)
		sp_keep_first(skb, p, &scratch->key, hook, d.reason);
	if (d.reason == SP_REASON_NONE) {
		if (g.watched || !sp_ports_read(g.parsed))
			sp_watch(skb, hook, behind, g.parsed, g.watched);
		return TC_ACT_UNSPEC;
	}
	if (!p->segments)
		sp_parse_volume(skb, p);
	sp_count(d.reason, p->segments, p->bytes);
	if (sp_is_denial(d)) {
		if (!scratch->key.protocol)
			scratch->key = sp_key_towards(p);
		sp_record_deny(&scratch->key, d.reason, p->ifindex);
	}
	if (d.action == SP_ACT_CUT)
		return sp_cut(skb, p, sp_hook_is_in(hook));
	return sp_act_device(skb, p, d, hook, l3);
}

#endif
