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

#include "account.h"

#define SP_XDP_TAGS 2
#define SP_XDP_REACH 0x3fff	/* furthest offset that is read by pointer */
#define SP_TAKE_TRIES 8

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

static __always_inline enum sp_parse sp_xdp_parse_tcp(struct xdp_md *ctx, struct sp_packet *p)
{
	struct tcphdr copy, *tcp = sp_xdp_at(ctx, p->l4, &copy, sizeof(copy));

	if (!tcp)
		return SP_PARSE_MALFORMED;
	p->sport = bpf_ntohs(tcp->source);
	p->dport = bpf_ntohs(tcp->dest);
	p->tcp_len = tcp->doff * 4;
	p->tcp_flags = ((__u8 *)tcp)[13];
	return p->tcp_len < sizeof(*tcp) ? SP_PARSE_MALFORMED : SP_PARSE_TCP;
}

/* A total length of 0 is left to tc: where the stack itself made the packet it stands for more than 64 KiB. */
static __always_inline enum sp_parse sp_xdp_parse_ipv4(struct xdp_md *ctx, struct sp_packet *p)
{
	struct iphdr copy, *ip = sp_xdp_at(ctx, p->l3, &copy, sizeof(copy));

	if (!ip)
		return SP_PARSE_MALFORMED;
	p->version = 4;
	if (ip->protocol != IPPROTO_TCP)
		return SP_PARSE_OTHER;
	p->bytes = bpf_ntohs(ip->tot_len);
	if (ip->version != 4 || ip->ihl < 5 || (p->bytes && p->bytes < ip->ihl * 4))
		return SP_PARSE_MALFORMED;
	if (ip->frag_off & bpf_htons(SP_IP_MF | SP_IP_OFFSET))
		return SP_PARSE_FRAGMENT;
	p->l4 = p->l3 + ip->ihl * 4;
	return sp_xdp_parse_tcp(ctx, p);
}

/* Walks the extension headers as sp_parse_ext does. */
static __noinline int sp_xdp_parse_ext(struct xdp_md *ctx, struct sp_packet *p, __u8 next)
{
	struct ipv6_opt_hdr copy, *opt;
	__u32 offset;

	if (!p)
		return SP_PARSE_OTHER;
	offset = p->l3 + sizeof(struct ipv6hdr);
	for (int i = 0; i <= SP_EXT_MAX; i++) {
		switch (next) {
		case IPPROTO_TCP:
			p->l4 = offset;
			return SP_PARSE_TCP;
		case IPPROTO_ESP:
		case IPPROTO_NONE:
			return SP_PARSE_EXT_HEADERS;
		case IPPROTO_FRAGMENT:
		case IPPROTO_HOPOPTS:
		case IPPROTO_ROUTING:
		case IPPROTO_DSTOPTS:
		case IPPROTO_AH:
			break;
		default:
			return SP_PARSE_OTHER;
		}
		opt = sp_xdp_at(ctx, offset, &copy, sizeof(copy));
		if (!opt)
			return SP_PARSE_MALFORMED;
		if (next == IPPROTO_FRAGMENT)
			return opt->nexthdr == IPPROTO_TCP ? SP_PARSE_FRAGMENT : SP_PARSE_OTHER;
		offset += next == IPPROTO_AH ? (opt->hdrlen + 2) * 4 : (opt->hdrlen + 1) * 8;
		next = opt->nexthdr;
	}
	return SP_PARSE_EXT_HEADERS;
}

static __always_inline enum sp_parse sp_xdp_parse_ipv6(struct xdp_md *ctx, struct sp_packet *p)
{
	struct ipv6hdr copy, *ip = sp_xdp_at(ctx, p->l3, &copy, sizeof(copy));
	int parsed;

	if (!ip)
		return SP_PARSE_MALFORMED;
	p->version = 6;
	p->bytes = sizeof(*ip) + bpf_ntohs(ip->payload_len);
	if (ip->version != 6)
		return SP_PARSE_MALFORMED;
	if (ip->nexthdr == IPPROTO_TCP) {
		p->l4 = p->l3 + sizeof(*ip);
		return sp_xdp_parse_tcp(ctx, p);
	}
	parsed = sp_xdp_parse_ext(ctx, p, ip->nexthdr);
	return parsed == SP_PARSE_TCP ? sp_xdp_parse_tcp(ctx, p) : (enum sp_parse)parsed;
}

