/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef SP_XDP_H
#define SP_XDP_H

/*
 * The filter in front of an uplink. It drops or passes and does nothing else: what it passes is
 * decided by tc as if it had not been there, so losing it opens nothing, and a doubt is a pass.
 *
 * It drops only what concerns a protected service: packets towards one, packets that claim to come
 * from one, and packets without readable ports towards an address that owns one. Everything
 * else is passed after the look at the port flags.
 *
 * VLAN tags are in the packet here, unlike at tc, and up to two are read through. A frame may be in
 * several buffers, of which only the first can be read by pointer; the rest is read by the helper, which
 * the loader takes out on kernels without it (they have no such frames).
 */

#include <linux/udp.h>
#include "account.h"

#define SP_XDP_TAGS 2
#define SP_XDP_REACH 0x3fff	/* furthest offset that is read by pointer */
#define SP_TAKE_TRIES 8

/* What the parser could make of a packet. */
enum sp_xdp_parse {
	SP_XDP_OTHER = 0,	/* not ours, or for tc to judge */
	SP_XDP_PORTS,		/* the ports of a TCP or UDP packet */
	SP_XDP_BLIND,		/* a fragment: the ports are not read */
	SP_XDP_BROKEN,		/* headers lie or are cut off */
};

struct sp_tag {
	__be16 tci;
	__be16 protocol;
};

/* `size` bytes at an offset: in the packet, or in `copy` when they are not in its first buffer. NULL: the
 * frame ends before.
 */
static __always_inline void *sp_xdp_at(struct xdp_md *ctx, __u32 offset, void *copy, __u32 size)
{
	void *at = (void *)(long)ctx->data;

	barrier_var(offset); /* bound and used in one register */
	if (offset > SP_XDP_REACH)
		return bpf_xdp_load_bytes(ctx, offset, copy, size) ? NULL : copy;
	at += offset;
	barrier_var(at); /* one register for the check and for the reads */
	if (at + size <= (void *)(long)ctx->data_end)
		return at;
	return bpf_xdp_load_bytes(ctx, offset, copy, size) ? NULL : copy;
}

static __always_inline __u32 sp_xdp_length(struct xdp_md *ctx)
{
	long length = bpf_xdp_get_buff_len(ctx);

	return length < 0 ? ctx->data_end - ctx->data : length;
}

static __always_inline enum sp_xdp_parse sp_xdp_parse_l4(struct xdp_md *ctx, struct sp_head *h)
{
	struct tcphdr tcp_copy, *tcp;
	struct udphdr udp_copy, *udp;

	if (h->protocol == IPPROTO_UDP) {
		udp = sp_xdp_at(ctx, h->l4, &udp_copy, sizeof(udp_copy));
		if (!udp)
			return SP_XDP_BROKEN;
		h->sport = bpf_ntohs(udp->source);
		h->dport = bpf_ntohs(udp->dest);
		return SP_XDP_PORTS;
	}
	tcp = sp_xdp_at(ctx, h->l4, &tcp_copy, sizeof(tcp_copy));
	if (!tcp)
		return SP_XDP_BROKEN;
	h->sport = bpf_ntohs(tcp->source);
	h->dport = bpf_ntohs(tcp->dest);
	h->l4_len = tcp->doff * 4;
	h->tcp_flags = ((__u8 *)tcp)[13];
	return h->l4_len < sizeof(*tcp) ? SP_XDP_BROKEN : SP_XDP_PORTS;
}

