/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef SP_PARSE_H
#define SP_PARSE_H

/*
 * The one parser. What it does with
 *  - VLAN: an outer tag of id 0 is read through, any other is not ours (the sub-device's hook
 *    sees the packet untagged); a tag left in the payload is not IP here, and two tags of id 0
 *    are SP_PARSE_MALFORMED whatever they hide;
 *  - IPv4 options: IHL is honoured;
 *  - no IP header where it should begin, told by its version: SP_PARSE_MISPLACED. No device brings
 *    such packets in a way that we know of, and what is behind that header was not read;
 *  - fragments: those of TCP are SP_PARSE_FRAGMENT; of UDP the first is read like any datagram, and must
 *    hold its header, the others are SP_PARSE_REST. What a fragment of IPv6 is of stands in the first
 *    alone, so every other one is SP_PARSE_REST there. Nothing can lie over a first fragment's header: the
 *    next one begins behind its eight bytes;
 *  - source routes, by IPv4 options or an IPv6 routing header that is not used up: SP_PARSE_SOURCE_ROUTE;
 *  - IPv6 extension headers: at most SP_EXT_MAX, each sized by its own type; ESP, no-next-header
 *    and a chain beyond the bound are SP_PARSE_EXT_HEADERS;
 *  - truncation, a header length below its minimum, mapped addresses on the wire: SP_PARSE_MALFORMED;
 *  - lengths that lie, of packets with a flagged port: sp_lengths_lie. Bytes behind the IP packet are no
 *    lie: short Ethernet frames are padded;
 *  - ICMP errors and redirects: SP_PARSE_ICMP, and SP_PARSE_FRAGMENT when they come in fragments: an error
 *    has no reason to be that long. Which it is stands in the first fragment;
 *  - everything else: SP_PARSE_OTHER.
 * Where the IP header begins is a constant of the program: behind the Ethernet header, or at once
 * on a device without one (tunnels). The packet does not say, and its sender must not.
 * Only the first stage, up to the ports, runs for unprotected traffic.
 */

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "types.h"

#ifndef barrier_var
/* Keeps clang from folding a context load into pointer arithmetic the verifier refuses. */
#define barrier_var(var) asm volatile("" : "+r"(var))
#endif

#define SP_EXT_MAX 8
#define SP_PULL 256		/* bytes made linear when the headers are not */
#define SP_VLAN_VID 0x0fff

#define SP_IP_MF 0x2000
#define SP_IP_OFFSET 0x1fff
#define SP_IP_OPTIONS_MAX 40
#define SP_IPOPT_NOP 1
#define SP_IPOPT_LSRR 131
#define SP_IPOPT_SSRR 137
#define SP_IP6_MF 0x0001
#define SP_IP6_OFFSET 0xfff8

#define SP_TCP_FIN 0x01
#define SP_TCP_SYN 0x02
#define SP_TCP_RST 0x04
#define SP_TCP_ACK 0x10

/* Types and codes of ICMP. linux/icmp.h needs the headers of a C library. */
#define SP_ICMP_UNREACHABLE 3
#define SP_ICMP_PORT 3
#define SP_ICMP_QUENCH 4
#define SP_ICMP_REDIRECT 5
#define SP_ICMP_TIME 11
#define SP_ICMP_PARAMETER 12
#define SP_ICMP6_UNREACHABLE 1
#define SP_ICMP6_PORT 4
#define SP_ICMP6_PARAMETER 4
#define SP_ICMP6_REDIRECT 137

/* The header of ICMP messages of either version. */
struct sp_icmp {
	__u8 type;
	__u8 code;
	__u16 checksum;
	__u32 rest;
};

enum sp_parse {
	SP_PARSE_OTHER = 0,
	SP_PARSE_TCP,
	SP_PARSE_UDP,
	SP_PARSE_ICMP,		/* an error or a redirect; the rest of ICMP is OTHER */
	SP_PARSE_FRAGMENT,
	SP_PARSE_REST,		/* a fragment but the first */
	SP_PARSE_SOURCE_ROUTE,
	SP_PARSE_EXT_HEADERS,
	SP_PARSE_MALFORMED,
	SP_PARSE_MISPLACED,	/* no IP header where one is expected */
	SP_PARSE_HIDDEN,	/* behind tags that the kernel takes off without another look at the hooks */
};

