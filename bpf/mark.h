/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef SP_MARK_H
#define SP_MARK_H

/*
 * The re-injection mark: HalfSipHash-2-4 of the tuple (Aumasson and Bernstein, SipHash, 2012; the
 * 32-bit variant) under a secret of this set-up. It tells a packet that px0 put back from one
 * that was there before, and counts only together with a leg or a stray entry.
 */

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "types.h"

struct sp_sip {
	__u32 v0, v1, v2, v3;
};

static __always_inline __u32 sp_rotl(__u32 x, int n)
{
	return (x << n) | (x >> (32 - n));
}

static __always_inline void sp_sip_round(struct sp_sip *s)
{
	s->v0 += s->v1; s->v1 = sp_rotl(s->v1, 5);  s->v1 ^= s->v0; s->v0 = sp_rotl(s->v0, 16);
	s->v2 += s->v3; s->v3 = sp_rotl(s->v3, 8);  s->v3 ^= s->v2;
	s->v0 += s->v3; s->v3 = sp_rotl(s->v3, 7);  s->v3 ^= s->v0;
	s->v2 += s->v1; s->v1 = sp_rotl(s->v1, 13); s->v1 ^= s->v2; s->v2 = sp_rotl(s->v2, 16);
}

static __always_inline void sp_sip_word(struct sp_sip *s, __u32 m)
{
	s->v3 ^= m;
	sp_sip_round(s);
	sp_sip_round(s);
	s->v0 ^= m;
}

/* Never 0, which means "no mark". A subprogram of its own: it is called from three hooks. */
__noinline __u32 sp_mark(const struct sp_leg_key *key, __u64 secret)
{
	struct sp_sip s;
	const __u32 *m = (const __u32 *)key;
	__u32 mark;

	if (!key)
		return 1;
	s.v0 = (__u32)secret;
	s.v1 = (__u32)(secret >> 32);
	s.v2 = 0x6c796765 ^ (__u32)secret;
	s.v3 = 0x74656462 ^ (__u32)(secret >> 32);
	for (int i = 0; i < (int)(sizeof(*key) / sizeof(__u32)); i++)
		sp_sip_word(&s, m[i]);
	sp_sip_word(&s, (__u32)sizeof(*key) << 24);
	s.v2 ^= 0xff;
	for (int i = 0; i < 4; i++)
		sp_sip_round(&s);
	mark = s.v1 ^ s.v3;
	return mark ? mark : 1;
}

#endif
