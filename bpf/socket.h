/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef SP_SOCKET_H
#define SP_SOCKET_H

/* Whose socket a packet is of. */

#include <bpf/bpf_core_read.h>
#include "state.h"

/* The kernel's own types, as far as we read them; relocated to the running kernel's layout. */
struct ns_common___sp {
	unsigned int inum;
} __attribute__((preserve_access_index));

struct net___sp {
	__u64 net_cookie;
	struct ns_common___sp ns;
} __attribute__((preserve_access_index));

struct sock_common___sp {
	struct {
		struct net___sp *net;
	} skc_net;
} __attribute__((preserve_access_index));

struct socket_lock___sp {
	int owned;
} __attribute__((preserve_access_index));

struct sock___sp {
	struct sock_common___sp __sk_common;
	struct socket_lock___sp sk_lock;
} __attribute__((preserve_access_index));

struct sk_buff___sp {
	struct sock___sp *sk;
} __attribute__((preserve_access_index));

/* The packet's socket, as the kernel has it, or NULL. The context of the program is the sk_buff itself. */
static __always_inline struct sock___sp *sp_kernel_socket(struct __sk_buff *skb)
{
	struct sock___sp *sk = NULL;
	void *at = (void *)skb + bpf_core_field_offset(struct sk_buff___sp, sk);

	return bpf_probe_read_kernel(&sk, sizeof(sk), at) ? NULL : sk;
}

/*
 * The network namespace of the packet's socket, or NULL. Read from the kernel's structures, because
 * bpf_get_netns_cookie is not there for these types of programs before 6.15, and nothing else tells
 * namespaces apart: numbers of devices repeat.
 */
static __always_inline struct net___sp *sp_netns_of(struct __sk_buff *skb)
{
	struct sock___sp *sk = sp_kernel_socket(skb);

	return sk ? BPF_CORE_READ(sk, __sk_common.skc_net.net) : NULL;
}

static __always_inline bool sp_is_host(const struct sp_config *cfg, __u64 cookie)
{
	return !cookie || cookie == cfg->host_netns;
}

/*
 * Is the packet sent by a socket of the host's namespace? What was forwarded has none: the kernel takes it off when it
 * receives a packet. That of a pod on a macvlan, or of the proxy below a stack of devices, is of another namespace.
 */
static __always_inline bool sp_sent_by_host(struct __sk_buff *skb)
{
	struct sp_config *cfg = sp_get_config();
	struct net___sp *net;

	if (!skb->sk || !cfg)
		return false;
	net = sp_netns_of(skb);
	return net && sp_is_host(cfg, BPF_CORE_READ(net, net_cookie));
}

#endif