/* What the first stage learns; all that a packet with no flagged port costs. */
struct sp_head {
	__u16 sport;
	__u16 dport;
	__u16 l3;		/* offset of the IP header */
	__u16 l4;		/* offset of the transport header */
	__u8 tcp_flags;		/* of UDP and ICMP: none */
	__u8 icmp_type;
	__u8 l4_len;		/* bytes of the TCP or UDP header */
	__u8 version;		/* 4 or 6, 0 when the IP header was not reached */
	__u8 protocol;		/* as far as the headers were walked */
	__u8 first;		/* the first of several fragments */
	__u32 fragment;		/* what its fragments have in common */
};

struct sp_packet {
	struct sp_head;
	struct sp_addr src;
	struct sp_addr dst;
	__u32 ifindex;		/* of the hook's device */
	__u32 leaves_by;	/* the same, if it is on its way out; else 0 */
	__u32 came_by;		/* of the device that the node got it by; 0: it is the node's own */
	__u32 bytes;		/* IP bytes on the wire, GSO segments counted */
	__u32 segments;
};

static __always_inline bool sp_syn_only(const struct sp_packet *p)
{
	return (p->tcp_flags & (SP_TCP_SYN | SP_TCP_ACK | SP_TCP_RST)) == SP_TCP_SYN;
}

/* SYN with FIN or RST, and what is neither SYN nor RST without ACK: no connection sends that. */
static __always_inline bool sp_bad_flags(const struct sp_packet *p)
{
	if (p->tcp_flags & SP_TCP_SYN)
		return p->tcp_flags & (SP_TCP_FIN | SP_TCP_RST);
	return !(p->tcp_flags & (SP_TCP_ACK | SP_TCP_RST));
}

/* A tag with an id means another L2 segment: its sub-device has hooks of its own. */
static __always_inline bool sp_other_vlan(const struct __sk_buff *skb)
{
	return skb->vlan_present && (skb->vlan_tci & SP_VLAN_VID);
}

/* A tag in the packet itself, behind the one beside it if there is one. */
static __always_inline bool sp_tagged_inside(const struct __sk_buff *skb)
{
	return skb->protocol == bpf_htons(ETH_P_8021Q) || skb->protocol == bpf_htons(ETH_P_8021AD);
}

/* Linux takes off every tag of id 0 that follows one of id 0, with no other look at the hooks. */
__noinline int sp_hidden_by_tags(struct __sk_buff *skb)
{
	__be16 tci;

	if (!skb->vlan_present || !sp_tagged_inside(skb))
		return 0;
	return bpf_skb_load_bytes(skb, ETH_HLEN, &tci, sizeof(tci)) || !(bpf_ntohs(tci) & SP_VLAN_VID);
}

static __always_inline void *sp_data(const struct __sk_buff *skb)
{
	return (void *)(long)skb->data;
}

static __always_inline void *sp_end(const struct __sk_buff *skb)
{
	return (void *)(long)skb->data_end;
}

static __always_inline bool sp_has_ports(__u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP;
}

static __always_inline bool sp_ports_read(enum sp_parse parsed)
{
	return parsed == SP_PARSE_TCP || parsed == SP_PARSE_UDP;
}

static __always_inline enum sp_parse sp_read_tcp(struct sp_head *p, const struct tcphdr *tcp)
{
	p->sport = bpf_ntohs(tcp->source);
	p->dport = bpf_ntohs(tcp->dest);
	p->l4_len = tcp->doff * 4;
	p->tcp_flags = ((const __u8 *)tcp)[13];
	return p->l4_len < sizeof(*tcp) ? SP_PARSE_MALFORMED : SP_PARSE_TCP;
}