static __always_inline bool sp_is_tag(__be16 protocol)
{
	return protocol == bpf_htons(ETH_P_8021Q) || protocol == bpf_htons(ETH_P_8021AD);
}

/* Up to the ports; p->bytes is what the IP header says of its packet. */
static __always_inline enum sp_parse sp_xdp_parse(struct xdp_md *ctx, struct sp_packet *p)
{
	struct ethhdr eth_copy, *eth = sp_xdp_at(ctx, 0, &eth_copy, sizeof(eth_copy));
	struct sp_tag tag_copy, *tag;
	__be16 protocol;

	if (!eth)
		return SP_PARSE_OTHER;
	protocol = eth->h_proto;
	p->l3 = ETH_HLEN;
	for (int i = 0; i < SP_XDP_TAGS && sp_is_tag(protocol); i++) {
		tag = sp_xdp_at(ctx, p->l3, &tag_copy, sizeof(tag_copy));
		if (!tag)
			return SP_PARSE_OTHER;
		protocol = tag->protocol;
		p->l3 += sizeof(*tag);
	}
	if (protocol == bpf_htons(ETH_P_IP))
		return sp_xdp_parse_ipv4(ctx, p);
	if (protocol == bpf_htons(ETH_P_IPV6))
		return sp_xdp_parse_ipv6(ctx, p);
	return SP_PARSE_OTHER;
}

/* The addresses, of any packet whose IP header could be read. */
static __always_inline bool sp_xdp_addresses(struct xdp_md *ctx, struct sp_packet *p)
{
	struct iphdr ip4_copy, *ip4;
	struct ipv6hdr ip6_copy, *ip6;

	if (p->version == 6) {
		ip6 = sp_xdp_at(ctx, p->l3, &ip6_copy, sizeof(ip6_copy));
		if (!ip6)
			return false;
		__builtin_memcpy(&p->src, &ip6->saddr, 16);
		__builtin_memcpy(&p->dst, &ip6->daddr, 16);
		return true;
	}
	ip4 = p->version == 4 ? sp_xdp_at(ctx, p->l3, &ip4_copy, sizeof(ip4_copy)) : NULL;
	if (!ip4)
		return false;
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
						   enum sp_parse parsed)
{
	if (p->version == 6 && (sp_addr_mapped(&p->src) || sp_addr_mapped(&p->dst)))
		return SP_REASON_XDP_MAPPED;
	if (parsed == SP_PARSE_MALFORMED || p->l3 + p->bytes > sp_xdp_length(ctx))
		return SP_REASON_XDP_MALFORMED;
	if (sp_xdp_martian(p))
		return SP_REASON_XDP_MARTIAN;
	if (sp_same_addr(&p->src, &p->dst))
		return SP_REASON_XDP_LAND;
	return sp_xdp_refused_source(p);
}

/* As sp_is_local, for this kind of context. */
static __noinline int sp_xdp_is_local(struct xdp_md *ctx, const struct sp_addr *address,
				      const struct sp_addr *peer, __u32 version)
{
	struct bpf_fib_lookup fib = {};
	long r;

	if (!address || !peer)
		return 1;
	fib.ifindex = ctx->ingress_ifindex;
	if (version == 4) {
		fib.family = SP_AF_INET;
		__builtin_memcpy(&fib.ipv4_src, &peer->bytes[12], 4);
		__builtin_memcpy(&fib.ipv4_dst, &address->bytes[12], 4);
	} else {
		fib.family = SP_AF_INET6;
		__builtin_memcpy(fib.ipv6_src, peer, 16);
		__builtin_memcpy(fib.ipv6_dst, address, 16);
	}
	r = bpf_fib_lookup(ctx, &fib, sizeof(fib), 0);
	return r < 0 || r == BPF_FIB_LKUP_RET_NOT_FWDED || r == BPF_FIB_LKUP_RET_FWD_DISABLED;
}

