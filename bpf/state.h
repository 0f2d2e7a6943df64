/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef SP_STATE_H
#define SP_STATE_H

/* Look-ups shared by all hooks. Nothing here decides. */

#include "maps.h"
#include "parse.h"

#define SP_LO_IFINDEX 1
#define SP_AF_INET 2
#define SP_AF_INET6 10
#define SP_TCP_SYN_SENT 2
#define SP_TCP_LISTEN 10

struct sp_options {
	__u8 was[44];	/* of a TCP header, and room to look at a whole option at the end */
	__u8 is[44];
	__u8 until;	/* where the option that we are in ends */
	__u8 blank;	/* it is taken out */
	__u8 changed;
};

/*
 * Where a packet is taken apart. One a CPU: programs of devices run with softirqs off, one after the
 * other. Only the clone that cut.h sends may run one of them within another, and nothing in here is read
 * after that. What is big lives here, because 512 bytes of stack are for all frames of a chain of calls
 * together. Never pinned: it means nothing to the next packet, nor to the next version.
 */
struct sp_scratch {
	struct sp_packet packet;
	struct sp_packet quoted;	/* what an ICMP error is about */
	struct sp_flow_key key;
	struct sp_flow flow;
	struct bpf_fib_lookup fib;
	struct sp_ether ether;	/* of the packet, at a bridge's port */
	struct sp_options options;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(struct sp_scratch)); /* no type: nobody else reads it */
} sp_scratch SEC(".maps");

static __always_inline struct sp_scratch *sp_get_scratch(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&sp_scratch, &zero);
}

static __always_inline struct sp_ports *sp_ports_with(__u8 protocol, __u16 port)
{
	__u32 word = (protocol == IPPROTO_UDP ? SP_PORT_WORDS : 0) + (port >> 6);

	return bpf_map_lookup_elem(&sp_ports, &word);
}

/* Bit 0: is the port flagged for anything? */
static __always_inline __u64 sp_any_of(const struct sp_ports *p, __u16 port)
{
	return (p->bits | p->watched) >> (port & 63);
}

static __always_inline bool sp_port_flagged(__u8 protocol, __u16 port)
{
	struct sp_ports *p = sp_ports_with(protocol, port);

	return p && (p->bits >> (port & 63)) & 1;
}

/* Port 0, which no service has, is flagged while this node has any service. */
static __always_inline bool sp_anything_protected(void)
{
	return sp_port_flagged(IPPROTO_TCP, 0);
}

static __always_inline struct sp_config *sp_get_config(void)
{
	__u32 zero = 0;
	struct sp_config *cfg = bpf_map_lookup_elem(&sp_config, &zero);

	return cfg && cfg->schema == SP_SCHEMA ? cfg : NULL;
}

/* The exact address first (pods), then "every local address" (host services): for these the caller
 * checks that the address is local.
 */
static __always_inline struct sp_service *sp_find_row(const struct sp_addr *address, __u16 port,
							__u8 protocol, bool watched)
{
	struct sp_service_key key = { .address = *address, .port = port, .protocol = protocol, .watched = watched };
	struct sp_service *svc;
	__u32 zero = 0;
	void *table;

	table = bpf_map_lookup_elem(&sp_services, &zero);
	if (!table)
		return NULL;
	svc = bpf_map_lookup_elem(table, &key);
	if (svc)
		return svc;
	__builtin_memset(&key.address, 0, sizeof(key.address));
	return bpf_map_lookup_elem(table, &key);
}

static __always_inline struct sp_service *sp_find_service(const struct sp_addr *address, __u16 port,
							    __u8 protocol)
{
	return sp_find_row(address, port, protocol, false);
}

/* The service of every local address. */
static __always_inline struct sp_service *sp_find_everywhere(__u16 port, __u8 protocol)
{
	struct sp_addr any = {};

	return sp_find_service(&any, port, protocol);
}