static __always_inline enum sp_parse sp_read_udp(struct sp_head *p, const struct udphdr *udp)
{
	p->sport = bpf_ntohs(udp->source);
	p->dport = bpf_ntohs(udp->dest);
	p->l4_len = sizeof(*udp);
	return SP_PARSE_UDP;
}

/* Reads the ports at p->l4, wherever in the buffer they are. */
__noinline int sp_load_ports(struct __sk_buff *skb, struct sp_head *p)
{
	struct tcphdr tcp = {};

	if (!p || bpf_skb_load_bytes(skb, p->l4, &tcp, sizeof(struct udphdr)))
		return SP_PARSE_MALFORMED;
	if (p->protocol == IPPROTO_UDP)
		return sp_read_udp(p, (struct udphdr *)&tcp);
	if (bpf_skb_load_bytes(skb, p->l4, &tcp, sizeof(tcp)))
		return SP_PARSE_MALFORMED;
	return sp_read_tcp(p, &tcp);
}

/* Reads the ports behind an IP header that is linear and of the usual length. */
static __always_inline enum sp_parse sp_read_ports(struct __sk_buff *skb, struct sp_head *p, void *l4)
{
	struct tcphdr *tcp = l4;
	struct udphdr *udp = l4;

	if (p->protocol == IPPROTO_UDP && (void *)(udp + 1) <= sp_end(skb))
		return sp_read_udp(p, udp);
	if (p->protocol == IPPROTO_TCP && (void *)(tcp + 1) <= sp_end(skb))
		return sp_read_tcp(p, tcp);
	return sp_load_ports(skb, p);
}

/* Is the ICMP message at p->l4 an error or a redirect? */
__noinline int sp_parse_icmp(struct __sk_buff *skb, struct sp_head *p, __u32 more_fragments)
{
	bool error;
	__u8 type;

	if (!p || bpf_skb_load_bytes(skb, p->l4, &type, sizeof(type)))
		return SP_PARSE_OTHER;
	p->icmp_type = type;
	error = p->version == 4 ? (type >= SP_ICMP_UNREACHABLE && type <= SP_ICMP_REDIRECT) ||
				  type == SP_ICMP_TIME || type == SP_ICMP_PARAMETER :
				  (type && type <= SP_ICMP6_PARAMETER) || type == SP_ICMP6_REDIRECT;
	if (!error)
		return SP_PARSE_OTHER;
	return more_fragments ? SP_PARSE_FRAGMENT : SP_PARSE_ICMP;
}

/* Is there a source route among the options of an IPv4 header? Negative: they are not all there. */
__noinline int sp_source_routed(struct __sk_buff *skb, __u32 l3, __u32 len)
{
	__u8 b[SP_IP_OPTIONS_MAX + 2] = {};
	__u32 last = len - 1;
	volatile __u8 until = 0; /* in memory, or it is another case for the verifier at each byte */

	barrier_var(last); /* before 6.8 the verifier does not learn from `len != 0` that len is at least 1 */
	if (last >= SP_IP_OPTIONS_MAX)
		return 0;
	len = last + 1;
	if (bpf_skb_load_bytes(skb, l3 + sizeof(struct iphdr), b, len))
		return -1;
	for (__u32 i = 0; i < SP_IP_OPTIONS_MAX; i++) {
		if (i >= len)
			break;
		if (i < until)
			continue;
		if (!b[i]) /* end of the list */
			break;
		if (b[i] == SP_IPOPT_LSRR || b[i] == SP_IPOPT_SSRR)
			return 1;
		if (b[i] == SP_IPOPT_NOP)
			continue;
		if (b[i + 1] < 2 || b[i + 1] > SP_IP_OPTIONS_MAX)
			break;
		until = i + b[i + 1];
	}
	return 0;
}