/* A total length of 0 is left to tc: in a packet that the stack made itself it stands for more than 64 KiB. */
static __always_inline enum sp_xdp_parse sp_xdp_parse_ipv4(struct xdp_md *ctx, struct sp_head *h)
{
	struct iphdr copy, *ip = sp_xdp_at(ctx, h->l3, &copy, sizeof(copy));
	__u16 total;

	if (!ip)
		return SP_XDP_BROKEN;
	h->version = 4;
	h->protocol = ip->protocol;
	if (ip->protocol != IPPROTO_TCP && ip->protocol != IPPROTO_UDP)
		return SP_XDP_OTHER;
	total = bpf_ntohs(ip->tot_len);
	if (ip->version != 4 || ip->ihl < 5 || (total && total < ip->ihl * 4))
		return SP_XDP_BROKEN;
	if (ip->frag_off & bpf_htons(SP_IP_MF | SP_IP_OFFSET))
		return SP_XDP_BLIND;
	h->l4 = h->l3 + ip->ihl * 4;
	return sp_xdp_parse_l4(ctx, h);
}

/* Walks the extension headers as sp_parse_ext does. A chain beyond the bound, and what only tc refuses, is OTHER. */
__noinline int sp_xdp_parse_ext(struct xdp_md *ctx, struct sp_head *h)
{
	struct ipv6_opt_hdr copy, *opt;
	__u32 offset;

	if (!h)
		return SP_XDP_OTHER;
	offset = h->l3 + sizeof(struct ipv6hdr);
	for (int i = 0; i <= SP_EXT_MAX; i++) {
		switch (h->protocol) {
		case IPPROTO_TCP:
		case IPPROTO_UDP:
			h->l4 = offset;
			return SP_XDP_PORTS;
		case IPPROTO_FRAGMENT:
		case IPPROTO_HOPOPTS:
		case IPPROTO_ROUTING:
		case IPPROTO_DSTOPTS:
		case IPPROTO_AH:
			break;
		default:
			return SP_XDP_OTHER;
		}
		opt = sp_xdp_at(ctx, offset, &copy, sizeof(copy));
		if (!opt)
			return SP_XDP_BROKEN;
		if (h->protocol == IPPROTO_FRAGMENT)
			return opt->nexthdr == IPPROTO_ICMPV6 ? SP_XDP_OTHER : SP_XDP_BLIND;
		offset += h->protocol == IPPROTO_AH ? (opt->hdrlen + 2) * 4 : (opt->hdrlen + 1) * 8;
		h->protocol = opt->nexthdr;
	}
	return SP_XDP_OTHER;
}

static __always_inline enum sp_xdp_parse sp_xdp_parse_ipv6(struct xdp_md *ctx, struct sp_head *h)
{
	struct ipv6hdr copy, *ip = sp_xdp_at(ctx, h->l3, &copy, sizeof(copy));
	int parsed = SP_XDP_PORTS;

	if (!ip)
		return SP_XDP_BROKEN;
	h->version = 6;
	h->protocol = ip->nexthdr;
	if (ip->version != 6)
		return SP_XDP_BROKEN;
	h->l4 = h->l3 + sizeof(*ip);
	if (h->protocol != IPPROTO_TCP && h->protocol != IPPROTO_UDP)
		parsed = sp_xdp_parse_ext(ctx, h);
	return parsed == SP_XDP_PORTS ? sp_xdp_parse_l4(ctx, h) : (enum sp_xdp_parse)parsed;
}

static __always_inline bool sp_is_tag(__be16 protocol)
{
	return protocol == bpf_htons(ETH_P_8021Q) || protocol == bpf_htons(ETH_P_8021AD);
}

/* Up to the ports. */
static __always_inline enum sp_xdp_parse sp_xdp_parse(struct xdp_md *ctx, struct sp_head *h)
{
	struct ethhdr eth_copy, *eth = sp_xdp_at(ctx, 0, &eth_copy, sizeof(eth_copy));
	struct sp_tag tag_copy, *tag;
	__be16 protocol;

	if (!eth)
		return SP_XDP_OTHER;
	protocol = eth->h_proto;
	h->l3 = ETH_HLEN;
	for (int i = 0; i < SP_XDP_TAGS && sp_is_tag(protocol); i++) {
		tag = sp_xdp_at(ctx, h->l3, &tag_copy, sizeof(tag_copy));
		if (!tag)
			return SP_XDP_OTHER;
		protocol = tag->protocol;
		h->l3 += sizeof(*tag);
	}
	if (protocol == bpf_htons(ETH_P_IP))
		return sp_xdp_parse_ipv4(ctx, h);
	if (protocol == bpf_htons(ETH_P_IPV6))
		return sp_xdp_parse_ipv6(ctx, h);
	return SP_XDP_OTHER;
}

