/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef SP_OPTIONS_H
#define SP_OPTIONS_H

/*
 * The options of SYNs. MPTCP is taken out: a subflow that is joined later would have another tuple, which
 * outlives the path, and the proxy does not speak it. So are the experimental ones (RFC 4727), for one of them
 * is SMC's (RFC 7609), whose data would leave TCP after the handshake, and nobody would count or end it. The
 * largest segment that a SYN to or from the
 * proxy asks for is made to fit the device of its leg: the proxy's own device takes far larger ones, and
 * what goes by that device to either side is put there without a look at its MTU.
 */

#include "hook.h"

#define SP_TCP_OPTIONS_MAX 40
#define SP_TCPOPT_NOP 1
#define SP_TCPOPT_MSS 2
#define SP_TCPOPT_MPTCP 30
#define SP_TCPOPT_EXP1 253
#define SP_MSS_ANY 0xffff

/* The largest segment that fits a device. */
static __always_inline __u32 sp_mss_of(struct __sk_buff *skb, const struct sp_packet *p, __u32 ifindex)
{
	__u32 headers = sizeof(struct tcphdr) +
			(p->version == 4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr));
	__u32 mtu = 0;

	if (bpf_check_mtu(skb, ifindex, &mtu, 0, 0) < 0 || mtu <= headers)
		return SP_MSS_ANY;
	return mtu - headers < SP_MSS_ANY ? mtu - headers : SP_MSS_ANY;
}

/*
 * Changes `len` bytes of options as above; true if it did. What Linux would not read is left alone. What
 * is carried from byte to byte is kept in memory: in registers it would be another case for the verifier
 * at each byte.
 */
static __always_inline bool sp_change_options(struct sp_options *o, __u32 len, __u32 mss)
{
	volatile __u8 *until = &o->until, *blank = &o->blank, *changed = &o->changed;
	__u8 *b = o->is;

	for (__u32 i = 0; i < SP_TCP_OPTIONS_MAX; i++) {
		if (i >= len)
			break;
		if (i < *until) {
			if (*blank)
				b[i] = SP_TCPOPT_NOP;
			continue;
		}
		if (!b[i])
			break;
		if (b[i] == SP_TCPOPT_NOP)
			continue;
		if (b[i + 1] < 2 || i + b[i + 1] > len)
			break;
		*until = i + b[i + 1];
		if (b[i] == SP_TCPOPT_MSS && b[i + 1] == 4 &&
		    ((__u32)b[i + 2] << 8 | b[i + 3]) > mss) {
			b[i + 2] = mss >> 8;
			b[i + 3] = mss;
			*changed = 1;
		}
		*blank = b[i] == SP_TCPOPT_MPTCP || b[i] == SP_TCPOPT_EXP1 || b[i] == SP_TCPOPT_EXP1 + 1;
		if (*blank) {
			b[i] = SP_TCPOPT_NOP;
			*changed = 1;
		}
	}
	return *changed;
}

/* Not 0: the packet could not be changed and must not go on. */
__noinline int sp_edit_syn(struct __sk_buff *skb, const struct sp_packet *p, __u32 mss)
{
	struct sp_scratch *scratch = sp_get_scratch();
	struct sp_options *o;
	__u32 len, last, at;
	__s64 diff;

	if (!p || !scratch)
		return -1;
	o = &scratch->options;
	len = p->l4_len - sizeof(struct tcphdr);
	at = p->l4 + sizeof(struct tcphdr);
	last = len - 1;
	barrier_var(last); /* before 6.8 the verifier does not learn from `len != 0` that len is at least 1 */
	if (last >= SP_TCP_OPTIONS_MAX)
		return 0;
	len = last + 1;
	__builtin_memset(o, 0, sizeof(*o));
	if (bpf_skb_load_bytes(skb, at, o->is, len))
		return -1;
	__builtin_memcpy(o->was, o->is, sizeof(o->was));
	if (!sp_change_options(o, len, mss))
		return 0;
	diff = bpf_csum_diff((__be32 *)o->was, sizeof(o->was), (__be32 *)o->is, sizeof(o->is), 0);
	if (diff < 0 || bpf_skb_store_bytes(skb, at, o->is, len, 0))
		return -1;
	return bpf_l4_csum_replace(skb, p->l4 + offsetof(struct tcphdr, check), 0, diff, 0);
}

#endif