/* IPv4 with options, with fragments, or both. */
__noinline int sp_parse_ipv4_odd(struct __sk_buff *skb, struct sp_head *p)
{
	struct iphdr ip;
	int routed;

	if (!p || bpf_skb_load_bytes(skb, p->l3, &ip, sizeof(ip)) || ip.ihl < 5)
		return SP_PARSE_MALFORMED;
	routed = sp_source_routed(skb, p->l3, ip.ihl * 4 - sizeof(ip));
	if (routed < 0)
		return SP_PARSE_MALFORMED;
	if (routed) { /* its ports are read for those who ask a socket's packet, which is whole */
		if (!(ip.frag_off & bpf_htons(SP_IP_MF | SP_IP_OFFSET)))
			sp_load_ports(skb, p);
		return SP_PARSE_SOURCE_ROUTE;
	}
	if (!(ip.frag_off & bpf_htons(SP_IP_MF | SP_IP_OFFSET)))
		return sp_load_ports(skb, p);
	if (ip.protocol == IPPROTO_TCP)
		return SP_PARSE_FRAGMENT;
	p->fragment = bpf_ntohs(ip.id);
	if (ip.frag_off & bpf_htons(SP_IP_OFFSET))
		return SP_PARSE_REST;
	p->first = 1;
	return sp_load_ports(skb, p);
}

static __always_inline enum sp_parse sp_parse_ipv4(struct __sk_buff *skb, struct sp_head *p,
						   __u32 l3)
{
	struct iphdr *ip = sp_data(skb) + l3;

	if ((void *)(ip + 1) > sp_end(skb))
		return SP_PARSE_MALFORMED;
	if (ip->version != 4)
		return SP_PARSE_MISPLACED;
	p->version = 4;
	p->protocol = ip->protocol;
	if (ip->protocol == IPPROTO_ESP || ip->protocol == IPPROTO_AH)
		return SP_PARSE_EXT_HEADERS;
	p->l4 = l3 + ip->ihl * 4;
	if (ip->protocol == IPPROTO_ICMP && !(ip->frag_off & bpf_htons(SP_IP_OFFSET)))
		return sp_parse_icmp(skb, p, ip->frag_off & bpf_htons(SP_IP_MF));
	if (!sp_has_ports(ip->protocol))
		return SP_PARSE_OTHER;
	if (ip->ihl != 5 || ip->frag_off & bpf_htons(SP_IP_MF | SP_IP_OFFSET))
		return sp_parse_ipv4_odd(skb, p);
	return sp_read_ports(skb, p, ip + 1);
}

/* Headers that do not say in a fragment what they hide, and TCP, which nobody needs to fragment. */
static __always_inline bool sp_is_chained(__u8 next)
{
	switch (next) {
	case IPPROTO_TCP:
	case IPPROTO_HOPOPTS:
	case IPPROTO_ROUTING:
	case IPPROTO_FRAGMENT:
	case IPPROTO_ESP:
	case IPPROTO_AH:
	case IPPROTO_NONE:
	case IPPROTO_DSTOPTS:
		return true;
	}
	return false;
}

struct sp_fragment6 {
	__u8 next;
	__u8 reserved;
	__be16 at;
	__be32 id;
};

static __always_inline int sp_parse_fragment6(struct __sk_buff *skb, struct sp_head *p, __u32 offset)
{
	struct sp_fragment6 f;

	if (bpf_skb_load_bytes(skb, offset, &f, sizeof(f)))
		return SP_PARSE_MALFORMED;
	p->protocol = f.next;
	p->l4 = offset + sizeof(f);
	p->fragment = bpf_ntohl(f.id);
	if (sp_is_chained(f.next))
		return SP_PARSE_FRAGMENT;
	if (f.at & bpf_htons(SP_IP6_OFFSET))
		return SP_PARSE_REST;
	p->first = !!(f.at & bpf_htons(SP_IP6_MF));
	if (f.next == IPPROTO_ICMPV6)
		return sp_parse_icmp(skb, p, p->first);
	return f.next == IPPROTO_UDP ? SP_PARSE_UDP : SP_PARSE_OTHER;
}

/* Has a routing header somewhere left to go, whatever its type? */
static __always_inline bool sp_route_left(struct __sk_buff *skb, __u32 offset)
{
	struct ipv6_rt_hdr h;

	return bpf_skb_load_bytes(skb, offset, &h, sizeof(h)) || h.segments_left;
}