/* The same, of services whose sockets are on this node. The address of a remote one may have come here. */
static __always_inline struct sp_service *sp_find_own(const struct sp_addr *address, __u16 port, __u8 protocol)
{
	struct sp_service *svc = sp_find_service(address, port, protocol);

	return svc && svc->target == SP_TARGET_REMOTE ? sp_find_everywhere(port, protocol) : svc;
}

/* Has the pod behind a device a service at this port? It may have it at addresses that no policy lists. */
static __always_inline bool sp_pod_serves(__u32 device, __u16 port, __u8 protocol)
{
	struct sp_service_key key = { .port = port, .protocol = protocol, .device = device };
	__u32 zero = 0;
	void *table;

	table = bpf_map_lookup_elem(&sp_services, &zero);
	return table && bpf_map_lookup_elem(table, &key);
}

/* The question to the routing table for a packet from peer to address, in the scratch. */
static __always_inline struct bpf_fib_lookup *sp_fib_question(__u32 ifindex,
							      const struct sp_addr *address,
							      const struct sp_addr *peer,
							      __u32 version)
{
	struct sp_scratch *scratch = sp_get_scratch();
	struct bpf_fib_lookup *fib;

	if (!scratch || !address || !peer)
		return NULL;
	fib = &scratch->fib;
	__builtin_memset(fib, 0, sizeof(*fib));
	fib->ifindex = ifindex;
	if (version == 4) {
		fib->family = SP_AF_INET;
		__builtin_memcpy(&fib->ipv4_src, &peer->bytes[12], 4);
		__builtin_memcpy(&fib->ipv4_dst, &address->bytes[12], 4);
	} else {
		fib->family = SP_AF_INET6;
		__builtin_memcpy(fib->ipv6_src, peer, 16);
		__builtin_memcpy(fib->ipv6_dst, address, 16);
	}
	return fib;
}

static __always_inline bool sp_fib_says_local(long r)
{
	return r < 0 || r == BPF_FIB_LKUP_RET_NOT_FWDED || r == BPF_FIB_LKUP_RET_FWD_DISABLED;
}

/* The sum of RFC 1071 in 16 bits. Its complement is the checksum. */
static __always_inline __u16 sp_fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

/* A group, everybody, or nobody: for this node among others, whatever the default route says of it. */
static __always_inline bool sp_is_group(const struct sp_addr *a, __u32 version)
{
	const __u32 *word = (const __u32 *)a;

	if (version == 4)
		return a->bytes[12] >= 224 || !a->bytes[12];
	return a->bytes[0] == 0xff || !(word[0] | word[1] | word[2] | word[3]);
}

/*
 * Is `address` one of this node's? Asked of the routing table, so that an address that appears
 * later is known at once. An error counts as yes. FWD_DISABLED: the device does not forward, so
 * what it takes in is for this node or for nobody.
 */
__noinline int sp_is_local(struct __sk_buff *skb, const struct sp_addr *address,
				  const struct sp_addr *peer, __u32 version)
{
	struct bpf_fib_lookup *fib = sp_fib_question(skb->ifindex, address, peer, version);

	if (address && sp_is_group(address, version))
		return 1;
	return !fib || sp_fib_says_local(bpf_fib_lookup(skb, fib, sizeof(*fib), 0));
}

/*
 * The service that a hook sees at an address. One of a remote service that has come to this node, as addresses do that
 * several nodes share, is like all of the node's own before the agent knows: what protects goes before what originates.
 */
static __always_inline struct sp_service *sp_find_here(struct __sk_buff *skb, const struct sp_addr *address,
						       const struct sp_addr *peer, __u16 port, __u8 protocol,
						       __u32 version)
{
	struct sp_service *svc = sp_find_service(address, port, protocol);
	struct sp_service *own;

	if (!svc || svc->target != SP_TARGET_REMOTE)
		return svc;
	own = sp_find_everywhere(port, protocol);
	if (own && (skb->ifindex == SP_LO_IFINDEX || sp_is_local(skb, address, peer, version)))
		return own;
	return svc;
}

