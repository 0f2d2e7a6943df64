/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef SP_ICMP_H
#define SP_ICMP_H

/*
 * ICMP errors are matched by the packet that they quote, which is what the socket that they reach goes by:
 *  - about a packet of the proxy, towards client or service: to the proxy, or path MTU discovery fails;
 *  - about a packet of a bypassed flow: passed and accounted, while its path lives;
 *  - towards a service, about anything else that it would have sent from a protected port: dropped;
 *  - redirects about any of these: dropped, never steered.
 * All else passes. A quote is read as the kernel reads it: ports where the header of the quoted packet
 * ends, whatever its fragment offset.
 */

#include "hook.h"

#define SP_ND_OPTIONS 40	/* where the options of an IPv6 redirect begin */
#define SP_ND_REDIRECTED 4	/* the option that quotes the packet */

static __always_inline bool sp_is_redirect(const struct sp_packet *p)
{
	return p->icmp_type == (p->version == 4 ? SP_ICMP_REDIRECT : SP_ICMP6_REDIRECT);
}

/* Where the quoted packet begins; 0: nothing is quoted. */
static __always_inline __u32 sp_quote_at(struct __sk_buff *skb, const struct sp_packet *p)
{
	__u32 at = p->l4 + SP_ND_OPTIONS;
	struct {
		__u8 type;
		__u8 words;	/* of eight bytes */
	} opt;

	if (p->icmp_type != SP_ICMP6_REDIRECT || p->version == 4)
		return p->l4 + sizeof(struct sp_icmp);
	for (int i = 0; i < 4; i++) {
		if (bpf_skb_load_bytes(skb, at, &opt, sizeof(opt)) || !opt.words)
			return 0;
		if (opt.type == SP_ND_REDIRECTED)
			return at + 8;
		at += opt.words * 8;
	}
	return 0;
}

/* Finds the transport header of the quoted packet. */
static __always_inline int sp_quoted_transport(struct __sk_buff *skb, struct sp_head *q)
{
	struct ipv6hdr ip6;
	struct iphdr ip;

	if (q->version == 4) {
		if (bpf_skb_load_bytes(skb, q->l3, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < 5)
			return SP_PARSE_MALFORMED;
		q->protocol = ip.protocol;
		q->l4 = q->l3 + ip.ihl * 4;
		return sp_has_ports(ip.protocol) ? SP_PARSE_TCP : SP_PARSE_OTHER;
	}
	if (bpf_skb_load_bytes(skb, q->l3, &ip6, sizeof(ip6)) || ip6.version != 6)
		return SP_PARSE_MALFORMED;
	return sp_walk(skb, q, ip6.nexthdr);
}

/* Reads what an ICMP error quotes into `q`. OTHER: nothing with ports. */
__noinline int sp_parse_quote(struct __sk_buff *skb, const struct sp_packet *p,
				     struct sp_packet *q)
{
	struct sp_head head = {};
	__be16 ports[2];
	int parsed;

	if (!p || !q)
		return SP_PARSE_MALFORMED;
	head.version = p->version;
	head.l3 = sp_quote_at(skb, p);
	if (!head.l3)
		return SP_PARSE_OTHER;
	parsed = sp_quoted_transport(skb, &head);
	if (!sp_ports_read(parsed))
		return parsed;
	if (bpf_skb_load_bytes(skb, head.l4, ports, sizeof(ports)))
		return SP_PARSE_MALFORMED;
	head.sport = bpf_ntohs(ports[0]);
	head.dport = bpf_ntohs(ports[1]);
	sp_packet_begin(skb, q, &head);
	return sp_parse_addresses(skb, q) ? parsed : SP_PARSE_MALFORMED;
}

/* Is the quoted packet one that no socket with ports will hear of? */
static __always_inline bool sp_quotes_none(int parsed)
{
	return parsed == SP_PARSE_OTHER || parsed == SP_PARSE_ICMP || parsed == SP_PARSE_REST;
}

/* Is it about a bypassed flow whose path lives? Then it is accounted. */
static __always_inline bool sp_icmp_of_flow(const struct sp_packet *p, const struct sp_flow_key *key,
					    const struct sp_service *svc, bool from_client)
{
	struct sp_flow *flow = bpf_map_lookup_elem(&sp_flows, key);
	struct sp_config *cfg = sp_get_config();

	return flow && cfg &&
	       sp_flow_packet(cfg, key, flow, p, svc->id, from_client) == SP_REASON_PATH_LIVE;
}

/* An error about a packet `q` of a service: towards the service. One of another node hears of what is not of the proxy. */
static __noinline int sp_icmp_towards(struct __sk_buff *skb, const struct sp_packet *p,
				      const struct sp_flow_key *key, const struct sp_service *svc, __u32 hook)
{
	if (!p || !key || !svc)
		return SP_REASON_ICMP_STRAY;
	if (sp_may_be_foreign(svc, hook) && !sp_is_local(skb, &p->dst, &p->src, p->version))
		return SP_REASON_NONE;
	if (svc->target == SP_TARGET_REMOTE && !sp_find_leg(key, SP_LEG_DOWN, 0))
		return SP_REASON_NONE;
	if (sp_is_redirect(p)) /* it changes the way of all that goes to an address, whatever it quotes */
		return SP_REASON_ICMP_STRAY;
	if (key->protocol == IPPROTO_UDP && !svc->udp_idle_s)
		return SP_REASON_NONE;
	if (sp_find_leg(key, SP_LEG_DOWN, 0))
		return SP_REASON_ICMP_LEG;
	return sp_icmp_of_flow(p, key, svc, true) ? SP_REASON_ICMP_LIVE : SP_REASON_ICMP_STRAY;
}

/* An error about a packet to a service: towards its sender, or the proxy that sent it for him. */
static __noinline int sp_icmp_from(const struct sp_packet *p, const struct sp_flow_key *key,
				   const struct sp_service *svc)
{
	if (!p || !key || !svc)
		return SP_REASON_ICMP_STRAY;
	if (sp_find_leg(key, SP_LEG_UP, 0))
		return sp_is_redirect(p) ? SP_REASON_ICMP_STRAY : SP_REASON_ICMP_LEG;
	if (!sp_is_redirect(p) && sp_icmp_of_flow(p, key, svc, false))
		return SP_REASON_ICMP_LIVE;
	return SP_REASON_NONE;
}

#endif