/* Walks the extension headers behind the IPv6 header; `next` is the type of the first. Ports are not read. */
__noinline int sp_walk(struct __sk_buff *skb, struct sp_head *p, __u8 next)
{
	struct ipv6_opt_hdr opt;
	__u32 offset;

	if (!p)
		return SP_PARSE_MALFORMED;
	offset = p->l3 + sizeof(struct ipv6hdr);
	for (int i = 0; i <= SP_EXT_MAX; i++) {
		p->protocol = next;
		switch (next) {
		case IPPROTO_TCP:
		case IPPROTO_UDP:
			p->l4 = offset;
			return next == IPPROTO_TCP ? SP_PARSE_TCP : SP_PARSE_UDP;
		case IPPROTO_ICMPV6:
			p->l4 = offset;
			return sp_parse_icmp(skb, p, 0);
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
		if (bpf_skb_load_bytes(skb, offset, &opt, sizeof(opt)))
			return SP_PARSE_MALFORMED;
		if (next == IPPROTO_ROUTING && sp_route_left(skb, offset))
			return SP_PARSE_SOURCE_ROUTE;
		if (next == IPPROTO_FRAGMENT)
			return sp_parse_fragment6(skb, p, offset);
		/* RFC 4302 counts AH in words of 4 bytes less 2, RFC 8200 the others in 8 less 1. */
		offset += next == IPPROTO_AH ? (opt.hdrlen + 2) * 4 : (opt.hdrlen + 1) * 8;
		next = opt.nexthdr;
	}
	return SP_PARSE_EXT_HEADERS;
}

static __always_inline bool sp_mapped(const struct in6_addr *a)
{
	return !a->s6_addr32[0] && !a->s6_addr32[1] && a->s6_addr32[2] == bpf_htonl(0xffff);
}

static __always_inline enum sp_parse sp_parse_ipv6(struct __sk_buff *skb, struct sp_head *p,
						   __u32 l3)
{
	struct ipv6hdr *ip = sp_data(skb) + l3;
	int parsed;

	if ((void *)(ip + 1) > sp_end(skb))
		return SP_PARSE_MALFORMED;
	if (ip->version != 6)
		return SP_PARSE_MISPLACED;
	p->version = 6;
	p->protocol = ip->nexthdr;
	if (sp_mapped(&ip->saddr) || sp_mapped(&ip->daddr))
		return SP_PARSE_MALFORMED;
	if (!sp_has_ports(ip->nexthdr)) {
		parsed = sp_walk(skb, p, ip->nexthdr);
		return sp_ports_read(parsed) ? sp_load_ports(skb, p) : parsed;
	}
	p->l4 = l3 + sizeof(*ip);
	return sp_read_ports(skb, p, ip + 1);
}

/* First stage: up to the ports, of a packet whose IP header is linear. */
static __always_inline enum sp_parse sp_parse_linear(struct __sk_buff *skb, struct sp_head *p,
						     __u32 l3)
{
	p->l3 = l3;
	if (skb->protocol == bpf_htons(ETH_P_IP))
		return sp_parse_ipv4(skb, p, l3);
	if (skb->protocol == bpf_htons(ETH_P_IPV6))
		return sp_parse_ipv6(skb, p, l3);
	return SP_PARSE_OTHER;
}

/* The same, but makes the headers linear when they are not. */
static __always_inline enum sp_parse sp_parse(struct __sk_buff *skb, struct sp_head *p, __u32 l3)
{
	__u32 need = l3 + sizeof(struct ipv6hdr);

	if (sp_data(skb) + need > sp_end(skb) &&
	    (skb->protocol == bpf_htons(ETH_P_IP) || skb->protocol == bpf_htons(ETH_P_IPV6)))
		bpf_skb_pull_data(skb, skb->len < SP_PULL ? skb->len : SP_PULL);
	return sp_parse_linear(skb, p, l3);
}

/* Begins the packet of this hook: what the first stage found, and nothing of the packet before. */
static __always_inline void sp_packet_begin(const struct __sk_buff *skb, struct sp_packet *p,
					    const struct sp_head *head)
{
	__u32 ifindex = skb->ifindex, came_by = skb->ingress_ifindex;

	barrier_var(ifindex);
	barrier_var(came_by);
	__builtin_memset(p, 0, sizeof(*p));
	__builtin_memcpy(p, head, sizeof(*head));
	p->ifindex = ifindex;
	p->came_by = came_by;
}

/* Second stage: addresses, also of a packet whose first stage failed behind the IP header. */
static __always_inline bool sp_parse_addresses(struct __sk_buff *skb, struct sp_packet *p)
{
	if (p->version == 4) {
		p->src.bytes[10] = p->src.bytes[11] = 0xff;
		p->dst.bytes[10] = p->dst.bytes[11] = 0xff;
		return !bpf_skb_load_bytes(skb, p->l3 + offsetof(struct iphdr, saddr),
					   &p->src.bytes[12], 4) &&
		       !bpf_skb_load_bytes(skb, p->l3 + offsetof(struct iphdr, daddr),
					   &p->dst.bytes[12], 4);
	}
	return !bpf_skb_load_bytes(skb, p->l3 + offsetof(struct ipv6hdr, saddr), &p->src, 16) &&
	       !bpf_skb_load_bytes(skb, p->l3 + offsetof(struct ipv6hdr, daddr), &p->dst, 16);
}

/* How many packets a GSO packet is on the wire. A virtual machine's arrives without their number. */
static __always_inline __u32 sp_segments(struct __sk_buff *skb, __u32 there, __u32 headers)
{
	__u32 size = skb->gso_size;

	if (skb->gso_segs)
		return skb->gso_segs;
	if (!size || there <= headers + size)
		return 1;
	return (there - headers + size - 1) / size;
}

/* Third stage: the volume, as it is or will be on the wire: every GSO segment has its headers, if
 * they could be read.
 */
static __always_inline void sp_parse_volume(struct __sk_buff *skb, struct sp_packet *p)
{
	__u32 headers = p->l4 ? p->l4 - p->l3 + p->l4_len : 0;
	__u32 there = skb->len - p->l3;

	p->segments = sp_segments(skb, there, headers);
	p->bytes = there + (p->segments - 1) * headers;
}

/* How long the IP packet says it is; 0: nothing that it may say. A jumbogram says nothing, and is one of
 * our own making only: packets that were put together or not yet cut up (BIG TCP).
 */
static __always_inline __u32 sp_told_length(struct __sk_buff *skb, const struct sp_packet *p)
{
	__u32 at = p->version == 4 ? offsetof(struct iphdr, tot_len) : offsetof(struct ipv6hdr, payload_len);
	__u32 there = skb->len - p->l3;
	__be16 told;

	if (bpf_skb_load_bytes(skb, p->l3 + at, &told, sizeof(told)))
		return 0;
	if (!told)
		return skb->gso_segs > 1 && there > 0xffff ? there : 0;
	return bpf_ntohs(told) + (p->version == 4 ? 0 : sizeof(struct ipv6hdr));
}

/* Do the lengths of a packet contradict each other, or the bytes that are there? */
__noinline bool sp_lengths_lie(struct __sk_buff *skb, const struct sp_packet *p)
{
	__u32 told, headers;
	__be16 udp;

	if (!p)
		return true;
	told = sp_told_length(skb, p);
	headers = p->l4 - p->l3 + p->l4_len;
	if (told > skb->len - p->l3 || told < headers)
		return true;
	if (p->protocol != IPPROTO_UDP)
		return false;
	if (bpf_skb_load_bytes(skb, p->l4 + offsetof(struct udphdr, len), &udp, sizeof(udp)))
		return true;
	return bpf_ntohs(udp) < sizeof(struct udphdr) || /* a first fragment has not all of it */
	       (!p->first && bpf_ntohs(udp) > told - (p->l4 - p->l3));
}

#endif