/* The addresses, and in p->bytes the length that the IP header claims, of any packet whose IP header could be
 * read.
 */
static __always_inline bool sp_xdp_addresses(struct xdp_md *ctx, struct sp_packet *p)
{
	struct iphdr ip4_copy, *ip4;
	struct ipv6hdr ip6_copy, *ip6;

	if (p->version == 6) {
		ip6 = sp_xdp_at(ctx, p->l3, &ip6_copy, sizeof(ip6_copy));
		if (!ip6)
			return false;
		p->bytes = sizeof(*ip6) + bpf_ntohs(ip6->payload_len);
		__builtin_memcpy(&p->src, &ip6->saddr, 16);
		__builtin_memcpy(&p->dst, &ip6->daddr, 16);
		return true;
	}
	ip4 = p->version == 4 ? sp_xdp_at(ctx, p->l3, &ip4_copy, sizeof(ip4_copy)) : NULL;
	if (!ip4)
		return false;
	p->bytes = bpf_ntohs(ip4->tot_len);
	p->src.bytes[10] = p->src.bytes[11] = 0xff;
	p->dst.bytes[10] = p->dst.bytes[11] = 0xff;
	__builtin_memcpy(&p->src.bytes[12], &ip4->saddr, 4);
	__builtin_memcpy(&p->dst.bytes[12], &ip4->daddr, 4);
	return true;
}

static __always_inline const __u32 *sp_words(const struct sp_addr *a)
{
	return (const __u32 *)a;
}

/* The mapped form is ours alone: on the wire it would be taken for IPv4. */
static __always_inline bool sp_addr_mapped(const struct sp_addr *a)
{
	return !sp_words(a)[0] && !sp_words(a)[1] && sp_words(a)[2] == bpf_htonl(0xffff);
}

static __always_inline bool sp_addr_loopback(const struct sp_addr *a, __u8 version)
{
	if (version == 4)
		return a->bytes[12] == 127;
	return !sp_words(a)[0] && !sp_words(a)[1] && !sp_words(a)[2] && sp_words(a)[3] == bpf_htonl(1);
}

/* Nobody sends from a group, from everybody or from nowhere; loopback is never on a wire. */
static __always_inline bool sp_xdp_martian(const struct sp_packet *p)
{
	__u32 last = sp_words(&p->src)[3];

	if (sp_addr_loopback(&p->src, p->version) || sp_addr_loopback(&p->dst, p->version))
		return true;
	if (p->version == 4)
		return !last || last == 0xffffffff || p->src.bytes[12] >> 4 == 14;
	return p->src.bytes[0] == 0xff ||
	       !(sp_words(&p->src)[0] | sp_words(&p->src)[1] | sp_words(&p->src)[2] | last);
}

static __always_inline bool sp_same_addr(const struct sp_addr *a, const struct sp_addr *b)
{
	const __u64 *x = (const __u64 *)a, *y = (const __u64 *)b;

	return x[0] == y[0] && x[1] == y[1];
}

static __always_inline enum sp_reason sp_xdp_refused_source(const struct sp_packet *p)
{
	struct sp_prefix key = { .bits = 8 * sizeof(p->src) };
	struct sp_source *source;

	__builtin_memcpy(key.address, &p->src, sizeof(key.address));
	source = bpf_map_lookup_elem(&sp_sources, &key);
	return source ? source->reason : SP_REASON_NONE;
}