/* The protected service at an address and port, if it is on this node. */
static __always_inline struct sp_service *
sp_xdp_service(struct xdp_md *ctx, const struct sp_addr *address, __u16 port,
	       const struct sp_addr *peer, __u32 version)
{
	struct sp_service *svc = sp_port_flagged(port) ? sp_find_service(address, port) : NULL;

	if (!svc || svc->target != SP_TARGET_HOST || sp_xdp_is_local(ctx, address, peer, version))
		return svc;
	return NULL;
}

/* Asked of faulty packets only: is it any of our business? */
static __noinline int sp_xdp_concerns(struct xdp_md *ctx, const struct sp_packet *p, __u32 parsed)
{
	struct sp_addr any = {}, dst;

	if (!p)
		return 0;
	if (parsed == SP_PARSE_TCP)
		return sp_xdp_service(ctx, &p->dst, p->dport, &p->src, p->version) ||
		       sp_xdp_service(ctx, &p->src, p->sport, &p->dst, p->version);
	dst = p->dst;
	return bpf_map_lookup_elem(&sp_owners, &dst) ||
	       (bpf_map_lookup_elem(&sp_owners, &any) &&
		sp_xdp_is_local(ctx, &p->dst, &p->src, p->version));
}

/* Takes one SYN out of a bucket, never one too many; a CPU that loses the race too often takes none. */
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
static __noinline int sp_xdp_syn(struct xdp_md *ctx, const struct sp_packet *p)
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
	svc = sp_xdp_service(ctx, &p->dst, p->dport, &p->src, p->version);
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
static __noinline int sp_xdp_put_back(const struct sp_packet *p)
{
	struct sp_flow_key key = {};

	if (!p)
		return 0;
	key.client = p->src;
	key.server = p->dst;
	key.client_port = p->sport;
	key.server_port = p->dport;
	return !!sp_find_leg(&key, SP_LEG_UP, 0);
}

static __always_inline enum sp_reason sp_xdp_decide(struct xdp_md *ctx, struct sp_packet *p,
						    bool generic)
{
	enum sp_parse parsed = sp_xdp_parse(ctx, p);
	enum sp_reason fault;

	if (parsed == SP_PARSE_OTHER)
		return SP_REASON_NONE;
	if (parsed == SP_PARSE_TCP && !sp_port_flagged(p->dport) && !sp_port_flagged(p->sport))
		return SP_REASON_NONE;
	if (!sp_xdp_addresses(ctx, p) || (generic && sp_xdp_put_back(p)))
		return SP_REASON_NONE;
	fault = sp_xdp_fault(ctx, p, parsed);
	if (fault != SP_REASON_NONE)
		return sp_xdp_concerns(ctx, p, parsed) ? fault : SP_REASON_NONE;
	return parsed == SP_PARSE_TCP && sp_syn_only(p) ? sp_xdp_syn(ctx, p) : SP_REASON_NONE;
}

/* Parse, decide, account, drop or pass. */
static __always_inline int sp_xdp(struct xdp_md *ctx, bool generic)
{
	struct sp_packet p = {};
	struct sp_flow_key key = {};
	enum sp_reason reason = sp_xdp_decide(ctx, &p, generic);

	if (reason == SP_REASON_NONE)
		return XDP_PASS;
	key.client = p.src;
	key.server = p.dst;
	key.client_port = p.sport;
	key.server_port = p.dport;
	sp_count(reason, 1, sp_xdp_length(ctx) - p.l3);
	sp_record_deny(&key, reason, ctx->ingress_ifindex);
	return XDP_DROP;
}

#endif