/* Does an address own a protected port? For packets that are not decided by their ports. */
__noinline int sp_owns(struct __sk_buff *skb, const struct sp_addr *address,
			      const struct sp_addr *peer, __u32 version)
{
	struct sp_owner_key at = {};

	if (!address || !peer)
		return 1;
	at.address = *address;
	if (bpf_map_lookup_elem(&sp_owners, &at))
		return 1;
	__builtin_memset(&at, 0, sizeof(at));
	if (!bpf_map_lookup_elem(&sp_owners, &at))
		return 0;
	return skb->ifindex == SP_LO_IFINDEX || sp_is_local(skb, address, peer, version);
}

static __always_inline bool sp_pod_owns(__u32 device)
{
	struct sp_owner_key at = { .device = device };

	return device && bpf_map_lookup_elem(&sp_owners, &at);
}

static __always_inline bool sp_towards_owner(struct __sk_buff *skb, const struct sp_packet *p)
{
	return sp_pod_owns(p->leaves_by) || sp_owns(skb, &p->dst, &p->src, p->version);
}

static __always_inline bool sp_from_owner(struct __sk_buff *skb, const struct sp_packet *p)
{
	return sp_owns(skb, &p->src, &p->dst, p->version);
}

static __always_inline struct sp_leg_key sp_leg_key(const struct sp_addr *client, __u16 client_port,
						    const struct sp_addr *server, __u16 server_port,
						    enum sp_leg_side side)
{
	return (struct sp_leg_key){
		.client = *client, .server = *server,
		.client_port = client_port, .server_port = server_port, .side = side,
	};
}

/* The leg of a flow on one side, if it was opened after a time. Only TCP has legs. A frame of its own:
 * the callers' stacks are small.
 */
static __noinline struct sp_leg *sp_find_leg(const struct sp_flow_key *key, enum sp_leg_side side,
					     __u64 after_ns)
{
	struct sp_leg_key at;
	struct sp_leg *leg;

	if (!key || key->protocol != IPPROTO_TCP)
		return NULL;
	at = sp_leg_key(&key->client, key->client_port, &key->server, key->server_port, side);
	leg = bpf_map_lookup_elem(&sp_legs, &at);
	return leg && leg->opened_ns > after_ns ? leg : NULL;
}

static __always_inline struct sp_flow_key sp_key_towards(const struct sp_packet *p)
{
	return (struct sp_flow_key){
		.client = p->src, .server = p->dst,
		.client_port = p->sport, .server_port = p->dport, .protocol = p->protocol,
	};
}

static __always_inline struct sp_flow_key sp_key_from(const struct sp_packet *p)
{
	return (struct sp_flow_key){
		.client = p->dst, .server = p->src,
		.client_port = p->dport, .server_port = p->sport, .protocol = p->protocol,
	};
}

/* Bits that a packet adds to the state of its connection. A SYN-ACK is no proof of a client: anybody
 * can have one sent.
 */
static __always_inline __u32 sp_seen(const struct sp_packet *p, bool from_client)
{
	__u32 flags = from_client || (p->tcp_flags & SP_TCP_SYN) ? 0 : SP_ANSWERED;

	if (p->tcp_flags & SP_TCP_FIN)
		flags |= from_client ? SP_FIN_CLIENT : SP_FIN_SERVER;
	if (p->tcp_flags & SP_TCP_RST)
		flags |= SP_RST;
	return flags;
}

static __always_inline void sp_touch(__u32 *flags, __u64 *last_ns, __u32 seen, __u64 now)
{
	if (*last_ns < now)
		*last_ns = now;
	if (seen & ~*flags)
		__sync_fetch_and_or(flags, seen);
}

static __always_inline bool sp_closed(__u32 flags)
{
	__u32 fins = SP_FIN_CLIENT | SP_FIN_SERVER;

	return (flags & SP_RST) || (flags & fins) == fins;
}

#endif