/* What is wrong with a packet, whomever it is for. */
static __always_inline enum sp_reason sp_xdp_fault(struct xdp_md *ctx, const struct sp_packet *p,
						   enum sp_xdp_parse parsed)
{
	if (p->version == 6 && (sp_addr_mapped(&p->src) || sp_addr_mapped(&p->dst)))
		return SP_REASON_XDP_MAPPED;
	if (parsed == SP_XDP_BROKEN || p->l3 + p->bytes > sp_xdp_length(ctx))
		return SP_REASON_XDP_MALFORMED;
	if (sp_xdp_martian(p))
		return SP_REASON_XDP_MARTIAN;
	if (sp_same_addr(&p->src, &p->dst))
		return SP_REASON_XDP_LAND;
	return sp_xdp_refused_source(p);
}

/* As sp_is_local, but asked from nowhere: what a faulty packet has for a source is no question for the routing
 * table, which would not forward for a group or for loopback at all.
 */
__noinline int sp_xdp_is_local(struct xdp_md *ctx, const struct sp_addr *address,
				      __u32 version)
{
	struct sp_addr nowhere = {};
	struct bpf_fib_lookup *fib = sp_fib_question(ctx->ingress_ifindex, address, &nowhere, version);

	return !fib || sp_fib_says_local(bpf_fib_lookup(ctx, fib, sizeof(*fib), 0));
}

/* The protected service that a packet is for, if it is on this node. */
static __noinline struct sp_service *sp_xdp_service_to(struct xdp_md *ctx, const struct sp_packet *p)
{
	struct sp_service *svc;

	if (!p || !sp_port_flagged(p->protocol, p->dport))
		return NULL;
	svc = sp_find_own(&p->dst, p->dport, p->protocol);
	if (svc && svc->target == SP_TARGET_HOST && !sp_xdp_is_local(ctx, &p->dst, p->version))
		return NULL;
	return svc;
}

/* The same for the one that it claims to come from. */
static __noinline struct sp_service *sp_xdp_service_from(struct xdp_md *ctx, const struct sp_packet *p)
{
	struct sp_service *svc;

	if (!p || !sp_port_flagged(p->protocol, p->sport))
		return NULL;
	svc = sp_find_own(&p->src, p->sport, p->protocol);
	if (svc && svc->target == SP_TARGET_HOST && !sp_xdp_is_local(ctx, &p->src, p->version))
		return NULL;
	return svc;
}

/* Does the address of a packet without ports own a protected one? */
__noinline int sp_xdp_owner(struct xdp_md *ctx, const struct sp_packet *p)
{
	struct sp_owner_key any = {}, dst = {};

	if (!p)
		return 0;
	dst.address = p->dst;
	if (bpf_map_lookup_elem(&sp_owners, &dst))
		return 1;
	return bpf_map_lookup_elem(&sp_owners, &any) &&
	       sp_xdp_is_local(ctx, &p->dst, p->version);
}

/* Asked of faulty packets only: are they any of our business? */
static __always_inline bool sp_xdp_concerns(struct xdp_md *ctx, const struct sp_packet *p,
					    enum sp_xdp_parse parsed)
{
	if (parsed == SP_XDP_PORTS)
		return sp_xdp_service_to(ctx, p) || sp_xdp_service_from(ctx, p);
	return sp_xdp_owner(ctx, p);
}

/* Takes one SYN out of a bucket, never one too many; a CPU that loses the race too often gets none. */
static __always_inline bool sp_take(struct sp_bucket *b, __u64 interval_ns, __u64 burst_ns)
{
	__u64 now = bpf_ktime_get_boot_ns();

	for (int i = 0; i < SP_TAKE_TRIES; i++) {
		__u64 full = *(volatile __u64 *)&b->full_ns;
		__u64 next = (full > now ? full : now) + interval_ns;

		if (next - now > burst_ns)
			return false;
		if (__sync_val_compare_and_swap(&b->full_ns, full, next) == full)
			return true;
	}
	return false;
}

/* A bucket that is not there is a full one. No room for one: a doubt, so a pass. */
static __always_inline bool sp_admits(void *buckets, const void *key, __u64 interval_ns,
				      __u64 burst_ns)
{
	struct sp_bucket *b, full = {};

	if (!interval_ns)
		return true;
	b = bpf_map_lookup_elem(buckets, key);
	if (!b) {
		bpf_map_update_elem(buckets, key, &full, BPF_NOEXIST);
		b = bpf_map_lookup_elem(buckets, key);
	}
	return !b || sp_take(b, interval_ns, burst_ns);
}

/* A SYN towards a protected service: first out of its source's bucket, then out of the service's, so that
 * a single source cannot empty the latter.
 */
__noinline int sp_xdp_syn(struct xdp_md *ctx, const struct sp_packet *p)
{
	struct sp_syn_limits *limits;
	struct sp_service *svc;
	struct sp_addr source;
	__u32 zero = 0, id;

	if (!p)
		return SP_REASON_NONE;
	limits = bpf_map_lookup_elem(&sp_syn_limits, &zero);
	if (!limits || !(limits->source_interval_ns | limits->service_interval_ns))
		return SP_REASON_NONE;
	svc = sp_xdp_service_to(ctx, p);
	if (!svc)
		return SP_REASON_NONE;
	source = p->src;
	if (p->version == 6)
		__builtin_memset(&source.bytes[8], 0, 8);
	if (!sp_admits(&sp_syn_sources, &source, limits->source_interval_ns, limits->source_burst_ns))
		return SP_REASON_XDP_SYN_SOURCE;
	id = svc->id;
	if (!sp_admits(&sp_syn_services, &id, limits->service_interval_ns, limits->service_burst_ns))
		return SP_REASON_XDP_SYN_SERVICE;
	return SP_REASON_NONE;
}

/* Generic XDP sees what px0 puts back on the uplink for a second time; the proxy's half of the flow is
 * known by then. Who guesses that tuple gets no further than to tc.
 */
static __always_inline bool sp_xdp_put_back(const struct sp_flow_key *key)
{
	return sp_find_leg(key, SP_LEG_UP, 0);
}

static __always_inline enum sp_reason sp_xdp_decide(struct xdp_md *ctx, struct sp_scratch *scratch,
						    enum sp_xdp_parse parsed, bool generic)
{
	struct sp_packet *p = &scratch->packet;
	enum sp_reason fault;

	if (!sp_xdp_addresses(ctx, p))
		return SP_REASON_NONE;
	scratch->key = sp_key_towards(p);
	if (generic && sp_xdp_put_back(&scratch->key))
		return SP_REASON_NONE;
	fault = sp_xdp_fault(ctx, p, parsed);
	if (fault != SP_REASON_NONE)
		return sp_xdp_concerns(ctx, p, parsed) ? fault : SP_REASON_NONE;
	if (parsed != SP_XDP_PORTS || p->protocol != IPPROTO_TCP || !sp_syn_only(p))
		return SP_REASON_NONE;
	return sp_xdp_syn(ctx, p);
}

/* Parse, decide, account, drop or pass. */
static __always_inline int sp_xdp(struct xdp_md *ctx, bool generic)
{
	struct sp_head head = {};
	enum sp_xdp_parse parsed = sp_xdp_parse(ctx, &head);
	struct sp_scratch *scratch;
	enum sp_reason reason;

	if (parsed == SP_XDP_OTHER ||
	    (parsed == SP_XDP_PORTS && !sp_port_flagged(head.protocol, head.dport) &&
	     !sp_port_flagged(head.protocol, head.sport)))
		return XDP_PASS;
	scratch = sp_get_scratch();
	if (!scratch)
		return XDP_PASS;
	__builtin_memset(&scratch->packet, 0, sizeof(scratch->packet));
	__builtin_memcpy(&scratch->packet, &head, sizeof(head));
	reason = sp_xdp_decide(ctx, scratch, parsed, generic);
	if (reason == SP_REASON_NONE)
		return XDP_PASS;
	sp_count(reason, 1, sp_xdp_length(ctx) - head.l3);
	sp_record_deny(&scratch->key, reason, ctx->ingress_ifindex);
	return XDP_DROP;
}

#endif
